//! One node under test: its host, its pods, its agent, and the agent's command line.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{sys::signal::Signal, unistd::Pid};
use serde::Deserialize;

use crate::{
    Host, Snapshot,
    binaries::Binaries,
    mesh::{
        Pod,
        config::{NodeConfig, write_private},
    },
    process::{self, Answer, Process},
};

const WIREGUARD_PORT: u16 = 51872;
const STOP_WITHIN: Duration = Duration::from_secs(10);
/// Where an agent remembers whom it met, in its state directory.
const MEMBERS: [&str; 4] = ["cache.bin", "cache.bin.prev", "marks.json", "marks.json.prev"];
/// The places of an installed agent; one in the lab is told to use others and must leave these alone.
pub(crate) const INSTALLED: [&str; 3] = ["/etc/meshspan", "/run/meshspan", "/var/lib/meshspan"];

/// A node and its agent.
#[derive(Debug)]
pub struct Node {
    pub host: Host,
    pub pods: Vec<Pod>,
    /// The node's own address on its site.
    pub address: IpAddr,
    /// Written by [`Node::write_config`].
    pub config: NodeConfig,
    /// More variables for the agent's environment.
    pub environment: BTreeMap<String, String>,
    /// Set when the mesh has formed.
    pub overlay: Option<(Ipv4Addr, Ipv6Addr)>,
    program: PathBuf,
    dir: PathBuf,
    process: Option<Process>,
}

/// What the lab reads of `status -o json`. Verdicts come from packets; this only tells addresses and when to look.
#[derive(Debug, Clone, Deserialize)]
pub struct Status {
    pub node: StatusNode,
    #[serde(default)]
    pub servers: Vec<StatusServer>,
    #[serde(default)]
    pub peers: Vec<StatusPeer>,
    #[serde(default)]
    pub counters: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct StatusServer {
    pub endpoint: String,
    pub state: String,
    pub carrier: Option<String>,
    pub detail: String,
}

/// Something that is wrong, in words.
#[derive(Debug, Clone, Deserialize)]
pub struct StatusProblem {
    pub what: String,
    pub fix: String,
}

#[derive(Debug, Clone, Deserialize)]
pub struct StatusNode {
    pub id: String,
    pub state: String,
    pub listen_port: u16,
    pub overlay_v4: Option<Ipv4Addr>,
    pub overlay_v6: Option<Ipv6Addr>,
    #[serde(default)]
    pub problems: Vec<StatusProblem>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct StatusPeer {
    pub host_name: String,
    pub state: String,
    pub overlay_v4: Option<Ipv4Addr>,
    pub overlay_v6: Option<Ipv6Addr>,
    /// Where it says it can be reached; only ever compared.
    #[serde(default)]
    pub candidates: serde_json::Value,
}

impl Node {
    /// A node with its files below `dir` and an address of `host`; the secret is that of its cluster.
    pub fn new(binaries: &Binaries, host: Host, dir: &Path, address: IpAddr, secret: &str) -> Result<Self> {
        for part in ["etc", "run", "log"] {
            fs::create_dir_all(dir.join(part))?;
        }
        let secret_file = dir.join("etc/cluster.secret");
        write_private(&secret_file, secret)?;
        let config = NodeConfig {
            enabled: true,
            host_name: host.name().to_owned(),
            listen_port: WIREGUARD_PORT,
            pod_cidrs: Vec::new(),
            cluster_id: "demo".to_owned(),
            secret_file,
            discovery: Vec::new(),
            backend: "userspace",
            more_mesh: Vec::new(),
        };
        Ok(Self {
            host,
            pods: Vec::new(),
            address,
            config,
            environment: BTreeMap::new(),
            overlay: None,
            program: binaries.agent.clone(),
            dir: dir.to_owned(),
            process: None,
        })
    }

    pub fn name(&self) -> &str {
        self.host.name()
    }

    pub fn config_path(&self) -> PathBuf {
        self.dir.join("etc/config.yaml")
    }

