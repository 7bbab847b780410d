//! One section of the tree, read key by key: typed values out, errors collected.
//!
//! Owns how a wrong value or an unknown key is reported. What a value means is the caller's parse function.

use std::ops::RangeInclusive;

use data_encoding::BASE64;

use super::error::{ConfigError, Place};
use super::tree::{Node, Value};

/// Collects the errors of one configuration.
pub(super) struct Reader<'t> {
    pub(super) text: &'t str,
    pub(super) errors: Vec<ConfigError>,
}

/// A value with the key that gave it.
#[derive(Debug, Clone)]
pub(super) struct Setting<T> {
    pub(super) value: T,
    pub(super) key: String,
    pub(super) place: Place,
}

/// A mapping whose keys are all known.
pub(super) struct Section<'n> {
    /// Dotted, empty for the top level.
    path: String,
    entries: Vec<(&'static str, &'n Node)>,
}

impl<'n> Section<'n> {
    pub(super) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    pub(super) fn get(&self, key: &'static str) -> Option<&'n Node> {
        self.entries.iter().find(|(name, _)| *name == key).map(|(_, node)| *node)
    }
}

impl<'t> Reader<'t> {
    /// Takes a node as a section; reports what is not in `known`. An empty value is an empty section.
    pub(super) fn section<'n>(&mut self, node: &'n Node, path: &str, known: &[&'static str]) -> Section<'n> {
        let mut section = Section { path: path.to_owned(), entries: Vec::new() };
        let entries = match &node.value {
            Value::Section(entries) => entries.as_slice(),
            Value::Null => &[],
            _ if path.is_empty() => {
                let what = "this is not a configuration: expected keys such as `mesh:`".to_owned();
                self.errors.push(ConfigError::Yaml { place: node.place, what });
                &[]
            }
            _ => {
                self.bad(node, path, "write keys below it");
                &[]
            }
        };
        for (key, value) in entries {
            let name = key.scalar(self.text).unwrap_or("(not a name)");
            match known.iter().find(|known| **known == name) {
                Some(known) => section.entries.push((known, value)),
                None => self.errors.push(ConfigError::UnknownKey {
                    place: key.place,
                    key: visible(name),
                    section: if path.is_empty() { "the top level".to_owned() } else { format!("`{path}`") },
                    nearest: nearest(name, known),
                }),
            }
        }
        section
    }

    pub(super) fn subsection<'n>(
        &mut self,
        section: &Section<'n>,
        key: &'static str,
        known: &[&'static str],
    ) -> Option<Section<'n>> {
        section.get(key).map(|node| self.section(node, &section.path_of(key), known))
    }

    pub(super) fn boolean(&mut self, section: &Section<'_>, key: &'static str) -> Option<Setting<bool>> {
        let node = section.get(key)?;
        match node.value {
            Value::Bool(value) => Some(Setting { value, key: section.path_of(key), place: node.place }),
            _ => {
                self.bad(node, &section.path_of(key), "write true or false");
                None
            }
        }
    }

    pub(super) fn integer(
        &mut self,
        section: &Section<'_>,
        key: &'static str,
        range: RangeInclusive<u16>,
    ) -> Option<Setting<u16>> {
        let node = section.get(key)?;
        let number = match node.value {
            Value::Int(value) => u16::try_from(value).ok().filter(|value| range.contains(value)),
            _ => None,
        };
        if number.is_none() {
            let fix = format!("write a number from {} to {}", range.start(), range.end());
            self.bad(node, &section.path_of(key), &fix);
        }
        number.map(|value| Setting { value, key: section.path_of(key), place: node.place })
    }

    pub(super) fn text<T, E: ToString>(
        &mut self,
        section: &Section<'_>,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<Setting<T>> {
        let node = section.get(key)?;
        let path = section.path_of(key);
        let value = self.element(node, &path, parse)?;
        Some(Setting { value, key: path, place: node.place })
    }

    /// A list of scalars. An empty value is an empty list; a lone scalar is no list.
    pub(super) fn list<T, E: ToString>(
        &mut self,
        section: &Section<'_>,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<Setting<Vec<T>>> {
        let node = section.get(key)?;
        let path = section.path_of(key);
        let items = self.items(node, &path);
        let value = items
            .iter()
            .enumerate()
            .filter_map(|(n, item)| self.element(item, &format!("{path}[{n}]"), &parse))
            .collect();
        Some(Setting { value, key: path, place: node.place })
    }

    pub(super) fn items<'n>(&mut self, node: &'n Node, path: &str) -> &'n [Node] {
        match &node.value {
            Value::List(items) => items,
            Value::Null => &[],
            _ => {
                self.bad(node, path, "write a list, each entry after '- '");
                &[]
            }
        }
    }

    fn element<T, E: ToString>(
        &mut self,
        node: &Node,
        path: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let Some(scalar) = node.scalar(self.text) else {
            self.bad(node, path, "write a single value");
            return None;
        };
        match parse(scalar) {
            Ok(value) => Some(value),
            Err(error) => {
                self.bad(node, path, &error.to_string());
                None
            }
        }
    }

    pub(super) fn bad(&mut self, node: &Node, path: &str, fix: &str) {
        let value = match &node.value {
            Value::Null => "empty".to_owned(),
            Value::List(_) => "a list".to_owned(),
            Value::Section(_) => "a section".to_owned(),
            _ if may_hold_secret(path) => "(hidden)".to_owned(),
            Value::Text(text) => format!("\"{}\"", visible(text)),
            Value::Bool(_) | Value::Int(_) | Value::Float => visible(node.scalar(self.text).unwrap_or_default()),
        };
        self.errors.push(ConfigError::BadValue { place: node.place, key: path.to_owned(), value, fix: fix.to_owned() });
    }
}

/// Keys whose value is a secret, or where people put one by mistake.
fn may_hold_secret(path: &str) -> bool {
    path == "cluster"
        || ["secret", "secretFile", "presharedKeyFile", "mesh.proxy"].iter().any(|secret| path.ends_with(secret))
}

/// Text for a message: short, no control characters, and nothing that could be a join token or a key.
pub(super) fn visible(text: &str) -> String {
    let key_like = |word: &str| BASE64.decode(word.as_bytes()).is_ok_and(|bytes| bytes.len() >= 32);
    if text.contains("msj1.") || text.split_whitespace().any(key_like) {
        return "(hidden)".to_owned();
    }
    let short: String = text.chars().take(80).flat_map(char::escape_debug).collect();
    if text.chars().count() > 80 { format!("{short}…") } else { short }
}

/// The known key that was most likely meant.
fn nearest(name: &str, known: &[&'static str]) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    known
        .iter()
        .map(|known| (strsim::osa_distance(&name, &known.to_ascii_lowercase()), *known))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, known)| *distance <= (known.len() / 3).max(2))
        .map(|(_, known)| known)
}
