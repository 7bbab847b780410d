//! A network namespace with one underlay link, and what tests do to it behind the agent's back.

use std::fs::{self, File};
use std::future::Future;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags};
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::{Handle, IpVersion, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::super::link::{self, HostLink};
use super::super::{HostDevice, Netlink, collect, nft};

/// The name of the mesh link in all tests.
pub(super) const NAME: &str = "mesh0";

/// Runs a test body in a fresh network namespace on a thread that ends with it.
pub(super) fn in_namespace<F: Future<Output = ()>>(name: &'static str, body: impl FnOnce(Lab) -> F + Send + 'static) {
    if !nix::unistd::Uid::effective().is_root() {
        assert!(std::env::var_os("MESHSPAN_STRICT").is_none_or(|strict| strict != "1"), "{name}: run as root");
        eprintln!("SKIPPED {name}: run as root");
        return;
    }
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let lab = Lab::new().await;
            tokio::time::timeout(Duration::from_secs(60), body(lab)).await.expect("the test ends in a minute");
        });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

pub(super) struct Lab {
    pub(super) state: tempfile::TempDir,
    netlink: Netlink,
}

impl Lab {
    /// Loopback up, one underlay link `eth0` (a veth) with addresses and a default route in each family.
    async fn new() -> Self {
        let lab = Self { state: tempfile::tempdir().unwrap(), netlink: Netlink::open().unwrap() };
        let handle = lab.handle();
        handle.link().add(LinkVeth::new("eth0", "wire0").build()).execute().await.unwrap();
        for name in ["wire0", "eth0"] {
            // Link-local addresses would come in their own time, in the middle of a comparison.
            handle.link().change(link::without_link_local(lab.index(name).await)).execute().await.unwrap();
        }
        for name in ["lo", "wire0", "eth0"] {
            lab.up(name).await;
        }
        for net in ["192.0.2.10/24", "2001:db8::10/64"] {
            lab.add_address("eth0", net).await;
        }
        let gateway = RouteMessageBuilder::<std::net::Ipv4Addr>::new().gateway("192.0.2.1".parse().unwrap()).build();
        handle.route().add(gateway).execute().await.unwrap();
        let gateway = RouteMessageBuilder::<std::net::Ipv6Addr>::new().gateway("2001:db8::1".parse().unwrap()).build();
        handle.route().add(gateway).execute().await.unwrap();
        // The kernel finishes an IPv6 address in the background.
        while lab.decision("2001:db8::10", 0).await != Ok(255) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        lab
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.netlink.handle
    }

    pub(super) fn device(&self) -> HostDevice {
        HostDevice::new(NAME, self.state.path()).unwrap()
    }

    /// A device with its link made and known, as the data plane does it.
    pub(super) async fn device_with_link(&self) -> (HostDevice, File) {
        let tun = tun(NAME);
        let mut device = self.device();
        device.set_link(Some(self.index(NAME).await), 51872);
        (device, tun)
    }

    pub(super) async fn link(&self, name: &str) -> Option<HostLink> {
        link::dump(self.handle()).await.unwrap().into_iter().find(|link| link.name == name)
    }

    pub(super) async fn index(&self, name: &str) -> u32 {
        self.link(name).await.unwrap().index
    }

    pub(super) async fn up(&self, name: &str) {
        let message = LinkUnspec::new_with_index(self.index(name).await).up().build();
        self.handle().link().change(message).execute().await.unwrap();
    }

    pub(super) async fn down(&self, name: &str) {
        let mut message = LinkMessage::default();
        message.header.index = self.index(name).await;
        message.header.change_mask = LinkFlags::Up;
        self.handle().link().change(message).execute().await.unwrap();
    }

    pub(super) async fn delete_link(&self, name: &str) {
        self.handle().link().del(self.index(name).await).execute().await.unwrap();
    }

    pub(super) async fn add_address(&self, link: &str, net: &str) {
        let net: IpNet = net.parse().unwrap();
        let mut request = self.handle().address().add(self.index(link).await, net.addr(), net.prefix_len());
        if net.addr().is_ipv6() {
            let nodad = AddressFlags::Nodad;
            request.message_mut().attributes.push(AddressAttribute::Flags(nodad));
        }
        request.execute().await.unwrap();
    }

    pub(super) fn set_sysctl(&self, key: &str, value: u8) {
        fs::write(format!("/proc/sys/net/ipv4/conf/{key}/rp_filter"), value.to_string()).unwrap();
    }

    pub(super) fn sysctl(&self, key: &str) -> u8 {
        fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{key}/rp_filter")).unwrap().trim().parse().unwrap()
    }

    /// Where the kernel would send a packet: the table that decides, or the error number.
    pub(super) async fn decision(&self, to: &str, mark: u32) -> Result<u32, i32> {
        let to: IpAddr = to.parse().unwrap();
        let mut message = RouteMessage::default();
        message.header.address_family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.destination_prefix_length = if to.is_ipv4() { 32 } else { 128 };
        // IPv6 always answers with the table and refuses the flag.
        if to.is_ipv4() {
            message.header.flags = RouteFlags::LookupTable;
        }
        message.attributes.push(RouteAttribute::Destination(to.into()));
        message.attributes.push(RouteAttribute::Mark(mark));
        match collect(self.handle().route().get(message).execute()).await {
            Ok(routes) => Ok(routes[0]
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    RouteAttribute::Table(table) => Some(*table),
                    _ => None,
                })
                .unwrap()),
            Err(error) => Err(error.raw_os_error().unwrap()),
        }
    }

    /// Links, addresses, all route tables and all rules, as text.
    pub(super) async fn snapshot(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for link in link::dump(self.handle()).await.unwrap() {
            lines.push(format!("{link:?}"));
        }
        for address in collect(self.handle().address().get().execute()).await.unwrap() {
            lines.push(format!("{} {:?}", address.header.index, address.attributes.first()));
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            for mut route in collect(self.handle().route().get(request).execute()).await.unwrap() {
                route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
                lines.push(format!("{route:?}"));
            }
        }
        for version in [IpVersion::V4, IpVersion::V6] {
            for rule in collect(self.handle().rule().get(version).execute()).await.unwrap() {
                lines.push(format!("{rule:?}"));
            }
        }
        lines.extend(nft::lab::tables().into_iter().map(|table| format!("table {table}")));
        lines.extend(fs::read_dir(self.state.path()).unwrap().map(|entry| format!("{:?}", entry.unwrap().file_name())));
        lines.sort();
        lines
    }
}

/// Opens a TUN as the data plane does; it lives as long as the file.
pub(super) fn tun(name: &str) -> File {
    nix::ioctl_write_ptr_bad!(tun_set_interface, 0x4004_54ca, libc::ifreq);
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: `ifreq` is a plain C struct, all zeros is a valid value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: the file is open and the request a valid `ifreq` for the time of the call.
    unsafe { tun_set_interface(file.as_raw_fd(), &raw const request) }.unwrap();
    file
}
