//! Three nodes on the kernel's WireGuard, and what is done to them on their hosts.

use std::{
    collections::BTreeMap,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use netlink_packet_wireguard::WireguardAttribute;

use super::{
    KERNEL, Run, USERSPACE, kinds,
    report::{Finding, WIREGUARD},
    wg,
};
use crate::{
    Mesh, MeshOptions, Snapshot,
    binaries::Binaries,
    checks::{
        carry::{self, overlay_replies},
        faults, traces,
    },
    mesh::{MESH_LINK, UPLINK, node::Node},
    snapshot::Kind,
    traffic::{EchoStream, UdpStream},
    wait,
};

pub const CHECKS: [&str; 8] = [
    "backend-switch",
    "link-deleted-restored",
    "changed-by-hand-restored",
    "module-gone-restored",
    "foreign-link-untouched",
    "no-key-in-log",
    "fail-closed-no-cleartext",
    "cleanup-leaves-nothing",
];

const PER_SECOND: u32 = 50;
const EVERY: Duration = Duration::from_millis(50);
const REPLY_WITHIN: Duration = Duration::from_secs(15);
/// From SIGHUP to a link of the other kind, on a slow machine.
const SWITCHED_WITHIN: Duration = Duration::from_secs(20);
/// What the README states, as the slow machine stretches it.
const SWITCH_GAP: Duration = Duration::from_secs(5);
/// A full look and the steps that follow (issue: a resync within 2 s), as the slow machine stretches it.
const RESTORED_WITHIN: Duration = Duration::from_secs(5);
/// Until an agent says what is wrong with its host.
const TOLD_WITHIN: Duration = Duration::from_secs(10);
/// What fails is tried again after 30 s at most.
const TRIED_AGAIN_WITHIN: Duration = Duration::from_secs(45);
/// Where the machine that `kernel-vm` makes has its module.
const MODULE: &str = "/modules/wireguard.ko";
/// The node whose agent logs everything.
const TALKATIVE: usize = 2;

pub(super) fn run(run: &mut Run, binaries: &Binaries) -> Result<()> {
    let options = MeshOptions {
        nodes: 3,
        pods_per_node: 1,
        tweak: |_, config| config.backend = KERNEL,
        ..MeshOptions::default()
    };
    let mut mesh = Mesh::build(binaries, &options)?;
    wait_settled(&mesh)?;
    mesh.send_controls("start")?;
    mesh.take_baseline()?;
    mesh.start_server()?;
    mesh.nodes[TALKATIVE].environment.insert("MESHSPAN_LOG".to_owned(), "trace".to_owned());
    mesh.start_nodes()?;
    mesh.wait_until_formed()?;
    run.check("link-deleted-restored", || link_deleted(&mesh));
    run.check("changed-by-hand-restored", || changed_by_hand(&mesh));
    run.check("module-gone-restored", || module_gone(&mut mesh));
    run.check("backend-switch", || backend_switch(&mut mesh));
    run.check("no-key-in-log", || no_key_in_log(&mut mesh));
    run.check("foreign-link-untouched", || foreign_link(&mut mesh));
    run.check("fail-closed-no-cleartext", || fail_closed(&mut mesh));
    run.check("cleanup-leaves-nothing", || cleanup(&mut mesh));
    Ok(())
}

/// On a slow machine a new link takes its time to get its own address, which would then look like a trace of ours.
fn wait_settled(mesh: &Mesh) -> Result<()> {
    let pods = mesh.nodes.iter().flat_map(|node| node.pods.iter().map(|pod| &pod.host));
    for host in mesh.nodes.iter().map(|node| &node.host).chain(pods).chain([&mesh.server.host]) {
        wait::until_true(&format!("{} to have its own address", host.name()), REPLY_WITHIN, || {
            let uplink = format!("{UPLINK} fe80:");
            Ok(Snapshot::take(host, &[])?.of(Kind::Address).any(|line| line.starts_with(&uplink)))
        })?;
    }
    Ok(())
}

fn all(mesh: &Mesh) -> Result<Vec<String>> {
    kinds(&mesh.nodes.iter().collect::<Vec<&Node>>())
}

fn link_deleted(mesh: &Mesh) -> Result<Finding> {
    let detail = mesh.nodes[0].explain(faults::link_deleted_restored(mesh))?;
    Ok(Finding { detail, link_kinds: all(mesh)? })
}

/// What a person with `wg` could do to a link. What is done to one peer costs the packets of another nothing; the rest
/// concerns the whole device.
fn changed_by_hand(mesh: &Mesh) -> Result<Finding> {
    let marker = mesh.marker("changed-by-hand-restored")?;
    let [node, touched, other] = &mesh.nodes[..] else { bail!("this check needs three nodes") };
    overlay_replies(node, touched, marker.bytes(), REPLY_WITHIN)?;
    overlay_replies(node, other, marker.bytes(), REPLY_WITHIN)?;
    let whole = wg::device(&node.host, MESH_LINK)?;
    let victim = wg::device(&touched.host, MESH_LINK)?.public_key;
    let stranger = [0x42; 32];
    let mut said = Vec::new();
    let settings = |device: &wg::Device| -> (_, _, _, Vec<_>) {
        let peers = device.peers.iter().map(|(key, peer)| {
            let mut allowed = peer.allowed_ips.clone();
            allowed.sort();
            (*key, allowed)
        });
        (device.public_key, device.listen_port, device.fwmark, peers.collect())
    };
    let mut is_restored = |what: &str, since: Instant| -> Result<()> {
        let restored = wait::until_true("all to be as before", RESTORED_WITHIN, || {
            Ok(settings(&wg::device(&node.host, MESH_LINK)?) == settings(&whole))
        });
        node.explain(restored).with_context(|| format!("after {what}"))?;
        said.push(format!("{what}: back after {} ms", since.elapsed().as_millis()));
        Ok(())
    };

    let stream = UdpStream::start(&node.host, &other.host, other.overlay_v4()?, PER_SECOND, marker.bytes())?;
    let start = Instant::now();
    wg::remove_peer(&node.host, MESH_LINK, victim)?;
    is_restored("a peer removed", start)?;
    let start = Instant::now();
    wg::add_peer(&node.host, MESH_LINK, stranger)?;
    is_restored("a peer added", start)?;
    // Some that were sent after all was as before.
    let so_far = stream.sent();
    wait::until_true("packets to flow", REPLY_WITHIN, || Ok(stream.sent() > so_far + u64::from(PER_SECOND)))?;
    let totals = stream.stop()?;
    ensure!(totals.lost == 0, "meanwhile {} of {} packets to another peer were lost", totals.lost, totals.sent);

    for (what, change) in [
        ("the port changed", WireguardAttribute::ListenPort(whole.listen_port + 7)),
        ("the key changed", WireguardAttribute::PrivateKey([0x55; 32])),
    ] {
        let start = Instant::now();
        wg::set(&node.host, MESH_LINK, vec![change])?;
        is_restored(what, start)?;
    }
    overlay_replies(node, touched, marker.bytes(), REPLY_WITHIN)?;
    overlay_replies(node, other, marker.bytes(), REPLY_WITHIN)?;
    let detail = format!("{}; of {} packets to another peer meanwhile none was lost", said.join("; "), totals.sent);
    Ok(Finding { detail, link_kinds: all(mesh)? })
}

/// The module goes from under three nodes, and comes back.
fn module_gone(mesh: &mut Mesh) -> Result<Finding> {
    ensure!(
        Path::new(MODULE).exists(),
        "this machine is somebody's: modules are removed only from one that kernel-vm made"
    );
    let marker = mesh.marker("module-gone-restored")?;
    let (near, far) = (pod_of(mesh, 0)?, pod_of(mesh, 1)?);
    let pings = EchoStream::start(&near.0, far.1.into(), marker.bytes().to_vec(), EVERY)?;
    wait::until_true("pods to talk", REPLY_WITHIN, || Ok(pings.answered() > 0))?;
    busybox(&["rmmod", "wireguard"])?;
    for node in &mesh.nodes {
        let told = wait::until_true("the agent to say that the kernel has no WireGuard", TOLD_WITHIN, || {
            let problems = node.status()?.node.problems;
            Ok(problems.iter().any(|problem| problem.what.contains("no WireGuard")))
        });
        node.explain(told)?;
        ensure!(!node.host.has_link(MESH_LINK)?, "{} has a link without a module", node.name());
    }
    busybox(&["insmod", MODULE])?;
    let (start, seen) = (Instant::now(), pings.answered());
    let answered = wait::until_true("pods to talk again", TRIED_AGAIN_WITHIN, || Ok(pings.answered() > seen + 5));
    mesh.nodes[0].explain(answered)?;
    let took = start.elapsed();
    pings.stop()?;
    mesh.nodes.iter_mut().try_for_each(Node::check_running)?;
    mesh.wait_until_formed()?;
    let detail = format!("told by all; back with the module: pods talk after {} ms", took.as_millis());
    Ok(Finding { detail, link_kinds: all(mesh)? })
}

fn busybox(args: &[&str]) -> Result<()> {
    let ran = Command::new("/bin/busybox").args(args).output().context("cannot run busybox")?;
    ensure!(ran.status.success(), "{}: {}", args.join(" "), String::from_utf8_lossy(&ran.stderr).trim());
    Ok(())
}

/// From the kernel to a process and back on a node that runs, while another one sends to it.
fn backend_switch(mesh: &mut Mesh) -> Result<Finding> {
    let marker = mesh.marker("backend-switch")?;
    overlay_replies(&mesh.nodes[0], &mesh.nodes[1], marker.bytes(), REPLY_WITHIN)?;
    let of = |node: &Node| -> Result<_> {
        let status = node.status()?;
        let peers: Vec<_> = status.peers.iter().map(|peer| (peer.host_name.clone(), peer.overlay_v4)).collect();
        // The link is another one, what it is called and what leads to it is not.
        let kept = traces::mesh_state(node)?.into_iter().filter(|line| !line.contains(" kind "));
        Ok((status.node.id, status.node.overlay_v4, peers, kept.collect::<Vec<_>>()))
    };
    let before = of(&mesh.nodes[0])?;
    let (pod, far) = (pod_of(mesh, 1)?, pod_of(mesh, 0)?);
    let mut gaps = Vec::new();
    for (backend, kind) in [(USERSPACE, "tun"), (KERNEL, WIREGUARD)] {
        let stream = UdpStream::start(&pod.0, &far.0, far.1.into(), PER_SECOND, marker.bytes())?;
        wait::until_true("packets to flow", REPLY_WITHIN, || Ok(stream.sent() > u64::from(PER_SECOND)))?;
        let node = &mut mesh.nodes[0];
        node.config.backend = backend;
        node.write_config()?;
        node.reload()?;
        let switched = wait::until_true(&format!("a link of kind {kind}"), SWITCHED_WITHIN, || {
            Ok(wg::link_kind(&node.host, MESH_LINK).is_ok_and(|is| is == kind))
        });
        node.explain(switched)?;
        let node = &mesh.nodes[0];
        let kept = wait::until_true("identity, peers and routes to be as before", SWITCHED_WITHIN, || {
            Ok(of(node).is_ok_and(|now| now == before))
        });
        node.explain(kept).with_context(|| format!("with {backend}: before {before:?}, now {:?}", of(node).ok()))?;
        // As many again, to see that they arrive.
        let so_far = stream.sent();
        wait::until_true("packets to flow", REPLY_WITHIN, || Ok(stream.sent() > so_far + 2 * u64::from(PER_SECOND)))?;
        overlay_replies(node, &mesh.nodes[1], marker.bytes(), REPLY_WITHIN)?;
        let totals = stream.stop()?;
        ensure!(totals.longest_gap <= SWITCH_GAP, "to {kind}: {:?} without a packet", totals.longest_gap);
        gaps.push(format!(
            "to {kind}: gap {} ms, {} of {} lost",
            totals.longest_gap.as_millis(),
            totals.lost,
            totals.sent
        ));
    }
    Ok(Finding { detail: format!("identity, peers and routes stayed; {}", gaps.join("; ")), link_kinds: all(mesh)? })
}

fn pod_of(mesh: &Mesh, node: usize) -> Result<(crate::Host, std::net::Ipv4Addr)> {
    let pod = mesh.nodes[node].pods.first().context("no pod")?;
    Ok((pod.host.clone(), pod.v4))
}

/// An agent whose log shows everything never shows a key that the kernel was given.
fn no_key_in_log(mesh: &mut Mesh) -> Result<Finding> {
    let link_kinds = all(mesh)?;
    let node = &mesh.nodes[TALKATIVE];
    let device = wg::device(&node.host, MESH_LINK)?;
    ensure!(device.private_key != [0; 32], "the kernel has no key");
    let log = node.log()?;
    ensure!(log.contains("TRACE") && log.contains("DEBUG"), "the log does not show everything, so it proves nothing");
    let shown = keys_in(&log, &device.private_key);
    ensure!(shown.is_empty(), "the private key is in the log as {}", shown.join(", "));
    Ok(Finding { detail: format!("{} lines of trace log, no private key", log.lines().count()), link_kinds })
}

/// In which forms a key is in a text: any that a careless program would print.
pub fn keys_in(text: &str, key: &wg::Key) -> Vec<&'static str> {
    let list = |join: &str| key[..8].iter().map(|byte| byte.to_string()).collect::<Vec<_>>().join(join);
    let forms: BTreeMap<&str, String> = BTreeMap::from([
        ("base64", data_encoding::BASE64.encode(key)),
        ("hex", data_encoding::HEXLOWER.encode(&key[..8])),
        ("HEX", data_encoding::HEXUPPER.encode(&key[..8])),
        ("a list", list(", ")),
        ("a dense list", list(",")),
        ("lines", list(",\n")),
    ]);
    let text: String = text.lines().map(str::trim).collect::<Vec<_>>().join("\n");
    forms.into_iter().filter(|(_, form)| text.contains(form.as_str())).map(|(name, _)| name).collect()
}

