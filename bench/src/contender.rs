//! Who is measured: our agents, a rival, and the two ceilings; each as two ends of a tunnel on a test bed.

pub mod agents;
pub mod copying;

use std::net::IpAddr;

use anyhow::Result;
use netns_tests::{binaries::Binaries, process::Process, wireguard::Device};
use nix::unistd::Pid;

use crate::{
    bed::Bed,
    contender::{agents::Agents, copying::CopyingEngines},
    machine::Cpu,
    rival::Rival,
};

pub const MESHSPAN: &str = "meshspan";
pub const VETH: &str = "veth";
pub const NO_CRYPTO: &str = "no-crypto";

#[derive(Debug, Clone)]
pub enum Contender {
    Meshspan(Binaries),
    Rival(Rival),
    /// Ceiling: the wire alone.
    Veth,
    /// Ceiling: our engine with a cipher that copies.
    NoCrypto,
}

/// A contender at work on a bed. Dropping it ends its programs.
#[derive(Debug)]
pub struct Running {
    /// Where the two ends are reached through the tunnel.
    pub left: IpAddr,
    pub right: IpAddr,
    daemons: Daemons,
}

#[derive(Debug)]
enum Daemons {
    Agents(Box<Agents>),
    Devices(Box<[Device; 2]>),
    Copying(CopyingEngines),
    None,
}

impl Contender {
    pub fn name(&self) -> &str {
        match self {
            Self::Meshspan(_) => MESHSPAN,
            Self::Rival(rival) => &rival.name,
            Self::Veth => VETH,
            Self::NoCrypto => NO_CRYPTO,
        }
    }

    pub fn is_ceiling(&self) -> bool {
        matches!(self, Self::Veth | Self::NoCrypto)
    }

    pub fn version(&self) -> Result<String> {
        Ok(match self {
            Self::Meshspan(binaries) => agents::version(&binaries.agent)?,
            Self::Rival(rival) => rival.version(),
            Self::Veth => "Linux".to_owned(),
            Self::NoCrypto => concat!("mesh-bench ", env!("CARGO_PKG_VERSION")).to_owned(),
        })
    }

    /// Starts both ends, and waits until they are ready to carry.
    pub fn start(&self, bed: &Bed) -> Result<Running> {
        let [inner_left, inner_right] = bed.ends().map(|end| end.inner);
        let (left, right, daemons) = match self {
            Self::Meshspan(binaries) => {
                let agents = Agents::start(binaries, bed)?;
                let (left, right) = agents.addresses()?;
                (left, right, Daemons::Agents(Box::new(agents)))
            }
            Self::Rival(rival) => (inner_left, inner_right, Daemons::Devices(Box::new(rival.start(bed)?))),
            Self::Veth => (bed.left.address, bed.right.address, Daemons::None),
            Self::NoCrypto => (inner_left, inner_right, Daemons::Copying(CopyingEngines::start(bed)?)),
        };
        Ok(Running { left, right, daemons })
    }
}

impl Running {
    /// The processes that carry packets.
    pub fn pids(&self) -> Vec<Pid> {
        match &self.daemons {
            Daemons::Agents(agents) => agents.pids(),
            Daemons::Devices(devices) => devices.iter().map(Device::pid).collect(),
            Daemons::Copying(engines) => engines.processes.iter().map(Process::pid).collect(),
            Daemons::None => Vec::new(),
        }
    }

    /// An error when a program has ended, or our packets go another way than the wire.
    pub fn check(&mut self) -> Result<()> {
        match &mut self.daemons {
            Daemons::Agents(agents) => agents.check(),
            Daemons::Devices(devices) => devices.iter_mut().try_for_each(Device::check_running),
            Daemons::Copying(engines) => engines.processes.iter_mut().try_for_each(Process::check_running),
            Daemons::None => Ok(()),
        }
    }

    /// Adds the ends of the programs' logs to an error.
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        match &self.daemons {
            Daemons::Agents(agents) => agents.explain(result),
            Daemons::Devices(devices) => devices[1].explain(devices[0].explain(result)),
            Daemons::Copying(engines) => engines.processes[1].explain(engines.processes[0].explain(result)),
            Daemons::None => result,
        }
    }

    /// The most memory that one of the programs ever had, in MiB.
    pub fn peak_rss_mib(&self) -> Result<Option<f64>> {
        let peaks = self.pids().into_iter().map(crate::machine::peak_rss_mib).collect::<Result<Vec<_>>>()?;
        Ok(peaks.into_iter().reduce(f64::max))
    }

    pub fn cpu(&self) -> Result<Cpu> {
        Cpu::now(&self.pids())
    }

    /// Our agents, for what only they can be asked.
    pub fn agents(&self) -> Option<&Agents> {
        match &self.daemons {
            Daemons::Agents(agents) => Some(agents),
            _ => None,
        }
    }
}
