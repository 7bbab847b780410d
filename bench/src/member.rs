//! Members by number: the same number gives the same keys, addresses and frames in every run.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::Bytes;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_common::addr::{OVERLAY_V4_POOL, overlay_v6};
use mesh_common::host_name::HostName;
use mesh_common::key::{ClusterKeys, ClusterSecret, SignKey, WgSecret};
use mesh_common::limits::{LISTEN_PORT, RECORD_VALID_FOR};
use mesh_common::nat::NatClass;
use mesh_proto::sealed;
use mesh_proto::wire::frame::Frame;
use mesh_proto::wire::record::{Candidate, CandidateKind, OverlayV4, PrefixClaim, Record};

pub const CLUSTER_ID: &str = "bench";
/// An agent refuses one whose bytes are all equal.
pub const CLUSTER_SECRET: [u8; 32] = *b"a cluster of the bench, no other";

/// The keys of the one cluster that all members are in.
pub fn cluster_keys() -> ClusterKeys {
    ClusterSecret::from_bytes(CLUSTER_SECRET).derive()
}

/// A node with its keys.
#[derive(Debug)]
pub struct Member {
    number: u16,
    pub identity: SignKey,
    pub wg: WgSecret,
}

impl Member {
    pub fn numbered(number: u16) -> Self {
        let seed = |kind: u8| {
            let mut seed = [kind; 32];
            seed[..2].copy_from_slice(&number.to_le_bytes());
            seed
        };
        Self { number, identity: SignKey::from_seed(&seed(1)), wg: WgSecret::from_seed(&seed(2)) }
    }

    /// What a node of a Kubernetes cluster says: both overlay addresses, a pod CIDR of each family, three candidates. None
    /// of its prefixes holds a candidate of anyone, which is the dear case for the search for captured endpoints.
    pub fn record(&self) -> Record {
        let node = self.identity.node_id();
        let [high, low] = self.number.to_be_bytes();
        let claim = |prefix| PrefixClaim { prefix, since_ms: 1_000 };
        let candidate = |kind, addr: IpAddr| Candidate { kind, addr: SocketAddr::new(addr, LISTEN_PORT) };
        Record {
            wg_key: self.wg.public(),
            wg_proof: self.wg.prove(&node),
            host_name: HostName::try_from(format!("node-{}", self.number)).expect("letters, a hyphen and digits"),
            overlay_v6: overlay_v6(CLUSTER_ID, &node),
            overlay_v4: Some(OverlayV4 { addr: self.overlay_v4(), claimed_at_ms: 1_000 }),
            prefixes: self.pod_cidrs().into_iter().map(claim).collect(),
            excluded_prefixes: Vec::new(),
            candidates: vec![
                candidate(CandidateKind::Host, Ipv4Addr::new(192, 168, high, low).into()),
                candidate(CandidateKind::Host, Ipv6Addr::new(0x2001, 0xdb8, 7, self.number, 0, 0, 0, 1).into()),
                candidate(CandidateKind::Reflexive, Ipv4Addr::new(100, 64, high, low).into()),
            ],
            nat_v4: NatClass::default(),
            nat_v6: NatClass::default(),
            instance: [3; 16],
            started_at_ms: 1_000,
            valid_for: RECORD_VALID_FOR,
            wire_min: 1,
            wire_max: 1,
            features: 0,
            admission: Vec::new(),
            ext: Vec::new(),
        }
    }

    /// The sealed record. The nonce is a function of the number, which no real node may do.
    pub fn frame(&self, keys: &ClusterKeys, seq: u64) -> Frame {
        self.seal(keys, seq, &self.record())
    }

    /// The sealed record with one prefix more in every second version.
    pub fn changed_frame(&self, keys: &ClusterKeys, seq: u64) -> Frame {
        let mut record = self.record();
        if seq.is_multiple_of(2) {
            let [high, low] = self.number.to_be_bytes();
            let prefix = Ipv4Net::new_assert(Ipv4Addr::new(11, high, low, 0), 24).into();
            record.prefixes.push(PrefixClaim { prefix, since_ms: 2_000 });
        }
        self.seal(keys, seq, &record)
    }

    /// What peers route to it: two overlay addresses and two pod CIDRs.
    pub fn routed(&self) -> [IpNet; 4] {
        let [pods_v4, pods_v6] = self.pod_cidrs();
        let overlay = overlay_v6(CLUSTER_ID, &self.identity.node_id());
        [IpNet::from(IpAddr::V4(self.overlay_v4())), IpNet::from(IpAddr::V6(overlay)), pods_v4, pods_v6]
    }

    fn overlay_v4(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(OVERLAY_V4_POOL.network()) + 1 + u32::from(self.number))
    }

    fn pod_cidrs(&self) -> [IpNet; 2] {
        let [high, low] = self.number.to_be_bytes();
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, self.number, 0, 0, 0, 0);
        [Ipv4Net::new_assert(Ipv4Addr::new(10, high, low, 0), 24).into(), Ipv6Net::new_assert(v6, 64).into()]
    }

    fn seal(&self, keys: &ClusterKeys, seq: u64, record: &Record) -> Frame {
        let mut nonce = [0; 24];
        nonce[..2].copy_from_slice(&self.number.to_le_bytes());
        nonce[2..10].copy_from_slice(&seq.to_le_bytes());
        sealed::seal(keys, &self.identity, seq, Some(record), nonce).expect("five prefixes fit a record")
    }
}

/// Frames of the members 1 to `count`, sequence number 1.
pub fn frames(count: u16) -> Vec<Bytes> {
    let keys = cluster_keys();
    (1..=count).map(|number| Member::numbered(number).frame(&keys, 1).as_bytes().clone()).collect()
}
