//! The discovery server under test.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::Result;
use nix::unistd::Pid;

use crate::{Host, binaries::Binaries, mesh::config::ServerAddress, process::Process, wait};

const SESSION_PORT: u16 = 7443;
const STUN_PORT: u16 = 3478;
const HTTP_PORT: u16 = 9080;
const START_WITHIN: Duration = Duration::from_secs(10);
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// One server; it keeps its state directory, so that a restart has the same pin.
#[derive(Debug)]
pub struct Server {
    pub host: Host,
    pub address: IpAddr,
    program: PathBuf,
    dir: PathBuf,
    ttl: Option<Duration>,
    /// A second address of the host, which answers STUN too.
    pub stun_alternate: Option<IpAddr>,
    starts: u32,
    process: Option<Process>,
}

impl Server {
    /// A server at an address of `host`, with its files in `dir`.
    pub fn new(binaries: &Binaries, host: Host, dir: &Path, address: IpAddr, ttl: Option<Duration>) -> Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self {
            host,
            address,
            program: binaries.server.clone(),
            dir: dir.to_owned(),
            ttl,
            stun_alternate: None,
            starts: 0,
            process: None,
        })
    }

    /// Starts the server and waits until it has said where it is.
    pub fn start(&mut self) -> Result<ServerAddress> {
        let mut command = Command::new(&self.program);
        for (flag, port) in [("--listen", SESSION_PORT), ("--stun", STUN_PORT), ("--http", HTTP_PORT)] {
            let at = SocketAddr::new(self.address, port);
            command.arg(flag).arg(at.to_string());
        }
        command.arg("--state-dir").arg(self.dir.join("state"));
        if let Some(ttl) = self.ttl {
            command.arg("--ttl").arg(format!("{}s", ttl.as_secs()));
        }
        if let Some(address) = self.stun_alternate {
            command.arg("--stun-alt-address").arg(SocketAddr::new(address, STUN_PORT).to_string());
        }
        // Output of its own for each start: an old endpoint must not be read as the new one.
        self.starts += 1;
        let mut process = Process::start(&self.host, command, &self.dir.join(format!("log-{}", self.starts)))?;
        let said = wait::until_or_dead(
            "the discovery server to print its endpoint and pin",
            START_WITHIN,
            &mut process,
            Process::check_running,
            |process| {
                let said = process.stdout()?;
                let value = |key: &str| said.lines().find_map(|line| line.strip_prefix(key)).map(str::to_owned);
                Ok(value("endpoint=").zip(value("pin=")).map(|(endpoint, pin)| ServerAddress { endpoint, pin }))
            },
        );
        let (address, _) = process.explain(said)?;
        self.process = Some(process);
        Ok(address)
    }

    /// Ends it as a crash would.
    pub fn crash(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |mut process| process.crash())
    }

    /// Asks it to end and waits.
    pub fn stop(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |mut process| process.terminate(STOP_WITHIN).map(drop))
    }

    /// Removes its TLS key: the next start makes another.
    pub fn forget_key(&self) -> Result<()> {
        Ok(fs::remove_dir_all(self.dir.join("state"))?)
    }

    /// Its process while it runs.
    pub fn pid(&self) -> Option<Pid> {
        self.process.as_ref().map(Process::pid)
    }

    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    pub fn ttl(&self) -> Option<Duration> {
        self.ttl
    }

    /// Its state directory stays by design; it must leave nothing at the places for installed ones.
    pub(crate) fn roots(&self) -> Vec<PathBuf> {
        super::node::INSTALLED.map(PathBuf::from).to_vec()
    }
}
