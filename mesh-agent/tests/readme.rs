//! The README is held to its word: what it quotes is what the programs say, what it names exists.
//!
//! Its section "When it does not work" quotes errors in `text` blocks. Each is produced here, by the real binary where
//! that needs no root, else by the code that a running agent says it with; and each error produced here is quoted.
//! The parts about discovery servers are held by `discovery-server/tests/server/readme.rs`.
#![allow(clippy::unwrap_used)]

mod readme {
    pub(crate) mod markdown;
    pub(crate) mod node;
    pub(crate) mod relayed;
    pub(crate) mod troubles;
}

use std::path::Path;
use std::process::Command;

use mesh_agent::api::{self, ApiRequest};
use mesh_agent::http;
use mesh_common::config::Config;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use readme::markdown::{self, compare};
use readme::{node, relayed, troubles};

/// The parts whose errors come from a discovery server, or from a session with one.
const OF_THE_SERVER: [&str; 2] = ["Reaching a discovery server", "Running a discovery server"];

#[tokio::test]
async fn every_error_it_quotes_is_said_and_every_error_said_here_is_quoted() {
    let quoted = markdown::blocks().into_iter().filter(|block| {
        block.chapter == markdown::TROUBLES && block.language == "text" && !OF_THE_SERVER.contains(&&*block.part)
    });
    let mut said = troubles::of_the_command_line().await;
    said.extend(troubles::of_files().await);
    said.extend(troubles::of_the_host().await);
    said.extend(node::troubles());
    compare(quoted.map(|block| block.text).collect(), said);
}

