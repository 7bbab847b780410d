//! What a person sees for each mistake in a configuration, and that valid ones mean what they say.
#![allow(clippy::unwrap_used)]

use super::*;

const PIN: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000001";
const CANARY: &str = "Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5LTAxMjM=";

fn minimal() -> String {
    format!(
        "mesh:\n  enabled: true\ncluster: {{ id: home }}\ndiscovery: [ {{ endpoint: \"https://disc.example:7443\", pin: \"{PIN}\" }} ]\n"
    )
}

#[test]
fn the_minimal_configuration_gets_every_default() {
    let config = Config::parse(&minimal()).unwrap();
    assert_eq!(config.mesh, Mesh { enabled: true, ..Mesh::default() });
    assert_eq!((config.mesh.listen_port, config.mesh.mtu), (51872, 1420));
    assert_eq!(config.mesh.backend, BackendChoice::Auto);
    assert_eq!(config.mesh.interface_name.as_str(), "mesh0");
    assert_eq!(config.cluster.secret, SecretSource::File(DEFAULT_SECRET_FILE.into()));
    assert_eq!(config.discovery[0].endpoint.authority().to_string(), "disc.example:7443");
    assert_eq!(config.agent, AgentSettings::default());
}

#[test]
fn nothing_at_all_is_a_configuration_with_the_mesh_off() {
    for text in ["", "# only a comment\n", "---\n", "mesh:\n", "mesh: {}\n", "mesh:\n  enabled: false\n"] {
        assert!(!Config::parse(text).unwrap().mesh.enabled, "{text:?}");
    }
}

const EVERYTHING: &str = r#"
mesh:
  enabled: true
  hostName: node-1
  interfaceName: wg-mesh
  listenPort: 51900
  backend: userspace
  mtu: 1280
  podCIDRs: [10.244.1.0/24, "fd00:1::/64"]
  advertiseKubernetesNetworks: true
  extraPrefixes:
    - 192.168.7.0/24
    - 203.0.113.9
  advertiseNodeAddresses: false
  overlayIPv4Pool: 10.99.0.0/16
  allowDownPeerBypass: true
  allowWidePrefixes: true
  portMapping: false
  speedtest: false
  staticPeers:
    - name: phone
      publicKey: "Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5LTAxMjM="
      endpoint: "[2001:db8::1]:51820"
      allowedIPs: [10.6.0.2/32]
      presharedKeyFile: /etc/meshspan/phone.psk
      keepalive: 25s
  filters:
    endpoints: ["0.0.0.0/0", "!192.168.0.0/16"]
  denyNodes: ["0101010101010101010101010101010101010101010101010101010101010101"]
  proxy: "http://proxy.example:3128"
cluster: { id: "ho/me+=", secret: Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5LTAxMjM= }
discovery:
  - endpoint: https://disc.example:7443
    pin: sha256:0000000000000000000000000000000000000000000000000000000000000001
    proxied: true
agent: { stateDir: /s, socket: /s/a.sock, http: "127.0.0.1:9586", logFormat: json }
"#;

#[test]
fn every_key_is_understood_and_shown_again_without_the_secret() {
    let config = Config::parse(EVERYTHING).unwrap();
    assert_eq!(config.mesh.static_peers[0].keepalive, Some(Duration::from_secs(25)));
    assert_eq!(config.mesh.static_peers[0].endpoint.as_ref().unwrap().to_string(), "[2001:db8::1]:51820");
    assert_eq!(config.mesh.extra_prefixes[1].to_string(), "203.0.113.9/32");
    assert_eq!(config.announced_prefixes().len(), 4);
    assert!(config.mesh.deny_nodes.contains(&NodeId([1; 32])));
    assert!(!config.mesh.speedtest && Config::parse("").unwrap().mesh.speedtest);
    assert!(!config.mesh.port_mapping && Config::parse("").unwrap().mesh.port_mapping);
    assert!(matches!(config.cluster.secret, SecretSource::Inline(_)));
    assert_eq!(config.agent.log_format, Some(LogFormat::Json));

    let shown = serde_saphyr::to_string(&config).unwrap();
    assert!(shown.contains("secret: (hidden)"), "{shown}");
    // The public key of the peer is the same text as the secret: only one of the two may show.
    assert_eq!(shown.matches(CANARY).count(), 1, "{shown}");
    let file = "secretFile: /etc/meshspan/cluster.secret";
    let again = Config::parse(&shown.replace("secret: (hidden)", file)).unwrap();
    assert_eq!((again.mesh, again.discovery, again.agent), (config.mesh, config.discovery, config.agent));
}

