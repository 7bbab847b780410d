//! The command line: what a person types, and which exit code a script gets back.
//!
//! Owns arguments, output formats and exit codes; each group of commands is a file of its own. Takes no secret from the
//! arguments, where every user of the machine could read it.

use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use mesh_common::config::{ClusterId, DEFAULT_CONFIG_FILE, LogFormat, Pin, ServerEndpoint};

use crate::settings::{RunOptions, Settings};
use crate::status::Show;

mod cluster;
mod config_file;
mod doctor;
mod exit;
mod keygen;
mod netcheck;
mod ping;
mod show;
mod speedtest;
mod switch;
mod token_input;

/// Joins this machine to an encrypted WireGuard mesh.
#[derive(Debug, Parser)]
#[command(name = "mesh-agent", version, arg_required_else_help = true, after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Exit codes: 0 ok, 1 error, 2 wrong usage, 3 no agent running, 4 degraded or problems found, 5 no permission.
Environment: MESHSPAN_LOG (what is logged, e.g. debug), NO_COLOR.";

#[derive(Debug, Args)]
struct Global {
    /// The configuration file
    #[arg(long, global = true, value_name = "FILE", default_value = DEFAULT_CONFIG_FILE)]
    config: PathBuf,
    /// The directory of the node's identity and what it remembers [default: /var/lib/meshspan]
    #[arg(long, global = true, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// The socket of the running agent [default: /run/meshspan/agent.sock]
    #[arg(long, global = true, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// How logs are written [default: text]
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<LogFormatArg>,
    /// How answers are written [default: table]
    #[arg(long, short, global = true, value_name = "FORMAT")]
    output: Option<Output>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormatArg {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Wide,
    Json,
    Yaml,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a new cluster on this machine, with the discovery server of a server token
    Init(InitArgs),
    /// Print the join token of this machine's cluster (it holds the cluster secret)
    Token,
    /// Join the cluster of a join token
    Join(JoinArgs),
    /// Run the agent in the foreground
    Run(RunArgs),
    /// Turn the mesh on: sets mesh.enabled and has the agent apply it
    Up,
    /// Turn the mesh off: clears mesh.enabled and waits until nothing of it is left
    Down,
    /// Tell all members that this node leaves, then turn the mesh off
    Leave,
    /// Show this node, its servers and its peers
    Status {
        /// For each peer in use: which path carries, why it is not a direct one, what was tried
        #[arg(long)]
        why: bool,
    },
    /// Show the peers, or one of them
    Peers {
        /// A host name, or the start of a node id or public key (4 characters or more)
        name: Option<String>,
    },
    /// Probe the path to a peer
    Ping(PingArgs),
    /// Measure what the tunnel to a peer carries, both ways, and say which path carried it
    Speedtest(SpeedtestArgs),
    /// Show how this node's network looks from outside: UDP, NAT, the way to the servers
    Netcheck,
    /// Look for what commonly keeps a node from its peers, and say what helps
    Doctor,
    /// Check or show the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Make a WireGuard key pair for a static peer: private key on stdout, public key on stderr
    Keygen {
        /// Read a private key from standard input and print its public key
        #[arg(long)]
        public: bool,
    },
    /// Remove everything a stopped agent left on this host, the fail-closed routes too
    Cleanup,
    /// Print the completion script of a shell
    Completion { shell: clap_complete::Shell },
}

#[derive(Debug, Args)]
struct InitArgs {
    /// The file with the server token; `-` for standard input, nothing for a hidden prompt
    file: Option<PathBuf>,
    /// A discovery server, instead of a token (may be repeated, each with its pin)
    #[arg(long, value_name = "https://HOST:PORT", requires = "pin", conflicts_with = "file")]
    discovery: Vec<ServerEndpoint>,
    /// The pin of that server
    #[arg(long, value_name = "sha256:HEX", requires = "discovery")]
    pin: Vec<Pin>,
    /// The name of the cluster [default: made up]
    #[arg(long, value_name = "ID")]
    cluster_id: Option<ClusterId>,
}

#[derive(Debug, Args)]
struct JoinArgs {
    /// The file with the join token; `-` for standard input, nothing for a hidden prompt
    file: Option<PathBuf>,
    /// Leave the cluster this machine is configured for
    #[arg(long)]
    replace: bool,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Serve metrics and health on this address [default: off]
    #[arg(long, value_name = "ADDR:PORT")]
    http: Option<SocketAddr>,
}

#[derive(Debug, Args)]
struct PingArgs {
    /// A host name, or the start of a node id or public key (4 characters or more)
    peer: String,
    /// Go on until a direct path answers, for 30 seconds at most
    #[arg(long)]
    until_direct: bool,
    /// The path to probe [default: the one that packets take now]
    #[arg(long, value_name = "PATH", conflicts_with = "until_direct")]
    via: Option<ViaArg>,
    /// How many probes to send [default: 5, or as many as fit with --until-direct]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    count: Option<u32>,
}

#[derive(Debug, Args)]
struct SpeedtestArgs {
    /// A host name, or the start of a node id or public key (4 characters or more)
    peer: String,
    /// How long to send each way
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=10))]
    seconds: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ViaArg {
    Relay,
    Direct,
}

