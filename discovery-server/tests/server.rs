//! The real binary on real sockets of 127.0.0.1, spoken to by the agent's own carriers.
#![allow(clippy::unwrap_used)]

mod server {
    mod hostile;
    mod keys;
    mod process;
    mod proxy;
    mod readme;
    mod relay;
    mod sessions;
    mod stun;
    mod support;
}

#[path = "../../mesh-agent/tests/readme/markdown.rs"]
mod markdown;
