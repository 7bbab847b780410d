//! What a router really is, found out from behind it: a reflector with two addresses and two ports on the internet, and a
//! client whose sockets are its own. Knows neither the rules nor the programs under test.
//!
//! Filtering is probed from sockets that the client has never sent to, with a client socket that has sent to one address
//! and port only.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use super::{Filtering, Mapping};
use crate::Host;

/// Ports of the reflector, on each of its addresses.
pub const PORTS: [u16; 2] = [4001, 4002];
/// TCP ports that the reflector accepts on.
pub const TCP_PORTS: [u16; 3] = [80, 443, 7443];
/// An answer that takes longer does not come: the lab's wires delay by far less.
const ANSWER_WITHIN: Duration = Duration::from_millis(400);

/// What the answer shall come from, and 8 random bytes.
const QUESTION: usize = 9;
const FROM_HERE: u8 = b'h';
const FROM_OTHER_PORT: u8 = b'p';
const FROM_OTHER_ADDRESS: u8 = b'a';

/// What the packets said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class {
    pub mapping: Mapping,
    pub filtering: Filtering,
    pub keeps_port: bool,
}

/// Answers each datagram with the address that it came from. Ends when dropped.
#[derive(Debug)]
pub struct Reflector {
    addresses: [IpAddr; 2],
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<Result<()>>>,
    _tcp: Vec<TcpListener>,
}

impl Reflector {
    /// Starts on `host`, which owns both addresses.
    pub fn start(host: &Host, addresses: [IpAddr; 2]) -> Result<Self> {
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (sockets, tcp) = host.inside(|| {
            let mut sockets = Vec::new();
            for address in addresses {
                for port in PORTS {
                    sockets.push(UdpSocket::bind((address, port)).context("cannot reflect")?);
                }
            }
            let tcp = TCP_PORTS.iter().map(|port| Ok(TcpListener::bind((addresses[0], *port))?)).collect::<Result<_>>();
            Ok((sockets, tcp?))
        })?;
        let thread = host.start_inside({
            let stop = Arc::clone(&stop);
            move || reflect(&sockets, addresses, &stop)
        })?;
        Ok(Self { addresses, stop, thread: Some(thread), _tcp: tcp })
    }

    /// The class of what is between `host` and the reflector; `None` when UDP does not pass.
    pub fn classify(&self, host: &Host) -> Result<Option<Class>> {
        host.inside(|| {
            let Some((mapping, keeps_port)) = self.mapping()? else {
                return Ok(None);
            };
            Ok(Some(Class { mapping, filtering: self.filtering()?, keeps_port }))
        })
    }

    /// The outer address of a new socket of `host` on `local`, and the socket.
    pub fn outer(&self, host: &Host, local: u16) -> Result<(UdpSocket, SocketAddr)> {
        host.inside(|| {
            let socket = self.socket(local)?;
            let outer = ask(&socket, self.at(0, 0), FROM_HERE)?.context("no answer")?;
            Ok((socket, outer))
        })
    }

    /// How the reflector sees a socket now, at address and port by their index.
    pub fn seen(&self, socket: &UdpSocket, address: usize, port: usize) -> Result<Option<SocketAddr>> {
        ask(socket, self.at(address, port), FROM_HERE)
    }

    /// Can `host` connect to this TCP port?
    pub fn tcp_passes(&self, host: &Host, port: u16) -> Result<bool> {
        host.inside(|| Ok(TcpStream::connect_timeout(&(self.addresses[0], port).into(), ANSWER_WITHIN).is_ok()))
    }

    fn mapping(&self) -> Result<Option<(Mapping, bool)>> {
        let socket = self.socket(0)?;
        let Some(first) = ask(&socket, self.at(0, 0), FROM_HERE)? else {
            return Ok(None);
        };
        let other_port = ask(&socket, self.at(0, 1), FROM_HERE)?.context("no answer from the other port")?;
        let other_address = ask(&socket, self.at(1, 0), FROM_HERE)?.context("no answer from the other address")?;
        let mapping = if other_port != first {
            Mapping::AddressAndPortDependent
        } else if other_address != first {
            Mapping::AddressDependent
        } else {
            Mapping::EndpointIndependent
        };
        Ok(Some((mapping, first.port() == socket.local_addr()?.port())))
    }

