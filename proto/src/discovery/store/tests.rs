#![allow(clippy::unwrap_used)]

use std::sync::OnceLock;

use mesh_common::limits::{MAX_STORED_BYTES, PUT_BURST, PUT_INTERVAL, SLOT_TTL};
use proptest::prelude::*;

use super::*;
use crate::discovery::tests::{at, frame, keys, node};

const INSTANCE: u64 = 7;

fn store(max_slots: usize) -> Store {
    Store::new(StoreConfig {
        instance: INSTANCE,
        slot_ttl: SLOT_TTL,
        max_namespaces: 2,
        max_slots_per_namespace: max_slots,
        max_stored_bytes: MAX_STORED_BYTES,
    })
}

fn space() -> Namespace {
    keys(1).namespace
}

fn record(of: u8, seq: u64) -> Frame {
    frame(space(), of, Kind::Record, seq)
}

fn farewell(of: u8, seq: u64) -> Frame {
    frame(space(), of, Kind::Tombstone, seq)
}

/// A node with a session and a record.
fn join(store: &mut Store, of: u8, seq: u64, now: Instant) {
    store.attach(space(), node(of), now).unwrap();
    assert_eq!(store.put(&record(of, seq), now), Ok(Put::Changed));
}

/// Everything a reader is told now.
fn read(store: &Store, watcher: &mut Watcher) -> Vec<Change> {
    std::iter::from_fn(|| store.next(&space(), watcher)).collect()
}

fn told(frame: &Frame) -> Change {
    Change::Frame(frame.as_bytes().clone())
}

fn synced(version: u64) -> Change {
    Change::Synced(Cursor { server_instance: INSTANCE, version })
}

fn cursor(version: u64) -> Option<Cursor> {
    Some(Cursor { server_instance: INSTANCE, version })
}

#[test]
fn a_reader_gets_a_snapshot_then_each_change() {
    let mut store = store(8);
    join(&mut store, 1, 1, at(0));
    join(&mut store, 2, 1, at(0));
    let mut watcher = store.watch(&space(), None);
    let whole = [Change::Restart, told(&record(1, 1)), told(&record(2, 1)), synced(2)];
    assert_eq!(read(&store, &mut watcher), whole);
    assert_eq!(read(&store, &mut watcher), []);

    store.put(&record(2, 5), at(1)).unwrap();
    assert_eq!(read(&store, &mut watcher), [told(&record(2, 5)), synced(3)]);
    assert_eq!(store.put(&record(2, 5), at(1)), Ok(Put::Unchanged));
    assert_eq!(read(&store, &mut watcher), []);
}

#[test]
fn an_empty_namespace_is_synced_at_once() {
    let mut store = store(8);
    store.attach(space(), node(1), at(0)).unwrap();
    let mut watcher = store.watch(&space(), None);
    assert_eq!(read(&store, &mut watcher), [Change::Restart, synced(0)]);
}

#[test]
fn a_slow_reader_gets_the_newest_state_only() {
    let mut store = store(8);
    join(&mut store, 1, 1, at(0));
    join(&mut store, 2, 1, at(0));
    let mut watcher = store.watch(&space(), None);
    read(&store, &mut watcher);
    for seq in 2..9 {
        store.put(&record(1, seq), at(seq)).unwrap();
    }
    store.put(&farewell(2, 2), at(9)).unwrap();
    assert_eq!(read(&store, &mut watcher), [told(&record(1, 8)), told(&farewell(2, 2)), synced(10)]);
}

#[test]
fn puts_need_a_session_a_higher_number_and_the_authors_signature() {
    let mut store = store(8);
    assert_eq!(store.put(&record(1, 5), at(0)), Err(PutError::NoSession));
    join(&mut store, 1, 5, at(0));
    assert_eq!(store.put(&record(2, 5), at(0)), Err(PutError::NoSession));
    assert_eq!(store.put(&record(1, 5), at(0)), Ok(Put::Unchanged), "the same bytes again");
    assert_eq!(store.put(&farewell(1, 5), at(0)), Err(PutError::Stale), "other bytes of the same number");
    assert_eq!(store.put(&record(1, 4), at(0)), Err(PutError::Stale));

    let mut forged = record(1, 6).as_bytes().to_vec();
    *forged.last_mut().unwrap() ^= 1;
    let forged = Frame::parse(forged.into()).unwrap();
    assert_eq!(store.put(&forged, at(0)), Err(PutError::Signature));
    let mut watcher = store.watch(&space(), None);
    assert_eq!(read(&store, &mut watcher), [Change::Restart, told(&record(1, 5)), synced(1)]);
}

