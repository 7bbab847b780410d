//! One contender in one round: does the steps and gives their figures.

mod junk;
pub mod search;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    bed::{Bed, End},
    contender::Running,
    machine::Cpu,
    metric::{Metric, Step},
    stats::percentile,
    traffic::{Done, Generator, Meet, Order, Rate},
};
use search::{Search, Verdict};

/// Streams while round trips are measured.
const LOAD_STREAMS: usize = 4;
const PING_EVERY: Duration = Duration::from_millis(5);
/// Shortest and longest measurement of an idle round trip: percentiles want answers, but no more of them.
const IDLE: [f64; 2] = [0.5, 2.0];
/// One try of a rate takes this part of a measurement.
const TRY_OF: f64 = 0.25;
const TRY_AT_LEAST: f64 = 0.2;
/// What a sender may fall short of a rate and still count as having offered it.
const OFFERED: f64 = 0.97;
/// For the search of a rate: bursts stay far smaller than any queue.
const FINE: Duration = Duration::from_micros(100);
/// 200 Mbit/s in packets of 1400 bytes, paced as iperf3 does: 18 of them each millisecond.
const UDP200_SIZE: usize = 1400;
const UDP200: Rate = Rate { per_second: 200e6 / 8.0 / UDP200_SIZE as f64, wake_every: Duration::from_millis(1) };
/// What a tunnel may lose of a rate far below its capacity before the step fails.
const UDP200_LOSS: f64 = 0.01;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const UDP_HEADER: usize = 8;

/// The figures of one contender in one round.
pub type Figures = BTreeMap<Metric, f64>;

/// How a contender is measured.
#[derive(Debug)]
pub struct Measuring<'a> {
    pub bed: &'a Bed,
    pub running: &'a Running,
    pub seconds: f64,
    /// Where the searches for a rate begin: what the same contender reached in an earlier round.
    pub before: &'a Figures,
    /// Tries of one search at most.
    pub tries: u32,
}

/// Bytes of one TCP measurement and what they cost.
#[derive(Debug, Clone, Copy)]
struct Carried {
    bytes: u64,
    gbps: f64,
    retransmits: u64,
    machine: Duration,
    daemons: Duration,
}

