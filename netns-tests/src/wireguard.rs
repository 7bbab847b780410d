//! Another implementation of WireGuard in user space: its process, its link, and its configuration socket.
//!
//! Speaks the cross-platform userspace protocol (`set=1`, `get=1`), which wireguard-go, boringtun-cli and gotatun have in
//! common.

use std::{
    fs,
    io::{Read, Write},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use data_encoding::HEXLOWER;
use ipnet::IpNet;
use mesh_common::key::WgSecret;
use nix::unistd::Pid;

use crate::{host::Host, process::Process, wait};

/// All namespaces share it.
const SOCKETS: &str = "/var/run/wireguard";
const START_WITHIN: Duration = Duration::from_secs(10);
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A running device. Dropping it ends the process, and the link with it.
#[derive(Debug)]
pub struct Device {
    pub host: Host,
    /// Of its link.
    pub name: String,
    /// Its public key.
    pub public: [u8; 32],
    socket: PathBuf,
    process: Process,
}

/// What a device is told about its peer.
#[derive(Debug, Clone)]
pub struct Peer {
    pub public: [u8; 32],
    pub allowed: IpNet,
    pub preshared_key: Option<[u8; 32]>,
    pub endpoint: Option<SocketAddr>,
    /// Seconds.
    pub keepalive: Option<u16>,
}

impl Peer {
    /// A peer that speaks first.
    pub fn new(public: [u8; 32], allowed: IpNet) -> Self {
        Self { public, allowed, preshared_key: None, endpoint: None, keepalive: None }
    }
}

impl Device {
    /// A name for a link that no other lab uses: sockets of all namespaces are in one directory.
    pub fn name(number: u8) -> String {
        format!("wg{}-{number}", std::process::id())
    }

    /// Starts `command`, which makes the link `name` and stays in the foreground, and gives it a new key and its port. The
    /// link is down and has no address.
    pub fn start(host: &Host, command: Command, name: &str, port: u16, log_stem: &Path) -> Result<Self> {
        let mut process = Process::start(host, command, log_stem)?;
        let socket = Path::new(SOCKETS).join(format!("{name}.sock"));
        let found = wait::until_or_dead(
            "the configuration socket of the device",
            START_WITHIN,
            &mut process,
            Process::check_running,
            |_| Ok(UnixStream::connect(&socket).ok().map(drop)),
        );
        process.explain(found)?;
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| anyhow!("no randomness: {error}"))?;
        let private = WgSecret::from_seed(&seed);
        let device = Self { host: host.clone(), name: name.to_owned(), public: private.public().0, socket, process };
        let private = HEXLOWER.encode(private.x25519().as_bytes());
        device.set(&format!("private_key={private}\nlisten_port={port}\n"))?;
        Ok(device)
    }

    pub fn know(&self, peer: &Peer) -> Result<()> {
        let mut text = format!("public_key={}\n", HEXLOWER.encode(&peer.public));
        if let Some(key) = &peer.preshared_key {
            text += &format!("preshared_key={}\n", HEXLOWER.encode(key));
        }
        if let Some(endpoint) = peer.endpoint {
            text += &format!("endpoint={endpoint}\n");
        }
        if let Some(seconds) = peer.keepalive {
            text += &format!("persistent_keepalive_interval={seconds}\n");
        }
        self.set(&format!("{text}allowed_ip={}\n", peer.allowed))
    }

    /// When its last handshake was, in nanoseconds of a clock of its own; 0 before the first.
    pub fn last_handshake(&self) -> Result<u64> {
        let answer = self.talk("get=1\n\n")?;
        let number = |key: &str| {
            let value = answer.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("0");
            value.parse::<u64>().with_context(|| format!("{key}{value}"))
        };
        Ok(number("last_handshake_time_sec=")? * 1_000_000_000 + number("last_handshake_time_nsec=")?)
    }

    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    pub fn check_running(&mut self) -> Result<()> {
        self.process.check_running()
    }

    /// Adds the end of its log to an error.
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        self.process.explain(result)
    }

    fn set(&self, text: &str) -> Result<()> {
        let answer = self.talk(&format!("set=1\n{text}\n"))?;
        ensure!(answer.contains("errno=0"), "{} refused its configuration: {answer:?}", self.name);
        Ok(())
    }

    fn talk(&self, text: &str) -> Result<String> {
        let mut stream = UnixStream::connect(&self.socket).context("the device closed its configuration socket")?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.write_all(text.as_bytes())?;
        let mut answer = Vec::new();
        let mut block = [0; 4096];
        // An answer ends with an empty line; the device keeps the connection.
        while !answer.ends_with(b"\n\n") {
            let length = stream.read(&mut block).with_context(|| format!("{} does not answer", self.name))?;
            if length == 0 {
                bail!("{} hung up after {:?}", self.name, String::from_utf8_lossy(&answer));
            }
            answer.extend_from_slice(&block[..length]);
        }
        Ok(String::from_utf8(answer)?)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // A killed device leaves it.
        let _ = fs::remove_file(&self.socket);
    }
}
