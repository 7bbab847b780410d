//! How fast the tunnel to a peer is, measured by the two nodes themselves: TCP through the mesh, one way and then the other, and
//! the round trip meanwhile.
//!
//! [`service`] answers on every node, [`client`] measures; they speak the few bytes below. What a member could do with it: have
//! another one send as fast as it can, to itself and nobody else, for [`MAX_SECONDS`] each way. So a service serves one peer at a
//! time, rests for [`REST`] after each, and hears the mesh interface alone, where a source address is proof of the peer.

pub mod client;
pub mod service;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_proto::random::SplitMix64;
use nix::fcntl::{Flock, FlockArg};

/// TCP, on the mesh interface.
pub const PORT: u16 = 51873;
/// Each way.
pub const MAX_SECONDS: u8 = 10;
/// After each test of a peer: a member has at most as much of another's time as this leaves.
pub const REST: Duration = Duration::from_secs(10);
/// Both ways, and round trips around them.
const SESSION_LIMIT: Duration = Duration::from_secs(2 * MAX_SECONDS as u64 + 10);

const MAGIC: [u8; 4] = *b"MSPT";
const VERSION: u8 = 1;
/// What is sent at once.
const CHUNK: usize = 256 * 1024;
/// A round trip's mark.
const MARK: usize = 8;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// The test itself: lasts until it is closed, and sends back what it gets.
    Session,
    /// The client sends.
    Up,
    /// The service sends.
    Down,
}

/// The first bytes of a connection: magic, version, purpose, seconds, 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hello {
    purpose: Purpose,
    seconds: u8,
}

impl Hello {
    const LENGTH: usize = 8;

    fn to_bytes(self) -> [u8; Self::LENGTH] {
        let purpose = match self.purpose {
            Purpose::Session => 0,
            Purpose::Up => 1,
            Purpose::Down => 2,
        };
        let [a, b, c, d] = MAGIC;
        [a, b, c, d, VERSION, purpose, self.seconds, 0]
    }

    fn parse(bytes: &[u8; Self::LENGTH]) -> Option<Self> {
        let [a, b, c, d, VERSION, purpose, seconds, 0] = *bytes else { return None };
        let purpose = match purpose {
            0 => Purpose::Session,
            1 => Purpose::Up,
            2 => Purpose::Down,
            _ => return None,
        };
        ([a, b, c, d] == MAGIC && (1..=MAX_SECONDS).contains(&seconds)).then_some(Self { purpose, seconds })
    }
}

/// The answer to it: code, seconds to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reply {
    Go,
    /// Another test runs there.
    Busy,
    /// One ended a moment ago.
    Rests {
        seconds: u8,
    },
    /// Not in this order.
    Refused,
}

impl Reply {
    const LENGTH: usize = 2;

    fn to_bytes(self) -> [u8; Self::LENGTH] {
        match self {
            Self::Go => [0, 0],
            Self::Busy => [1, 0],
            Self::Rests { seconds } => [2, seconds],
            Self::Refused => [3, 0],
        }
    }

    fn parse([code, seconds]: [u8; Self::LENGTH]) -> Self {
        match code {
            0 => Self::Go,
            1 => Self::Busy,
            2 => Self::Rests { seconds },
            _ => Self::Refused,
        }
    }
}

/// Bytes that nothing on the way can make fewer.
fn filling() -> Vec<u8> {
    let mut random = SplitMix64::new(1);
    (0..CHUNK / 8).flat_map(|_| random.next_u64().to_le_bytes()).collect()
}

/// One test at a time on this node, whoever began it: held until it is dropped.
fn take_turn(lock: &Path) -> std::io::Result<Option<Flock<File>>> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(lock)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(turn) => Ok(Some(turn)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error.into()),
    }
}

/// The lock file of a node, beside the socket of its agent.
pub fn lock_file(socket: &Path) -> PathBuf {
    socket.with_file_name("speedtest.lock")
}

#[cfg(test)]
mod tests;
