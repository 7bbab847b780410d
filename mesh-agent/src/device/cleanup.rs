//! Removes everything of ours from the host without a running agent.
//!
//! Owns nothing new: the link by name and kind, the table, the rules, the packet filter table, the
//! loosened filters. Leaves all else, and goes on
//! after a failure so that one obstacle leaves as little as possible behind. Done twice it finds nothing.

use std::path::Path;

use mesh_proto::device::Family;

use super::rp_filter::Loosened;
use super::{ApplyError, Netlink, doing, link, nft, routes, rules};

/// What a cleanup did, for a human.
#[derive(Debug, Default)]
#[must_use = "tell what could not be removed"]
pub struct CleanupReport {
    pub removed: Vec<String>,
    /// What could not be removed, and why.
    pub failed: Vec<String>,
}

/// Must be called inside a tokio runtime, with no agent running.
pub async fn cleanup(link_name: &str, state_dir: &Path) -> Result<CleanupReport, ApplyError> {
    let netlink = Netlink::open().map_err(doing(|| "open a netlink socket".into()))?;
    let handle = &netlink.handle;
    let mut report = CleanupReport::default();

    let links = link::dump(handle).await.map_err(doing(|| "list the links".into()))?;
    if let Some(link) = links.iter().find(|link| link.name == link_name) {
        if link.kind.as_deref() == Some("tun") {
            let result = link::delete(handle, link.index).await.map_err(doing(|| format!("delete link {link_name}")));
            report.note(result, || format!("link {link_name}"));
        } else {
            let kind = link.kind.as_deref().unwrap_or("hardware");
            report
                .failed
                .push(format!("link {link_name} is of kind {kind}, which mesh-agent does not make: left alone"));
        }
    }

    let listed = routes::dump(handle).await.map_err(doing(|| "list the routes".into()))?;
    let count = listed.len();
    let mut result = Ok(());
    for message in listed {
        if let Err(error) = routes::delete(handle, routes::for_removal(message)).await {
            result = Err(doing(|| "remove a route of table 818".into())(error));
        }
    }
    if count > 0 {
        report.note(result, || format!("{count} routes of table 818"));
    }

    for family in Family::ALL {
        let count = rules::ours(handle, family).await.map_err(doing(|| "list the rules".into()))?.len();
        if count > 0 {
            let result = rules::remove(handle, family).await.map_err(doing(|| format!("remove the {family:?} rule")));
            report.note(result, || format!("{family:?} rule of priority 1110"));
        }
    }

    if nft::exists().await {
        let result = nft::remove().await.map_err(doing(|| "remove the nftables table inet meshspan".into()));
        report.note(result, || "nftables table inet meshspan".into());
    }

    match Loosened::load(state_dir) {
        Ok(mut loosened) => {
            for name in loosened.names() {
                let result = loosened.restore(handle, &name).await;
                report.note(result, || format!("rp_filter of {name} restored"));
            }
        }
        Err(error) => report.failed.push(error.to_string()),
    }
    Ok(report)
}

impl CleanupReport {
    fn note(&mut self, result: Result<(), ApplyError>, what: impl FnOnce() -> String) {
        match result {
            Ok(()) => self.removed.push(what()),
            Err(error) => self.failed.push(error.to_string()),
        }
    }
}
