//! The machine of a run: what it is, and who used its processors for how long.
//!
//! Exact clocks only. A process's time is its CPU clock, which counts every thread it had, in nanoseconds, with the work
//! the kernel did on its back (system calls, and soft interrupts: a datagram sent into a veth is received by whoever sent
//! it). What the kernel did elsewhere is the time of `ksoftirqd`, one thread a processor. The whole machine is the wall
//! clock less what the processors idled; `/proc/stat` counts busy time by sampling, but idle time by a clock.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use nix::{
    time::{ClockId, clock_getcpuclockid},
    unistd::{Pid, SysconfVar, sysconf},
};
use serde::Serialize;

/// What a reader has to know to compare two reports.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Machine {
    pub cpu_model: String,
    pub cores: usize,
    pub kernel: String,
    pub memory_mib: u64,
}

impl Machine {
    pub fn here() -> Result<Self> {
        let value = |file: &str, key: &str| -> Result<String> {
            let text = fs::read_to_string(file)?;
            let line = text.lines().find(|line| line.starts_with(key)).with_context(|| format!("{file}: no {key}"))?;
            Ok(line.split_once(':').map_or("", |(_, value)| value).trim().to_owned())
        };
        let memory = value("/proc/meminfo", "MemTotal")?;
        Ok(Self {
            cpu_model: value("/proc/cpuinfo", "model name").unwrap_or_else(|_| std::env::consts::ARCH.to_owned()),
            cores: cores()?,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            memory_mib: memory.split(' ').next().unwrap_or_default().parse::<u64>()? / 1024,
        })
    }
}

/// CPU time so far, of some processes and of the machine.
#[derive(Debug, Clone)]
pub struct Cpu {
    at: Instant,
    processes: Vec<(Pid, Duration)>,
    ksoftirqd: Duration,
    /// Idle, or given to another guest of the same host.
    not_used: Duration,
    cores: usize,
}

/// CPU time between two points.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuUsed {
    /// Of the processes asked about, with the kernel's work on their backs.
    pub processes: Duration,
    /// Of the threads that do what soft interrupts left undone.
    pub ksoftirqd: Duration,
    /// Of everything.
    pub machine: Duration,
}

impl Cpu {
    pub fn now(processes: &[Pid]) -> Result<Self> {
        let mut ksoftirqd = Duration::ZERO;
        for thread in ksoftirqd_threads()? {
            ksoftirqd += process_time(thread)?;
        }
        Ok(Self {
            at: Instant::now(),
            processes: processes.iter().map(|pid| Ok((*pid, process_time(*pid)?))).collect::<Result<_>>()?,
            ksoftirqd,
            not_used: not_used(&fs::read_to_string("/proc/stat")?)?,
            cores: cores()?,
        })
    }

    /// What was used since; an error when one of the processes is gone.
    pub fn used(&self) -> Result<CpuUsed> {
        let pids: Vec<Pid> = self.processes.iter().map(|(pid, _)| *pid).collect();
        let end = Self::now(&pids)?;
        let cores = u32::try_from(self.cores)?;
        let sum = |cpu: &Self| cpu.processes.iter().map(|(_, time)| *time).sum::<Duration>();
        Ok(CpuUsed {
            processes: sum(&end).saturating_sub(sum(self)),
            ksoftirqd: end.ksoftirqd.saturating_sub(self.ksoftirqd),
            machine: ((end.at - self.at) * cores).saturating_sub(end.not_used.saturating_sub(self.not_used)),
        })
    }
}

/// The most memory a process ever had resident, in MiB.
pub fn peak_rss_mib(pid: Pid) -> Result<f64> {
    let file = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
    let peak = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM: it has ended")?;
    let kib: f64 = peak.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1024.0)
}

/// All CPU time of a process, its dead threads included.
fn process_time(pid: Pid) -> Result<Duration> {
    let time = clock_getcpuclockid(pid).and_then(ClockId::now).with_context(|| format!("process {pid} is gone"))?;
    Ok(time.into())
}

fn ksoftirqd_threads() -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        let comm = fs::read_to_string(Path::new("/proc").join(&name).join("comm")).unwrap_or_default();
        if comm.starts_with("ksoftirqd/") {
            found.push(Pid::from_raw(pid));
        }
    }
    Ok(found)
}

fn not_used(stat: &str) -> Result<Duration> {
    let ticks_a_second = sysconf(SysconfVar::CLK_TCK)?.context("the kernel has no clock tick")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let field = |at: usize| -> Result<u64> {
        let text = line.split_whitespace().nth(at).with_context(|| format!("/proc/stat has no field {at}"))?;
        text.parse().map_err(|error| anyhow!("/proc/stat: {text}: {error}"))
    };
    // idle, iowait and steal.
    let ticks = field(4)? + field(5)? + field(8)?;
    Ok(Duration::from_secs_f64(ticks as f64 / ticks_a_second as f64))
}

fn cores() -> Result<usize> {
    let stat = fs::read_to_string("/proc/stat")?;
    Ok(stat.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu ")).count().max(1))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn unused_time_is_idle_waiting_and_stolen() {
        let ticks = sysconf(SysconfVar::CLK_TCK).unwrap().unwrap() as u64;
        let stat = format!("cpu  9 9 9 {} {} 9 9 {} 0 0\ncpu0 1 2\n", 3 * ticks, ticks, 2 * ticks);
        assert_eq!(not_used(&stat).unwrap(), Duration::from_secs(6));
    }

    #[test]
    fn work_of_a_process_is_counted_to_it_and_to_the_machine() {
        let before = Cpu::now(&[Pid::this()]).unwrap();
        let mut sum = 0_u64;
        let end = Instant::now() + Duration::from_secs(60);
        while before.used().unwrap().processes < Duration::from_millis(200) {
            (0..100_000).for_each(|n| sum = std::hint::black_box(sum + n));
            assert!(Instant::now() < end, "a minute of work is not counted");
        }
        let used = before.used().unwrap();
        assert!(used.machine + Duration::from_millis(50) >= used.processes, "{used:?}");
    }

    #[test]
    fn this_machine_is_described() {
        let machine = Machine::here().unwrap();
        assert!(machine.cores > 0 && machine.memory_mib > 0 && !machine.kernel.is_empty(), "{machine:?}");
        assert!(peak_rss_mib(Pid::this()).unwrap() > 1.0);
    }
}
