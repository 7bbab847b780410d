//! A small internet: a server, and sites that can become of any kind while everything runs.
//!
//! ```text
//!                       ┌ wan ── wire ──────────────────────────┐
//!  hosts ── [lan] home ─┤                                       ├ internet ── server 5.0.0.2, 5.0.0.3
//!   eth0                └ up ── [lan] carrier ── wan ── wire ───┘
//! ```
//! Site N: inner network 192.168.1.0/24 (the same everywhere, as in life) or, open, 5.N.3.0/24; the home's own address
//! 5.N.1.2 on its wire; with a carrier 100.64.N.2 and the carrier's 5.N.2.2. With IPv6, hosts have public addresses
//! 2001:db8:N:3::/64 behind the home's firewall.
//!
//! Becoming another kind is a new rule set, an empty memory and another default route; no link is touched.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context, Result};
use ipnet::{IpNet, Ipv4Net};
use netlink_packet_route::AddressFamily;

use super::{
    Kind, Ports,
    rules::{self, Options},
};
use crate::{
    Host, Lab,
    impair::{Impairment, Wire},
    link::{MAIN_TABLE, To, connect},
    nft::rules::{Chain, ChainType, Family, Hook, Rule, Table, Verdict},
    traffic::first_reply,
    wait::LOOK_EVERY,
};

/// The link of every host and of the server.
pub const UPLINK: &str = "eth0";
/// The bridge that a home's inner hosts are on.
pub const LAN_BRIDGE: &str = rules::LAN;
pub const SERVER: [Ipv4Addr; 2] = [Ipv4Addr::new(5, 0, 0, 2), Ipv4Addr::new(5, 0, 0, 3)];
pub const SERVER_V6: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 3)];
/// The internet's end of each site's wires: of the home and of the carrier.
pub const HOME_PORT: &str = "home";
pub const CARRIER_PORT: &str = "carrier";
/// The internet's end of the server's link.
pub const SERVER_PORT: &str = "server";
const ATTACHED_WITHIN: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy)]
pub struct WorldOptions {
    pub sites: usize,
    /// One way, on the wire of each site.
    pub delay: Duration,
    pub ipv6: bool,
    /// Decides what chance decides on the wires.
    pub seed: u64,
}

impl Default for WorldOptions {
    fn default() -> Self {
        Self { sites: 2, delay: Duration::ZERO, ipv6: false, seed: 1 }
    }
}

#[derive(Debug)]
pub struct World {
    pub internet: Host,
    pub server: Host,
    pub sites: Vec<Site>,
    pub options: WorldOptions,
    // Last, so that wires end before their lab.
    pub lab: Lab,
}

/// A home, its carrier, and their wires.
#[derive(Debug)]
pub struct Site {
    pub home: Host,
    pub carrier: Host,
    pub home_wire: Wire,
    pub carrier_wire: Wire,
    number: u8,
    kind: Kind,
    options: Options,
    /// Of the home on its wire.
    home_address: Ipv4Addr,
}

