//! What the session between agent and server costs: the proof at its start, then one message a changed record.

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use mesh_bench::member::{Member, cluster_keys, frames};
use mesh_common::id::NodeId;
use mesh_proto::wire::session::{Binding, ClientMessage, Cursor, Deframer, Hello, ServerMessage, enframe};

const BINDING: Binding = Binding::Exporter([7; 32]);

fn main() {
    divan::main();
}

fn hello() -> Hello {
    Hello::sign(&cluster_keys(), &Member::numbered(1).identity, [9; 16], "disc.example:7443", BINDING)
}

/// By name: a changed record, a node that went, the end of a batch.
fn message(name: &str) -> ServerMessage {
    match name {
        "frame" => ServerMessage::Frame(frames(1).swap_remove(0)),
        "gone" => ServerMessage::Gone(NodeId([1; 32])),
        _ => ServerMessage::Synced(Cursor { server_instance: 1, version: 2 }),
    }
}

#[divan::bench]
fn hello_sign(bencher: Bencher<'_, '_>) {
    let (keys, member) = (cluster_keys(), Member::numbered(1));
    bencher.bench(|| Hello::sign(&keys, &member.identity, [9; 16], black_box("disc.example:7443"), BINDING));
}

#[divan::bench]
fn hello_verify(bencher: Bencher<'_, '_>) {
    let hello = hello();
    bencher.bench(|| assert!(black_box(&hello).verify(BINDING)));
}

#[divan::bench]
fn hello_encode(bencher: Bencher<'_, '_>) {
    let message = ClientMessage::Hello(Box::new(hello()));
    bencher.bench(|| black_box(&message).encode());
}

#[divan::bench]
fn hello_decode(bencher: Bencher<'_, '_>) {
    let bytes = ClientMessage::Hello(Box::new(hello())).encode();
    bencher.bench(|| ClientMessage::decode(black_box(&bytes)).expect("what was encoded decodes"));
}

#[divan::bench(args = ["frame", "gone", "synced"])]
fn message_encode(bencher: Bencher<'_, '_>, name: &str) {
    let message = message(name);
    bencher.bench(|| black_box(&message).encode());
}

#[divan::bench(args = ["frame", "gone", "synced"])]
fn message_decode(bencher: Bencher<'_, '_>, name: &str) {
    let bytes = message(name).encode();
    bencher.bench(|| ServerMessage::decode(black_box(&bytes)).expect("what was encoded decodes"));
}

/// A snapshot of 100 records off a QUIC stream, which comes in pieces that end anywhere.
#[divan::bench]
fn deframe_snapshot(bencher: Bencher<'_, '_>) {
    const RECORDS: u16 = 100;
    const PIECE: usize = 1200;
    let messages = frames(RECORDS).into_iter().map(|frame| enframe(&ServerMessage::Frame(frame).encode()));
    let stream: Vec<u8> = messages.flatten().collect();
    bencher.counter(ItemsCount::new(RECORDS)).bench(|| {
        let mut deframer = Deframer::default();
        let mut count = 0;
        for piece in black_box(&stream).chunks(PIECE) {
            deframer.push(piece);
            while deframer.next_message().expect("every message has its length").is_some() {
                count += 1;
            }
        }
        assert_eq!(count, RECORDS);
    });
}
