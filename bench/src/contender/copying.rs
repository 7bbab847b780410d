//! The ceiling of our engine: real TUN, real UDP, the real threads, and a tunnel that copies instead of sealing.
//!
//! It lives here and nowhere else: nothing that could be switched on by mistake in an agent knows how to send in clear.
//! Datagrams are as long as WireGuard's and look like them, so that the engine dispatches them as it would.

use std::{
    net::{IpAddr, SocketAddr},
    process::Command,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use ipnet::IpNet;
use mesh_agent::{
    clock,
    dataplane::{Clock, Engine, Refused, Tun, TunnelFactory, UdpSockets},
};
use mesh_common::{key::WgPublicKey, time::Instant};
use mesh_proto::{
    device::{PeerRoute, PeerSpec},
    wg::{DropReason, MIN_BUFFER, OVERHEAD, Opened, Sealed, Tunnel},
};
use netns_tests::{process::Process, wait};

use crate::bed::{Bed, End};

/// The link of each end.
const LINK: &str = "copy0";
const PORT: u16 = 51873;
const START_WITHIN: Duration = Duration::from_secs(10);
const TIMERS_EVERY: Duration = Duration::from_millis(250);

/// The two children.
#[derive(Debug)]
pub struct CopyingEngines {
    pub processes: [Process; 2],
}

impl CopyingEngines {
    pub fn start(bed: &Bed) -> Result<Self> {
        let [left, right] = bed.ends();
        let processes = [start_end(bed, left, right, 1)?, start_end(bed, right, left, 2)?];
        Ok(Self { processes })
    }
}

/// What one child is told, in one argument: our number, the peer's address on the wire and inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyingEnd {
    number: u8,
    peer: SocketAddr,
    allowed: IpNet,
}

impl FromStr for CopyingEnd {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(',');
        let mut next = || parts.next().context("write NUMBER,ENDPOINT,ALLOWED");
        Ok(Self { number: next()?.parse()?, peer: next()?.parse()?, allowed: next()?.parse()? })
    }
}

fn start_end(bed: &Bed, end: &End, other: &End, number: u8) -> Result<Process> {
    let mut command = Command::new(&bed.program);
    let peer = other.endpoint(PORT);
    command.arg("copying-end").arg(format!("{number},{peer},{}", IpNet::from(other.inner)));
    let mut process = Process::start(&end.host, command, &bed.scratch(&format!("copying-{number}")))?;
    let made =
        wait::until_or_dead("the copying engine's link", START_WITHIN, &mut process, Process::check_running, |_| {
            Ok(end.host.has_link(LINK)?.then_some(()))
        });
    process.explain(made)?;
    end.address_link(LINK)?;
    Ok(process)
}

/// The child: runs one end until it is killed.
pub fn run(end: &CopyingEnd) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let clock: Clock = Arc::new(clock::now);
    let socket = UdpSockets::bind(PORT, 0).context("cannot open the UDP sockets")?;
    let link = Tun::create(LINK, 1).context("cannot make the link")?;
    let mut engine = Engine::start(Some(link), vec![socket], CopyingTunnels, clock)?;
    let peer = WgPublicKey([3 - end.number; 32]);
    let spec = PeerSpec { preshared_key: None, allowed_ips: [end.allowed].into(), keepalive: None, generation: 0 };
    engine.set_peer(peer, spec);
    engine.publish();
    engine.set_route(&peer, &PeerRoute { primary: Some(end.peer.into()), ..PeerRoute::default() });
    runtime.block_on(async {
        let mut timers = tokio::time::interval(TIMERS_EVERY);
        loop {
            tokio::select! {
                () = engine.wait() => {}
                _ = timers.tick() => engine.handle_timeout(clock::now()),
            }
            engine.handle_control(clock::now());
        }
    })
}

struct CopyingTunnels;

impl TunnelFactory for CopyingTunnels {
    type Tunnel = CopyingTunnel;

    fn make(&self, peer: &WgPublicKey, _spec: &PeerSpec, index: u32, _now: Instant) -> CopyingTunnel {
        CopyingTunnel { own: 3 - peer.0[0], local: index << 8, remote: None, sent: 0 }
    }

    fn is_for_us(&self, _initiation: &[u8]) -> bool {
        true
    }

    fn admit<'a>(&self, _message: &[u8], _source: IpAddr, _reply: &'a mut [u8]) -> Result<(), Refused<'a>> {
        Ok(())
    }

    /// An initiation ends with the number of its sender, who is one of two.
    fn initiator(&self, initiation: &[u8]) -> Option<WgPublicKey> {
        initiation.get(INITIATION_LEN - 1).map(|number| WgPublicKey([*number; 32]))
    }

    fn reset_limits(&self) {}
}

const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
const DATA: u8 = 4;
const INITIATION_LEN: usize = 148;
const RESPONSE_LEN: usize = 92;
/// Kind, receiver, counter; the rest of the overhead stands where the tag would.
const DATA_HEAD: usize = 16;

/// Knows its peer's index after one exchange, and then copies.
struct CopyingTunnel {
    own: u8,
    local: u32,
    remote: Option<u32>,
    sent: u64,
}

