//! What this node knows of the NAT before it: the machine that asks STUN servers from the WireGuard socket.
//!
//! Owns which servers are asked, and the report. It believes an answer only from where it asked for one, with the transaction
//! of the question, and only an address that could be ours; everything else is counted. A server that lies can at most make
//! us announce a wrong address and send it a handful of datagrams.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use bytes::Bytes;
use mesh_common::addr::is_routable;
use mesh_common::id::ServerId;
use mesh_common::nat::NatClass;
use mesh_common::time::Instant;

use super::family::{Desk, FamilyNet};
use super::reflector::Site;
use crate::device::Family;
use crate::wire::address::canonical;
use crate::wire::stun;

/// Addresses of servers that are asked, of each family.
const MAX_SITES: usize = 4;
/// Of one server.
const MAX_ADDRESSES: usize = 2;
/// Sockets on a server's other address.
const MAX_ALT: usize = 4;

/// Where a discovery server answers STUN.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StunServer {
    /// What its name resolved to.
    pub addresses: Vec<IpAddr>,
    /// Ports on each of them.
    pub ports: Vec<u16>,
    /// Sockets on its other address.
    pub alt: Vec<SocketAddr>,
}

/// What is known by now, for each family.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    pub v4: FamilyReport,
    pub v6: FamilyReport,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FamilyReport {
    /// Where servers see the WireGuard socket: one for each external address.
    pub reflexive: Vec<SocketAddr>,
    pub nat: NatClass,
    /// Whether that is another address or port than the host's own.
    pub is_translated: Option<bool>,
    /// All servers were asked, and none answered.
    pub udp_blocked: bool,
    /// Whether the NAT lets us reach ourselves by the external address.
    pub hairpin: Option<bool>,
    /// Whether the external port is the one of the socket.
    pub keeps_port: Option<bool>,
}

impl Report {
    pub fn family(&self, family: Family) -> &FamilyReport {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }
}

#[derive(Debug)]
pub struct NetReport {
    servers: BTreeMap<ServerId, StunServer>,
    desk: Desk,
    v4: FamilyNet,
    v6: FamilyNet,
    /// Sockets that are asked or heard: no address of ours.
    asked: BTreeSet<SocketAddr>,
    report: Report,
    changed: bool,
    rejected: u64,
}