    fn filtering(&self) -> Result<Filtering> {
        let passes = |from| -> Result<bool> {
            let socket = self.socket(0)?;
            Ok(ask(&socket, self.at(0, 0), from)?.is_some())
        };
        Ok(if passes(FROM_OTHER_ADDRESS)? {
            Filtering::EndpointIndependent
        } else if passes(FROM_OTHER_PORT)? {
            Filtering::AddressDependent
        } else {
            Filtering::AddressAndPortDependent
        })
    }

    fn at(&self, address: usize, port: usize) -> SocketAddr {
        (self.addresses[address], PORTS[port]).into()
    }

    fn socket(&self, port: u16) -> Result<UdpSocket> {
        let any: IpAddr = if self.addresses[0].is_ipv4() { [0u8; 4].into() } else { [0u8; 16].into() };
        Ok(UdpSocket::bind((any, port))?)
    }
}

impl Drop for Reflector {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Does a datagram from one socket, sent to the outer address of another behind the same router, arrive there, and from
/// the sender's outer address?
pub fn hairpins(reflector: &Reflector, host: &Host) -> Result<bool> {
    let (a, a_outer) = reflector.outer(host, 0)?;
    let (b, b_outer) = reflector.outer(host, 0)?;
    // Opens the other's filter, whatever it is.
    b.send_to(b"open", a_outer)?;
    a.send_to(b"through", b_outer)?;
    b.set_read_timeout(Some(ANSWER_WITHIN))?;
    let mut buffer = [0; 64];
    let start = Instant::now();
    while start.elapsed() < ANSWER_WITHIN {
        match b.recv_from(&mut buffer) {
            Ok((length, from)) if &buffer[..length] == b"through" => return Ok(from == a_outer),
            Ok(_) => {}
            Err(error) if is_silence(&error) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

/// The source address that the reflector saw, when its answer passes.
fn ask(socket: &UdpSocket, to: SocketAddr, from: u8) -> Result<Option<SocketAddr>> {
    let mut question = [from; QUESTION];
    getrandom::fill(&mut question[1..]).map_err(|error| anyhow::anyhow!("no randomness: {error}"))?;
    socket.send_to(&question, to)?;
    socket.set_read_timeout(Some(ANSWER_WITHIN))?;
    let mut buffer = [0; 128];
    let start = Instant::now();
    while start.elapsed() < ANSWER_WITHIN {
        match socket.recv(&mut buffer) {
            Ok(length) => {
                if let Some(text) = buffer[..length].strip_prefix(&question) {
                    return Ok(Some(std::str::from_utf8(text)?.parse()?));
                }
            }
            Err(error) if is_silence(&error) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

fn is_silence(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted | ErrorKind::ConnectionRefused
    )
}

fn reflect(sockets: &[UdpSocket], addresses: [IpAddr; 2], stop: &EventFd) -> Result<()> {
    let mut buffer = [0; 128];
    loop {
        let mut fds: Vec<PollFd<'_>> =
            sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        fds.push(PollFd::new(stop.as_fd(), PollFlags::POLLIN));
        poll(&mut fds, PollTimeout::NONE)?;
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        if ready[sockets.len()] {
            return Ok(());
        }
        for (socket, _) in sockets.iter().zip(ready).filter(|(_, ready)| *ready) {
            let (length, source) = socket.recv_from(&mut buffer)?;
            if length != QUESTION {
                continue;
            }
            let mut answer = buffer[..length].to_vec();
            answer.extend(source.to_string().as_bytes());
            let here = socket.local_addr()?.ip();
            // Sockets for one answer: nobody has ever sent to their ports.
            let result = match buffer[0] {
                FROM_OTHER_ADDRESS => {
                    let other = if here == addresses[0] { addresses[1] } else { addresses[0] };
                    UdpSocket::bind((other, 0))?.send_to(&answer, source)
                }
                FROM_OTHER_PORT => UdpSocket::bind((here, 0))?.send_to(&answer, source),
                _ => socket.send_to(&answer, source),
            };
            result.context("cannot answer")?;
        }
    }
}
