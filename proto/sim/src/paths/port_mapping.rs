//! Routers that lead a port to a host which asks for it, well or badly.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_common::time::Instant;
use mesh_proto::device::Gateway;
use mesh_proto::net::port_mapping::{Ask, Grant, MappingFailure, MappingProtocol, MappingRequest};

use super::plan::Uplink;
use super::world::{Event, World};
use crate::internet::{NetworkId, RouterId};

/// How long an answer takes, also the one that nobody listens there.
const ANSWER: Duration = Duration::from_millis(5);
/// Until a host gives up on one that says nothing.
const SILENCE: Duration = Duration::from_millis(1750);

/// What the router next to a host does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlannedMapper {
    pub router: RouterId,
    /// The one that it speaks.
    pub protocol: MappingProtocol,
    pub lifetime: Duration,
    pub manner: Manner,
    /// It restarts then: its clock begins anew, and what it led is forgotten.
    pub restarts: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Leads the port and tells its outer address.
    Honest,
    /// Leads no port and says that it does, at this address.
    Lies(Ipv4Addr),
    Refuses,
    Hangs,
}

#[derive(Debug)]
pub(super) struct Mapper {
    plan: PlannedMapper,
    began: Instant,
    led: BTreeMap<u16, (SocketAddr, Instant)>,
}

impl Mapper {
    pub(super) fn new(plan: PlannedMapper) -> Self {
        Self { plan, began: Instant::ORIGIN, led: BTreeMap::new() }
    }
}

/// What a host of this network knows of its way out.
pub(super) fn gateway(uplink: &Uplink) -> Option<Gateway> {
    let IpAddr::V4(client) = uplink.source(Ipv4Addr::UNSPECIFIED.into())? else { return None };
    let [a, b, c, _] = client.octets();
    (uplink.network != NetworkId::CORE).then_some(Gateway { router: Ipv4Addr::new(a, b, c, 1), client })
}

impl World {
    pub(super) fn tell_gateway(&mut self, host: usize) {
        let machine = &mut self.machines[host];
        machine.host.kernel.gateway = gateway(machine.uplink()).filter(|_| machine.is_online);
    }

    /// A host asks the router before it.
    pub(super) fn map_port(&mut self, host: usize, request: &MappingRequest) {
        let now = self.clock.now();
        self.forget_ports();
        let uplink = self.machines[host].uplink();
        let is_here = gateway(uplink) == Some(request.gateway);
        let router = self.internet.routers_before(uplink.network).first().copied().filter(|_| is_here);
        let mapper = router.and_then(|router| self.mappers.get_mut(&router));
        let (outcome, after) = match (router, mapper) {
            (Some(_), Some(mapper)) if mapper.plan.manner == Manner::Hangs => (Err(MappingFailure::NoAnswer), SILENCE),
            (Some(router), Some(mapper)) if mapper.plan.protocol == request.protocol => {
                let nat = self.internet.nat_mut(router);
                (mapper.answer(request, nat, now), ANSWER)
            }
            _ => (Err(MappingFailure::NoAnswer), ANSWER),
        };
        self.trace(|_| format!("{host} asks its router by {}: {:?}: {outcome:?}", request.protocol, request.ask));
        let run = self.machines[host].host.run;
        self.clock.after(after, Event::Mapped { host, run, id: request.id, outcome });
        if let Some(mapper) = router.and_then(|router| self.mappers.get(&router)) {
            self.clock.after(mapper.plan.lifetime, Event::ForgetPorts);
        }
    }

    /// Routers forget what nobody asked for again.
    pub(super) fn forget_ports(&mut self) {
        let now = self.clock.now();
        for (router, mapper) in &mut self.mappers {
            let nat = self.internet.nat_mut(*router);
            mapper.led.retain(|port, (_, expires)| {
                let is_live = now < *expires;
                if !is_live {
                    nat.withdraw(*port);
                }
                is_live
            });
        }
    }

    /// Those that restart now.
    pub(super) fn restart_mappers(&mut self) {
        let now = self.clock.now();
        for (router, mapper) in &mut self.mappers {
            if mapper.plan.restarts.is_some_and(|at| Instant::ORIGIN + at == now) {
                mapper.began = now;
                let nat = self.internet.nat_mut(*router);
                std::mem::take(&mut mapper.led).into_keys().for_each(|port| nat.withdraw(port));
            }
        }
    }
}

impl Mapper {
    fn answer(
        &mut self,
        request: &MappingRequest,
        nat: &mut crate::nat::Nat,
        now: Instant,
    ) -> Result<Grant, MappingFailure> {
        let internal = SocketAddr::new(request.gateway.client.into(), request.internal_port);
        let epoch = u32::try_from(now.since(self.began).as_secs()).ok();
        let lifetime = Some(self.plan.lifetime);
        let address = match self.plan.manner {
            Manner::Honest => nat.outer(),
            Manner::Lies(address) => address,
            Manner::Refuses | Manner::Hangs => return Err(MappingFailure::Refused("not authorized".to_owned())),
        };
        match request.ask {
            Ask::Release { external_port } => {
                if self.led.get(&external_port).is_some_and(|(led, _)| *led == internal) {
                    self.led.remove(&external_port);
                    nat.withdraw(external_port);
                }
                Ok(Grant { address: None, port: external_port, lifetime: None, epoch })
            }
            Ask::Map { external_port, .. } => {
                let held = self.led.iter().find(|(_, (led, _))| *led == internal).map(|(port, _)| *port);
                let is_free = |port: &u16| !self.led.contains_key(port);
                let free = std::iter::once(external_port).chain(1024..).find(is_free);
                let port = held.or(free).ok_or(MappingFailure::NoAnswer)?;
                if self.plan.manner == Manner::Honest {
                    self.led.insert(port, (internal, now + self.plan.lifetime));
                    nat.forward(port, internal);
                }
                Ok(Grant { address: Some(address), port, lifetime, epoch })
            }
        }
    }
}
