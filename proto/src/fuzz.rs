//! What must hold for any bytes: one body per decoder, for `proto/fuzz` and for the replay of its corpus in `cargo test`.
//!
//! A body panics when a decoder breaks its promise; a decoder that panics by itself is found the same way. Each body takes
//! any input and needs no setup. A new decoder gets a body here, a line in [`TARGETS`], a target in `proto/fuzz` and a corpus.

use bytes::Bytes;
use mesh_common::id::NodeId;
use mesh_common::key::{ClusterKeys, ClusterSecret, ProbeKey, WgSecret};

use crate::offload::coalesce::Accepts;
use crate::offload::{self, Coalescer, Cut, Malformed, VnetHeader};
use crate::sealed;
use crate::wire::demux::{self, Datagram};
use crate::wire::frame::Frame;
use crate::wire::probe::{self as wire_probe, MAX_PROBE, MIN_PROBE};
use crate::wire::record::{DecodeRecordError, Record};
use crate::wire::session::{ClientMessage, DecodeError, Deframer, ServerMessage, enframe};
use crate::wire::stun;

/// A body by the name of its target and corpus directory.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: [Target; 9] = [
    ("frame", frame),
    ("record", record),
    ("client_message", client_message),
    ("server_message", server_message),
    ("deframer", deframer),
    ("datagram", datagram),
    ("probe", probe),
    ("cut", cut),
    ("coalesce", coalesce),
];

/// A frame is kept byte for byte, and one that opens was signed by the node it names.
pub fn frame(data: &[u8]) {
    let Ok(frame) = Frame::parse(Bytes::copy_from_slice(data)) else { return };
    assert_eq!(frame.as_bytes(), data);
    let (kind, namespace, node, seq) = (frame.kind(), frame.namespace(), frame.node(), frame.seq());
    let opened = sealed::open(&keys(), "fuzz", &frame);
    if opened.is_ok() {
        assert!(frame.verify() && namespace == keys().namespace, "{kind:?} {node} {seq}");
    }
}

/// Bytes that decode encode to themselves.
pub fn record(data: &[u8]) {
    match Record::decode(data) {
        Ok(record) => assert_eq!(record.encode().as_deref(), Ok(data)),
        Err(DecodeRecordError::Malformed | DecodeRecordError::UnknownExtension(_)) => {}
    }
}

/// Bytes that decode encode to themselves.
pub fn client_message(data: &[u8]) {
    match ClientMessage::decode(data) {
        Ok(message) => assert_eq!(message.encode(), data),
        Err(DecodeError::UnknownType(kind)) => assert_eq!(data.first(), Some(&kind)),
        Err(DecodeError::Malformed) => {}
    }
}

/// Bytes that decode encode to themselves.
pub fn server_message(data: &[u8]) {
    match ServerMessage::decode(data) {
        Ok(message) => assert_eq!(message.encode(), data),
        Err(DecodeError::UnknownType(kind)) => assert_eq!(data.first(), Some(&kind)),
        Err(DecodeError::Malformed) => {}
    }
}

/// The first byte is the size of the pieces. Messages put together again are the stream, and pieces change nothing.
pub fn deframer(data: &[u8]) {
    let Some((piece, stream)) = data.split_first() else { return };
    let in_pieces = messages(stream.chunks(usize::from(*piece).max(1)));
    let whole = messages(std::iter::once(stream));
    assert_eq!(in_pieces, whole);
    let again: Vec<u8> = whole.iter().flat_map(|message| enframe(message).to_vec()).collect();
    assert!(stream.starts_with(&again));
}

/// Demux and STUN: an answer is never longer than its request and is read back by a client.
pub fn datagram(data: &[u8]) {
    let class = demux::classify(data);
    assert_eq!(matches!(class, Datagram::Stun), stun::is_stun(data) && data.first() != Some(&demux::PROBE));
    for source in [([192, 0, 2, 1], 7).into(), ([0x20; 16], 7).into()] {
        if let Some(answer) = stun::answer(data, source) {
            assert!(class == Datagram::Stun && answer.bytes.len() <= data.len());
            assert_eq!(stun::parse_response(&answer.bytes).map(|response| response.mapped), Ok(source));
        }
    }
    if stun::parse_response(data).is_ok() {
        assert!(stun::is_stun(data));
    }
}