/// A WireGuard link of the agent's name that somebody else made: the agent says so and leaves it alone.
fn foreign_link(mesh: &mut Mesh) -> Result<Finding> {
    let link_kinds = all(mesh)?;
    let node = &mut mesh.nodes[TALKATIVE];
    node.stop()?;
    wg::add_link(&node.host, MESH_LINK)?;
    wg::set(&node.host, MESH_LINK, vec![WireguardAttribute::PrivateKey([0x66; 32])])?;
    wg::add_peer(&node.host, MESH_LINK, [0x42; 32])?;
    let before = wg::device(&node.host, MESH_LINK)?;
    let mut command = node.command("run");
    command.env("MESHSPAN_LOG", "info");
    let answer = node.run_to_end(command)?;
    ensure!(!answer.status.success(), "the agent ran beside a link that is not its own");
    ensure!(answer.stderr.contains(&format!("link {MESH_LINK} exists already")), "it said: {}", answer.stderr.trim());
    ensure!(wg::device(&node.host, MESH_LINK)? == before, "the foreign link was changed");
    node.host.delete_link(MESH_LINK)?;
    node.start()?;
    mesh.wait_until_formed()?;
    Ok(Finding { detail: "refused by name, the link and its peer are as they were".to_owned(), link_kinds })
}

