//! PCP (RFC 6887) or NAT-PMP (RFC 6886) on UDP 5351, as far as mapping one UDP port goes.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, UdpSocket},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result};

use super::{Manner, Protocol, Shared, serve};

const PORT: u16 = 5351;
const PCP: u8 = 2;
const RESPONSE: u8 = 0x80;
const MAP: u8 = 1;
const EXTERNAL_ADDRESS: u8 = 0;
const UDP: u8 = 17;
const OK: u8 = 0;
const UNSUPPORTED_VERSION: u8 = 1;
const MALFORMED: u8 = 3;
const ADDRESS_MISMATCH: u8 = 12;

pub(super) fn start(shared: &Arc<Shared>) -> Result<JoinHandle<Result<()>>> {
    let socket = shared.host.inside(|| UdpSocket::bind((shared.options.inside, PORT)).context("cannot bind 5351"))?;
    shared.host.start_inside({
        let shared = Arc::clone(shared);
        move || {
            serve(&shared, &socket, |request, from| match shared.options.manner {
                Manner::Hangs => Ok(None),
                // Of every length, also none.
                Manner::Garbage => Ok(Some(vec![request.len() as u8; shared.book().heard * 7 % 100])),
                _ => answer(&shared, request, from).map(Some),
            })
        }
    })
}

fn answer(shared: &Shared, request: &[u8], from: SocketAddr) -> Result<Vec<u8>> {
    match (shared.options.protocol, request.first()) {
        (Protocol::Pcp, Some(&PCP)) => by_pcp(shared, request, from),
        (Protocol::NatPmp, Some(0)) => by_nat_pmp(shared, request, from),
        (Protocol::Pcp, _) => Ok(refused(shared, PCP, request)),
        (Protocol::NatPmp | Protocol::Upnp, _) => Ok(refused(shared, 0, request)),
    }
}

/// This router speaks the other version.
fn refused(shared: &Shared, own: u8, request: &[u8]) -> Vec<u8> {
    let opcode = request.get(1).copied().unwrap_or_default();
    let mut answer = vec![own, RESPONSE | opcode, 0, UNSUPPORTED_VERSION];
    answer.extend(shared.epoch().to_be_bytes());
    if own == PCP {
        answer.resize(24, 0);
    }
    answer
}

fn by_pcp(shared: &Shared, request: &[u8], from: SocketAddr) -> Result<Vec<u8>> {
    let Some(request) = request.first_chunk::<60>() else { return Ok(failed(shared, request, MALFORMED)) };
    let client = Ipv6Addr::from(<[u8; 16]>::try_from(&request[8..24])?);
    let (IpAddr::V4(client), true) = (client.to_canonical(), client.to_canonical() == from.ip()) else {
        return Ok(failed(shared, request, ADDRESS_MISMATCH));
    };
    let port = u16::from_be_bytes([request[40], request[41]]);
    if request[1] != MAP || request[36] != UDP || port == 0 {
        return Ok(failed(shared, request, MALFORMED));
    }
    let asked = u32::from_be_bytes([request[4], request[5], request[6], request[7]]);
    let to = SocketAddrV4::new(client, port);
    let mut answer = request.to_vec();
    answer[1] |= RESPONSE;
    answer[2..4].copy_from_slice(&[0, OK]);
    answer[8..12].copy_from_slice(&shared.epoch().to_be_bytes());
    answer[12..24].fill(0);
    let lifetime = seconds(shared, asked);
    answer[4..8].copy_from_slice(&lifetime.to_be_bytes());
    if asked == 0 {
        shared.release(|_, led| led == to)?;
    } else {
        let external = shared.lead(to, Some(Duration::from_secs(lifetime.into())))?;
        answer[42..44].copy_from_slice(&external.to_be_bytes());
    }
    answer[44..60].copy_from_slice(&shared.told().to_ipv6_mapped().octets());
    Ok(answer)
}

fn failed(shared: &Shared, request: &[u8], code: u8) -> Vec<u8> {
    let mut answer = request.to_vec();
    answer.resize(60, 0);
    answer[0] = PCP;
    answer[1] |= RESPONSE;
    answer[2..4].copy_from_slice(&[0, code]);
    answer[8..12].copy_from_slice(&shared.epoch().to_be_bytes());
    answer
}

fn by_nat_pmp(shared: &Shared, request: &[u8], from: SocketAddr) -> Result<Vec<u8>> {
    let opcode = request.get(1).copied().unwrap_or_default();
    let mut answer = vec![0, RESPONSE | opcode, 0, OK];
    answer.extend(shared.epoch().to_be_bytes());
    let SocketAddr::V4(from) = from else { return Ok(answer) };
    match (opcode, request.first_chunk::<12>()) {
        (EXTERNAL_ADDRESS, _) => answer.extend(Ipv4Addr::octets(&shared.told())),
        (MAP, Some(request)) => {
            let port = u16::from_be_bytes([request[4], request[5]]);
            let asked = u32::from_be_bytes([request[8], request[9], request[10], request[11]]);
            let to = SocketAddrV4::new(*from.ip(), port);
            let lifetime = seconds(shared, asked);
            let external = if asked == 0 {
                shared.release(|_, led| led == to)?;
                0
            } else {
                shared.lead(to, Some(Duration::from_secs(lifetime.into())))?
            };
            answer.extend(port.to_be_bytes());
            answer.extend(external.to_be_bytes());
            answer.extend(lifetime.to_be_bytes());
        }
        // 5 = unsupported opcode.
        _ => answer[3] = 5,
    }
    Ok(answer)
}

fn seconds(shared: &Shared, asked: u32) -> u32 {
    asked.min(u32::try_from(shared.options.lifetime.as_secs()).unwrap_or(u32::MAX))
}
