//! Changes a configuration text in place: the one boolean, or the cluster. Comments and formatting of the rest stay.
//!
//! The result is parsed again and must be the same configuration with only that changed, otherwise nothing is given back: a
//! file too unusual for this is its owner's to edit.

use std::fmt::Write;
use std::path::Path;

use super::error::{ConfigError, ConfigErrors};
use super::tree::{Node, Value, parse};
use super::{ClusterId, Config, DiscoveryServer, SecretSource};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EditError {
    /// The text is not a valid configuration, or would not be one with the mesh enabled.
    #[error(transparent)]
    Invalid(ConfigErrors),
    #[error("mesh.enabled cannot be changed in place here: set `enabled: {0}` below `mesh:` by hand")]
    ByHand(bool),
    #[error("`cluster` and `discovery` cannot be changed in place here: remove both sections by hand, then try again")]
    ClusterByHand,
}

/// The text with `mesh.enabled` (or its Talos spelling, where that is used) set. Adds the key when it is missing.
pub fn set_enabled(text: &str, enabled: bool) -> Result<String, EditError> {
    let mut wanted = Config::parse(text).map_err(EditError::Invalid)?;
    if wanted.mesh.enabled == enabled {
        return Ok(text.to_owned());
    }
    wanted.mesh.enabled = enabled;
    let documents = parse(text).map_err(|error| EditError::Invalid(ConfigErrors(vec![error])))?;
    let edited = replace(text, &documents, enabled)
        .or_else(|| insert(text, &documents, enabled))
        .ok_or(EditError::ByHand(enabled))?;
    match Config::parse(&edited) {
        Ok(config) if config == wanted => Ok(edited),
        Err(errors) if errors.0.iter().all(|error| matches!(error, ConfigError::Missing { .. })) => {
            Err(EditError::Invalid(errors))
        }
        _ => Err(EditError::ByHand(enabled)),
    }
}

/// The text with this cluster and these servers instead of those it names, and the mesh enabled.
pub fn set_cluster(
    text: &str,
    id: &ClusterId,
    secret_file: &Path,
    servers: &[DiscoveryServer],
) -> Result<String, EditError> {
    let documents = parse(text).map_err(|error| EditError::Invalid(ConfigErrors(vec![error])))?;
    let mut edited = match documents.as_slice() {
        [] => text.to_owned(),
        [document] => without_sections(text, document, &["cluster", "discovery"]).ok_or(EditError::ClusterByHand)?,
        _ => return Err(EditError::ClusterByHand),
    };
    if !edited.is_empty() && !edited.ends_with('\n') {
        edited.push('\n');
    }
    edited.push_str(&cluster_sections(id, secret_file, servers));
    let edited = set_enabled(&edited, true)?;
    let config = Config::parse(&edited).map_err(EditError::Invalid)?;
    let same_rest = Config::parse(text).is_ok_and(|mut before| {
        before.mesh.enabled = true;
        before.mesh == config.mesh && before.agent == config.agent
    });
    let named = config.cluster.id.as_ref() == Some(id)
        && config.cluster.secret == SecretSource::File(secret_file.to_owned())
        && config.discovery == servers;
    // A text that lacked a cluster was no valid configuration: there is nothing to compare with then.
    if named && (same_rest || Config::parse(text).is_err()) { Ok(edited) } else { Err(EditError::ClusterByHand) }
}

fn cluster_sections(id: &ClusterId, secret_file: &Path, servers: &[DiscoveryServer]) -> String {
    // JSON's quoted text is YAML's too.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let secret_file = quoted(&secret_file.to_string_lossy());
    let mut text = format!("cluster:\n  id: {}\n  secretFile: {secret_file}\ndiscovery:\n", quoted(id.as_str()));
    for server in servers {
        let _ = writeln!(text, "  - endpoint: {}\n    pin: {}", quoted(&server.endpoint.to_string()), server.pin);
        if server.proxied {
            text.push_str("    proxied: true\n");
        }
    }
    text
}

/// The text without these sections of the top level. What stands behind a section and belongs to nothing (comments from
/// the first column, empty lines) stays.
fn without_sections(text: &str, document: &Node, names: &[&str]) -> Option<String> {
    let Value::Section(entries) = &document.value else { return None };
    let mut kept = String::new();
    let mut from = 0;
    for (n, (key, _)) in entries.iter().enumerate() {
        if !matches!(&key.value, Value::Text(name) if names.contains(&name.as_str())) {
            continue;
        }
        if key.place.column != 1 {
            return None;
        }
        kept.push_str(text.get(from..key.start)?);
        let end = entries.get(n + 1).map_or(text.len(), |(next, _)| next.start);
        let body = text.get(key.start..end)?;
        let stays = |line: &&str| line.trim().is_empty() || line.starts_with('#');
        let tail: usize = body.split_inclusive('\n').rev().take_while(stays).map(str::len).sum();
        from = end - tail;
    }
    kept.push_str(text.get(from..)?);
    Some(kept)
}

/// The text with the boolean that stands there replaced.
fn replace(text: &str, documents: &[Node], enabled: bool) -> Option<String> {
    let boolean = documents.iter().find_map(|document| {
        find(document, &["mesh", "enabled"])
            .or_else(|| find(document, &["machine", "network", "kubespan", "enabled"]))
            .or_else(|| find(document, &["enabled"]))
    })?;
    let (before, rest) = text.split_at_checked(boolean.start)?;
    let (_, after) = rest.split_at_checked(boolean.len)?;
    Some(format!("{before}{enabled}{after}"))
}

/// The text with the key added: to the section `mesh` if there is one, else with that section at the end.
fn insert(text: &str, documents: &[Node], enabled: bool) -> Option<String> {
    let Some((key, mesh)) = documents.iter().find_map(|document| entry(document, "mesh")) else {
        let newline = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
        return Some(format!("{text}{newline}mesh:\n  enabled: {enabled}\n"));
    };
    let (at, addition) = match &mesh.value {
        Value::Section(entries) if text.get(mesh.start..)?.starts_with('{') => {
            let comma = if entries.is_empty() { "" } else { ", " };
            (mesh.start + 1, format!("enabled: {enabled}{comma}"))
        }
        Value::Section(entries) => {
            let first = entries.first()?.0.start;
            let line = text.get(..first)?.rfind('\n').map_or(0, |newline| newline + 1);
            (line, format!("{}enabled: {enabled}\n", text.get(line..first)?))
        }
        Value::Null => {
            let end = key.start + key.len;
            let indent = " ".repeat(usize::try_from(key.place.column).ok()? + 1);
            (end + text.get(end..)?.find(':')? + 1, format!("\n{indent}enabled: {enabled}"))
        }
        _ => return None,
    };
    let (before, after) = text.split_at_checked(at)?;
    Some(format!("{before}{addition}{after}"))
}

fn find<'n>(node: &'n Node, path: &[&str]) -> Option<&'n Node> {
    match path {
        [] => Some(node),
        [name, rest @ ..] => find(entry(node, name)?.1, rest),
    }
}

fn entry<'n>(node: &'n Node, name: &str) -> Option<(&'n Node, &'n Node)> {
    let Value::Section(entries) = &node.value else {
        return None;
    };
    entries
        .iter()
        .find(|(key, _)| matches!(&key.value, Value::Text(text) if text == name))
        .map(|(key, value)| (key, value))
}