/// Pods talk while their nodes' agents are killed, stopped and started again: nothing of it is on a wire in clear.
fn fail_closed(mesh: &mut Mesh) -> Result<Finding> {
    let marker = mesh.marker("fail-closed-no-cleartext")?;
    let link_kinds = all(mesh)?;
    let (near, far) = (pod_of(mesh, 0)?, pod_of(mesh, 1)?);
    let out = EchoStream::start(&near.0, far.1.into(), marker.bytes().to_vec(), EVERY)?;
    let back = EchoStream::start(&far.0, near.1.into(), marker.bytes().to_vec(), EVERY)?;
    wait::until_true("pods to talk", REPLY_WITHIN, || Ok(out.answered() > 0 && back.answered() > 0))?;
    let mut said = Vec::new();
    // Killed: its link stays in the kernel and goes on sealing.
    let before = out.answered();
    mesh.nodes[0].crash()?;
    wait::until_true("pods to talk on", REPLY_WITHIN, || Ok(out.answered() > before + 5))?;
    ensure!(wg::link_kind(&mesh.nodes[0].host, MESH_LINK)? == WIREGUARD, "the link went with the agent");
    said.push("killed: sealed on".to_owned());
    let again = |mesh: &mut Mesh| -> Result<Duration> {
        let seen = out.answered();
        let start = Instant::now();
        mesh.nodes[0].start()?;
        let answered = wait::until_true("pods to talk again", REPLY_WITHIN, || Ok(out.answered() > seen + 5));
        mesh.nodes[0].explain(answered)?;
        Ok(start.elapsed())
    };
    // Its own link of before is taken over by making it anew.
    let took = {
        mesh.nodes[0].start()?;
        let formed = mesh.wait_until_formed();
        formed?;
        let seen = out.answered();
        wait::until_true("pods to talk again", REPLY_WITHIN, || Ok(out.answered() > seen + 5))?
    };
    said.push(format!("started again: answers {} ms after it was formed", took.as_millis()));
    mesh.nodes[0].stop()?;
    ensure!(!mesh.nodes[0].host.has_link(MESH_LINK)?, "the link outlived an agent that was asked to stop");
    said.push("stopped: no link, refused".to_owned());
    said.push(format!("started again: answers after {} ms", again(mesh)?.as_millis()));
    mesh.nodes[0].host.delete_link(MESH_LINK)?;
    let seen = out.answered();
    wait::until_true("pods to talk after the link was deleted", REPLY_WITHIN, || Ok(out.answered() > seen + 5))?;
    out.stop()?;
    back.stop()?;
    mesh.wait_until_formed()?;
    // The captures end here: what comes after this check is not judged by them.
    said.push(carry::no_cleartext(mesh)?);
    Ok(Finding { detail: said.join("; "), link_kinds })
}

