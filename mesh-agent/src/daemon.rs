//! The life of the process: off, on, off again, until a signal.
//!
//! While the mesh is off the process owns its state directory and its socket and nothing else on the host.

use anyhow::Context as _;
use mesh_common::config::Config;

use crate::api::{self, ApiRequest};
use crate::clock;
use crate::eventloop::{Ended, Node};
use crate::http;
use crate::node_settings;
use crate::services::{Services, Wish, read_config};
use crate::settings::RunOptions;
use crate::state::State;
use crate::status;

/// Runs the agent until a signal ends it.
pub fn run(options: RunOptions) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start tokio")?;
    runtime.block_on(serve(options))
}

async fn serve(options: RunOptions) -> anyhow::Result<()> {
    let mut config = read_config(&options.config_file).map_err(anyhow::Error::msg)?;
    let settings = options.settings(&config);
    let mut state = State::open(&settings.state_dir)?;
    let (handle, requests) = api::channel();
    let mut services = Services::new(options.config_file, requests)?;
    let listener = api::bind(&settings.socket)?;
    let api = tokio::spawn(api::serve(listener, handle.clone()));
    let http = match settings.http {
        Some(addr) => Some(tokio::spawn(http::serve(http::bind(addr).await?, handle))),
        None => None,
    };
    let mut is_first = true;
    let ended = loop {
        let next = if config.mesh.enabled {
            match Node::start((*config).clone(), &mut state).await {
                Ok(node) => node.run(&mut services).await,
                Err(error) => Err(error),
            }
        } else {
            Ok(idle(config.clone(), &state, &mut services).await)
        };
        match next {
            Ok(Ended::Left(next)) => {
                config = next;
                is_first = false;
            }
            Ok(Ended::Terminated) => break Ok(()),
            Err(error) if is_first => break Err(error),
            // Whoever switched it on reads this; the process and its socket stay for the next try.
            Err(error) => {
                tracing::error!("the mesh cannot be switched on: {error:#}");
                config.mesh.enabled = false;
            }
        }
    };
    services.stopping();
    api.abort();
    if let Some(http) = http {
        http.abort();
    }
    // Already gone when somebody cleaned up behind us.
    let _gone = std::fs::remove_file(&settings.socket);
    ended
}

/// The mesh is off: answers, and waits to be switched on.
async fn idle(mut config: Box<Config>, state: &State, services: &mut Services) -> Ended {
    tracing::info!("the mesh is off (mesh.enabled is false): waiting to be switched on");
    let started_at_ms = clock::unix_ms();
    services.ready();
    loop {
        match services.next().await {
            Wish::Terminate => return Ended::Terminated,
            Wish::Reload { config: new, answer } => {
                // The asker may have gone.
                let _gone = answer.map(|answer| answer.send(Ok(())));
                if new.mesh.enabled {
                    return Ended::Left(new);
                }
                config = new;
            }
            Wish::Api(ApiRequest::Status(answer)) => {
                let host_name =
                    node_settings::host_name(&config).map_or_else(|_| String::new(), |name| name.to_string());
                let _gone = answer.send(Box::new(status::fill::disabled(&config, &host_name, state, started_at_ms)));
            }
            Wish::Api(ApiRequest::Leave(answer) | ApiRequest::Reload(answer)) => {
                let _gone = answer.send(Ok(()));
            }
        }
    }
}
