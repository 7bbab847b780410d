//! The TUN device: the link that carries inner packets between the kernel and us.
//!
//! Before each packet stands a [`VnetHeader`], so that the kernel can hand over super-packets and take them: it is asked for
//! checksums, TCP and UDP, then for less, and what it grants is [`Tun::offloads`].
//!
//! Makes the link and nothing else: addresses, MTU and `up` are netlink's business. Never persistent: the link dies with
//! its descriptor, so an agent that crashes leaves none. Never takes a link that is there already.

#![allow(unsafe_code)]

use std::ffi::c_short;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use mesh_proto::offload::VnetHeader;
use mesh_proto::offload::coalesce::MAX_SEGMENTS;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

use super::io::{MAX_BATCH, MAX_PACKET, Packed, PacketDevice, Ready};
use super::offloads::DeviceOffloads;

const DEVICE: &str = "/dev/net/tun";
/// What a read may give.
pub(super) const MAX_READ: usize = VnetHeader::LEN + MAX_PACKET;

const CHECKSUMS: libc::c_uint = libc::TUN_F_CSUM;
const TCP: libc::c_uint = libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
const UDP: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// A link that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    #[error(
        "{DEVICE} is missing ({0}): run `modprobe tun`, or pass the device into the container (`--device {DEVICE}`)"
    )]
    NoDevice(#[source] io::Error),
    #[error(
        "{DEVICE} may not be opened ({0}): run as root, or pass the device into the container (`--device {DEVICE}`)"
    )]
    DeviceForbidden(#[source] io::Error),
    #[error("no permission to make link {name}: run as root or give the agent CAP_NET_ADMIN")]
    NotPermitted { name: String },
    #[error("link {name} exists already: another agent holds it; stop that one or set mesh.interfaceName")]
    Busy { name: String },
    #[error(
        "link name {name:?} is not usable: 1 to 15 bytes without white space, `/`, `:` and `%`; set mesh.interfaceName"
    )]
    BadName { name: String },
    #[error("link {name} could not be made")]
    Failed {
        name: String,
        #[source]
        source: io::Error,
    },
}

/// A queue of a TUN device, and the link that lives as long as one of its queues.
#[derive(Debug)]
pub struct Tun {
    file: File,
    name: String,
    index: u32,
    offloads: DeviceOffloads,
}

impl Tun {
    /// Makes a link with so many queues, one at least. It is down and has no address.
    ///
    /// With several the kernel gives each flow to one of them, and to the one by which its other direction came in: a flow
    /// may change the queue with its first answer.
    pub fn create(name: &str, queues: usize) -> Result<Vec<Self>, TunError> {
        let name_fits = (1..libc::IFNAMSIZ).contains(&name.len()) && name != "." && name != "..";
        if !name_fits || name.bytes().any(|byte| byte.is_ascii_whitespace() || byte == 0 || b"/:%".contains(&byte)) {
            return Err(TunError::BadName { name: name.to_owned() });
        }
        let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let first = Self::open(name, libc::IFF_TUN_EXCL | several)?;
        let mut all = vec![first];
        for _ in 1..queues {
            all.push(Self::open(name, several)?);
        }
        Ok(all)
    }

