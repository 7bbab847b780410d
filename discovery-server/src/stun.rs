//! STUN on two neighbouring UDP ports: tells a client its address, and answers from the other port when asked to.
//!
//! An answer is never longer than its request, leaves from the address the request came to, and is one of a budget per
//! source, so the service is of no use as an amplifier. It knows nothing of sessions.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter};
use mesh_proto::wire::stun::answer;
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tracing::warn;

use crate::gate::source;
use crate::metrics::StunCounters;

/// Requests of one source: a site with many nodes that all start at once, then a steady trickle.
const BURST: u32 = 200;
const PER_SECOND: u32 = 50;
/// Sources with a budget of their own; beyond that all share one.
const MAX_SOURCES: usize = 100_000;
const SHARED_PER_SECOND: u32 = 5000;
const FORGET_EVERY: Duration = Duration::from_secs(10);
/// The kernel may hand over many datagrams of one source as one.
const BUFFER: usize = 64 * 1024;
const BUFFERS: usize = 4;
/// After an error of the socket, so that it does not spin.
const PAUSE: Duration = Duration::from_millis(100);

/// The two sockets of the service.
pub(crate) struct Service {
    ports: [Port; 2],
}

struct Port {
    socket: UdpSocket,
    state: UdpSocketState,
}

struct Budget {
    limiter: DefaultKeyedRateLimiter<IpAddr>,
    /// Of all sources together while there are too many to tell apart.
    shared: DefaultDirectRateLimiter,
}

/// Takes over two bound sockets; needs a tokio runtime.
pub(crate) fn open([first, second]: [std::net::UdpSocket; 2]) -> io::Result<Service> {
    Ok(Service { ports: [Port::open(first)?, Port::open(second)?] })
}

/// Answers for ever.
pub(crate) async fn serve(service: Service, counters: Arc<StunCounters>) {
    let budget = Budget::new();
    let [first, second] = &service.ports;
    tokio::join!(
        answer_on(first, second, &budget, &counters),
        answer_on(second, first, &budget, &counters),
        budget.forget()
    );
}

async fn answer_on(port: &Port, other: &Port, budget: &Budget, counters: &StunCounters) {
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
                let Some(answer) = answer(datagram, from) else {
                    count(&counters.malformed);
                    continue;
                };
                if answer.from.address {
                    count(&counters.malformed);
                    continue;
                }
                let via = if answer.from.port { other } else { port };
                if via.send(&answer.bytes, meta) {
                    count(&counters.answered);
                }
            }
        }
    }
}

impl Port {
    fn open(socket: std::net::UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self { socket: UdpSocket::from_std(socket)?, state })
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

    /// Sends to where `asked` came from, from the address it came to. A full socket drops the answer: the client asks again.
    fn send(&self, bytes: &[u8], asked: &RecvMeta) -> bool {
        let transmit =
            Transmit { destination: asked.addr, ecn: None, contents: bytes, segment_size: None, src_ip: asked.dst_ip };
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
