//! Firewalls as Docker, ufw, firewalld and people write them, and one in a real kernel.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use super::firewall::{Needs, Source, check};
use super::nftables::Family;
use super::ruleset::{Base, Chain, Comparison, Field, Hook, Operand, Rule, Table, Test, Verdict};
use super::*;

mod kernel;

fn nets(list: &[&str]) -> Vec<IpNet> {
    list.iter().map(|net| net.parse().unwrap()).collect()
}

fn needs(networks: &[IpNet]) -> Needs<'_> {
    Needs {
        interface: "mesh0",
        port: 51872,
        networks,
        uplink_v4: Some("eth0".to_owned()),
        uplink_v6: Some("eth0".to_owned()),
        indices: BTreeMap::from([("lo".to_owned(), 1), ("eth0".to_owned(), 2), ("mesh0".to_owned(), 9)]),
    }
}

fn iptables_v4(rules: &str) -> Vec<Source> {
    vec![Source { family: Family::Ipv4, name: "filter".to_owned(), table: iptables::parse(rules) }]
}

fn fixes(networks: &[&str], sources: &[Source]) -> Vec<String> {
    let networks = nets(networks);
    check(&needs(&networks), sources).into_iter().map(|finding| finding.fix).collect()
}

/// `iptables -S` after `ufw enable`, shortened where it repeats itself.
const UFW: &str = "\
-P INPUT DROP
-P FORWARD DROP
-P OUTPUT ACCEPT
-N ufw-after-input
-N ufw-before-forward
-N ufw-before-input
-N ufw-not-local
-N ufw-reject-input
-N ufw-user-forward
-N ufw-user-input
-A INPUT -j ufw-before-logging-input
-A INPUT -j ufw-before-input
-A INPUT -j ufw-after-input
-A INPUT -j ufw-reject-input
-A FORWARD -j ufw-before-forward
-A FORWARD -j ufw-user-forward
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -p icmp -m icmp --icmp-type 3 -j ACCEPT
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-input -p udp -m udp --sport 67 --dport 68 -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -d 224.0.0.251/32 -p udp -m udp --dport 5353 -j ACCEPT
-A ufw-before-input -j ufw-user-input
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j ufw-logging-deny
-A ufw-not-local -m addrtype --dst-type BROADCAST -j DROP
-A ufw-user-input -p tcp -m tcp --dport 22 -m comment --comment \"remote \\\"work\" -j ACCEPT
";

#[test]
fn ufw_is_told_to_open_the_port_and_is_silent_once_it_did() {
    let found = check(&needs(&[]), &iptables_v4(UFW));
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!(
        found[0].what,
        "IPv4 packets to UDP port 51872 may be dropped by this host's firewall (ufw): chain INPUT of table ip filter \
         drops them, and no rule accepts them; peers reach this node only after it spoke to them first"
    );
    assert_eq!((found[0].level, found[0].fix.as_str()), (Level::Problem, "ufw allow 51872/udp"));
    assert_eq!(found[1].level, Level::Note, "nothing is behind this node");
    assert_eq!(found[1].fix, "ufw route allow in on mesh0 && ufw route allow out on mesh0");

    let allowed = "\
-A ufw-user-input -s 203.0.113.0/24 -p udp -m multiport --dports 60000,51870:51880 -j ACCEPT
-A ufw-user-forward -i mesh0 -j ACCEPT
-A ufw-user-forward -o mesh0 -j ACCEPT
";
    assert!(fixes(&["10.244.1.0/24"], &iptables_v4(&format!("{UFW}{allowed}"))).is_empty());
    let another = "-A ufw-user-input -p udp -m udp --dport 51873 -j ACCEPT\n-A ufw-user-input ! -i eth0 -j ACCEPT\n";
    assert_eq!(fixes(&[], &iptables_v4(&format!("{UFW}{another}"))).len(), 2);
}

/// `iptables -S FORWARD` and what it calls, Docker 27.
const DOCKER: &str = "\
-P INPUT ACCEPT
-P FORWARD DROP
-P OUTPUT ACCEPT
-N DOCKER
-N DOCKER-ISOLATION-STAGE-1
-N DOCKER-ISOLATION-STAGE-2
-N DOCKER-USER
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
";

