//! The host side against a real kernel, each test in a network namespace of its own.

#![allow(clippy::unwrap_used, unsafe_code)]

mod lab;
mod mss;

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_proto::device::{Route, RouteKind};
use netlink_packet_route::route::{RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags};
use rtnetlink::{IpVersion, LinkUnspec, LinkVeth, RouteMessageBuilder};

use self::lab::{NAME, in_namespace, tun};
use super::*;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn mesh_link() -> Link {
    Link {
        name: NAME.into(),
        mtu: 1420,
        listen_port: 51872,
        addresses: BTreeSet::from([net("198.19.0.7/32"), net("fd00:1::7/128")]),
    }
}

fn dev(prefix: &str) -> Route {
    Route { prefix: net(prefix), kind: RouteKind::Dev { mtu: None, source: None } }
}

fn floor(prefix: &str) -> Route {
    Route { prefix: net(prefix), kind: RouteKind::Unreachable }
}

fn throw(prefix: &str) -> Route {
    Route { prefix: net(prefix), kind: RouteKind::Throw }
}

fn routes_of_all_shapes() -> BTreeSet<Route> {
    let source = |addr: &str| Some(addr.parse().unwrap());
    BTreeSet::from([
        Route { prefix: net("10.1.0.0/16"), kind: RouteKind::Dev { mtu: Some(1280), source: source("198.19.0.7") } },
        Route { prefix: net("fd00:2::/64"), kind: RouteKind::Dev { mtu: Some(1280), source: source("fd00:1::7") } },
        dev("198.19.0.8/32"),
        dev("fd00:1::8/128"),
        floor("10.1.0.0/16"),
        floor("fd00:2::/64"),
        floor("198.19.0.8/32"),
        floor("fd00:1::8/128"),
        throw("10.2.0.0/16"),
        throw("fd00:3::/64"),
    ])
}

async fn apply_all(device: &mut HostDevice, routes: &BTreeSet<Route>) {
    device.apply(&Action::CreateLink(mesh_link())).await.unwrap();
    for route in routes {
        device.apply(&Action::AddRoute(route.clone())).await.unwrap();
    }
    for family in Family::ALL {
        device.apply(&Action::AddRule(family)).await.unwrap();
    }
    device.apply(&Action::SetMssClamp).await.unwrap();
}

async fn fires(watch: &HostWatch) {
    tokio::time::timeout(Duration::from_secs(2), watch.changed()).await.expect("the watch fires");
}

#[test]
fn what_is_applied_is_what_is_observed_also_the_second_time() {
    in_namespace("what_is_applied_is_what_is_observed", async |lab| {
        let (mut device, _tun) = lab.device_with_link().await;
        assert_eq!(device.observe().await.unwrap().link, None, "a link that is down is not there");
        apply_all(&mut device, &routes_of_all_shapes()).await;
        let first = device.observe().await.unwrap();
        assert_eq!(first.link, Some(mesh_link()));
        assert_eq!(first.routes, routes_of_all_shapes());
        assert_eq!(first.rules, BTreeSet::from(Family::ALL));
        assert_eq!(first.mss_clamp, MssClamp::Present);
        assert_eq!(lab.link(NAME).await.unwrap().rp_filter, 2);
        let eth0 = first.underlay.iter().find(|link| link.name == "eth0").unwrap();
        assert_eq!(eth0.addresses, [net("192.0.2.10/24"), net("2001:db8::10/64")]);
        assert_eq!(eth0.virtual_kind, None);
        assert!(first.underlay.iter().all(|link| link.name != NAME && link.name != "lo"));

        let snapshot = lab.snapshot().await;
        apply_all(&mut device, &routes_of_all_shapes()).await;
        assert_eq!(device.observe().await.unwrap(), first);
        assert_eq!(lab.snapshot().await, snapshot);
    });
}

