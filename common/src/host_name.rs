//! Host names as peers may show them: one DNS label, checked where it enters.
//!
//! Peer text reaches terminals, logs and files of others, so nothing but this type may carry it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A DNS label: 1 to 63 of `a-z`, `0-9` and `-`, no hyphen at either end.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostName(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a host name is 1 to 63 of a-z, 0-9 and '-', without '-' at either end")]
pub struct HostNameError;

impl HostName {
    /// Takes the first label of what the operating system calls the host, lower-cased.
    pub fn from_system(name: &str) -> Result<Self, HostNameError> {
        Self::try_from(name.split('.').next().unwrap_or_default().to_ascii_lowercase())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for HostName {
    type Error = HostNameError;

    fn try_from(name: String) -> Result<Self, HostNameError> {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let ends_well = !name.starts_with('-') && !name.ends_with('-');
        if (1..=63).contains(&name.len()) && ends_well && name.bytes().all(allowed) {
            Ok(Self(name))
        } else {
            Err(HostNameError)
        }
    }
}

impl From<HostName> for String {
    fn from(name: HostName) -> Self {
        name.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dns_labels_pass() {
        for good in ["a", "node-1", "0", &"x".repeat(63)] {
            assert!(HostName::try_from(good.to_owned()).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a b", "a.b", "a\u{1b}[31m", "\n", "é", &"x".repeat(64)] {
            assert!(HostName::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
        assert_eq!(HostName::from_system("Node-1.example.org").unwrap().as_str(), "node-1");
    }
}
