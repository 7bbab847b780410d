//! What the core asks of a host and what a host reports: the action and report pair, the same for every device.
//!
//! Owns the vocabulary only. [`crate::mesh::reconcile`] compares [`Desired`] with [`Observed`] and gives [`Action`]s; the
//! shell applies them in order and reports what it then observes. Ownership on the host is by link name, by table
//! [`ROUTE_TABLE`](mesh_common::limits::ROUTE_TABLE) and by rule priority, never by guess.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_common::id::ServerId;
use mesh_common::key::{PresharedKey, WgPublicKey};
use mesh_common::time::Instant;

/// Everything that should be on the host. Empty (the default) = nothing of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    pub link: Option<Link>,
    pub peers: BTreeMap<WgPublicKey, PeerSpec>,
    pub routes: BTreeSet<Route>,
    pub rules: BTreeSet<Family>,
    /// Underlay links whose reverse path filter must be loose (2), because a peer's endpoint lies inside a mesh prefix.
    pub loose_rp_filter: BTreeSet<String>,
    /// TCP connections through the mesh link learn its MTU, also forwarded ones.
    pub mss_clamp: bool,
}

/// What is on the host. Routes, rules and link are only those we own by name, table or priority.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Our link with its real MTU, port and addresses (global scope only); `None` when it is missing, down or not ours.
    pub link: Option<Link>,
    pub peers: BTreeMap<WgPublicKey, PeerSpec>,
    /// All routes of our table, also those nobody wants there.
    pub routes: BTreeSet<Route>,
    pub rules: BTreeSet<Family>,
    /// The underlay: every other link that is up, loopback left out.
    pub underlay: Vec<UnderlayLink>,
    /// The way to the Internet, as far as it is IPv4 and leads over a router.
    pub gateway: Option<Gateway>,
    /// Underlay links whose filter we set to loose and have not restored.
    pub loosened: BTreeSet<String>,
    pub mss_clamp: MssClamp,
}

/// The packet filter rules that lower the MSS of TCP connections to what fits through the mesh link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MssClamp {
    /// Missing, or changed by someone.
    #[default]
    Absent,
    Present,
    /// The kernel has no nf_tables, or not the parts we need: large packets then depend on path MTU discovery.
    Unsupported,
}

/// The mesh link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub name: String,
    pub mtu: u16,
    pub listen_port: u16,
    /// Overlay addresses, always /32 and /128.
    pub addresses: BTreeSet<IpNet>,
}

/// A link that is not ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnderlayLink {
    pub name: String,
    /// Addresses with their connected subnet's length.
    pub addresses: Vec<IpNet>,
    /// The effective reverse path filter: the larger of `all` and the link's own.
    pub rp_filter: u8,
    /// Bridges of containers, overlays of others: never a candidate.
    pub virtual_kind: Option<String>,
}

/// The next router on the way to the Internet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gateway {
    pub router: Ipv4Addr,
    /// This host's address on the router's network.
    pub client: Ipv4Addr,
}

/// One WireGuard peer as the device should hold it. Where its packets go is not here: see [`PeerRoute`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerSpec {
    pub preshared_key: Option<PresharedKey>,
    pub allowed_ips: BTreeSet<IpNet>,
    pub keepalive: Option<Duration>,
    /// Another number asks for another tunnel: after a restart of the peer's agent, so that a clock that went back cannot
    /// lock it out.
    pub generation: u64,
}

/// A route of our table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    pub prefix: IpNet,
    pub kind: RouteKind,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum RouteKind {
    /// `dev mesh0`, metric [`Self::DEV_METRIC`], the source address hint of the route's family, MTU unless the link's.
    Dev { mtu: Option<u16>, source: Option<IpAddr> },
    /// The fail-closed floor: `unreachable` at the worst metric.
    Unreachable,
    /// Falls through to the other tables: bypass while a peer is down.
    Throw,
    /// Something else that stands in our table: removed as it was found. The text identifies it for the log.
    Foreign { metric: u32, description: String },
}

