//! What a mesh must do, each as one function that sends packets through the kernel and judges from outside the agents.
//!
//! `Ok(detail)` is a pass in words; an error says what was seen instead. All take a formed [`crate::Mesh`]; those of
//! [`faults`] leave it formed again when they pass, but for the server, as each says.

pub mod carry;
pub mod cold_start;
pub mod faults;
pub mod life;
pub mod traces;

use std::time::Duration;

/// Pace of echo requests.
pub(crate) const EVERY: Duration = Duration::from_millis(20);
/// A mesh that is up answers within this, first handshakes and one lost packet with its retry included.
pub(crate) const REPLY_WITHIN: Duration = Duration::from_secs(10);
/// What someone else deleted is back within this (DESIGN.md 6 and 8).
pub(crate) const RESTORED_WITHIN: Duration = Duration::from_secs(2);
