//! Removes everything of ours from the host when no node is on.
//!
//! Owns the mark `on-host` in the state directory: it is there from before a node's first change of the host until all
//! was removed, so that a start with the mesh off knows its own leftovers from another agent's. Removes the routes of our
//! table, the rules, the packet filter table and the loosened filters, and of links only one of the kernel's WireGuard that
//! has this state directory's key: it outlives an agent that was killed. Any other link of an agent dies with its process.
//! One that stands shows that an agent is on in this network namespace, whose all the rest is then: refused. Goes on after
//! a failure so that one obstacle leaves as little as possible behind. Done twice it finds nothing.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use mesh_proto::device::Family;
use rtnetlink::Handle;

use super::routes::batch::{self, Change};
use super::rp_filter::Loosened;
use super::{ApplyError, Netlink, doing, link, nft, routes, rules, wireguard};
use crate::state;

const MARK: &str = "on-host";

/// What a cleanup did, for a human.
#[derive(Debug, Default)]
#[must_use = "tell what could not be removed"]
pub struct CleanupReport {
    pub removed: Vec<String>,
    pub failed: Vec<ApplyError>,
}

/// Removes what a node left. The caller holds the lock of the state directory, if there is one, and is inside a tokio
/// runtime.
pub async fn cleanup(state_dir: &Path) -> Result<CleanupReport, ApplyError> {
    let netlink = Netlink::open().map_err(doing(|| "open a netlink socket".into()))?;
    let handle = &netlink.handle;
    let own = state::wg_public(state_dir);
    let mut report = CleanupReport::default();
    let mut left = Vec::new();
    for link in link::dump(handle).await.map_err(doing(|| "list the links".into()))? {
        if wireguard::is_own(&link, own.as_ref()).await {
            left.push(link);
        } else if link.is_of_an_agent {
            return Err(ApplyError::AgentIsOn { link: link.name });
        }
    }
    for link in left {
        let deleted = link::delete(handle, link.index).await.map_err(doing(|| format!("delete link {}", link.name)));
        report.note(deleted.map(|()| Some(format!("link {}", link.name))));
    }
    report.note(remove_nftables().await);
    report.note(remove_routes(handle).await);
    for family in Family::ALL {
        report.note(remove_rule(handle, family).await);
    }
    match Loosened::load(state_dir) {
        Ok(mut loosened) => {
            for name in loosened.names() {
                let restored = loosened.restore(handle, &name).await;
                report.note(restored.map(|()| Some(format!("rp_filter of {name} restored"))));
            }
        }
        Err(error) => report.failed.push(error.into()),
    }
    if report.failed.is_empty() {
        report.note(unmark(state_dir).map(|()| None));
    }
    Ok(report)
}

/// Notes that from now on the host may have something of the node of this state directory. Not synced: a power failure
/// takes everything on the host with it.
pub fn mark(state_dir: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(state_dir.join(MARK)).map(drop)
}

/// The last run with this state directory was not followed by a removal of everything.
pub fn is_marked(state_dir: &Path) -> bool {
    state_dir.join(MARK).exists()
}

/// Notes that nothing of this state directory's node is on the host.
pub fn unmark(state_dir: &Path) -> Result<(), ApplyError> {
    let file = state_dir.join(MARK);
    match fs::remove_file(&file) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(ApplyError::Mark { file, source }),
        _ => Ok(()),
    }
}

async fn remove_routes(handle: &Handle) -> Result<Option<String>, ApplyError> {
    let listed = routes::dump(handle).await.map_err(doing(|| "list the routes".into()))?;
    let count = listed.len();
    let removals: Vec<Change> = listed.into_iter().map(|route| Change::Delete(routes::for_removal(route))).collect();
    let removed = batch::carry_out(&removals).await.and_then(|results| results.into_iter().collect::<io::Result<()>>());
    removed.map_err(doing(|| "remove the routes of table 818".into()))?;
    Ok((count > 0).then(|| format!("{count} routes of table 818")))
}

async fn remove_rule(handle: &Handle, family: Family) -> Result<Option<String>, ApplyError> {
    let ours = rules::ours(handle, family).await.map_err(doing(|| "list the rules".into()))?;
    if ours.is_empty() {
        return Ok(None);
    }
    rules::remove(handle, family).await.map_err(doing(|| format!("remove the {family:?} rule")))?;
    Ok(Some(format!("{family:?} rule of priority 1110")))
}

async fn remove_nftables() -> Result<Option<String>, ApplyError> {
    // Listing takes the right to remove. Without it the rules tell, which anyone may list and which go after the table.
    if !nft::exists().await {
        return Ok(None);
    }
    nft::remove().await.map_err(doing(|| "remove the nftables table inet meshspan".into()))?;
    Ok(Some("nftables table inet meshspan".into()))
}

impl CleanupReport {
    /// `None` = there was nothing to do.
    fn note(&mut self, result: Result<Option<String>, ApplyError>) {
        match result {
            Ok(what) => self.removed.extend(what),
            Err(error) => self.failed.push(error),
        }
    }
}
