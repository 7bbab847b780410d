//! The host side of the mesh by rtnetlink: what stands there, and the steps towards what should.
//!
//! Owns the mesh link's settings (its creation is the backend's, which tells its index by [`HostDevice::set_link`]), route table 818, the rule at priority 1110, the nftables table `inet meshspan` and the
//! reverse path filters it loosened.
//! Refuses to touch anything else: a link of our name that is not ours is an error that names it, other tables and
//! rules are never read for removal. Peers belong to the data plane.
//!
//! Invariants: every step is idempotent; a removal deletes what was seen and nothing that replaced it since.

mod cleanup;
mod gateway;
mod link;
pub(crate) mod nfnetlink;
mod nft;
mod routes;
mod rp_filter;
mod rules;
mod watch;
mod wireguard;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use futures_util::TryStreamExt as _;
use mesh_proto::device::{Action, Family, Link, MssClamp, Observed};
use rtnetlink::Handle;
use tokio::task::AbortHandle;

pub use self::cleanup::{CleanupReport, cleanup, is_marked, mark, unmark};
pub use self::watch::HostWatch;

pub(crate) use self::wireguard::{WireguardLink, remove_leftover};

pub(crate) use self::nft::is_unsupported as has_no_nftables;
pub(crate) use self::rp_filter::sysctl as rp_filter_sysctl;

use self::routes::Table;
use self::routes::batch::{self, Change};
use self::rp_filter::Loosened;

/// The host could not be opened for reading and changing.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[source] io::Error),
    #[error(transparent)]
    Loosened(#[from] LoosenedError),
}

/// The list of loosened reverse path filters in the state directory is unusable.
#[derive(Debug, thiserror::Error)]
pub enum LoosenedError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{} is damaged ({source}): delete it; links listed there keep rp_filter = 2", path.display())]
    Damaged { path: PathBuf, source: serde_json::Error },
}

/// The host could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    #[error("cannot {what}: {source}")]
    Kernel { what: String, source: io::Error },
    #[error(
        "link {name} (index {index}, kind {kind}) is not this agent's: stop what made it, delete it, or set \
         mesh.interfaceName to another name"
    )]
    ForeignLink { name: String, index: u32, kind: String },
}

/// One step was not done.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error("not permitted to {what}: mesh-agent needs CAP_NET_ADMIN; run it as root or by its systemd unit")]
    NoNetAdmin { what: String },
    /// The host does not let us change a reverse path filter: prefixes that need it loose must not be captured.
    #[error("not permitted to change {sysctl}: set {sysctl} = {value} on the host")]
    NotPermitted { sysctl: String, value: u8 },
    #[error("cannot {what}: {source}")]
    Kernel { what: String, source: io::Error },
    #[error("link {name} is not there")]
    NoLink { name: String },
    #[error("this kernel has no nf_tables for MSS clamping ({source}): large packets rely on path MTU discovery")]
    NoNftables { source: io::Error },
    #[error("{action} is not a step of the host side")]
    NotOfTheHost { action: String },
    #[error(transparent)]
    Loosened(#[from] LoosenedError),
    #[error("an agent is on here, its link is {link}: use `mesh-agent down`, or stop it first")]
    AgentIsOn { link: String },
    #[error("cannot remove {}: {source}", file.display())]
    Mark { file: PathBuf, source: io::Error },
}

impl ApplyError {
    /// More rights would have helped.
    pub fn lacks_permission(&self) -> bool {
        matches!(self, Self::NoNetAdmin { .. } | Self::NotPermitted { .. })
    }

    /// The link is not on the host: it was deleted, or never made.
    pub fn is_missing_link(&self) -> bool {
        match self {
            Self::NoLink { .. } => true,
            Self::Kernel { source, .. } => source.raw_os_error() == Some(libc::ENODEV),
            _ => false,
        }
    }
}

/// Reads and changes the host's network configuration in the network namespace of the thread that made it.
#[derive(Debug)]
pub struct HostDevice {
    netlink: Netlink,
    link_name: String,
    /// Index of the link that the backend made.
    link: Option<u32>,
    listen_port: u16,
    loosened: Loosened,
    table: Table,
    /// The kernel refused the MSS clamp once; it will not learn it while we run.
    no_nftables: bool,
}

impl HostDevice {
    /// `state_dir` must exist; it keeps `loosened.json`. Must be called inside a tokio runtime.
    pub fn new(link_name: &str, state_dir: &Path) -> Result<Self, OpenError> {
        Ok(Self {
            netlink: Netlink::open().map_err(OpenError::Socket)?,
            link_name: link_name.to_owned(),
            link: None,
            listen_port: 0,
            loosened: Loosened::load(state_dir)?,
            table: Table::default(),
            no_nftables: false,
        })
    }