#[test]
fn of_many_routes_at_once_each_refusal_is_told_and_the_others_are_done_in_order() {
    in_namespace("of_many_routes_at_once", async |lab| {
        let (mut device, _tun) = lab.device_with_link().await;
        apply_all(&mut device, &BTreeSet::new()).await;
        // No address of this host: the kernel refuses it as a source.
        let refused = |number: usize| number.is_multiple_of(7);
        let route = |number: usize, mtu| {
            let source = if refused(number) { "198.51.100.1" } else { "198.19.0.7" };
            let kind = RouteKind::Dev { mtu, source: Some(source.parse().unwrap()) };
            Route { prefix: net(&format!("10.{}.{}.0/24", number / 256, number % 256)), kind }
        };
        let add = |mtu| move |number| Action::AddRoute(route(number, mtu));
        let steps: Vec<Action> = (0..300).map(add(None)).collect();
        let wanted = |mtu| (0..300).filter(|number| !refused(*number)).map(move |number| route(number, mtu));
        for again in 0..2 {
            let results = device.apply_routes(&steps).await;
            assert_eq!(results.len(), steps.len());
            for (number, result) in results.iter().enumerate() {
                let text = result.as_ref().map_err(ToString::to_string);
                let is_right = match text {
                    Ok(()) => !refused(number),
                    Err(text) => {
                        refused(number) && text.contains(&format!("10.{}.{}.0/24", number / 256, number % 256))
                    }
                };
                assert!(is_right, "{again}, {number}: {result:?}");
            }
            assert_eq!(device.observe().await.unwrap().routes, wanted(None).collect());
        }

        // Each replaced by another: what was there goes first, as steps come.
        let good: Vec<usize> = (0..300).filter(|number| !refused(*number)).collect();
        let removals = good.iter().map(|number| Action::RemoveRoute(route(*number, None)));
        let steps: Vec<Action> = removals.chain(good.iter().copied().map(add(Some(1300)))).collect();
        assert!(device.apply_routes(&steps).await.iter().all(Result::is_ok));
        assert_eq!(device.observe().await.unwrap().routes, wanted(Some(1300)).collect());
        // What is gone already is no error.
        let steps: Vec<Action> = good.iter().map(|number| Action::RemoveRoute(route(*number, Some(1300)))).collect();
        for _ in 0..2 {
            assert!(device.apply_routes(&steps).await.iter().all(Result::is_ok));
        }
        assert_eq!(device.observe().await.unwrap().routes, BTreeSet::new());
    });
}

#[test]
fn the_link_follows_a_change_of_mtu_and_addresses() {
    in_namespace("the_link_follows_a_change", async |lab| {
        let (mut device, _tun) = lab.device_with_link().await;
        apply_all(&mut device, &BTreeSet::new()).await;
        lab.add_address(NAME, "10.9.9.9/24").await;
        let changed =
            Link { mtu: 1380, addresses: BTreeSet::from([net("198.19.0.9/32"), net("fd00:1::7/128")]), ..mesh_link() };
        device.apply(&Action::UpdateLink(changed.clone())).await.unwrap();
        assert_eq!(device.observe().await.unwrap().link, Some(changed));
    });
}

#[test]
fn the_kernel_sends_unmarked_traffic_by_our_table_and_our_own_sockets_past_it() {
    in_namespace("the_kernel_sends_unmarked_traffic_by_our_table", async |lab| {
        let (mut device, _tun) = lab.device_with_link().await;
        apply_all(&mut device, &routes_of_all_shapes()).await;
        for to in ["10.1.2.3", "fd00:2::3"] {
            for mark in [0, 0x4000, 0xf10, 0x8000, 0x20] {
                assert_eq!(lab.decision(to, mark).await, Ok(818), "{to} mark {mark:#x}");
            }
            for mark in [0x10, 0x4010] {
                assert_eq!(lab.decision(to, mark).await, Ok(254), "{to} mark {mark:#x}");
            }
        }
        for to in ["10.2.2.3", "fd00:3::3", "203.0.113.1", "2001:db8:9::1"] {
            assert_eq!(lab.decision(to, 0).await, Ok(254), "{to} is thrown or not ours");
        }
    });
}

