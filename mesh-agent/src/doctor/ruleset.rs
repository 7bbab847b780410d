//! What a packet filter does with a packet, as far as its rules tell. Pure.
//!
//! A packet is known in part: nobody knows its source. So a test holds, does not hold, or may hold. A rule that may hold
//! and drops is an exception (a ban list, a rate) and does not count; one that may hold and accepts counts only if it names
//! our port or our link, because then somebody has thought of us.

use std::cell::Cell;
use std::collections::BTreeMap;

/// Where a base chain stands in a packet's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Hook {
    Input,
    Forward,
}

/// The part of a packet that a test looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Field {
    InputName,
    OutputName,
    InputIndex,
    OutputIndex,
    /// `NFPROTO_*`, one byte.
    Family,
    EtherType,
    /// Layer 4, one byte.
    Protocol,
    DestinationPort,
    /// Bits of connection tracking, in the host's order.
    Connection,
}

/// What is known of a packet, in the bytes that the kernel compares.
#[derive(Debug, Clone, Default)]
pub(super) struct Packet {
    pub(super) fields: BTreeMap<Field, Vec<u8>>,
    /// Fields whose value is ours alone: a rule that asks for it is about us.
    pub(super) ours: Vec<Field>,
    /// Somebody on this host begins the conversation: a rule that may hold and accepts was made for him.
    pub(super) is_begun_here: bool,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    pub(super) chains: BTreeMap<String, Chain>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Chain {
    pub(super) base: Option<Base>,
    pub(super) rules: Vec<Rule>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Base {
    pub(super) hook: Hook,
    /// The policy: what no rule decides is dropped.
    pub(super) drops: bool,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Rule {
    /// All of them must hold.
    pub(super) tests: Vec<Test>,
    pub(super) verdict: Verdict,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Test {
    /// Nothing can be said about it.
    Unknown,
    Of(Operand, Comparison),
}

/// A field, through a mask where one is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Operand {
    pub(super) field: Field,
    pub(super) mask: Option<Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Comparison {
    /// With the first bytes of the field, as many as given: how wildcards of link names work.
    Equal(Vec<u8>),
    NotEqual(Vec<u8>),
    Less(Vec<u8>),
    LessOrEqual(Vec<u8>),
    Greater(Vec<u8>),
    GreaterOrEqual(Vec<u8>),
    In(Vec<Range>),
    NotIn(Vec<Range>),
}

/// Both ends belong to it.
pub(super) type Range = (Vec<u8>, Vec<u8>);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum Verdict {
    #[default]
    Continue,
    Accept,
    Drop,
    Return,
    Jump(String),
    Goto(String),
    /// Looked up by a field.
    Map(Operand, Vec<(Range, Self)>),
}

/// What becomes of the packet at one base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Accepted,
    Dropped,
}

/// As deep as the kernel lets chains call each other.
const MAX_DEPTH: usize = 16;
/// Rules that are looked at for one packet: chains that call each other in many ways end some time.
const MAX_STEPS: u32 = 1_000_000;

impl Table {
    /// The base chains at this hook that drop the packet.
    pub(super) fn dropping(&self, hook: Hook, packet: &Packet) -> Vec<&str> {
        let drops = |name: &str, chain: &Chain| {
            let Some(base) = chain.base.filter(|base| base.hook == hook) else { return false };
            let policy = if base.drops { Fate::Dropped } else { Fate::Accepted };
            let walk = Walk { table: self, packet, steps: Cell::new(0) };
            walk.chain(name, Certainty::default(), 0).fate().unwrap_or(policy) == Fate::Dropped
        };
        self.chains.iter().filter(|(name, chain)| drops(name, chain)).map(|(name, _)| name.as_str()).collect()
    }
}

/// One packet's way through a table.
struct Walk<'a> {
    table: &'a Table,
    packet: &'a Packet,
    steps: Cell<u32>,
}

impl Walk<'_> {
    fn chain(&self, chain: &str, sure: Certainty, depth: usize) -> Flow {
        let Some(chain) = self.table.chains.get(chain).filter(|_| depth < MAX_DEPTH) else { return Flow::Back };
        for rule in &chain.rules {
            self.steps.set(self.steps.get() + 1);
            if self.steps.get() > MAX_STEPS {
                return Flow::Back;
            }
            let Some(sure) = sure.and(rule.tests.iter().map(|test| test.hold(self.packet))) else { continue };
            match self.follow(&rule.verdict, sure, depth) {
                Flow::Next => {}
                flow => return flow,
            }
        }
        Flow::Back
    }

    fn follow(&self, verdict: &Verdict, sure: Certainty, depth: usize) -> Flow {
        match verdict {
            Verdict::Continue => Flow::Next,
            Verdict::Accept if !sure.maybe || sure.named || self.packet.is_begun_here => Flow::End(Fate::Accepted),
            Verdict::Drop if !sure.maybe => Flow::End(Fate::Dropped),
            Verdict::Return if !sure.maybe => Flow::Back,
            Verdict::Accept | Verdict::Drop | Verdict::Return => Flow::Next,
            Verdict::Jump(to) => match self.chain(to, sure, depth + 1) {
                Flow::Back => Flow::Next,
                flow => flow,
            },
            Verdict::Goto(to) => match self.chain(to, sure, depth + 1) {
                Flow::Back if sure.maybe => Flow::Next,
                flow => flow,
            },
            Verdict::Map(operand, entries) => {
                let known = operand.value(self.packet);
                for (range, verdict) in entries {
                    let held = known.as_ref().map_or(Held::Maybe, |value| match contains(range, value) {
                        true => Held::Yes { named: operand.is_ours(self.packet) },
                        false => Held::No,
                    });
                    let Some(sure) = sure.and([held]) else { continue };
                    match self.follow(verdict, sure, depth) {
                        Flow::Next => {}
                        flow => return flow,
                    }
                }
                Flow::Next
            }
        }
    }
}

enum Flow {
    Next,
    /// To whoever called this chain.
    Back,
    End(Fate),
}

impl Flow {
    fn fate(&self) -> Option<Fate> {
        match self {
            Self::End(fate) => Some(*fate),
            Self::Next | Self::Back => None,
        }
    }
}

enum Held {
    No,
    Maybe,
    Yes {
        /// The test asks for what is ours.
        named: bool,
    },
}

/// What led to a rule.
#[derive(Debug, Clone, Copy, Default)]
struct Certainty {
    /// Some test on the way only may hold.
    maybe: bool,
    /// Some test on the way asked for what is ours.
    named: bool,
}

impl Certainty {
    /// `None` when a test does not hold.
    fn and(mut self, tests: impl IntoIterator<Item = Held>) -> Option<Self> {
        for held in tests {
            match held {
                Held::No => return None,
                Held::Maybe => self.maybe = true,
                Held::Yes { named } => self.named |= named,
            }
        }
        Some(self)
    }
}

impl Test {
    fn hold(&self, packet: &Packet) -> Held {
        let Self::Of(operand, comparison) = self else { return Held::Maybe };
        let Some(value) = operand.value(packet) else { return Held::Maybe };
        let first = |data: &[u8]| value.get(..data.len()).unwrap_or(&value).to_vec();
        let (holds, asks_for_it) = match comparison {
            Comparison::Equal(data) => (first(data) == *data, true),
            Comparison::In(ranges) => (ranges.iter().any(|range| contains(range, &value)), true),
            Comparison::NotEqual(data) => (first(data) != *data, false),
            Comparison::NotIn(ranges) => (!ranges.iter().any(|range| contains(range, &value)), false),
            Comparison::Less(data) => (value < *data, false),
            Comparison::LessOrEqual(data) => (value <= *data, false),
            Comparison::Greater(data) => (value > *data, false),
            Comparison::GreaterOrEqual(data) => (value >= *data, false),
        };
        match holds {
            true => Held::Yes { named: asks_for_it && operand.is_ours(packet) },
            false => Held::No,
        }
    }
}

impl Field {
    /// In bytes.
    pub(super) fn length(self) -> usize {
        match self {
            Self::InputName | Self::OutputName => libc::IFNAMSIZ,
            Self::InputIndex | Self::OutputIndex | Self::Connection => 4,
            Self::EtherType | Self::DestinationPort => 2,
            Self::Family | Self::Protocol => 1,
        }
    }
}

impl Operand {
    fn value(&self, packet: &Packet) -> Option<Vec<u8>> {
        let value = packet.fields.get(&self.field)?;
        let Some(mask) = &self.mask else { return Some(value.clone()) };
        Some(value.iter().zip(mask).map(|(value, mask)| value & mask).collect())
    }

    fn is_ours(&self, packet: &Packet) -> bool {
        packet.ours.contains(&self.field)
    }
}

/// Keys of another length are of several fields at once, which are not told apart here.
fn contains((from, to): &Range, value: &[u8]) -> bool {
    value.len() == from.len() && from.as_slice() <= value && value <= to.as_slice()
}