#[test]
fn puts_of_a_slot_are_limited_and_repeats_are_free() {
    let mut store = store(8);
    store.attach(space(), node(1), at(0)).unwrap();
    for seq in 1..=u64::from(PUT_BURST) {
        store.put(&record(1, seq), at(0)).unwrap();
        assert_eq!(store.put(&record(1, seq), at(0)), Ok(Put::Unchanged));
    }
    let over = record(1, 100);
    assert_eq!(store.put(&over, at(0)), Err(PutError::RateLimited(PUT_INTERVAL)));
    // A new session is no new budget while the slot stands.
    store.attach(space(), node(1), at(0)).unwrap();
    assert!(matches!(store.put(&over, at(0)), Err(PutError::RateLimited(_))));
    assert_eq!(store.put(&over, at(1)), Ok(Put::Changed));
}

#[test]
fn slots_are_limited_and_taken_ones_keep_working() {
    let mut store = store(2);
    join(&mut store, 1, 1, at(0));
    join(&mut store, 2, 1, at(0));
    store.attach(space(), node(3), at(0)).unwrap();
    assert_eq!(store.put(&record(3, 1), at(0)), Err(PutError::Full));
    assert_eq!(store.put(&record(2, 2), at(0)), Ok(Put::Changed));
    assert_eq!(store.slots(), 2);
    store.put(&farewell(1, 2), at(1)).unwrap();
    assert_eq!(store.put(&record(3, 1), at(2)), Ok(Put::Changed));
}

#[test]
fn namespaces_are_limited_and_freed_a_minute_after_their_last_slot() {
    let mut store = store(8);
    let spaces = [1, 2, 3].map(|n| keys(n).namespace);
    store.attach(spaces[0], node(1), at(0)).unwrap();
    store.attach(spaces[1], node(1), at(0)).unwrap();
    assert_eq!(store.attach(spaces[2], node(1), at(0)), Err(TooManyNamespaces));
    store.attach(spaces[1], node(2), at(0)).unwrap();

    store.detach(spaces[0], node(1), at(10));
    assert_eq!(store.handle_timeout(at(69)), Expired::default());
    // Somebody in time keeps it.
    store.attach(spaces[0], node(2), at(69)).unwrap();
    assert_eq!(store.poll_timeout(), None);
    store.detach(spaces[0], node(2), at(70));
    assert_eq!(store.poll_timeout().unwrap().0, at(130));
    let expired = store.handle_timeout(at(130));
    assert_eq!(expired.freed, BTreeSet::from([spaces[0]]));
    store.attach(spaces[2], node(1), at(130)).unwrap();
    assert_consistent(&store);
}

#[test]
fn a_slot_outlives_its_last_session_by_the_ttl() {
    let mut store = store(8);
    join(&mut store, 1, 1, at(0));
    store.attach(space(), node(1), at(0)).unwrap();
    store.attach(space(), node(9), at(0)).unwrap();
    let mut watcher = store.watch(&space(), None);
    read(&store, &mut watcher);

    store.detach(space(), node(1), at(10));
    assert_eq!(store.poll_timeout(), None, "one session is left");
    store.detach(space(), node(1), at(20));
    assert_eq!(store.poll_timeout().unwrap().0, at(20) + SLOT_TTL);
    // It comes back in time, and leaves again.
    store.attach(space(), node(1), at(30)).unwrap();
    assert_eq!(store.poll_timeout(), None);
    store.detach(space(), node(1), at(40));
    store.handle_timeout(at(40) + (SLOT_TTL - Duration::from_nanos(1)));
    assert_eq!(read(&store, &mut watcher), []);
    let expired = store.handle_timeout(at(40) + SLOT_TTL);
    assert_eq!(expired.changed, BTreeSet::from([space()]));
    assert_eq!(read(&store, &mut watcher), [Change::Gone(node(1)), synced(2)]);
    assert_eq!((store.slots(), store.stored_bytes()), (0, 0));
    // A newcomer is told nothing of it.
    let mut newcomer = store.watch(&space(), None);
    assert_eq!(read(&store, &mut newcomer), [Change::Restart, synced(2)]);
}

