//! The checked values that configuration and tokens are made of: servers, pins, cluster ids, host-and-port pairs.
//!
//! Each is parsed from text once and cannot hold anything else afterwards. Errors say what was expected, not what was
//! given: the caller knows where the text came from and whether it may be shown.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;
use std::time::Duration;

use data_encoding::HEXLOWER_PERMISSIVE;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// What a value should have been, as the end of the sentence "it must be …".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it must be {0}")]
pub struct ExpectedValue(pub(super) &'static str);

/// A host and a port: a DNS name, an IPv4 address, or an IPv6 address (in brackets in text form).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    /// Lower-case; IPv6 without brackets.
    pub host: String,
    pub port: u16,
}

/// A discovery server's address, `https://host:port`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServerEndpoint(HostPort);

/// SHA-256 of a server's public key (SPKI), `sha256:<64 hex digits>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pin(pub [u8; 32]);

/// The name of a cluster: 1 to 64 visible ASCII characters. Part of the overlay IPv6 derivation, never sent to a server.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClusterId(String);

/// The name of a network interface as Linux takes it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct InterfaceName(String);

/// Which of the own addresses are announced as endpoint candidates.
///
/// A list of CIDRs, `!` negates. An address passes when some entry without `!` covers it and none with `!` does, so the
/// order of entries does not matter. An empty list passes every address.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EndpointFilter(pub Vec<FilterEntry>);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FilterEntry {
    pub negated: bool,
    pub prefix: IpNet,
}

impl HostPort {
    const EXPECTED: ExpectedValue = ExpectedValue("host:port, with an IPv6 address in brackets ([2001:db8::1]:51820)");
}

impl FromStr for HostPort {
    type Err = ExpectedValue;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (host, port) = text.rsplit_once(':').ok_or(Self::EXPECTED)?;
        let port: u16 = port
            .bytes()
            .all(|byte| byte.is_ascii_digit())
            .then(|| port.parse().ok())
            .flatten()
            .filter(|port| *port > 0)
            .ok_or(Self::EXPECTED)?;
        let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(v6) => v6.parse::<Ipv6Addr>().map_err(|_| Self::EXPECTED)?.to_string(),
            None if is_dns_name(host) => host.to_ascii_lowercase(),
            None => return Err(Self::EXPECTED),
        };
        Ok(Self { host, port })
    }
}

impl ServerEndpoint {
    const EXPECTED: ExpectedValue = ExpectedValue("https://host:port, nothing more");

    /// Host and port; its text form is the server name that a session's proof is bound to.
    pub fn authority(&self) -> &HostPort {
        &self.0
    }

    pub fn host(&self) -> &str {
        &self.0.host
    }

    pub fn port(&self) -> u16 {
        self.0.port
    }
}

impl FromStr for ServerEndpoint {
    type Err = ExpectedValue;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest = text.strip_prefix("https://").ok_or(Self::EXPECTED)?;
        rest.strip_suffix('/').unwrap_or(rest).parse().map(Self).map_err(|_| Self::EXPECTED)
    }
}

impl Pin {
    const EXPECTED: ExpectedValue = ExpectedValue("sha256: and 64 hex digits, as the discovery server prints it");
}

impl FromStr for Pin {
    type Err = ExpectedValue;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hex = text.strip_prefix("sha256:").ok_or(Self::EXPECTED)?;
        let bytes = HEXLOWER_PERMISSIVE.decode(hex.as_bytes()).map_err(|_| Self::EXPECTED)?;
        bytes.try_into().map(Self).map_err(|_| Self::EXPECTED)
    }
}

impl ClusterId {
    const EXPECTED: ExpectedValue = ExpectedValue("1 to 64 visible ASCII characters without spaces");

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterId {
    type Err = ExpectedValue;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Self::EXPECTED)
        }
    }
}

impl InterfaceName {
    const EXPECTED: ExpectedValue = ExpectedValue("1 to 15 of a-z, A-Z, 0-9, '-', '_' and '.', not lo");

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = ExpectedValue;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let taken = ["lo", ".", "..", "all", "default"].contains(&text);
        if (1..=15).contains(&text.len()) && text.bytes().all(allowed) && !taken {
            Ok(Self(text.to_owned()))
        } else {
            Err(Self::EXPECTED)
        }
    }
}

impl EndpointFilter {
    /// Whether an address may be an endpoint: not excluded, and held by an entry if any entry allows.
    pub fn passes(&self, addr: std::net::IpAddr) -> bool {
        let covered =
            |negated: bool| self.0.iter().any(|entry| entry.negated == negated && entry.prefix.contains(&addr));
        let lists_allowed = self.0.iter().any(|entry| !entry.negated);
        (!lists_allowed || covered(false)) && !covered(true)
    }
}

