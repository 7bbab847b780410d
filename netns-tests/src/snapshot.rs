//! A sorted text dump of what a host has: links, addresses, routes of all tables, rules, nftables tables, filters'
//! switches, sockets, processes and files. Two dumps differ by readable lines.
//!
//! Left out, because they come and go by themselves and belong to no program: cached routes, neighbours, counters,
//! lifetimes, closed TCP connections in TIME_WAIT, and unnamed unix sockets.

mod netlink;
mod procfs;

use std::{
    collections::BTreeMap,
    fmt,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::Result;

use crate::host::Host;

/// The kinds of lines, each line's first word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Link,
    Address,
    Route,
    Rule,
    Nftables,
    Sysctl,
    Socket,
    UnixSocket,
    Process,
    File,
}

impl Kind {
    /// What an agent that does nothing may still have: itself, its API socket, its files.
    pub const OF_A_LIVING_PROCESS: [Self; 3] = [Self::UnixSocket, Self::Process, Self::File];

    fn word(self) -> &'static str {
        match self {
            Self::Link => "link",
            Self::Address => "address",
            Self::Route => "route",
            Self::Rule => "rule",
            Self::Nftables => "nftables",
            Self::Sysctl => "sysctl",
            Self::Socket => "socket",
            Self::UnixSocket => "unix-socket",
            Self::Process => "process",
            Self::File => "file",
        }
    }
}

/// A dump; equal lines are counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    lines: BTreeMap<(Kind, String), usize>,
}

/// One line that only one of two dumps has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    pub appeared: bool,
    pub kind: Kind,
    pub text: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", if self.appeared { '+' } else { '-' }, self.kind.word(), self.text)
    }
}

impl Snapshot {
    /// Dumps `host` and the paths under `roots`.
    pub fn take(host: &Host, roots: &[PathBuf]) -> Result<Self> {
        let inode = host.inode();
        let mut snapshot = host.inside(|| {
            let mut snapshot = Self::default();
            netlink::dump(&mut snapshot)?;
            procfs::dump(&mut snapshot, inode)?;
            crate::nft::tables_here()?.into_iter().for_each(|table| snapshot.add(Kind::Nftables, table));
            Ok(snapshot)
        })?;
        for root in roots {
            snapshot.add_files(root);
        }
        Ok(snapshot)
    }

    /// Lines that only `self` (gone) or only `later` (appeared) has.
    pub fn diff(&self, later: &Self) -> Vec<Difference> {
        let mut differences = Vec::new();
        for (one, other, appeared) in [(self, later, false), (later, self, true)] {
            for ((kind, text), count) in &one.lines {
                let missing =
                    count.saturating_sub(other.lines.get(&(*kind, text.clone())).copied().unwrap_or_default());
                differences.extend((0..missing).map(|_| Difference { appeared, kind: *kind, text: text.clone() }));
            }
        }
        differences
    }

    /// The texts of one kind.
    pub fn of(&self, kind: Kind) -> impl Iterator<Item = &str> {
        self.lines.keys().filter(move |(k, _)| *k == kind).map(|(_, text)| text.as_str())
    }

    fn add(&mut self, kind: Kind, text: impl Into<String>) {
        *self.lines.entry((kind, text.into())).or_default() += 1;
    }

    fn add_files(&mut self, path: &Path) {
        let Ok(metadata) = path.symlink_metadata() else {
            return;
        };
        self.add(Kind::File, format!("{} mode {:o}", path.display(), metadata.permissions().mode()));
        if metadata.is_dir() {
            for entry in path.read_dir().into_iter().flatten().flatten() {
                self.add_files(&entry.path());
            }
        }
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for ((kind, text), count) in &self.lines {
            for _ in 0..*count {
                writeln!(f, "{} {text}", kind.word())?;
            }
        }
        Ok(())
    }
}

/// Differences in words, one a line, for an error message.
pub fn in_words(differences: &[Difference]) -> String {
    differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}