    fn open(name: &str, more_flags: libc::c_int) -> Result<Self, TunError> {
        let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(flags).open(DEVICE).map_err(|error| match error
                .kind()
            {
                ErrorKind::PermissionDenied => TunError::DeviceForbidden(error),
                _ => TunError::NoDevice(error),
            })?;
        attach(&file, name, more_flags).map_err(|errno| match errno {
            Errno::EPERM | Errno::EACCES => TunError::NotPermitted { name: name.to_owned() },
            // EINVAL: a link of another kind has this name.
            Errno::EBUSY | Errno::EEXIST | Errno::EINVAL => TunError::Busy { name: name.to_owned() },
            errno => TunError::Failed { name: name.to_owned(), source: errno.into() },
        })?;
        let index =
            if_nametoindex(name).map_err(|errno| TunError::Failed { name: name.to_owned(), source: errno.into() })?;
        let offloads = ask_offloads(&file);
        Ok(Self { file, name: name.to_owned(), index, offloads })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The link's index when it was made.
    pub fn index(&self) -> u32 {
        self.index
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl PacketDevice for Tun {
    fn read(&self, batch: &mut Packed<VnetHeader>) -> io::Result<Ready> {
        read_packets(&self.file, batch)
    }

    fn write(&self, header: VnetHeader, parts: &[IoSlice<'_>]) -> bool {
        write_packet(&self.file, header, parts)
    }

    fn offloads(&self) -> DeviceOffloads {
        self.offloads
    }
}

/// Reads one packet a call until there is none or the batch is full.
pub(super) fn read_packets(mut file: &File, batch: &mut Packed<VnetHeader>) -> io::Result<Ready> {
    while batch.len() < MAX_BATCH
        && let Some(spare) = batch.spare(MAX_READ)
    {
        let read = file.read(spare).map(|len| (len, spare.first_chunk().map(VnetHeader::parse).unwrap_or_default()));
        match read {
            // A TUN device has no end of file; its double in tests has, when the link is deleted.
            Ok((0, _)) if batch.is_empty() => return Err(Errno::EBADFD.into()),
            Ok((0, _)) => return Ok(Ready::Drained),
            Ok((len, header)) => batch.push_from(VnetHeader::LEN, len, header),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Ready::Drained),
            // Told by the next read again.
            Err(_) if !batch.is_empty() => return Ok(Ready::More),
            Err(error) => return Err(error),
        }
    }
    Ok(Ready::More)
}

pub(super) fn write_packet(mut file: &File, header: VnetHeader, parts: &[IoSlice<'_>]) -> bool {
    let header = header.to_bytes();
    let mut blocks = [IoSlice::new(&header); MAX_SEGMENTS + 2];
    let Some(slots) = blocks.get_mut(1..=parts.len()) else { return false };
    slots.copy_from_slice(parts);
    file.write_vectored(&blocks[..=parts.len()]).is_ok()
}

/// Asks for as much as the kernel has: all, then without UDP (before Linux 6.2), then nothing.
fn ask_offloads(file: &File) -> DeviceOffloads {
    let ask = |flags: libc::c_uint| {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(flags)) };
        Errno::result(result).is_ok()
    };
    let tcp_and_udp = ask(CHECKSUMS | TCP | UDP);
    DeviceOffloads { tcp: tcp_and_udp || ask(CHECKSUMS | TCP), udp: tcp_and_udp }
}

/// Makes the link that `file` will be, or the queue of it.
fn attach(file: &File, name: &str, more_flags: libc::c_int) -> Result<(), Errno> {
    // SAFETY: an all-zero ifreq is valid: it holds integers, arrays and pointers that are not followed.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more_flags) as c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is, and keeps no reference to it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    #[test]
    fn unusable_names_are_refused_before_any_system_call() {
        for name in ["", "sixteen-bytes-16", "a b", "a/b", "mesh%d", "a:b", ".", ".."] {
            assert!(matches!(Tun::create(name, 1), Err(TunError::BadName { .. })), "{name:?}");
        }
    }

    /// A link of the test's own, or why there is none.
    fn create(test: &str, name: &str) -> Option<Tun> {
        create_queues(test, name, 1)?.pop()
    }

    fn create_queues(test: &str, name: &str, queues: usize) -> Option<Vec<Tun>> {
        match Tun::create(name, queues) {
            Ok(queues) => Some(queues),
            Err(error @ (TunError::NoDevice(_) | TunError::DeviceForbidden(_) | TunError::NotPermitted { .. })) => {
                assert!(std::env::var_os("MESHSPAN_STRICT").is_none_or(|strict| strict != "1"), "{error}");
                println!("SKIPPED {test}: sudo -E cargo test -p mesh-agent ({error})");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_deleted_link_ends_reading() {
        let name = format!("msdel{}", std::process::id() % 100_000);
        let Some(tun) = create("a_deleted_link_ends_reading", &name) else { return };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            tokio::spawn(connection);
            handle.link().del(tun.index()).execute().await.unwrap();
        });
        let mut polled = [PollFd::new(tun.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut polled, PollTimeout::from(5000u16)).unwrap(), 1, "whoever waits is woken");
        assert!(tun.read(&mut Packed::new(MAX_READ)).is_err(), "and told");
    }

    #[test]
    fn a_link_lives_as_long_as_its_descriptor_and_is_not_shared() {
        let name = format!("mstun{}", std::process::id() % 100_000);
        let Some(tun) = create("a_link_lives_as_long_as_its_descriptor_and_is_not_shared", &name) else { return };
        assert_eq!(if_nametoindex(&*name).unwrap(), tun.index());
        let second = Tun::create(&name, 1).unwrap_err();
        assert!(matches!(second, TunError::Busy { .. }), "{second}");
        assert!(second.to_string().contains("mesh.interfaceName"), "{second}");
        let mut batch = Packed::new(MAX_READ);
        assert_eq!(tun.read(&mut batch).unwrap(), Ready::Drained);
        assert!(batch.is_empty(), "a new link has no packets");
        drop(tun);
        assert!(if_nametoindex(&*name).is_err(), "the link is gone");
    }

    #[test]
    fn all_queues_are_of_one_link_which_ends_with_the_last() {
        let name = format!("msqueue{}", std::process::id() % 100_000);
        let test = "all_queues_are_of_one_link_which_ends_with_the_last";
        let Some(mut queues) = create_queues(test, &name, 3) else { return };
        let index = if_nametoindex(&*name).unwrap();
        assert_eq!(queues.iter().map(Tun::index).collect::<Vec<_>>(), [index; 3]);
        assert!(queues.iter().all(|queue| queue.offloads() == queues[0].offloads()));
        let second = Tun::create(&name, 3).unwrap_err();
        assert!(matches!(second, TunError::Busy { .. }), "{second}");
        queues.truncate(1);
        assert!(if_nametoindex(&*name).is_ok(), "one is left");
        queues.clear();
        assert!(if_nametoindex(&*name).is_err(), "the link is gone");
    }
}
