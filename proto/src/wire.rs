//! Bytes on the wire, v1. `docs/wire.md` gives every byte; `tests/vectors/` holds them: a changed vector is a new version.

pub mod address;
pub mod codec;
pub mod demux;
pub mod frame;
pub mod probe;
pub mod record;
pub mod session;
pub mod stun;

/// The wire version this crate speaks.
pub const VERSION: u8 = 1;
