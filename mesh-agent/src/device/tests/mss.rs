//! The MSS clamp, seen by TCP segments that the kernel forwards in and out of the mesh link.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use mesh_proto::device::{Action, MssClamp, Route, RouteKind};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, poll};

use super::super::nft;
use super::lab::{Lab, NAME, in_namespace, tun};
use super::{apply_all, net};

const ROUTE_MTU: u16 = 1280;
const WIDE: u16 = 1460;

/// A SYN with an MSS option only. Forwarding does not look at the TCP checksum, the clamp corrects it by difference.
fn syn(from: IpAddr, to: IpAddr, mss: u16) -> Vec<u8> {
    let mut tcp = vec![0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x60, 0x02, 0xff, 0xff, 0, 0, 0, 0, 2, 4];
    tcp.extend(mss.to_be_bytes());
    let mut packet = Vec::new();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet.extend([0x45, 0, 0, 44, 0, 1, 0x40, 0, 64, 6, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
            let folded = (sum & 0xffff) + (sum >> 16);
            packet[10..12].copy_from_slice(&(!(u16::try_from(folded).unwrap())).to_be_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend([0x60, 0, 0, 0, 0, 24, 6, 64]);
            packet.extend(from.octets());
            packet.extend(to.octets());
        }
        _ => panic!("one family"),
    }
    packet.extend(tcp);
    packet
}

/// The MSS of the next TCP segment that the kernel sends to this TUN.
fn received_mss(tun: &mut File) -> u16 {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut packet = [0; 2048];
    loop {
        match tun.read(&mut packet) {
            Ok(length) => match packet[0] >> 4 {
                4 if packet[9] == 6 && length == 44 => return u16::from_be_bytes([packet[42], packet[43]]),
                6 if packet[6] == 6 && length == 64 => return u16::from_be_bytes([packet[62], packet[63]]),
                _ => {}
            },
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                assert!(Instant::now() < deadline, "no segment came");
                poll(&mut [PollFd::new(tun.as_fd(), PollFlags::POLLIN)], 100_u16).unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn non_blocking(tun: &File) {
    fcntl(tun.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
}

/// A router between pods at `pod0` and the mesh, with routes of a small MTU into the mesh.
async fn router(lab: &Lab) -> (super::HostDevice, File, File) {
    let (mut device, mesh) = lab.device_with_link().await;
    let routes = ["10.1.0.0/16", "fd00:2::/64"]
        .map(|prefix| Route { prefix: net(prefix), kind: RouteKind::Dev { mtu: Some(ROUTE_MTU), source: None } });
    apply_all(&mut device, &routes.into()).await;
    let pod = tun("pod0");
    lab.up("pod0").await;
    lab.add_address("pod0", "10.50.0.1/24").await;
    lab.add_address("pod0", "fd00:50::1/64").await;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
    non_blocking(&mesh);
    non_blocking(&pod);
    (device, mesh, pod)
}

#[test]
fn forwarded_connections_learn_the_mtu_of_the_route_in_both_directions() {
    in_namespace("forwarded_connections_learn_the_mtu", async |lab| {
        let (mut device, mut mesh, mut pod) = router(&lab).await;
        for (at_pod, remote, headers) in [("10.50.0.2", "10.1.2.3", 40), ("fd00:50::2", "fd00:2::3", 60)] {
            let (at_pod, remote): (IpAddr, IpAddr) = (at_pod.parse().unwrap(), remote.parse().unwrap());
            for (clamped, out, back) in [
                (true, ROUTE_MTU - headers, ROUTE_MTU - headers),
                (false, WIDE, WIDE),
                (true, ROUTE_MTU - headers, ROUTE_MTU - headers),
            ] {
                device.apply(if clamped { &Action::SetMssClamp } else { &Action::RemoveMssClamp }).await.unwrap();
                pod.write_all(&syn(at_pod, remote, WIDE)).unwrap();
                assert_eq!(received_mss(&mut mesh), out, "{at_pod} to {remote}, clamped: {clamped}");
                mesh.write_all(&syn(remote, at_pod, WIDE)).unwrap();
                assert_eq!(received_mss(&mut pod), back, "{remote} to {at_pod}, clamped: {clamped}");
            }
            pod.write_all(&syn(at_pod, remote, 500)).unwrap();
            assert_eq!(received_mss(&mut mesh), 500, "a smaller one stays");
        }
    });
}

#[test]
fn damage_to_the_clamp_is_seen_and_tables_of_others_stay() {
    in_namespace("damage_to_the_clamp_is_seen", async |lab| {
        let mut device = lab.device();
        let state = async |device: &mut super::HostDevice| device.observe().await.unwrap().mss_clamp;
        nft::lab::make_table("others");
        let before = nft::lab::tables();
        assert_eq!(state(&mut device).await, MssClamp::Absent);
        for _ in 0..2 {
            device.apply(&Action::SetMssClamp).await.unwrap();
            assert_eq!(state(&mut device).await, MssClamp::Present);
            assert_eq!(nft::lab::tables().len(), 2);
        }
        nft::lab::flush();
        assert_eq!(state(&mut device).await, MssClamp::Absent, "rules were flushed");
        device.apply(&Action::SetMssClamp).await.unwrap();
        assert_eq!(state(&mut device).await, MssClamp::Present);
        let mut renamed = super::HostDevice::new("other0", lab.state.path()).unwrap();
        assert_eq!(state(&mut renamed).await, MssClamp::Absent, "rules of another link name");
        for _ in 0..2 {
            device.apply(&Action::RemoveMssClamp).await.unwrap();
            assert_eq!(state(&mut device).await, MssClamp::Absent);
            assert_eq!(nft::lab::tables(), before);
        }
        assert!(lab.link(NAME).await.is_none());
    });
}
