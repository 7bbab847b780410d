//! SIGINT, SIGTERM and SIGHUP remove the living lab before the process ends.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock, PoisonError},
    thread,
};

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

use crate::lab::sweep;

static LIVING: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
static WATCHER: OnceLock<()> = OnceLock::new();

/// Registers a lab; the first one starts the watcher, which lives as long as the process.
pub(crate) fn guard(dir: &Path) -> Result<()> {
    living(|dirs| dirs.insert(dir.to_owned()));
    if WATCHER.set(()).is_ok() {
        let (ready, wait_ready) = std::sync::mpsc::channel();
        thread::Builder::new()
            .name("lab-signals".into())
            .spawn(move || watch(&ready))
            .context("cannot start the signal watcher")?;
        wait_ready.recv().context("the signal watcher ended")??;
    }
    Ok(())
}

pub(crate) fn release(dir: &Path) {
    living(|dirs| dirs.remove(dir));
}

fn living<T>(change: impl FnOnce(&mut BTreeSet<PathBuf>) -> T) -> T {
    change(&mut LIVING.lock().unwrap_or_else(PoisonError::into_inner))
}

fn watch(ready: &std::sync::mpsc::Sender<Result<()>>) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = ready.send(Err(error.into()));
            return;
        }
    };
    let caught = runtime.block_on(async {
        let mut streams = Vec::new();
        for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
            match signal(kind) {
                Ok(stream) => streams.push((kind, stream)),
                Err(error) => {
                    let _ = ready.send(Err(error.into()));
                    return None;
                }
            }
        }
        let _ = ready.send(Ok(()));
        let waits = streams.into_iter().map(|(kind, mut stream)| {
            Box::pin(async move {
                stream.recv().await;
                kind
            })
        });
        Some(futures_util::future::select_all(waits).await.0)
    });
    if let Some(kind) = caught {
        // The lock stays held until the process ends, so nobody sweeps at the same time.
        for dir in living(std::mem::take) {
            eprintln!("interrupted: removing the lab {}", dir.display());
            sweep::remove_lab(&dir);
        }
        std::process::exit(128 + kind.as_raw_value());
    }
}
