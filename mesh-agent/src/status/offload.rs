//! What the kernel does for the userspace data plane in whole super-packets.

use serde::{Deserialize, Serialize};

/// Each is a step that is done without where the kernel lacks it: packets then go one by one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffloadStatus {
    /// The mesh link hands over and takes TCP super-packets, and leaves checksums to the agent.
    pub tun_tcp: bool,
    /// The same for UDP (Linux 6.2).
    pub tun_udp: bool,
    /// Many datagrams leave by one send (UDP_SEGMENT); off where the underlay's device refused it.
    pub udp_send: bool,
    /// Many datagrams arrive in one receive (UDP_GRO).
    pub udp_receive: bool,
}

impl OffloadStatus {
    /// What is in use, and what is not.
    pub(super) fn words(self) -> String {
        let all = [
            (self.tun_tcp, "TUN TCP"),
            (self.tun_udp, "TUN UDP"),
            (self.udp_send, "UDP send"),
            (self.udp_receive, "UDP receive"),
        ];
        let named = |wanted| {
            let named: Vec<&str> = all.iter().filter(|(is_on, _)| *is_on == wanted).map(|(_, name)| *name).collect();
            named.join(", ")
        };
        match (named(true), named(false)) {
            (on, off) if off.is_empty() => on,
            (on, off) if on.is_empty() => format!("none (the kernel lacks {off})"),
            (on, off) => format!("{on} (the kernel lacks {off})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let all = OffloadStatus { tun_tcp: true, tun_udp: true, udp_send: true, udp_receive: true };
        assert_eq!(all.words(), "TUN TCP, TUN UDP, UDP send, UDP receive");
        let old = OffloadStatus { tun_udp: false, ..all };
        assert_eq!(old.words(), "TUN TCP, UDP send, UDP receive (the kernel lacks TUN UDP)");
        assert!(OffloadStatus::default().words().starts_with("none (the kernel lacks TUN TCP,"));
    }
}
