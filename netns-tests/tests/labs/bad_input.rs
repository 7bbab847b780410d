//! Bad input of every kind the issue lists: one clear message each that names the object and the fix, or a counted drop;
//! what runs goes on without a lost packet, no identity is made anew, nothing is lost.

mod deprived;
mod hostile;

use std::{
    fs,
    io::Write,
    net::{IpAddr, TcpListener, UdpSocket},
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use data_encoding::BASE64;
use deprived::{without_net_admin, without_tun};
use hostile::Hostile;
use mesh_common::{
    host_name::HostName,
    key::{ClusterKeys, ClusterSecret, SignKey, WgSecret},
};
use mesh_proto::{
    sealed::seal,
    wire::{
        frame::Frame,
        record::Record,
        session::{Cursor, ServerMessage, Welcome},
    },
};
use netns_tests::{
    Host, Mesh, MeshOptions,
    checks::life::floor_only,
    isolation,
    mesh::{
        MESH_LINK,
        config::{new_secret, write_private},
        enter_or_skip,
        node::Node,
    },
    messages::{self, Message},
    process::run_command,
    traffic::{UdpStream, first_reply},
    wait,
};
use serde_json::Value;

const EVERY: Duration = Duration::from_millis(20);
const SOON: Duration = Duration::from_secs(10);
/// Packets a second between two nodes that nothing may disturb.
const PER_SECOND: u32 = 200;
const STATE_FILES: [&str; 3] = ["state.json", "marks.json", "cache.bin"];

fn mesh(nodes: usize, name: &str) -> Option<Mesh> {
    let binaries = enter_or_skip(name).unwrap()?;
    let options = MeshOptions { nodes, pods_per_node: 1, ..MeshOptions::default() };
    Some(Mesh::start(&binaries, &options).unwrap())
}

/// Numbered packets between pods of the first two nodes, to be judged by [`undisturbed`].
fn traffic(mesh: &Mesh) -> UdpStream {
    let (from, to) = (&mesh.nodes[0].pods[0], &mesh.nodes[1].pods[0]);
    first_reply(&from.host, to.v6.into(), b"before", EVERY, SOON).unwrap();
    UdpStream::start(&from.host, &to.host, to.v6.into(), PER_SECOND, b"undisturbed").unwrap()
}

fn undisturbed(stream: UdpStream) {
    let totals = stream.stop().unwrap();
    assert!(totals.sent > 100, "{totals:?}");
    assert_eq!((totals.lost, totals.refused, totals.corrupt), (0, 0, 0), "{totals:?}");
}

/// The command ends with the code of the message and says it, and little else.
fn refused(node: &Node, command: Command, message: &Message) {
    let answer = node.run_to_end(command).unwrap();
    let said = format!("{}{}", answer.stdout, answer.stderr);
    assert!(message.is_in(&said), "{}: {:?} is not in:\n{said}", message.when, message.text);
    assert_eq!(answer.status.code(), message.exit, "{}: {said}", message.when);
    let errors = answer.stderr.lines().filter(|line| line.starts_with("error: ")).count();
    assert_eq!(errors, 1, "{}: one message, not more:\n{said}", message.when);
}

/// The command without any of the node's places but the ones given.
fn elsewhere(node: &Node, subcommand: &str, dir: &Path) -> Command {
    let mut command = Command::new(node.program());
    command.arg(subcommand);
    for (flag, file) in [("--config", "config.yaml"), ("--state-dir", "state"), ("--socket", "agent.sock")] {
        command.arg(flag).arg(dir.join(file));
    }
    command
}

fn wait_for_state_files(node: &Node) {
    for file in STATE_FILES {
        let file = node.state_dir().join(file);
        wait::until_true(&format!("{} to be written", file.display()), SOON, || Ok(file.exists())).unwrap();
    }
}

fn cut_in_half(file: &Path) {
    let length = fs::metadata(file).unwrap().len();
    fs::OpenOptions::new().write(true).open(file).unwrap().set_len(length / 2).unwrap();
}

/// Starts a node again and shows that it is the same and reaches the first one.
fn comes_back(mesh: &mut Mesh, index: usize) {
    let before = mesh.nodes[index].overlay;
    let identity = fs::read(mesh.nodes[index].state_dir().join("identity.json")).unwrap();
    mesh.nodes[index].start().unwrap();
    mesh.wait_until_formed().unwrap();
    let node = &mesh.nodes[index];
    assert_eq!(node.overlay, before, "the node is another than before");
    assert_eq!(fs::read(node.state_dir().join("identity.json")).unwrap(), identity);
    let to = mesh.nodes[0].overlay_v6().unwrap();
    node.explain(first_reply(&node.host, to, b"back", EVERY, SOON)).unwrap();
}

#[test]
fn an_agent_that_cannot_start_says_why_and_harms_nothing() {
    let Some(mut mesh) = mesh(3, "an_agent_that_cannot_start_says_why_and_harms_nothing") else {
        return;
    };
    let stream = traffic(&mesh);
    let scratch = mesh.scratch("elsewhere");
    fs::create_dir(&scratch).unwrap();
    let victim = 2;

    // Beside one that runs.
    let node = &mut mesh.nodes[victim];
    wait_for_state_files(node);
    let mut second = node.command("run");
    second.env("MESHSPAN_LOG", "info");
    refused(node, second, &messages::STATE_IN_USE);
    fs::copy(node.config_path(), scratch.join("config.yaml")).unwrap();
    refused(node, elsewhere(node, "run", &scratch), &messages::PORT_IN_USE);
    fs::remove_file(scratch.join("config.yaml")).unwrap();
    let good = node.config.clone();
    node.config.more_mesh.push("listenPrt: 4711".into());
    node.write_config().unwrap();
    node.reload().unwrap();
    let told = wait::until_true("the reload to be refused", SOON, || Ok(messages::UNKNOWN_KEY.is_in(&node.log()?)));
    node.explain(told).unwrap();
    node.check_running().unwrap();
    let to = mesh.nodes[0].overlay_v6().unwrap();
    let node = &mut mesh.nodes[victim];
    first_reply(&node.host, to, b"still there", EVERY, SOON).unwrap();

    // Alone.
    node.stop().unwrap();
    refused(node, node.command("run"), &messages::UNKNOWN_KEY);
    refused(node, node.command("up"), &messages::UNKNOWN_KEY);
    node.config = good.clone();
    node.config.more_mesh.push("extraPrefixes: [\"0.0.0.0/0\"]".into());
    node.write_config().unwrap();
    refused(node, node.command("run"), &messages::DEFAULT_ROUTE);
    node.config = good;
    node.write_config().unwrap();
    refused(node, node.command("status"), &messages::NOT_RUNNING);
    for subcommand in ["run", "token", "up"] {
        refused(node, elsewhere(node, subcommand, &scratch), &messages::NO_CONFIG);
    }
    refused(node, elsewhere(node, "status", &scratch), &messages::NEVER_JOINED);
    assert_eq!(fs::read_dir(&scratch).unwrap().count(), 1, "only the state of the second agent");

    let secret = fs::read_to_string(&node.config.secret_file).unwrap();
    write_private(&node.config.secret_file, &(BASE64.encode(b"thirteen byte") + "\n")).unwrap();
    refused(node, node.command("run"), &messages::SECRET_SHORT);
    fs::remove_file(&node.config.secret_file).unwrap();
    refused(node, node.command("run"), &messages::SECRET_MISSING);
    write_private(&node.config.secret_file, &secret).unwrap();

    refused(node, without_tun(node.command("run")), &messages::NO_TUN);
    refused(node, without_net_admin(node.command("run")), &messages::NO_CAPABILITY);
    assert!(!node.host.has_link(MESH_LINK).unwrap());
    refused(node, without_net_admin(node.command("cleanup")), &messages::CLEANUP_NOT_PERMITTED);
    floor_only(node).unwrap();
    // Nothing to do needs no right.
    let cleanup = without_net_admin(elsewhere(node, "cleanup", &scratch.join("nowhere")));
    run_command(&node.pods[0].host, cleanup, &scratch).unwrap().success().unwrap();

    let file = node.state_dir().join("identity.json");
    let identity = fs::read(&file).unwrap();
    if isolation::is_rootless() {
        let name = "an_agent_that_cannot_start_says_why_and_harms_nothing (files of another owner)";
        let _ = isolation::skip(name, "a user namespace has one user", "run as root");
    } else {
        nix::unistd::chown(&file, Some(12345.into()), None).unwrap();
        refused(node, node.command("run"), &messages::STATE_OF_ANOTHER);
        nix::unistd::chown(&file, Some(nix::unistd::geteuid()), None).unwrap();
    }
    cut_in_half(&file);
    refused(node, node.command("run"), &messages::IDENTITY_CUT);
    assert_eq!(fs::read(&file).unwrap(), identity[..identity.len() / 2], "the damaged file was touched");
    write_private(&file, str::from_utf8(&identity).unwrap()).unwrap();

    comes_back(&mut mesh, victim);
    undisturbed(stream);
}

#[test]
fn damaged_state_files_are_named_and_the_node_works_on() {
    let Some(mut mesh) = mesh(2, "damaged_state_files_are_named_and_the_node_works_on") else {
        return;
    };
    let index = 1;
    // Each file has a generation before it once it was written again: for a member that restarts.
    wait_for_state_files(&mesh.nodes[index]);
    mesh.nodes[0].stop().unwrap();
    comes_back(&mut mesh, 0);
    for file in STATE_FILES {
        let previous = mesh.nodes[index].state_dir().join(format!("{file}.prev"));
        let written =
            wait::until_true(&format!("{} to be written", previous.display()), SOON, || Ok(previous.exists()));
        mesh.nodes[index].explain(written).unwrap();
    }
    for both_generations in [false, true] {
        let node = &mut mesh.nodes[index];
        wait_for_state_files(node);
        node.stop().unwrap();
        for entry in fs::read_dir(node.state_dir()).unwrap() {
            let (path, name) = (entry.as_ref().unwrap().path(), entry.unwrap().file_name().into_string().unwrap());
            let of_ours = STATE_FILES.iter().find(|file| name.starts_with(*file));
            if of_ours.is_some_and(|file| both_generations || name == **file) {
                cut_in_half(&path);
            }
        }
        let before = node.log().unwrap();
        comes_back(&mut mesh, index);
        let log = mesh.nodes[index].log().unwrap();
        let log = &log[before.len()..];
        let message = if both_generations { messages::CACHE_LOST } else { messages::FILE_CUT };
        for file in STATE_FILES {
            let told = log.lines().any(|line| line.contains(" WARN ") && line.contains(file) && message.is_in(line));
            assert!(told, "{file}, both generations: {both_generations}: no {:?} in\n{log}", message.text);
        }
    }
}

#[test]
fn servers_and_secrets_that_are_wrong_are_named() {
    let Some(mut mesh) = mesh(3, "servers_and_secrets_that_are_wrong_are_named") else {
        return;
    };
    let stream = traffic(&mesh);
    let victim = 2;
    wait_for_state_files(&mesh.nodes[victim]);
    let garbage = Garbage::start(&mesh.server.host, mesh.server.address, 7445);
    let good = mesh.nodes[victim].config.discovery[0].clone();
    let mut wrong_pin = good.clone();
    wrong_pin.pin = format!("sha256:{}", "5a".repeat(32));
    let at = |port: u16| {
        let mut server = good.clone();
        server.endpoint = format!("https://{}:{port}", mesh.server.address);
        server
    };
    let cases = [(wrong_pin, messages::WRONG_PIN), (at(7446), messages::NO_SERVER), (at(7445), messages::NOT_TLS)];
    for (server, message) in cases {
        let to = mesh.nodes[0].overlay_v6().unwrap();
        let node = &mut mesh.nodes[victim];
        node.stop().unwrap();
        node.config.discovery = vec![server];
        node.write_config().unwrap();
        node.start().unwrap();
        let told = wait::until_true(message.when, SOON * 2, || {
            Ok(message.is_in(node.status_json()?["servers"][0]["detail"].as_str().unwrap()))
        });
        node.explain(told).unwrap();
        assert!(message.is_in(&node.log().unwrap()), "{}: the log does not say it", message.when);
        let answer = node.run_to_end(node.command("status")).unwrap();
        assert_eq!(answer.status.code(), Some(4), "degraded: {}", answer.stdout);
        assert!(message.is_in(&answer.stdout), "{}", answer.stdout);
        // What it knew from before still carries.
        node.explain(first_reply(&node.host, to, b"by the cache", EVERY, SOON)).unwrap();
    }
    drop(garbage);

    let node = &mut mesh.nodes[victim];
    node.stop().unwrap();
    node.config.discovery = vec![good];
    node.write_config().unwrap();
    let secret = fs::read_to_string(&node.config.secret_file).unwrap();
    write_private(&node.config.secret_file, &new_secret().unwrap()).unwrap();
    node.start().unwrap();
    let told = wait::until_true("the wrong secret to be told", SOON, || {
        let detail = node.status_json()?["servers"][0]["detail"].as_str().unwrap().to_owned();
        Ok(messages::WRONG_SECRET.is_in(&detail) && detail.contains(&node.config.secret_file.display().to_string()))
    });
    node.explain(told).unwrap();
    assert_eq!(node.status().unwrap().peers.len(), 0);
    node.stop().unwrap();
    write_private(&node.config.secret_file, &secret).unwrap();

    comes_back(&mut mesh, victim);
    undisturbed(stream);
}

#[test]
fn what_a_lying_server_says_is_counted_and_changes_nothing() {
    let name = "what_a_lying_server_says_is_counted_and_changes_nothing";
    let Some(binaries) = enter_or_skip(name).unwrap() else {
        return;
    };
    let options = MeshOptions { nodes: 2, pods_per_node: 1, ..MeshOptions::default() };
    let mut mesh = Mesh::build(&binaries, &options).unwrap();
    mesh.start_server().unwrap();
    let hostile = Hostile::start(&mesh.server.host, mesh.server.address, 7444);
    for node in &mut mesh.nodes {
        node.config.discovery.push(hostile.address.clone());
        node.write_config().unwrap();
    }
    mesh.start_nodes().unwrap();
    mesh.wait_until_formed().unwrap();
    let [node, other] = &mut mesh.nodes[..] else { panic!("two nodes") };
    let theirs = other.status().unwrap().node.id;
    let of_other =
        || -> Vec<Frame> { hostile.put().into_iter().filter(|frame| frame.node().to_string() == theirs).collect() };
    wait::until_true("both nodes to trust the liar", SOON, || Ok(hostile.sessions() >= 2 && !of_other().is_empty()))
        .unwrap();

    // A second record of the other node, so that the first one is old.
    let first = of_other()[0].clone();
    other.config.more_mesh.push("extraPrefixes: [\"10.99.0.0/24\"]".into());
    other.write_config().unwrap();
    other.reload().unwrap();
    let routed = wait::until_true("the new record", SOON, || {
        Ok(node.status_json()?["peers"][0]["prefixes"].to_string().contains("10.99.0.0/24") && of_other().len() > 1)
    });
    node.explain(routed).unwrap();
    let newest = of_other().pop().unwrap();
    assert!(newest.seq() > first.seq());

    let stream = traffic(&mesh);
    let node = &mesh.nodes[0];
    let keys = ClusterSecret::parse(&fs::read_to_string(&node.config.secret_file).unwrap()).unwrap().derive();
    let mallory = SignKey::from_seed(&[77; 32]);
    let own_address = mesh_common::addr::overlay_v6(&node.config.cluster_id, &mallory.node_id());
    let other_keys = ClusterSecret::from_bytes(*b"the secret of some other cluster").derive();
    let sealed = |keys: &ClusterKeys, overlay_v6| {
        let frame = seal(keys, &mallory, u64::MAX / 2, Some(&record(&mallory, overlay_v6)), [3; 24]).unwrap();
        frame.as_bytes().clone()
    };
    let mut disguised = other_keys.clone();
    disguised.namespace = keys.namespace;
    let mut flipped = newest.as_bytes().to_vec();
    flipped[200] ^= 1;
    let foreign_address: std::net::Ipv6Addr = mesh.nodes[1].overlay.unwrap().1;
    let lies: [(&str, Vec<u8>, &str); 6] = [
        ("of another cluster", sealed(&other_keys, own_address).to_vec(), "it belongs to another cluster"),
        (
            "sealed with another secret",
            sealed(&disguised, own_address).to_vec(),
            "sealed with another secret or altered",
        ),
        ("with a flipped bit", flipped, "its signature does not hold"),
        ("replayed", first.as_bytes().to_vec(), "it is older than what the node said before"),
        (
            "with another node's address",
            sealed(&keys, foreign_address).to_vec(),
            "an overlay address that is not its node's",
        ),
        ("oversized", vec![0x5a; 6000], "session_messages_malformed"),
    ];
    for (what, lie, counter) in lies {
        let before = counted(node, counter);
        hostile.say_frame(lie);
        let dropped =
            wait::until_true(&format!("a record {what} to be counted"), SOON, || Ok(counted(node, counter) > before));
        node.explain(dropped).unwrap();
    }
    hostile.forget();

    // Over the limit of a message, and out of order: the session ends, and the next one is tried.
    let over = "does not keep to the protocol";
    for (lie, told) in [(vec![0x85; 9000], over), (welcome_again(), "answers garbage: is it a discovery server?")] {
        hostile.say_raw(&lie);
        let seen = wait::until_true(&format!("{told:?} to be told"), SOON * 2, || {
            Ok(node.status_json()?["servers"][1]["detail"].as_str().unwrap().contains(told))
        });
        node.explain(seen).unwrap();
        hostile.forget();
        let sessions = hostile.sessions();
        let back = wait::until_true("another session", Duration::from_secs(40), || {
            Ok(hostile.sessions() > sessions && node.status_json()?["servers"][1]["state"] == "connected")
        });
        node.explain(back).unwrap();
    }
    assert!(messages::GARBAGE.is_in(&node.log().unwrap()));

    undisturbed(stream);
    for node in &mesh.nodes {
        let status = node.status_json().unwrap();
        assert_eq!(status["servers"][0]["state"], "connected", "{status:#}");
        assert_eq!(status["peers"].as_array().unwrap().len(), 1, "{status:#}");
        assert_eq!(status["node"]["state"], "running", "{status:#}");
    }
}

/// How long a hostile relay is at it while packets are counted.
const HOSTILE_FOR: Duration = Duration::from_secs(3);

#[test]
fn a_relay_that_lies_costs_counters_and_no_packet_of_a_direct_path() {
    let name = "a_relay_that_lies_costs_counters_and_no_packet_of_a_direct_path";
    let Some(binaries) = enter_or_skip(name).unwrap() else {
        return;
    };
    let options = MeshOptions { nodes: 2, pods_per_node: 1, ..MeshOptions::default() };
    let mut mesh = Mesh::build(&binaries, &options).unwrap();
    mesh.start_server().unwrap();
    let hostile = Hostile::start_relay(&mesh.server.host, mesh.server.address, 7444);
    for node in &mut mesh.nodes {
        // Before the good one: the first relay that lists a peer is taken.
        node.config.discovery.insert(0, hostile.address.clone());
        node.write_config().unwrap();
    }
    mesh.start_nodes().unwrap();
    mesh.wait_until_formed().unwrap();
    wait::until_true("both nodes to trust the liar", SOON, || Ok(hostile.sessions() >= 2 && hostile.put().len() >= 2))
        .unwrap();
    let list = || {
        hostile.put().into_iter().for_each(|frame| hostile.say_frame(frame.as_bytes().clone()));
        hostile.say(&ServerMessage::Synced(Cursor { server_instance: 1, version: 2 }));
    };
    list();

    let stream = traffic(&mesh);
    let is_direct = wait::until_true("a direct path", SOON, || {
        let path = |node: &Node| Ok(node.status_json()?["peers"][0]["path"]["tier"].clone());
        Ok(mesh.nodes.iter().map(path).collect::<anyhow::Result<Vec<Value>>>()?.iter().all(|tier| tier == "direct"))
    });
    mesh.nodes[0].explain(is_direct).unwrap();
    // What was lost while the liar was the only way does not count.
    drop(stream);
    let stream = traffic(&mesh);
    let start = std::time::Instant::now();
    wait::until_true("lies", HOSTILE_FOR * 2, || {
        list();
        for (from, to) in mesh.pairs() {
            let mut ping = from.command("ping");
            ping.args(["--via", "relay", "--count", "1", &to.config.host_name]);
            from.run_to_end(ping)?;
        }
        hostile.put().iter().for_each(|frame| hostile.say(&ServerMessage::Gone(frame.node())));
        Ok(start.elapsed() >= HOSTILE_FOR)
    })
    .unwrap();
    assert!(hostile.relayed() > 0, "nothing went over the liar");
    undisturbed(stream);
    for node in &mesh.nodes {
        let status = node.status_json().unwrap();
        assert_eq!(status["node"]["state"], "running", "{status:#}");
        assert_eq!(status["peers"].as_array().unwrap().len(), 1, "gone is a hint: {status:#}");
        assert_eq!(status["peers"][0]["path"]["tier"], "direct", "{status:#}");
        assert!(counted(node, "relayed_unknown_sender") > 0, "{status:#}");
    }
}

/// The sum of the counters whose name has this in it.
fn counted(node: &Node, name: &str) -> u64 {
    let status: Value = node.status_json().unwrap();
    let counters = status["counters"].as_object().unwrap();
    counters.iter().filter(|(key, _)| key.contains(name)).map(|(_, count)| count.as_u64().unwrap()).sum()
}

/// A record as its node would make it, but for the address.
fn record(identity: &SignKey, overlay_v6: std::net::Ipv6Addr) -> Record {
    let wg = WgSecret::from_seed(&[78; 32]);
    Record {
        wg_key: wg.public(),
        wg_proof: wg.prove(&identity.node_id()),
        host_name: HostName::from_system("mallory").unwrap(),
        overlay_v6,
        overlay_v4: None,
        prefixes: Vec::new(),
        excluded_prefixes: Vec::new(),
        candidates: Vec::new(),
        nat_v4: Default::default(),
        nat_v6: Default::default(),
        instance: [9; 16],
        started_at_ms: 1,
        valid_for: Duration::from_secs(60),
        wire_min: 1,
        wire_max: 1,
        features: 0,
        admission: Vec::new(),
        ext: Vec::new(),
    }
}

/// A welcome belongs to the beginning of a session.
fn welcome_again() -> Vec<u8> {
    let welcome = Welcome {
        server_instance: 2,
        observed: "192.0.2.1:1".parse().unwrap(),
        stun_ports: Vec::new(),
        slot_ttl: Duration::from_secs(1),
        max_slots: 1,
        relay: false,
        stun_alt: Vec::new(),
    };
    ServerMessage::Welcome(welcome).encode().to_vec()
}

/// Something that is no discovery server and answers everybody, on UDP and TCP. Dropping it ends it.
struct Garbage(Arc<AtomicBool>);

impl Garbage {
    fn start(host: &Host, at: IpAddr, port: u16) -> Self {
        const GARBAGE: &[u8] = b"220 mail.example ESMTP ready, how do you do\r\n";
        let end = Arc::new(AtomicBool::new(false));
        let (tcp, udp) = host.inside(|| Ok((TcpListener::bind((at, port))?, UdpSocket::bind((at, port))?))).unwrap();
        tcp.set_nonblocking(true).unwrap();
        udp.set_read_timeout(Some(EVERY)).unwrap();
        let ended = Arc::clone(&end);
        std::thread::spawn(move || {
            let mut open = Vec::new();
            let mut datagram = [0; 2048];
            while !ended.load(Ordering::Relaxed) {
                if let Ok((mut stream, _)) = tcp.accept() {
                    // Whoever hung up has had enough.
                    let _ = stream.write_all(GARBAGE);
                    open.push(stream);
                }
                if let Ok((_, from)) = udp.recv_from(&mut datagram) {
                    let _ = udp.send_to(GARBAGE, from);
                }
            }
        });
        Self(end)
    }
}

impl Drop for Garbage {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