#[test]
fn a_tombstone_is_kept_told_and_stands_against_older_frames() {
    let mut store = store(8);
    join(&mut store, 1, 5, at(0));
    store.attach(space(), node(9), at(0)).unwrap();
    store.put(&farewell(1, 6), at(1)).unwrap();
    assert_eq!(store.slots(), 0);
    store.detach(space(), node(1), at(2));
    // Longer than a slot's TTL: still told to newcomers, older frames still refused.
    let later = at(3500);
    store.handle_timeout(later);
    let mut watcher = store.watch(&space(), None);
    assert_eq!(read(&store, &mut watcher), [Change::Restart, told(&farewell(1, 6)), synced(2)]);
    store.attach(space(), node(1), later).unwrap();
    assert_eq!(store.put(&record(1, 5), later), Err(PutError::Stale));
    store.handle_timeout(at(1) + TOMBSTONE_TTL);
    assert_eq!(read(&store, &mut watcher), [Change::Gone(node(1)), synced(3)]);
    assert_eq!(store.put(&record(1, 5), at(3700)), Ok(Put::Changed));
}

#[test]
fn a_node_comes_back_over_its_tombstone_with_a_newer_record() {
    let mut store = store(8);
    join(&mut store, 1, 5, at(0));
    store.put(&farewell(1, 6), at(1)).unwrap();
    assert_eq!(store.put(&record(1, 7), at(2)), Ok(Put::Changed));
    assert_eq!(store.poll_timeout(), None, "the tombstone's end went with it");
    let mut watcher = store.watch(&space(), None);
    assert_eq!(read(&store, &mut watcher), [Change::Restart, told(&record(1, 7)), synced(3)]);
}

#[test]
fn a_cursor_resumes_where_it_stood_and_starts_over_where_it_cannot() {
    let mut store = store(8);
    join(&mut store, 1, 1, at(0));
    join(&mut store, 2, 1, at(0));
    let resumed = |store: &Store, cursor| read(store, &mut store.watch(&space(), cursor));
    assert_eq!(resumed(&store, cursor(2)), [synced(2)]);
    assert_eq!(resumed(&store, cursor(1)), [told(&record(2, 1)), synced(2)]);
    let whole = [Change::Restart, told(&record(1, 1)), told(&record(2, 1)), synced(2)];
    assert_eq!(resumed(&store, cursor(3)), whole, "a point that is yet to come");
    let foreign = Some(Cursor { server_instance: INSTANCE + 1, version: 2 });
    assert_eq!(resumed(&store, foreign), whole, "another instance");

    // Freed and opened again, with another namespace at work in between.
    let other = keys(2).namespace;
    store.detach(space(), node(1), at(1));
    store.detach(space(), node(2), at(1));
    store.attach(other, node(1), at(1)).unwrap();
    store.put(&frame(other, 1, Kind::Record, 1), at(1)).unwrap();
    store.handle_timeout(at(121));
    assert_eq!(store.handle_timeout(at(181)).freed, BTreeSet::from([space()]));
    join(&mut store, 3, 1, at(181));
    assert_eq!(resumed(&store, cursor(2)), [Change::Restart, told(&record(3, 1)), synced(6)]);
}

#[test]
fn markers_are_bounded_and_a_cursor_from_before_them_starts_over() {
    let mut store = store(2);
    for of in 1..=3 {
        let now = at(u64::from(of) * 200);
        join(&mut store, of, 1, now);
        store.detach(space(), node(of), now);
        store.attach(space(), node(9), now).unwrap();
        store.handle_timeout(now + SLOT_TTL);
    }
    assert_consistent(&store);
    // Versions: join 1, gone 2, join 3, gone 4, join 5, gone 6; the marker at 2 is forgotten.
    let resumed = |cursor| read(&store, &mut store.watch(&space(), cursor));
    assert_eq!(resumed(cursor(1)), [Change::Restart, synced(6)]);
    assert_eq!(resumed(cursor(2)), [Change::Gone(node(2)), Change::Gone(node(3)), synced(6)]);
}

#[test]
fn a_reader_that_stalls_past_a_forgotten_marker_starts_over() {
    let mut store = store(1);
    join(&mut store, 1, 1, at(0));
    store.attach(space(), node(9), at(0)).unwrap();
    let mut watcher = store.watch(&space(), None);
    read(&store, &mut watcher);
    store.detach(space(), node(1), at(0));
    store.handle_timeout(at(120));
    join(&mut store, 2, 1, at(120));
    store.detach(space(), node(2), at(120));
    store.handle_timeout(at(240));
    assert_eq!(read(&store, &mut watcher), [Change::Restart, synced(4)]);
}

#[test]
fn tombstones_are_bounded_the_oldest_ends_first() {
    let mut store = store(2);
    for of in 1..=3 {
        store.attach(space(), node(of), at(0)).unwrap();
        store.put(&farewell(of, 1), at(0)).unwrap();
        store.detach(space(), node(of), at(0));
    }
    assert_consistent(&store);
    let mut watcher = store.watch(&space(), None);
    let snapshot = [Change::Restart, told(&farewell(2, 1)), told(&farewell(3, 1)), synced(4)];
    assert_eq!(read(&store, &mut watcher), snapshot);
}