#[test]
fn talos_names_mean_the_same() {
    let kubespan = "enabled: true, advertiseKubernetesNetworks: false, allowDownPeerBypass: true, mtu: 1400, \
                    filters: { endpoints: [0.0.0.0/0] }";
    let rest = format!(
        "cluster: {{ id: c2VjcmV0, secret: {CANARY} }}\ndiscovery: [ {{ endpoint: \"https://d:1\", pin: \"{PIN}\" }} ]\n"
    );
    let machine = format!("machine: {{ network: {{ kubespan: {{ {kubespan} }} }} }}\n{rest}");
    let document = format!("{rest}---\napiVersion: v1alpha1\nkind: KubeSpanConfig\n{}\n", kubespan.replace(", ", "\n"));
    let native = format!("mesh: {{ {kubespan}, podCIDRs: [10.244.0.0/24] }}\n{rest}");
    let native = Config::parse(&native).unwrap();
    assert!(native.announced_prefixes().is_empty());
    for text in [machine, document] {
        let config = Config::parse(&text).unwrap();
        assert_eq!(config.mesh, Mesh { pod_cidrs: Vec::new(), ..native.mesh.clone() }, "{text}");
        assert_eq!(config.cluster, native.cluster);
    }
}

/// Each mistake, added to a valid configuration or instead of it, with the exact text that it gets.
#[test]
fn each_mistake_gets_its_message() {
    let mesh = |lines: &str| format!("mesh:\n{lines}\n");
    let twice = "line 3, column 31: `machine.network.kubespan.mtu` says again what `mesh.mtu` on line 2 says: keep one of the two";
    let table: &[(String, &str)] = &[
        (mesh("  enabld: true"), "line 2, column 3: unknown key `enabld` in `mesh`: did you mean `enabled`?"),
        (mesh("  podCidrs: []"), "line 2, column 3: unknown key `podCidrs` in `mesh`: did you mean `podCIDRs`?"),
        (mesh("  relay: 1"), "line 2, column 3: unknown key `relay` in `mesh`"),
        ("mehs: {}".into(), "line 1, column 1: unknown key `mehs` in the top level: did you mean `mesh`?"),
        (
            "discovery:\n  - endpont: x".into(),
            "line 2, column 5: unknown key `endpont` in `discovery[0]`: did you mean `endpoint`?\n\
             `discovery[0].endpoint` is missing: give the server's address, https://host:port\n\
             `discovery[0].pin` is missing: give the pin that the discovery server printed, sha256:…",
        ),
        (mesh("  enabled: yes"), "line 2, column 12: `mesh.enabled` is \"yes\", write true or false"),
        (mesh("  enabled: \"true\""), "line 2, column 12: `mesh.enabled` is \"true\", write true or false"),
        (mesh("  enabled:"), "line 2, column 10: `mesh.enabled` is empty, write true or false"),
        (mesh("  mtu: 100"), "line 2, column 8: `mesh.mtu` is 100, write a number from 1280 to 9000"),
        (mesh("  listenPort: 0"), "line 2, column 15: `mesh.listenPort` is 0, write a number from 1 to 65535"),
        (
            mesh("  backend: fast"),
            "line 2, column 12: `mesh.backend` is \"fast\", it must be auto, kernel or userspace",
        ),
        (mesh("  listenPort: 5 1"), "line 2, column 15: `mesh.listenPort` is \"5 1\", write a number from 1 to 65535"),
        (
            mesh("  hostName: Node.1"),
            "line 2, column 13: `mesh.hostName` is \"Node.1\", a host name is 1 to 63 of a-z, 0-9 and '-', without '-' at either end",
        ),
        (
            mesh("  proxy: https://joe:pass@proxy.example"),
            "line 2, column 10: `mesh.proxy` is (hidden), it must be http://host:port or http://user:password@host:port, with special characters as %XX",
        ),
        (
            mesh("  interfaceName: lo"),
            "line 2, column 18: `mesh.interfaceName` is \"lo\", it must be 1 to 15 of a-z, A-Z, 0-9, '-', '_' and '.', not lo",
        ),
        (
            mesh("  podCIDRs: [10.1.2.3/16]"),
            "line 2, column 14: `mesh.podCIDRs[0]` is \"10.1.2.3/16\", it has bits set behind its length: write 10.1.0.0/16",
        ),
        (
            mesh("  podCIDRs: 10.1.0.0/16"),
            "line 2, column 13: `mesh.podCIDRs` is \"10.1.0.0/16\", write a list, each entry after '- '",
        ),
        (
            mesh("  extraPrefixes: [0.0.0.0/0]"),
            "line 2, column 18: `mesh.extraPrefixes` is 0.0.0.0/0, it is a default route: write a narrower prefix, or set mesh.allowWidePrefixes: true",
        ),
        (
            mesh("  extraPrefixes: [127.0.0.0/8]"),
            "line 2, column 18: `mesh.extraPrefixes` is 127.0.0.0/8, it is or holds loopback, link-local, multicast or unspecified space: remove it",
        ),
        (
            mesh("  filters: { endpoints: [\"!lan\"] }"),
            "line 2, column 26: `mesh.filters.endpoints[0]` is \"!lan\", it must be a CIDR such as 10.0.0.0/8, with '!' in front to exclude it",
        ),
        (
            mesh("  denyNodes: [abc]"),
            "line 2, column 15: `mesh.denyNodes[0]` is \"abc\", an id is 64 hex digits, this is \"abc\"",
        ),
        (
            mesh("  staticPeers: [ { publicKey: abc, allowedIPs: [10.0.0.1/32] } ]"),
            "line 2, column 31: `mesh.staticPeers[0].publicKey` is \"abc\", it must be base64 of 32 bytes, as `wg pubkey` prints it",
        ),
        (
            mesh("  staticPeers: [ { keepalive: 25 } ]"),
            "line 2, column 31: `mesh.staticPeers[0].keepalive` is 25, it must be whole seconds such as \"25s\", at most 65535s; 0s turns it off\n\
             `mesh.staticPeers[0].publicKey` is missing: give the device's WireGuard public key\n\
             `mesh.staticPeers[0].allowedIPs` is missing: list the addresses that are behind this peer",
        ),
        (
            "discovery: [ { endpoint: \"disc:7443\", pin: abc } ]".into(),
            "line 1, column 26: `discovery[0].endpoint` is \"disc:7443\", it must be https://host:port, nothing more\n\
             line 1, column 44: `discovery[0].pin` is \"abc\", it must be sha256: and 64 hex digits, as the discovery server prints it",
        ),
        (
            mesh("  enabled: true"),
            "`discovery` is missing: run `mesh-agent init` or `mesh-agent join`, or give mesh.staticPeers\n\
             `cluster.id` is missing: give the name of the cluster, the same on every node",
        ),
        (
            "cluster: { id: \"a b\" }".into(),
            "line 1, column 16: `cluster.id` is \"a b\", it must be 1 to 64 visible ASCII characters without spaces",
        ),
        (
            "cluster: { secretFile: key }".into(),
            "line 1, column 24: `cluster.secretFile` is (hidden), it must be an absolute path (it starts with /)",
        ),
        (
            "cluster: { secret: AAAA }".into(),
            "line 1, column 20: `cluster.secret` is (hidden), it holds 3 bytes, a cluster secret is exactly 32",
        ),
        (
            format!("cluster:\n  secret: {CANARY}\n  secretFile: /s"),
            "line 2, column 11: `cluster.secret` says again what `cluster.secretFile` on line 3 says: keep one of the two",
        ),
        (
            "mesh: { enabled: false,\n  mtu: 1400 }\nmachine: {network: {kubespan: {mtu: 1300}}}".into(),
            &twice.replace("column 31", "column 37"),
        ),
        (
            "mesh:\n  mtu: 1400\n  mtu: 1300".into(),
            "line 3, column 3: the key `mtu` stands twice in its section: keep one",
        ),
        ("mesh: on".into(), "line 1, column 7: `mesh` is \"on\", write keys below it"),
        ("just words".into(), "line 1, column 1: this is not a configuration: expected keys such as `mesh:`"),
        (
            "mesh: {}\n---\nkind: WatchdogConfig".into(),
            "line 3, column 7: `kind` is \"WatchdogConfig\", the only kind of document understood here is KubeSpanConfig: remove this document",
        ),
        (
            "agent: { http: 9586, logFormat: xml }".into(),
            "line 1, column 16: `agent.http` is 9586, it must be address:port such as 127.0.0.1:9586\n\
             line 1, column 33: `agent.logFormat` is \"xml\", it must be text or json",
        ),
    ];
    let wrong: Vec<String> = table
        .iter()
        .map(|(text, expected)| {
            (text, expected, Config::parse(text).map_or_else(|e| e.to_string(), |_| "accepted".into()))
        })
        .filter(|(_, expected, shown)| shown != *expected)
        .map(|(text, expected, shown)| format!("{text}\n  gives    {shown}\n  expected {expected}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn broken_yaml_is_placed() {
    for (text, line) in
        [("mesh: {\n", 1), ("mesh:\n\t enabled: true\n", 2), ("mesh:\n  a: *nowhere\n", 2), ("a: b: c\n", 1)]
    {
        let errors = Config::parse(text).unwrap_err();
        let shown = errors.to_string();
        assert!(matches!(errors.0[..], [ConfigError::Yaml { place, .. }] if place.line == line), "{text:?}: {shown}");
        assert!(shown.contains("not valid YAML"), "{shown}");
    }
    assert!(Config::parse(&" ".repeat(300_000)).unwrap_err().to_string().contains("300000 bytes"));
}

#[test]
fn no_error_shows_a_secret_wherever_it_was_put() {
    let join = format!("msj1.{}", "QUJD".repeat(20));
    for secret in [CANARY, &join] {
        for text in [
            format!("cluster: {{ secret: {secret}x }}"),
            format!("cluster: {{ secret: [{secret}] }}"),
            format!("cluster: {secret}"),
            format!("cluster: {{ secretFile: {secret} }}"),
            format!("cluster: {{ scret: {secret} }}"),
            format!("cluster: {{ id: \"a {secret}\" }}"),
            format!("discovery: [ {secret} ]"),
            secret.to_string(),
            format!("mesh: {{ mtu: {secret} }}"),
            format!("? {secret}\n: 1"),
            format!("cluster: {{ secret: {secret}, id: &a }} }}"),
            format!("cluster:\n  secret: {secret}\n id: {secret}"),
            format!("cluster:\n  secret: *{secret}\n"),
            format!("{secret}: 1\n{secret}: 2\n"),
        ] {
            let errors = Config::parse(&text).unwrap_err();
            let shown = format!("{errors} {errors:?}");
            assert!(!shown.contains(&secret[..20]), "{text} gives {shown}");
        }
    }
    let shown = format!("{:?}", Config::parse(EVERYTHING).unwrap().cluster);
    assert!(!shown.contains("canary") && !shown.contains("Y2FuYX"), "{shown}");
}

#[test]
fn the_boolean_is_flipped_in_place() {
    let text = format!("# my mesh\n{}# end", minimal().replace("true", "true   # the one boolean"));
    let off = set_enabled(&text, false).unwrap();
    assert_eq!(off, text.replace("true", "false"));
    assert_eq!(set_enabled(&off, true).unwrap(), text);
    assert_eq!(set_enabled(&text, true).unwrap(), text);

    for (text, expected) in [
        ("mesh: { enabled: true, mtu: 1400 } # é\nX", "mesh: { enabled: false, mtu: 1400 } # é\nX"),
        (
            "# é ü\nmachine:\n  network:\n    kubespan:\n      enabled: TRUE\nX",
            "# é ü\nmachine:\n  network:\n    kubespan:\n      enabled: false\nX",
        ),
        ("X---\nkind: KubeSpanConfig\nenabled: true\n", "X---\nkind: KubeSpanConfig\nenabled: false\n"),
    ] {
        let rest = minimal().replace("mesh:\n  enabled: true\n", "");
        assert_eq!(set_enabled(&text.replace('X', &rest), false).unwrap(), expected.replace('X', &rest));
    }
}

#[test]
fn a_missing_boolean_is_added_where_it_belongs() {
    let rest = minimal().replace("mesh:\n  enabled: true\n", "");
    for (text, expected) in [
        ("X", "Xmesh:\n  enabled: true\n"),
        ("mesh:\nX", "mesh:\n  enabled: true\nX"),
        ("mesh: # mine\nX", "mesh:\n  enabled: true # mine\nX"),
        ("mesh: {}\nX", "mesh: {enabled: true}\nX"),
        ("mesh: { mtu: 1400 }\nX", "mesh: {enabled: true,  mtu: 1400 }\nX"),
        ("mesh:\n    # big\n    mtu: 1400\nX", "mesh:\n    # big\n    enabled: true\n    mtu: 1400\nX"),
    ] {
        assert_eq!(set_enabled(&text.replace('X', &rest), true).unwrap(), expected.replace('X', &rest));
    }
}

#[test]
fn an_edit_that_would_not_give_a_valid_configuration_gives_nothing() {
    let errors = set_enabled("mesh:\n  enabled: false\n", true).unwrap_err().to_string();
    assert!(errors.starts_with("`discovery` is missing: run `mesh-agent init`"), "{errors}");
    assert!(matches!(set_enabled("mesh: {\n", true), Err(EditError::Invalid(_))));
    // The same anchor feeds another boolean: changing the one would change the other.
    let shared = format!(
        "mesh: {{ enabled: &on true, allowWidePrefixes: *on }}\n{}",
        minimal().replace("mesh:\n  enabled: true\n", "")
    );
    assert_eq!(set_enabled(&shared, false), Err(EditError::ByHand(false)));
}

#[test]
fn a_cluster_is_put_in_place_of_the_one_before() {
    let servers = Config::parse(&minimal()).unwrap().discovery;
    let set = |text: &str| set_cluster(text, &"a:{b".parse().unwrap(), "/etc/x y".as_ref(), &servers);
    let sections = format!(
        "cluster:\n  id: \"a:{{b\"\n  secretFile: \"/etc/x y\"\ndiscovery:\n  - endpoint: \"https://disc.example:7443\"\n    pin: {PIN}\n"
    );
    for (text, expected) in [
        ("", "Smesh:\n  enabled: true\n"),
        (
            "# mine\nmesh:\n  # one\n  enabled: false\n  mtu: 1400",
            "# mine\nmesh:\n  # one\n  enabled: true\n  mtu: 1400\nS",
        ),
        ("mesh: { enabled: true }\n", "mesh: { enabled: true }\nS"),
        (
            &format!(
                "# 1\ndiscovery:\n  - endpoint: https://old:1\n    pin: {PIN}\n\n# 2\nmesh:\n  enabled: true\n# 3\ncluster: {{ id: old }}\n# 4\n"
            ),
            "# 1\n\n# 2\nmesh:\n  enabled: true\n# 3\n# 4\nS",
        ),
    ] {
        assert_eq!(set(text).unwrap(), expected.replace('S', &sections), "for {text}");
    }
    for text in ["mesh: {}\n---\ncluster: { id: x }\n", "{ mesh: {}, cluster: { id: x } }\n"] {
        assert!(set(text).is_err(), "{text}");
    }
}

#[test]
fn the_packaged_example_is_valid_with_every_line_in_force() {
    let example = include_str!("../../../packaging/config.example.yaml");
    let as_shipped = Config::parse(example).unwrap();
    assert_eq!(as_shipped.mesh, Mesh { enabled: true, ..Mesh::default() });
    // Lines that are keys behind a `# ` are examples: all must parse, and be known.
    let key =
        |line: &str| line.trim_start_matches(['-', ' ']).split_once(':').is_some_and(|(key, _)| !key.contains(' '));
    let in_force = |line: &str| match line.trim_start().strip_prefix("# ") {
        Some(rest) if key(rest) && !rest.starts_with('/') => line.replacen("# ", "", 1),
        _ => line.to_owned(),
    };
    let all: String = example.lines().map(|line| in_force(line) + "\n").collect();
    let config = Config::parse(&all).unwrap_or_else(|errors| panic!("{errors}\n{all}"));
    assert_eq!(config.mesh.static_peers.len(), 1);
    assert_eq!(config.agent.http, Some("127.0.0.1:9586".parse().unwrap()));
}
