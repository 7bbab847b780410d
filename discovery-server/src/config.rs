//! Flags: what a person may say, each value checked where it is read, so that nothing wrong gets further than usage.

use std::collections::BTreeSet;
use std::env;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use mesh_common::config::HostPort;
use mesh_common::id::Namespace;
use mesh_common::limits::{MAX_CONNECTIONS, MAX_STORED_BYTES, RELAY_CLIENT_BYTES, RELAY_NAMESPACE_BYTES, SLOT_TTL};
use mesh_proto::relay::switch::RelayLimits;

use crate::socket::any;
use crate::tls::KeySource;

/// First STUN port unless said otherwise; the second is the next one.
pub(crate) const STUN_PORT: u16 = 3478;
const DEFAULT_STATE_DIR: &str = "/var/lib/meshspan-discovery";
/// 1 TB a second: no limit.
const RELAY_MAX_BYTES: u64 = 1_000_000_000_000;
const TTL_RANGE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

/// Rendezvous for Meshspan agents. It stores sealed records that it cannot read, in memory only, and needs no configuration.
#[derive(Debug, Parser)]
#[command(name = "discovery-server", version, args_conflicts_with_subcommands = false)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) identity: IdentityArgs,
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print the server token: what `mesh-agent init` needs to know about this server. It holds no secret.
    Token,
}

