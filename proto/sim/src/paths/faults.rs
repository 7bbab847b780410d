//! What goes wrong.

use std::net::Ipv4Addr;

use ipnet::IpNet;

use super::plan::Fault;
use super::world::{Event, World};
use crate::internet::Node;

impl World {
    pub(super) fn begin_fault(&mut self) {
        let now = self.clock.now();
        let Some(fault) = self.fault else { return };
        self.trace(|_| format!("fault: {fault:?}"));
        match fault {
            Fault::Swap { host } => self.swap(host),
            Fault::Suspend { host, lasts } => self.machines[host].suspended_until = Some(now + lasts),
            Fault::Rebind { host } => {
                let routers = self.internet.routers_before(self.machines[host].uplink().network);
                if let Some(router) = routers.last() {
                    let octet = u8::try_from(router.number()).expect("a run has few routers");
                    self.internet.rebind(*router, Ipv4Addr::new(198, 51, 101, 1 + octet));
                    self.note_addresses();
                }
            }
            Fault::Block { .. } => self.block(true),
            Fault::RelayRestart { .. } => {
                for server in 0..self.servers.len() {
                    self.servers[server].machine = None;
                }
                let broken: Vec<u64> = self.carriers.keys().copied().collect();
                for carrier in broken {
                    self.lose_carrier(carrier, "connection reset");
                }
            }
            Fault::UdpBlocked { host } => {
                let routers = self.internet.routers_before(self.machines[host].uplink().network);
                if let Some(router) = routers.first() {
                    self.internet.nat_mut(*router).block_udp(true);
                }
            }
        }
        let must_be_direct: Vec<bool> = (0..self.judge.talks())
            .map(|index| {
                let talk = self.judge.talk(index);
                self.must_be_direct(talk.from, talk.to)
            })
            .collect();
        self.judge.note_fault(fault, &must_be_direct, now);
    }

    pub(super) fn end_fault(&mut self) {
        match self.fault {
            Some(Fault::Suspend { host, .. }) => {
                self.machines[host].suspended_until = None;
                self.touch(host);
            }
            Some(Fault::Block { .. }) => self.block(false),
            Some(Fault::RelayRestart { .. }) => {
                for server in &mut self.servers {
                    server.start();
                }
            }
            _ => {}
        }
    }

    /// The host leaves its network; what it had open there is void. Between two networks it has no address, and it sees that
    /// even where it is numbered alike in both.
    fn swap(&mut self, host: usize) {
        let uplink = self.machines[host].uplink().clone();
        for net in &uplink.addresses {
            self.internet.detach(uplink.network, net.addr());
        }
        self.machines[host].uplink = 1;
        self.machines[host].is_online = false;
        self.set_addresses(host, Vec::new());
        let between = self.pause(150, 400);
        self.clock.after(between, Event::Online(host));
    }

    /// The host is in its other network.
    pub(super) fn come_online(&mut self, host: usize) {
        let uplink = self.machines[host].uplink().clone();
        for net in &uplink.addresses {
            self.internet.attach(uplink.network, net.addr(), Node::Host(host));
        }
        self.machines[host].is_online = true;
        self.set_addresses(host, uplink.addresses);
        self.note_addresses();
    }

    fn set_addresses(&mut self, host: usize, addresses: Vec<IpNet>) {
        self.tell_gateway(host);
        let machine = &mut self.machines[host].host;
        for link in machine.plan.underlay.iter_mut().chain(&mut machine.kernel.underlay) {
            link.addresses.clone_from(&addresses);
        }
        let noticed = self.pause(10, 100);
        self.clock.after(noticed, Event::Observe(host));
    }

    /// Datagrams between the first two hosts' places at the core.
    fn block(&mut self, blocks: bool) {
        let [a, b] = [0, 1].map(|host| self.place_of_host(host));
        self.links.block(a, b, blocks);
        if matches!(self.fault, Some(Fault::Block { both_ways: true, .. })) {
            self.links.block(b, a, blocks);
        }
    }
}
