//! The life of the process: off, on, off again, until a signal.
//!
//! While the mesh is off the process owns its state directory and its socket and nothing else on the host.

use anyhow::Context as _;
use mesh_common::config::Config;

use crate::api::{self, ApiRequest};
use crate::clock;
use crate::device;
use crate::eventloop::{Departure, Ended, Node};
use crate::http;
use crate::node_settings;
use crate::services::{Answer, Services, Wish, read_config};
use crate::settings::RunOptions;
use crate::state::State;
use crate::status;

const IS_OFF: &str = "the mesh is switched off on this node: `mesh-agent up` switches it on";

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
    // The floor of the last run stands until a node is up, unless that one cleaned up.
    let mut is_clean = false;
    let mut waiting: Vec<Answer> = Vec::new();
    let ended = loop {
        let next = if config.mesh.enabled {
            match Node::start((*config).clone(), &mut state, &settings.socket).await {
                Ok(node) => {
                    answer_all(&mut waiting, Ok(()));
                    match node.run(&mut services).await {
                        Ok(ended) => ended,
                        Err(error) => break Err(error),
                    }
                }
                Err(error) if is_first || !is_clean => {
                    answer_all(&mut waiting, Err(format!("{error:#}")));
                    break Err(error);
                }
                // Whoever switched it on is told; the process and its socket stay for the next try.
                Err(error) => {
                    tracing::error!("the mesh cannot be switched on: {error:#}");
                    answer_all(&mut waiting, Err(format!("{error:#}")));
                    config.mesh.enabled = false;
                    continue;
                }
            }
        } else {
            if !is_clean {
                remove_leftovers(&state).await;
            }
            answer_all(&mut waiting, Ok(()));
            idle(config.clone(), &state, &mut services).await
        };
        match next {
            Ended::Left(departure) => {
                config = departure.config;
                waiting = departure.waiting;
                is_clean = departure.is_clean;
                is_first = false;
            }
            Ended::Terminated => break Ok(()),
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

/// A node that is off owns nothing, also when its last run was cut short. What the last run of this state directory did
/// not leave is another agent's, on or stopped, and stays.
async fn remove_leftovers(state: &State) {
    if !device::is_marked(state.dir()) {
        return;
    }
    match device::cleanup(state.dir()).await {
        Ok(report) => {
            for removed in report.removed {
                tracing::info!("removed what the last run left: {removed}");
            }
            for failed in report.failed {
                tracing::warn!("what the last run left could not be removed: {failed}");
            }
        }
        Err(error) => tracing::warn!("what the last run left is not removed: {error}"),
    }
}

fn answer_all(waiting: &mut Vec<Answer>, result: Result<(), String>) {
    for answer in waiting.drain(..) {
        // The asker may have gone.
        let _gone = answer.send(result.clone());
    }
}

/// The mesh is off: answers, and waits to be switched on.
async fn idle(mut config: Box<Config>, state: &State, services: &mut Services) -> Ended {
    tracing::info!("the mesh is off (mesh.enabled is false): waiting to be switched on");
    let started_at_ms = clock::unix_ms();
    services.ready();
    loop {
        match services.next().await {
            Wish::Terminate => return Ended::Terminated,
            Wish::Reload { config: new, answer } if new.mesh.enabled => {
                return Ended::Left(Departure { config: new, waiting: answer.into_iter().collect(), is_clean: true });
            }
            Wish::Reload { config: new, answer } => {
                // The asker may have gone.
                let _gone = answer.map(|answer| answer.send(Ok(())));
                config = new;
            }
            Wish::Api(ApiRequest::Status(answer)) => {
                let host_name =
                    node_settings::host_name(&config).map_or_else(|_| String::new(), |name| name.to_string());
                let _gone = answer.send(Box::new(status::fill::disabled(&config, &host_name, state, started_at_ms)));
            }
            Wish::Api(ApiRequest::Ping(_, answer)) => drop(answer.send(Err(IS_OFF.to_owned()))),
            Wish::Api(ApiRequest::Netcheck(answer)) => drop(answer.send(Err(IS_OFF.to_owned()))),
            Wish::Api(ApiRequest::Leave(answer) | ApiRequest::Reload(answer)) => {
                let _gone = answer.send(Ok(()));
            }
        }
    }
}
