//! What a member's record costs: made, sealed, verified, opened, decoded. Every record of a cluster is opened once by each node.

use divan::{Bencher, black_box};
use mesh_bench::member::{CLUSTER_ID, Member, cluster_keys};
use mesh_proto::sealed::{self, Opened};
use mesh_proto::wire::frame::Frame;
use mesh_proto::wire::record::Record;

fn main() {
    divan::main();
}

#[divan::bench]
fn encode(bencher: Bencher<'_, '_>) {
    let record = Member::numbered(1).record();
    bencher.bench(|| black_box(&record).encode());
}

#[divan::bench]
fn decode(bencher: Bencher<'_, '_>) {
    let body = Member::numbered(1).record().encode().expect("two prefixes fit a record");
    bencher.bench(|| Record::decode(black_box(&body)).expect("what was encoded decodes"));
}

/// Encode, encrypt, sign.
#[divan::bench]
fn seal(bencher: Bencher<'_, '_>) {
    let (keys, member) = (cluster_keys(), Member::numbered(1));
    let record = member.record();
    bencher.bench(|| sealed::seal(&keys, &member.identity, 1, black_box(Some(&record)), [4; 24]));
}

/// The shape only, as every frame meets first.
#[divan::bench]
fn parse(bencher: Bencher<'_, '_>) {
    let bytes = Member::numbered(1).frame(&cluster_keys(), 1).as_bytes().clone();
    bencher.bench(|| Frame::parse(black_box(&bytes).clone()));
}

/// The author's signature, which is all a server checks.
#[divan::bench]
fn verify(bencher: Bencher<'_, '_>) {
    let frame = Member::numbered(1).frame(&cluster_keys(), 1);
    bencher.bench(|| assert!(black_box(&frame).verify()));
}

/// Signature, decryption, decode, proof of the WireGuard key, overlay address.
#[divan::bench]
fn open(bencher: Bencher<'_, '_>) {
    let keys = cluster_keys();
    let frame = Member::numbered(1).frame(&keys, 1);
    bencher.bench(|| {
        let opened = sealed::open(&keys, CLUSTER_ID, black_box(&frame)).expect("a member's frame opens");
        assert!(matches!(opened, Opened::Record(_)));
        opened
    });
}
