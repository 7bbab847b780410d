//! `discovery-server token`: endpoint and pin in one line for `mesh-agent init`.

use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::Context as _;
use mesh_common::config::{DiscoveryServer, ServerEndpoint};
use mesh_common::token::ServerToken;

use crate::config::IdentityArgs;
use crate::serve::advertised;
use crate::socket::{DEFAULT_PORTS, any};
use crate::tls::Identity;

/// A server on this machine answers within this or not at all.
const LOCAL_ANSWER: Duration = Duration::from_secs(1);

pub(crate) fn print(args: &IdentityArgs) -> anyhow::Result<()> {
    let identity = Identity::load(&args.key_source())?;
    let listens = match args.listen {
        Some(address) => address,
        None if args.advertise.is_some() => any(0),
        None => any(running_port().context(
            "no discovery-server answers on this machine on port 443 or 7443: start it first, or say where agents find it with --advertise HOST:PORT",
        )?),
    };
    anyhow::ensure!(
        args.advertise.is_some() || listens.port() != 0,
        "--listen with port 0 does not say where the server is: use the line `endpoint=` it printed with --advertise HOST:PORT"
    );
    let endpoint = format!("https://{}", advertised(args.advertise.as_ref(), listens));
    let endpoint: ServerEndpoint = endpoint
        .parse()
        .with_context(|| format!("{endpoint} cannot be an endpoint: say another with --advertise HOST:PORT"))?;
    let token = ServerToken { servers: vec![DiscoveryServer { endpoint, pin: identity.pin(), proxied: false }] };
    writeln!(io::stdout(), "{}", token.to_text()).context("cannot write the token to standard output")
}

/// The default port that answers here. The later one first: a server takes it only when another program holds the first.
fn running_port() -> Option<u16> {
    DEFAULT_PORTS.into_iter().rev().find(|port| {
        TcpStream::connect_timeout(&SocketAddr::new(Ipv4Addr::LOCALHOST.into(), *port), LOCAL_ANSWER).is_ok()
    })
}