#[test]
fn the_floor_stays_and_refuses_when_the_link_dies_and_the_watch_tells() {
    in_namespace("the_floor_stays", async |lab| {
        let (mut device, tun) = lab.device_with_link().await;
        apply_all(&mut device, &routes_of_all_shapes()).await;
        let watch = HostWatch::start().unwrap();
        drop(tun);
        fires(&watch).await;
        device.set_link(None, 0);
        let left = device.observe().await.unwrap();
        assert_eq!(left.link, None);
        let floors =
            routes_of_all_shapes().into_iter().filter(|route| !matches!(route.kind, RouteKind::Dev { .. })).collect();
        assert_eq!(left.routes, floors);
        for to in ["10.1.2.3", "fd00:2::3"] {
            assert_eq!(lab.decision(to, 0).await, Err(libc::EHOSTUNREACH), "{to}");
            assert_eq!(lab.decision(to, 0x10).await, Ok(254), "{to}");
        }
    });
}

#[test]
fn damage_by_others_is_seen_and_the_watch_fires() {
    in_namespace("damage_by_others_is_seen", async |lab| {
        let (mut device, tun) = lab.device_with_link().await;
        let routes = routes_of_all_shapes();
        apply_all(&mut device, &routes).await;
        device.observe().await.unwrap();
        let watch = HostWatch::start().unwrap();
        for victim in [dev("198.19.0.8/32"), floor("fd00:2::/64"), throw("10.2.0.0/16")] {
            let message = routes::message(&victim, device.link).unwrap();
            lab.handle().route().del(message).execute().await.unwrap();
            fires(&watch).await;
            let expected: BTreeSet<Route> = routes.iter().filter(|route| **route != victim).cloned().collect();
            assert_eq!(device.observe().await.unwrap().routes, expected);
            device.apply(&Action::AddRoute(victim)).await.unwrap();
            fires(&watch).await;
        }
        for family in Family::ALL {
            for rule in rules::ours(lab.handle(), family).await.unwrap() {
                lab.handle().rule().del(rule).execute().await.unwrap();
            }
            fires(&watch).await;
            assert!(!device.observe().await.unwrap().rules.contains(&family));
            device.apply(&Action::AddRule(family)).await.unwrap();
            fires(&watch).await;
            assert_eq!(device.observe().await.unwrap().rules, BTreeSet::from(Family::ALL));
        }
        lab.down(NAME).await;
        fires(&watch).await;
        assert_eq!(device.observe().await.unwrap().link, None);
        lab.delete_link(NAME).await;
        fires(&watch).await;
        drop(tun);
        assert_eq!(device.observe().await.unwrap().link, None);
    });
}

#[test]
fn the_watch_fires_for_our_packet_filter_table_and_for_no_other() {
    in_namespace("the_watch_fires_for_our_packet_filter_table", async |lab| {
        let mut device = lab.device();
        device.apply(&Action::SetMssClamp).await.unwrap();
        let watch = HostWatch::start().unwrap();
        nft::lab::flush();
        fires(&watch).await;
        device.apply(&Action::SetMssClamp).await.unwrap();
        fires(&watch).await;
        device.apply(&Action::RemoveMssClamp).await.unwrap();
        fires(&watch).await;
        // What came with the last change is read too, before others begin.
        while tokio::time::timeout(Duration::from_millis(100), watch.changed()).await.is_ok() {}
        nft::lab::make_table("others");
        assert!(tokio::time::timeout(Duration::from_millis(100), watch.changed()).await.is_err());
    });
}

