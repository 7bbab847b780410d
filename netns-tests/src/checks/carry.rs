//! Packets between nodes and pods, and none of them in clear.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context, Result, ensure};

use super::{EVERY, REPLY_WITHIN};
use crate::{
    Counts, Host, Mesh,
    mesh::node::Node,
    traffic::{Transfer, first_reply, transfer},
    wait,
};

/// Longest wait for a packet that was sent to show up in a capture.
const CAPTURED_WITHIN: Duration = Duration::from_secs(5);

/// Every node reaches every other at its overlay IPv6 address.
pub fn node_to_node_v6(mesh: &Mesh) -> Result<String> {
    let marker = mesh.marker("node-to-node-v6")?;
    ping_all(mesh.pairs().map(|(a, b)| Ok((&a.host, b.overlay_v6()?))), marker.bytes())
}

/// Every node reaches every other at its overlay IPv4 address.
pub fn node_to_node_v4(mesh: &Mesh) -> Result<String> {
    let marker = mesh.marker("node-to-node-v4")?;
    ping_all(mesh.pairs().map(|(a, b)| Ok((&a.host, b.overlay_v4()?))), marker.bytes())
}

/// A pod of every node reaches a pod of every other, both families.
pub fn pod_to_pod(mesh: &Mesh) -> Result<String> {
    let marker = mesh.marker("pod-to-pod")?;
    let mut pings = Vec::new();
    for (a, b) in mesh.pairs() {
        let (from, to) = (a.pods.first().context("no pod")?, b.pods.last().context("no pod")?);
        pings.extend(to.addresses().map(|address| Ok((&from.host, address))));
    }
    ping_all(pings.into_iter(), marker.bytes())
}

/// A pod of every node reaches every other node at its overlay addresses and at its own address on its site.
pub fn pod_to_node(mesh: &Mesh) -> Result<String> {
    let marker = mesh.marker("pod-to-node")?;
    let mut pings = Vec::new();
    for (a, b) in mesh.pairs() {
        let from = a.pods.first().context("no pod")?;
        for address in [b.overlay_v4()?, b.overlay_v6()?, b.address] {
            pings.push(Ok((&from.host, address)));
        }
    }
    ping_all(pings.into_iter(), marker.bytes())
}

/// Seeded bytes from a pod of the first node to a pod of the second; equal hashes at both ends.
pub fn tcp_transfer(mesh: &Mesh, bytes: u64, seed: u64) -> Result<String> {
    let marker = mesh.marker("tcp-transfer")?;
    let [a, b, ..] = &mesh.nodes[..] else { anyhow::bail!("a transfer needs two nodes") };
    let (from, to) = (a.pods.first().context("no pod")?, b.pods.first().context("no pod")?);
    let done: Transfer = transfer(&from.host, &to.host, to.v4.into(), bytes, seed, marker.bytes())?;
    ensure!(done.bytes == bytes, "{} of {bytes} bytes arrived", done.bytes);
    ensure!(done.sha256_sent == done.sha256_received, "the bytes arrived changed");
    let hex = data_encoding::HEXLOWER.encode(&done.sha256_received[..6]);
    let rate = done.bytes as f64 * 8e-6 / done.took.as_secs_f64();
    Ok(format!(
        "{} MiB from {} to {}, seed {seed}, SHA-256 {hex}… at both ends, {rate:.0} Mbit/s",
        bytes >> 20,
        from.host.name(),
        to.host.name()
    ))
}

/// Ends the captures and judges everything they saw since before the first agent started.
///
/// A capture counts only if it found the control copies that were sent outside the tunnel, at the start and now.
pub fn no_cleartext(mesh: &mut Mesh) -> Result<String> {
    mesh.send_controls("end")?;
    wait::until_true("the control copies to be captured", CAPTURED_WITHIN, || {
        Ok(blind_captures(mesh, &mesh.counts()).is_empty())
    })?;
    let counts = mesh.stop_captures()?;
    let blind = blind_captures(mesh, &counts);
    ensure!(blind.is_empty(), "the control copies were not found: {}", blind.join(", "));
    let (mut packets, mut wireguard) = (0, 0);
    for (number, (link, seen)) in counts.iter().enumerate() {
        let in_clear: Vec<String> = seen
            .markers
            .iter()
            .filter(|(label, _)| !mesh.controls().iter().any(|control| control.label() == label.as_str()))
            .map(|(label, seen)| format!("{} frames with the marker of {label}, the first {}", seen.count, seen.first))
            .collect();
        ensure!(in_clear.is_empty(), "in clear on {link}: {}", in_clear.join(", "));
        if let Some(leaks) = &seen.leaks {
            anyhow::bail!(
                "{} frames outside the tunnel on {link} with addresses of the mesh, the first {}",
                leaks.count,
                leaks.first
            );
        }
        ensure!(seen.missed == 0, "the capture of {link} missed {} frames, so it proves nothing", seen.missed);
        // The first link is the server's: no WireGuard goes there.
        ensure!(number == 0 || seen.wireguard > 0, "no WireGuard packet on {link}");
        packets += seen.packets;
        wireguard += seen.wireguard;
    }
    Ok(format!(
        "{} links, {packets} packets, {wireguard} of them WireGuard, no marker in clear, every control copy found",
        counts.len()
    ))
}

/// Control copies that a link which they crossed did not show.
fn blind_captures(mesh: &Mesh, counts: &[(String, Counts)]) -> Vec<String> {
    let mut blind = Vec::new();
    for control in mesh.controls() {
        let crossed = mesh
            .nodes
            .iter()
            .enumerate()
            .filter(|(_, node)| control.label().ends_with(&format!(" {}", node.name())))
            .map(|(index, _)| index + 1);
        for number in crossed.chain([0]) {
            if counts.get(number).is_none_or(|(_, seen)| seen.of(control) == 0) {
                blind.push(format!("{} on link {number}", control.label()));
            }
        }
    }
    blind
}

/// Pings all at once: the slowest reply decides.
fn ping_all<'a>(pings: impl Iterator<Item = Result<(&'a Host, IpAddr)>>, payload: &[u8]) -> Result<String> {
    let pings: Vec<(&Host, IpAddr)> = pings.collect::<Result<_>>()?;
    let slowest = replies(&pings, payload, REPLY_WITHIN)?;
    Ok(format!("{} pairs answered, the slowest first reply after {} ms", pings.len(), slowest.as_millis()))
}

/// The slowest first reply of several pings that run side by side.
pub fn replies(pings: &[(&Host, IpAddr)], payload: &[u8], within: Duration) -> Result<Duration> {
    std::thread::scope(|scope| {
        let running: Vec<_> = pings
            .iter()
            .map(|(host, to)| scope.spawn(move || first_reply(host, *to, payload, EVERY, within)))
            .collect();
        let mut slowest = Duration::ZERO;
        for ping in running {
            slowest = slowest.max(ping.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(slowest)
    })
}

/// `from` reaches both overlay addresses of `to`.
pub(crate) fn overlay_replies(from: &Node, to: &Node, payload: &[u8], within: Duration) -> Result<Duration> {
    replies(&[(&from.host, to.overlay_v6()?), (&from.host, to.overlay_v4()?)], payload, within)
}
