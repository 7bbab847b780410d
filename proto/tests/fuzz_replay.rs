//! Replays the corpus of every fuzz target, each file as it is and in 2,000 seeded mutations.
//!
//! A failure prints target, file and seed; `MESHSPAN_SEED=<seed>` repeats it.
#![allow(clippy::unwrap_used)]
#![expect(clippy::disallowed_methods, reason = "the corpus is files, and a seed may come from the environment")]

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use mesh_proto::fuzz::TARGETS;

const MUTATIONS: u64 = 2_000;
const MIN_FILES: usize = 10;
/// Mutations may grow an input, within this.
const MAX_LEN: usize = 64 * 1024;

#[test]
fn every_target_survives_its_corpus_and_mutations_of_it() {
    let seed = seed();
    println!("MESHSPAN_SEED={seed}");
    for (name, body) in TARGETS {
        let corpus = corpus(name);
        assert!(corpus.len() >= MIN_FILES, "{name} has {} corpus files, at least {MIN_FILES} are wanted", corpus.len());
        for (file, input) in &corpus {
            run(name, file, body, input, "as it is");
            for round in 0..MUTATIONS {
                let mut random = Random(mix(seed, file.as_bytes(), round));
                let mutated = mutate(input, &corpus, &mut random);
                run(name, file, body, &mutated, &format!("mutation {round}, MESHSPAN_SEED={seed}"));
            }
        }
    }
}

#[test]
fn every_corpus_and_every_cargo_fuzz_target_has_its_body() {
    let bodies: Vec<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    for (dir, suffix) in [("corpus", ""), ("fuzz_targets", ".rs")] {
        let mut found: Vec<String> = fs::read_dir(fuzz_dir().join(dir))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .map(|name| name.strip_suffix(suffix).unwrap().to_owned())
            .collect();
        found.sort();
        let mut bodies = bodies.clone();
        bodies.sort();
        assert_eq!(found, bodies, "proto/fuzz/{dir}");
    }
}

fn run(target: &str, file: &str, body: fn(&[u8]), input: &[u8], what: &str) {
    let outcome = catch_unwind(AssertUnwindSafe(|| body(input)));
    assert!(outcome.is_ok(), "{target}: {file}, {what}: {} bytes {input:02x?}", input.len());
}

fn fuzz_dir() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz"))
}

fn corpus(target: &str) -> BTreeMap<String, Vec<u8>> {
    let dir = fuzz_dir().join("corpus").join(target);
    fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect()
}

fn seed() -> u64 {
    match std::env::var("MESHSPAN_SEED") {
        Ok(text) => text.parse().expect("MESHSPAN_SEED is a number"),
        Err(_) => 0x006d_6573_6873_7061,
    }
}

/// One to four changes of the kinds that parsers trip over.
fn mutate(input: &[u8], corpus: &BTreeMap<String, Vec<u8>>, random: &mut Random) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(7) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.byte()),
            2 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            3 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, random.byte()][random.below(6)],
            4 => {
                let width = [2, 4, 8][random.below(3)].min(bytes.len() - at);
                bytes[at..at + width].fill([0, 0xff][random.below(2)]);
            }
            5 => {
                let other = corpus.values().nth(random.below(corpus.len())).unwrap();
                bytes.truncate(at);
                bytes.extend_from_slice(&other[random.below(other.len() + 1)..]);
            }
            6 => bytes.extend_from_within(at..),
            _ => {}
        }
        bytes.truncate(MAX_LEN);
    }
    bytes
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}

/// A start for each file and round, so that one round can be repeated alone.
fn mix(seed: u64, file: &[u8], round: u64) -> u64 {
    file.iter()
        .fold(seed ^ round.rotate_left(32), |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
