//! Which work the kernel does in whole super-packets; for `status`, and for the threads to know what they may hand over.

use mesh_proto::offload::coalesce::Accepts;

/// What the TUN device was granted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceOffloads {
    /// Packets come with checksums to complete and TCP super-packets to cut, and may go joined.
    pub tcp: bool,
    /// The same for UDP (Linux 6.2).
    pub udp: bool,
}

impl DeviceOffloads {
    pub(super) fn accepts(self) -> Accepts {
        Accepts { tcp: self.tcp, udp: self.udp }
    }
}

/// What the main socket pair was granted. False where no socket has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SocketOffloads {
    /// Many datagrams leave by one send (UDP_SEGMENT).
    pub segmentation: bool,
    /// Many datagrams arrive in one receive (UDP_GRO).
    pub receive: bool,
}

/// All that is in use now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    pub device: DeviceOffloads,
    pub socket: SocketOffloads,
}