impl World {
    /// Builds everything; every site is open.
    pub fn build(mut lab: Lab, options: WorldOptions) -> Result<Self> {
        let internet = lab.router("internet")?;
        let server = lab.host("server")?;
        connect(&internet, SERVER_PORT, &server, UPLINK)?;
        let gateway = (Ipv4Addr::new(5, 0, 0, 1), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
        internet.add_address(SERVER_PORT, IpNet::new(gateway.0.into(), 24)?)?;
        for address in SERVER {
            server.add_address(UPLINK, IpNet::new(address.into(), 24)?)?;
        }
        server.add_route(MAIN_TABLE, "0.0.0.0/0".parse()?, &To::Gateway(gateway.0.into()))?;
        if options.ipv6 {
            internet.add_address(SERVER_PORT, IpNet::new(gateway.1.into(), 64)?)?;
            for address in SERVER_V6 {
                server.add_address(UPLINK, IpNet::new(address.into(), 64)?)?;
            }
            server.add_route(MAIN_TABLE, "::/0".parse()?, &To::Gateway(gateway.1.into()))?;
        }
        let mut sites = Vec::new();
        for number in 1..=options.sites {
            let number = u8::try_from(number).context("a lab has fewer than 256 sites")?;
            sites.push(Site::build(&mut lab, &internet, number, &options)?);
        }
        Ok(Self { internet, server, sites, options, lab })
    }

    /// Has the internet lose everything between two outer addresses, or nothing any more.
    pub fn cut_between(&self, cut: Option<[Ipv4Addr; 2]>) -> Result<()> {
        let rules = |[a, b]: [Ipv4Addr; 2]| vec![Rule::new().between(a, b).drop(), Rule::new().between(b, a).drop()];
        let chain = |ends| Chain {
            name: "forw",
            kind: ChainType::Filter,
            hook: Hook::Forward,
            priority: 0,
            policy: Verdict::Accept,
            rules: rules(ends),
        };
        let chains = cut.map(chain).into_iter().collect();
        self.internet.load_rules(&[Table { family: Family::Ip, name: "cut", sets: Vec::new(), chains }])
    }

    /// The wires of every site from now on.
    pub fn impair(&self, impairment: Impairment) {
        for site in &self.sites {
            site.home_wire.impair(impairment);
            site.carrier_wire.impair(impairment);
        }
    }

    /// One round trip from one host over the server to the other and back, by the delays alone.
    pub fn relay_round_trip(&self) -> Duration {
        self.options.delay * 4
    }
}

impl Site {
    fn build(lab: &mut Lab, internet: &Host, number: u8, options: &WorldOptions) -> Result<Self> {
        let home = lab.router(&format!("home{number}"))?;
        let carrier = lab.router(&format!("carrier{number}"))?;
        let impairment = Impairment::delay(options.delay);
        let seed = options.seed.wrapping_add(u64::from(number) * 2);
        let home_port = format!("{HOME_PORT}{number}");
        let carrier_port = format!("{CARRIER_PORT}{number}");
        let home_wire = Wire::connect(lab, (&home, "wan"), (internet, &home_port), impairment, seed)?;
        let carrier_wire = Wire::connect(lab, (&carrier, "wan"), (internet, &carrier_port), impairment, seed + 1)?;
        connect(&home, "up", &carrier, "lan")?;
        home.add_bridge(LAN_BRIDGE)?;
        // Or packets between two inner hosts pass the router's own rules.
        home.set_sysctl("bridge/bridge-nf-call-iptables", "0")?;
        home.set_sysctl("bridge/bridge-nf-call-ip6tables", "0")?;

        let v4 = |third, last| Ipv4Addr::new(5, number, third, last);
        for (host, link, address) in [
            (internet, home_port.as_str(), v4(1, 1)),
            (internet, carrier_port.as_str(), v4(2, 1)),
            (&home, "wan", v4(1, 2)),
            (&carrier, "wan", v4(2, 2)),
            (&carrier, "lan", Ipv4Addr::new(100, 64, number, 1)),
            (&home, "up", Ipv4Addr::new(100, 64, number, 2)),
            (&home, LAN_BRIDGE, Ipv4Addr::new(192, 168, 1, 1)),
            (&home, LAN_BRIDGE, v4(3, 1)),
        ] {
            host.add_address(link, IpNet::new(address.into(), 24)?)?;
        }
        carrier.add_route(MAIN_TABLE, "0.0.0.0/0".parse()?, &To::Gateway(v4(2, 1).into()))?;
        internet.add_route(MAIN_TABLE, IpNet::new(v4(3, 0).into(), 24)?, &To::Gateway(v4(1, 2).into()))?;
        if options.ipv6 {
            let v6 = |fourth, last| Ipv6Addr::new(0x2001, 0xdb8, number.into(), fourth, 0, 0, 0, last);
            internet.add_address(&home_port, IpNet::new(v6(1, 1).into(), 64)?)?;
            home.add_address("wan", IpNet::new(v6(1, 2).into(), 64)?)?;
            home.add_address(LAN_BRIDGE, IpNet::new(v6(3, 1).into(), 64)?)?;
            home.add_route(MAIN_TABLE, "::/0".parse()?, &To::Gateway(v6(1, 1).into()))?;
            internet.add_route(MAIN_TABLE, IpNet::new(v6(3, 0).into(), 64)?, &To::Gateway(v6(1, 2).into()))?;
        }
        let mut site = Self {
            home,
            carrier,
            home_wire,
            carrier_wire,
            number,
            kind: Kind::Open,
            options: Options::default(),
            home_address: v4(1, 2),
        };
        site.become_kind(Kind::Open, Ports::Kept, false)?;
        Ok(site)
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Swaps the rules, forgets every mapping and connection, and leaves by the right way. Hosts keep their addresses:
    /// attach them again when the site becomes open or stops being so.
    pub fn become_kind(&mut self, kind: Kind, ports: Ports, hairpin: bool) -> Result<()> {
        self.kind = kind;
        self.close()?;
        self.options = if kind.has_carrier() {
            Options { wan: "up", also_wan: Some("wan"), ports, hairpin, ..self.options }
        } else {
            Options { wan: "wan", also_wan: None, ports, hairpin, ..self.options }
        };
        self.leave_by(if kind.has_carrier() {
            Ipv4Addr::new(100, 64, self.number, 1)
        } else {
            Ipv4Addr::new(5, self.number, 1, 1)
        })?;
        self.reload()
    }

    /// How long mappings without packets live: of flows that saw one packet, of lasting flows, and of sockets.
    pub fn set_timeouts(&mut self, new_seconds: u32, lasting_seconds: u32, mapping_seconds: u32) -> Result<()> {
        self.options.mapping_seconds = mapping_seconds;
        for router in [&self.home, &self.carrier] {
            router.set_udp_timeouts(new_seconds, lasting_seconds)?;
        }
        self.reload()
    }

    /// Whether inner hosts reach the home's port mapping service, from the next rules on.
    pub fn set_maps_ports(&mut self, maps_ports: bool) -> Result<()> {
        self.options.maps_ports = maps_ports;
        self.reload()
    }

    /// The home's link to the outside.
    pub fn outer_link(&self) -> &'static str {
        self.options.wan
    }

