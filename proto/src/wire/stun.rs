//! STUN binding (RFC 8489) for both sides, with RFC 5780's request to be answered from another port or address. Pure
//! functions.
//!
//! Refuses everything else of STUN: no authentication, no other methods, no other transports. A server's answer is never
//! longer than its request, so it is worth nothing to an attacker who forges his victim's address: our requests bring
//! room for the answer, a request without it is dropped.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::wire::address::canonical;

const HEADER_LEN: usize = 20;
const MAGIC_COOKIE: u32 = 0x2112_a442;
const BINDING_REQUEST: u16 = 0x0001;
const BINDING_SUCCESS: u16 = 0x0101;
const BINDING_ERROR: u16 = 0x0111;

const CHANGE_REQUEST: u16 = 0x0003;
const ERROR_CODE: u16 = 0x0009;
const XOR_MAPPED_ADDRESS: u16 = 0x0020;
const PADDING: u16 = 0x0026;
const SOFTWARE: u16 = 0x8022;
/// Attributes from here on may be ignored when they are not known.
const OPTIONAL: u16 = 0x8000;

const CHANGE_PORT: u32 = 0x02;
const CHANGE_ADDRESS: u32 = 0x04;
const FAMILY_V4: u8 = 1;
const FAMILY_V6: u8 = 2;

/// What a client calls itself, as long as the longest answer is longer than an empty request: an attribute that every
/// server knows or ignores, where PADDING would be an error to servers without RFC 5780.
const SOFTWARE_VALUE: &[u8; 24] = b"meshspan                ";

/// From where a client wants its answer (CHANGE-REQUEST): as asked, from the server's other port, its other address, or both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    pub address: bool,
    pub port: bool,
}

impl Change {
    /// The answer comes from where the request went.
    pub const NONE: Self = Self { address: false, port: false };
    pub const PORT: Self = Self { address: false, port: true };
    pub const ADDRESS: Self = Self { address: true, port: false };
    pub const BOTH: Self = Self { address: true, port: true };

    fn flags(self) -> u32 {
        CHANGE_PORT * u32::from(self.port) + CHANGE_ADDRESS * u32::from(self.address)
    }

    fn from_flags(flags: u32) -> Self {
        Self { address: flags & CHANGE_ADDRESS != 0, port: flags & CHANGE_PORT != 0 }
    }
}

/// What a server sends back, and from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub bytes: Vec<u8>,
    /// A server without such an address or port gives no answer.
    pub from: Change,
}

/// A server's success response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response {
    /// The request this answers: the caller compares it with what it sent, to whom.
    pub transaction: [u8; 12],
    /// The client's address as the server saw it.
    pub mapped: SocketAddr,
}

/// Why a datagram is no usable response. The server is at fault, or someone who pretends to be it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResponseError {
    #[error("it is no STUN response to a binding request")]
    NotAResponse,
    #[error("it is malformed")]
    Malformed,
    #[error("it has no mapped address")]
    NoAddress,
    #[error("the server answered with error {0}")]
    Refused(u16),
}

/// Whether a datagram has the shape of a STUN message: two zero bits, the cookie, its own length.
pub fn is_stun(datagram: &[u8]) -> bool {
    Message::parse(datagram).is_some()
}

/// A binding request with room for its answer. `transaction` is random.
pub fn binding_request(transaction: &[u8; 12], from: Change) -> Vec<u8> {
    let mut message = start(BINDING_REQUEST, transaction);
    if from != Change::NONE {
        attribute(&mut message, CHANGE_REQUEST, &from.flags().to_be_bytes());
    }
    attribute(&mut message, SOFTWARE, SOFTWARE_VALUE);
    finish(message)
}

/// The transaction of a binding request: our own may come back to us through a NAT that hairpins.
pub fn request_transaction(datagram: &[u8]) -> Option<[u8; 12]> {
    Message::parse(datagram).filter(|message| message.kind == BINDING_REQUEST).map(|message| message.transaction)
}

/// Reads a server's response to a binding request.
pub fn parse_response(datagram: &[u8]) -> Result<Response, ResponseError> {
    let message = Message::parse(datagram).ok_or(ResponseError::NotAResponse)?;
    if message.kind != BINDING_SUCCESS && message.kind != BINDING_ERROR {
        return Err(ResponseError::NotAResponse);
    }
    let mut mapped = None;
    let mut refused = None;
    for attribute in message.attributes() {
        match attribute.ok_or(ResponseError::Malformed)? {
            (XOR_MAPPED_ADDRESS, value) if mapped.is_none() => {
                mapped = Some(xor_address(value, &message.transaction).ok_or(ResponseError::Malformed)?);
            }
            (ERROR_CODE, &[_, _, class, number, ..]) => refused = Some(u16::from(class & 7) * 100 + u16::from(number)),
            _ => {}
        }
    }
    if message.kind == BINDING_ERROR {
        return Err(refused.map_or(ResponseError::Malformed, ResponseError::Refused));
    }
    let mapped = mapped.ok_or(ResponseError::NoAddress)?;
    Ok(Response { transaction: message.transaction, mapped })
}

