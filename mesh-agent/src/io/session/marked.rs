//! Sockets with the mark of our own traffic.

use std::io;
use std::net::SocketAddr;
use std::sync::Once;

use mesh_common::limits::FWMARK;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tracing::warn;

const RECEIVE_BUFFER: usize = 1 << 20;
/// What the kernel takes of a TCP connection beyond what is in flight.
const UNSENT: u32 = 32 * 1024;

/// A UDP socket on a free port of this family.
pub(super) fn udp(local: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    mark(&socket);
    if local.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // Bursts of relayed datagrams; net.core.rmem_max may allow less, and then it is no error.
    let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
    socket.bind(&local.into())?;
    Ok(socket.into())
}

/// A TCP connection.
pub(super) async fn connect(to: SocketAddr) -> io::Result<tokio::net::TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    mark(&socket);
    let stream = tokio::net::TcpSocket::from_std_stream(socket.into()).connect(to).await?;
    // Without it small messages wait for acknowledgements, and without the other whatever the kernel takes on a slow line waits
    // before them; a socket that refuses works all the same.
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT);
    Ok(stream)
}

fn mark(socket: &Socket) {
    static REFUSED: Once = Once::new();
    if let Err(error) = socket.set_mark(FWMARK) {
        REFUSED.call_once(|| {
            warn!(%error, "cannot mark own sockets (mark {FWMARK:#x}): a discovery server on a node of the mesh may be out of reach; grant CAP_NET_ADMIN");
        });
    }
}
