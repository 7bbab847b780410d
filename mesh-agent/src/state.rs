//! What a node remembers: its identity, the sequence numbers it gave out, its overlay address, the UDP port it moved to, since
//! when it announces its prefixes, its peers' sealed frames and the newest sequence number seen of each.
//!
//! Owns one directory (0700) and every file in it (0600). A lock keeps a second agent out. The identity is made once, when
//! nothing of ours is there; one that is missing, damaged, or another user's is an error that names the file, never a
//! reason to make a new one. The rest can be learned again: a damaged file falls back to the generation before it,
//! and then to nothing, each with a WARN.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use ipnet::IpNet;
use mesh_common::id::NodeId;
use mesh_common::key::{SignKey, WgPublicKey, WgSecret};
use serde::{Deserialize, Serialize};

use crate::durable;

mod files;

use files::{IdentityFile, decode_frames, encode_frames};

const IDENTITY: &str = "identity.json";
const NUMBERS: &str = "state.json";
const MARKS: &str = "marks.json";
const FRAMES: &str = "cache.bin";
const LOCK: &str = "lock";
const FILE_MODE: u32 = 0o600;
/// The longest file that is read, in bytes: well above 1024 members with the longest frames.
const MAX_FILE: u64 = 16 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("the state directory {} cannot be used: {source}; give another with --state-dir", dir.display())]
    Directory { dir: PathBuf, source: io::Error },
    #[error("another agent{} uses the state directory {}: stop it, or give --state-dir", Process(pid), dir.display())]
    InUse { dir: PathBuf, pid: Option<u32> },
    #[error("{0} belongs to user {owner}, this agent runs as user {user}: chown {user} {0}, or run as the owner", path.display())]
    NotOurs { path: PathBuf, owner: u32, user: u32 },
    #[error("{0} can be read by others (mode {mode:o}) and holds the keys of this node: chmod 600 {0}", file.display())]
    Exposed { file: PathBuf, mode: u32 },
    #[error(
        "{} is missing, but {found} beside it shows that this node had an identity: restore it from a backup, \
         or empty {} to join as a new node",
        file.display(), dir.display()
    )]
    IdentityMissing { dir: PathBuf, file: PathBuf, found: &'static str },
    #[error(
        "{} is damaged ({what}): restore it from a backup, or empty {} to join as a new node",
        file.display(), dir.display()
    )]
    IdentityDamaged { dir: PathBuf, file: PathBuf, what: &'static str },
    #[error("{} cannot be {doing}: {source}", file.display())]
    Io { file: PathBuf, doing: &'static str, source: io::Error },
}

/// The open state directory of a running agent.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    identity: SignKey,
    wg: WgSecret,
    numbers: Numbers,
    /// Held for as long as the agent runs.
    _lock: File,
}