impl CopyingTunnel {
    fn message<'a>(&self, kind: u8, len: usize, dst: &'a mut [u8]) -> &'a [u8] {
        let message = &mut dst[..len];
        message.fill(0);
        message[0] = kind;
        message[4..8].copy_from_slice(&self.local.to_le_bytes());
        if let (RESPONSE, Some(remote)) = (kind, self.remote) {
            message[8..12].copy_from_slice(&remote.to_le_bytes());
        }
        message[len - 1] = self.own;
        message
    }
}

impl Tunnel for CopyingTunnel {
    fn seal<'a>(&mut self, packet: &[u8], dst: &'a mut [u8], _now: Instant) -> Sealed<'a> {
        let len = packet.len() + OVERHEAD;
        if dst.len() < len.max(MIN_BUFFER) {
            return Sealed::Dropped(DropReason::ShortBuffer);
        }
        // The packet is not queued: whoever sends first sends again.
        let Some(remote) = self.remote else {
            return Sealed::Handshake(self.message(INITIATION, INITIATION_LEN, dst));
        };
        dst[..4].copy_from_slice(&[DATA, 0, 0, 0]);
        dst[4..8].copy_from_slice(&remote.to_le_bytes());
        dst[8..DATA_HEAD].copy_from_slice(&self.sent.to_le_bytes());
        dst[DATA_HEAD..DATA_HEAD + packet.len()].copy_from_slice(packet);
        dst[DATA_HEAD + packet.len()..len].fill(0);
        self.sent += 1;
        Sealed::Data(&dst[..len])
    }

    fn open<'a>(&mut self, datagram: &[u8], _source: IpAddr, dst: &'a mut [u8], _now: Instant) -> Opened<'a> {
        if dst.len() < datagram.len().max(MIN_BUFFER) {
            return Opened::Dropped(DropReason::ShortBuffer);
        }
        match (datagram.first(), datagram.len()) {
            (Some(&DATA), OVERHEAD..) => {
                let packet = &datagram[DATA_HEAD..datagram.len() - (OVERHEAD - DATA_HEAD)];
                dst[..packet.len()].copy_from_slice(packet);
                if packet.is_empty() { Opened::Keepalive } else { Opened::Packet(&dst[..packet.len()]) }
            }
            (Some(&INITIATION), INITIATION_LEN) => {
                self.remote = index_at(datagram, 4);
                Opened::Reply(self.message(RESPONSE, RESPONSE_LEN, dst))
            }
            (Some(&RESPONSE), RESPONSE_LEN) => {
                self.remote = index_at(datagram, 4);
                Opened::Established(None)
            }
            _ => Opened::Dropped(DropReason::Invalid),
        }
    }

    fn flush<'a>(&mut self, _dst: &'a mut [u8], _now: Instant) -> Option<&'a [u8]> {
        None
    }

    fn handle_timeout<'a>(&mut self, _dst: &'a mut [u8], _now: Instant) -> Option<&'a [u8]> {
        None
    }

    fn start_handshake<'a>(&mut self, dst: &'a mut [u8], _now: Instant) -> Option<&'a [u8]> {
        (dst.len() >= MIN_BUFFER).then(|| self.message(INITIATION, INITIATION_LEN, dst))
    }

    fn since_handshake(&self, _now: Instant) -> Option<Duration> {
        None
    }
}

fn index_at(datagram: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*datagram.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn after_one_exchange_packets_cross_unchanged_both_ways() {
        let now = Instant::ORIGIN;
        let make = |own: u8, index| CopyingTunnels.make(&WgPublicKey([3 - own; 32]), &spec(), index, now);
        let (mut a, mut b) = (make(1, 7), make(2, 9));
        let (mut x, mut y) = ([0; 2048], [0; 2048]);
        let Sealed::Handshake(initiation) = a.seal(b"first", &mut x, now) else { panic!("no handshake") };
        assert_eq!(CopyingTunnels.initiator(initiation), Some(WgPublicKey([1; 32])));
        let source = IpAddr::from([127, 0, 0, 1]);
        let Opened::Reply(response) = b.open(initiation, source, &mut y, now) else { panic!("no response") };
        assert_eq!(a.open(response, source, &mut [0; 2048], now), Opened::Established(None));
        let Sealed::Data(datagram) = a.seal(b"packet", &mut x, now) else { panic!("not sealed") };
        assert_eq!(datagram.len(), 6 + OVERHEAD);
        assert_eq!(index_at(datagram, 4), Some(9 << 8), "for the receiver's index");
        assert_eq!(b.open(datagram, source, &mut y, now), Opened::Packet(b"packet"));
        let Sealed::Data(datagram) = b.seal(b"back", &mut x, now) else { panic!("not sealed") };
        assert_eq!(a.open(datagram, source, &mut y, now), Opened::Packet(b"back"));
    }

    #[test]
    fn an_end_is_told_in_one_argument() {
        let end: CopyingEnd = "2,10.0.0.1:5,10.99.0.1/32".parse().unwrap();
        assert_eq!((end.number, end.peer.port(), end.allowed.prefix_len()), (2, 5, 32));
        assert!("2,10.0.0.1:5".parse::<CopyingEnd>().is_err());
    }

    fn spec() -> PeerSpec {
        PeerSpec { preshared_key: None, allowed_ips: Default::default(), keepalive: None, generation: 0 }
    }
}
