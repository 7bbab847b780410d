//! YAML text as a tree in which every node knows its place.
//!
//! Owns the YAML rules of this project: only `true` and `false` are booleans, a key stands once in its section, anchors
//! and merges are allowed within the parser's budgets, tags mean nothing. Says nothing about which keys exist.

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use super::error::{ConfigError, Place};
use super::scalar::visible;

/// The longest configuration that is read, in bytes.
pub(super) const MAX_TEXT: usize = 256 * 1024;

#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) place: Place,
    /// Byte range in the text: a scalar's own, a section's first byte and an unspecified end.
    pub(super) start: usize,
    pub(super) len: usize,
}

#[derive(Debug, Clone)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Int(i128),
    Float,
    Text(String),
    List(Vec<Node>),
    Section(Vec<(Node, Node)>),
}

impl Node {
    /// The text of a scalar as its author meant it: numbers and booleans as they are written.
    pub(super) fn scalar<'a>(&'a self, text: &'a str) -> Option<&'a str> {
        match &self.value {
            Value::Text(value) => Some(value),
            Value::Bool(_) | Value::Int(_) | Value::Float => text.get(self.start..self.start + self.len),
            Value::Null | Value::List(_) | Value::Section(_) => None,
        }
    }
}

/// Parses all documents of the text. Empty documents are left out.
pub(super) fn parse(text: &str) -> Result<Vec<Node>, ConfigError> {
    if text.len() > MAX_TEXT {
        let what = format!("the file has {} bytes, a configuration has at most {MAX_TEXT}", text.len());
        return Err(ConfigError::Yaml { place: Place { line: 1, column: 1 }, what });
    }
    // Snippets would quote the file, and the file may hold a secret.
    let options = serde_saphyr::options! {
        strict_booleans: true,
        with_snippet: false,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
    };
    serde_saphyr::from_multiple_with_options::<Node>(text, options).map_err(|error| {
        let place =
            error.location().map_or(Place { line: 1, column: 1 }, |at| Place { line: at.line(), column: at.column() });
        ConfigError::Yaml { place, what: describe(&error) }
    })
}

/// Words of ours for what people run into, the parser's for the rest.
fn describe(error: &serde_saphyr::Error) -> String {
    match error.without_snippet() {
        serde_saphyr::Error::DuplicateMappingKey { key: Some(key), .. } => {
            format!("the key `{}` stands twice in its section: keep one", visible(key))
        }
        serde_saphyr::Error::DuplicateMappingKey { .. } => "a key stands twice in its section: keep one".to_owned(),
        other => {
            let shown = other.to_string();
            let what = shown.split(" at line ").next().unwrap_or(&shown);
            format!("this is not valid YAML: {what}")
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        // An alias is complained about where it stands, and read where it is defined.
        let (at, span) = (spanned.referenced, spanned.defined.span());
        let bytes = |value: Option<u64>| value.and_then(|value| usize::try_from(value).ok()).unwrap_or_default();
        Ok(Self {
            value: spanned.value,
            place: Place { line: at.line(), column: at.column() },
            start: bytes(span.byte_offset()),
            len: bytes(span.byte_len()),
        })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
        Ok(Value::Int(value))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Value, E> {
        Ok(Value::Int(i128::try_from(value).unwrap_or(i128::MAX)))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Float)
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut section = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            section.push(entry);
        }
        Ok(Value::Section(section))
    }
}
