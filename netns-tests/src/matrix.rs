//! Every kind of site with every other: real agents and a real server, judged by what crosses the wires.
//!
//! For each pair the sites become of their kinds, both agents start anew, and when they know each other and are idle, a
//! numbered exchange starts. [`judge`] reads it and the
//! captures, [`report`] adds up, [`pair`] does the work in between.

pub mod judge;
pub mod pair;
pub mod report;

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::{
    Lab,
    binaries::Binaries,
    matrix::{
        judge::Evidence,
        pair::{Bench, BenchOptions, keep_words},
        report::{Hard, Report, Row},
    },
    nat::{Kind, Ports, oracle::Pair},
};

/// The pair that needs luck, and how often it is tried.
const HARD: Pair = Pair::Apart(Kind::EimApdf, Kind::EdmApdf);
const HARD_RUNS: u32 = 10;
/// How long a pair that must be direct may take to become so before it is called relayed, and how long the others are
/// watched: the bounds are far below.
const PATIENCE: Duration = Duration::from_secs(10);
const WATCHED: Duration = Duration::from_secs(5);
const HARD_PATIENCE: Duration = Duration::from_secs(60);
/// One pair of each class: nobody translates, both do and punch, one moves its ports, both do, one passes no UDP, a
/// carrier is in between, both are in one place.
const SMOKE: [Pair; 8] = [
    Pair::Apart(Kind::Open, Kind::Open),
    Pair::Apart(Kind::Open, Kind::EdmApdf),
    Pair::Apart(Kind::EimEif, Kind::EdmApdf),
    Pair::Apart(Kind::EimApdf, Kind::EimApdf),
    Pair::Apart(Kind::EdmApdf, Kind::EdmApdf),
    Pair::Apart(Kind::EimApdf, Kind::UdpBlocked),
    Pair::Apart(Kind::EimAdf, Kind::CgnatEimApdf),
    SAME_NAT,
];
const SAME_NAT: Pair = Pair::SameNat(Kind::EimApdf);

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// All pairs and the hard one again and again.
    All,
    /// One pair of each class.
    Smoke,
    /// The hard pair again and again, and no other.
    Hard,
    Only(Vec<Pair>),
}

impl Selection {
    pub fn pairs(&self) -> Vec<Pair> {
        match self {
            Self::All => {
                let apart = Kind::ALL
                    .iter()
                    .enumerate()
                    .flat_map(|(index, left)| Kind::ALL[index..].iter().map(move |right| Pair::Apart(*left, *right)));
                apart.chain([SAME_NAT]).collect()
            }
            Self::Smoke => SMOKE.to_vec(),
            Self::Hard => Vec::new(),
            Self::Only(pairs) => pairs.clone(),
        }
    }

    fn hard_runs(&self) -> u32 {
        if matches!(self, Self::All | Self::Hard) { HARD_RUNS } else { 0 }
    }
}

/// `A,B`, or `same-nat`.
pub fn parse_pair(text: &str) -> Result<Pair> {
    if text == report::SAME_NAT {
        return Ok(SAME_NAT);
    }
    let (left, right) = text.split_once(',').ok_or_else(|| anyhow::anyhow!("write a pair as A,B or same-nat"))?;
    Ok(Pair::Apart(left.parse()?, right.parse()?))
}

#[derive(Debug, Clone)]
pub struct Options {
    pub selection: Selection,
    /// One way, on the wire of each site.
    pub delay: Duration,
    pub ports: Ports,
    /// Where what the agents of a failed pair say is kept.
    pub keep: Option<PathBuf>,
}

/// Runs the matrix. Fails only when no lab could be made; what a pair did wrong is in its row, and why on stderr.
pub fn run(binaries: &Binaries, options: &Options) -> Result<Report> {
    let start = Instant::now();
    let mut bench = Bench::build(
        Lab::new()?,
        binaries,
        &BenchOptions { delay: options.delay, ports: options.ports, ..BenchOptions::default() },
    )?;
    let mut report = Report::default();
    for pair in options.selection.pairs() {
        let patience = match pair.expect() {
            crate::nat::oracle::Expect::Direct => PATIENCE,
            crate::nat::oracle::Expect::Relay => WATCHED,
        };
        let row = measure(&mut bench, pair, patience, start, options.keep.as_deref());
        report.rows.push(row);
    }
    let runs = options.selection.hard_runs();
    if runs > 0 {
        let mut hard = Hard::default();
        for _ in 0..runs {
            let row = measure(&mut bench, HARD, HARD_PATIENCE, start, options.keep.as_deref());
            hard.runs += 1;
            hard.direct += u32::from(row.got == judge::Got::Direct);
        }
        report.hard = Some(hard);
    }
    Ok(report)
}

fn measure(bench: &mut Bench, pair: Pair, patience: Duration, start: Instant, keep: Option<&Path>) -> Row {
    let evidence = bench.arrange(pair).and_then(|()| bench.exchange(pair, patience));
    let verdict = evidence.as_ref().map(|evidence| evidence.judge(pair.expect(), bench.world.relay_round_trip()));
    let row = Row::of(pair, verdict.as_ref().ok());
    let mut line = format!("{:>7.1} s  {row}", start.elapsed().as_secs_f64());
    match &verdict {
        Ok(verdict) => verdict.faults.iter().for_each(|fault| line.push_str(&format!("\n           {fault}"))),
        Err(error) => line.push_str(&format!("\n           {error:#}")),
    }
    if let Some(dir) = keep.filter(|_| !row.ok) {
        let name = format!("{}-{}", row.left, row.right);
        let timeline = evidence.as_ref().map(Evidence::timeline).unwrap_or_default();
        let kept = keep_words(&bench.nodes, dir, &name)
            .and_then(|()| Ok(fs::write(dir.join(format!("{name}.timeline")), timeline)?));
        if let Err(error) = kept {
            line.push_str(&format!("\n           {error:#}"));
        }
    }
    // A closed pipe must not end the run before it has cleaned up.
    let _ = writeln!(io::stderr(), "{line}");
    row
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::nat::oracle::Expect;

    #[test]
    fn all_is_every_pair_once_and_the_one_in_one_place() {
        let pairs = Selection::All.pairs();
        assert_eq!(pairs.len(), 46);
        let direct = pairs.iter().filter(|pair| pair.expect() == Expect::Direct).count();
        // 9 with UDP blocked; 2 symmetric kinds with each other and themselves, and with 3 that filter by port.
        assert_eq!(46 - direct, 9 + 3 + 2 * 3);
    }

    #[test]
    fn smoke_has_both_verdicts_and_pairs_are_read_as_written() {
        let expects: Vec<_> = Selection::Smoke.pairs().iter().map(|pair| pair.expect()).collect();
        assert!(expects.contains(&Expect::Direct) && expects.contains(&Expect::Relay));
        assert_eq!(parse_pair("open,cgnat-edm-apdf").unwrap(), Pair::Apart(Kind::Open, Kind::CgnatEdmApdf));
        assert_eq!(parse_pair("same-nat").unwrap(), SAME_NAT);
        assert!(parse_pair("open").is_err());
        assert!(parse_pair("open,moon").unwrap_err().to_string().contains("cgnat-eim-eif"));
    }
}
