//! The programs under test: from `$MESHSPAN_BIN_DIR`, else built now. Never from PATH, never stale.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, Result, bail, ensure};

/// A directory with ready programs; also how a copy of this process is told about them.
pub const BIN_DIR: &str = "MESHSPAN_BIN_DIR";
const PROGRAMS: [&str; 2] = ["mesh-agent", "discovery-server"];

static FOUND: Mutex<Option<Binaries>> = Mutex::new(None);

/// Paths of the programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    pub agent: PathBuf,
    pub server: PathBuf,
}

impl Binaries {
    /// Finds or builds the programs, once per process. Must run before any namespace is entered: a build may fetch.
    ///
    /// Processes that build at the same time wait for each other on cargo's own lock of the target directory.
    pub fn find() -> Result<Self> {
        let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(binaries) = found.as_ref() {
            return Ok(binaries.clone());
        }
        let binaries = match std::env::var_os(BIN_DIR) {
            Some(dir) => Self::in_dir(Path::new(&dir))?,
            None => build()?,
        };
        *found = Some(binaries.clone());
        Ok(binaries)
    }

    /// The directory of the agent, for [`BIN_DIR`] of a copy.
    pub fn dir(&self) -> PathBuf {
        self.agent.parent().map(Path::to_owned).unwrap_or_default()
    }

    fn in_dir(dir: &Path) -> Result<Self> {
        let dir =
            dir.canonicalize().with_context(|| format!("{BIN_DIR} names {}, which cannot be read", dir.display()))?;
        let [agent, server] = PROGRAMS.map(|name| dir.join(name));
        for program in [&agent, &server] {
            ensure!(program.is_file(), "{BIN_DIR} holds no {}; unset it to have the programs built", program.display());
        }
        Ok(Self { agent, server })
    }
}

fn build() -> Result<Binaries> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let mut command = Command::new(&cargo);
    command.args(["build", "--locked", "--message-format=json-render-diagnostics", "--manifest-path"]).arg(&manifest);
    for program in PROGRAMS {
        command.args(["--package", program, "--bin", program]);
    }
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    if let Some(target) = own_target_dir() {
        command.arg("--target-dir").arg(target);
    }
    // What cargo set for this program would change the fingerprints of build scripts and build everything anew.
    for (key, _) in std::env::vars_os() {
        let name = key.to_string_lossy();
        if name.starts_with("CARGO_PKG_")
            || name.starts_with("CARGO_BIN_")
            || name.starts_with("CARGO_MANIFEST_")
            || name == "CARGO_CRATE_NAME"
            || name == "CARGO_PRIMARY_PACKAGE"
        {
            command.env_remove(&key);
        }
    }
    eprintln!(
        "building {} ({} profile)",
        PROGRAMS.join(" and "),
        if cfg!(debug_assertions) { "dev" } else { "release" }
    );
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().with_context(|| {
        format!("cannot run {}; set {BIN_DIR} to a directory with the programs", cargo.to_string_lossy())
    })?;
    if !output.status.success() {
        bail!("the build of {} failed; its messages are above", PROGRAMS.join(" and "));
    }
    let [agent, server] = PROGRAMS.map(|name| executable(&output.stdout, name));
    Ok(Binaries { agent: agent?, server: server? })
}

/// Where cargo says it put the program: right for every profile, target and target directory.
fn executable(messages: &[u8], name: &str) -> Result<PathBuf> {
    messages
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo built no program {name}"))
}

/// The target directory that this program was built into: `TARGET/PROFILE/demo` or `TARGET/PROFILE/deps/lab-…`.
pub(crate) fn own_target_dir() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let mut profile = program.parent()?;
    if profile.ends_with("deps") {
        profile = profile.parent()?;
    }
    let target = profile.parent()?;
    target.join("CACHEDIR.TAG").exists().then(|| target.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_program_is_where_cargo_says() {
        let messages = br#"{"reason":"compiler-artifact","target":{"name":"mesh-agent"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"mesh-agent"},"executable":"/t/debug/mesh-agent"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "mesh-agent").unwrap(), Path::new("/t/debug/mesh-agent"));
        assert!(executable(messages, "discovery-server").unwrap_err().to_string().contains("discovery-server"));
    }

    #[test]
    fn a_directory_without_the_programs_is_refused_by_name() {
        let empty = tempfile::tempdir().unwrap();
        assert!(Binaries::in_dir(empty.path()).unwrap_err().to_string().contains("mesh-agent"));
    }
}
