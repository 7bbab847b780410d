//! The figures of a report, each with its unit and which way is better; and the steps that measure them.

use std::fmt;

/// One figure. Its key is its field in the JSON line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    Tcp1,
    Tcp8,
    Reverse,
    Bidir,
    Udp1400,
    Udp512,
    Udp64,
    CpuPerByte,
    DaemonCpuPerByte,
    Udp200CpuPerByte,
    RttIdleP50,
    RttIdleP99,
    RttLoadedP50,
    RttLoadedP99,
    Retransmits,
    PeakRss,
    /// The rest only of our agents, in the step that floods them.
    JunkLoss,
    JunkCpu,
    JunkRate,
}

/// Which way a figure is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Higher,
    Lower,
}

impl Metric {
    pub const ALL: [Self; 19] = [
        Self::Tcp1,
        Self::Tcp8,
        Self::Reverse,
        Self::Bidir,
        Self::Udp1400,
        Self::Udp512,
        Self::Udp64,
        Self::CpuPerByte,
        Self::DaemonCpuPerByte,
        Self::Udp200CpuPerByte,
        Self::RttIdleP50,
        Self::RttIdleP99,
        Self::RttLoadedP50,
        Self::RttLoadedP99,
        Self::Retransmits,
        Self::PeakRss,
        Self::JunkLoss,
        Self::JunkCpu,
        Self::JunkRate,
    ];

    /// With the unit: the field of a contender.
    pub fn key(self) -> &'static str {
        match self {
            Self::Tcp1 => "tcp1_gbps",
            Self::Tcp8 => "tcp8_gbps",
            Self::Reverse => "reverse_gbps",
            Self::Bidir => "bidir_gbps",
            Self::Udp1400 => "udp1400_lossfree_mbps",
            Self::Udp512 => "udp512_lossfree_mbps",
            Self::Udp64 => "udp64_lossfree_kpps",
            Self::CpuPerByte => "cpu_ns_per_byte",
            Self::DaemonCpuPerByte => "daemon_cpu_ns_per_byte",
            Self::Udp200CpuPerByte => "udp200_cpu_ns_per_byte",
            Self::RttIdleP50 => "rtt_idle_us_p50",
            Self::RttIdleP99 => "rtt_idle_us_p99",
            Self::RttLoadedP50 => "rtt_loaded_us_p50",
            Self::RttLoadedP99 => "rtt_loaded_us_p99",
            Self::Retransmits => "retransmits",
            Self::PeakRss => "peak_rss_mib",
            Self::JunkLoss => "junk_loss_percent",
            Self::JunkCpu => "junk_cpu_us_per_datagram",
            Self::JunkRate => "junk_kpps",
        }
    }

    /// Without the unit: the field of a ratio.
    pub fn short(self) -> &'static str {
        let key = self.key();
        let unit = ["_gbps", "_lossfree_mbps", "_lossfree_kpps", "_ns_per_byte"];
        match self {
            Self::RttIdleP50 => "rtt_idle_p50",
            Self::RttIdleP99 => "rtt_idle_p99",
            Self::RttLoadedP50 => "rtt_loaded_p50",
            Self::RttLoadedP99 => "rtt_loaded_p99",
            Self::PeakRss => "peak_rss",
            _ => unit.iter().find_map(|unit| key.strip_suffix(unit)).unwrap_or(key),
        }
    }

    /// In words, for a table.
    pub fn label(self) -> &'static str {
        match self {
            Self::Tcp1 => "TCP, 1 stream, Gbit/s",
            Self::Tcp8 => "TCP, 8 streams, Gbit/s",
            Self::Reverse => "TCP, reverse, Gbit/s",
            Self::Bidir => "TCP, both ways, Gbit/s",
            Self::Udp1400 => "UDP 1400 B loss-free, Mbit/s",
            Self::Udp512 => "UDP 512 B loss-free, Mbit/s",
            Self::Udp64 => "UDP 64 B loss-free, kpps",
            Self::CpuPerByte => "CPU, whole machine, TCP, ns/B",
            Self::DaemonCpuPerByte => "CPU, both daemons, TCP, ns/B",
            Self::Udp200CpuPerByte => "CPU, both daemons, 200 Mbit/s UDP, ns/B",
            Self::RttIdleP50 => "round trip, idle, p50, µs",
            Self::RttIdleP99 => "round trip, idle, p99, µs",
            Self::RttLoadedP50 => "round trip, 4 TCP flows, p50, µs",
            Self::RttLoadedP99 => "round trip, 4 TCP flows, p99, µs",
            Self::Retransmits => "TCP retransmits, 1 stream",
            Self::PeakRss => "peak memory of a daemon, MiB",
            Self::JunkLoss => "loss of 300 Mbit/s under junk, %",
            Self::JunkCpu => "CPU per junk datagram, µs",
            Self::JunkRate => "junk taken in, kpps",
        }
    }

    pub fn better(self) -> Better {
        match self {
            Self::Tcp1
            | Self::Tcp8
            | Self::Reverse
            | Self::Bidir
            | Self::Udp1400
            | Self::Udp512
            | Self::Udp64
            | Self::JunkRate => Better::Higher,
            _ => Better::Lower,
        }
    }

    /// Is `ours / theirs` worth a reader's time? Counts that may be zero are not.
    pub fn has_ratio(self) -> bool {
        !matches!(self, Self::Retransmits | Self::JunkLoss | Self::JunkCpu | Self::JunkRate)
    }
}

impl Better {
    pub fn pick(self, a: f64, b: f64) -> f64 {
        match self {
            Self::Higher => a.max(b),
            Self::Lower => a.min(b),
        }
    }
}

/// Something that is done with a contender, and gives figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Step {
    /// One stream from left to right.
    Tcp1,
    Tcp8,
    /// One stream from right to left.
    Reverse,
    /// One stream each way.
    Bidir,
    /// The highest rate without loss, with datagrams of this size.
    Udp1400,
    Udp512,
    Udp64,
    /// CPU at 200 Mbit/s of UDP.
    Udp200,
    /// Round trips, idle and while TCP flows run.
    Rtt,
    /// 300 Mbit/s of UDP while everybody else sends junk to our agent.
    Junk,
}

impl Step {
    pub const ALL: [Self; 10] = [
        Self::Tcp1,
        Self::Tcp8,
        Self::Reverse,
        Self::Bidir,
        Self::Udp1400,
        Self::Udp512,
        Self::Udp64,
        Self::Udp200,
        Self::Rtt,
        Self::Junk,
    ];
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp1 => "tcp1",
            Self::Tcp8 => "tcp8",
            Self::Reverse => "reverse",
            Self::Bidir => "bidir",
            Self::Udp1400 => "udp1400",
            Self::Udp512 => "udp512",
            Self::Udp64 => "udp64",
            Self::Udp200 => "udp200",
            Self::Rtt => "rtt",
            Self::Junk => "junk",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_figure_has_a_key_of_its_own_and_ratios_drop_the_unit() {
        let keys: BTreeSet<_> = Metric::ALL.map(Metric::key).into();
        let shorts: BTreeSet<_> = Metric::ALL.map(Metric::short).into();
        assert_eq!((keys.len(), shorts.len()), (Metric::ALL.len(), Metric::ALL.len()));
        assert_eq!((Metric::Tcp1.short(), Metric::Udp64.short()), ("tcp1", "udp64"));
        assert_eq!(Metric::Udp200CpuPerByte.short(), "udp200_cpu");
    }
}
