//! One TCP stream by iperf3, the judge of our own traffic generator.

use std::{net::IpAddr, process::Command, time::Duration};

use anyhow::{Context, Result};
use netns_tests::{Host, process::Process, wait};

use crate::{bed::Bed, contender::Running, rival::installed};

const PORT: &str = "5201";
const START_WITHIN: Duration = Duration::from_secs(5);
const GRACE: Duration = Duration::from_secs(15);

/// Gbit/s from left to right as iperf3's receiver counts them.
pub fn tcp1(bed: &Bed, running: &Running, seconds: f64) -> Result<f64> {
    let program =
        installed("iperf3").context("iperf3 is not installed: apt-get install --no-install-recommends iperf3")?;
    let address = running.right.to_string();
    let start = |host: &Host, name: &str, args: &[&str]| {
        let mut command = Command::new(&program);
        command.args(args);
        Process::start(host, command, &bed.scratch(name))
    };
    let mut server = start(&bed.right.host, "iperf3-server", &["-s", "-1", "-B", &address, "-p", PORT])?;
    let listening = wait::until_or_dead("iperf3 to listen", START_WITHIN, &mut server, Process::check_running, |_| {
        Ok(listens(&bed.right.host, running.right)?.then_some(()))
    });
    server.explain(listening)?;
    // iperf3 takes whole seconds only.
    let length = seconds.ceil().max(1.0);
    let mut client =
        start(&bed.left.host, "iperf3-client", &["-c", &address, "-p", PORT, "-J", "-t", &length.to_string()])?;
    let ended = client.ended(Duration::from_secs_f64(length) + GRACE);
    client.explain(ended)?;
    let said: serde_json::Value = serde_json::from_str(&client.stdout()?).context("iperf3 printed no JSON")?;
    let bits = said["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("iperf3 said {}", said["error"]))? / 1e9)
}

/// Does a socket listen on iperf3's port there?
fn listens(host: &Host, address: IpAddr) -> Result<bool> {
    const LISTEN: &str = "0A";
    let IpAddr::V4(address) = address else { anyhow::bail!("{address} is no IPv4 address") };
    let port: u16 = PORT.parse()?;
    let local = format!("{:08X}:{port:04X}", u32::from_ne_bytes(address.octets()));
    let text = host.inside(|| Ok(std::fs::read_to_string("/proc/thread-self/net/tcp")?))?;
    Ok(text.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next() == Some(local.as_str()) && fields.nth(1) == Some(LISTEN)
    }))
}
