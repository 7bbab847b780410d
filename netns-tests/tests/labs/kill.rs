//! SIGKILL at random moments of an agent's life, under traffic. A failure prints its seed; `MESHSPAN_SEED` repeats it.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use netns_tests::{
    Mesh, MeshOptions,
    checks::{
        carry,
        life::{Pings, floor_only, pass},
    },
    mesh::enter_or_skip,
    wait,
};

const KILLS: usize = 15;
const LONGEST_LIFE_MS: u64 = 2000;
const REFORMS_WITHIN: Duration = Duration::from_secs(5);

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

fn seed() -> u64 {
    match std::env::var("MESHSPAN_SEED") {
        Ok(text) => text.parse().expect("MESHSPAN_SEED is a number"),
        Err(_) => {
            let mut bytes = [0; 8];
            getrandom::fill(&mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        }
    }
}

/// A state file as the next start finds it: a kill between two renames leaves only the generation before.
fn kept(state: &Path, name: &str) -> Vec<u8> {
    let (current, previous) = (state.join(name), state.join(format!("{name}.prev")));
    fs::read(&current).or_else(|_| fs::read(previous)).unwrap_or_else(|error| panic!("{}: {error}", current.display()))
}

fn json(state: &Path, name: &str) -> serde_json::Value {
    serde_json::from_slice(&kept(state, name)).unwrap_or_else(|error| panic!("{name} is damaged: {error}"))
}

/// The identity's bytes and the highest sequence number that may be in use, as a dead agent left them.
fn left_in(state: &Path) -> (Vec<u8>, u64) {
    assert!(json(state, "marks.json").is_object());
    assert!(kept(state, "cache.bin").starts_with(b"MSC1"));
    let reserved = json(state, "state.json")["reserved_seq"].as_u64().unwrap();
    (fs::read(state.join("identity.json")).unwrap(), reserved)
}

#[test]
fn an_agent_killed_at_random_moments_stays_itself() {
    let Some(binaries) = enter_or_skip("an_agent_killed_at_random_moments_stays_itself").unwrap() else { return };
    let seed = seed();
    println!("MESHSPAN_SEED={seed}");
    let mut random = Random(seed);
    let options = MeshOptions { pods_per_node: 1, ttl: Some(Duration::from_secs(5)), ..MeshOptions::default() };
    let mut mesh = Mesh::build(&binaries, &options).unwrap();
    mesh.send_controls("start").unwrap();
    mesh.start_server().unwrap();
    mesh.start_nodes().unwrap();
    mesh.wait_until_formed().unwrap();
    carry::pod_to_pod(&mesh).unwrap();
    let marker = mesh.marker("kill").unwrap();
    let pings = Pings::between(&mesh.nodes[0], &mesh.nodes[1], &marker).unwrap();
    let who = |mesh: &Mesh| {
        let node = mesh.nodes[1].status().unwrap().node;
        (node.id, node.overlay_v4, node.overlay_v6)
    };
    let before = who(&mesh);
    let state = mesh.nodes[1].state_dir();
    wait::until_true("the first cache to be written", REFORMS_WITHIN, || Ok(state.join("marks.json").exists()))
        .unwrap();
    mesh.nodes[1].crash().unwrap();
    let (identity, mut reserved) = left_in(&state);
    let mut slowest = Duration::ZERO;
    for kill in 1..=KILLS {
        let life = Duration::from_millis(random.below(LONGEST_LIFE_MS));
        let context = format!("kill {kill} after {life:?}, MESHSPAN_SEED={seed}");
        mesh.nodes[1].start().unwrap();
        pass(life).unwrap();
        mesh.nodes[1].crash().unwrap();
        floor_only(&mesh.nodes[1]).unwrap_or_else(|error| panic!("{context}: {error:#}"));
        let (left, now_reserved) = left_in(&state);
        assert!(left == identity, "{context}: the identity file changed");
        assert!(now_reserved >= reserved, "{context}: sequence numbers went from {reserved} to {now_reserved}");
        reserved = now_reserved;

        let start = Instant::now();
        mesh.nodes[1].start().unwrap();
        let (peer, node) = (&mesh.nodes[0], &mesh.nodes[1]);
        let back = [
            (&peer.host, node.overlay_v6().unwrap()),
            (&mesh.nodes[2].host, node.overlay_v4().unwrap()),
            (&node.host, peer.overlay_v4().unwrap()),
            (&peer.pods[0].host, node.pods[0].v4.into()),
        ];
        let replied = node.explain(carry::replies(&back, marker.bytes(), REFORMS_WITHIN));
        replied.unwrap_or_else(|error| panic!("{context}: {error:#}"));
        let took = start.elapsed();
        slowest = slowest.max(took);
        mesh.wait_until_formed_of(&[0, 1, 2], REFORMS_WITHIN).unwrap_or_else(|error| panic!("{context}: {error:#}"));
        assert_eq!(who(&mesh), before, "{context}");
        assert!(took <= REFORMS_WITHIN, "{context}: it took {took:?}");
        // The formed one dies too: half of the lives end in the middle of traffic.
        mesh.nodes[1].crash().unwrap();
        reserved = reserved.max(left_in(&state).1);
    }
    mesh.nodes[1].start().unwrap();
    mesh.wait_until_formed().unwrap();
    for peer in [0, 2] {
        let refused: Vec<_> = mesh.nodes[peer]
            .status()
            .unwrap()
            .counters
            .into_iter()
            .filter(|(name, count)| name.starts_with("record_refused") && *count > 0)
            .collect();
        assert!(refused.is_empty(), "peers refused records, MESHSPAN_SEED={seed}: {refused:?}");
    }
    carry::pod_to_pod(&mesh).unwrap();
    println!("{KILLS} kills, the slowest return took {slowest:?}, {} echo requests", pings.stop().unwrap());
    println!("{}", carry::no_cleartext(&mut mesh).unwrap());
}