/// A server's answer to a datagram from `source`; `None` for what gets none: no binding request, malformed, an attribute
/// that must be understood and is not, or too short for its answer.
pub fn answer(datagram: &[u8], source: SocketAddr) -> Option<Answer> {
    let request = Message::parse(datagram).filter(|message| message.kind == BINDING_REQUEST)?;
    let mut from = Change::NONE;
    for attribute in request.attributes() {
        match attribute? {
            (CHANGE_REQUEST, value) => from = Change::from_flags(u32::from_be_bytes(value.try_into().ok()?)),
            (PADDING, _) | (OPTIONAL.., _) => {}
            _ => return None,
        }
    }
    let mut message = start(BINDING_SUCCESS, &request.transaction);
    attribute(&mut message, XOR_MAPPED_ADDRESS, &xored(canonical(source), &request.transaction));
    let bytes = finish(message);
    (bytes.len() <= datagram.len()).then_some(Answer { bytes, from })
}

/// A message of sound head; its attributes are read as they are walked.
struct Message<'a> {
    kind: u16,
    transaction: [u8; 12],
    body: &'a [u8],
}

impl<'a> Message<'a> {
    fn parse(datagram: &'a [u8]) -> Option<Self> {
        let (head, body) = datagram.split_first_chunk::<HEADER_LEN>()?;
        let kind = u16::from_be_bytes([head[0], head[1]]);
        let len = usize::from(u16::from_be_bytes([head[2], head[3]]));
        let cookie = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        let sound = kind >> 14 == 0 && cookie == MAGIC_COOKIE && len == body.len() && len.is_multiple_of(4);
        let transaction = *head.last_chunk()?;
        sound.then_some(Self { kind, transaction, body })
    }

    /// Type and value of each attribute; a last `None` where one does not fit.
    fn attributes(&self) -> impl Iterator<Item = Option<(u16, &'a [u8])>> {
        let mut rest = self.body;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let next = split_attribute(rest);
            rest = next.map_or(&[], |(_, _, later)| later);
            Some(next.map(|(kind, value, _)| (kind, value)))
        })
    }
}

fn split_attribute(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<4>()?;
    let len = usize::from(u16::from_be_bytes([head[2], head[3]]));
    let (padded, later) = rest.split_at_checked(len.next_multiple_of(4))?;
    Some((u16::from_be_bytes([head[0], head[1]]), &padded[..len], later))
}

/// A message without its length.
fn start(kind: u16, transaction: &[u8; 12]) -> Vec<u8> {
    let mut message = Vec::with_capacity(64);
    message.extend_from_slice(&kind.to_be_bytes());
    message.extend_from_slice(&[0, 0]);
    message.extend_from_slice(&MAGIC_COOKIE.to_be_bytes());
    message.extend_from_slice(transaction);
    message
}

/// Adds an attribute whose value is a multiple of 4 bytes, as all of ours are.
fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = u16::try_from(value.len()).expect("our attributes are short");
    message.extend_from_slice(&kind.to_be_bytes());
    message.extend_from_slice(&len.to_be_bytes());
    message.extend_from_slice(value);
}

fn finish(mut message: Vec<u8>) -> Vec<u8> {
    let len = u16::try_from(message.len() - HEADER_LEN).expect("our messages are short");
    message[2..4].copy_from_slice(&len.to_be_bytes());
    message
}

/// The value of XOR-MAPPED-ADDRESS: zero, family, port and address, both XORed.
fn xored(addr: SocketAddr, transaction: &[u8; 12]) -> Vec<u8> {
    let port = addr.port() ^ (MAGIC_COOKIE >> 16) as u16;
    let mut value = vec![0, if addr.is_ipv4() { FAMILY_V4 } else { FAMILY_V6 }];
    value.extend_from_slice(&port.to_be_bytes());
    match addr.ip() {
        IpAddr::V4(v4) => value.extend_from_slice(&(v4.to_bits() ^ MAGIC_COOKIE).to_be_bytes()),
        IpAddr::V6(v6) => value.extend_from_slice(&(v6.to_bits() ^ mask_v6(transaction)).to_be_bytes()),
    }
    value
}

fn xor_address(value: &[u8], transaction: &[u8; 12]) -> Option<SocketAddr> {
    let (&[_, family, high, low], addr) = value.split_first_chunk()?;
    let port = u16::from_be_bytes([high, low]) ^ (MAGIC_COOKIE >> 16) as u16;
    let ip = match family {
        FAMILY_V4 => IpAddr::from(Ipv4Addr::from_bits(u32::from_be_bytes(addr.try_into().ok()?) ^ MAGIC_COOKIE)),
        FAMILY_V6 => {
            IpAddr::from(Ipv6Addr::from_bits(u128::from_be_bytes(addr.try_into().ok()?) ^ mask_v6(transaction)))
        }
        _ => return None,
    };
    Some(canonical(SocketAddr::new(ip, port)))
}

