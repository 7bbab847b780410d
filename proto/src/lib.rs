//! Every decision of the mesh, and no I/O: wire codecs, sealing, the discovery store and client, the relay, the mesh and path
//! state machines, and the seam to WireGuard.
//!
//! # The contract of every state machine
//!
//! - In: `handle_*(…, now)`. Out: `poll_transmit()`, `poll_event()`, `poll_timeout() -> Option<(Instant, &'static str)>`.
//! - The driver makes one mutation, drains every poll until it gives nothing, then waits for the earliest deadline, whose
//!   second half says in words what it is for. `handle_timeout(now)` is safe to call early.
//! - Time and randomness are arguments; `now` never goes back. Nothing here spawns, sleeps, locks, reads a clock, a file or
//!   the environment: `clippy.toml` bans it and the manifest has no runtime.
//! - Input from peers and servers costs a counter, never a panic and never an unbounded queue.
//! - Level-triggered: desired state is a pure function of configuration and facts; a difference gives ordered, idempotent
//!   actions; what we own and no longer want is removed; a failed action is a fact for the next tick, not an abort.

#![forbid(unsafe_code)]

pub mod device;
pub mod discovery;
#[doc(hidden)]
pub mod fuzz;
pub mod mesh;
pub mod net;
pub mod offload;
pub mod path;
pub mod random;
pub mod relay;
pub mod sealed;
pub mod wg;
pub mod wire;
