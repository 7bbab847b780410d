//! Small things of the host: the TUN device, forwarding, reverse path filters, uplinks.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ipnet::IpNet;

use super::Finding;
use crate::device::rp_filter_sysctl;

const TUN: &str = "/dev/net/tun";

pub(super) fn tun() -> Vec<Finding> {
    check_tun(Path::new(TUN))
}

fn check_tun(device: &Path) -> Vec<Finding> {
    if device.exists() {
        return Vec::new();
    }
    vec![Finding::problem(
        "tun",
        format!("{} is missing, so there can be no mesh link", device.display()),
        format!("modprobe tun, or pass the device into the container (--device {TUN})"),
    )]
}

/// Whether the kernel forwards, each IP version.
#[derive(Debug, Clone, Copy)]
pub(super) struct Forwarding {
    v4: bool,
    v6: bool,
}

pub(super) fn forwarding() -> Result<Forwarding, String> {
    let is_on = |file: &str| match fs::read_to_string(file) {
        Ok(text) => Ok(text.trim() != "0"),
        // No IPv6 here.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(format!("{file} cannot be read: {error}")),
    };
    Ok(Forwarding { v4: is_on("/proc/sys/net/ipv4/ip_forward")?, v6: is_on("/proc/sys/net/ipv6/conf/all/forwarding")? })
}

pub(super) fn check_forwarding(networks: &[IpNet], forwarding: Forwarding) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (is_on, is_v4, sysctl) in
        [(forwarding.v4, true, "net.ipv4.ip_forward"), (forwarding.v6, false, "net.ipv6.conf.all.forwarding")]
    {
        let behind = networks.iter().filter(|net| matches!(net, IpNet::V4(_)) == is_v4).map(ToString::to_string);
        let behind: Vec<String> = behind.collect();
        if !is_on && !behind.is_empty() {
            let what = format!("this node announces {} and does not forward ({sysctl} = 0)", behind.join(", "));
            findings.push(Finding::problem("forwarding", what, format!("sysctl -w {sysctl}=1")));
        }
    }
    findings
}

/// The reverse path filter in force for a link: the stricter of its own and the one for all. `None` = no such link.
pub(super) fn rp_filter(link: &str) -> Option<u8> {
    let read = |name: &str| -> Option<u8> {
        fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter")).ok()?.trim().parse().ok()
    };
    Some(read("all")?.max(read(link)?))
}

pub(super) fn check_rp_filter(link: &str, value: Option<u8>) -> Vec<Finding> {
    if value != Some(1) {
        return Vec::new();
    }
    vec![Finding::problem(
        "rp_filter",
        format!("the reverse path filter of {link} is strict (1): packets of peers may be dropped when they come in"),
        format!("sysctl -w {}=2, and see what sets it to 1 (/etc/sysctl.d)", rp_filter_sysctl(link)),
    )]
}

/// The link of the IPv4 default route.
pub(super) fn uplink_v4() -> Option<String> {
    let routes = fs::read_to_string("/proc/net/route").ok()?;
    let default = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        (columns.get(1) == Some(&"00000000") && columns.get(7) == Some(&"00000000")).then(|| columns[0].to_owned())
    };
    routes.lines().skip(1).find_map(default)
}

/// The link of the IPv6 default route.
pub(super) fn uplink_v6() -> Option<String> {
    let routes = fs::read_to_string("/proc/net/ipv6_route").ok()?;
    let default = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let is_default = columns.first()?.bytes().all(|digit| digit == b'0') && columns.get(1) == Some(&"00");
        // The kernel keeps an unreachable default of its own on lo.
        (is_default && *columns.last()? != "lo").then(|| (*columns.last().unwrap_or(&"")).to_owned())
    };
    routes.lines().find_map(default)
}

pub(super) fn link_indices() -> BTreeMap<String, u32> {
    let links = nix::net::if_::if_nameindex().into_iter().flat_map(|links| {
        let links: Vec<_> =
            links.iter().map(|link| (link.name().to_string_lossy().into_owned(), link.index())).collect();
        links
    });
    links.collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn networks_behind_a_node_that_does_not_forward_are_named() {
        let networks = ["10.244.1.0/24".parse().unwrap(), "fd00:10::/64".parse().unwrap()];
        assert!(check_forwarding(&networks, Forwarding { v4: true, v6: true }).is_empty());
        assert!(check_forwarding(&[], Forwarding { v4: false, v6: false }).is_empty());
        let found = check_forwarding(&networks, Forwarding { v4: false, v6: true });
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].what, "this node announces 10.244.1.0/24 and does not forward (net.ipv4.ip_forward = 0)");
        assert_eq!(found[0].fix, "sysctl -w net.ipv4.ip_forward=1");
        let found = check_forwarding(&networks, Forwarding { v4: true, v6: false });
        assert_eq!(found[0].fix, "sysctl -w net.ipv6.conf.all.forwarding=1");
    }

    #[test]
    fn only_a_strict_filter_is_a_finding() {
        for value in [None, Some(0), Some(2)] {
            assert!(check_rp_filter("mesh0", value).is_empty(), "{value:?}");
        }
        let found = check_rp_filter("mesh0", Some(1));
        assert!(found[0].fix.starts_with("sysctl -w net.ipv4.conf.mesh0.rp_filter=2"), "{found:?}");
        assert!(rp_filter("lo").is_some() && rp_filter("no-such-link").is_none());
    }

    #[test]
    fn a_missing_tun_device_is_a_finding() {
        assert!(check_tun(Path::new("/dev/null")).is_empty());
        let found = check_tun(Path::new("/dev/net/no-such-device"));
        assert!(found[0].fix.contains("modprobe tun"), "{found:?}");
    }
}
