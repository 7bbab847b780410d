//! Challenges for agents behind a proxy that ends TLS: how they are drawn, and for which names they are good.

use std::collections::BTreeSet;
use std::fmt;

use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

/// Draws challenges nobody can guess without the seed.
pub(super) struct Challenges {
    seed: Zeroizing<[u8; 32]>,
    drawn: u64,
}

impl Challenges {
    pub(super) fn new(seed: [u8; 32]) -> Self {
        Self { seed: Zeroizing::new(seed), drawn: 0 }
    }

    pub(super) fn draw(&mut self) -> [u8; 32] {
        self.drawn += 1;
        Sha256::new()
            .chain_update(b"meshspan/v1 challenge")
            .chain_update(*self.seed)
            .chain_update(self.drawn.to_le_bytes())
            .finalize()
            .into()
    }
}

impl fmt::Debug for Challenges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Challenges").field("drawn", &self.drawn).finish_non_exhaustive()
    }
}

/// Whether an agent that calls its server by this name means the one with these hosts.
pub(super) fn is_own_name(server_name: &str, own_names: &BTreeSet<String>) -> bool {
    let host = host_of(server_name);
    own_names.iter().any(|own| own.eq_ignore_ascii_case(host))
}

/// The host of `host:port`, `[v6]:port` or a bare host.
fn host_of(server_name: &str) -> &str {
    if let Some((host, _)) = server_name.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return host;
    }
    server_name.rsplit_once(':').map_or(server_name, |(host, _)| host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_differ_by_draw_and_by_seed_and_hide_the_seed() {
        let mut one = Challenges::new([123; 32]);
        assert_ne!(one.draw(), one.draw());
        assert_ne!(Challenges::new([1; 32]).draw(), Challenges::new([2; 32]).draw());
        assert!(!format!("{one:?}").contains("123"));
    }

    #[test]
    fn a_host_is_what_stands_before_the_port() {
        for (name, host) in [
            ("disc.example:7443", "disc.example"),
            ("disc.example", "disc.example"),
            ("[2001:db8::1]:7443", "2001:db8::1"),
            ("192.0.2.1:7443", "192.0.2.1"),
            ("", ""),
            ("[", "["),
        ] {
            assert_eq!(host_of(name), host);
        }
    }
}
