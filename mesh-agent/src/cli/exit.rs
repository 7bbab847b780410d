//! Which exit code and which words an error gets.

use std::io;
use std::path::PathBuf;

use crate::api::ApiError;
use crate::dataplane::TunError;
use crate::device::ApplyError;
use crate::state::StateError;

pub(super) const OK: u8 = 0;
pub(super) const ERROR: u8 = 1;
const USAGE: u8 = 2;
pub(super) const NOT_RUNNING: u8 = 3;
pub(super) const DEGRADED: u8 = 4;
const PERMISSION: u8 = 5;

/// The command was used wrongly, in a way that the argument parser cannot see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct UsageError(pub(super) String);

#[derive(Debug, thiserror::Error)]
#[error("this machine has no config ({}): run `mesh-agent init` or `mesh-agent join`", config.display())]
pub(super) struct NeverJoined {
    pub(super) config: PathBuf,
    /// The exit code: what asks the agent finds none running, what reads the configuration finds an error.
    pub(super) code: u8,
}

/// What a cleanup had to leave on the host.
#[derive(Debug, thiserror::Error)]
#[error("not all could be removed:{}", .0.iter().map(|error| format!("\n  {error}")).collect::<String>())]
pub(super) struct NotRemoved(pub(super) Vec<ApplyError>);

pub(super) fn code_of(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if cause.is::<UsageError>() {
            return USAGE;
        }
        if let Some(never_joined) = cause.downcast_ref::<NeverJoined>() {
            return never_joined.code;
        }
        match cause.downcast_ref::<ApiError>() {
            Some(ApiError::NotRunning { .. }) => return NOT_RUNNING,
            Some(ApiError::Permission { .. }) => return PERMISSION,
            _ => {}
        }
        if let Some(NotRemoved(failed)) = cause.downcast_ref()
            && failed.iter().any(ApplyError::lacks_permission)
        {
            return PERMISSION;
        }
        let not_ours = matches!(cause.downcast_ref(), Some(StateError::NotOurs { .. }));
        let no_link = matches!(cause.downcast_ref(), Some(TunError::NotPermitted { .. }));
        let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        if not_ours || no_link || cause.downcast_ref::<io::Error>().is_some_and(denied) {
            return PERMISSION;
        }
    }
    ERROR
}

/// The error and its causes in one line, each said once.
pub(super) fn describe(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |said, cause| match said.as_str() {
        "" => cause,
        already if already.contains(&cause) => said,
        already => format!("{already}: {cause}"),
    })
}