#[test]
fn a_damaged_rule_counts_as_missing_and_is_replaced() {
    in_namespace("a_damaged_rule_counts_as_missing", async |lab| {
        let mut device = lab.device();
        // The same, not inverted: it would send our own sockets into the mesh and nothing else.
        let mut request =
            lab.handle().rule().add().v4().priority(1110).fw_mark(0x10).table_id(818).action(RuleAction::ToTable);
        request.message_mut().attributes.push(RuleAttribute::FwMask(0xf10));
        request.execute().await.unwrap();
        let foreign =
            lab.handle().rule().add().v4().priority(1110).fw_mark(0x77).table_id(819).action(RuleAction::ToTable);
        foreign.execute().await.unwrap();
        assert_eq!(device.observe().await.unwrap().rules, BTreeSet::new());
        device.apply(&Action::AddRule(Family::V4)).await.unwrap();
        assert_eq!(device.observe().await.unwrap().rules, BTreeSet::from([Family::V4]));
        let rules = collect(lab.handle().rule().get(IpVersion::V4).execute()).await.unwrap();
        let ours: Vec<_> =
            rules.iter().filter(|rule| rule.attributes.contains(&RuleAttribute::Priority(1110))).collect();
        assert_eq!(ours.len(), 2, "ours and the one of others: {ours:?}");
        assert_eq!(ours.iter().filter(|rule| rule.header.flags.contains(RuleFlags::Invert)).count(), 1);
    });
}

#[test]
fn a_change_of_a_route_is_one_replacement_in_either_order_of_the_steps() {
    in_namespace("a_change_of_a_route", async |lab| {
        let (mut device, _tun) = lab.device_with_link().await;
        for (prefix, source) in [("10.1.0.0/16", "198.19.0.7"), ("fd00:2::/64", "fd00:1::7")] {
            let source = Some(source.parse().unwrap());
            let shapes = [
                dev(prefix),
                Route { prefix: net(prefix), kind: RouteKind::Dev { mtu: Some(1280), source } },
                Route { prefix: net(prefix), kind: RouteKind::Dev { mtu: None, source } },
                throw(prefix),
                dev(prefix),
            ];
            apply_all(&mut device, &BTreeSet::from([shapes[0].clone(), floor(prefix)])).await;
            for pair in shapes.windows(2) {
                for add_first in [true, false] {
                    device.apply(&Action::AddRoute(pair[0].clone())).await.unwrap();
                    device.observe().await.unwrap();
                    let mut steps = [Action::AddRoute(pair[1].clone()), Action::RemoveRoute(pair[0].clone())];
                    if !add_first {
                        steps.reverse();
                    }
                    for step in &steps {
                        device.apply(step).await.unwrap();
                    }
                    let expected = BTreeSet::from([pair[1].clone(), floor(prefix)]);
                    assert_eq!(device.observe().await.unwrap().routes, expected, "add first: {add_first}");
                }
            }
            for route in [shapes[4].clone(), floor(prefix)] {
                for _ in 0..2 {
                    device.apply(&Action::RemoveRoute(route.clone())).await.unwrap();
                }
            }
            assert_eq!(device.observe().await.unwrap().routes, BTreeSet::new());
        }
    });
}