impl NetReport {
    /// `seed` is random: transactions are drawn from it.
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            servers: BTreeMap::new(),
            desk: Desk::new(seed),
            v4: FamilyNet::default(),
            v6: FamilyNet::default(),
            asked: BTreeSet::new(),
            report: Report::default(),
            changed: false,
            rejected: 0,
        }
    }

    pub fn report(&self) -> &Report {
        &self.report
    }

    /// STUN datagrams that answered nothing we had asked, or with an address that cannot be ours.
    pub fn rejected(&self) -> u64 {
        self.rejected
    }

    /// All servers that are known; those that are not named any longer are not asked any longer.
    pub fn handle_servers(&mut self, servers: BTreeMap<ServerId, StunServer>, now: Instant) {
        if self.servers != servers {
            self.servers = servers;
            self.ask_sites(now);
        }
    }

    /// The addresses of this host and the port of its WireGuard socket. Nothing is asked before this is known.
    pub fn handle_host(&mut self, addresses: BTreeSet<IpAddr>, port: u16, now: Instant) {
        if self.desk.own != (addresses.clone(), port) {
            self.desk.own = (addresses, port);
            self.ask_sites(now);
        }
    }

    /// A datagram that looks like STUN.
    pub fn handle_stun(&mut self, source: SocketAddr, datagram: &[u8], now: Instant) {
        let source = canonical(source);
        let net = if source.is_ipv4() { &mut self.v4 } else { &mut self.v6 };
        let is_ours = if let Some(transaction) = stun::request_transaction(datagram) {
            net.handle_request(source, &transaction)
        } else if let Ok(answer) = stun::parse_response(datagram) {
            let mapped = answer.mapped;
            let is_possible = mapped.port() != 0
                && is_routable(mapped.ip())
                && mapped.is_ipv4() == source.is_ipv4()
                && !self.asked.contains(&mapped);
            is_possible && net.handle_answer(source, &answer.transaction, mapped, &mut self.desk, now)
        } else {
            false
        };
        self.rejected += u64::from(!is_ours);
        self.conclude();
    }

    /// Another uplink, another address: everything may be different now.
    pub fn handle_network_changed(&mut self, now: Instant) {
        self.v4.handle_network_changed(&mut self.desk, now);
        self.v6.handle_network_changed(&mut self.desk, now);
        self.conclude();
    }

    /// Somebody wants to know now.
    pub fn handle_check(&mut self, now: Instant) {
        self.v4.handle_check(&mut self.desk, now);
        self.v6.handle_check(&mut self.desk, now);
        self.conclude();
    }

    /// Whether servers are being asked for what they see.
    pub fn is_checking(&self) -> bool {
        self.v4.is_checking() || self.v6.is_checking()
    }

    /// A path fell silent: perhaps a NAT before us forgot its mappings or got another address. Asks at once for what the next
    /// refresh would tell.
    pub fn handle_doubt(&mut self, now: Instant) {
        self.v4.handle_doubt(&mut self.desk, now);
        self.v6.handle_doubt(&mut self.desk, now);
        self.conclude();
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        self.v4.handle_timeout(&mut self.desk, now);
        self.v6.handle_timeout(&mut self.desk, now);
        self.conclude();
    }

    /// The next datagram for the WireGuard socket.
    pub fn poll_transmit(&mut self) -> Option<(SocketAddr, Bytes)> {
        self.desk.transmits.pop_front()
    }

    /// Whether the report is another one than at the last call.
    pub fn poll_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        [&self.v4, &self.v6].into_iter().filter_map(FamilyNet::poll_timeout).min_by_key(|(at, _)| *at)
    }

    fn ask_sites(&mut self, now: Instant) {
        let (v4, v6) = (self.sites(Family::V4), self.sites(Family::V6));
        let sockets = |site: &Site| {
            let own = [Some(site.first), site.second].into_iter().flatten();
            own.chain(site.other.iter().copied()).collect::<Vec<_>>()
        };
        self.asked = v4.iter().chain(&v6).flat_map(sockets).collect();
        self.v4.set_sites(v4, &mut self.desk, now);
        self.v6.set_sites(v6, &mut self.desk, now);
        self.conclude();
    }

    /// Each server's first address, then the second ones, as many as we ask.
    fn sites(&self, family: Family) -> Vec<Site> {
        let (own, _) = &self.desk.own;
        let is_usable = |ip: &IpAddr| Family::of(*ip) == family && is_routable(*ip) && !own.contains(ip);
        if !own.iter().any(|ip| Family::of(*ip) == family && is_routable(*ip)) {
            return Vec::new();
        }
        let mut sites: Vec<Site> = Vec::new();
        for rank in 0..MAX_ADDRESSES {
            for server in self.servers.values() {
                let alt = server.alt.iter().map(|at| canonical(*at)).filter(|at| at.port() != 0 && is_usable(&at.ip()));
                let alt: Vec<SocketAddr> = alt.take(MAX_ALT).collect();
                // The other address is worth more as one that we have not spoken to.
                let addresses = server.addresses.iter().map(IpAddr::to_canonical).filter(is_usable);
                let addresses: BTreeSet<IpAddr> = addresses.filter(|ip| alt.iter().all(|at| at.ip() != *ip)).collect();
                let site = addresses.into_iter().nth(rank).and_then(|ip| Site::new(ip, &server.ports, alt));
                sites.extend(site.filter(|site| sites.iter().all(|known| known.first != site.first)));
            }
        }
        sites.truncate(MAX_SITES);
        let spoken_to: BTreeSet<IpAddr> = sites.iter().map(|site| site.first.ip()).collect();
        for site in &mut sites {
            site.other.retain(|at| !spoken_to.contains(&at.ip()));
        }
        sites
    }

    fn conclude(&mut self) {
        let report = Report { v4: self.v4.report().clone(), v6: self.v6.report().clone() };
        if report != self.report {
            self.report = report;
            self.changed = true;
        }
    }
}
