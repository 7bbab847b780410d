//! What an agent does in a mesh of 1000 nodes: who is a member, what should be on the host, what to change.

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use mesh_bench::member::{Member, frames};
use mesh_bench::node::{Node, settled_host};
use mesh_common::time::Instant;
use mesh_proto::mesh::reconcile::reconcile;

const NODES: u16 = 1000;
/// The node whose record changes.
const CHANGING: u16 = 500;

fn main() {
    divan::main();
}

/// A start: every record of the cluster is new.
#[divan::bench(sample_size = 1, sample_count = 10)]
fn admit_all(bencher: Bencher<'_, '_>) {
    let frames = frames(NODES);
    bencher.counter(ItemsCount::new(NODES)).with_inputs(|| (Node::alone(), frames.clone())).bench_local_values(
        |(mut node, frames)| {
            for frame in frames {
                node.members.admit(frame, Instant::ORIGIN).expect("a fresh frame of a member is admitted");
            }
            node
        },
    );
}

/// The same again, as a second server tells it.
#[divan::bench]
fn admit_all_known(bencher: Bencher<'_, '_>) {
    let (mut node, frames) = (Node::among(NODES), frames(NODES));
    bencher.counter(ItemsCount::new(NODES)).with_inputs(|| frames.clone()).bench_local_values(|frames| {
        for frame in frames {
            node.members.admit(frame, Instant::ORIGIN).expect("a known frame is no error");
        }
    });
}

/// Members into peers: owners of prefixes and addresses, candidates in order.
#[divan::bench]
fn judge(bencher: Bencher<'_, '_>) {
    let node = Node::among(NODES);
    bencher.bench_local(|| black_box(&node).peers());
}

/// Peers into the desired state: preshared keys, allowed addresses, routes.
#[divan::bench]
fn desire(bencher: Bencher<'_, '_>) {
    let node = Node::among(NODES);
    let peers = node.peers();
    bencher.bench_local(|| node.desired(black_box(&peers)));
}

/// The difference where there is none, as on every tick.
#[divan::bench]
fn reconcile_unchanged(bencher: Bencher<'_, '_>) {
    let node = Node::among(NODES);
    let desired = node.desired(&node.peers());
    let host = settled_host(&desired);
    bencher.bench_local(|| reconcile(black_box(&desired), black_box(&host)));
}

/// From one changed record among 1000 to the steps, the pure functions alone: admit, judge, desire, reconcile.
#[divan::bench(sample_size = 1, sample_count = 50)]
fn one_change(bencher: Bencher<'_, '_>) {
    let mut node = Node::among(NODES);
    let unchanged = settled_host(&node.desired(&node.peers()));
    let (member, keys) = (Member::numbered(CHANGING), node.keys.clone());
    let mut seq = 0;
    // Even versions have one prefix more than the host.
    let news = || {
        seq += 2;
        member.changed_frame(&keys, seq).as_bytes().clone()
    };
    bencher.with_inputs(news).bench_local_values(|frame| {
        node.members.admit(frame, Instant::ORIGIN).expect("a newer frame of a member is admitted");
        let steps = reconcile(&node.desired(&node.peers()), &unchanged);
        assert_eq!(steps.len(), 3);
        steps
    });
}
