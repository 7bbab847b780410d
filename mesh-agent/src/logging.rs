//! Logs go to standard error: text for people, JSON for machines, without times where the journal adds its own.

use std::io::IsTerminal;
use std::os::fd::AsFd;

use mesh_common::config::LogFormat;
use tracing_subscriber::filter::{EnvFilter, FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// Starts logging for this process; `MESHSPAN_LOG` says what is shown (`info` by default), `NO_COLOR` turns colours off.
pub fn init(format: LogFormat) -> Result<(), TryInitError> {
    let wanted = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .with_env_var("MESHSPAN_LOG")
        .from_env_lossy();
    // Below info the netlink crates print whole messages, and those hold keys.
    let harmless = filter_fn(|event| *event.level() <= tracing::Level::INFO || !is_netlink(event.target()));
    // boringtun warns of what is normal here: a peer that is off, a handshake that crossed ours.
    let wanted = wanted.add_directive("boringtun=off".parse().expect("the directive is valid"));
    let filter = wanted.and(harmless);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let layer = match format {
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
        LogFormat::Text if is_journal() => layer.without_time().with_ansi(false).boxed(),
        LogFormat::Text => layer.with_ansi(crate::cli::colours(&std::io::stderr())).boxed(),
    };
    registry().with(layer.with_filter(filter)).try_init()
}

fn is_netlink(target: &str) -> bool {
    target.starts_with("netlink_") || target.starts_with("rtnetlink")
}

/// Whether standard error is the journal: systemd names its device and inode.
fn is_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else { return false };
    let stderr = std::io::stderr();
    !stderr.is_terminal()
        && nix::sys::stat::fstat(stderr.as_fd()).is_ok_and(|stat| stream == *format!("{}:{}", stat.st_dev, stat.st_ino))
}
