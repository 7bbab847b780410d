//! What lives as long as the process: signals, requests of the local API, and systemd's view of us.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use mesh_common::config::Config;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::api::ApiRequest;

/// Where the result of a request goes.
pub type Answer = oneshot::Sender<Result<(), String>>;

/// What somebody outside wants.
#[derive(Debug)]
pub enum Wish {
    Terminate,
    /// A new configuration that is valid by itself.
    Reload {
        config: Box<Config>,
        answer: Option<Answer>,
    },
    Api(ApiRequest),
}

#[derive(Debug)]
pub struct Services {
    config_file: PathBuf,
    api: mpsc::Receiver<ApiRequest>,
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
    watchdog: Option<Interval>,
    is_ready: bool,
}

impl Services {
    /// Must be called inside a tokio runtime.
    pub fn new(config_file: PathBuf, api: mpsc::Receiver<ApiRequest>) -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        let watchdog = sd_notify::watchdog_enabled().map(|limit: Duration| {
            let mut ticks = interval(limit / 3);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        Ok(Self {
            config_file,
            api,
            hangup: listen(SignalKind::hangup())?,
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            watchdog,
            is_ready: false,
        })
    }

    /// The next wish. Being polled is what keeps systemd's watchdog quiet. Cancel-safe.
    pub async fn next(&mut self) -> Wish {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return Wish::Terminate,
                _ = self.interrupt.recv() => return Wish::Terminate,
                _ = self.hangup.recv() => {
                    notify(&[NotifyState::Reloading, NotifyState::monotonic_usec_now().unwrap_or(NotifyState::Status("reloading"))]);
                    let config = read_config(&self.config_file);
                    notify(&[NotifyState::Ready]);
                    match config {
                        Ok(config) => return Wish::Reload { config, answer: None },
                        Err(error) => tracing::warn!("the configuration is not in force, the old one stays: {error}"),
                    }
                }
                Some(request) = self.api.recv() => match request {
                    ApiRequest::Reload(answer) => match read_config(&self.config_file) {
                        Ok(config) => return Wish::Reload { config, answer: Some(answer) },
                        Err(error) => {
                            // The asker may have gone.
                            let _gone = answer.send(Err(error));
                        }
                    },
                    request => return Wish::Api(request),
                },
                () = tick(&mut self.watchdog) => notify(&[NotifyState::Watchdog]),
            }
        }
    }

    /// Tells systemd that units which need the mesh may start.
    pub fn ready(&mut self) {
        if !std::mem::replace(&mut self.is_ready, true) {
            notify(&[NotifyState::Ready]);
        }
    }

    pub fn stopping(&self) {
        notify(&[NotifyState::Stopping]);
    }
}

/// Reads and checks the configuration file; the error names the file, the key and the fix.
pub fn read_config(file: &Path) -> Result<Box<Config>, String> {
    let text = std::fs::read_to_string(file).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => format!(
            "{} is not there: this machine has not joined a mesh; run `mesh-agent init` or `mesh-agent join`",
            file.display()
        ),
        _ => format!("cannot read {}: {error}", file.display()),
    })?;
    Config::parse(&text).map(Box::new).map_err(|error| format!("{}: {error}", file.display()))
}

async fn tick(watchdog: &mut Option<Interval>) {
    match watchdog {
        Some(ticks) => {
            ticks.tick().await;
        }
        None => std::future::pending().await,
    }
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd was not told");
    }
}