/// The cookie, then the transaction id.
fn mask_v6(transaction: &[u8; 12]) -> u128 {
    let mut mask = [0; 16];
    mask[..4].copy_from_slice(&MAGIC_COOKIE.to_be_bytes());
    mask[4..].copy_from_slice(transaction);
    u128::from_be_bytes(mask)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const ID: [u8; 12] = *b"transaction!";

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_client_learns_the_address_the_server_saw() {
        for source in ["192.0.2.1:32853", "[2001:db8:1234:5678:11:2233:4455:6677]:32853"] {
            for from in [Change::NONE, Change::PORT, Change::ADDRESS, Change::BOTH] {
                let request = binding_request(&ID, from);
                let answer = answer(&request, addr(source)).unwrap();
                assert!(answer.bytes.len() <= request.len(), "{source}");
                assert_eq!(answer.from, from);
                assert_eq!(parse_response(&answer.bytes), Ok(Response { transaction: ID, mapped: addr(source) }));
            }
        }
        let dual_stack = answer(&binding_request(&ID, Change::NONE), addr("[::ffff:192.0.2.1]:7")).unwrap();
        assert_eq!(parse_response(&dual_stack.bytes).unwrap().mapped, addr("192.0.2.1:7"));
    }

    /// The sample response of RFC 5769, 2.2 (its FINGERPRINT and MESSAGE-INTEGRITY are not looked at).
    #[test]
    fn the_sample_response_of_rfc_5769_is_read() {
        let sample = data_encoding::HEXLOWER
            .decode(
                b"0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f722000200008\
                  0001a147e112a643000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96",
            )
            .unwrap();
        assert_eq!(parse_response(&sample).unwrap().mapped, addr("192.0.2.1:32853"));
    }

    #[test]
    fn a_server_answers_nothing_longer_than_its_request() {
        let bare = finish(start(BINDING_REQUEST, &ID));
        assert_eq!(bare.len(), 20);
        assert_eq!(answer(&bare, addr("192.0.2.1:1")), None);
        let padded = |len: usize| {
            let mut message = start(BINDING_REQUEST, &ID);
            attribute(&mut message, PADDING, &vec![0; len]);
            finish(message)
        };
        assert_eq!(answer(&padded(4), addr("192.0.2.1:1")), None);
        assert_eq!(answer(&padded(8), addr("192.0.2.1:1")).unwrap().bytes.len(), 32);
        assert_eq!(answer(&padded(16), addr("[2001:db8::1]:1")), None);
        assert_eq!(answer(&padded(20), addr("[2001:db8::1]:1")).unwrap().bytes.len(), 44);
    }

    #[test]
    fn what_is_no_plain_binding_request_gets_no_answer() {
        let with = |kind, attributes: &[(u16, &[u8])]| {
            let mut message = start(kind, &ID);
            for (attribute_kind, value) in attributes {
                attribute(&mut message, *attribute_kind, value);
            }
            attribute(&mut message, SOFTWARE, SOFTWARE_VALUE);
            answer(&finish(message), addr("192.0.2.1:1"))
        };
        assert!(with(BINDING_REQUEST, &[]).is_some());
        assert_eq!(with(BINDING_SUCCESS, &[]), None);
        assert_eq!(with(0x0003, &[]), None);
        assert_eq!(with(BINDING_REQUEST, &[(CHANGE_REQUEST, &[0; 8])]), None);
        // RESPONSE-PORT and USERNAME must be understood, FINGERPRINT need not.
        assert_eq!(with(BINDING_REQUEST, &[(0x0027, &[0; 4])]), None);
        assert_eq!(with(BINDING_REQUEST, &[(0x0006, &[0; 4])]), None);
        assert!(with(BINDING_REQUEST, &[(0x8028, &[0; 4])]).is_some());
    }

    #[test]
    fn errors_and_foreign_messages_are_told_apart() {
        let mut error = start(BINDING_ERROR, &ID);
        attribute(&mut error, ERROR_CODE, &[0, 0, 4, 20]);
        assert_eq!(parse_response(&finish(error)), Err(ResponseError::Refused(420)));
        assert_eq!(parse_response(&finish(start(BINDING_SUCCESS, &ID))), Err(ResponseError::NoAddress));
        assert_eq!(parse_response(&binding_request(&ID, Change::NONE)), Err(ResponseError::NotAResponse));
        assert_eq!(parse_response(b"not STUN"), Err(ResponseError::NotAResponse));
    }

    #[test]
    fn messages_cut_or_with_attributes_that_do_not_fit_are_refused() {
        let good = answer(&binding_request(&ID, Change::NONE), addr("192.0.2.1:1")).unwrap().bytes;
        for len in 0..good.len() {
            assert!(parse_response(&good[..len]).is_err(), "{len}");
        }
        for wrong_len in [0, 4, 9, 12, 0xffff_u16] {
            let mut bad = good.clone();
            bad[22..24].copy_from_slice(&wrong_len.to_be_bytes());
            assert_eq!(parse_response(&bad), Err(ResponseError::Malformed), "{wrong_len}");
        }
    }
}
