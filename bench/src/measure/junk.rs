//! What junk costs our agent: a tunnel carries 300 Mbit/s while datagrams of no peer come as fast as the machine sends them.
//!
//! The agent's CPU is taken twice, with the same tunnel traffic: without junk and with it; the difference is what junk
//! costs. How much of it the agent took in is what was sent less what the kernel dropped before the agent's socket.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result, bail};

use super::{FINE, Figures, Measuring};
use crate::{
    machine::Cpu,
    metric::Metric,
    traffic::{Done, Order, Rate},
};

const SIZE: usize = 1400;
const RATE: Rate = Rate { per_second: 300e6 / 8.0 / SIZE as f64, wake_every: FINE };
/// The flood lasts a little longer than the traffic it is to disturb.
const MARGIN: Duration = Duration::from_millis(200);

pub(super) fn measure(measuring: &Measuring<'_>, figures: &mut Figures) -> Result<()> {
    // Only our agents: what others make of junk is their business.
    let Some(agents) = measuring.running.agents() else { return Ok(()) };
    let [_, receiving] = &agents.nodes;
    let pid = receiving.pid().context("the agent has ended")?;
    let port = receiving.config.listen_port;
    let seconds = measuring.seconds;

    let before = Cpu::now(&[pid])?;
    measuring.udp(SIZE, RATE, seconds)?;
    let quiet = before.used()?.processes;

    let dropped_before = dropped(measuring, port)?;
    let before = Cpu::now(&[pid])?;
    let to = SocketAddr::new(measuring.bed.right.address, port);
    let flood = Order::Junk { to, seconds: seconds + MARGIN.as_secs_f64() };
    let flood = measuring.bed.left.generator.order(&flood)?;
    let (sent, received, _) = measuring.udp(SIZE, RATE, seconds)?;
    let Done::JunkSent { sent: junk } = flood.done()? else { bail!("nobody counted the junk") };
    let flooded = before.used()?.processes;
    let taken = junk.saturating_sub(dropped(measuring, port)? - dropped_before).max(1);

    let lost = sent.saturating_sub(received) as f64 / sent.max(1) as f64;
    figures.insert(Metric::JunkLoss, lost * 100.0);
    figures.insert(Metric::JunkCpu, flooded.saturating_sub(quiet).as_nanos() as f64 / 1e3 / taken as f64);
    figures.insert(Metric::JunkRate, taken as f64 / 1e3 / (seconds + MARGIN.as_secs_f64()));
    Ok(())
}

/// Datagrams that the kernel dropped before the sockets on this port of the right host, so far.
fn dropped(measuring: &Measuring<'_>, port: u16) -> Result<u64> {
    let sockets = measuring.bed.right.host.inside(|| Ok(std::fs::read_to_string("/proc/thread-self/net/udp")?))?;
    dropped_unconnected(&sockets, port)
}

/// Of those that are connected to nobody: junk does not come to the others, and they come and go.
fn dropped_unconnected(sockets: &str, port: u16) -> Result<u64> {
    const NOBODY: &str = "00000000:0000";
    let suffix = format!(":{port:04X}");
    let mut all = None;
    for line in sockets.lines() {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let [_, local, remote, .., drops] = columns[..] else { continue };
        if local.ends_with(&suffix) && remote == NOBODY {
            let drops: u64 = drops.parse().with_context(|| format!("{drops} is no count"))?;
            *all.get_or_insert(0) += drops;
        }
    }
    all.with_context(|| format!("no socket has UDP port {port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_is_connected_to_a_peer_is_not_where_junk_was_dropped() {
        let line = |local: &str, remote: &str, drops: u64| {
            format!(
                "  42: {local} {remote} 07 00000000:00000000 00:00000000 00000000     0        0 1234 2 0 {drops}\n"
            )
        };
        let header = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n";
        let sockets = [
            header.to_owned(),
            line("0200000A:CA6C", "0100000A:CA6C", 9),
            line("00000000:CA6C", "00000000:0000", 70),
            line("00000000:CA6C", "00000000:0000", 7),
            line("00000000:0035", "00000000:0000", 500),
        ]
        .concat();
        assert_eq!(dropped_unconnected(&sockets, 0xca6c).unwrap(), 77);
        assert!(dropped_unconnected(&sockets, 51821).is_err());
    }
}
