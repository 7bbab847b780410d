//! The TUN device: the link that carries inner packets between the kernel and us.
//!
//! Makes the link and nothing else: addresses, MTU and `up` are netlink's business. Never persistent: the link dies with
//! its descriptor, so an agent that crashes leaves none. Never takes a link that is there already.

#![allow(unsafe_code)]

use std::ffi::c_short;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

use super::io::{MAX_BATCH, MAX_PACKET, Packed, PacketDevice};

const DEVICE: &str = "/dev/net/tun";

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

/// An open TUN device and its link.
#[derive(Debug)]
pub struct Tun {
    file: File,
    name: String,
    index: u32,
}

impl Tun {
    /// Makes a link. It is down and has no address.
    pub fn create(name: &str) -> Result<Self, TunError> {
        let name_fits = (1..libc::IFNAMSIZ).contains(&name.len()) && name != "." && name != "..";
        if !name_fits || name.bytes().any(|byte| byte.is_ascii_whitespace() || byte == 0 || b"/:%".contains(&byte)) {
            return Err(TunError::BadName { name: name.to_owned() });
        }
        let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(flags).open(DEVICE).map_err(|error| match error
                .kind()
            {
                ErrorKind::PermissionDenied => TunError::DeviceForbidden(error),
                _ => TunError::NoDevice(error),
            })?;
        attach(&file, name).map_err(|errno| match errno {
            Errno::EPERM | Errno::EACCES => TunError::NotPermitted { name: name.to_owned() },
            // EINVAL: a link of another kind has this name.
            Errno::EBUSY | Errno::EEXIST | Errno::EINVAL => TunError::Busy { name: name.to_owned() },
            errno => TunError::Failed { name: name.to_owned(), source: errno.into() },
        })?;
        let index =
            if_nametoindex(name).map_err(|errno| TunError::Failed { name: name.to_owned(), source: errno.into() })?;
        Ok(Self { file, name: name.to_owned(), index })
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
    fn read(&self, batch: &mut Packed<()>) -> io::Result<usize> {
        read_packets(&self.file, batch)
    }

    fn write(&self, batch: &Packed<()>) -> usize {
        write_packets(&self.file, batch)
    }
}

/// Reads one packet a call until there is none or the batch is full.
pub(super) fn read_packets(mut file: &File, batch: &mut Packed<()>) -> io::Result<usize> {
    let mut count = 0;
    while batch.len() < MAX_BATCH
        && let Some(spare) = batch.spare(MAX_PACKET)
    {
        match file.read(spare) {
            // A TUN device has no end of file; its double in tests has, when the link is deleted.
            Ok(0) if count == 0 => return Err(Errno::EBADFD.into()),
            Ok(0) => break,
            Ok(len) => {
                batch.push(len, ());
                count += 1;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock || count > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

pub(super) fn write_packets(mut file: &File, batch: &Packed<()>) -> usize {
    batch.iter().filter(|(packet, ())| file.write(packet).is_ok()).count()
}

/// Makes the link that `file` will be.
fn attach(file: &File, name: &str) -> Result<(), Errno> {
    // SAFETY: an all-zero ifreq is valid: it holds integers, arrays and pointers that are not followed.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_TUN_EXCL) as c_short;
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
            assert!(matches!(Tun::create(name), Err(TunError::BadName { .. })), "{name:?}");
        }
    }

    /// A link of the test's own, or why there is none.
    fn create(test: &str, name: &str) -> Option<Tun> {
        match Tun::create(name) {
            Ok(tun) => Some(tun),
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
        assert!(tun.read(&mut Packed::new(MAX_PACKET)).is_err(), "and told");
    }

    #[test]
    fn a_link_lives_as_long_as_its_descriptor_and_is_not_shared() {
        let name = format!("mstun{}", std::process::id() % 100_000);
        let Some(tun) = create("a_link_lives_as_long_as_its_descriptor_and_is_not_shared", &name) else { return };
        assert_eq!(if_nametoindex(&*name).unwrap(), tun.index());
        let second = Tun::create(&name).unwrap_err();
        assert!(matches!(second, TunError::Busy { .. }), "{second}");
        assert!(second.to_string().contains("mesh.interfaceName"), "{second}");
        assert_eq!(tun.read(&mut Packed::new(MAX_PACKET)).unwrap(), 0, "a new link has no packets");
        drop(tun);
        assert!(if_nametoindex(&*name).is_err(), "the link is gone");
    }
}