#[test]
fn strange_routes_in_our_table_are_removed_exactly_and_other_tables_stay() {
    in_namespace("strange_routes_in_our_table", async |lab| {
        let (mut device, _tun) = lab.device_with_link().await;
        let wanted =
            BTreeSet::from([dev("10.1.0.0/16"), floor("10.1.0.0/16"), dev("fd00:2::/64"), floor("fd00:2::/64")]);
        apply_all(&mut device, &wanted).await;
        let eth0 = lab.index("eth0").await;
        let v4 = || RouteMessageBuilder::<std::net::Ipv4Addr>::new();
        let v6 = || RouteMessageBuilder::<std::net::Ipv6Addr>::new();
        let elsewhere =
            v4().destination_prefix("10.1.0.0".parse().unwrap(), 16).output_interface(eth0).table_id(819).build();
        lab.handle().route().add(elsewhere).execute().await.unwrap();
        let before = lab.snapshot().await;
        let strangers = [
            v4().destination_prefix("10.1.0.0".parse().unwrap(), 16)
                .gateway("192.0.2.1".parse().unwrap())
                .table_id(818)
                .build(),
            v4().destination_prefix("10.1.0.0".parse().unwrap(), 16)
                .output_interface(eth0)
                .priority(100)
                .table_id(818)
                .build(),
            v4().output_interface(eth0).table_id(818).build(),
            v4().destination_prefix("10.1.0.0".parse().unwrap(), 16)
                .kind(RouteType::BlackHole)
                .priority(7)
                .table_id(818)
                .build(),
            v6().destination_prefix("fd00:2::".parse().unwrap(), 64)
                .gateway("2001:db8::1".parse().unwrap())
                .table_id(818)
                .build(),
            v6().destination_prefix("fd00:2::".parse().unwrap(), 64)
                .output_interface(eth0)
                .priority(100)
                .table_id(818)
                .build(),
            v6().output_interface(eth0).table_id(818).build(),
        ];
        for mut stranger in strangers {
            stranger.header.protocol = RouteProtocol::Static;
            if stranger.header.kind == RouteType::BlackHole {
                stranger.header.scope = RouteScope::Universe;
            }
            // Appended, as `ip route append`, so that it stands beside ours at the same metric.
            append(lab.handle(), stranger).await;
        }
        let seen = device.observe().await.unwrap().routes;
        let foreign: Vec<Route> = seen.difference(&wanted).cloned().collect();
        assert_eq!(foreign.len(), 7, "{foreign:?}");
        for route in foreign {
            assert!(matches!(route.kind, RouteKind::Foreign { .. }));
            device.apply(&Action::RemoveRoute(route)).await.unwrap();
        }
        assert_eq!(device.observe().await.unwrap().routes, wanted);
        assert_eq!(lab.snapshot().await, before);
    });
}

async fn append(handle: &Handle, route: RouteMessage) {
    use futures_util::StreamExt as _;
    use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
    let mut request = NetlinkMessage::from(netlink_packet_route::RouteNetlinkMessage::NewRoute(route));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
    let mut replies = handle.clone().request(request).unwrap();
    while let Some(reply) = replies.next().await {
        if let NetlinkPayload::Error(error) = reply.payload {
            panic!("{error}");
        }
    }
}

#[test]
fn a_link_of_our_name_that_is_not_ours_is_named_and_left_alone() {
    in_namespace("a_link_of_our_name_that_is_not_ours", async |lab| {
        lab.handle().link().add(LinkVeth::new(NAME, "other0").build()).execute().await.unwrap();
        let mut device = lab.device();
        let error = device.observe().await.unwrap_err().to_string();
        assert!(error.contains("mesh0") && error.contains("veth") && error.contains("interfaceName"), "{error}");
        device.apply(&Action::DeleteLink { name: NAME.into() }).await.unwrap();
        let _foreign = tun("mesh1");
        let report = cleanup(lab.state.path()).await.unwrap();
        assert!(report.removed.is_empty() && report.failed.is_empty(), "{report:?}");
        assert!(lab.link(NAME).await.is_some() && lab.link("mesh1").await.is_some());
        assert!(matches!(device.configure_link(&mesh_link()).await, Err(ApplyError::NoLink { .. })));
        assert!(matches!(device.apply(&Action::AddRoute(dev("10.1.0.0/16"))).await, Err(ApplyError::NoLink { .. })));
    });
}

