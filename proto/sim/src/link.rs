//! What lies between machines: delay, jitter, loss, duplication, reordering, partitions.
//!
//! Every pair has its own distance and its own loss, drawn from the seed. A partition is an island: whoever is on it reaches
//! nobody off it. Datagrams are lost there; reliable streams wait (the caller asks [`Links::is_cut`]).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mesh_proto::random::SplitMix64;

/// A machine, or the router that stands for those behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    Host(usize),
    Server(usize),
    Router(usize),
}

/// Ranges of a run; every pair draws its own values.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    /// One way, least and most.
    pub delay: (Duration, Duration),
    /// Added to each datagram, at most.
    pub jitter: Duration,
    /// Of 1000 datagrams, least and most.
    pub loss: (u64, u64),
    /// Of 1000 datagrams.
    pub duplicated: u64,
    /// Of 1000 datagrams: held back so long that later ones overtake.
    pub reordered: u64,
}

#[derive(Debug)]
pub struct Links {
    weather: Weather,
    seed: u64,
    random: SplitMix64,
    islands: BTreeMap<u64, BTreeSet<Place>>,
    /// No datagram passes from the first to the second.
    blocked: BTreeSet<(Place, Place)>,
}

impl Links {
    pub fn new(weather: Weather, seed: u64) -> Self {
        Self { weather, seed, random: SplitMix64::new(seed), islands: BTreeMap::new(), blocked: BTreeSet::new() }
    }

    /// Cuts these places off from all others until [`Self::heal`].
    pub fn cut(&mut self, island: u64, places: BTreeSet<Place>) {
        self.islands.insert(island, places);
    }

    pub fn heal(&mut self, island: u64) {
        self.islands.remove(&island);
    }

    pub fn is_cut(&self, a: Place, b: Place) -> bool {
        self.islands.values().any(|island| island.contains(&a) != island.contains(&b))
    }

    /// Datagrams from the first place to the second are lost from now on, or pass again. Streams pass.
    pub fn block(&mut self, from: Place, to: Place, blocks: bool) {
        if blocks {
            self.blocked.insert((from, to));
        } else {
            self.blocked.remove(&(from, to));
        }
    }

    /// One way time without jitter.
    pub fn distance(&self, a: Place, b: Place) -> Duration {
        self.pair(a, b).0
    }

    /// The delays after which copies of one datagram arrive: none, one or two.
    pub fn carry(&mut self, from: Place, to: Place) -> [Option<Duration>; 2] {
        if self.is_cut(from, to) || self.blocked.contains(&(from, to)) {
            return [None, None];
        }
        let (distance, loss) = self.pair(from, to);
        if self.chance(loss) {
            return [None, None];
        }
        let delay = |links: &mut Self| {
            let held = if links.chance(links.weather.reordered) { distance * 3 } else { Duration::ZERO };
            Some(distance + held + links.random.between(Duration::ZERO, links.weather.jitter))
        };
        let first = delay(self);
        let second = if self.chance(self.weather.duplicated) { delay(self) } else { None };
        [first, second]
    }

    /// One way time of a reliable stream's message: its losses show as delay.
    pub fn stream_delay(&mut self, from: Place, to: Place) -> Duration {
        let (distance, loss) = self.pair(from, to);
        let resent = if self.chance(loss) { distance * 2 + Duration::from_millis(50) } else { Duration::ZERO };
        distance + resent + self.random.between(Duration::ZERO, self.weather.jitter)
    }

    /// Distance and loss of a pair, the same both ways.
    fn pair(&self, a: Place, b: Place) -> (Duration, u64) {
        let number = |place| match place {
            Place::Host(index) => index as u64 * 2,
            Place::Server(index) => index as u64 * 2 + 1,
            Place::Router(index) => (1 << 16) + index as u64,
        };
        let (low, high) = (number(a.min(b)), number(a.max(b)));
        let mut random = SplitMix64::new(self.seed ^ (low << 40) ^ (high << 20));
        let delay = random.between(self.weather.delay.0, self.weather.delay.1);
        let (least, most) = self.weather.loss;
        (delay, least + random.below(most.saturating_sub(least) + 1))
    }

    fn chance(&mut self, of_1000: u64) -> bool {
        self.random.below(1000) < of_1000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Place = Place::Host(1);
    const B: Place = Place::Host(2);

    fn links() -> Links {
        let weather = Weather {
            delay: (Duration::from_millis(1), Duration::from_millis(80)),
            jitter: Duration::from_millis(5),
            loss: (100, 100),
            duplicated: 50,
            reordered: 50,
        };
        Links::new(weather, 7)
    }

    #[test]
    fn losses_and_copies_are_as_frequent_as_asked() {
        let mut links = links();
        let carried: Vec<_> = (0..10_000).map(|_| links.carry(A, B)).collect();
        let lost = carried.iter().filter(|[first, _]| first.is_none()).count();
        let twice = carried.iter().filter(|[_, second]| second.is_some()).count();
        assert!((900..1100).contains(&lost), "{lost}");
        assert!((350..550).contains(&twice), "{twice}");
    }

    #[test]
    fn an_island_is_cut_off_and_comes_back() {
        let mut links = links();
        links.cut(1, BTreeSet::from([A, Place::Server(0)]));
        assert!(links.is_cut(A, B) && links.is_cut(B, A));
        assert!(!links.is_cut(A, Place::Server(0)) && !links.is_cut(B, Place::Host(3)));
        assert_eq!(links.carry(A, B), [None, None]);
        links.heal(1);
        assert!(!links.is_cut(A, B));
    }

    #[test]
    fn a_blocked_direction_loses_datagrams_and_the_other_does_not() {
        let mut links = links();
        links.block(A, B, true);
        let mut passes = |from, to| (0..100).any(|_| links.carry(from, to)[0].is_some());
        assert!(!passes(A, B) && passes(B, A));
        links.block(A, B, false);
        assert!((0..100).any(|_| links.carry(A, B)[0].is_some()));
    }
}
