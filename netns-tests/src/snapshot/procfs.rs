//! Sockets, processes and network switches, from /proc, of the calling thread's namespace.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::MetadataExt,
};

use anyhow::{Context, Result};

use super::{Kind, Snapshot};

/// A TCP state that no process owns any more.
const TIME_WAIT: &str = "06";

pub(super) fn dump(snapshot: &mut Snapshot, netns: u64) -> Result<()> {
    for protocol in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6"] {
        // raw6 and others are missing only where the kernel lacks the protocol.
        let Ok(table) = read_net(protocol) else {
            continue;
        };
        for line in table.lines().skip(1) {
            if let Some(text) = inet_socket(protocol, line) {
                snapshot.add(Kind::Socket, text);
            }
        }
    }
    for line in read_net("packet")?.lines().skip(1) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let [_, _, kind, protocol, interface, ..] = fields[..] {
            snapshot.add(Kind::Socket, format!("packet type {kind} protocol {protocol} interface {interface}"));
        }
    }
    for line in read_net("unix")?.lines().skip(1) {
        if let Some(path) = line.split_whitespace().nth(7) {
            snapshot.add(Kind::UnixSocket, path);
        }
    }
    processes(snapshot, netns)?;
    switches(snapshot)
}

/// /proc/net would show the namespace of the process, not of this thread.
fn read_net(table: &str) -> Result<String> {
    let path = format!("/proc/thread-self/net/{table}");
    fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
}

fn inet_socket(protocol: &str, line: &str) -> Option<String> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [_, local, remote, state, ..] = fields[..] else {
        return None;
    };
    if protocol.starts_with("tcp") && state == TIME_WAIT {
        return None;
    }
    Some(format!("{protocol} {} -> {} state {state}", endpoint(local)?, endpoint(remote)?))
}

/// `0100007F:1F90`: the address in words of host byte order, the port in plain hex.
fn endpoint(text: &str) -> Option<String> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::new();
    for start in (0..address.len()).step_by(8) {
        bytes.extend(u32::from_str_radix(address.get(start..start + 8)?, 16).ok()?.to_ne_bytes());
    }
    let ip: IpAddr = match bytes.len() {
        4 => Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into(),
        16 => Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into(),
        _ => return None,
    };
    Some(format!("{ip} port {port}"))
}

fn processes(snapshot: &mut Snapshot, netns: u64) -> Result<()> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // A process that ends meanwhile is not there.
        let lives_here = fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|namespace| namespace.ino() == netns);
        if lives_here && let Ok(argv) = fs::read(format!("/proc/{pid}/cmdline")) {
            snapshot.add(Kind::Process, String::from_utf8_lossy(&argv).trim_end_matches('\0').replace('\0', " "));
        }
    }
    Ok(())
}

/// Switches that an agent may change on other links.
fn switches(snapshot: &mut Snapshot) -> Result<()> {
    let mut keys = vec!["ipv4/ip_forward".to_owned()];
    for (family, switch) in [
        ("ipv4", "rp_filter"),
        ("ipv4", "forwarding"),
        ("ipv4", "src_valid_mark"),
        ("ipv6", "forwarding"),
        ("ipv6", "disable_ipv6"),
    ] {
        for link in fs::read_dir(format!("/proc/sys/net/{family}/conf"))?.flatten() {
            keys.push(format!("{family}/conf/{}/{switch}", link.file_name().to_string_lossy()));
        }
    }
    for key in keys {
        if let Ok(value) = fs::read_to_string(format!("/proc/sys/net/{key}")) {
            snapshot.add(Kind::Sysctl, format!("{key} = {}", value.trim()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn socket_lines_read_as_addresses() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1";
        assert_eq!(inet_socket("tcp", line).unwrap(), "tcp 127.0.0.1 port 8080 -> 0.0.0.0 port 0 state 0A");
        assert_eq!(inet_socket("tcp", &line.replace(" 0A ", " 06 ")), None);
        assert_eq!(endpoint("00000000000000000000000001000000:0035").unwrap(), "::1 port 53");
    }
}