#[test]
fn strict_filters_are_loosened_remembered_over_a_crash_and_restored() {
    in_namespace("strict_filters_are_loosened", async |lab| {
        lab.set_sysctl("all", 1);
        lab.set_sysctl("eth0", 0);
        let effective = async |device: &mut HostDevice| {
            let seen = device.observe().await.unwrap();
            (seen.underlay.iter().find(|link| link.name == "eth0").unwrap().rp_filter, seen.loosened)
        };
        let loosen = Action::LoosenRpFilter { link: "eth0".into() };
        let restore = Action::RestoreRpFilter { link: "eth0".into() };
        let mut device = lab.device();
        assert_eq!(effective(&mut device).await, (1, BTreeSet::new()), "all=1 makes every link strict");
        for _ in 0..2 {
            device.apply(&loosen).await.unwrap();
            assert_eq!(effective(&mut device).await, (2, BTreeSet::from(["eth0".into()])));
            assert_eq!(lab.sysctl("eth0"), 2);
        }
        // The successor of a crashed agent.
        drop(device);
        let mut device = lab.device();
        assert_eq!(effective(&mut device).await, (2, BTreeSet::from(["eth0".into()])));
        // A boot script sets it back: no longer in force, loosened again when asked.
        lab.set_sysctl("eth0", 1);
        assert_eq!(effective(&mut device).await, (1, BTreeSet::new()));
        device.apply(&loosen).await.unwrap();
        for _ in 0..2 {
            device.apply(&restore).await.unwrap();
            assert_eq!(lab.sysctl("eth0"), 1);
            assert_eq!(effective(&mut device).await, (1, BTreeSet::new()));
        }
        lab.set_sysctl("eth0", 0);
        device.apply(&loosen).await.unwrap();
        device.apply(&restore).await.unwrap();
        assert_eq!(lab.sysctl("eth0"), 0, "zero is a value to restore too");
        assert_eq!(fs::read_dir(lab.state.path()).unwrap().count(), 0);
        assert!(matches!(
            device.apply(&Action::LoosenRpFilter { link: "gone0".into() }).await,
            Err(ApplyError::NoLink { .. })
        ));
        device.apply(&Action::RestoreRpFilter { link: "gone0".into() }).await.unwrap();
    });
}

#[test]
fn a_damaged_list_of_loosened_filters_is_named() {
    let state = tempfile::tempdir().unwrap();
    fs::write(state.path().join("loosened.json"), "{\"eth0\":").unwrap();
    let error = Loosened::load(state.path()).unwrap_err().to_string();
    assert!(error.contains("loosened.json is damaged") && error.contains("delete it"), "{error}");
}

#[test]
fn cleanup_leaves_the_host_as_it_was() {
    in_namespace("cleanup_leaves_the_host_as_it_was", async |lab| {
        lab.set_sysctl("eth0", 1);
        let before = lab.snapshot().await;
        mark(lab.state.path()).unwrap();
        let (mut device, tun) = lab.device_with_link().await;
        apply_all(&mut device, &routes_of_all_shapes()).await;
        device.apply(&Action::LoosenRpFilter { link: "eth0".into() }).await.unwrap();
        let whole = lab.snapshot().await;
        assert_ne!(whole, before);
        // Also one of another state directory, whose lock this one is not.
        let other = tempfile::tempdir().unwrap();
        for state in [lab.state.path(), other.path()] {
            let error = cleanup(state).await.unwrap_err();
            assert!(matches!(&error, ApplyError::AgentIsOn { link } if link == NAME), "{error:?}");
        }
        assert!(lab.snapshot().await == whole && is_marked(lab.state.path()), "an agent that is on keeps everything");

        drop(tun);
        let report = cleanup(lab.state.path()).await.unwrap();
        assert!(report.failed.is_empty(), "{report:?}");
        assert_eq!(lab.snapshot().await, before);
        assert!(!is_marked(lab.state.path()));
        let again = cleanup(lab.state.path()).await.unwrap();
        assert!(again.removed.is_empty() && again.failed.is_empty(), "{again:?}");
    });
}

