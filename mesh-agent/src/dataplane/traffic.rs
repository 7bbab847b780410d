//! How many transport datagrams went over each path of a peer since control last asked.
//!
//! It lies beside the tunnel, behind the same lock, so counting costs the threads no lock of its own.

use mesh_proto::device::{Endpoint, PathTraffic};

/// Paths that are told apart between two reports. Authentic traffic from yet another one is a replay of an attacker on the
/// path, and goes uncounted.
const MAX_PATHS: usize = 8;

/// Holds a path only if it carried something.
#[derive(Debug, Default)]
pub(super) struct Traffic(Vec<PathTraffic>);

impl Traffic {
    pub(super) fn count_sent(&mut self, endpoint: Endpoint, datagrams: u64) {
        self.add(PathTraffic { endpoint, sent: datagrams, received: 0 });
    }

    pub(super) fn count_received(&mut self, endpoint: Endpoint, datagrams: u64) {
        self.add(PathTraffic { endpoint, sent: 0, received: datagrams });
    }

    pub(super) fn merge(&mut self, newer: Self) {
        newer.0.into_iter().for_each(|path| self.add(path));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn into_paths(self) -> Vec<PathTraffic> {
        self.0
    }

    fn add(&mut self, newer: PathTraffic) {
        if let Some(path) = self.0.iter_mut().find(|path| path.endpoint == newer.endpoint) {
            path.sent += newer.sent;
            path.received += newer.received;
        } else if self.0.len() < MAX_PATHS && newer.sent + newer.received > 0 {
            self.0.push(newer);
        }
    }
}
