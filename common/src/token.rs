//! Tokens: what one person hands to another so that a node finds its servers and its cluster.
//!
//! `mss1.` (server token: servers and pins, no secret) or `msj1.` (join token: also the cluster's id and secret), then
//! base64url without padding of a JSON object, then `.` and the first 8 hex digits of SHA-256 of all before that dot.
//! White space inside is ignored, because terminals wrap. An error never shows any part of a token.

use std::fmt;

use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::config::{ClusterId, DiscoveryServer};
use crate::key::ClusterSecret;

const SERVER: &str = "mss1.";
const JOIN: &str = "msj1.";
/// The longest token that is read, in bytes, white space included.
const MAX_LEN: usize = 16 * 1024;

/// Printed by a discovery server: how to reach it. Holds no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerToken {
    /// Never empty.
    pub servers: Vec<DiscoveryServer>,
}

/// Printed by a member: makes any node that reads it a member too.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Never empty.
    pub servers: Vec<DiscoveryServer>,
    pub cluster_id: ClusterId,
    pub secret: ClusterSecret,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("this is not a token: a server token starts with `mss1.`, a join token with `msj1.`")]
    NotAToken,
    #[error("the token was made by a newer version: update mesh-agent on this machine")]
    NewerVersion,
    #[error("the token is damaged (its checksum does not fit): copy it again, whole")]
    Checksum,
    #[error(
        "this is a server token and joining needs a join token: run `mesh-agent token` on a node of the cluster, \
         or make a new cluster with `mesh-agent init`"
    )]
    JoinTokenNeeded,
    #[error(
        "this is a join token and a new cluster needs a server token: run `discovery-server token` on the server, \
         or join the token's cluster with `mesh-agent join`"
    )]
    ServerTokenNeeded,
    #[error("the token is whole, but what it says is not valid: make a new one")]
    Content,
}

#[derive(Serialize, Deserialize)]
struct ServerBody {
    servers: Vec<DiscoveryServer>,
}

#[derive(Serialize)]
struct JoinBodyRef<'a> {
    servers: &'a [DiscoveryServer],
    cluster: &'a ClusterId,
    secret: &'a str,
}

#[derive(Deserialize)]
struct JoinBody {
    servers: Vec<DiscoveryServer>,
    cluster: ClusterId,
    secret: String,
}

impl ServerToken {
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let body: ServerBody = open(text, SERVER, TokenError::ServerTokenNeeded)?;
        if body.servers.is_empty() {
            return Err(TokenError::Content);
        }
        Ok(Self { servers: body.servers })
    }

    pub fn to_text(&self) -> String {
        seal(SERVER, &ServerBody { servers: self.servers.clone() }).to_string()
    }
}

impl JoinToken {
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let body: JoinBody = open(text, JOIN, TokenError::JoinTokenNeeded)?;
        let secret = ClusterSecret::parse(&Zeroizing::new(body.secret)).map_err(|_| TokenError::Content)?;
        if body.servers.is_empty() {
            return Err(TokenError::Content);
        }
        Ok(Self { servers: body.servers, cluster_id: body.cluster, secret })
    }

    /// The text form, which holds the cluster secret.
    pub fn to_text(&self) -> Zeroizing<String> {
        let secret = self.secret.to_text();
        seal(JOIN, &JoinBodyRef { servers: &self.servers, cluster: &self.cluster_id, secret: &secret })
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("servers", &self.servers)
            .field("cluster_id", &self.cluster_id)
            .finish_non_exhaustive()
    }
}

/// Whether text is meant as a token, damaged or not: such text must not be taken for a file name.
pub fn looks_like_token(text: &str) -> bool {
    let text = text.trim_start();
    text.starts_with("mss") && version_follows(text) || text.starts_with("msj") && version_follows(text)
}

fn version_follows(text: &str) -> bool {
    text[3..].split_once('.').is_some_and(|(version, body)| {
        !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit()) && body.len() >= 16
    })
}

fn seal(prefix: &str, body: &impl Serialize) -> Zeroizing<String> {
    let json = Zeroizing::new(serde_json::to_vec(body).expect("strings and lists always serialize"));
    let mut text = Zeroizing::new(String::with_capacity(prefix.len() + json.len() * 4 / 3 + 16));
    text.push_str(prefix);
    BASE64URL_NOPAD.encode_append(&json, &mut text);
    let checksum = checksum(&text);
    text.push('.');
    text.push_str(&checksum);
    text
}

fn open<T: for<'de> Deserialize<'de>>(text: &str, prefix: &str, other_kind: TokenError) -> Result<T, TokenError> {
    if text.len() > MAX_LEN {
        return Err(TokenError::NotAToken);
    }
    let text: Zeroizing<String> = Zeroizing::new(text.chars().filter(|c| !c.is_whitespace()).collect());
    if !text.starts_with(SERVER) && !text.starts_with(JOIN) {
        return Err(if looks_like_token(&text) { TokenError::NewerVersion } else { TokenError::NotAToken });
    }
    let (sealed, given) = text.rsplit_once('.').ok_or(TokenError::Checksum)?;
    if sealed.len() < SERVER.len() || checksum(sealed) != given {
        return Err(TokenError::Checksum);
    }
    let body = sealed.strip_prefix(prefix).ok_or(other_kind)?;
    let json = Zeroizing::new(BASE64URL_NOPAD.decode(body.as_bytes()).map_err(|_| TokenError::Content)?);
    serde_json::from_slice(&json).map_err(|_| TokenError::Content)
}

