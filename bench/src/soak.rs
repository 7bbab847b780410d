//! `mesh-bench soak`: our agent and a rival talk for long, across rekeys; nothing may be changed, stall or go one way only.
//!
//! Two pairs run side by side, because a rekey comes only every two minutes: in one the agent speaks first, in the other
//! the rival. Judged from outside: by the bytes that arrive, and by the handshakes that the rival counts.

pub mod pair;
pub mod stream;

use std::{process::ExitCode, time::Duration};

use anyhow::{Result, anyhow};
use netns_tests::{Lab, program};
use serde::Serialize;

use crate::rival::{self, Rival};
use pair::{Pair, PairTally, Pattern, Starter};

const LONGEST_STALL: Duration = Duration::from_secs(1);
const REKEYS: u64 = 2;

/// Lets our agent and a rival talk for long, across rekeys.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A known rival, or NAME=COMMAND as for `throughput`.
    #[arg(long, value_name = "NAME", default_value = "wireguard-go", value_parser = rival)]
    rival: RivalName,
    #[arg(long, default_value_t = 5.0, value_parser = minutes)]
    minutes: f64,
    /// Little talk with pauses of minutes, instead of streams and bursts.
    #[arg(long)]
    idle: bool,
    /// Print the verdict as one JSON line at the end.
    #[arg(long)]
    json: bool,
}

/// Looked for when the run starts, not when the command line is read.
#[derive(Debug, Clone)]
enum RivalName {
    Known(String),
    Own(Rival),
}

fn rival(text: &str) -> Result<RivalName> {
    Ok(if text.contains('=') { RivalName::Own(text.parse()?) } else { RivalName::Known(text.to_owned()) })
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|_| format!("{text} is no number"))?;
    if (0.05..=10_000.0).contains(&minutes) { Ok(minutes) } else { Err("from 0.05 to 10000 minutes".into()) }
}

/// The verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SoakReport {
    pub ok: bool,
    /// Of both pairs together, as the rival counts them.
    pub rekeys: u64,
    pub corrupt_bytes: u64,
    pub max_stall_ms: u64,
    /// Seconds in which one direction was silent while the other was not.
    pub one_way_windows: u64,
    pub sent: u64,
    pub lost: u64,
    pub rival: String,
}

impl SoakReport {
    pub fn of(rival: &str, pairs: &[PairTally]) -> Self {
        let ways = || pairs.iter().flat_map(|pair| &pair.ways);
        let stall = ways().map(|way| way.longest_stall).max().unwrap_or_default();
        let sum = |of: fn(&stream::Tally) -> u64| ways().map(of).sum::<u64>();
        let (sent, received) = (sum(|way| way.sent), sum(|way| way.received));
        let rekeys = pairs.iter().map(|pair| pair.rekeys).sum();
        let corrupt_bytes = sum(|way| way.corrupt_bytes);
        let one_way_windows = pairs.iter().map(PairTally::one_way_windows).sum();
        Self {
            ok: rekeys >= REKEYS
                && pairs.iter().all(|pair| pair.rekeys > 0)
                && corrupt_bytes == 0
                && stall <= LONGEST_STALL
                && one_way_windows == 0
                && sent > 0,
            rekeys,
            corrupt_bytes,
            max_stall_ms: u64::try_from(stall.as_millis()).unwrap_or(u64::MAX),
            one_way_windows,
            sent,
            lost: sent.saturating_sub(received),
            rival: rival.to_owned(),
        }
    }
}

/// Runs, prints, and says whether it was good.
pub fn run(args: &Args) -> Result<ExitCode> {
    let binaries = program::enter("the soak")?;
    let rival = match &args.rival {
        RivalName::Known(name) => rival::by_name(name)?,
        RivalName::Own(rival) => rival.clone(),
    };
    let length = Duration::from_secs_f64(args.minutes * 60.0);
    let mut lab = Lab::new()?;
    let patterns = if args.idle { [Pattern::Idle; 2] } else { [Pattern::Steady, Pattern::Bursty] };
    let mut pairs = Vec::new();
    for (number, (pattern, starter)) in (1..).zip(patterns.into_iter().zip([Starter::Agent, Starter::Rival])) {
        pairs.push(Pair::start(&mut lab, &binaries, &rival, number, pattern, starter)?);
    }
    let seed = std::process::id().into();
    eprintln!(
        "{} for {} minutes with {}, seed {seed}",
        if args.idle { "idle" } else { "steady and bursty" },
        args.minutes,
        rival.version()
    );
    let tallies = talk(&pairs, length, seed)?;
    let report = SoakReport::of(&rival.name, &tallies);
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("{}", report.sentence());
    }
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All pairs at once; the first error of one ends the run when the others are through.
pub fn talk(pairs: &[Pair], length: Duration, seed: u64) -> Result<Vec<PairTally>> {
    let progress = crate::throughput::progress(length.as_secs().max(1));
    progress.enable_steady_tick(Duration::from_secs(1));
    progress.set_message(format!("of {} s", length.as_secs()));
    let tallies = std::thread::scope(|scope| {
        let talks: Vec<_> = (seed..)
            .zip(pairs)
            .map(|(seed, pair)| scope.spawn(move || pair.explain(pair.talk(length, seed))))
            .collect();
        talks.into_iter().map(|talk| talk.join().map_err(|_| anyhow!("a pair panicked"))?).collect()
    });
    progress.finish_and_clear();
    tallies
}

impl SoakReport {
    fn sentence(&self) -> String {
        format!(
            "{}: {} rekeys with {}, {} of {} datagrams lost, {} bytes corrupt, longest stall {} ms, {} seconds one way only",
            if self.ok { "ok" } else { "NOT OK" },
            self.rekeys,
            self.rival,
            self.lost,
            self.sent,
            self.corrupt_bytes,
            self.max_stall_ms,
            self.one_way_windows
        )
    }
}
