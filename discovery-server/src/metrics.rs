//! What the server says about itself: readiness, and its figures in the OpenMetrics text format.
//!
//! The figures live with their owners; a page is made anew from them at each scrape. No label names a cluster, a node or an
//! address, so the number of series is fixed by the code.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::gate::Gate;
use crate::hub::Hub;

/// Readiness and the sources of the figures.
pub(crate) struct Health {
    hub: Arc<Hub>,
    gate: Arc<Gate>,
    stun: Arc<StunCounters>,
    stopping: AtomicBool,
}

/// What the STUN service did.
#[derive(Debug, Default)]
pub(crate) struct StunCounters {
    pub(crate) answered: AtomicU64,
    pub(crate) malformed: AtomicU64,
    pub(crate) over_budget: AtomicU64,
}

impl Health {
    pub(crate) fn new(hub: Arc<Hub>, gate: Arc<Gate>, stun: Arc<StunCounters>) -> Self {
        Self { hub, gate, stun, stopping: AtomicBool::new(false) }
    }

    /// False from the first sign of a shutdown on.
    pub(crate) fn ready(&self) -> bool {
        !self.stopping.load(Ordering::Acquire)
    }

    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// One scrape.
    pub(crate) fn metrics(&self) -> String {
        let stats = self.hub.stats();
        let mut page = Page::default();
        page.gauge("connections", "Carriers that are up.", stats.connections);
        page.gauge("namespaces", "Clusters with at least one slot.", stats.namespaces);
        page.gauge("slots", "Members listed, present or within their time to live.", stats.slots);
        page.gauge("stored_bytes", "Bytes of sealed records held in memory.", stats.stored_bytes);
        page.counter("hellos_accepted", "Proofs of membership that held.", stats.hellos_accepted);
        page.counter("puts_accepted", "Records stored.", stats.puts_accepted);
        page.counter("frames_sent", "Records sent to watchers.", stats.frames_sent);
        page.counter("relayed_datagrams", "Datagrams handed to the node they were for.", stats.relay.datagrams);
        page.counter("relayed_bytes", "Their bytes.", stats.relay.bytes);
        let dropped = stats.relay.dropped.iter().map(|(reason, count)| (*reason, *count)).collect();
        page.counters("relay_dropped", "Datagrams that were not relayed, by reason.", "reason", dropped);
        let refusals = stats.refused.iter().map(|(reason, count)| (*reason, *count)).collect();
        page.counters("refused", "Requests refused or dropped, by reason.", "reason", refusals);
        page.counter("handshakes_turned_away", "Connections refused before their handshake.", self.gate.turned_away());
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let stun = vec![
            ("answered", read(&self.stun.answered)),
            ("malformed", read(&self.stun.malformed)),
            ("over-budget", read(&self.stun.over_budget)),
        ];
        page.counters("stun_requests", "STUN datagrams, by what became of them.", "outcome", stun);
        if let Some(bytes) = resident_bytes() {
            page.registry.register_with_unit("process_resident_memory", "Memory in RAM.", Unit::Bytes, gauge_of(bytes));
        }
        if let Some(count) = open_files() {
            page.registry.register("process_open_fds", "Open file descriptors.", gauge_of(count));
        }
        page.finish()
    }
}

#[derive(Default)]
struct Page {
    registry: Registry,
}

const PREFIX: &str = "meshspan_discovery";

impl Page {
    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.registry.register(format!("{PREFIX}_{name}"), help, gauge_of(value));
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        let counter: Counter = Counter::default();
        counter.inc_by(value);
        self.registry.register(format!("{PREFIX}_{name}"), help, counter);
    }

    fn counters(&mut self, name: &str, help: &str, label: &'static str, values: Vec<(&'static str, u64)>) {
        let family = Family::<Vec<(&'static str, &'static str)>, Counter>::default();
        for (value, count) in values {
            family.get_or_create(&vec![(label, value)]).inc_by(count);
        }
        self.registry.register(format!("{PREFIX}_{name}"), help, family);
    }

    fn finish(self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a String does not fail");
        text
    }
}

fn gauge_of(value: u64) -> Gauge {
    let gauge: Gauge = Gauge::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    gauge
}

fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn open_files() -> Option<u64> {
    u64::try_from(fs::read_dir("/proc/self/fd").ok()?.count()).ok()
}