fn checksum(text: &str) -> String {
    HEXLOWER.encode(&Sha256::digest(text.as_bytes())[..4])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const CANARY: [u8; 32] = *b"canary-canary-canary-canary-0123";

    fn servers() -> Vec<DiscoveryServer> {
        let server = |host: &str, proxied| DiscoveryServer {
            endpoint: format!("https://{host}:7443").parse().unwrap(),
            pin: crate::config::Pin([7; 32]),
            proxied,
        };
        vec![server("one.example", false), server("two.example", true)]
    }

    fn join_token() -> JoinToken {
        JoinToken { servers: servers(), cluster_id: "home".parse().unwrap(), secret: ClusterSecret::from_bytes(CANARY) }
    }

    #[test]
    fn tokens_round_trip_and_survive_wrapping() {
        let server = ServerToken { servers: servers() };
        assert_eq!(ServerToken::parse(&server.to_text()).unwrap(), server);
        let text = join_token().to_text();
        let wrapped: String =
            text.as_bytes().chunks(60).map(|line| format!("  {}\r\n", str::from_utf8(line).unwrap())).collect();
        assert_eq!(JoinToken::parse(&wrapped).unwrap(), join_token());
    }

    #[test]
    fn the_text_form_is_stable() {
        let token = ServerToken { servers: servers()[..1].to_vec() };
        let (sealed, checksum) = token.to_text().rsplit_once('.').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        let json = BASE64URL_NOPAD.decode(sealed.strip_prefix("mss1.").unwrap().as_bytes()).unwrap();
        let pin = "07".repeat(32);
        let expected = format!(r#"{{"servers":[{{"endpoint":"https://one.example:7443","pin":"sha256:{pin}"}}]}}"#);
        assert_eq!(String::from_utf8(json).unwrap(), expected);
        assert_eq!(checksum, HEXLOWER.encode(&Sha256::digest(sealed.as_bytes())[..4]));
    }

    #[test]
    fn every_single_typo_is_noticed() {
        let text = join_token().to_text();
        for at in 0..text.len() {
            let mut typo = text.as_bytes().to_vec();
            typo[at] = if typo[at] == b'a' { b'b' } else { b'a' };
            assert!(JoinToken::parse(str::from_utf8(&typo).unwrap()).is_err(), "character {at}");
            assert!(JoinToken::parse(&text[..at]).is_err(), "cut at {at}");
        }
        let mut typo = text.to_string();
        typo.replace_range(20..21, if &typo[20..21] == "A" { "B" } else { "A" });
        assert_eq!(JoinToken::parse(&typo), Err(TokenError::Checksum));
    }

    #[test]
    fn each_mistake_has_its_own_answer() {
        let server = ServerToken { servers: servers() }.to_text();
        let join = join_token().to_text();
        assert_eq!(JoinToken::parse(&server), Err(TokenError::JoinTokenNeeded));
        assert_eq!(ServerToken::parse(&join), Err(TokenError::ServerTokenNeeded));
        for text in ["", "hello", "mss1", "/etc/meshspan/token"] {
            assert_eq!(ServerToken::parse(text), Err(TokenError::NotAToken), "{text}");
        }
        assert_eq!(ServerToken::parse(&server.replace("mss1.", "mss2.")), Err(TokenError::NewerVersion));
        for json in [r#"{"servers":[]}"#, "{}", "[]", r#"{"servers":[{"endpoint":"http://a:1","pin":"x"}]}"#] {
            let sealed = format!("mss1.{}", BASE64URL_NOPAD.encode(json.as_bytes()));
            assert_eq!(
                ServerToken::parse(&format!("{sealed}.{}", checksum(&sealed))),
                Err(TokenError::Content),
                "{json}"
            );
        }
        assert_eq!(ServerToken::parse("mss1.\u{1f600}.zz"), Err(TokenError::Checksum));
        assert_eq!(ServerToken::parse(&"mss1.".repeat(9000)), Err(TokenError::NotAToken));
    }

    #[test]
    fn tokens_are_told_from_file_names() {
        assert!(looks_like_token(&join_token().to_text()));
        assert!(looks_like_token(&ServerToken { servers: servers() }.to_text()[..40]));
        for name in ["token", "mss1.txt", "/tmp/msj1.token", "msj1.", "", "ms"] {
            assert!(!looks_like_token(name), "{name}");
        }
    }

    #[test]
    fn debug_hides_the_secret() {
        let shown = format!("{:?}", join_token());
        assert!(!shown.contains("canary") && !shown.contains(&*join_token().secret.to_text()), "{shown}");
    }
}