/// Who this server is and where it is found.
#[derive(Debug, Args)]
pub(crate) struct IdentityArgs {
    /// Address for agents, UDP (QUIC) and TCP (WebSocket) both; port 0 takes a free one
    /// [default: port 443 on all addresses, or 7443 where 443 cannot be had]
    #[arg(long, global = true, value_name = "ADDR:PORT", value_parser = parse_listen)]
    pub(crate) listen: Option<SocketAddr>,
    /// Where agents find this server, when that is not the address it listens on
    #[arg(long, global = true, value_name = "HOST:PORT")]
    pub(crate) advertise: Option<HostPort>,
    /// Where the TLS key is kept [default: /var/lib/meshspan-discovery, or what systemd gives]
    #[arg(long, global = true, value_name = "DIR", conflicts_with = "tls_key")]
    state_dir: Option<PathBuf>,
    /// A certificate chain of your own, PEM
    #[arg(long, global = true, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The private key of that certificate, PEM; agents know the server by it
    #[arg(long, global = true, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// First UDP port of the STUN service, the next port is used too; `off` for none
    /// [default: port 3478 on the addresses of --listen]
    #[arg(long, value_name = "ADDR:PORT|off", value_parser = parse_stun)]
    pub(crate) stun: Option<Stun>,
    /// Another address of this host, as agents reach it, on which STUN answers too: agents then tell more kinds of NAT
    /// apart; once for each family [default port: as for --stun]
    #[arg(long, value_name = "IP[:PORT]", value_parser = parse_stun_alt)]
    pub(crate) stun_alt_address: Vec<StunAlt>,
    /// Plain HTTP with /livez, /readyz and /metrics; not for the Internet [default: off]
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_listen)]
    pub(crate) http: Option<SocketAddr>,
    /// Serve this cluster only (64 hex digits, shown by `mesh-agent status`); may be repeated
    #[arg(long, value_name = "NAMESPACE")]
    only_namespace: Vec<Namespace>,
    /// A name under which agents behind a TLS-terminating proxy reach this server; may be repeated
    #[arg(long, value_name = "NAME", value_parser = parse_own_name)]
    own_name: Vec<String>,
    /// How long a member stays listed after its last session ended, from 1s to 1h [default: 2m]
    #[arg(long, value_name = "TIME", value_parser = parse_ttl)]
    ttl: Option<Duration>,
    /// Sessions at once
    #[arg(long, value_name = "N", default_value_t = MAX_CONNECTIONS as u64, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    max_connections: u64,
    /// Memory for records, in MiB; what is stored stays, new nodes are refused
    #[arg(long, value_name = "MIB", default_value_t = (MAX_STORED_BYTES >> 20) as u64, value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    max_memory: u64,
    /// Whether to relay between the nodes of a cluster that cannot reach each other directly
    #[arg(long, value_name = "on|off", value_enum, default_value_t = Relay::On)]
    relay: Relay,
    /// Relayed bytes a second that one node may send
    #[arg(long, value_name = "N", default_value_t = RELAY_CLIENT_BYTES, value_parser = clap::value_parser!(u64).range(1..=RELAY_MAX_BYTES))]
    relay_client_bytes: u64,
    /// Relayed bytes a second of one cluster
    #[arg(long, value_name = "N", default_value_t = RELAY_NAMESPACE_BYTES, value_parser = clap::value_parser!(u64).range(1..=RELAY_MAX_BYTES))]
    relay_namespace_bytes: u64,
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stun {
    Off,
    At(SocketAddr),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Relay {
    On,
    Off,
}

/// The other address of the STUN service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StunAlt {
    pub(crate) address: IpAddr,
    /// The first of two; `None` = the ports of the service.
    pub(crate) port: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

impl IdentityArgs {
    pub(crate) fn key_source(&self) -> KeySource {
        match (&self.tls_cert, &self.tls_key) {
            (Some(cert), Some(key)) => KeySource::Files { cert: cert.clone(), key: key.clone() },
            _ => KeySource::StateDir(self.state_dir.clone().unwrap_or_else(default_state_dir)),
        }
    }
}

impl ServeArgs {
    pub(crate) fn only_namespaces(&self) -> BTreeSet<Namespace> {
        self.only_namespace.iter().copied().collect()
    }

    pub(crate) fn own_names(&self) -> BTreeSet<String> {
        self.own_name.iter().cloned().collect()
    }

    pub(crate) fn ttl(&self) -> Duration {
        self.ttl.unwrap_or(SLOT_TTL)
    }

    /// `None` = no relay.
    pub(crate) fn relay(&self) -> Option<RelayLimits> {
        let limits = RelayLimits { client_bytes: self.relay_client_bytes, namespace_bytes: self.relay_namespace_bytes };
        (self.relay == Relay::On).then_some(limits)
    }

    pub(crate) fn max_stored_bytes(&self) -> usize {
        usize::try_from(self.max_memory << 20).expect("at most a TiB")
    }

    pub(crate) fn max_connections(&self) -> usize {
        usize::try_from(self.max_connections).expect("at most a million")
    }
}

fn default_state_dir() -> PathBuf {
    // systemd may give several, separated by colons; ours is the first.
    let given = env::var_os("STATE_DIRECTORY").and_then(|dirs| env::split_paths(&dirs).next());
    given.filter(|dir| dir.is_absolute()).unwrap_or_else(|| DEFAULT_STATE_DIR.into())
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let wrong = || format!("{text:?} is no address with a port, such as [::]:7443, 0.0.0.0:7443 or :7443");
    match text.strip_prefix(':') {
        Some(port) => port.parse().map(any).map_err(|_| wrong()),
        None => text.parse().map_err(|_| wrong()),
    }
}

fn parse_stun(text: &str) -> Result<Stun, String> {
    if text == "off" {
        return Ok(Stun::Off);
    }
    let address = parse_listen(text).map_err(|wrong| format!("{wrong}, nor `off`"))?;
    has_next_port(address.port())?;
    Ok(Stun::At(address))
}

fn parse_stun_alt(text: &str) -> Result<StunAlt, String> {
    let wrong =
        || format!("{text:?} is no address of this host, such as 192.0.2.2, 192.0.2.2:3478 or [2001:db8::2]:3478");
    let alone = text.parse().ok().map(|address| StunAlt { address, port: None });
    let with_port = || text.parse::<SocketAddr>().map(|at| StunAlt { address: at.ip(), port: Some(at.port()) });
    let alt = alone.map_or_else(with_port, Ok).map_err(|_| wrong())?;
    if alt.address.is_unspecified() || alt.address.is_multicast() {
        return Err(wrong());
    }
    has_next_port(alt.port.unwrap_or_default())?;
    Ok(alt)
}

fn has_next_port(port: u16) -> Result<(), String> {
    if port == u16::MAX {
        return Err("the port after this one is used too, and there is none after 65535".to_owned());
    }
    Ok(())
}

fn parse_own_name(text: &str) -> Result<String, String> {
    // The name of a host is what may stand before a port.
    format!("{text}:1")
        .parse::<HostPort>()
        .map(|valid| valid.host)
        .map_err(|_| format!("{text:?} is no host name; give it without scheme and port, such as disc.example"))
}

fn parse_ttl(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time from 1s to 1h, such as 30s or 2m");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let unit = match &text[digits.len()..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(wrong()),
    };
    let time = number.checked_mul(unit).map(Duration::from_secs).ok_or_else(wrong)?;
    if TTL_RANGE.contains(&time) { Ok(time) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn flags_are_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn every_wrong_value_is_refused_with_an_example() {
        for (flag, value, hint) in [
            ("--listen", "localhost", "[::]:7443"),
            ("--listen", "0.0.0.0:70000", "[::]:7443"),
            ("--stun", "no", "off"),
            ("--stun", "127.0.0.1:65535", "65535"),
            ("--stun-alt-address", "alt.example", "192.0.2.2"),
            ("--stun-alt-address", "[::]:3478", "192.0.2.2"),
            ("--stun-alt-address", "224.0.0.1", "192.0.2.2"),
            ("--stun-alt-address", "192.0.2.2:65535", "65535"),
            ("--http", "8080", ":7443"),
            ("--ttl", "0s", "30s"),
            ("--ttl", "2d", "30s"),
            ("--ttl", "99999999999999999999s", "30s"),
            ("--ttl", "2h", "1h"),
            ("--only-namespace", "abc", "64 hex digits"),
            ("--own-name", "https://a.example", "disc.example"),
            ("--own-name", "a.example:443", "disc.example"),
            ("--max-connections", "0", "1..="),
            ("--max-memory", "0", "1..="),
            ("--relay", "yes", "off"),
            ("--relay-client-bytes", "0", "1..="),
            ("--relay-namespace-bytes", "4M", "invalid digit"),
            ("--advertise", "a.example", "host:port"),
            ("--advertise", "2001:db8::1:7443", "brackets"),
            ("--advertise", "a.example:0", "host:port"),
            ("--log-format", "xml", "json"),
        ] {
            let error = Cli::try_parse_from(["discovery-server", flag, value]).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let text = error.to_string();
            assert!(text.contains(flag) && text.contains(hint), "{flag} {value}: {text}");
        }
        for half in [["--tls-cert", "a.pem"], ["--tls-key", "a.pem"]] {
            let error = Cli::try_parse_from(["discovery-server", half[0], half[1]]).unwrap_err();
            assert!(error.to_string().contains("--tls-cert") && error.to_string().contains("--tls-key"), "{error}");
        }
    }

    #[test]
    fn right_values_are_read() {
        let cli = Cli::try_parse_from([
            "discovery-server",
            "--listen",
            ":7443",
            "--stun",
            "127.0.0.1:0",
            "--stun-alt-address",
            "192.0.2.2",
            "--stun-alt-address",
            "[2001:db8::2]:3480",
            "--ttl",
            "2m",
            "--own-name",
            "Disc.Example",
            "--advertise",
            "[2001:db8::1]:443",
            "--state-dir",
            "/tmp/x",
            "--relay-client-bytes",
            "1000",
        ])
        .unwrap();
        assert_eq!(cli.identity.listen, Some("[::]:7443".parse().unwrap()));
        assert_eq!(cli.identity.advertise.as_ref().unwrap().to_string(), "[2001:db8::1]:443");
        assert_eq!(cli.identity.key_source(), KeySource::StateDir("/tmp/x".into()));
        assert_eq!(cli.serve.stun, Some(Stun::At("127.0.0.1:0".parse().unwrap())));
        let alt = |address: &str, port| StunAlt { address: address.parse().unwrap(), port };
        assert_eq!(cli.serve.stun_alt_address, [alt("192.0.2.2", None), alt("2001:db8::2", Some(3480))]);
        assert_eq!(cli.serve.ttl(), Duration::from_secs(120));
        assert_eq!(cli.serve.own_names(), BTreeSet::from(["disc.example".to_owned()]));
        assert_eq!(cli.serve.relay(), Some(RelayLimits { client_bytes: 1000, ..RelayLimits::default() }));
        let plain = Cli::try_parse_from(["discovery-server"]).unwrap().serve;
        assert_eq!((plain.ttl(), plain.relay()), (SLOT_TTL, Some(RelayLimits::default())));
        let without = Cli::try_parse_from(["discovery-server", "--relay", "off"]).unwrap().serve;
        assert_eq!(without.relay(), None);
    }

    #[test]
    fn token_takes_the_flags_of_identity_on_either_side() {
        for line in [["--advertise", "a.example:1", "token"], ["token", "--advertise", "a.example:1"]] {
            let cli = Cli::try_parse_from(std::iter::once("discovery-server").chain(line)).unwrap();
            assert!(matches!(cli.command, Some(Command::Token)));
            assert_eq!(cli.identity.advertise.unwrap().to_string(), "a.example:1");
        }
    }
}
