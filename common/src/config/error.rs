//! What is wrong with a configuration file: always where, which key, and what to write instead; never a secret.

use std::fmt;

/// A place in the configuration text, both counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub line: u64,
    pub column: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

/// Everything that is wrong with one configuration, in the order of the text; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl std::error::Error for ConfigErrors {}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, error) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not YAML, or YAML with a construct that is refused (a duplicate key, an unknown anchor).
    #[error("{place}: {what}")]
    Yaml { place: Place, what: String },
    #[error("{place}: unknown key `{key}` in {section}{}", Nearest(nearest))]
    UnknownKey { place: Place, key: String, section: String, nearest: Option<&'static str> },
    /// `value` is as written, or `(hidden)`.
    #[error("{place}: `{key}` is {value}, {fix}")]
    BadValue { place: Place, key: String, value: String, fix: String },
    #[error("`{key}` is missing: {fix}")]
    Missing { key: String, fix: String },
    #[error("{place}: `{key}` says again what `{first_key}` on line {} says: keep one of the two", first.line)]
    Twice { place: Place, key: String, first: Place, first_key: String },
}

impl ConfigError {
    /// Where in the text it is; `None` for something that is not there.
    pub fn place(&self) -> Option<Place> {
        match self {
            Self::Yaml { place, .. }
            | Self::UnknownKey { place, .. }
            | Self::BadValue { place, .. }
            | Self::Twice { place, .. } => Some(*place),
            Self::Missing { .. } => None,
        }
    }
}

struct Nearest<'a>(&'a Option<&'static str>);

impl fmt::Display for Nearest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(key) => write!(f, ": did you mean `{key}`?"),
            None => Ok(()),
        }
    }
}