    /// The home's address there.
    pub fn home_outside(&self) -> Ipv4Addr {
        if self.kind.has_carrier() { Ipv4Addr::new(100, 64, self.number, 2) } else { self.home_address }
    }

    /// What a router that restarts forgets: all.
    pub fn reload(&self) -> Result<()> {
        let mut routers = self.kind.routers().iter();
        let home = routers.next().map_or_else(rules::none, |router| rules::tables(*router, &self.options));
        let outer = Options { wan: "wan", also_wan: None, maps_ports: false, ..self.options };
        let carrier = routers.next().map_or_else(rules::none, |router| rules::tables(*router, &outer));
        self.close()?;
        self.home.load_rules(&home)?;
        self.carrier.load_rules(&carrier)
    }

    /// Nothing passes, and all is forgotten. Closed first: a packet on its way would teach the new rules old mappings.
    fn close(&self) -> Result<()> {
        for router in [&self.home, &self.carrier] {
            router.load_rules(&rules::closed())?;
            router.flush_connections()?;
        }
        Ok(())
    }

    /// The home gets another address on its wire, as after a reconnect, and forgets every mapping.
    pub fn change_home_address(&mut self, last: u8) -> Result<()> {
        let address = Ipv4Addr::new(5, self.number, 1, last);
        self.close()?;
        // Deleting an address deletes the routes through it.
        self.home.delete_address("wan", self.home_address.into())?;
        self.home.add_address("wan", IpNet::new(address.into(), 24)?)?;
        self.home_address = address;
        if !self.kind.has_carrier() {
            self.leave_by(Ipv4Addr::new(5, self.number, 1, 1))?;
        }
        self.reload()
    }

    /// Puts a host on the inner network, at this last byte of its address, in the place of whatever it was on; returns
    /// when it reaches its router, for a bridge takes its time to see a new port.
    pub fn attach(&self, host: &Host, last: u8, ipv6: bool) -> Result<()> {
        self.detach(host)?;
        let port = self.inner_port(last);
        connect(&self.home, &port, host, UPLINK)?;
        self.home.enslave(&port, LAN_BRIDGE)?;
        let network = self.inner_network();
        host.add_address(UPLINK, IpNet::new(self.inner_address(last).into(), network.prefix_len())?)?;
        let gateway = IpAddr::from(self.inner_address(1));
        host.add_route(MAIN_TABLE, "0.0.0.0/0".parse()?, &To::Gateway(gateway))?;
        first_reply(host, gateway, b"attached", LOOK_EVERY, ATTACHED_WITHIN)?;
        if ipv6 {
            let v6 = |last| Ipv6Addr::new(0x2001, 0xdb8, self.number.into(), 3, 0, 0, 0, last);
            host.add_address(UPLINK, IpNet::new(v6(last.into()).into(), 64)?)?;
            host.add_route(MAIN_TABLE, "::/0".parse()?, &To::Gateway(v6(1).into()))?;
            first_reply(host, v6(1).into(), b"attached", LOOK_EVERY, ATTACHED_WITHIN)?;
        }
        Ok(())
    }

    /// Pulls a host's plug.
    pub fn detach(&self, host: &Host) -> Result<()> {
        if host.has_link(UPLINK)? {
            host.delete_link(UPLINK)?;
        }
        Ok(())
    }

    pub fn inner_address(&self, last: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.inner_network().network().octets();
        Ipv4Addr::new(a, b, c, last)
    }

    /// Of the home on its wire.
    pub fn home_address(&self) -> Ipv4Addr {
        self.home_address
    }

    /// The home's end of the link to the host at this last byte.
    pub fn inner_port(&self, last: u8) -> String {
        format!("port{last}")
    }

    /// What the internet sees of a host at this last byte.
    pub fn outer_address(&self, last: u8) -> Ipv4Addr {
        match self.kind.routers().len() {
            0 => self.inner_address(last),
            1 => self.home_address,
            _ => Ipv4Addr::new(5, self.number, 2, 2),
        }
    }

    /// The internet's link that this site's IPv4 packets pass.
    pub fn port(&self) -> String {
        let port = if self.kind.has_carrier() { CARRIER_PORT } else { HOME_PORT };
        format!("{port}{}", self.number)
    }

    fn inner_network(&self) -> Ipv4Net {
        let network =
            if self.kind == Kind::Open { Ipv4Addr::new(5, self.number, 3, 0) } else { Ipv4Addr::new(192, 168, 1, 0) };
        Ipv4Net::new(network, 24).expect("24 is a prefix length")
    }

    fn leave_by(&self, gateway: Ipv4Addr) -> Result<()> {
        for route in self.home.routes(MAIN_TABLE)? {
            if route.header.destination_prefix_length == 0 && route.header.address_family == AddressFamily::Inet {
                self.home.delete_route(route)?;
            }
        }
        self.home.add_route(MAIN_TABLE, "0.0.0.0/0".parse()?, &To::Gateway(IpAddr::from(gateway)))
    }
}