/// A probe that opens, or a plaintext that parses, is sealed to a datagram that opens to the same.
pub fn probe(data: &[u8]) {
    let key = probe_key();
    let sealed = wire_probe::open(&key, data).ok();
    assert!(
        sealed.is_none() || (MIN_PROBE..=MAX_PROBE).contains(&data.len()) && wire_probe::tag(data) == Some(key.tag)
    );
    for opened in sealed.into_iter().chain(wire_probe::parse(data)) {
        let again = wire_probe::seal(&key, &opened.instance, opened.counter, [7; 24], &opened.probe, None);
        assert_eq!(wire_probe::open(&key, &again), Ok(opened));
    }
}

/// The first ten bytes describe the rest. The pieces of a super-packet are whole packets, none larger than they may be; all the
/// payload is in them.
pub fn cut(data: &[u8]) {
    let Some((header, packet)) = data.split_first_chunk() else { return };
    let packet = &packet[..packet.len().min(offload::MAX_PACKET)];
    let (header, mut whole) = (VnetHeader::parse(header), packet.to_vec());
    match offload::cut::cut(header, &mut whole) {
        Ok(Cut::Whole) => assert_eq!(whole.len(), packet.len()),
        Ok(Cut::Segments(mut segments)) => {
            let mut count = 0;
            while let Some(range) = segments.next(&mut whole) {
                assert!(range.len() <= segments.max_len() && range.end <= packet.len());
                let piece = &whole[range];
                let is_v4 = piece[0] >> 4 == 4;
                let at = if is_v4 { 2 } else { 4 };
                let len = usize::from(u16::from_be_bytes([piece[at], piece[at + 1]])) + if is_v4 { 0 } else { 40 };
                assert_eq!(len, piece.len());
                count += 1;
            }
            let payload = packet.len() - (segments.max_len() - usize::from(header.segment));
            assert_eq!(count, payload.div_ceil(usize::from(header.segment)).max(1));
        }
        Err(Malformed) => {}
    }
}

/// Packets, each after its length in two bytes. What is joined cuts into as many as were joined, and all bytes of payload are
/// there once.
pub fn coalesce(data: &[u8]) {
    let (mut block, mut packets, mut rest) = (Vec::new(), Vec::new(), data);
    while let Some((len, after)) = rest.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes(*len)).min(after.len());
        packets.push(block.len()..block.len() + len);
        block.extend_from_slice(&after[..len]);
        rest = &after[len..];
    }
    let mut coalescer = Coalescer::default();
    let accepts = Accepts { tcp: true, udp: true };
    packets.iter().for_each(|packet| coalescer.add(&block, packet.clone(), accepts));
    coalescer.finish(&mut block);
    let mut total = 0;
    for (header, count, parts) in coalescer.iter(&block) {
        let mut packet = parts.collect::<Vec<_>>().concat();
        assert!(count == 1 || packet.len() <= offload::MAX_PACKET);
        let mut pieces = 1;
        if count > 1 {
            let Ok(Cut::Segments(mut segments)) = offload::cut::cut(header, &mut packet) else {
                panic!("{count} packets were joined to what cannot be cut");
            };
            pieces = std::iter::from_fn(|| segments.next(&mut packet)).count();
        }
        assert_eq!(pieces, count);
        total += count;
    }
    assert_eq!(total, packets.len());
}

/// All messages until the stream ends or breaks.
fn messages<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<Bytes> {
    let mut deframer = Deframer::default();
    let mut messages = Vec::new();
    for piece in pieces {
        deframer.push(piece);
        while let Ok(Some(message)) = deframer.next_message() {
            messages.push(message);
        }
    }
    messages
}

/// The cluster that the corpus was sealed in: the secret is public by design.
fn keys() -> ClusterKeys {
    ClusterSecret::from_bytes(*b"a secret for fuzzing, not secret").derive()
}

/// The key that the corpus of probes was sealed with.
fn probe_key() -> ProbeKey {
    let [(a, a_wg), (b, b_wg)] = [1, 2].map(|n| (NodeId([n; 32]), WgSecret::from_seed(&[n; 32])));
    let keys = keys().probe_keys((a, &a_wg), (b, b_wg.public()));
    keys.expect("the key of a seed is not of small order").send
}
