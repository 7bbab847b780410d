//! Round trips of small UDP datagrams.

use std::{
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};

use super::{Done, serve::Parent, udp};

const SIZE: usize = 64;
/// An answer that takes longer is lost.
const LATE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(50);

pub(super) fn echo(at: SocketAddr, parent: &mut Parent) -> Result<Done> {
    let socket = UdpSocket::bind(at).with_context(|| format!("cannot receive on {at}"))?;
    socket.set_read_timeout(Some(LOOK))?;
    let finished = parent.finished()?;
    parent.ready(socket.local_addr()?)?;
    let (mut block, mut echoed) = ([0; 2048], 0);
    while !finished.load(Ordering::Acquire) {
        match socket.recv_from(&mut block) {
            Ok((length, from)) => {
                // What is not sent back is a lost answer to who asked.
                echoed += u64::from(socket.send_to(&block[..length], from).is_ok());
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Done::Echoed(echoed))
}

pub(super) fn ping(to: SocketAddr, every_micros: u64, seconds: f64) -> Result<Done> {
    let socket = udp::bind_any(to)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(LATE))?;
    let every = Duration::from_micros(every_micros.max(1));
    let count = (seconds / every.as_secs_f64()).ceil() as u64;
    let start = Instant::now();
    let mut nanos = vec![None; usize::try_from(count)?];
    thread::scope(|scope| {
        // The sender never waits for answers: a slow one must not thin out the questions that would be slow too.
        let sender = scope.spawn(|| -> Result<()> {
            nix::sys::prctl::set_timerslack(1)?;
            for number in 0..count {
                thread::sleep((every * u32::try_from(number)?).saturating_sub(start.elapsed()));
                let mut datagram = [0; SIZE];
                datagram[..8].copy_from_slice(&number.to_be_bytes());
                datagram[8..16].copy_from_slice(&u64::try_from(start.elapsed().as_nanos())?.to_be_bytes());
                // Not sent is not answered.
                let _ = socket.send(&datagram);
            }
            Ok(())
        });
        let mut block = [0; SIZE];
        let mut answered = 0;
        while answered < count {
            let Ok(length) = socket.recv(&mut block) else {
                // Nothing for LATE: the rest is lost if no question is outstanding any more.
                if sender.is_finished() {
                    break;
                }
                continue;
            };
            let now = u64::try_from(start.elapsed().as_nanos())?;
            if let (SIZE, Some(number), Some(sent)) = (length, word(&block, 0), word(&block, 8))
                && let Some(slot @ None) = usize::try_from(number).ok().and_then(|number| nanos.get_mut(number))
            {
                *slot = Some(now.saturating_sub(sent));
                answered += 1;
            }
        }
        sender.join().map_err(|_| anyhow!("the sender of pings panicked"))??;
        anyhow::Ok(())
    })?;
    let lost = nanos.iter().filter(|rtt| rtt.is_none()).count() as u64;
    Ok(Done::Pinged { nanos: nanos.into_iter().flatten().collect(), lost })
}

fn word(block: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*block.get(at..)?.first_chunk::<8>()?))
}