    pub fn socket_path(&self) -> PathBuf {
        self.dir.join("run/agent.sock")
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub fn program(&self) -> &Path {
        &self.program
    }

    pub fn overlay_v4(&self) -> Result<IpAddr> {
        self.overlay.map(|(v4, _)| v4.into()).with_context(|| format!("{} has no overlay address yet", self.name()))
    }

    pub fn overlay_v6(&self) -> Result<IpAddr> {
        self.overlay.map(|(_, v6)| v6.into()).with_context(|| format!("{} has no overlay address yet", self.name()))
    }

    pub fn write_config(&self) -> Result<()> {
        write_private(&self.config_path(), &self.config.to_yaml())
    }

    /// Becomes a node that never ran, of the cluster with this secret. The agent must not run.
    pub fn start_over(&mut self, secret: &str) -> Result<()> {
        for removed in [fs::remove_dir_all(self.state_dir()), fs::remove_file(self.log_stem().with_extension("err"))] {
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        self.overlay = None;
        write_private(&self.config.secret_file, secret)
    }

    /// Becomes a member of the cluster with this secret, whom nobody has met, and stays the node that it is otherwise. The
    /// agent must not run.
    pub fn forget_members(&mut self, secret: &str) -> Result<()> {
        for file in MEMBERS {
            match fs::remove_file(self.state_dir().join(file)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        write_private(&self.config.secret_file, secret)
    }

    /// Executes `mesh-agent run`; does not wait for it to be ready.
    pub fn start(&mut self) -> Result<()> {
        let mut command = self.command("run");
        command.envs(&self.environment);
        self.process = Some(Process::start(&self.host, command, &self.log_stem())?);
        Ok(())
    }

    /// A command of the agent with this node's places, to be changed by the caller and given to
    /// [`Node::run_to_end`].
    pub fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg(subcommand)
            .arg("--config")
            .arg(self.config_path())
            .arg("--state-dir")
            .arg(self.state_dir())
            .arg("--socket")
            .arg(self.socket_path());
        command
    }

    /// Runs a command on the node's host until it ends by itself.
    pub fn run_to_end(&self, command: Command) -> Result<Answer> {
        process::run_command(&self.host, command, &self.dir.join("log"))
    }

    /// Everything the agent has logged since the node was made.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.log_stem().with_extension("err"))?)
    }

    fn log_stem(&self) -> PathBuf {
        self.dir.join("log/agent")
    }

    /// Ends the agent as a crash would.
    pub fn crash(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |mut process| process.crash())
    }

    /// SIGTERM, then waits for the end.
    pub fn stop(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |mut process| process.terminate(STOP_WITHIN).map(drop))
    }

    /// Has the agent read its config again.
    pub fn reload(&self) -> Result<()> {
        self.signal(Signal::SIGHUP)
    }

    /// Stops the agent's time, as suspending the machine does to it.
    pub fn suspend(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        self.process.as_ref().with_context(|| format!("the agent of {} does not run", self.name()))?.signal(signal)
    }

    /// Writes the one boolean and reloads.
    pub fn set_enabled(&mut self, enabled: bool) -> Result<()> {
        self.config.enabled = enabled;
        self.write_config()?;
        self.reload()
    }

    /// The agent's process while it runs.
    pub fn pid(&self) -> Option<Pid> {
        self.process.as_ref().map(Process::pid)
    }

    pub fn check_running(&mut self) -> Result<()> {
        self.process
            .as_mut()
            .with_context(|| format!("the agent of {} was not started", self.host.name()))?
            .check_running()
    }

    /// Runs a command of the agent's CLI with `--config` or `--socket` as it takes them.
    pub fn cli(&self, args: &[&str]) -> Result<Answer> {
        let args: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
        process::run(&self.host, &self.program, &args, &self.dir.join("log"))
            .with_context(|| format!("mesh-agent {:?}", args[0]))
    }

    pub fn status(&self) -> Result<Status> {
        let answer = self.cli(&["status", "--socket", &self.socket_path().to_string_lossy(), "-o", "json"])?;
        serde_json::from_str(&answer.stdout).with_context(|| {
            format!("status ended with {}: {}{}", answer.status, answer.stdout.trim(), answer.stderr.trim())
        })
    }

    /// All of `status -o json`.
    pub fn status_json(&self) -> Result<serde_json::Value> {
        let mut command = self.command("status");
        command.args(["-o", "json"]);
        let answer = self.run_to_end(command)?;
        serde_json::from_str(&answer.stdout).with_context(|| format!("status says {}{}", answer.stdout, answer.stderr))
    }

    /// What a person sees.
    pub fn status_table(&self) -> Result<String> {
        Ok(self.cli(&["status", "--socket", &self.socket_path().to_string_lossy(), "-o", "table"])?.stdout)
    }

    pub fn up(&self) -> Result<()> {
        self.change("up")
    }

    pub fn down(&self) -> Result<()> {
        self.change("down")
    }

    pub fn leave(&self) -> Result<()> {
        self.change("leave")
    }

    pub fn cleanup(&self) -> Result<()> {
        self.change("cleanup")
    }

    fn change(&self, subcommand: &str) -> Result<()> {
        let answer = self.run_to_end(self.command(subcommand))?;
        answer.success().with_context(|| format!("mesh-agent {subcommand}")).map(drop)
    }

    /// A dump of the host and of every file an agent may touch but its state directory, which stays by design: it holds
    /// the node's identity.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let mut roots = vec![self.dir.join("etc"), self.dir.join("run")];
        roots.extend(INSTALLED.map(PathBuf::from));
        Snapshot::take(&self.host, &roots)
    }

    /// Adds the end of the agent's log to an error.
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        match &self.process {
            Some(process) => process.explain(result).with_context(|| format!("on {}", self.name())),
            None => result,
        }
    }
}
