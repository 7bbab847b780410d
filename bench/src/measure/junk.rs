//! What junk costs our agent: a tunnel carries 300 Mbit/s while datagrams of no peer come as fast as the machine sends them.
//!
//! The agent's CPU is taken twice, with the same tunnel traffic: without junk and with it; the difference is what junk
//! costs. How much of it the agent took in is what was sent less what the kernel dropped before the agent's socket.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

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

    let sockets_before = sockets(measuring)?;
    let dropped_before = drops(&sockets_before, port)?;
    let before = Cpu::now(&[pid])?;
    let to = SocketAddr::new(measuring.bed.right.address, port);
    let flood = Order::Junk { to, seconds: seconds + MARGIN.as_secs_f64() };
    let flood = measuring.bed.left.generator.order(&flood)?;
    let (sent, received, _) = measuring.udp(SIZE, RATE, seconds)?;
    let Done::JunkSent { sent: junk } = flood.done()? else { bail!("nobody counted the junk") };
    let flooded = before.used()?.processes;
    let dropped = dropped_since(&dropped_before, &drops(&sockets(measuring)?, port)?);
    let taken = junk.saturating_sub(dropped).max(1);

    let lost = sent.saturating_sub(received) as f64 / sent.max(1) as f64;
    figures.insert(Metric::JunkLoss, lost * 100.0);
    figures.insert(Metric::JunkCpu, flooded.saturating_sub(quiet).as_nanos() as f64 / 1e3 / taken as f64);
    figures.insert(Metric::JunkRate, taken as f64 / 1e3 / (seconds + MARGIN.as_secs_f64()));
    Ok(())
}

/// The UDP sockets of the right host, as the kernel tells them.
fn sockets(measuring: &Measuring<'_>) -> Result<String> {
    measuring.bed.right.host.inside(|| Ok(std::fs::read_to_string("/proc/thread-self/net/udp")?))
}

/// Datagrams that the kernel dropped before each socket on this port so far, by its inode. The agent opens one more for a busy
/// sender, be that the peer or the one of the junk.
fn drops(sockets: &str, port: u16) -> Result<BTreeMap<&str, u64>> {
    let suffix = format!(":{port:04X}");
    let mut drops = BTreeMap::new();
    for line in sockets.lines() {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let [_, local, _, _, _, _, _, _, _, inode, _, _, dropped] = columns[..] else { continue };
        if local.ends_with(&suffix) {
            drops.insert(inode, dropped.parse().with_context(|| format!("{dropped} is no count"))?);
        }
    }
    if drops.is_empty() {
        bail!("no socket has UDP port {port}");
    }
    Ok(drops)
}

/// By sockets that are there at the end; one that came meanwhile began at nothing.
fn dropped_since(before: &BTreeMap<&str, u64>, after: &BTreeMap<&str, u64>) -> u64 {
    after.iter().map(|(inode, dropped)| dropped.saturating_sub(before.get(inode).copied().unwrap_or(0))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_counted_at_each_socket_though_they_come_and_go() {
        let line = |local: &str, remote: &str, inode: u64, drops: u64| {
            format!(
                "  42: {local} {remote} 07 00000000:00000000 00:00000000 00000000     0        0 {inode} 2 0 {drops}\n"
            )
        };
        let header = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n";
        let pair = |drops| line("00000000:CA6C", "00000000:0000", 1, drops);
        let connected = |inode, drops| line("0200000A:CA6C", "0100000A:CA6C", inode, drops);
        let other = line("00000000:0035", "00000000:0000", 9, 500);
        let before = [header.to_owned(), connected(2, 900), pair(70), other.clone()].concat();
        let after = [header.to_owned(), connected(3, 40), pair(77), other].concat();
        let since = dropped_since(&drops(&before, 0xca6c).unwrap(), &drops(&after, 0xca6c).unwrap());
        assert_eq!(since, 7 + 40, "what the one that is gone had dropped is not taken off");
        assert!(drops(&before, 51821).is_err());
    }
}
