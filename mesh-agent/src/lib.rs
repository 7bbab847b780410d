//!
pub mod device;
