//! Logs go to standard error: text for people, JSON for machines, without times where the journal adds its own.

use std::io::IsTerminal;
use std::os::fd::AsFd;

use mesh_common::config::LogFormat;
use tracing::Metadata;
use tracing_subscriber::filter::{EnvFilter, FilterExt, FilterFn, LevelFilter, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// Starts logging for this process; `MESHSPAN_LOG` says what is shown (`info` by default), `NO_COLOR` turns colours off.
pub fn init(format: LogFormat) -> Result<(), TryInitError> {
    let wanted = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .with_env_var("MESHSPAN_LOG")
        .from_env_lossy();
    // boringtun warns of what is normal here: a peer that is off, a handshake that crossed ours.
    let wanted = wanted.add_directive("boringtun=off".parse().expect("the directive is valid"));
    let filter = wanted.and(harmless());
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let layer = match format {
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
        LogFormat::Text if is_journal() => layer.without_time().with_ansi(false).boxed(),
        LogFormat::Text => layer.with_ansi(crate::cli::colours(&std::io::stderr())).boxed(),
    };
    registry().with(layer.with_filter(filter)).try_init()
}

/// Shows what [`is_harmless`]. Without its hint the filter would be thought to want everything, and each call of every crate
/// that logs would ask: a tenth of the time that a node took to meet a thousand peers.
fn harmless() -> FilterFn<impl Fn(&Metadata<'_>) -> bool> {
    filter_fn(|event: &Metadata<'_>| is_harmless(event.target(), *event.level()))
        .with_max_level_hint(LevelFilter::TRACE)
}

/// Keys stand in netlink messages. The crates that carry them print whole ones below info, and the bytes of one that they
/// cannot read as an error: of those nothing is shown, whatever the user asks for.
fn is_harmless(target: &str, level: tracing::Level) -> bool {
    let is_of = |name: &str| target.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
    let carries_keys = is_of("netlink_proto") || is_of("genetlink") || target.starts_with("netlink_packet_");
    let is_netlink = target.starts_with("netlink_") || is_of("rtnetlink");
    !carries_keys && (!is_netlink || level <= tracing::Level::INFO)
}

/// Whether standard error is the journal: systemd names its device and inode.
fn is_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else { return false };
    let stderr = std::io::stderr();
    !stderr.is_terminal()
        && nix::sys::stat::fstat(stderr.as_fd()).is_ok_and(|stat| stream == *format!("{}:{}", stat.st_dev, stat.st_ino))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::layer::Filter;

    #[derive(Clone, Default)]
    struct Shown(Arc<Mutex<Vec<u8>>>);

    impl Write for Shown {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_carries_keys_is_silent_whatever_the_user_asks_for() {
        let shown = Shown::default();
        let writer = shown.clone();
        let wanted = EnvFilter::new("trace,netlink_proto=trace,genetlink=trace,netlink_packet_wireguard=trace");
        let filter = wanted.and(harmless());
        let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
        tracing::subscriber::with_default(registry().with(layer.with_filter(filter)), || {
            tracing::trace!(target: "netlink_proto::codecs", ">>> PrivateKey(canary)");
            tracing::error!(target: "netlink_proto::codecs", "failed to decode packet canary");
            tracing::warn!(target: "netlink_proto", "canary");
            tracing::error!(target: "genetlink::connection", "canary");
            tracing::error!(target: "netlink_packet_wireguard::attribute", "canary");
            tracing::debug!(target: "netlink_sys", "canary");
            tracing::debug!(target: "rtnetlink", "canary");
            tracing::info!(target: "rtnetlink", "a link is up");
            tracing::trace!(target: "mesh_agent::kernel", "all else is shown");
        });
        let text = String::from_utf8(shown.0.lock().unwrap().clone()).unwrap();
        assert!(!text.contains("canary"), "{text}");
        assert!(text.contains("a link is up") && text.contains("all else is shown"), "{text}");
    }

    #[test]
    fn what_nobody_asked_for_is_not_even_asked_about() {
        let wanted = EnvFilter::new("info").and(harmless());
        assert_eq!(Filter::<registry::Registry>::max_level_hint(&wanted), Some(LevelFilter::INFO));
    }
}
