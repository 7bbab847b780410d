//! What people asked and the network has not answered yet: pings, and looks at the network.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use mesh_common::key::WgPublicKey;
use mesh_common::time::Instant;
use mesh_proto::device::Endpoint;
use mesh_proto::mesh::agent::{EchoError, EchoId, Via};
use tokio::sync::oneshot;

use super::Node;
use crate::api::{PingOutcome, PingRequest, PingVia};
use crate::clock;
use crate::status::fill;
use crate::status::net::Netcheck;

/// A ping without an answer is lost.
const PING_WAIT: Duration = Duration::from_secs(1);
/// Servers that do not answer by then will hardly do.
const CHECK_WAIT: Duration = Duration::from_secs(5);

type PingAnswer = oneshot::Sender<Result<PingOutcome, String>>;
type CheckAnswer = oneshot::Sender<Result<Box<Netcheck>, String>>;

/// Bounded by the queue of requests and the time each waits.
#[derive(Debug, Default)]
pub(super) struct Inquiries {
    pings: BTreeMap<EchoId, Ping>,
    checks: Vec<(CheckAnswer, Instant)>,
}

#[derive(Debug)]
struct Ping {
    peer: String,
    address: Option<IpAddr>,
    via: PingVia,
    lost_at: Instant,
    answer: PingAnswer,
}

impl Inquiries {
    pub(super) fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let pings = self.pings.values().map(|ping| (ping.lost_at, "a ping that is not answered"));
        let checks = self.checks.iter().map(|(_, until)| (*until, "a look at the network"));
        pings.chain(checks).min_by_key(|(at, _)| *at)
    }
}

impl Node<'_> {
    pub(super) fn start_ping(&mut self, request: PingRequest, answer: PingAnswer) {
        // Whoever asked may have gone: then nobody misses the answer.
        let refuse = |answer: PingAnswer, why: String| drop(answer.send(Err(why)));
        let now = clock::now();
        let status = self.status();
        let peer = match status.peer_named(&request.peer) {
            Ok(peer) => peer,
            Err(error) => return refuse(answer, error.to_string()),
        };
        let name = peer.host_name.clone();
        let key = WgPublicKey::parse(&peer.public_key).expect("the status holds keys as they print themselves");
        let via = match request.via {
            PingVia::Any => Via::Any,
            PingVia::Relay => Via::Relay,
            PingVia::Direct => Via::Direct,
        };
        match self.agent.send_echo(&key, via, now) {
            Ok(echo) => {
                let address = peer.overlay_v4.map(IpAddr::from).or(peer.overlay_v6.map(IpAddr::from));
                let ping = Ping { peer: name, address, via: request.via, lost_at: now + PING_WAIT, answer };
                self.inquiries.pings.insert(echo, ping);
            }
            Err(EchoError::UnknownPeer) => {
                refuse(answer, format!("{name} is a static peer and answers no probes: ping its address"));
            }
            Err(error) => {
                let why = error.to_string().trim_end_matches([':', ' ']).to_owned();
                drop(answer.send(Ok(PingOutcome::NoPath { peer: name, why })));
            }
        }
    }

    pub(super) fn end_ping(&mut self, echo: EchoId, from: Endpoint, rtt: Duration) {
        let Some(ping) = self.inquiries.pings.remove(&echo) else { return };
        let outcome = PingOutcome::Reply {
            peer: ping.peer,
            address: ping.address,
            via: if from.is_relay() { PingVia::Relay } else { PingVia::Direct },
            endpoint: fill::endpoint_name(from, &self.agent.view(clock::now())),
            rtt_us: u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX),
        };
        drop(ping.answer.send(Ok(outcome)));
    }

    pub(super) fn start_netcheck(&mut self, answer: CheckAnswer) {
        let now = clock::now();
        self.agent.check_net(now);
        self.inquiries.checks.push((answer, now + CHECK_WAIT));
    }

    /// Answers what need not wait any longer.
    pub(super) fn end_inquiries(&mut self, now: Instant) {
        let pings = &mut self.inquiries.pings;
        let lost: Vec<EchoId> = pings.iter().filter(|(_, ping)| now >= ping.lost_at).map(|(echo, _)| *echo).collect();
        for ping in lost.iter().filter_map(|echo| pings.remove(echo)).collect::<Vec<_>>() {
            let waited_ms = u64::try_from(PING_WAIT.as_millis()).unwrap_or(u64::MAX);
            drop(ping.answer.send(Ok(PingOutcome::Lost { peer: ping.peer, via: ping.via, waited_ms })));
        }
        if self.inquiries.checks.is_empty() {
            return;
        }
        let is_complete = !self.agent.is_checking_net();
        let over: Vec<_> = self.inquiries.checks.extract_if(.., |(_, until)| is_complete || now >= *until).collect();
        for (answer, _) in over {
            let netcheck = self.with_facts(|facts| fill::netcheck(facts, is_complete));
            drop(answer.send(Ok(Box::new(netcheck))));
        }
    }
}
