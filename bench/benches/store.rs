//! What a server does for a cluster of 100 nodes: takes a changed record, tells everyone, tells a newcomer everything.

use std::cell::RefCell;

use divan::Bencher;
use divan::counter::ItemsCount;
use mesh_bench::member::{Member, cluster_keys};
use mesh_common::id::Namespace;
use mesh_common::limits::{MAX_NAMESPACES, MAX_SLOTS_PER_NAMESPACE, MAX_STORED_BYTES, PUT_INTERVAL, SLOT_TTL};
use mesh_common::time::Instant;
use mesh_proto::discovery::store::{Change, Put, Store, StoreConfig, Watcher};
use mesh_proto::wire::frame::Frame;

const NODES: u16 = 100;

fn main() {
    divan::main();
}

/// A store with a full cluster, and one reader a node that has been told all.
struct Cluster {
    store: Store,
    namespace: Namespace,
    readers: Vec<Watcher>,
    now: Instant,
}

impl Cluster {
    fn new() -> Self {
        let (keys, now) = (cluster_keys(), Instant::ORIGIN);
        let namespace = keys.namespace;
        let mut store = Store::new(StoreConfig {
            instance: 1,
            slot_ttl: SLOT_TTL,
            max_namespaces: MAX_NAMESPACES,
            max_slots_per_namespace: MAX_SLOTS_PER_NAMESPACE,
            max_stored_bytes: MAX_STORED_BYTES,
        });
        let mut readers = Vec::new();
        for member in (1..=NODES).map(Member::numbered) {
            store.attach(namespace, member.identity.node_id(), now).expect("there is room for one namespace");
            store.put(&member.frame(&keys, 1), now).expect("a member's own frame is stored");
            readers.push(store.watch(&namespace, None));
        }
        let mut cluster = Self { store, namespace, readers, now };
        cluster.tell_all();
        cluster
    }

    /// One more version of a node's record, as often as the server allows.
    fn put(&mut self, frame: &Frame) {
        self.now += PUT_INTERVAL;
        assert_eq!(self.store.put(frame, self.now), Ok(Put::Changed));
    }

    /// Tells every reader what it does not know; returns how many records that were.
    fn tell_all(&mut self) -> usize {
        let Self { store, namespace, readers, .. } = self;
        readers.iter_mut().map(|watcher| tell(store, namespace, watcher)).sum()
    }
}

fn tell(store: &Store, namespace: &Namespace, watcher: &mut Watcher) -> usize {
    std::iter::from_fn(|| store.next(namespace, watcher))
        .filter(|change| matches!(divan::black_box(change), Change::Frame(_)))
        .count()
}

/// Frames of node 1, each newer than the last.
fn versions() -> impl FnMut() -> Frame {
    let (keys, member) = (cluster_keys(), Member::numbered(1));
    let mut seq = 1;
    move || {
        seq += 1;
        member.changed_frame(&keys, seq)
    }
}

/// Most of it is the check of the signature.
#[divan::bench]
fn put(bencher: Bencher<'_, '_>) {
    let mut cluster = Cluster::new();
    bencher.with_inputs(versions()).bench_local_refs(|frame| cluster.put(frame));
}

/// One changed record reaches the 100 readers; the put is not measured.
#[divan::bench(sample_size = 1, sample_count = 1000)]
fn tell_one_change(bencher: Bencher<'_, '_>) {
    let cluster = RefCell::new(Cluster::new());
    let mut next = versions();
    bencher
        .counter(ItemsCount::new(NODES))
        .with_inputs(|| cluster.borrow_mut().put(&next()))
        .bench_local_values(|()| assert_eq!(cluster.borrow_mut().tell_all(), usize::from(NODES)));
}

/// Put and tell, as one change costs a server without its carriers.
#[divan::bench]
fn put_and_tell(bencher: Bencher<'_, '_>) {
    let mut cluster = Cluster::new();
    bencher.with_inputs(versions()).bench_local_refs(|frame| {
        cluster.put(frame);
        assert_eq!(cluster.tell_all(), usize::from(NODES));
    });
}

/// A newcomer is told the 100 records.
#[divan::bench]
fn tell_snapshot(bencher: Bencher<'_, '_>) {
    let cluster = Cluster::new();
    bencher.counter(ItemsCount::new(NODES)).bench_local(|| {
        let mut watcher = cluster.store.watch(&cluster.namespace, None);
        assert_eq!(tell(&cluster.store, &cluster.namespace, &mut watcher), usize::from(NODES));
    });
}