/// What `state.json` holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Numbers {
    reserved_seq: u64,
    overlay_v4: Option<OverlayClaim>,
    /// Absent in files of older versions.
    #[serde(default)]
    announced: Announced,
    #[serde(default)]
    moved_port: Option<MovedPort>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Announced {
    since_ms: BTreeMap<IpNet, u64>,
    at_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct OverlayClaim {
    address: Ipv4Addr,
    claimed_at_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct MovedPort {
    configured: u16,
    port: u16,
}

impl State {
    /// Opens the directory, making it and a new identity when there is nothing yet.
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        prepare_directory(dir)?;
        let lock = lock(dir)?;
        let (identity, wg) = match load_identity(dir)? {
            Some(keys) => keys,
            None => make_identity(dir)?,
        };
        let mut state = Self { dir: dir.to_owned(), identity, wg, numbers: Numbers::default(), _lock: lock };
        state.numbers = state.load(NUMBERS, |bytes| serde_json::from_slice(bytes).ok())?.unwrap_or_default();
        Ok(state)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn identity(&self) -> &SignKey {
        &self.identity
    }

    pub fn wg(&self) -> &WgSecret {
        &self.wg
    }

    /// The highest sequence number that may have been used: the next is above it.
    pub fn reserved_seq(&self) -> u64 {
        self.numbers.reserved_seq
    }

    /// Notes, before they are used, that sequence numbers up to this one may be. Never goes back.
    pub fn reserve_seq(&mut self, seq: u64) -> Result<(), StateError> {
        if seq <= self.numbers.reserved_seq {
            return Ok(());
        }
        self.store_numbers(Numbers { reserved_seq: seq, ..self.numbers.clone() })
    }

    /// The overlay IPv4 address of this node and when it was first taken (Unix milliseconds).
    pub fn claim(&self) -> Option<(Ipv4Addr, u64)> {
        self.numbers.overlay_v4.map(|claim| (claim.address, claim.claimed_at_ms))
    }

    pub fn set_claim(&mut self, claim: Option<(Ipv4Addr, u64)>) -> Result<(), StateError> {
        let overlay_v4 = claim.map(|(address, claimed_at_ms)| OverlayClaim { address, claimed_at_ms });
        if overlay_v4 == self.numbers.overlay_v4 {
            return Ok(());
        }
        self.store_numbers(Numbers { overlay_v4, ..self.numbers.clone() })
    }

    /// The UDP port that this node moved to, as long as the configured one is what it was then.
    pub fn moved_port(&self, configured: u16) -> Option<u16> {
        self.numbers.moved_port.filter(|moved| moved.configured == configured).map(|moved| moved.port)
    }

    pub fn set_moved_port(&mut self, configured: u16, port: u16) -> Result<(), StateError> {
        self.store_numbers(Numbers { moved_port: Some(MovedPort { configured, port }), ..self.numbers.clone() })
    }

    /// Since when each prefix is announced, and when that was stored (Unix milliseconds).
    pub fn announced(&self) -> (&BTreeMap<IpNet, u64>, u64) {
        (&self.numbers.announced.since_ms, self.numbers.announced.at_ms)
    }

    pub fn set_announced(&mut self, since_ms: BTreeMap<IpNet, u64>, at_ms: u64) -> Result<(), StateError> {
        let announced = Announced { since_ms, at_ms };
        self.store_numbers(Numbers { announced, ..self.numbers.clone() })
    }

    /// The sealed frames of the last time, byte for byte; whoever uses them verifies them as any frame.
    pub fn load_frames(&self) -> Result<Vec<Bytes>, StateError> {
        Ok(self.load(FRAMES, decode_frames)?.unwrap_or_default())
    }

    pub fn store_frames(&self, frames: &[Bytes]) -> Result<(), StateError> {
        self.store(FRAMES, &encode_frames(frames))
    }

    /// The highest sequence number seen of each node: nothing older is accepted again.
    pub fn load_marks(&self) -> Result<BTreeMap<NodeId, u64>, StateError> {
        let parse = |bytes: &[u8]| {
            let marks: BTreeMap<String, u64> = serde_json::from_slice(bytes).ok()?;
            marks.into_iter().map(|(node, seq)| Some((node.parse().ok()?, seq))).collect()
        };
        Ok(self.load(MARKS, parse)?.unwrap_or_default())
    }

    pub fn store_marks(&self, marks: &BTreeMap<NodeId, u64>) -> Result<(), StateError> {
        let marks: BTreeMap<String, u64> = marks.iter().map(|(node, seq)| (node.to_string(), *seq)).collect();
        self.store(MARKS, &to_json(&marks))
    }

    fn store_numbers(&mut self, numbers: Numbers) -> Result<(), StateError> {
        self.store(NUMBERS, &to_json(&numbers))?;
        self.numbers = numbers;
        Ok(())
    }

    fn store(&self, name: &'static str, bytes: &[u8]) -> Result<(), StateError> {
        let file = self.dir.join(name);
        durable::replace_keeping_previous(&file, bytes, FILE_MODE).map_err(|source| StateError::Io {
            file,
            doing: "written",
            source,
        })
    }

    /// The newest generation that can be parsed; `None` when there is none.
    fn load<T>(&self, name: &'static str, parse: impl Fn(&[u8]) -> Option<T>) -> Result<Option<T>, StateError> {
        let current = self.dir.join(name);
        let mut damaged = false;
        for file in [current.clone(), durable::previous(&current)] {
            let Some(bytes) = read_ours(&file)? else {
                continue;
            };
            match parse(&bytes) {
                Some(value) => {
                    if damaged {
                        tracing::warn!(file = %current.display(), "file is damaged, the generation before it is used");
                    }
                    return Ok(Some(value));
                }
                None => damaged = true,
            }
        }
        if damaged {
            tracing::warn!(file = %current.display(), "file is damaged and dropped, its content is learned again");
        }
        Ok(None)
    }
}

fn prepare_directory(dir: &Path) -> Result<(), StateError> {
    let failed = |source| StateError::Directory { dir: dir.to_owned(), source };
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let metadata = fs::metadata(dir).map_err(failed)?;
    if !metadata.is_dir() {
        return Err(failed(io::Error::from(io::ErrorKind::NotADirectory)));
    }
    check_owner(dir, &metadata)?;
    if metadata.mode() & 0o077 != 0 {
        fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(failed)?;
    }
    Ok(())
}

/// The public WireGuard key of the node of this directory; `None` where no node ever ran or its keys cannot be read.
pub fn wg_public(dir: &Path) -> Option<WgPublicKey> {
    load_identity(dir).ok().flatten().map(|(_, wg)| wg.public())
}

/// Keeps other agents out of the directory for as long as the file is open.
pub fn lock(dir: &Path) -> Result<File, StateError> {
    let file = dir.join(LOCK);
    let failed = |source| StateError::Io { file: file.clone(), doing: "locked", source };
    let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(FILE_MODE).clone();
    let mut lock = options.open(&file).map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // The number only helps to find the process: without it the message is still right.
            let _ = lock.read_to_string(&mut pid);
            return Err(StateError::InUse { dir: dir.to_owned(), pid: pid.trim().parse().ok() });
        }
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(failed)?;
    Ok(lock)
}

/// The identity on disk; `None` only when neither it nor any other file of ours is there.
fn load_identity(dir: &Path) -> Result<Option<(SignKey, WgSecret)>, StateError> {
    let file = dir.join(IDENTITY);
    let Some(bytes) = read_ours(&file)? else {
        for name in [NUMBERS, MARKS, FRAMES] {
            let kept = dir.join(name);
            if kept.exists() || durable::previous(&kept).exists() {
                return Err(StateError::IdentityMissing { dir: dir.to_owned(), file, found: name });
            }
        }
        return Ok(None);
    };
    let metadata =
        fs::metadata(&file).map_err(|source| StateError::Io { file: file.clone(), doing: "read", source })?;
    if metadata.mode() & 0o077 != 0 {
        return Err(StateError::Exposed { file, mode: metadata.mode() & 0o7777 });
    }
    IdentityFile::parse(&bytes).map(Some).map_err(|what| StateError::IdentityDamaged {
        dir: dir.to_owned(),
        file,
        what,
    })
}

fn make_identity(dir: &Path) -> Result<(SignKey, WgSecret), StateError> {
    let file = dir.join(IDENTITY);
    let failed = |source| StateError::Io { file: file.clone(), doing: "written", source };
    let (identity, wg) = (SignKey::from_seed(&*seed()?), WgSecret::from_seed(&*seed()?));
    durable::replace(&file, &IdentityFile::of(&identity, &wg).to_bytes(), FILE_MODE).map_err(failed)?;
    tracing::info!(node = %identity.node_id(), file = %file.display(), "made the identity of this node");
    Ok((identity, wg))
}

fn seed() -> Result<zeroize::Zeroizing<[u8; 32]>, StateError> {
    let mut seed = zeroize::Zeroizing::new([0; 32]);
    getrandom::fill(&mut *seed).map_err(|error| StateError::Io {
        file: "/dev/urandom".into(),
        doing: "read",
        source: io::Error::other(error),
    })?;
    Ok(seed)
}

/// The content of a file, if it is there; it has to be a plain file of this user.
fn read_ours(path: &Path) -> Result<Option<zeroize::Zeroizing<Vec<u8>>>, StateError> {
    let failed = |source| StateError::Io { file: path.to_owned(), doing: "read", source };
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let owner = fs::symlink_metadata(path).map_err(failed)?;
            check_owner(path, &owner)?;
            return Err(failed(error));
        }
        Err(error) => return Err(failed(error)),
    };
    let metadata = file.metadata().map_err(failed)?;
    check_owner(path, &metadata)?;
    if !metadata.is_file() {
        return Err(failed(io::Error::other("it is not a plain file")));
    }
    let mut bytes = zeroize::Zeroizing::new(Vec::new());
    file.take(MAX_FILE).read_to_end(&mut bytes).map_err(failed)?;
    Ok(Some(bytes))
}

fn check_owner(path: &Path, metadata: &fs::Metadata) -> Result<(), StateError> {
    let user = nix::unistd::geteuid().as_raw();
    if metadata.uid() == user {
        return Ok(());
    }
    Err(StateError::NotOurs { path: path.to_owned(), owner: metadata.uid(), user })
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("text and numbers always serialize")
}

struct Process<'a>(&'a Option<u32>);

impl std::fmt::Display for Process<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |pid| write!(f, " (process {pid})"))
    }
}

#[cfg(test)]
mod tests;
