//! STUN on two neighbouring UDP ports: tells a client its address, and answers from the other port when asked to, or from
//! another address where this host gives one to the service.
//!
//! An answer is never longer than its request, is one of a budget per source that all sockets share, and leaves from the
//! address the request came to unless another one was asked for, so the service is of no use as an amplifier. It knows
//! nothing of sessions.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::future::join_all;
use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter};
use mesh_proto::wire::stun::{Answer, answer};
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tracing::warn;

use crate::config::{STUN_PORT, Stun, StunAlt};
use crate::gate::source;
use crate::metrics::StunCounters;
use crate::socket::{PortUse, bind_udp};

/// Requests of one source: a site with many nodes that all start at once, each with a dozen questions, then a steady trickle.
const BURST: u32 = 1000;
const PER_SECOND: u32 = 100;
/// Sources with a budget of their own; beyond that all share one.
const MAX_SOURCES: usize = 100_000;
const SHARED_PER_SECOND: u32 = 5000;
const FORGET_EVERY: Duration = Duration::from_secs(10);
/// The kernel may hand over many datagrams of one source as one.
const BUFFER: usize = 64 * 1024;
const BUFFERS: usize = 4;
/// After an error of the socket, so that it does not spin.
const PAUSE: Duration = Duration::from_millis(100);

/// Bound sockets: the service's own address first, then its other ones, two neighbouring ports each.
#[derive(Debug)]
pub(crate) struct Sockets(Vec<[Bound; 2]>);

#[derive(Debug)]
struct Bound {
    socket: std::net::UdpSocket,
    at: SocketAddr,
}

/// The service, one pair of ports an address.
pub(crate) struct Service {
    sites: Vec<[Port; 2]>,
}

struct Port {
    socket: UdpSocket,
    state: UdpSocketState,
    at: IpAddr,
}

struct Budget {
    limiter: DefaultKeyedRateLimiter<IpAddr>,
    /// Of all sources together while there are too many to tell apart.
    shared: DefaultDirectRateLimiter,
}

/// Binds what `--stun` and `--stun-alt-address` say. Without `--stun`, ports that are taken cost the service, not the server.
pub(crate) fn bind(given: Option<Stun>, alt: &[StunAlt], listens: SocketAddr) -> anyhow::Result<Option<Sockets>> {
    let first = match given {
        Some(Stun::Off) if !alt.is_empty() => bail!("--stun-alt-address is of no use with --stun off: leave one out"),
        Some(Stun::Off) => return Ok(None),
        Some(Stun::At(address)) => address,
        None => SocketAddr::new(listens.ip(), STUN_PORT),
    };
    let port_use = if alt.is_empty() { PortUse::Own } else { PortUse::Shared };
    let main = match (bind_pair(first, port_use), given) {
        (Ok(pair), _) => pair,
        (Err(error), None) if alt.is_empty() => {
            let next = next_port(first.port());
            warn!(%error, "no STUN: UDP ports {} and {next} cannot be had; choose others with --stun", first.port());
            return Ok(None);
        }
        (Err(error), _) => {
            return Err(error).with_context(|| {
                format!(
                    "cannot use UDP {first} and the port after it for STUN: choose others with --stun, or --stun off"
                )
            });
        }
    };
    let mut pairs = vec![main];
    for alt in alt {
        if pairs.iter().skip(1).any(|[bound, _]| bound.at.is_ipv4() == alt.address.is_ipv4()) {
            bail!("--stun-alt-address {}: one address of each family is enough", alt.address);
        }
        if pairs[0][0].at.ip() == alt.address {
            bail!(
                "--stun-alt-address {}: --stun answers there already; give another address of this host",
                alt.address
            );
        }
        pairs.push(bind_alt(*alt, &pairs[0]).with_context(|| {
            format!("cannot use UDP on {} for STUN: give a free --stun-alt-address of this host", alt.address)
        })?);
    }
    Ok(Some(Sockets(pairs)))
}

fn bind_pair(first: SocketAddr, port_use: PortUse) -> io::Result<[Bound; 2]> {
    let second = SocketAddr::new(first.ip(), next_port(first.port()));
    Ok([Bound::new(first, port_use)?, Bound::new(second, port_use)?])
}

/// On the ports of the service unless said otherwise.
fn bind_alt(alt: StunAlt, main: &[Bound; 2]) -> io::Result<[Bound; 2]> {
    match alt.port {
        Some(port) => bind_pair(SocketAddr::new(alt.address, port), PortUse::Shared),
        None => {
            let [first, second] = main;
            let bind = |port| Bound::new(SocketAddr::new(alt.address, port), PortUse::Shared);
            Ok([bind(first.at.port())?, bind(second.at.port())?])
        }
    }
}

/// The port after this one; any, after any.
fn next_port(port: u16) -> u16 {
    if port == 0 { 0 } else { port + 1 }
}

impl Bound {
    fn new(address: SocketAddr, port_use: PortUse) -> io::Result<Self> {
        let socket = bind_udp(address, port_use)?;
        Ok(Self { at: socket.local_addr()?, socket })
    }
}

impl Sockets {
    /// What agents are told: the ports of the service, and its sockets on other addresses.
    pub(crate) fn announced(&self) -> (Vec<u16>, Vec<SocketAddr>) {
        let (main, alt) = self.0.split_first().expect("there is the service's own address");
        (main.iter().map(|bound| bound.at.port()).collect(), alt.iter().flatten().map(|bound| bound.at).collect())
    }

    /// Takes the sockets over; needs a tokio runtime.
    pub(crate) fn open(self) -> io::Result<Service> {
        let open = |[first, second]: [Bound; 2]| Ok([Port::open(first)?, Port::open(second)?]);
        Ok(Service { sites: self.0.into_iter().map(open).collect::<io::Result<_>>()? })
    }
}