#[test]
fn the_relayed_pair_that_it_explains_is_explained_so() {
    let shown: Vec<_> = markdown::blocks()
        .into_iter()
        .filter(|block| block.chapter == "NATs, firewalls and relays" && block.language == "text")
        .collect();
    let [block] = shown.as_slice() else { panic!("there are {} answers of status --why", shown.len()) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    assert_eq!(block.text, relayed::why());
}

#[test]
fn its_configurations_are_valid_and_one_of_them_names_every_key() {
    let yaml: Vec<_> = markdown::blocks().into_iter().filter(|block| block.language == "yaml").collect();
    assert!(!yaml.is_empty());
    for block in &yaml {
        if let Err(errors) = Config::parse(&block.text) {
            panic!("this is no configuration:\n{}\n{errors}", block.text);
        }
    }
    let whole = &yaml.iter().max_by_key(|block| block.text.len()).unwrap().text;
    let read = Config::parse(whole).unwrap();
    let all = serde_json::to_value(&read).unwrap();
    for section in ["mesh", "cluster", "discovery", "agent"] {
        let section = &all[section];
        let keys = section.get(0).unwrap_or(section).as_object().unwrap().keys();
        for key in keys {
            let names_it = |line: &str| line.trim_start_matches([' ', '-']).starts_with(&format!("{key}:"));
            assert!(whole.lines().any(names_it), "{key}");
        }
    }
    // What it shows without a word about the default is the default.
    let (shown, default) = (read.mesh, Config::parse("").unwrap().mesh);
    assert_eq!(shown.interface_name, default.interface_name);
    assert_eq!((shown.listen_port, shown.mtu), (default.listen_port, default.mtu));
    assert_eq!(shown.overlay_v4_pool, default.overlay_v4_pool);
    assert_eq!(shown.advertise_node_addresses, default.advertise_node_addresses);
    assert_eq!(shown.advertise_kubernetes_networks, default.advertise_kubernetes_networks);
    assert_eq!((shown.allow_down_peer_bypass, shown.allow_wide_prefixes), (false, false));
    assert_eq!((shown.port_mapping, shown.speedtest), (default.port_mapping, default.speedtest));
}

#[test]
fn every_command_of_the_agent_that_it_names_exists() {
    let commands = markdown::commands("mesh-agent");
    assert!(commands.len() > 10, "{commands:?}");
    for command in &commands {
        let output =
            Command::new(env!("CARGO_BIN_EXE_mesh-agent")).args(&command.subcommands).arg("--help").output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        let help = String::from_utf8(output.stdout).unwrap();
        for flag in &command.flags {
            assert!(help.contains(flag.as_str()), "{command:?} has no {flag}");
        }
    }
}

#[test]
fn every_relative_link_leads_somewhere() {
    for document in ["README.md", "ARCHITECTURE.md", "docs/wire.md"] {
        let file = markdown::root().join(document);
        let text = std::fs::read_to_string(&file).unwrap();
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let mut count = 0;
        for target in targets.filter(|target| !target.contains("://") && !target.starts_with('#')) {
            let path = target.split('#').next().unwrap();
            assert!(file.parent().unwrap().join(path).exists(), "{document} links to {target}");
            count += 1;
        }
        assert!(count > 0, "{document} links to nothing");
    }
}

#[test]
fn every_file_that_the_architecture_names_exists() {
    let root = markdown::root();
    let text = std::fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    assert!(text.lines().count() <= 150, "ARCHITECTURE.md is longer than 150 lines");
    let mut count = 0;
    for span in text.split('`').skip(1).step_by(2).filter(|span| span.contains('/') && span.ends_with(".rs")) {
        assert!(root.join(span).exists(), "{span}");
        count += 1;
    }
    assert!(count > 20, "{count}");
}

#[test]
fn its_two_commands_are_run_by_the_gate() {
    let gate = std::fs::read_to_string(markdown::root().join(".ci/run")).unwrap().replace(" --locked", "");
    let readme = markdown::text();
    for command in ["cargo run --release -p netns-tests --bin demo", "cargo test --workspace"] {
        assert!(readme.lines().any(|line| line == command), "{command} is not in the README");
        assert!(gate.lines().any(|line| line == command), "{command} is not in .ci/run");
    }
    assert!(readme.contains("wireguard-go") && gate.contains("wireguard-go"));
}

#[tokio::test]
async fn every_metric_of_the_agent_that_it_names_is_served() {
    let listener = http::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (handle, mut requests) = api::channel();
    tokio::spawn(http::serve(listener, handle));
    tokio::spawn(async move {
        while let Some(request) = requests.recv().await {
            if let ApiRequest::Status(answer) = request {
                let _gone = answer.send(Box::new(node::status()));
            }
        }
    });
    let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
    stream
        .write_all(format!("GET /metrics HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    let served: Vec<&str> = page.lines().filter_map(|line| line.split(['{', ' ']).next()).collect();
    let named = markdown::spans("meshspan_");
    let named: Vec<_> =
        named.iter().filter(|name| !name.starts_with("meshspan_discovery_") || name.ends_with("_connected")).collect();
    assert!(named.len() >= 6, "{named:?}");
    for name in named {
        assert!(served.contains(&name.as_str()), "{name} is not in\n{page}");
    }
}

#[test]
fn every_counter_that_it_names_is_counted() {
    let counted = node::counters();
    for start in ["drop_", "record_refused: ", "session_", "probe_", "relayed_", "stun_"] {
        let named = markdown::spans(start);
        assert!(!named.is_empty(), "{start}");
        for name in named.iter().filter(|name| *name != start) {
            assert!(counted.contains(name), "{name} is not one of {counted:?}");
        }
    }
}

#[test]
fn the_units_run_what_is_built() {
    for (unit, program) in [("mesh-agent.service", "mesh-agent run"), ("discovery-server.service", "discovery-server")]
    {
        let file = Path::new("packaging/systemd").join(unit);
        let text = std::fs::read_to_string(markdown::root().join(&file)).unwrap();
        assert!(text.contains(&format!("\nExecStart=/usr/local/bin/{program}\n")), "{unit}");
        assert!(markdown::text().contains(file.to_str().unwrap()), "{unit} is not in the README");
    }
}
