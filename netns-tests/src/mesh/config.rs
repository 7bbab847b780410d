//! A node's config file and secret file, as a user would write them.

use std::{
    fmt::Write as _,
    fs::{self, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow};
use ipnet::IpNet;

/// Where a discovery server is and which key it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerAddress {
    pub endpoint: String,
    pub pin: String,
}

/// What goes into the YAML file.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    pub enabled: bool,
    pub host_name: String,
    pub listen_port: u16,
    pub pod_cidrs: Vec<IpNet>,
    pub cluster_id: String,
    pub secret_file: PathBuf,
    pub discovery: Vec<ServerAddress>,
    /// A process unless a check is about the kernel's WireGuard: the same on every machine, whatever its kernel has.
    pub backend: &'static str,
    /// More lines under `mesh:`, without indentation, for example `mtu: 1380`.
    pub more_mesh: Vec<String>,
}

impl NodeConfig {
    pub fn to_yaml(&self) -> String {
        let mut yaml = String::from("mesh:\n");
        let mut line = |text: String| {
            let _ = writeln!(yaml, "{text}");
        };
        line(format!("  enabled: {}", self.enabled));
        line(format!("  hostName: {}", self.host_name));
        line(format!("  listenPort: {}", self.listen_port));
        if !self.pod_cidrs.is_empty() {
            line("  podCIDRs:".into());
            self.pod_cidrs.iter().for_each(|prefix| line(format!("    - \"{prefix}\"")));
        }
        self.more_mesh.iter().for_each(|more| line(format!("  {more}")));
        line(format!("  backend: {}", self.backend));
        line(format!("cluster:\n  id: {}\n  secretFile: {}", self.cluster_id, self.secret_file.display()));
        if !self.discovery.is_empty() {
            line("discovery:".into());
            self.discovery
                .iter()
                .for_each(|server| line(format!("  - endpoint: \"{}\"\n    pin: \"{}\"", server.endpoint, server.pin)));
        }
        yaml
    }
}

/// A new cluster secret in the form of its file: base64 of 32 random bytes and a newline.
pub fn new_secret() -> Result<String> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| anyhow!("no randomness: {error}"))?;
    Ok(data_encoding::BASE64.encode(&bytes) + "\n")
}

/// Writes a file that only its owner may read, replacing it in one step.
pub fn write_private(path: &Path, text: &str) -> Result<()> {
    let part = path.with_extension("part");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&part)
        .with_context(|| format!("cannot write {}", part.display()))?;
    file.write_all(text.as_bytes())?;
    fs::rename(&part, path).with_context(|| format!("cannot write {}", path.display()))
}