/// Answers for ever.
pub(crate) async fn serve(service: Service, counters: Arc<StunCounters>) {
    let budget = Budget::new();
    let places = (0..service.sites.len()).flat_map(|site| [(site, 0), (site, 1)]);
    let all = places.map(|place| service.answer_on(place, &budget, &counters));
    tokio::join!(join_all(all), budget.forget());
}

impl Service {
    async fn answer_on(&self, (site, place): (usize, usize), budget: &Budget, counters: &StunCounters) {
        let port = &self.sites[site][place];
        let mut storage = vec![0; BUFFER * BUFFERS];
        let mut metas = [RecvMeta::default(); BUFFERS];
        loop {
            let received = match port.receive(&mut storage, &mut metas).await {
                Ok(received) => received,
                Err(error) => {
                    warn!(%error, "cannot receive STUN requests");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            for (buffer, meta) in storage.chunks(BUFFER).zip(&metas).take(received) {
                for datagram in buffer[..meta.len].chunks(meta.stride.max(1)) {
                    let from = SocketAddr::new(meta.addr.ip().to_canonical(), meta.addr.port());
                    if !budget.allows(from.ip()) {
                        count(&counters.over_budget);
                        continue;
                    }
                    let sent = answer(datagram, from).and_then(|answer| self.reply(&answer, (site, place), meta));
                    match sent {
                        Some(true) => count(&counters.answered),
                        Some(false) => {}
                        None => count(&counters.malformed),
                    }
                }
            }
        }
    }

    /// Sends an answer from where it is wanted; `None` = there is no such socket.
    fn reply(&self, answer: &Answer, asked: (usize, usize), meta: &RecvMeta) -> Option<bool> {
        let (site, place) = asked;
        let place = if answer.from.port { 1 - place } else { place };
        if !answer.from.address {
            // The service's own address may be several: the one that was asked answers.
            return Some(self.sites[site][place].send(&answer.bytes, meta.addr, meta.dst_ip));
        }
        let others = self.sites.iter().enumerate().filter(|(other, _)| (*other == 0) != (site == 0));
        let mut others =
            others.map(|(_, ports)| &ports[place]).filter(|port| port.reaches(meta.addr.ip().to_canonical()));
        others.next().map(|port| port.send(&answer.bytes, meta.addr, None))
    }
}

impl Port {
    fn open(bound: Bound) -> io::Result<Self> {
        let state = UdpSocketState::new((&bound.socket).into())?;
        Ok(Self { socket: UdpSocket::from_std(bound.socket)?, state, at: bound.at.ip() })
    }

    /// Whether this socket can send to that address at all.
    fn reaches(&self, to: IpAddr) -> bool {
        // IPv6 on all addresses is IPv4 as well.
        self.at.is_ipv4() == to.is_ipv4() || self.at.is_ipv6() && self.at.is_unspecified()
    }

    async fn receive(&self, storage: &mut [u8], metas: &mut [RecvMeta; BUFFERS]) -> io::Result<usize> {
        loop {
            self.socket.readable().await?;
            let mut chunks = storage.chunks_mut(BUFFER);
            let mut buffers: [IoSliceMut<'_>; BUFFERS] =
                std::array::from_fn(|_| IoSliceMut::new(chunks.next().expect("one chunk a buffer")));
            let received =
                self.socket.try_io(Interest::READABLE, || self.state.recv((&self.socket).into(), &mut buffers, metas));
            match received {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }

    /// A full socket drops the answer: the client asks again.
    fn send(&self, bytes: &[u8], to: SocketAddr, from: Option<IpAddr>) -> bool {
        let to = match to.ip().to_canonical() {
            IpAddr::V4(v4) if self.at.is_ipv6() => SocketAddr::new(v4.to_ipv6_mapped().into(), to.port()),
            IpAddr::V4(v4) => SocketAddr::new(v4.into(), to.port()),
            IpAddr::V6(_) => to,
        };
        let transmit = Transmit { destination: to, ecn: None, contents: bytes, segment_size: None, src_ip: from };
        self.socket.try_io(Interest::WRITABLE, || self.state.try_send((&self.socket).into(), &transmit)).is_ok()
    }
}

impl Budget {
    fn new() -> Self {
        let burst = NonZeroU32::new(BURST).expect("not zero");
        let per_second = NonZeroU32::new(PER_SECOND).expect("not zero");
        let shared = NonZeroU32::new(SHARED_PER_SECOND).expect("not zero");
        Self {
            limiter: RateLimiter::keyed(Quota::per_second(per_second).allow_burst(burst)),
            shared: RateLimiter::direct(Quota::per_second(shared)),
        }
    }

    fn allows(&self, from: IpAddr) -> bool {
        if self.limiter.len() < MAX_SOURCES {
            self.limiter.check_key(&source(from)).is_ok()
        } else {
            // Forged sources fill the table at will: then all share one budget, which honest ones rarely meet.
            self.shared.check().is_ok()
        }
    }

    /// Forgets sources whose budget is whole again, for ever.
    async fn forget(&self) {
        loop {
            tokio::time::sleep(FORGET_EVERY).await;
            self.limiter.retain_recent();
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_floods_is_cut_off_and_others_are_not() {
        let budget = Budget::new();
        let flood: IpAddr = [192, 0, 2, 1].into();
        let allowed = (0..BURST * 2).filter(|_| budget.allows(flood)).count();
        assert!(allowed >= BURST as usize && allowed < BURST as usize * 2, "{allowed}");
        assert!(budget.allows([192, 0, 2, 2].into()));
    }
}
