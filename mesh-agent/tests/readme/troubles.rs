//! Bad situations of one machine, and what the agent says in each. Paths of the test are shown as the default ones.

use std::fs::{self, Permissions};
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use mesh_agent::api::{self, ApiError};
use mesh_agent::dataplane::tun::TunError;
use mesh_agent::state::{State, StateError};
use mesh_common::config::{DiscoveryServer, Pin};
use mesh_common::key::ClusterSecret;
use mesh_common::token::{JoinToken, ServerToken};
use tempfile::TempDir;
use tokio::process::Command;

/// Longer than any command takes that only has to say no.
const PATIENCE: Duration = Duration::from_secs(30);

/// A machine whose files are in a directory of the test.
struct Machine {
    dir: TempDir,
}

impl Machine {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn with_config(text: &str) -> Self {
        let machine = Self::new();
        machine.write("config.yaml", text);
        machine
    }

    /// Configured for a cluster, by whoever made the token.
    async fn joined(token: &JoinToken) -> Self {
        let machine = Self::new();
        machine.write("join.token", &token.to_text());
        assert_eq!(machine.agent(&["join", "TOKEN"]).await, (0, String::new()));
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), Permissions::from_mode(0o600)).unwrap();
    }

    /// Exit code and error of a command; `TOKEN` stands for the token file.
    async fn agent(&self, args: &[&str]) -> (i32, String) {
        let token = self.path("join.token");
        let args = args.iter().map(|arg| if *arg == "TOKEN" { token.to_str().unwrap() } else { arg });
        let command = Command::new(env!("CARGO_BIN_EXE_mesh-agent"))
            .args(args)
            .arg("--config")
            .arg(self.path("config.yaml"))
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--socket")
            .arg(self.path("agent.sock"))
            .env_remove("MESHSPAN_LOG")
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(PATIENCE, command).await.expect("the command ends").unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        let error = stderr.find("error: ").map_or("", |at| stderr[at..].trim_end());
        (output.status.code().unwrap(), self.as_installed(error))
    }

    async fn refusal(&self, args: &[&str], code: i32) -> String {
        let (got, error) = self.agent(args).await;
        assert_eq!(got, code, "{args:?}: {error}");
        assert!(error.starts_with("error: "), "{args:?}: {error}");
        error
    }

    fn as_installed(&self, text: &str) -> String {
        let dir = self.dir.path().to_str().unwrap();
        let mut text = text.replace(&format!("{dir}/state"), "/var/lib/meshspan");
        for (name, installed) in
            [("config.yaml", "/etc/meshspan"), ("cluster.secret", "/etc/meshspan"), ("agent.sock", "/run/meshspan")]
        {
            text = text.replace(&format!("{dir}/{name}"), &format!("{installed}/{name}"));
        }
        assert!(!text.contains(dir), "{text}");
        text
    }
}

fn servers() -> Vec<DiscoveryServer> {
    vec![DiscoveryServer { endpoint: "https://127.0.0.1:9".parse().unwrap(), pin: Pin([7; 32]), proxied: false }]
}

fn token_of(cluster: &str, first_byte: u8) -> JoinToken {
    let mut secret = *b"a secret of thirty-two bytes ...";
    secret[0] = first_byte;
    JoinToken { servers: servers(), cluster_id: cluster.parse().unwrap(), secret: ClusterSecret::from_bytes(secret) }
}

