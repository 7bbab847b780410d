//! The URL of an HTTP proxy, `http://[user[:password]@]host[:port]`: shown without the credentials, whoever asks.

use std::fmt;
use std::str::FromStr;

use zeroize::Zeroizing;

use super::values::{ExpectedValue, HostPort};

/// The port of a proxy whose URL has none.
const DEFAULT_PORT: u16 = 80;

/// An HTTP proxy that passes connections on (CONNECT).
#[derive(Clone, PartialEq, Eq)]
pub struct ProxyUrl {
    pub address: HostPort,
    /// `user:password`, as Basic authentication takes it.
    credentials: Option<Zeroizing<Vec<u8>>>,
}

impl ProxyUrl {
    const EXPECTED: ExpectedValue =
        ExpectedValue("http://host:port or http://user:password@host:port, with special characters as %XX");

    /// `user:password` where the URL has them: secret.
    pub fn credentials(&self) -> Option<&[u8]> {
        self.credentials.as_ref().map(|secret| secret.as_slice())
    }
}

impl FromStr for ProxyUrl {
    type Err = ExpectedValue;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest = text.strip_prefix("http://").ok_or(Self::EXPECTED)?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (userinfo, authority) = match rest.rsplit_once('@') {
            Some((userinfo, authority)) => (Some(userinfo), authority),
            None => (None, rest),
        };
        let has_port = !authority.ends_with(']') && authority.contains(':');
        let address = if has_port { authority.parse() } else { format!("{authority}:{DEFAULT_PORT}").parse() };
        let credentials = userinfo.map(decode).transpose()?;
        Ok(Self { address: address.map_err(|_| Self::EXPECTED)?, credentials })
    }
}

/// Undoes `%XX`; a user without a password has an empty one.
fn decode(userinfo: &str) -> Result<Zeroizing<Vec<u8>>, ExpectedValue> {
    let mut decoded = Zeroizing::new(Vec::with_capacity(userinfo.len() + 1));
    let mut rest = userinfo.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'%' => {
                let (digits, after) = after.split_first_chunk::<2>().ok_or(ProxyUrl::EXPECTED)?;
                let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
                let (high, low) = digit(digits[0]).zip(digit(digits[1])).ok_or(ProxyUrl::EXPECTED)?;
                decoded.push(high << 4 | low);
                rest = after;
            }
            b'/' | b'@' => return Err(ProxyUrl::EXPECTED),
            plain if plain.is_ascii_graphic() => decoded.push(*plain),
            _ => return Err(ProxyUrl::EXPECTED),
        }
    }
    if !userinfo.contains(':') {
        decoded.push(b':');
    }
    Ok(decoded)
}

impl fmt::Display for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hidden = if self.credentials.is_some() { "(hidden)@" } else { "" };
        write!(f, "http://{hidden}{}", self.address)
    }
}

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProxyUrl({self})")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_has_an_address_and_maybe_credentials_that_never_show() {
        for (text, address, credentials) in [
            ("http://proxy.example:3128", "proxy.example:3128", None),
            ("http://proxy.example/", "proxy.example:80", None),
            ("http://[2001:db8::1]", "[2001:db8::1]:80", None),
            ("http://[2001:db8::1]:8080", "[2001:db8::1]:8080", None),
            ("http://joe:canary@192.0.2.1:3128", "192.0.2.1:3128", Some("joe:canary")),
            ("http://joe@proxy.example:1", "proxy.example:1", Some("joe:")),
            ("http://j%40e:can%3a%2Fry@proxy.example:1", "proxy.example:1", Some("j@e:can:/ry")),
        ] {
            let proxy: ProxyUrl = text.parse().unwrap();
            assert_eq!(proxy.address.to_string(), address, "{text}");
            assert_eq!(proxy.credentials(), credentials.map(str::as_bytes), "{text}");
            let shown = format!("{proxy} {proxy:?}");
            assert!(!shown.contains("canary") && !shown.contains("joe"), "{shown}");
        }
        for bad in [
            "proxy.example:3128",
            "https://proxy.example:3128",
            "socks5://proxy.example:3128",
            "http://",
            "http://proxy.example:0",
            "http://proxy.example:3128/path",
            "http://a b@proxy.example:3128",
            "http://a%4@proxy.example:3128",
            "http://a%zz@proxy.example:3128",
            "http://a@b@proxy.example:3128",
        ] {
            assert!(bad.parse::<ProxyUrl>().is_err(), "{bad}");
        }
    }
}
