//! The built `mesh-agent`, used as a person uses it: what it prints, what it leaves on disk, how it exits.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;

use mesh_agent::api::{self, ApiRequest, PingOutcome, PingRequest, PingVia};
use mesh_agent::state::State;
use mesh_agent::status::net::{FamilyStatus, NetStatus, Netcheck, Udp};
use mesh_agent::status::path::{NatStatus, PathStatus, Tier};
use mesh_agent::status::{API_VERSION, NodeState, NodeStatus, PeerKind, PeerState, PeerStatus, Status};
use mesh_common::config::{Config, DiscoveryServer, Pin};
use mesh_common::key::ClusterSecret;
use mesh_common::token::{JoinToken, ServerToken};
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};

/// A machine of its own: a directory for its configuration, its state and its socket.
struct Machine {
    dir: TempDir,
}

struct Outcome {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Machine {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self) -> String {
        fs::read_to_string(self.path("etc/config.yaml")).unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-agent"));
        command
            .args(arguments)
            .arg("--config")
            .arg(self.path("etc/config.yaml"))
            .arg("--socket")
            .arg(self.path("agent.sock"))
            .arg("--state-dir")
            .arg(self.path("state"))
            .env_clear();
        command
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        self.run_with(arguments, "")
    }

    fn run_with(&self, arguments: &[&str], input: &str) -> Outcome {
        finish(self.command(arguments), input)
    }

    /// `join` with this token on standard input.
    fn join(&self, token: &JoinToken, arguments: &[&str]) -> Outcome {
        let all: Vec<&str> = ["join"].into_iter().chain(arguments.iter().copied()).collect();
        self.run_with(&all, &token.to_text())
    }
}

