//! The test bed of one contender in one round: two hosts, a veth between them, a traffic generator on each.
//!
//! ```text
//!  left 10.0.0.1 ── eth0 ═══ eth0 ── 10.0.0.2 right        tunnels between them: 10.99.0.1 ══ 10.99.0.2, or the mesh's own
//! ```
//! Made anew for each contender, so that nobody finds what another left: routes, sockets, grown buffers.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::Result;
use ipnet::IpNet;
use netns_tests::{Host, Lab, link::connect};

use crate::{conditions::Conditions, traffic::Generator};

/// The link of each host.
pub const LINK: &str = "eth0";
/// The tunnel's MTU, for everybody.
pub const MTU: u32 = 1420;

/// One side.
#[derive(Debug)]
pub struct End {
    pub host: Host,
    /// On the wire.
    pub address: IpAddr,
    /// For tunnels that have no addresses of their own.
    pub inner: IpAddr,
    pub generator: Generator,
}

/// Both sides. Dropping it ends and removes all.
#[derive(Debug)]
pub struct Bed {
    pub left: End,
    pub right: End,
    /// This program, for children that are part of it.
    pub program: PathBuf,
    runs: AtomicU32,
    // Last, so that programs end before their lab.
    lab: Lab,
}

impl Bed {
    pub fn new(program: &Path, conditions: &Conditions) -> Result<Self> {
        Self::joined(program, |_, left, right| {
            connect(left, LINK, right, LINK)?;
            [left, right].into_iter().try_for_each(|host| conditions.apply(host, LINK))
        })
    }

    /// Joins the two hosts by a wire of the caller's, whose ends have to be called [`LINK`].
    pub fn joined(program: &Path, join: impl FnOnce(&mut Lab, &Host, &Host) -> Result<()>) -> Result<Self> {
        let mut lab = Lab::new()?;
        let (left, right) = (lab.host("left")?, lab.host("right")?);
        join(&mut lab, &left, &right)?;
        let [left, right] = [(left, 1), (right, 2)].map(|(host, number)| -> Result<End> {
            let address = Ipv4Addr::new(10, 0, 0, number).into();
            host.add_address(LINK, IpNet::new(address, 24)?)?;
            let generator = Generator::start(&host, program, lab.dir())?;
            Ok(End { host, address, inner: Ipv4Addr::new(10, 99, 0, number).into(), generator })
        });
        Ok(Self { left: left?, right: right?, program: program.to_owned(), runs: AtomicU32::new(1), lab })
    }

    /// Scratch space that dies with the bed.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.lab.dir().join(name)
    }

    /// A number that no other run of datagrams on this bed has.
    pub fn next_run(&self) -> u32 {
        self.runs.fetch_add(1, Ordering::Relaxed)
    }

    pub fn ends(&self) -> [&End; 2] {
        [&self.left, &self.right]
    }
}

impl End {
    /// Gives a link of this host the inner address and the MTU, and sets it up.
    pub fn address_link(&self, link: &str) -> Result<()> {
        self.host.add_address(link, IpNet::new(self.inner, 24)?)?;
        self.host.set_mtu(link, MTU)?;
        self.host.set_up(link, true)
    }

    pub fn endpoint(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address, port)
    }
}
