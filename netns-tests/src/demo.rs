//! The newcomer's tour: a mesh is built, shown, broken and removed, and every claim is checked by packets.

pub mod report;

use std::{
    io::{self, Write},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{
    Mesh, MeshOptions,
    binaries::Binaries,
    checks::{carry, cold_start, faults, traces},
    demo::report::Report,
};

const TTL: Duration = Duration::from_secs(5);
const TRANSFER: u64 = 64 << 20;

/// What the user asked for.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub json: bool,
    pub keep: bool,
    pub cold_starts: usize,
    pub rp_filter: u8,
}

/// Runs the tour. Never fails by itself: what went wrong is in the report. With `keep` the mesh stays, and is given back.
pub fn run(binaries: &Binaries, options: Options) -> (Report, Option<Mesh>) {
    let mut tour = Tour { options, start: Instant::now(), report: Report::default() };
    let mesh = match tour.prepare(binaries) {
        Ok((mut mesh, fresh)) => {
            tour.walk(&mut mesh, &fresh);
            Some(mesh)
        }
        Err(error) => {
            tour.say(&format!("The mesh did not start: {error:#}"));
            tour.report.all_failed(&format!("the mesh did not start: {error:#}"));
            None
        }
    };
    let table = tour.report.table();
    tour.print(&format!("\n{table}\n"));
    let Tour { report, .. } = tour;
    (report, mesh.filter(|_| options.keep))
}

/// Where to find what in a mesh that is kept.
pub fn ways_in(mesh: &Mesh) -> String {
    let mut text = String::from("The mesh keeps running until Ctrl-C. To enter a host:\n");
    for (host, command) in mesh.lab().ways_in() {
        text += &format!("  {host:<10} {command} bash\n");
    }
    text += "To ask an agent:\n";
    for node in &mesh.nodes {
        text += &format!(
            "  {:<10} {} status --socket {}\n",
            node.name(),
            node.program().display(),
            node.socket_path().display()
        );
    }
    text
}

struct Tour {
    options: Options,
    start: Instant,
    report: Report,
}

impl Tour {
    fn prepare(&mut self, binaries: &Binaries) -> Result<(Mesh, cold_start::FreshState)> {
        self.say("Building a small internet out of network namespaces: one server site and three node sites, routed.");
        let options = MeshOptions { ttl: Some(TTL), rp_filter: self.options.rp_filter, ..MeshOptions::default() };
        let mut mesh = Mesh::build(binaries, &options)?;
        for node in &mesh.nodes {
            let pods: Vec<_> = node.pods.iter().map(|pod| pod.v4.to_string()).collect();
            self.say(&format!("  {} at {} with pods {}", node.name(), node.address, pods.join(" and ")));
        }
        mesh.send_controls("start")?;
        mesh.take_baseline()?;
        let last = mesh.nodes.len() - 1;
        self.say(&format!("Letting {} make its identity while the server is off.", mesh.nodes[last].name()));
        let fresh = cold_start::make_identity(&mut mesh, last)?;
        self.say("Starting the discovery server. It never sees a key, a name or an address in clear.");
        mesh.start_server()?;
        let server = mesh.nodes[0].config.discovery.first().context("the server has no address")?;
        self.say(&format!("  {}  {}", server.endpoint, server.pin));
        self.say("Starting three agents whose configs say `mesh: enabled: true`, nothing about each other.");
        mesh.start_nodes()?;
        let took = mesh.wait_until_formed()?;
        self.say(&format!("  every node knows every other after {} ms", took.as_millis()));
        Ok((mesh, fresh))
    }

    fn walk(&mut self, mesh: &mut Mesh, fresh: &cold_start::FreshState) {
        self.say("Sending packets between nodes and between pods.");
        self.check("node-to-node-v6", || carry::node_to_node_v6(mesh));
        self.check("node-to-node-v4", || carry::node_to_node_v4(mesh));
        self.check("pod-to-pod", || carry::pod_to_pod(mesh));
        self.check("pod-to-node", || carry::pod_to_node(mesh));
        self.check("tcp-transfer", || carry::tcp_transfer(mesh, TRANSFER, 1));
        self.say("Deleting what n1's agent made, as a careless script would: its link, a route, its rules.");
        self.check("link-deleted-restored", || faults::link_deleted_restored(mesh));
        self.say(&format!(
            "Killing the server and sending 200 packets a second on each of three paths for {} s.",
            2 * TTL.as_secs()
        ));
        self.check("server-killed-mesh-lives", || faults::server_killed(mesh));
        self.say("Killing n2's agent while there is still no server, and starting it again.");
        self.check("agent-restart-without-server", || faults::agent_restart_without_server(mesh));
        self.say("Starting the server again: same key, same pin.");
        if let Err(error) = mesh.start_server() {
            self.say(&format!("  it did not start: {error:#}"));
        }
        self.say("Setting `enabled: false` on n3, then `true` again.");
        self.check("boolean-off-removes-all", || traces::boolean_off(mesh));
        self.check("boolean-on-rejoins", || traces::boolean_on(mesh));
        self.say(&format!(
            "Starting n3 {} times with an empty cache and waiting for a reply of every peer.",
            self.options.cold_starts
        ));
        match cold_start::cold_starts(mesh, fresh, self.options.cold_starts) {
            Ok(times) => {
                self.say(&format!("  p50 {} ms, p95 {} ms, max {} ms", times.p50, times.p95, times.max));
                self.report.cold_start_ms = Some(times);
            }
            Err(error) => self.say(&format!("  failed: {error:#}")),
        }
        self.say("Looking at what crossed the wires all along.");
        self.check("no-cleartext-on-wire", || carry::no_cleartext(mesh));
        self.say("What a user of n1 sees (`mesh-agent status`):");
        let table = mesh.nodes[0].status_table().unwrap_or_else(|error| format!("{error:#}"));
        self.print(&table);
        if self.options.keep {
            self.say("Keeping the mesh, so nothing-left-behind is not judged.");
            return;
        }
        self.say("Switching everything off and comparing every host with how it was before.");
        self.check("nothing-left-behind", || traces::nothing_left_behind(mesh));
    }

    fn check(&mut self, name: &'static str, judge: impl FnOnce() -> Result<String>) {
        let start = Instant::now();
        let verdict = judge();
        let check = self.report.add(name, start.elapsed(), verdict);
        let line = format!("  {} {name}: {}", if check.ok { "ok  " } else { "FAIL" }, check.detail);
        self.say(&line);
    }

    fn say(&self, text: &str) {
        self.print(&format!("{:>6.1} s  {text}", self.start.elapsed().as_secs_f64()));
    }

    /// Human output; a closed pipe must not end the run before it has cleaned up.
    fn print(&self, text: &str) {
        let _ = if self.options.json { writeln!(io::stderr(), "{text}") } else { writeln!(io::stdout(), "{text}") };
    }
}