#[test]
fn without_the_capability_each_error_says_what_is_needed() {
    in_namespace("without_the_capability", async |lab| {
        let (mut device, _tun) = lab.device_with_link().await;
        lab.set_sysctl("all", 1);
        device.apply(&Action::AddRule(Family::V4)).await.unwrap();
        device.apply(&Action::AddRoute(floor("10.1.0.0/16"))).await.unwrap();
        let left = lab.state.path().join("left");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("loosened.json"), r#"{"wire0":0}"#).unwrap();
        lab.set_sysctl("wire0", 2);
        mark(&left).unwrap();
        fs::set_permissions(lab.state.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        // SAFETY: the raw call changes this thread only, and the thread ends with the test.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(result, 0);
        device.netlink = Netlink::open().unwrap();
        for action in [
            Action::CreateLink(mesh_link()),
            Action::AddRoute(dev("10.1.0.0/16")),
            Action::AddRule(Family::V6),
            Action::SetMssClamp,
            Action::DeleteLink { name: NAME.into() },
        ] {
            let error = device.apply(&action).await.unwrap_err();
            assert!(matches!(error, ApplyError::NoNetAdmin { .. }), "{action:?}: {error:?}");
            assert!(error.to_string().contains("CAP_NET_ADMIN"));
        }
        let error = device.apply(&Action::LoosenRpFilter { link: "eth0".into() }).await.unwrap_err();
        assert!(
            matches!(&error, ApplyError::NotPermitted { sysctl, value: 2 } if sysctl == "net.ipv4.conf.eth0.rp_filter"),
            "{error:?}"
        );
        let report = cleanup(&left).await.unwrap();
        assert_eq!((report.removed.len(), report.failed.len()), (0, 3), "{report:?}");
        assert!(report.failed.iter().all(ApplyError::lacks_permission), "{report:?}");
        let fix = "set net.ipv4.conf.wire0.rp_filter = 0 on the host";
        assert!(report.failed.iter().any(|error| error.to_string().ends_with(fix)), "{report:?}");
        assert!(is_marked(&left), "what is still there is remembered");
        assert_eq!(device.loosened.names(), Vec::<String>::new(), "nothing to undo");
        // Reading needs no capability.
        device.observe().await.unwrap();
    });
}

#[test]
fn container_bridges_and_tunnels_are_virtual_and_uplinks_are_not() {
    in_namespace("container_bridges_and_tunnels_are_virtual", async |lab| {
        let handle = lab.handle();
        for name in ["br0", "docker0"] {
            handle.link().add(rtnetlink::LinkBridge::new(name).build()).execute().await.unwrap();
        }
        handle.link().add(LinkVeth::new("guest0", "guest1").build()).execute().await.unwrap();
        let port = LinkUnspec::new_with_index(lab.index("guest0").await).controller(lab.index("br0").await).build();
        handle.link().change(port).execute().await.unwrap();
        let _tun = tun("vpn0");
        for name in ["br0", "docker0", "vpn0"] {
            lab.up(name).await;
        }
        let seen = lab.device().observe().await.unwrap().underlay;
        let kind = |name: &str| seen.iter().find(|link| link.name == name).unwrap().virtual_kind.clone();
        assert_eq!(kind("br0").as_deref(), Some("bridge"));
        assert_eq!(kind("docker0").as_deref(), Some("container bridge"));
        assert_eq!(kind("vpn0").as_deref(), Some("tun"));
        assert_eq!(kind("eth0"), None);
    });
}

#[test]
fn a_thousand_routes() {
    in_namespace("a_thousand_routes", async |lab| {
        let (mut device, _tun) = lab.device_with_link().await;
        let routes: BTreeSet<Route> = (0..250_u32)
            .flat_map(|i| {
                let (v4, v6) = (format!("10.{}.{}.0/24", i / 256, i % 256), format!("fd00:2:0:{i:x}::/64"));
                [dev(&v4), floor(&v4), dev(&v6), floor(&v6)]
            })
            .collect();
        let start = Instant::now();
        apply_all(&mut device, &routes).await;
        let applied = start.elapsed();
        assert_eq!(device.observe().await.unwrap().routes, routes);
        let observed = start.elapsed() - applied;
        for route in &routes {
            device.apply(&Action::RemoveRoute(route.clone())).await.unwrap();
        }
        println!(
            "{} routes: applied {applied:?}, observed {observed:?}, removed {:?}",
            routes.len(),
            start.elapsed() - applied - observed
        );
        assert_eq!(device.observe().await.unwrap().routes, BTreeSet::new());
    });
}
