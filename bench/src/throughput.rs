//! `mesh-bench throughput`: our agents, the rivals and the ceilings, round by round, and the verdict.

use std::{
    collections::BTreeMap,
    fs,
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use netns_tests::{binaries::Binaries, program};

use crate::{
    bed::Bed,
    cipher,
    conditions::Conditions,
    contender::{Contender, MESHSPAN},
    gates, iperf3,
    machine::Machine,
    measure::{Figures, Measuring},
    metric::{Metric, Step},
    peers,
    report::{self, Measured, Report, chart, page, table},
    rival::{self, Rival},
    stats::Series,
    underlay::Underlay,
};

/// How long the cipher is measured in each round.
const CIPHER_FOR: Duration = Duration::from_millis(300);
/// Tries of one search for a rate, in the first round and later, when it begins near the goal.
const TRIES: [u32; 2] = [14, 8];
const SMOKE_SECONDS: f64 = 0.3;
const SMOKE_TRIES: u32 = 4;
/// What iperf3 may differ by.
const IPERF3_TOLERANCE: f64 = 0.10;

/// Measures the throughput of our agents and of the rivals that are installed, in the same rounds on this machine.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// How often everything is measured; medians are of so many.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Length of each measurement.
    #[arg(long, default_value_t = 4.0, value_parser = seconds)]
    seconds: f64,
    /// What the wire can do for a sender: carry super-packets whole; software segmentation and GRO; neither.
    #[arg(long, value_enum, default_value_t = Underlay::On)]
    underlay: Underlay,
    /// The congestion control of whoever sends TCP, by the kernel's name, such as cubic; else this machine's.
    #[arg(long, value_name = "NAME")]
    congestion: Option<String>,
    /// One more rival. The command stays in the foreground; `{}` in it is the name of the link, else that is appended.
    #[arg(long = "rival", value_name = "NAME=COMMAND")]
    rivals: Vec<Rival>,
    /// Fail when one of these could not be measured.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    require: Vec<String>,
    /// Only these contenders (meshspan, the rivals by name, veth, no-crypto).
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    contenders: Vec<String>,
    /// Only these measurements.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Step>,
    /// Repeat the measurement of one TCP stream with iperf3, and fail when it differs by more than 10 %.
    #[arg(long)]
    check_iperf3: bool,
    /// Compare a mesh of so many peers with a mesh of one instead: traffic to one of them, then spread over ten.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(10..=150), conflicts_with_all = ["rivals", "contenders", "only", "check_iperf3", "smoke"])]
    peers: Option<u16>,
    /// Everything once, as short as can be, and no gates: does it work?
    #[arg(long)]
    smoke: bool,
    /// Print the report as one JSON line at the end; everything for people goes to stderr.
    #[arg(long)]
    json: bool,
    /// Write a page with plots.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the plot of TCP throughput.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

impl Args {
    fn conditions(&self) -> Result<Conditions> {
        Conditions::new(self.underlay, self.congestion.as_deref())
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text} is no number"))?;
    if (0.1..=3600.0).contains(&seconds) { Ok(seconds) } else { Err("from 0.1 to 3600 seconds".into()) }
}

/// Runs, prints, and says whether it was good.
pub fn run(args: &Args) -> Result<ExitCode> {
    let binaries = program::enter("the bench")?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let report = match args.peers {
        Some(count) => measure_peers(args, &binaries, &program, count)?,
        None => measure(args, &binaries, &program)?,
    };
    let text = table::render(&report);
    if args.json {
        eprintln!("{text}");
    } else {
        println!("{text}");
    }
    for (path, made) in [(&args.html, page::render(&report)), (&args.svg, chart::throughput(&report))] {
        if let Some(path) = path {
            fs::write(path, made).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn measure_peers(args: &Args, binaries: &Binaries, program: &Path, count: u16) -> Result<Report> {
    let progress = progress(args.rounds.into());
    let conditions = args.conditions()?;
    let found = peers::measure(binaries, program, &conditions, count.into(), (args.rounds, args.seconds), &progress)?;
    progress.finish_and_clear();
    let ok = found.ok();
    Ok(Report { ok, peers: Some(found), ..Report::empty(conditions, args.rounds, args.seconds)? })
}

fn measure(args: &Args, binaries: &Binaries, program: &Path) -> Result<Report> {
    let (contenders, missing) = line_up(args, binaries)?;
    let names: Vec<String> = contenders.iter().map(|contender| contender.name().to_owned()).collect();
    rival::require(&args.require, &names)?;
    let mut run = Run::new(args, program, contenders)?;
    // What no bed can have is one error at once, not one for each contender in each round.
    drop(Bed::new(program, &run.conditions)?);
    run.all_rounds();
    run.finish(missing)
}

/// Ours first, then the rivals, then the ceilings; and which known rivals are absent.
fn line_up(args: &Args, binaries: &Binaries) -> Result<(Vec<Contender>, Vec<String>)> {
    let (known, missing) = rival::known();
    let mut all = vec![Contender::Meshspan(binaries.clone())];
    all.extend(known.into_iter().chain(args.rivals.iter().cloned()).map(Contender::Rival));
    all.extend([Contender::Veth, Contender::NoCrypto]);
    let mut names = std::collections::BTreeSet::new();
    for contender in &all {
        ensure!(names.insert(contender.name().to_owned()), "two contenders are called {}", contender.name());
    }
    for name in &args.contenders {
        ensure!(names.contains(name), "there is no contender {name}; there are {names:?}");
    }
    all.retain(|contender| args.contenders.is_empty() || args.contenders.iter().any(|name| name == contender.name()));
    Ok((all, missing))
}

/// The rounds under way.
struct Run<'a> {
    args: &'a Args,
    conditions: Conditions,
    program: &'a Path,
    contenders: Vec<Contender>,
    steps: Vec<Step>,
    rounds: u32,
    seconds: f64,
    measured: Vec<Measured>,
    cipher: Series,
    iperf3: BTreeMap<String, Series>,
    /// (name of the contender, what happened)
    failures: Vec<(String, String)>,
    progress: ProgressBar,
}

impl<'a> Run<'a> {
    fn new(args: &'a Args, program: &'a Path, contenders: Vec<Contender>) -> Result<Self> {
        let steps = if args.only.is_empty() { Step::ALL.to_vec() } else { args.only.clone() };
        let (rounds, seconds) = if args.smoke { (1, SMOKE_SECONDS) } else { (args.rounds, args.seconds) };
        let measured = contenders
            .iter()
            .map(|contender| Ok(Measured::new(contender.name(), contender.version()?)))
            .collect::<Result<_>>()?;
        let progress = progress(u64::from(rounds) * (contenders.len() * steps.len()) as u64);
        Ok(Self {
            args,
            conditions: args.conditions()?,
            program,
            contenders,
            steps,
            rounds,
            seconds,
            measured,
            cipher: Series::default(),
            iperf3: BTreeMap::new(),
            failures: Vec::new(),
            progress,
        })
    }

    fn all_rounds(&mut self) {
        for round in 0..self.rounds as usize {
            self.cipher.push(Some(cipher::ns_per_byte(CIPHER_FOR)));
            // Another one begins each round, so that none always follows the same.
            for turn in 0..self.contenders.len() {
                self.one(round, (round + turn) % self.contenders.len());
            }
        }
        self.progress.finish_and_clear();
    }

    /// One contender in one round; a step that fails costs its figures, not the run.
    fn one(&mut self, round: usize, which: usize) {
        let mut figures = Figures::new();
        let contender = self.contenders[which].clone();
        if let Err(error) = self.measure(round, which, &contender, &mut figures) {
            let what = format!("round {}, {}: {error:#}", round + 1, contender.name());
            self.progress.suspend(|| eprintln!("{what}"));
            self.failures.push((contender.name().to_owned(), what));
        }
        self.measured[which].push(round, &figures);
    }

    fn measure(&mut self, round: usize, which: usize, contender: &Contender, figures: &mut Figures) -> Result<()> {
        let label = format!("round {}/{} · {}", round + 1, self.rounds, contender.name());
        self.progress.set_message(label.clone());
        let bed = Bed::new(self.program, &self.conditions)?;
        let mut running = contender.start(&bed)?;
        // Handshakes and first allocations are not what is measured.
        let before: Figures =
            Metric::ALL.into_iter().filter_map(|metric| Some((metric, self.measured[which].median(metric)?))).collect();
        let tries = if self.args.smoke { SMOKE_TRIES } else { TRIES[usize::from(round > 0)] };
        let mut failed = None;
        for step in &self.steps {
            self.progress.set_message(format!("{label} · {step}"));
            let measuring = Measuring { bed: &bed, running: &running, seconds: self.seconds, before: &before, tries };
            let done = measuring.step(*step, figures);
            let done = running.explain(done).with_context(|| step.to_string());
            self.progress.inc(1);
            if let Err(error) = done.and(running.check()) {
                failed = Some(error);
                break;
            }
        }
        let peak = running.peak_rss_mib();
        if let Ok(Some(peak)) = peak {
            figures.insert(Metric::PeakRss, peak);
        }
        // Why a program ended says more than that its memory cannot be read any more.
        failed.map_or(peak.map(drop), Err)?;
        if self.args.check_iperf3 && !contender.is_ceiling() {
            self.progress.set_message(format!("{label} · iperf3"));
            // Ours before and after: a machine that grows slower or faster meanwhile says nothing of either.
            let ours = || -> Result<f64> {
                let mut figures = Figures::new();
                let measuring =
                    Measuring { bed: &bed, running: &running, seconds: self.seconds, before: &before, tries };
                measuring.step(Step::Tcp1, &mut figures)?;
                figures.get(&Metric::Tcp1).copied().context("no figure of one TCP stream")
            };
            let first = ours()?;
            let theirs = iperf3::tcp1(&bed, &running, self.seconds)?;
            let ratio = theirs / ((first + ours()?) / 2.0);
            self.iperf3.entry(contender.name().to_owned()).or_default().push(Some(ratio));
        }
        Ok(())
    }

    fn finish(self, missing: Vec<String>) -> Result<Report> {
        let (ceilings, contenders): (Vec<_>, Vec<_>) =
            self.measured.into_iter().partition(|measured| report::CEILINGS.contains(&measured.name.as_str()));
        let gates = if self.args.smoke {
            Vec::new()
        } else {
            gates::judge(self.conditions.underlay, &contenders, &ceilings, &self.cipher)
        };
        // A rival that fails where it is not required is its own problem, and is shown.
        let counts = |name: &str| {
            let rival = contenders.iter().any(|measured| measured.name == name && name != MESHSPAN);
            !rival || self.args.require.iter().any(|required| required == name)
        };
        let differs = |series: &Series| series.median().is_none_or(|ratio| (ratio - 1.0).abs() > IPERF3_TOLERANCE);
        let ok = !self.failures.iter().any(|(name, _)| counts(name))
            && gates.iter().all(|gate| gate.passed != Some(false))
            && !self.iperf3.values().any(differs);
        Ok(Report {
            ok,
            missing,
            ratios: report::ratios(&contenders, &ceilings),
            contenders,
            ceilings,
            gates,
            failures: self.failures.into_iter().map(|(_, what)| what).collect(),
            cipher_ns_per_byte: self.cipher,
            iperf3_ratio: self.iperf3,
            ..Report::empty(self.conditions, self.rounds, self.seconds)?
        })
    }
}

impl Report {
    /// Nothing was measured.
    fn empty(conditions: Conditions, rounds: u32, seconds: f64) -> Result<Self> {
        Ok(Self {
            ok: false,
            conditions,
            machine: Machine::here()?,
            missing: Vec::new(),
            contenders: Vec::new(),
            ceilings: Vec::new(),
            ratios: BTreeMap::new(),
            gates: Vec::new(),
            failures: Vec::new(),
            cipher_ns_per_byte: Series::default(),
            iperf3_ratio: BTreeMap::new(),
            peers: None,
            rounds,
            seconds,
        })
    }
}

/// One line on a terminal, nothing elsewhere.
pub(crate) fn progress(length: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:20} {elapsed}/{eta_precise} {msg}");
    ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