/// An agent that was killed leaves a link in the kernel: `cleanup` knows it as its own. Then all is as before the first start.
fn cleanup(mesh: &mut Mesh) -> Result<Finding> {
    let link_kinds = all(mesh)?;
    let node = &mut mesh.nodes[0];
    node.crash()?;
    ensure!(node.host.has_link(MESH_LINK)?, "the link went with the agent");
    node.cleanup()?;
    ensure!(!node.host.has_link(MESH_LINK)?, "cleanup left the link of the agent that was killed");
    node.start()?;
    mesh.wait_until_formed()?;
    let detail = traces::nothing_left_behind(mesh)?;
    Ok(Finding { detail: format!("a killed agent's link went by cleanup; {detail}"), link_kinds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_in_any_form_that_a_log_could_have() {
        let key: wg::Key = std::array::from_fn(|at| at as u8 * 7 + 3);
        let debug = format!("PrivateKey({key:?})");
        let pretty = format!("{:#?}", &key);
        let hex = format!("[{}]", data_encoding::HEXLOWER.encode(&key));
        let base64 = data_encoding::BASE64.encode(&key);
        for text in [debug, pretty, hex, base64] {
            assert!(!keys_in(&text, &key).is_empty(), "{text}");
        }
        assert!(keys_in("nothing of it: [3, 10, 17]", &key).is_empty());
    }
}