/// Every index and total follows from the nodes' content.
fn assert_consistent(store: &Store) {
    let (mut slots, mut bytes, mut deadlines) = (0, 0, BTreeSet::new());
    let limit = store.config.max_slots_per_namespace;
    for (namespace, space) in &store.spaces {
        let mut history = BTreeMap::new();
        let (mut records, mut tombstones, mut gone) = (0, BTreeSet::new(), BTreeSet::new());
        let mut sessions = 0;
        for (id, node) in &space.nodes {
            sessions += node.sessions as usize;
            assert!(node.sessions > 0 || !matches!(node.content, Content::Nothing), "a node without reason to be kept");
            if !matches!(node.content, Content::Nothing) {
                history.insert(node.version, *id);
            }
            match &node.content {
                Content::Record(_) => records += 1,
                Content::Tombstone(_) => assert!(tombstones.insert(node.version)),
                Content::Gone => assert!(gone.insert(node.version)),
                Content::Nothing => {}
            }
            let mortal = match node.content {
                Content::Record(_) => node.sessions == 0,
                Content::Tombstone(_) => true,
                Content::Gone | Content::Nothing => false,
            };
            assert_eq!(node.ends.is_some(), mortal);
            bytes += node.content.frame().map_or(0, |frame| frame.as_bytes().len());
            deadlines.extend(node.ends.map(|ends| (ends, *namespace, Some(*id))));
        }
        assert_eq!(space.history, history);
        assert_eq!((space.records, space.sessions), (records, sessions));
        assert_eq!((&space.tombstones, &space.gone), (&tombstones, &gone));
        assert!(records <= limit && tombstones.len() <= limit && gone.len() <= limit);
        assert_eq!(space.freed_at.is_some(), sessions == 0 && records == 0 && tombstones.is_empty());
        assert!(space.floor <= space.head && space.head <= store.version);
        slots += records;
        deadlines.extend(space.freed_at.map(|freed| (freed, *namespace, None)));
    }
    assert_eq!((store.slots, store.stored_bytes, &store.deadlines), (slots, bytes, &deadlines));
}

#[derive(Debug, Clone)]
enum Op {
    Attach(u8),
    Detach(u8),
    Put { of: u8, seq: u64, kind: Kind },
    Wait(u64),
    ReadOne,
    ReadAll,
    Reconnect,
}

const NODES: u8 = 5;
const SEQS: u64 = 12;
const SLOTS: usize = 3;

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let kind = prop_oneof![3 => Just(Kind::Record), 1 => Just(Kind::Tombstone)];
    let op = prop_oneof![
        4 => (1..=NODES).prop_map(Op::Attach),
        3 => (1..=NODES).prop_map(Op::Detach),
        8 => (1..=NODES, 1..=SEQS, kind).prop_map(|(of, seq, kind)| Op::Put { of, seq, kind }),
        2 => prop_oneof![Just(1), Just(60), Just(119), Just(130), Just(3600)].prop_map(Op::Wait),
        4 => Just(Op::ReadOne),
        1 => Just(Op::ReadAll),
        2 => Just(Op::Reconnect),
    ];
    proptest::collection::vec(op, 1..80)
}

/// Signing costs more than all the rest: each frame is made once.
fn signed(of: u8, seq: u64, kind: Kind) -> Frame {
    static FRAMES: OnceLock<Vec<Frame>> = OnceLock::new();
    let frames = FRAMES.get_or_init(|| {
        (1..=NODES).flat_map(|of| (1..=SEQS).flat_map(move |seq| [record(of, seq), farewell(of, seq)])).collect()
    });
    let index = (u64::from(of - 1) * SEQS + seq - 1) * 2 + u64::from(kind == Kind::Tombstone);
    frames[usize::try_from(index).unwrap()].clone()
}

/// What a server should keep, said as plainly as possible.
#[derive(Default)]
struct Model {
    sessions: BTreeMap<u8, u32>,
    /// Frame, order of arrival, and the end if it has one.
    content: BTreeMap<u8, (Frame, usize, Option<Instant>)>,
    arrivals: usize,
}