impl FromStr for FilterEntry {
    type Err = ExpectedValue;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (negated, cidr) = match text.strip_prefix('!') {
            Some(cidr) => (true, cidr),
            None => (false, text),
        };
        let prefix = cidr
            .trim()
            .parse()
            .map_err(|_| ExpectedValue("a CIDR such as 10.0.0.0/8, with '!' in front to exclude it"))?;
        Ok(Self { negated, prefix })
    }
}

/// Reads a keepalive: whole seconds as `25s`, or `0s` for none.
pub(super) fn parse_keepalive(text: &str) -> Result<Option<Duration>, ExpectedValue> {
    const EXPECTED: ExpectedValue = ExpectedValue("whole seconds such as \"25s\", at most 65535s; 0s turns it off");
    let seconds: u16 = text.strip_suffix('s').ok_or(EXPECTED)?.parse().map_err(|_| EXPECTED)?;
    Ok((seconds > 0).then(|| Duration::from_secs(u64::from(seconds))))
}

/// Whether text is an IPv4 address or a DNS name.
fn is_dns_name(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(label)
}

macro_rules! text_form {
    ($($name:ty => $shown:expr),* $(,)?) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let show: fn(&Self) -> String = $shown;
                f.pad(&show(self))
            }
        }
    )*};
}

text_form! {
    HostPort => |it| {
        if it.host.contains(':') { format!("[{}]:{}", it.host, it.port) } else { format!("{}:{}", it.host, it.port) }
    },
    ServerEndpoint => |it| format!("https://{}", it.0),
    Pin => |it| format!("sha256:{}", HEXLOWER_PERMISSIVE.encode(&it.0)),
    ClusterId => |it| it.0.clone(),
    InterfaceName => |it| it.0.clone(),
    FilterEntry => |it| format!("{}{}", if it.negated { "!" } else { "" }, it.prefix),
}

macro_rules! through_text {
    ($($name:ident),*) => {$(
        impl TryFrom<String> for $name {
            type Error = ExpectedValue;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    )*};
}

through_text!(HostPort, ServerEndpoint, Pin, ClusterId);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn server_endpoints_take_names_and_both_address_families() {
        for (text, host, port) in [
            ("https://disc.example:7443", "disc.example", 7443),
            ("https://DISC.example:443/", "disc.example", 443),
            ("https://192.0.2.1:7443", "192.0.2.1", 7443),
            ("https://[2001:db8:0::1]:7443", "2001:db8::1", 7443),
        ] {
            let endpoint: ServerEndpoint = text.parse().unwrap();
            assert_eq!((endpoint.host(), endpoint.port()), (host, port), "{text}");
            assert_eq!(endpoint.to_string().parse::<ServerEndpoint>().unwrap(), endpoint);
        }
        for bad in [
            "disc.example:7443",
            "http://a:1",
            "https://a",
            "https://a:0",
            "https://a:70000",
            "https://a:+1",
            "https://a:1/path",
            "https://u@a:1",
            "https://2001:db8::1:7443",
            "https://[::1]",
            "https://:7443",
            "https://a b:1",
            "https://-a:1",
        ] {
            assert!(bad.parse::<ServerEndpoint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn pins_are_sha256_and_64_digits() {
        let pin = Pin([0xab; 32]);
        assert_eq!(pin.to_string().parse::<Pin>().unwrap(), pin);
        assert!("ab".repeat(32).parse::<Pin>().is_err());
        assert!(format!("sha256:{}", "ab".repeat(31)).parse::<Pin>().is_err());
        assert!(format!("sha256:{}", "zz".repeat(32)).parse::<Pin>().is_err());
    }

    #[test]
    fn a_filter_passes_what_is_covered_and_not_excluded() {
        let filter = |entries: &[&str]| EndpointFilter(entries.iter().map(|entry| entry.parse().unwrap()).collect());
        let lan = "192.168.1.2".parse().unwrap();
        let public = "203.0.113.9".parse().unwrap();
        let v6 = "2001:db8::1".parse().unwrap();
        let home = filter(&["0.0.0.0/0", "!192.168.0.0/16"]);
        assert!(home.passes(public) && !home.passes(lan) && !home.passes(v6));
        assert_eq!(filter(&["!192.168.0.0/16", "0.0.0.0/0"]).passes(lan), home.passes(lan));
        assert!(filter(&[]).passes(lan) && filter(&[]).passes(v6));
    }
}
