//! A router's port mapping service: PCP, NAT-PMP or UPnP, well or badly, written from their specifications.
//!
//! What it leads inside it leads by rules in a table of its own; the router's firewall lets in what was led
//! ([`crate::nat::rules`]). Knows nothing of the programs under test. Its bookkeeping is for tests to read.

mod pcp;
mod upnp;

pub(crate) use upnp::HTTP_PORT;

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{
    Host,
    nft::rules::{Chain, ChainType, Family, Hook, Rule, Table, UDP, Verdict},
};

/// How often a thread looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);
/// External ports are given from here on, whatever was asked for: so a capture tells which way a packet took.
const FIRST_PORT: u16 = 41_000;
const TABLE: &str = "ports";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Pcp,
    NatPmp,
    Upnp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Leads the port, and tells the address of its outer link.
    Honest,
    /// The same, and tells another address.
    Tells(Ipv4Addr),
    /// Says all that an honest one says, and leads nothing.
    Promises,
    /// Hears everything and says nothing.
    Hangs,
    /// Answers everything with something.
    Garbage,
}

#[derive(Debug, Clone, Copy)]
pub struct GatewayOptions {
    pub protocol: Protocol,
    pub manner: Manner,
    /// The router's links, and its addresses there.
    pub inside: Ipv4Addr,
    pub outer_link: &'static str,
    pub outside: Ipv4Addr,
    pub lifetime: Duration,
}

/// A running service. Dropping it ends it; what it led stays until its rules are replaced.
#[derive(Debug)]
pub struct Gateway {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

#[derive(Debug)]
struct Shared {
    host: Host,
    options: GatewayOptions,
    began: Instant,
    stop: AtomicBool,
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    led: BTreeMap<u16, Led>,
    /// Every mapping that was asked for, renewals too.
    granted: Vec<Instant>,
    released: usize,
    /// Whatever came in.
    heard: usize,
}

#[derive(Debug, Clone, Copy)]
struct Led {
    to: SocketAddrV4,
    until: Option<Instant>,
}

impl Gateway {
    pub fn start(host: &Host, options: GatewayOptions) -> Result<Self> {
        let shared = Arc::new(Shared {
            host: host.clone(),
            options,
            began: Instant::now(),
            stop: AtomicBool::new(false),
            book: Mutex::default(),
        });
        shared.load()?;
        let mut threads = vec![host.start_inside({
            let shared = Arc::clone(&shared);
            move || shared.expire()
        })?];
        match options.protocol {
            Protocol::Pcp | Protocol::NatPmp => threads.push(pcp::start(&shared)?),
            Protocol::Upnp => threads.extend(upnp::start(&shared)?),
        }
        Ok(Self { shared, threads })
    }

    /// External ports that lead inside now, and where to.
    pub fn led(&self) -> Vec<(u16, SocketAddrV4)> {
        self.shared.book().led.iter().map(|(port, led)| (*port, led.to)).collect()
    }

    /// When mappings were granted or renewed.
    pub fn granted(&self) -> Vec<Instant> {
        self.shared.book().granted.clone()
    }

    pub fn released(&self) -> usize {
        self.shared.book().released
    }

    /// Datagrams and requests that came in.
    pub fn heard(&self) -> usize {
        self.shared.book().heard
    }

    /// As a restart does: nothing is led any more.
    pub fn forget(&self) -> Result<()> {
        self.shared.book().led.clear();
        self.shared.load()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if let Ok(Err(error)) = thread.join() {
                eprintln!("the gateway of {}: {error:#}", self.shared.host.name());
            }
        }
    }
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn epoch(&self) -> u32 {
        self.began.elapsed().as_secs() as u32
    }

    /// What this router says its public address is.
    fn told(&self) -> Ipv4Addr {
        match self.options.manner {
            Manner::Tells(address) => address,
            _ => self.options.outside,
        }
    }

    fn hear(&self) {
        self.book().heard += 1;
    }

    /// Leads a port to this socket: the one that leads there already, or a free one.
    fn lead(&self, to: SocketAddrV4, lifetime: Option<Duration>) -> Result<u16> {
        let port = {
            let book = self.book();
            let held = book.led.iter().find(|(_, led)| led.to == to).map(|(port, _)| *port);
            held.or_else(|| (FIRST_PORT..).find(|port| !book.led.contains_key(port)))
        };
        let port = port.context("all ports are led already")?;
        self.lead_by(port, to, lifetime)?;
        Ok(port)
    }

    /// `None` = until it is released.
    fn lead_by(&self, port: u16, to: SocketAddrV4, lifetime: Option<Duration>) -> Result<()> {
        let mut book = self.book();
        book.granted.push(Instant::now());
        book.led.insert(port, Led { to, until: lifetime.map(|lifetime| Instant::now() + lifetime) });
        drop(book);
        self.load()
    }

    fn release(&self, is_meant: impl Fn(u16, SocketAddrV4) -> bool) -> Result<()> {
        let mut book = self.book();
        let before = book.led.len();
        book.led.retain(|port, led| !is_meant(*port, led.to));
        book.released += before - book.led.len();
        drop(book);
        self.load()
    }

    /// Forgets what nobody renewed.
    fn expire(&self) -> Result<()> {
        while !self.is_over() {
            let mut book = self.book();
            let before = book.led.len();
            book.led.retain(|_, led| led.until.is_none_or(|until| Instant::now() < until));
            let has_changed = book.led.len() != before;
            drop(book);
            if has_changed {
                self.load()?;
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// The rules for what is led. Flows that began before a change keep what they had, as on any router.
    fn load(&self) -> Result<()> {
        let led = self.book().led.clone();
        let wan = self.options.outer_link;
        let rule =
            |(port, led): (u16, Led)| Rule::new().from_link(wan).protocol(UDP).destination_port(port).dnat_to(led.to);
        let is_true = self.options.manner != Manner::Promises;
        let rules: Vec<Rule> = led.into_iter().filter(|_| is_true).map(rule).collect();
        let chain = Chain {
            name: "pre",
            kind: ChainType::Nat,
            hook: Hook::Prerouting,
            priority: -101,
            policy: Verdict::Accept,
            rules,
        };
        self.host.load_rules(&[Table { family: Family::Ip, name: TABLE, sets: Vec::new(), chains: vec![chain] }])
    }
}

/// Calls `answer` for each datagram until the gateway ends; it may say nothing.
fn serve(
    shared: &Shared,
    socket: &UdpSocket,
    answer: impl Fn(&[u8], SocketAddr) -> Result<Option<Vec<u8>>>,
) -> Result<()> {
    let mut buffer = [0; 2048];
    socket.set_read_timeout(Some(LOOK))?;
    while !shared.is_over() {
        let (length, from) = match socket.recv_from(&mut buffer) {
            Ok(heard) => heard,
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) =>
            {
                continue;
            }
            Err(error) => return Err(error).context("cannot hear"),
        };
        shared.hear();
        if let Some(answer) = answer(&buffer[..length], from)? {
            // A client that is gone by now is no matter.
            let _ = socket.send_to(&answer, from);
        }
    }
    Ok(())
}