    /// Tells which link of our name is ours: the index of the one that the backend made, `None` once that is gone.
    /// `listen_port` is its UDP port, reported back by [`Self::observe`].
    pub fn set_link(&mut self, index: Option<u32>, listen_port: u16) {
        self.link = index;
        self.listen_port = listen_port;
    }

    /// Everything of ours on the host and the underlay around it. `peers` stays empty: they are the data plane's.
    pub async fn observe(&mut self) -> Result<Observed, ObserveError> {
        self.netlink
            .ensure()
            .map_err(|source| ObserveError::Kernel { what: "open a netlink socket".into(), source })?;
        let handle = &self.netlink.handle;
        let links = link::dump(handle).await.map_err(reading("list the links"))?;
        let addresses = link::dump_addresses(handle).await.map_err(reading("list the addresses"))?;
        let ours = match links.iter().find(|link| link.name == self.link_name) {
            Some(link) if self.link == Some(link.index) => Some(link),
            Some(link) => {
                return Err(ObserveError::ForeignLink {
                    name: link.name.clone(),
                    index: link.index,
                    kind: link.kind.clone().unwrap_or_else(|| "hardware".into()),
                });
            }
            None => None,
        };
        self.table = routes::observe(handle, ours.map(|link| link.index)).await.map_err(reading("list the routes"))?;
        let mut rules = BTreeSet::new();
        for family in Family::ALL {
            if rules::present(handle, family).await.map_err(reading("list the rules"))? {
                rules.insert(family);
            }
        }
        let all = rp_filter::all()
            .map_err(|source| ObserveError::Kernel { what: format!("read {}", rp_filter::ALL_PATH), source })?;
        let mss_clamp = if self.no_nftables { MssClamp::Unsupported } else { nft::observe(&self.link_name).await };
        Ok(Observed {
            link: ours.filter(|link| link.up).map(|link| Link {
                name: link.name.clone(),
                mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX),
                listen_port: self.listen_port,
                addresses: link::global_addresses(&addresses, link.index).collect(),
            }),
            peers: BTreeMap::new(),
            routes: self.table.routes(),
            rules,
            underlay: link::underlay(&links, &addresses, self.link, all),
            gateway: gateway::observe(handle).await,
            loosened: self.loosened.in_force(&links),
            mss_clamp,
        })
    }

    /// Does one step. Of `CreateLink`, `UpdateLink` and `DeleteLink` it does the netlink part; steps on peers are refused.
    pub async fn apply(&mut self, action: &Action) -> Result<(), ApplyError> {
        match action {
            Action::CreateLink(link) | Action::UpdateLink(link) => self.configure_link(link).await,
            Action::DeleteLink { name } => self.delete_link(name).await,
            Action::AddRoute(_) | Action::RemoveRoute(_) => {
                self.apply_routes(std::slice::from_ref(action)).await.pop().unwrap_or(Ok(()))
            }
            Action::AddRule(family) => {
                rules::add(&self.netlink.handle, *family).await.map_err(doing(|| format!("add the {family:?} rule")))
            }
            Action::RemoveRule(family) => rules::remove(&self.netlink.handle, *family)
                .await
                .map_err(doing(|| format!("remove the {family:?} rule"))),
            Action::LoosenRpFilter { link } => self.loosened.loosen(&self.netlink.handle, link).await,
            Action::RestoreRpFilter { link } => self.loosened.restore(&self.netlink.handle, link).await,
            Action::SetMssClamp => self.set_mss_clamp().await,
            Action::RemoveMssClamp => nft::remove().await.map_err(doing(|| "remove the MSS clamp".into())),
            Action::SetPeer(..) | Action::RemovePeer(_) => {
                Err(ApplyError::NotOfTheHost { action: "a peer's change".into() })
            }
        }
    }

    /// Gives our link its MTU and exactly these addresses, loose reverse path filter, no router advertisements, and
    /// brings it up. Needs [`Self::set_link`] first.
    pub async fn configure_link(&mut self, wanted: &Link) -> Result<(), ApplyError> {
        let index = self.our_index()?;
        link::configure(&self.netlink.handle, index, wanted).await
    }

    async fn delete_link(&mut self, name: &str) -> Result<(), ApplyError> {
        let Some(index) = self.link else {
            return Ok(());
        };
        link::delete(&self.netlink.handle, index).await.map_err(doing(|| format!("delete link {name}")))?;
        self.link = None;
        Ok(())
    }

    /// Does steps of routes in order, many at once, and gives what came of each.
    pub async fn apply_routes(&mut self, steps: &[Action]) -> Vec<Result<(), ApplyError>> {
        let mut results = Vec::with_capacity(steps.len());
        // Each change, and the step that it is part of.
        let (mut changes, mut owners) = (Vec::new(), Vec::new());
        for (index, step) in steps.iter().enumerate() {
            let planned = self.plan_route(step);
            results.push(planned.map(|planned| {
                owners.resize(owners.len() + planned.len(), index);
                changes.extend(planned);
            }));
        }
        let (done, broken) = match batch::carry_out(&changes).await {
            Ok(done) => (done, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        for (index, result) in owners.iter().zip(done) {
            if let (Err(error), result @ Ok(())) = (result, &mut results[*index]) {
                *result = Err(doing(|| describe(&steps[*index]))(error));
            }
        }
        if let Some(error) = broken {
            // What was done is seen at the next look; what was not is asked for again.
            for index in owners {
                let again = error.raw_os_error().map(io::Error::from_raw_os_error);
                let again = again.unwrap_or_else(|| io::Error::new(error.kind(), error.to_string()));
                results[index] = Err(doing(|| describe(&steps[index]))(again));
            }
        }
        results
    }

    /// The changes that a step of a route takes, counted as done: until the next look at the host they are what is known of it.
    fn plan_route(&mut self, step: &Action) -> Result<Vec<Change>, ApplyError> {
        match step {
            Action::AddRoute(route) => {
                let message = routes::message(route, self.link)
                    .ok_or_else(|| ApplyError::NotOfTheHost { action: format!("adding {route:?}") })?;
                if routes::needs_link(route) {
                    self.our_index()?;
                }
                self.table.added(route);
                Ok(vec![Change::Add(message)])
            }
            Action::RemoveRoute(route) => {
                let messages = self.table.messages_to_remove(route, self.link);
                self.table.removed(route);
                Ok(messages.into_iter().map(Change::Delete).collect())
            }
            other => Err(ApplyError::NotOfTheHost { action: format!("{other:?} among routes") }),
        }
    }

    async fn set_mss_clamp(&mut self) -> Result<(), ApplyError> {
        match nft::set(&self.link_name).await {
            Err(source) if nft::is_unsupported(&source) => {
                self.no_nftables = true;
                Err(ApplyError::NoNftables { source })
            }
            other => other.map_err(doing(|| "set the MSS clamp".into())),
        }
    }

    fn our_index(&self) -> Result<u32, ApplyError> {
        self.link.ok_or_else(|| ApplyError::NoLink { name: self.link_name.clone() })
    }
}

/// A request connection and the task that drives it.
#[derive(Debug)]
struct Netlink {
    handle: Handle,
    task: AbortHandle,
}

impl Netlink {
    fn open() -> io::Result<Self> {
        // The kernel filters dumps by table only on a socket with strict checking.
        let (connection, handle, _unsolicited) = rtnetlink::new_connection_with_strict_check()?;
        Ok(Self { handle, task: tokio::spawn(connection).abort_handle() })
    }

    /// Opens the socket anew when its task ended; without it every later request would fail.
    fn ensure(&mut self) -> io::Result<()> {
        if self.task.is_finished() {
            *self = Self::open()?;
        }
        Ok(())
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn to_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

/// A step of a route, as an error names it.
fn describe(step: &Action) -> String {
    match step {
        Action::AddRoute(route) => format!("add the route to {}", route.prefix),
        Action::RemoveRoute(route) => format!("remove the route to {}", route.prefix),
        other => format!("{other:?}"),
    }
}

/// Success where the kernel says that there was nothing to do.
fn accept(result: Result<(), rtnetlink::Error>, codes: &[i32]) -> io::Result<()> {
    match result.map_err(to_io) {
        Err(error) if error.raw_os_error().is_some_and(|code| codes.contains(&code)) => Ok(()),
        other => other,
    }
}

async fn collect<T>(stream: impl futures_util::Stream<Item = Result<T, rtnetlink::Error>>) -> io::Result<Vec<T>> {
    stream.try_collect().await.map_err(to_io)
}

fn reading(what: &'static str) -> impl Fn(io::Error) -> ObserveError {
    move |source| ObserveError::Kernel { what: what.into(), source }
}

fn doing(what: impl Fn() -> String) -> impl Fn(io::Error) -> ApplyError {
    move |source| match source.raw_os_error() {
        Some(libc::EPERM) => ApplyError::NoNetAdmin { what: what() },
        _ => ApplyError::Kernel { what: what(), source },
    }
}

#[cfg(test)]
mod tests;
