//!
pub mod io;
