//! The members of a cluster introduce themselves to a discovery server, each in a session of its own, and go.
//!
//! The server keeps what they said for its time to live, so a node that comes later learns of all of them at once.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use mesh_agent::io::session::{Dialer, ServerAddress};
use mesh_common::{
    config::{Pin, ServerEndpoint},
    key::ClusterKeys,
};
use mesh_proto::wire::session::{Binding, ClientMessage, Hello, ServerMessage};
use netns_tests::{Host, mesh::config};
use tokio::{task::JoinSet, time::timeout};

use crate::member::{Member, cluster_keys};

/// Sessions at once: fewer than make a server ask for proofs of address.
const LANES: u16 = 16;
const STORED_WITHIN: Duration = Duration::from_secs(10);

/// Introduces the members 1 to `count`, from `host`.
pub fn publish(host: &Host, server: &config::ServerAddress, count: u16) -> Result<()> {
    let endpoint: ServerEndpoint = server.endpoint.parse().context("the server's endpoint")?;
    let pin: Pin = server.pin.parse().context("the server's pin")?;
    let server = ServerAddress { host: endpoint.host().to_owned(), port: endpoint.port(), pin: pin.0, proxy: None };
    host.inside(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(introduce_all(&server, count))
    })
}

async fn introduce_all(server: &ServerAddress, count: u16) -> Result<()> {
    let dialer = Dialer::new().context("cannot open sockets for the members")?;
    let mut lanes = JoinSet::new();
    for lane in 1..=LANES.min(count) {
        let (dialer, server, keys) = (dialer.clone(), server.clone(), cluster_keys());
        lanes.spawn(async move {
            for number in (lane..=count).step_by(LANES.into()) {
                let introduced = timeout(STORED_WITHIN, introduce(&dialer, &server, &keys, number)).await;
                introduced
                    .unwrap_or_else(|_| bail!("not stored within {STORED_WITHIN:?}"))
                    .with_context(|| format!("member {number} cannot introduce itself"))?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(lane) = lanes.join_next().await {
        lane??;
    }
    Ok(())
}

async fn introduce(dialer: &Dialer, server: &ServerAddress, keys: &ClusterKeys, number: u16) -> Result<()> {
    let member = Member::numbered(number);
    let mut carrier = dialer.dial(server).await?;
    let name = format!("{}:{}", server.host, server.port);
    let instance = member.record().instance;
    let hello = Hello::sign(keys, &member.identity, instance, &name, Binding::Exporter(carrier.exporter));
    carrier.sender.send(ClientMessage::Hello(Box::new(hello)).encode()).await?;
    carrier.sender.send(ClientMessage::Put(member.frame(keys, 1).as_bytes().clone()).encode()).await?;
    loop {
        let message = carrier.receiver.next().await.context("the server ended the session")??;
        match ServerMessage::decode(&message)? {
            ServerMessage::Stored { .. } => return Ok(()),
            ServerMessage::Error(error) => return Err(error.into()),
            _ => {}
        }
    }
}