impl Measuring<'_> {
    /// Does one step; figures that it gives are added.
    pub fn step(&self, step: Step, figures: &mut Figures) -> Result<()> {
        let (left, right) = (&self.bed.left, &self.bed.right);
        let (to_left, to_right) = (self.running.left, self.running.right);
        match step {
            Step::Tcp1 => {
                let carried = self.tcp(left, right, to_right, 1)?;
                let per_byte = |time: Duration| time.as_nanos() as f64 / carried.bytes as f64;
                figures.insert(Metric::Tcp1, carried.gbps);
                figures.insert(Metric::Retransmits, carried.retransmits as f64);
                figures.insert(Metric::CpuPerByte, per_byte(carried.machine));
                if !self.running.pids().is_empty() {
                    figures.insert(Metric::DaemonCpuPerByte, per_byte(carried.daemons));
                }
            }
            Step::Tcp8 => {
                figures.insert(Metric::Tcp8, self.tcp(left, right, to_right, 8)?.gbps);
            }
            Step::Reverse => {
                figures.insert(Metric::Reverse, self.reverse()?);
            }
            Step::Bidir => {
                let (there, back) = self.bidir(to_left, to_right)?;
                figures.insert(Metric::Bidir, there + back);
            }
            Step::Udp1400 => self.lossfree(1400, Metric::Udp1400, figures)?,
            Step::Udp512 => self.lossfree(512, Metric::Udp512, figures)?,
            Step::Udp64 => self.lossfree(64, Metric::Udp64, figures)?,
            Step::Udp200 => {
                if let Some(cost) = self.udp200()? {
                    figures.insert(Metric::Udp200CpuPerByte, cost);
                }
            }
            Step::Rtt => self.rtt(figures)?,
            Step::Junk => junk::measure(self, figures)?,
        }
        Ok(())
    }

    /// Streams from one end to the other, with what they cost.
    fn tcp(&self, from: &End, to: &End, address: IpAddr, streams: usize) -> Result<Carried> {
        let meet = Meet::Listen { at: SocketAddr::new(address, 0), streams };
        let (sink, port) = to.generator.receive(&Order::TcpSink { meet })?;
        let meet = Meet::Connect { to: vec![SocketAddr::new(address, port); streams] };
        let (before, daemons) = (Cpu::now(&[])?, self.running.cpu()?);
        let Done::TcpSent { retransmits, .. } =
            from.generator.run(&Order::TcpSource { meet, seconds: self.seconds })?
        else {
            bail!("a TCP sender did not tell what it sent");
        };
        let (bytes, gbps) = received(sink.done()?)?;
        let (machine, daemons) = (before.used()?, daemons.used()?);
        Ok(Carried {
            bytes,
            gbps,
            retransmits,
            machine: machine.machine,
            daemons: daemons.processes + daemons.ksoftirqd,
        })
    }

    /// The left end connects, the right end sends.
    fn reverse(&self) -> Result<f64> {
        let at = SocketAddr::new(self.running.right, 0);
        let source = Order::TcpSource { meet: Meet::Listen { at, streams: 1 }, seconds: self.seconds };
        let (source, port) = self.bed.right.generator.receive(&source)?;
        let to = vec![SocketAddr::new(self.running.right, port)];
        let sink = self.bed.left.generator.run(&Order::TcpSink { meet: Meet::Connect { to } })?;
        source.done()?;
        Ok(received(sink)?.1)
    }

    fn bidir(&self, to_left: IpAddr, to_right: IpAddr) -> Result<(f64, f64)> {
        let (left, right) = (&self.bed.left.generator, &self.bed.right.generator);
        let way = |from: &Generator, to: &Generator, address: IpAddr| {
            let meet = Meet::Listen { at: SocketAddr::new(address, 0), streams: 1 };
            let (sink, port) = to.receive(&Order::TcpSink { meet })?;
            let meet = Meet::Connect { to: vec![SocketAddr::new(address, port)] };
            anyhow::Ok((from.order(&Order::TcpSource { meet, seconds: self.seconds })?, sink))
        };
        let ways = [way(left, right, to_right)?, way(right, left, to_left)?];
        let [there, back] = ways.map(|(source, sink)| -> Result<f64> {
            source.done()?;
            Ok(received(sink.done()?)?.1)
        });
        Ok((there?, back?))
    }

    /// Searches the highest rate at which every packet arrives.
    fn lossfree(&self, size: usize, metric: Metric, figures: &mut Figures) -> Result<()> {
        // Of figures and of rates: kilo-packets for the smallest, Mbit/s else.
        let unit = if metric == Metric::Udp64 { 1e3 } else { 1e6 / 8.0 / size as f64 };
        let start = self.before.get(&metric).filter(|rate| **rate > 0.0).map_or(20_000.0, |rate| rate * unit);
        let seconds = (self.seconds * TRY_OF).max(TRY_AT_LEAST);
        let mut search = Search::new(start, self.tries);
        while let Some(rate) = search.next_rate() {
            let (sent, received, offered) = self.udp(size, Rate { per_second: rate, wake_every: FINE }, seconds)?;
            let arrived = sent > 0 && received >= sent && offered >= rate * OFFERED;
            search.note(if arrived { Verdict::AllArrived(offered) } else { Verdict::Lost });
        }
        figures.insert(metric, search.highest() / unit);
        Ok(())
    }

    /// Both daemons' CPU per byte at a rate that everybody carries; `None` where there is no daemon.
    fn udp200(&self) -> Result<Option<f64>> {
        let before = self.running.cpu()?;
        let (sent, received, _) = self.udp(UDP200_SIZE, UDP200, self.seconds)?;
        let used = before.used()?;
        ensure!(
            received as f64 >= sent as f64 * (1.0 - UDP200_LOSS),
            "of {sent} datagrams at 200 Mbit/s only {received} arrived"
        );
        let bytes = received * UDP200_SIZE as u64;
        let cost = (used.processes + used.ksoftirqd).as_nanos() as f64 / bytes as f64;
        Ok((!self.running.pids().is_empty()).then_some(cost))
    }

    /// Packets of `size` bytes from left to right: sent, arrived, and the rate that was really offered.
    fn udp(&self, size: usize, rate: Rate, seconds: f64) -> Result<(u64, u64, f64)> {
        let at = SocketAddr::new(self.running.right, 0);
        // Late datagrams of one run must not count in the next.
        let run = self.bed.next_run();
        let (sink, port) = self.bed.right.generator.receive(&Order::UdpSink { at, run })?;
        let to = SocketAddr::new(self.running.right, port);
        let source = Order::UdpSource { to, run, size: size - headers(to), rate, seconds };
        let Done::UdpSent { sent, nanos, .. } = self.bed.left.generator.run(&source)? else {
            bail!("a UDP sender did not tell what it sent");
        };
        let Done::UdpReceived { received, .. } = sink.finish()? else {
            bail!("a UDP receiver did not tell what came");
        };
        Ok((sent, received, sent as f64 / (nanos as f64 / 1e9)))
    }

    fn rtt(&self, figures: &mut Figures) -> Result<()> {
        let idle = self.pings(self.seconds.clamp(IDLE[0], IDLE[1]))?;
        figures.insert(Metric::RttIdleP50, micros(&idle, 50)?);
        figures.insert(Metric::RttIdleP99, micros(&idle, 99)?);
        let right = self.running.right;
        let meet = Meet::Listen { at: SocketAddr::new(right, 0), streams: LOAD_STREAMS };
        let (sink, port) = self.bed.right.generator.receive(&Order::TcpSink { meet })?;
        let meet = Meet::Connect { to: vec![SocketAddr::new(right, port); LOAD_STREAMS] };
        let source = self.bed.left.generator.order(&Order::TcpSource { meet, seconds: self.seconds })?;
        // Ends before the load does.
        let loaded = self.pings(self.seconds * 0.9)?;
        source.done()?;
        sink.done()?;
        figures.insert(Metric::RttLoadedP50, micros(&loaded, 50)?);
        figures.insert(Metric::RttLoadedP99, micros(&loaded, 99)?);
        Ok(())
    }

    /// Round trips from left to right, sorted. One that was never answered counts as a second, so that loss is no advantage.
    fn pings(&self, seconds: f64) -> Result<Vec<u64>> {
        let at = SocketAddr::new(self.running.right, 0);
        let (echo, port) = self.bed.right.generator.receive(&Order::Echo { at })?;
        let to = SocketAddr::new(self.running.right, port);
        let every_micros = u64::try_from(PING_EVERY.as_micros())?;
        let Done::Pinged { mut nanos, lost } =
            self.bed.left.generator.run(&Order::Ping { to, every_micros, seconds })?
        else {
            bail!("pings were not counted");
        };
        echo.finish()?;
        nanos.extend(std::iter::repeat_n(1_000_000_000, usize::try_from(lost)?));
        nanos.sort_unstable();
        Ok(nanos)
    }
}

/// Bytes of a UDP packet to this address before its payload.
fn headers(to: SocketAddr) -> usize {
    UDP_HEADER + if to.is_ipv4() { IPV4_HEADER } else { IPV6_HEADER }
}

fn received(done: Done) -> Result<(u64, f64)> {
    let Done::TcpReceived { bytes, nanos } = done else { bail!("a TCP receiver did not tell what came") };
    Ok((bytes, bytes as f64 * 8.0 / nanos as f64))
}

fn micros(sorted: &[u64], percent: usize) -> Result<f64> {
    Ok(percentile(sorted, percent).context("no ping was sent")? as f64 / 1e3)
}