#[derive(Debug, Clone, Copy, Subcommand)]
enum ConfigCommand {
    /// Check the configuration file and the files it names
    Validate,
    /// Print the configuration with every default, secrets hidden
    Show,
}

/// Runs the command of this process.
pub fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    let result = match token_input::refuse_tokens_in(&arguments) {
        Ok(()) => dispatch(Cli::parse_from(arguments)),
        Err(refusal) => Err(refusal.into()),
    };
    let code = result.unwrap_or_else(|error| {
        eprintln!("error: {}", exit::describe(&error));
        exit::code_of(&error)
    });
    ExitCode::from(code)
}

/// Whether a stream takes colours: only a terminal, and only without `NO_COLOR`.
pub fn colours(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn dispatch(cli: Cli) -> anyhow::Result<u8> {
    let Cli { global, command } = cli;
    match command {
        Command::Init(args) => cluster::init(&global, args),
        Command::Token => cluster::token(&global),
        Command::Join(args) => cluster::join(&global, args),
        Command::Run(args) => run(&global, &args),
        Command::Up => switch::up(&global),
        Command::Down => switch::down(&global),
        Command::Leave => switch::leave(&global),
        Command::Status { why } => show::status(&global, why),
        Command::Peers { name } => show::peers(&global, name.as_deref()),
        Command::Ping(args) => ping::ping(&global, &args),
        Command::Speedtest(args) => speedtest::speedtest(&global, &args),
        Command::Netcheck => netcheck::netcheck(&global),
        Command::Doctor => doctor::doctor(&global),
        Command::Config(ConfigCommand::Validate) => config_file::validate(&global),
        Command::Config(ConfigCommand::Show) => config_file::show(&global),
        Command::Keygen { public } => keygen::keygen(public),
        Command::Cleanup => switch::cleanup(&global),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "mesh-agent", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
    }
}

fn run(global: &Global, args: &RunArgs) -> anyhow::Result<u8> {
    let config = config_file::read(&global.config)?.ok_or_else(|| global.never_joined())?;
    let options = RunOptions { http: args.http, ..global.options() };
    crate::logging::init(options.settings(&config.config).log_format)?;
    crate::daemon::run(options)?;
    Ok(exit::OK)
}

impl Global {
    fn options(&self) -> RunOptions {
        RunOptions {
            config_file: self.config.clone(),
            state_dir: self.state_dir.clone(),
            socket: self.socket.clone(),
            http: None,
            log_format: self.log_format.map(|format| match format {
                LogFormatArg::Text => LogFormat::Text,
                LogFormatArg::Json => LogFormat::Json,
            }),
        }
    }

    /// The settings for talking to a running agent, also when the configuration cannot be read.
    fn settings(&self) -> Settings {
        let config = config_file::read(&self.config).ok().flatten().map(|read| read.config);
        self.options().settings(&config.unwrap_or_default())
    }

    fn never_joined(&self) -> exit::NeverJoined {
        exit::NeverJoined { config: self.config.clone(), code: exit::ERROR }
    }

    fn show(&self) -> Show {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Show {
            wide: self.output == Some(Output::Wide),
            colour: colours(&io::stdout()),
            now_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// Writes an answer. A reader that went away (`| head`) is no error.
fn print(text: &str) -> anyhow::Result<u8> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(exit::OK),
    }
}

fn to_json(value: &impl serde::Serialize) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// Runs one conversation with the agent.
fn block_on<T>(conversation: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(conversation))
}
