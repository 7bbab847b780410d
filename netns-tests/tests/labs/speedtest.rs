//! `mesh-agent speedtest` between two nodes: figures, the path that carried, and who is refused.

use std::{net::TcpStream, time::Duration};

use netns_tests::{
    Mesh, MeshOptions,
    mesh::{self, node::Node},
    process::Answer,
    wait,
};

const PORT: u16 = 51873;

fn speedtest(from: &Node, to: &Node) -> Answer {
    let mut command = from.command("speedtest");
    command.args([to.name(), "--seconds", "1", "-o", "json"]);
    from.run_to_end(command).unwrap()
}

/// When the other one has rested.
fn measured(from: &Node, to: &Node) -> serde_json::Value {
    let (answer, _) = wait::until("a speed test", Duration::from_secs(30), || {
        let answer = speedtest(from, to);
        anyhow::ensure!(!answer.stdout.is_empty(), "{}", answer.stderr);
        Ok(Some(answer.stdout))
    })
    .unwrap();
    serde_json::from_str(&answer).unwrap()
}

#[test]
fn two_nodes_measure_the_path_between_them_and_nobody_else_does() {
    let name = "two_nodes_measure_the_path_between_them_and_nobody_else_does";
    let Some(binaries) = mesh::enter_or_skip(name).unwrap() else { return };
    let options = MeshOptions { nodes: 2, pods_per_node: 1, ..MeshOptions::default() };
    let mut mesh = Mesh::start(&binaries, &options).unwrap();

    let direct = measured(&mesh.nodes[0], &mesh.nodes[1]);
    for way in ["up", "down"] {
        assert!(direct[way]["bits_per_second"].as_u64().unwrap() > 1_000_000, "{direct}");
        assert!(direct[way]["loaded"]["count"].as_u64().unwrap() > 0, "{direct}");
    }
    assert_eq!(direct["path"]["tier"], "direct", "{direct}");
    // From outside: what was sent went over the wire, sealed.
    let sent = direct["up"]["bytes"].as_u64().unwrap();
    let status = mesh.nodes[1].status_json().unwrap();
    assert!(status["peers"][0]["rx_bytes"].as_u64().unwrap() >= sent, "{sent} in {status}");

    // It rests now, and says so.
    let again = speedtest(&mesh.nodes[0], &mesh.nodes[1]);
    assert!(again.stderr.contains("rests from its last speed test: try again in"), "{}", again.stderr);

    // The service hears the mesh interface alone, and members' own addresses alone.
    let underlay = mesh.nodes[1].address;
    let pod = &mesh.nodes[0].pods[0];
    let overlay = mesh.nodes[1].overlay_v4().unwrap();
    let connect = |to: std::net::IpAddr| {
        let mut stream = TcpStream::connect_timeout(&(to, PORT).into(), Duration::from_secs(3))?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        std::io::Write::write_all(&mut stream, b"MSPT\x01\x00\x01\x00")?;
        let mut reply = [0; 2];
        std::io::Read::read_exact(&mut stream, &mut reply)?;
        anyhow::Ok(reply)
    };
    // A member reaches that address through the mesh; this host is none.
    assert!(mesh.server.host.inside(|| connect(underlay)).is_err(), "over the underlay");
    assert!(mesh.nodes[1].host.inside(|| connect("127.0.0.1".parse()?)).is_err(), "from the host itself");
    assert!(pod.host.inside(|| connect(overlay)).is_err(), "from a pod");

    let node = &mut mesh.nodes[1];
    node.config.more_mesh.push("speedtest: false".to_owned());
    node.write_config().unwrap();
    node.reload().unwrap();
    let nodes = &mesh.nodes;
    wait::until_true("a node that does not want it to refuse", Duration::from_secs(30), || {
        let answer = speedtest(&nodes[0], &nodes[1]);
        Ok(answer.stderr.contains("mesh.speedtest: false"))
    })
    .unwrap();
}