#[test]
fn docker_matters_to_a_node_with_networks_behind_it() {
    assert!(fixes(&[], &iptables_v4(DOCKER)).is_empty(), "its containers reach the mesh");
    let found = fixes(&["10.244.1.0/24", "fd00:10::/64"], &iptables_v4(DOCKER));
    assert_eq!(
        found,
        [
            "iptables -I DOCKER-USER -i mesh0 -j ACCEPT && iptables -I DOCKER-USER -o mesh0 -j ACCEPT (once after each boot)"
        ]
    );
    let (before, after) = DOCKER.split_once("-A DOCKER-USER").unwrap();
    let mended =
        format!("{before}-A DOCKER-USER -i mesh0 -j ACCEPT\n-A DOCKER-USER -o mesh+ -j ACCEPT\n-A DOCKER-USER{after}");
    assert!(fixes(&["10.244.1.0/24"], &iptables_v4(&mended)).is_empty());
}

#[test]
fn rules_for_the_other_direction_or_another_link_do_not_help() {
    let one_way = "-P FORWARD DROP\n-A FORWARD -i mesh0 -j ACCEPT\n-A FORWARD -o mesh1 -j ACCEPT\n";
    let networks = nets(&["10.244.1.0/24"]);
    let found = check(&needs(&networks), &iptables_v4(one_way));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].what.starts_with("forwarded IPv4 packets to mesh0 may be dropped"), "{found:?}");
    assert!(
        found[0].what.ends_with("10.244.1.0/24 behind this node and the mesh do not reach each other"),
        "{found:?}"
    );
    assert_eq!(found[0].level, Level::Problem);
}

#[test]
fn chains_that_call_each_other_for_ever_come_to_an_end() {
    let loops = "-P INPUT DROP\n-N a\n-N b\n-A INPUT -s 192.0.2.1 -j a\n-A a -s 192.0.2.1 -j b\n-A a -s 192.0.2.1 -j b\n\
                 -A b -s 192.0.2.1 -j a\n-A b -s 192.0.2.1 -j a\n-A b -s 192.0.2.1 -j b\n";
    assert_eq!(fixes(&[], &iptables_v4(loops)), ["iptables -I INPUT -p udp --dport 51872 -j ACCEPT"]);
}

fn test(field: Field, comparison: Comparison) -> Test {
    Test::Of(Operand { field, mask: None }, comparison)
}

fn link(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(libc::IFNAMSIZ, 0);
    bytes
}

/// The shape of firewalld's table: zones by link, a default zone, and everything else refused at the end.
fn firewalld(zone_of_eth0: Vec<Rule>) -> Vec<Source> {
    let always = |verdict| Rule { tests: Vec::new(), verdict };
    let interface = Operand { field: Field::InputName, mask: None };
    let zones = vec![((link("eth0"), link("eth0")), Verdict::Goto("filter_IN_public".to_owned()))];
    let input = vec![
        Rule { tests: vec![test(Field::InputName, Comparison::Equal(link("lo")))], verdict: Verdict::Accept },
        always(Verdict::Jump("filter_INPUT_ZONES".to_owned())),
        always(Verdict::Drop),
    ];
    let chains = BTreeMap::from([
        ("filter_INPUT".to_owned(), Chain { base: Some(Base { hook: Hook::Input, drops: false }), rules: input }),
        (
            "filter_INPUT_ZONES".to_owned(),
            Chain { base: None, rules: vec![always(Verdict::Map(interface, zones)), always(Verdict::Drop)] },
        ),
        ("filter_IN_public".to_owned(), Chain { base: None, rules: zone_of_eth0 }),
    ]);
    vec![Source { family: Family::Inet, name: "firewalld".to_owned(), table: Table { chains } }]
}

#[test]
fn firewalld_drops_what_its_zone_does_not_accept() {
    let found = check(&needs(&[]), &firewalld(Vec::new()));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].what.starts_with("IPv4 and IPv6 packets to UDP port 51872 may be dropped"), "{found:?}");
    assert_eq!(found[0].fix, "firewall-cmd --permanent --add-port=51872/udp && firewall-cmd --reload");
    let port = |port: u16| test(Field::DestinationPort, Comparison::Equal(port.to_be_bytes().to_vec()));
    let accept = |tests| vec![Rule { tests, verdict: Verdict::Accept }];
    assert!(check(&needs(&[]), &firewalld(accept(vec![port(51872)]))).is_empty());
    assert_eq!(check(&needs(&[]), &firewalld(accept(vec![port(22)]))).len(), 1);
    // Who asks for our port has thought of us; who asks for nobody knows what has not.
    assert!(check(&needs(&[]), &firewalld(accept(vec![Test::Unknown, port(51872)]))).is_empty());
    assert_eq!(check(&needs(&[]), &firewalld(accept(vec![Test::Unknown]))).len(), 1);
}
