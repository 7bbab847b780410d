//! Where a peer can be reached: candidates, and which of them carries.

pub mod agent;
pub mod candidate;
pub mod replay;
pub mod score;
pub mod view;
