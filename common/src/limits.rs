//! Every limit and timeout of the protocol, each with its reason.

use std::time::Duration;

/// Padded plaintext sizes of a record: a size tells the server a bucket, nothing more.
pub const RECORD_SIZES: [usize; 4] = [512, 1024, 2048, 4096];
/// The longest ciphertext: the largest plaintext and the Poly1305 tag.
pub const MAX_CIPHERTEXT: usize = 4096 + 16;
/// Prefixes one node may announce: more would not fit the largest record beside candidates.
pub const MAX_PREFIXES: usize = 64;
/// Candidates one node may announce, and the most endpoints a handshake is sent to at once.
pub const MAX_CANDIDATES: usize = 16;
/// Members an agent keeps: the slots a server gives one namespace.
pub const MAX_MEMBERS: usize = 1024;

/// One session message, length prefix excluded: the largest frame with room for a batch head.
pub const MAX_MESSAGE: usize = 8 * 1024;
/// Hello must come within this after the carrier is up.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// A proof nonce is good once, for this long.
pub const NONCE_LIFETIME: Duration = Duration::from_secs(30);

/// How long a server keeps a slot after the last session of its node ended.
pub const SLOT_TTL: Duration = Duration::from_secs(120);
/// How long a server remembers the sequence number of a signed leave, so that no member can replay an older record.
pub const TOMBSTONE_TTL: Duration = Duration::from_secs(3600);
pub const MAX_SLOTS_PER_NAMESPACE: usize = 1024;
pub const MAX_NAMESPACES: usize = 20_000;
/// Frames of all namespaces together, in bytes: what is stored stays and can be replaced, new slots wait.
pub const MAX_STORED_BYTES: usize = 256 << 20;
/// New namespaces one address may open, per hour: honest sites open one.
pub const NEW_NAMESPACES_PER_IP_PER_HOUR: u32 = 20;
/// Puts of one node: a burst for start-up, then one a second.
pub const PUT_BURST: u32 = 10;
pub const PUT_INTERVAL: Duration = Duration::from_secs(1);
pub const MAX_CONNECTIONS: usize = 16_384;
/// Connections of one address that have not proven membership yet.
pub const MAX_UNPROVEN_PER_IP: usize = 64;
/// Failed proofs of one address within a minute before it is not answered for a minute.
pub const MAX_FAILED_PROOFS_PER_MINUTE: u32 = 10;
/// Control messages queued for one connection: replies only, the watch is a cursor and queues nothing.
pub const MAX_QUEUED_REPLIES: usize = 16;

/// One relayed datagram: the largest frame, or any WireGuard datagram of the largest inner packet a relayed path carries.
pub const MAX_RELAY_PAYLOAD: usize = 4400;
/// What waits for one carrier that does not keep up: a burst of one TCP window; then the oldest goes, as on any full link.
pub const MAX_RELAY_QUEUE_MESSAGES: usize = 256;
pub const MAX_RELAY_QUEUE_BYTES: usize = 512 * 1024;
/// The same of all carriers of a server together: many that read nothing cost no more than this.
pub const MAX_RELAY_QUEUED_BYTES: usize = 64 << 20;
/// Bytes a second that one client, and that one namespace may have relayed: a public server carries what cannot go direct.
pub const RELAY_CLIENT_BYTES: u64 = 4 << 20;
pub const RELAY_NAMESPACE_BYTES: u64 = 16 << 20;
/// What a rested budget holds, in time at its rate: a client sends 1 MiB at once, about what TCP does before it slows down.
pub const RELAY_BURST: Duration = Duration::from_millis(250);

/// Both ends of a session send something at least this often.
pub const SESSION_KEEPALIVE: Duration = Duration::from_secs(5);
/// A session with nothing received for this long is dead.
pub const SESSION_IDLE: Duration = Duration::from_secs(15);
/// First and longest pause between attempts to reach a server; every pause is drawn between half and all of it.
pub const RECONNECT_MIN: Duration = Duration::from_millis(500);
pub const RECONNECT_MAX: Duration = Duration::from_secs(30);
/// A carrier that is not up after this long has failed.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a record stands without any evidence of its node, on the reader's monotonic clock.
pub const RECORD_VALID_FOR: Duration = Duration::from_secs(24 * 3600);
/// A record is sealed anew at least this often, changed or not.
pub const RECORD_REFRESH: Duration = Duration::from_secs(6 * 3600);
/// How long a start waits for a first snapshot before it takes an overlay IPv4 address.
pub const FIRST_SNAPSHOT_WAIT: Duration = Duration::from_secs(1);
/// A live incumbent of a prefix showed evidence within this long (WireGuard's own session life).
pub const INCUMBENT_LIVE: Duration = Duration::from_secs(180);

/// Desired and observed state are compared at least this often.
pub const RECONCILE_INTERVAL: Duration = Duration::from_secs(30);
/// A peer with demand and no handshake for this long is down.
pub const PEER_DOWN_AFTER: Duration = Duration::from_secs(10);
/// Longest pause between handshake attempts to a peer that is down.
pub const PEER_RETRY_MAX: Duration = Duration::from_secs(60);
/// WireGuard's REKEY_TIMEOUT and REJECT_AFTER_TIME (paper, 6.1).
pub const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);

/// MTU of the mesh interface: 1500 less WireGuard over IPv6.
pub const LINK_MTU: u16 = 1420;
/// WireGuard's UDP port unless configured otherwise.
pub const LISTEN_PORT: u16 = 51872;
/// Mark of our own sockets: they take the underlay, never the mesh.
pub const FWMARK: u32 = 0x10;
/// The bits of a mark that are looked at; the rest belongs to others (reference: CNI conflict map).
pub const FWMARK_MASK: u32 = 0xf10;
pub const ROUTE_TABLE: u32 = 818;
pub const RULE_PRIORITY: u32 = 1110;