/// Configuration and joining.
pub(crate) async fn of_the_command_line() -> Vec<String> {
    let home = token_of("home", 1);
    let new = Machine::new();
    let mut said = vec![
        new.refusal(&["run"], 1).await,
        new.refusal(&["status"], 3).await,
        Machine::with_config("mesh:\n  enabeld: true\n").refusal(&["config", "validate"], 1).await,
        Machine::with_config("mesh:\n  enabled: true\n").refusal(&["config", "validate"], 1).await,
        Machine::with_config("mesh:\n  podCIDRs: [0.0.0.0/0]\n").refusal(&["config", "validate"], 1).await,
        Machine::with_config("mesh:\n  mtu: 900\n").refusal(&["config", "validate"], 1).await,
    ];

    let refused = new.agent(&["join", &home.to_text()]).await;
    assert_eq!(refused.0, 2);
    said.push(refused.1);
    for (command, text) in [
        ("join", "hello".to_owned()),
        ("join", format!("{}0", *home.to_text())),
        ("join", ServerToken { servers: servers() }.to_text()),
        ("init", home.to_text().to_string()),
    ] {
        new.write("join.token", &text);
        said.push(new.refusal(&[command, "TOKEN"], 1).await);
    }
    new.write("cluster.secret", "of another cluster");
    new.write("join.token", &home.to_text());
    said.push(new.refusal(&["join", "TOKEN"], 1).await);

    let member = Machine::joined(&home).await;
    said.push(member.refusal(&["status"], 3).await);
    said.push(member.refusal(&["init", "--discovery", "https://a:1", "--pin", &Pin([7; 32]).to_string()], 1).await);
    member.write("join.token", &token_of("work", 2).to_text());
    said.push(member.refusal(&["join", "TOKEN"], 1).await);
    member.write("join.token", &token_of("home", 3).to_text());
    said.push(member.refusal(&["join", "TOKEN"], 1).await);
    said.push(format!("error: {}", ApiError::Permission { socket: "/run/meshspan/agent.sock".into() }));
    said
}

/// The secret, and the state directory.
pub(crate) async fn of_files() -> Vec<String> {
    let home = token_of("home", 1);
    let mut said = Vec::new();

    let member = Machine::joined(&home).await;
    fs::remove_file(member.path("cluster.secret")).unwrap();
    said.push(member.refusal(&["run"], 1).await);
    member.write("cluster.secret", "c2hvcnQ=");
    said.push(member.refusal(&["run"], 1).await);
    member.write("cluster.secret", "my cat's name");
    said.push(member.refusal(&["run"], 1).await);
    member.write("cluster.secret", &home.secret.to_text());
    fs::set_permissions(member.path("cluster.secret"), Permissions::from_mode(0o644)).unwrap();
    said.push(member.refusal(&["run"], 1).await);

    // The mesh is off: only the state directory is opened.
    let off = Machine::with_config("mesh: { enabled: false }\n");
    let state = State::open(&off.path("state")).unwrap();
    let in_use = off.refusal(&["run"], 1).await;
    said.push(in_use.replace(&std::process::id().to_string(), "4711"));
    drop(state);
    let socket = api::bind(&off.path("agent.sock")).unwrap();
    said.push(off.refusal(&["run"], 1).await);
    drop(socket);
    let identity = off.path("state/identity.json");
    let whole = fs::read(&identity).unwrap();
    fs::set_permissions(&identity, Permissions::from_mode(0o644)).unwrap();
    said.push(off.refusal(&["run"], 1).await);
    fs::set_permissions(&identity, Permissions::from_mode(0o600)).unwrap();
    fs::write(&identity, &whole[..whole.len() / 2]).unwrap();
    said.push(off.refusal(&["run"], 1).await);
    assert_eq!(fs::read(&identity).unwrap(), &whole[..whole.len() / 2], "a damaged identity is never replaced");
    fs::remove_file(&identity).unwrap();
    off.write("state/marks.json", "{}");
    said.push(off.refusal(&["run"], 1).await);
    assert!(!identity.exists(), "a lost identity is never replaced");
    said.push(format!("error: {}", StateError::NotOurs { path: "/var/lib/meshspan".into(), owner: 1000, user: 0 }));
    said
}

/// Ports, the TUN device, rights.
pub(crate) async fn of_the_host() -> Vec<String> {
    let mut said = Vec::new();
    let member = Machine::joined(&token_of("home", 1)).await;
    let taken = UdpSocket::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let config = fs::read_to_string(member.path("config.yaml")).unwrap();
    member.write("config.yaml", &config.replace("mesh:\n", &format!("mesh:\n  listenPort: {port}\n")));
    said.push(member.refusal(&["run"], 1).await.replace(&port, "51872"));

    let off = Machine::with_config("mesh: { enabled: false }\n");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    said.push(off.refusal(&["run", "--http", &addr], 1).await.replace(&addr, "127.0.0.1:9586"));

    let error = |number| io::Error::from_raw_os_error(number);
    for error in [
        TunError::NoDevice(error(libc::ENOENT)),
        TunError::DeviceForbidden(error(libc::EPERM)),
        TunError::NotPermitted { name: "mesh0".to_owned() },
        TunError::Busy { name: "mesh0".to_owned() },
    ] {
        said.push(format!("error: {error}"));
    }
    said
}