impl RouteKind {
    pub const DEV_METRIC: u32 = 100;
    pub const FLOOR_METRIC: u32 = u32::MAX;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    pub fn of(addr: IpAddr) -> Self {
        if addr.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// One step towards the desired state. Each is idempotent: done twice it changes nothing and is no error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Makes the link, or makes it anew; brings it up with MTU, port and addresses.
    CreateLink(Link),
    /// Changes MTU or adds and removes addresses of the link that is there.
    UpdateLink(Link),
    DeleteLink {
        name: String,
    },
    /// Adds a peer or changes what differs.
    SetPeer(WgPublicKey, PeerSpec),
    RemovePeer(WgPublicKey),
    AddRoute(Route),
    RemoveRoute(Route),
    AddRule(Family),
    RemoveRule(Family),
    LoosenRpFilter {
        link: String,
    },
    RestoreRpFilter {
        link: String,
    },
    /// Sets the rules that clamp the MSS on the mesh link, in place of what stands in our table.
    SetMssClamp,
    RemoveMssClamp,
}

/// A UDP socket beside the main pair. A number is not given again soon after its socket is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketId(pub u16);

/// The far end of a path: where datagrams for a peer go, and where its datagrams come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Endpoint {
    /// A UDP address, from the main socket pair.
    Direct(SocketAddr),
    /// A UDP address, from a socket of its own: one of many that were opened to be found behind a hard NAT.
    Extra(SocketId, SocketAddr),
    /// The peer itself, behind this discovery server.
    Relay(ServerId),
}

impl Endpoint {
    /// The UDP address, whatever socket it is reached from.
    pub fn direct(self) -> Option<SocketAddr> {
        match self {
            Self::Direct(at) | Self::Extra(_, at) => Some(at),
            Self::Relay(_) => None,
        }
    }

    /// The socket that this path alone uses.
    pub fn socket(self) -> Option<SocketId> {
        match self {
            Self::Extra(socket, _) => Some(socket),
            Self::Direct(_) | Self::Relay(_) => None,
        }
    }

    pub fn is_relay(self) -> bool {
        matches!(self, Self::Relay(_))
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(at: SocketAddr) -> Self {
        Self::Direct(at)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct(at) => at.fmt(f),
            Self::Extra(socket, at) => write!(f, "{at} from socket {}", socket.0),
            Self::Relay(server) => write!(f, "relay {}", server.0),
        }
    }
}

/// What a device can do with the datagrams of one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Sends one datagram to several endpoints: data twice, an initiation to a whole fan-out. A device that cannot is given
    /// routes with a primary and nothing else.
    pub several_endpoints: bool,
}

impl Capabilities {
    pub const USERSPACE: Self = Self { several_endpoints: true };
    /// The kernel sends to the one endpoint that it was given or that it roamed to.
    pub const KERNEL: Self = Self { several_endpoints: false };
}

/// Where the packets of a peer go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeerRoute {
    /// Data and handshakes go here.
    pub primary: Option<Endpoint>,
    /// Data goes here as well, while it is not sure that the primary carries: the replay window drops the second copy.
    pub second: Option<Endpoint>,
    /// Handshake initiations go to these too, while no path is known to work.
    pub handshake_fan_out: Vec<Endpoint>,
}

/// What the device saw of one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerReport {
    /// Packets want to go there and no session carries them.
    Demand,
    /// A handshake completed with this endpoint.
    Handshake { endpoint: Endpoint },
    /// Authentic traffic came from an endpoint that is not the primary.
    Roamed { endpoint: Endpoint },
    /// Transport datagrams since the last such report, by path; at most four times a second and only if there were any.
    Traffic(Vec<PathTraffic>),
}

/// Transport datagrams over one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathTraffic {
    pub endpoint: Endpoint,
    pub sent: u64,
    /// Authentic ones; a second copy of a datagram counts nowhere.
    pub received: u64,
}

/// Counters of one peer since its tunnel was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PeerCounters {
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub rx_packets: u64,
    pub tx_packets: u64,
    /// Inner packets whose source was not the peer's: dropped.
    pub rx_foreign_source: u64,
    pub last_handshake: Option<Instant>,
    pub last_rx: Option<Instant>,
}
