//! The configuration file: read, checked, shown, and replaced whole.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use mesh_common::config::{Config, ConfigErrors};

use super::{Global, Output, print, to_json};
use crate::{durable, secrets};

/// A configuration file and what it means.
pub(super) struct ReadConfig {
    pub(super) text: String,
    pub(super) config: Config,
}

#[derive(Debug, thiserror::Error)]
#[error("{} is not a valid configuration:\n{}", file.display(), indented(errors))]
pub(super) struct InvalidConfig {
    pub(super) file: PathBuf,
    pub(super) errors: ConfigErrors,
}

/// Reads and checks the file; `None` when it is not there.
pub(super) fn read(file: &Path) -> anyhow::Result<Option<ReadConfig>> {
    let Some(text) = read_text(file)? else { return Ok(None) };
    match Config::parse(&text) {
        Ok(config) => Ok(Some(ReadConfig { text, config })),
        Err(errors) => Err(InvalidConfig { file: file.to_owned(), errors }.into()),
    }
}

pub(super) fn read_text(file: &Path) -> anyhow::Result<Option<String>> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{} cannot be read", file.display())),
    }
}

/// Replaces the file, keeping its mode and owner, and the link when it is one.
pub(super) fn write(file: &Path, text: &str) -> anyhow::Result<()> {
    let file = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let context = || format!("{} cannot be written", file.display());
    let before = fs::metadata(&file).ok();
    durable::replace(&file, text.as_bytes(), before.as_ref().map_or(0o644, |before| before.mode() & 0o7777))
        .with_context(context)?;
    if let Some(before) = before {
        let now = fs::metadata(&file).with_context(context)?;
        if (now.uid(), now.gid()) != (before.uid(), before.gid()) {
            std::os::unix::fs::chown(&file, Some(before.uid()), Some(before.gid())).with_context(context)?;
        }
    }
    Ok(())
}

pub(super) fn validate(global: &Global) -> anyhow::Result<u8> {
    let read = read(&global.config)?.ok_or_else(|| global.never_joined())?;
    if read.config.mesh.enabled && !read.config.discovery.is_empty() {
        secrets::cluster_secret(&read.config.cluster.secret)?;
    }
    for peer in &read.config.mesh.static_peers {
        peer.preshared_key_file.as_deref().map(secrets::preshared_key).transpose()?;
    }
    print(&format!("{} is valid\n", global.config.display()))
}

pub(super) fn show(global: &Global) -> anyhow::Result<u8> {
    let read = read(&global.config)?.ok_or_else(|| global.never_joined())?;
    match global.output {
        Some(Output::Json) => print(&to_json(&read.config)?),
        None | Some(Output::Table | Output::Wide | Output::Yaml) => print(&serde_saphyr::to_string(&read.config)?),
    }
}

fn indented(errors: &ConfigErrors) -> String {
    errors.to_string().lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}