impl Model {
    fn put(&mut self, of: u8, frame: Frame, now: Instant) -> Result<Put, PutError> {
        if self.sessions.get(&of).copied().unwrap_or(0) == 0 {
            return Err(PutError::NoSession);
        }
        let stored = self.content.get(&of).map(|(frame, ..)| frame.clone());
        if stored.as_ref() == Some(&frame) {
            return Ok(Put::Unchanged);
        }
        if stored.as_ref().is_some_and(|stored| stored.seq() >= frame.seq()) {
            return Err(PutError::Stale);
        }
        let others = |kind| {
            let of_kind = self.content.iter().filter(|(other, (frame, ..))| **other != of && frame.kind() == kind);
            of_kind.map(|(other, (_, arrival, _))| (*arrival, *other)).collect::<BTreeSet<_>>()
        };
        let ends = match frame.kind() {
            Kind::Record if others(Kind::Record).len() >= SLOTS => return Err(PutError::Full),
            Kind::Record => None,
            Kind::Tombstone => {
                let others = others(Kind::Tombstone);
                if others.len() >= SLOTS {
                    self.content.remove(&others.first().unwrap().1);
                }
                Some(now + TOMBSTONE_TTL)
            }
        };
        self.arrivals += 1;
        self.content.insert(of, (frame, self.arrivals, ends));
        Ok(Put::Changed)
    }

    fn set_sessions(&mut self, of: u8, sessions: u32, now: Instant) {
        self.sessions.insert(of, sessions);
        if let Some((frame, _, ends)) = self.content.get_mut(&of)
            && frame.kind() == Kind::Record
        {
            *ends = match sessions {
                0 => ends.or(Some(now + SLOT_TTL)),
                _ => None,
            };
        }
    }

    fn expire(&mut self, now: Instant) {
        self.content.retain(|_, (_, _, ends)| ends.is_none_or(|ends| ends > now));
    }

    fn view(&self) -> BTreeMap<NodeId, Bytes> {
        self.content.iter().map(|(of, (frame, ..))| (node(*of), frame.as_bytes().clone())).collect()
    }
}

/// A reader that believes what it is told.
struct Reader {
    watcher: Watcher,
    view: BTreeMap<NodeId, Bytes>,
    cursor: Option<Cursor>,
}

impl Reader {
    fn new(store: &Store) -> Self {
        Self { watcher: store.watch(&space(), None), view: BTreeMap::new(), cursor: None }
    }

    fn read_one(&mut self, store: &Store) -> bool {
        let Some(change) = store.next(&space(), &mut self.watcher) else { return false };
        match change {
            Change::Restart => {
                self.view.clear();
                self.cursor = None;
            }
            Change::Frame(bytes) => {
                self.view.insert(Frame::parse(bytes.clone()).unwrap().node(), bytes);
            }
            Change::Gone(node) => {
                self.view.remove(&node);
            }
            Change::Synced(cursor) => self.cursor = Some(cursor),
        }
        true
    }

    fn read_all(&mut self, store: &Store) {
        while self.read_one(store) {}
    }

    fn reconnect(&mut self, store: &Store) {
        self.watcher = store.watch(&space(), self.cursor);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn readers_fast_slow_and_resumed_end_in_the_model_s_state(ops in ops()) {
        let mut store = store(SLOTS);
        let mut model = Model::default();
        let mut now = at(0);
        let (mut fast, mut slow) = (Reader::new(&store), Reader::new(&store));
        for op in ops {
            // A put budget's worth of time, so that no put is one too many.
            now += PUT_INTERVAL;
            store.handle_timeout(now);
            model.expire(now);
            let sessions = |model: &Model, of| model.sessions.get(&of).copied().unwrap_or(0);
            match op {
                Op::Attach(of) => {
                    store.attach(space(), node(of), now).unwrap();
                    let count = sessions(&model, of) + 1;
                    model.set_sessions(of, count, now);
                }
                Op::Detach(of) => {
                    store.detach(space(), node(of), now);
                    let count = sessions(&model, of).saturating_sub(1);
                    model.set_sessions(of, count, now);
                }
                Op::Put { of, seq, kind } => {
                    let frame = signed(of, seq, kind);
                    prop_assert_eq!(store.put(&frame, now), model.put(of, frame, now));
                }
                Op::Wait(seconds) => {
                    now += Duration::from_secs(seconds);
                    store.handle_timeout(now);
                    model.expire(now);
                }
                Op::ReadOne => {
                    slow.read_one(&store);
                }
                Op::ReadAll => slow.read_all(&store),
                Op::Reconnect => slow.reconnect(&store),
            }
            assert_consistent(&store);
            fast.read_all(&store);
            if store.has_namespace(&space()) {
                prop_assert_eq!(&fast.view, &model.view());
            }
        }
        store.attach(space(), node(50), now).unwrap();
        fast.read_all(&store);
        slow.read_all(&store);
        prop_assert_eq!(&fast.view, &model.view());
        prop_assert_eq!(&slow.view, &model.view());
    }
}
