//! Who holds the UDP port that WireGuard is to have.

use std::path::Path;
use std::{fs, io};

use super::Finding;

/// A socket on the port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    /// Process id and name; `None` when it is nobody's that we may see, or the kernel's own.
    process: Option<(u32, String)>,
    is_kernel: bool,
}

/// The sockets on a UDP port, in both families.
pub(super) fn users(port: u16) -> io::Result<Vec<User>> {
    let mut inodes = Vec::new();
    for file in ["/proc/net/udp", "/proc/net/udp6"] {
        match fs::read_to_string(file) {
            Ok(text) => inodes.extend(sockets(&text, port)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let mut users: Vec<User> = Vec::new();
    for inode in inodes {
        let user = User { process: process(inode), is_kernel: inode == 0 };
        if !users.contains(&user) {
            users.push(user);
        }
    }
    Ok(users)
}

pub(super) fn check(port: u16, users: &[User]) -> Vec<Finding> {
    let finding = |user: &User| {
        let who = match &user.process {
            Some((pid, name)) => format!("process {pid} ({name})"),
            None if user.is_kernel => "the kernel, most likely for a WireGuard interface".to_owned(),
            None => "a process of another user".to_owned(),
        };
        Finding::problem(
            "port",
            format!("UDP port {port} is in use by {who}, so the agent cannot have it"),
            "stop it, or set mesh.listenPort to a free port",
        )
    };
    users.iter().map(finding).collect()
}

/// Inodes of the sockets bound to the port, from the kernel's list of one family.
fn sockets(list: &str, port: u16) -> Vec<u64> {
    let inode = |line: &str| {
        let mut columns = line.split_whitespace();
        let (_, bound) = columns.nth(1)?.rsplit_once(':')?;
        let inode = columns.nth(7)?.parse().ok()?;
        (u16::from_str_radix(bound, 16).ok()? == port).then_some(inode)
    };
    list.lines().skip(1).filter_map(inode).collect()
}

fn process(inode: u64) -> Option<(u32, String)> {
    let wanted = format!("socket:[{inode}]");
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find_map(|pid: u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let holds = files.flatten().any(|file| fs::read_link(file.path()).is_ok_and(|to| to == Path::new(&wanted)));
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        holds.then(|| (pid, name.trim().to_owned()))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn the_process_that_holds_the_port_is_named() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let found = check(port, &users(port).unwrap());
        assert_eq!(found.len(), 1);
        let own = format!("UDP port {port} is in use by process {} (", std::process::id());
        assert!(found[0].what.starts_with(&own), "{found:?}");
        drop(socket);
        assert!(check(port, &users(port).unwrap()).is_empty());
    }

    #[test]
    fn a_socket_of_the_kernel_has_no_process() {
        let list = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n \
                    4810: 00000000:CAA0 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 0 2 0 0\n";
        assert_eq!(sockets(list, 51872), [0]);
        assert!(sockets(list, 51873).is_empty());
        let found = check(51872, &[User { process: None, is_kernel: true }]);
        assert!(found[0].what.contains("the kernel, most likely for a WireGuard interface"), "{found:?}");
    }
}
