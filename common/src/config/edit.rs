//! Flips the one boolean inside a configuration text and touches nothing else: comments and formatting stay.
//!
//! The result is parsed again and must be the same configuration with only `enabled` changed, otherwise nothing is given
//! back: a file too unusual for this is its owner's to edit.

use super::Config;
use super::error::{ConfigError, ConfigErrors};
use super::tree::{Node, Value, parse};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EditError {
    /// The text is not a valid configuration, or would not be one with the mesh enabled.
    #[error(transparent)]
    Invalid(ConfigErrors),
    #[error(
        "mesh.enabled cannot be changed in place here: set `enabled: {0}` below `mesh:` by hand"
    )]
    ByHand(bool),
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
        Err(errors)
            if errors
                .0
                .iter()
                .all(|error| matches!(error, ConfigError::Missing { .. })) =>
        {
            Err(EditError::Invalid(errors))
        }
        _ => Err(EditError::ByHand(enabled)),
    }
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
    let Some((key, mesh)) = documents
        .iter()
        .find_map(|document| entry(document, "mesh"))
    else {
        let newline = if text.is_empty() || text.ends_with('\n') {
            ""
        } else {
            "\n"
        };
        return Some(format!("{text}{newline}mesh:\n  enabled: {enabled}\n"));
    };
    let (at, addition) = match &mesh.value {
        Value::Section(entries) if text.get(mesh.start..)?.starts_with('{') => {
            let comma = if entries.is_empty() { "" } else { ", " };
            (mesh.start + 1, format!("enabled: {enabled}{comma}"))
        }
        Value::Section(entries) => {
            let first = entries.first()?.0.start;
            let line = text
                .get(..first)?
                .rfind('\n')
                .map_or(0, |newline| newline + 1);
            (
                line,
                format!("{}enabled: {enabled}\n", text.get(line..first)?),
            )
        }
        Value::Null => {
            let end = key.start + key.len;
            let indent = " ".repeat(usize::try_from(key.place.column).ok()? + 1);
            (
                end + text.get(end..)?.find(':')? + 1,
                format!("\n{indent}enabled: {enabled}"),
            )
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