fn finish(mut command: Command, input: &str) -> Outcome {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A command that needs no input may have ended already.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    Outcome {
        code: status.code().unwrap(),
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

fn servers() -> Vec<DiscoveryServer> {
    let server = |name: &str| DiscoveryServer { endpoint: name.parse().unwrap(), pin: Pin([7; 32]), proxied: false };
    vec![server("https://disc.example:7443"), server("https://[2001:db8::1]:443")]
}

fn join_token(cluster: &str, byte: u8) -> JoinToken {
    let mut secret = [byte; 32];
    secret[0] = 0;
    JoinToken { servers: servers(), cluster_id: cluster.parse().unwrap(), secret: ClusterSecret::from_bytes(secret) }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

/// Answers on a machine's socket until it is dropped.
struct Agent {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Agent {
    /// It is off whenever the configuration says so.
    fn start(machine: &Machine, state_when_on: NodeState) -> Self {
        let (config, socket) = (machine.path("etc/config.yaml"), machine.path("agent.sock"));
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = api::bind(&socket).unwrap();
                let (handle, requests) = api::channel();
                ready.send(()).unwrap();
                tokio::select! {
                    () = api::serve(listener, handle) => {}
                    () = answer(requests, &config, state_when_on) => {}
                    _ = stopped => {}
                }
            });
        });
        is_ready.recv().unwrap();
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

async fn answer(mut requests: mpsc::Receiver<ApiRequest>, config: &Path, state_when_on: NodeState) {
    let mut status = status(state_when_on);
    let mut pings = 0;
    while let Some(request) = requests.recv().await {
        match request {
            ApiRequest::Status(answer) => drop(answer.send(Box::new(status.clone()))),
            ApiRequest::Leave(answer) => drop(answer.send(Ok(()))),
            ApiRequest::Netcheck(answer) => drop(answer.send(Ok(Box::new(netcheck())))),
            ApiRequest::Ping(request, answer) => {
                pings += 1;
                drop(answer.send(pinged(&status, &request, pings)));
            }
            ApiRequest::Reload(answer) => {
                let config = Config::parse(&fs::read_to_string(config).unwrap()).unwrap();
                status.node.state = if config.mesh.enabled { state_when_on } else { NodeState::Disabled };
                drop(answer.send(Ok(())));
            }
        }
    }
}

/// Every other probe is lost, and only `near` gets a direct path, with the third.
fn pinged(status: &Status, request: &PingRequest, number: u32) -> Result<PingOutcome, String> {
    let peer = status.peer_named(&request.peer).map_err(|error| error.to_string())?.host_name.clone();
    if request.via == PingVia::Direct {
        return Ok(PingOutcome::NoPath { peer, why: "there is no direct path to it: two strict NATs".to_owned() });
    }
    if number.is_multiple_of(2) {
        return Ok(PingOutcome::Lost { peer, via: request.via, waited_ms: 1000 });
    }
    let (via, endpoint) = match peer == "near" && number >= 3 {
        true => (PingVia::Direct, "192.168.7.2:51872"),
        false => (PingVia::Relay, "https://disc.example:7443"),
    };
    Ok(PingOutcome::Reply { peer, address: None, via, endpoint: endpoint.to_owned(), rtt_us: 41_000 })
}

/// Nothing gets out by UDP.
fn netcheck() -> Netcheck {
    let v4 = FamilyStatus { udp: Udp::Blocked, ..FamilyStatus::default() };
    Netcheck {
        is_complete: true,
        listen_port: 51872,
        net: NetStatus { v4, ..NetStatus::default() },
        servers: Vec::new(),
    }
}

fn peer(name: &str) -> PeerStatus {
    let why_not_direct = Some("two strict NATs: open UDP port 51872 on one side".to_owned());
    PeerStatus {
        node_id: Some("cd".repeat(32)),
        host_name: name.to_owned(),
        kind: PeerKind::Member,
        state: PeerState::Up,
        public_key: "key of a peer".to_owned(),
        overlay_v4: None,
        overlay_v6: None,
        endpoint: None,
        path: Some(PathStatus { tier: Some(Tier::Relay), why_not_direct, ..PathStatus::default() }),
        nat: NatStatus::default(),
        candidates: Vec::new(),
        prefixes: Vec::new(),
        last_handshake_ms_ago: None,
        rx_bytes: 0,
        tx_bytes: 0,
        seen_ms_ago: None,
        detail: String::new(),
    }
}

fn status(state: NodeState) -> Status {
    Status {
        api_version: API_VERSION.to_owned(),
        node: NodeStatus {
            id: "ab".repeat(32),
            host_name: "node-1".to_owned(),
            public_key: String::new(),
            overlay_v4: None,
            overlay_v6: None,
            state,
            cluster_id: Some("home".to_owned()),
            namespace: None,
            interface: "mesh0".to_owned(),
            listen_port: 51872,
            version: "0.1.0".to_owned(),
            started_at_ms: 0,
            problems: Vec::new(),
            backend: None,
            offloads: None,
            net: NetStatus::default(),
        },
        servers: Vec::new(),
        peers: vec![peer("far"), peer("near")],
        counters: Default::default(),
    }
}

#[test]
fn help_and_wrong_usage() {
    let machine = Machine::new();
    let help = machine.run(&["--help"]);
    assert_eq!(help.code, 0);
    let commands = ["init", "token", "join", "run", "up", "down", "leave", "status", "peers", "config", "keygen"];
    for word in commands.into_iter().chain([
        "ping",
        "netcheck",
        "doctor",
        "cleanup",
        "completion",
        "Exit codes",
        "MESHSPAN_LOG",
    ]) {
        assert!(help.stdout.contains(word), "{word} is not in the help");
    }
    for wrong in [&["frobnicate"][..], &["status", "--colour"], &["run", "--http", "nowhere"], &["-o", "xml", "status"]]
    {
        assert_eq!(machine.run(wrong).code, 2, "{wrong:?}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(machine.run(&["completion", shell]).stdout.contains("mesh-agent"), "{shell}");
    }
}

#[test]
fn a_machine_that_never_joined_is_told_how_to() {
    let machine = Machine::new();
    let config = machine.path("etc/config.yaml");
    let expected = format!(
        "error: this machine has no config ({}): run `mesh-agent init` or `mesh-agent join`\n",
        config.display()
    );
    for (command, code) in [("status", 3), ("peers", 3), ("run", 1), ("up", 1), ("down", 1), ("leave", 1), ("token", 1)]
    {
        let outcome = machine.run(&[command]);
        assert_eq!((outcome.code, &outcome.stderr), (code, &expected), "{command}");
    }
    for command in ["validate", "show"] {
        assert_eq!(machine.run(&["config", command]).code, 1, "{command}");
    }
    assert!(!config.exists() && !machine.path("state").exists());
}

#[test]
fn a_token_among_the_arguments_is_refused_and_not_repeated() {
    let machine = Machine::new();
    let join = join_token("home", 1).to_text();
    let server = ServerToken { servers: servers() }.to_text();
    let flag = format!("--config={}", *join);
    for arguments in [&["join", &join][..], &["init", &server], &["join", &join[..60]], &[&join], &["status", &flag]] {
        let outcome = machine.run(arguments);
        assert_eq!(outcome.code, 2);
        for way in ["mesh-agent join FILE", "mesh-agent join - < FILE", "hidden prompt"] {
            assert!(outcome.stderr.contains(way), "{way}: {}", outcome.stderr);
        }
        assert!(!outcome.stderr.contains(&join[5..30]) && !outcome.stderr.contains(&server[5..30]));
    }
    assert!(!machine.path("etc").exists());
}

#[test]
fn a_cluster_is_made_once_and_its_token_lets_another_machine_in() {
    let [first, second] = [Machine::new(), Machine::new()];
    let server_token = ServerToken { servers: servers() }.to_text();
    let made = first.run_with(&["init", "--cluster-id", "home"], &server_token);
    assert_eq!(made.code, 0, "{}", made.stderr);
    assert!(made.stdout.starts_with("made cluster home") && made.stdout.contains("next: "), "{}", made.stdout);
    let config = Config::parse(&first.config()).unwrap();
    assert!(config.mesh.enabled);
    assert_eq!(config.discovery, servers());
    let secret = first.path("etc/cluster.secret");
    assert_eq!(mode(&secret), 0o600);
    assert_eq!(first.run(&["config", "validate"]).code, 0);

    let before = (first.config(), fs::read(&secret).unwrap());
    let again = first.run_with(&["init"], &server_token);
    assert_eq!(again.code, 1);
    assert!(again.stderr.contains("configured for cluster home already"), "{}", again.stderr);
    assert_eq!((first.config(), fs::read(&secret).unwrap()), before);

    let token = first.run(&["token"]);
    assert_eq!(JoinToken::parse(&token.stdout).unwrap().servers, servers());
    let file = second.path("token");
    fs::write(&file, &token.stdout).unwrap();
    let joined = second.run(&["join", file.to_str().unwrap()]);
    assert_eq!(joined.code, 0, "{}", joined.stderr);
    assert_eq!(fs::read(second.path("etc/cluster.secret")).unwrap(), before.1);
    assert_eq!(Config::parse(&second.config()).unwrap().cluster.id, config.cluster.id);
}

#[test]
fn init_takes_servers_from_flags_each_with_its_pin() {
    let machine = Machine::new();
    let pin = Pin([9; 32]).to_string();
    let discovery = ["--discovery", "https://a:1", "--pin", &pin, "--discovery", "https://b:2"];
    let unpaired: Vec<&str> = ["init"].into_iter().chain(discovery).collect();
    assert_eq!(machine.run(&unpaired).code, 2);
    assert_eq!(machine.run(&["init", "--discovery", "https://a:1"]).code, 2);
    assert_eq!(machine.run(&["init", "--discovery", "a:1", "--pin", &pin]).code, 2);
    assert!(!machine.path("etc").exists());
    let made = machine.run(&["init", "--discovery", "https://a:1", "--pin", &pin]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    let config = Config::parse(&machine.config()).unwrap();
    assert_eq!(config.discovery[0].pin, Pin([9; 32]));
    assert!(config.cluster.id.unwrap().as_str().starts_with("mesh-"));
}

#[test]
fn joining_again_changes_nothing_and_another_cluster_needs_replace() {
    let machine = Machine::new();
    let (home, other, rotated) = (join_token("home", 1), join_token("other", 2), join_token("home", 3));
    assert_eq!(machine.join(&home, &["-"]).code, 0);
    let before = machine.config();

    let same = machine.join(&home, &[]);
    assert_eq!((same.code, machine.config()), (0, before.clone()));
    assert!(same.stdout.contains("member of cluster home already: nothing was changed"), "{}", same.stdout);

    for (token, words) in [(&other, "configured for cluster home:"), (&rotated, "cluster home with another secret:")] {
        let refused = machine.join(token, &[]);
        assert_eq!((refused.code, machine.config()), (1, before.clone()));
        assert!(refused.stderr.contains(words) && refused.stderr.contains("--replace"), "{}", refused.stderr);
    }
    assert_eq!(machine.run(&["token"]).stdout.trim(), *home.to_text());
    let replaced = machine.join(&other, &["--replace"]);
    assert_eq!(replaced.code, 0, "{}", replaced.stderr);
    assert_eq!(machine.run(&["token"]).stdout.trim(), *other.to_text());

    fs::remove_file(machine.path("etc/cluster.secret")).unwrap();
    let lost = machine.run(&["token"]);
    assert!(lost.stderr.contains("cluster.secret is not there: run `mesh-agent join`"), "{}", lost.stderr);
    assert_eq!(machine.join(&other, &[]).code, 0, "the same cluster gives the lost secret back");
}

#[test]
fn joining_keeps_what_the_owner_wrote() {
    let machine = Machine::new();
    fs::create_dir(machine.path("etc")).unwrap();
    let mine = "# mine\nmesh:\n  mtu: 1400 # why\n  podCIDRs: [10.244.1.0/24]\n";
    fs::write(machine.path("etc/config.yaml"), mine).unwrap();
    let joined = machine.join(&join_token("home", 1), &[]);
    assert_eq!(joined.code, 0, "{}", joined.stderr);
    assert!(
        machine.config().starts_with("# mine\nmesh:\n  enabled: true\n  mtu: 1400 # why\n"),
        "{}",
        machine.config()
    );

    let other = Machine::new();
    fs::create_dir(other.path("etc")).unwrap();
    fs::write(other.path("etc/cluster.secret"), "precious").unwrap();
    let refused = other.join(&join_token("home", 1), &[]);
    assert_eq!((refused.code, fs::read(other.path("etc/cluster.secret")).unwrap()), (1, b"precious".to_vec()));
}

#[test]
fn damaged_and_wrong_tokens_are_named() {
    let machine = Machine::new();
    let token = join_token("home", 1).to_text();
    let server = ServerToken { servers: servers() }.to_text();
    for (command, input, words) in [
        ("join", &token[..token.len() - 1], "the token is damaged (its checksum does not fit)"),
        ("join", server.as_str(), "this is a server token and joining needs a join token"),
        ("init", token.as_str(), "this is a join token and a new cluster needs a server token"),
        ("join", "", "this is not a token"),
    ] {
        let outcome = machine.run_with(&[command], input);
        assert_eq!(outcome.code, 1);
        assert!(outcome.stderr.contains(words), "{}", outcome.stderr);
        assert!(!outcome.stderr.contains(&token[5..30]));
    }
    let missing = machine.run(&["join", "/nowhere/token"]);
    assert!(missing.stderr.contains("the token file /nowhere/token cannot be read"), "{}", missing.stderr);
    assert!(!machine.path("etc").exists());
}

#[test]
fn the_prompt_does_not_show_the_token() {
    let machine = Machine::new();
    let token = join_token("home", 1).to_text();
    let terminal = nix::pty::openpty(None, None).unwrap();
    let mut command = machine.command(&["join"]);
    command.stdin(terminal.slave.try_clone().unwrap());
    command.stdout(terminal.slave.try_clone().unwrap()).stderr(terminal.slave);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut master = fs::File::from(terminal.master);
    let mut shown = Vec::new();
    let mut buffer = [0; 1024];
    // A terminal whose last user is gone reads as an error.
    while let Ok(count @ 1..) = master.read(&mut buffer) {
        let asked_before = shown.ends_with(b"press Enter: ");
        shown.extend_from_slice(&buffer[..count]);
        if !asked_before && shown.ends_with(b"press Enter: ") {
            master.write_all(format!("{}\n", *token).as_bytes()).unwrap();
        }
    }
    let shown = String::from_utf8_lossy(&shown);
    assert!(child.wait().unwrap().success(), "{shown}");
    assert!(shown.contains("joined cluster home") && !shown.contains(&token[5..30]), "{shown}");
}

#[test]
fn up_and_down_edit_the_boolean_and_keep_the_rest() {
    let machine = Machine::new();
    assert_eq!(machine.join(&join_token("home", 1), &[]).code, 0);
    let file = machine.path("etc/config.yaml");
    let on = format!("# mine\n{}# end", machine.config());
    fs::write(&file, &on).unwrap();
    let off = on.replace("enabled: true #", "enabled: false #");
    assert_ne!(on, off);

    let alone = machine.run(&["down"]);
    assert_eq!((alone.code, machine.config()), (0, off.clone()));
    assert!(alone.stdout.contains("no agent is running"), "{}", alone.stdout);
    let alone = machine.run(&["up"]);
    assert_eq!((alone.code, machine.config()), (0, on.clone()));
    assert!(alone.stdout.contains("it applies when one starts"), "{}", alone.stdout);

    let _agent = Agent::start(&machine, NodeState::Running);
    let down = machine.run(&["down"]);
    assert_eq!((down.code, machine.config()), (0, off.clone()), "{}", down.stderr);
    assert!(down.stdout.contains("the agent removed everything"), "{}", down.stdout);
    assert!(machine.run(&["status"]).stdout.contains("disabled"));
    let up = machine.run(&["up"]);
    assert_eq!((up.code, machine.config()), (0, on), "{}", up.stderr);
    let left = machine.run(&["leave"]);
    assert_eq!((left.code, machine.config()), (0, off), "{}", left.stderr);
}

#[test]
fn leaving_needs_the_agent() {
    let machine = Machine::new();
    assert_eq!(machine.join(&join_token("home", 1), &[]).code, 0);
    let before = machine.config();
    let outcome = machine.run(&["leave"]);
    assert_eq!((outcome.code, machine.config()), (3, before));
    assert!(outcome.stderr.contains("leaving needs the running agent"), "{}", outcome.stderr);
}

#[test]
fn status_exits_with_what_it_found() {
    let machine = Machine::new();
    assert_eq!(machine.join(&join_token("home", 1), &[]).code, 0);
    let stopped = machine.run(&["status"]);
    assert_eq!(stopped.code, 3);
    assert!(stopped.stderr.contains("no agent answers on"), "{}", stopped.stderr);

    let _agent = Agent::start(&machine, NodeState::Degraded);
    let degraded = machine.run(&["status", "-o", "json"]);
    assert_eq!(degraded.code, 4);
    assert_eq!(serde_json::from_str::<Status>(&degraded.stdout).unwrap(), status(NodeState::Degraded));
    assert!(machine.run(&["status", "-o", "yaml"]).stdout.contains("state: degraded"));
    assert!(machine.run(&["status"]).stdout.contains("node-1 in mesh home"));
    assert_eq!(machine.run(&["peers"]).code, 0);
    let unknown = machine.run(&["peers", "node-9"]);
    assert_eq!(unknown.code, 1);
    assert!(unknown.stderr.contains("no peer is called node-9"), "{}", unknown.stderr);
    let running = machine.run(&["cleanup"]);
    assert_eq!(running.code, 1);
    assert!(running.stderr.contains("an agent is running on"), "{}", running.stderr);
}

#[test]
fn cleanup_keeps_away_from_an_agent_that_does_not_answer() {
    let machine = Machine::new();
    let state = State::open(&machine.path("state")).unwrap();
    let refused = machine.run(&["cleanup"]);
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    let words = format!("another agent (process {}) uses the state directory", std::process::id());
    assert!(refused.stderr.contains(&words) && refused.stderr.contains("stopped"), "{}", refused.stderr);
    drop(state);
}

#[test]
fn a_wrong_configuration_is_explained_by_every_command_that_reads_it() {
    let machine = Machine::new();
    fs::create_dir(machine.path("etc")).unwrap();
    let file = machine.path("etc/config.yaml");
    fs::write(&file, "mesh:\n  enabeld: true\n").unwrap();
    let expected = format!(
        "error: {} is not a valid configuration:\n  \
         line 2, column 3: unknown key `enabeld` in `mesh`: did you mean `enabled`?\n",
        file.display()
    );
    for arguments in [&["config", "validate"][..], &["config", "show"], &["run"], &["up"], &["down"], &["token"]] {
        let outcome = machine.run(arguments);
        assert_eq!((outcome.code, outcome.stderr), (1, expected.clone()), "{arguments:?}");
    }
}

#[test]
fn config_show_gives_every_default_and_no_secret() {
    let machine = Machine::new();
    fs::create_dir(machine.path("etc")).unwrap();
    let secret = join_token("home", 1).secret.to_text();
    let text = format!("cluster: {{ id: home, secret: {} }}\n", *secret);
    fs::write(machine.path("etc/config.yaml"), text).unwrap();
    let shown = machine.run(&["config", "show"]).stdout;
    for line in ["enabled: false", "listenPort: 51872", "overlayIPv4Pool: 198.19.0.0/16", "secret: (hidden)"] {
        assert!(shown.contains(line), "{line} is not in {shown}");
    }
    let json = machine.run(&["config", "show", "-o", "json"]).stdout;
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap()["mesh"]["mtu"], 1420);
    assert!(!shown.contains(&**secret) && !json.contains(&**secret));
}

#[test]
fn key_pairs_fit_each_other() {
    let machine = Machine::new();
    let pair = machine.run(&["keygen"]);
    assert_eq!(pair.code, 0);
    let public = machine.run_with(&["keygen", "--public"], &pair.stdout);
    assert_eq!(public.stdout, pair.stderr);
    assert_eq!(pair.stdout.trim().len(), 44);
    assert_ne!(pair.stdout, machine.run(&["keygen"]).stdout);
    let wrong = machine.run_with(&["keygen", "--public"], "rubbish");
    assert_eq!(wrong.code, 1);
    assert!(wrong.stderr.contains("base64 of 32 bytes") && !wrong.stderr.contains("rubbish"), "{}", wrong.stderr);
}

#[test]
fn the_doctor_says_what_is_wrong_and_what_helps_without_an_agent() {
    let machine = Machine::new();
    let nothing = machine.run(&["doctor"]);
    assert_eq!(nothing.code, 4, "{}", nothing.stderr);
    assert!(nothing.stdout.contains("Problem: this machine has no config"), "{}", nothing.stdout);
    assert!(nothing.stdout.contains("Fix: run `mesh-agent init`"), "{}", nothing.stdout);

    // A server that nobody answers for, and a UDP port that is taken.
    let taken = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let server =
        DiscoveryServer { endpoint: "https://127.0.0.1:9".parse().unwrap(), pin: Pin([7; 32]), proxied: false };
    let token = JoinToken { servers: vec![server], ..join_token("home", 1) };
    assert_eq!(machine.join(&token, &[]).code, 0);
    let config = machine.config().replace("mesh:\n", &format!("mesh:\n  listenPort: {port}\n"));
    fs::write(machine.path("etc/config.yaml"), config).unwrap();
    let ill = machine.run(&["doctor", "-o", "json"]);
    assert_eq!(ill.code, 4, "{}", ill.stderr);
    let report: serde_json::Value = serde_json::from_str(&ill.stdout).unwrap();
    let problems: Vec<&str> = report["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["level"] == "problem")
        .map(|finding| finding["what"].as_str().unwrap())
        .collect();
    let ours = format!("UDP port {port} is in use by process {} (", std::process::id());
    for words in ["no agent runs", "nothing answers at https://127.0.0.1:9", &ours] {
        assert!(problems.iter().any(|what| what.contains(words)), "{words}: {problems:?}");
    }

    fs::write(machine.path("etc/config.yaml"), "mesh:\n  enabeld: true\n").unwrap();
    let invalid = machine.run(&["doctor"]);
    assert!(invalid.stdout.contains("did you mean `enabled`?") && invalid.code == 4, "{}", invalid.stdout);
}

#[test]
fn a_ping_says_which_way_it_went_and_waits_for_a_direct_one_where_told_to() {
    let machine = Machine::new();
    let none = machine.run(&["ping", "far"]);
    assert_eq!(none.code, 3, "{}", none.stderr);
    fs::create_dir(machine.path("etc")).unwrap();
    fs::write(machine.path("etc/config.yaml"), "mesh: { enabled: true }\n").unwrap();
    let _agent = Agent::start(&machine, NodeState::Running);

    let both = machine.run(&["ping", "far", "--count", "2"]);
    let relayed = "reply from far via relay https://disc.example:7443 in 41 ms\n";
    assert_eq!((both.code, both.stdout), (0, format!("{relayed}no reply from far within 1 s\n")));
    let direct = machine.run(&["ping", "far", "--via", "direct", "--count", "1"]);
    assert_eq!(direct.code, 4);
    assert_eq!(direct.stdout, "no probe sent to far: there is no direct path to it: two strict NATs\n");

    let waited = machine.run(&["ping", "near", "--until-direct"]);
    assert_eq!(waited.code, 0, "{}", waited.stderr);
    assert!(waited.stdout.ends_with("reply from near via direct 192.168.7.2:51872 in 41 ms\n"), "{}", waited.stdout);
    let in_vain = machine.run(&["ping", "far", "--until-direct", "--count", "2"]);
    assert_eq!(in_vain.code, 4);
    assert_eq!(in_vain.stderr, "no direct path to far: two strict NATs: open UDP port 51872 on one side\n");

    for (name, answer) in [
        ("fra", "error: no peer is called fra: did you mean far?\n"),
        ("x\u{1b}[2J", "error: no peer is called x\u{fffd}[2J; the peers are: far, near\n"),
        ("cdcdcd", "error: 2 peers are called cdcdcd: give the start of an id instead (cdcdcdcdcd, cdcdcdcdcd)\n"),
    ] {
        let wrong = machine.run(&["ping", name]);
        assert_eq!((wrong.code, wrong.stderr.as_str()), (1, answer));
    }
    assert_eq!(machine.run(&["ping", "far", "--count", "0"]).code, 2);
    assert_eq!(machine.run(&["ping", "far", "--via", "relay", "--until-direct"]).code, 2);
}

#[test]
fn a_network_without_udp_is_degraded_and_why_tells_of_paths() {
    let machine = Machine::new();
    fs::create_dir(machine.path("etc")).unwrap();
    fs::write(machine.path("etc/config.yaml"), "mesh: { enabled: true }\n").unwrap();
    let _agent = Agent::start(&machine, NodeState::Running);
    let netcheck = machine.run(&["netcheck"]);
    assert_eq!(netcheck.code, 4, "{}", netcheck.stderr);
    assert!(netcheck.stdout.contains("UDP is blocked"), "{}", netcheck.stdout);
    let json = machine.run(&["netcheck", "-o", "json"]).stdout;
    assert_eq!(serde_json::from_str::<Netcheck>(&json).unwrap(), self::netcheck());
    let why = machine.run(&["status", "--why"]);
    assert!(why.stdout.contains("Not direct  two strict NATs: open UDP port 51872 on one side"), "{}", why.stdout);
}
