//! What a full run is held to: every gate and goal as data, and the judge.
//!
//! A gate that cannot be judged, because what it compares with was not measured, is open: it neither passes nor fails.

use std::fmt;

use serde::Serialize;

use crate::{
    contender::{MESHSPAN, NO_CRYPTO, VETH},
    metric::Metric,
    report::{Measured, find},
    stats::Series,
    underlay::Underlay,
};

/// One demand, with its figure on each kind of wire.
#[derive(Debug, Clone, Copy)]
struct Gate {
    what: Quantity,
    bound: Bound,
    /// On `on`, `swgso`, `nogso`.
    gate: [f64; 3],
    goal: Option<[f64; 3]>,
}

#[derive(Debug, Clone, Copy)]
enum Quantity {
    /// Ours / theirs; of several others the better one, in each round.
    Ratio(Metric, Against),
    /// The machine's ns per byte, ours less the no-crypto ceiling's, over what the cipher alone costs.
    CipherCost,
    /// TCP of the no-crypto ceiling over that of the bare wire.
    CeilingOfWire,
    /// A figure of ours.
    Ours(Metric),
}

#[derive(Debug, Clone, Copy)]
enum Against {
    One(&'static str),
    Better(&'static [&'static str]),
    BestRival,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bound {
    AtLeast,
    AtMost,
}

const BORINGTUN: Against = Against::Better(&["boringtun-cli", "boringtun-cli-t1"]);
use Bound::{AtLeast, AtMost};

const fn gate(what: Quantity, bound: Bound, gate: [f64; 3], goal: Option<[f64; 3]>) -> Gate {
    Gate { what, bound, gate, goal }
}

/// The demands of issue "the fastest userspace WireGuard tunnel", and DESIGN.md 8.
const GATES: [Gate; 13] = [
    gate(Quantity::Ratio(Metric::Tcp1, Against::One("wireguard-go")), AtLeast, [1.7, 1.5, 2.5], Some([2.2, 2.0, 3.2])),
    gate(Quantity::Ratio(Metric::Tcp1, BORINGTUN), AtLeast, [4.5, 3.8, 3.0], Some([5.5, 4.6, 3.5])),
    gate(Quantity::Ratio(Metric::Tcp1, Against::One("gotatun")), AtLeast, [4.0, 3.6, 3.0], Some([5.0, 4.5, 3.4])),
    gate(Quantity::CipherCost, AtMost, [1.5; 3], Some([1.25; 3])),
    gate(Quantity::CeilingOfWire, AtLeast, [0.55; 3], None),
    gate(Quantity::Ratio(Metric::Udp200CpuPerByte, Against::One("boringtun-cli")), AtMost, [0.6; 3], None),
    gate(Quantity::Ratio(Metric::Udp200CpuPerByte, Against::One("gotatun")), AtMost, [0.9; 3], None),
    gate(Quantity::Ratio(Metric::Udp1400, Against::BestRival), AtLeast, [2.0; 3], None),
    gate(Quantity::Ratio(Metric::Udp64, Against::BestRival), AtLeast, [2.0; 3], None),
    gate(Quantity::Ratio(Metric::RttIdleP50, Against::BestRival), AtMost, [1.0; 3], None),
    gate(Quantity::Ratio(Metric::RttLoadedP99, Against::BestRival), AtMost, [1.0; 3], None),
    gate(Quantity::Ours(Metric::PeakRss), AtMost, [64.0; 3], None),
    gate(Quantity::Ours(Metric::JunkLoss), AtMost, [1.0; 3], None),
];

/// A gate with what was reached.
#[derive(Debug, Clone, Serialize)]
pub struct Judged {
    pub what: String,
    /// `>=` or `<=`.
    pub bound: &'static str,
    pub gate: f64,
    pub goal: Option<f64>,
    /// Over the rounds; its median is judged.
    pub reached: Series,
    /// `None` = could not be judged.
    pub passed: Option<bool>,
    pub goal_passed: Option<bool>,
}

/// Judges every gate of this kind of wire.
pub fn judge(
    underlay: Underlay,
    contenders: &[Measured],
    ceilings: &[Measured],
    cipher_ns_per_byte: &Series,
) -> Vec<Judged> {
    let at = Underlay::ALL.iter().position(|known| *known == underlay).unwrap_or_default();
    let all: Vec<&Measured> = contenders.iter().chain(ceilings).collect();
    GATES
        .iter()
        .map(|gate| {
            let reached = gate.what.reached(&all, ceilings, cipher_ns_per_byte).unwrap_or_default();
            let holds = |limit: f64| {
                reached.median().map(|median| match gate.bound {
                    AtLeast => median >= limit,
                    AtMost => median <= limit,
                })
            };
            let goal = gate.goal.map(|goal| goal[at]);
            Judged {
                what: gate.what.to_string(),
                bound: if gate.bound == AtLeast { ">=" } else { "<=" },
                gate: gate.gate[at],
                goal,
                passed: holds(gate.gate[at]),
                goal_passed: goal.and_then(holds),
                reached,
            }
        })
        .collect()
}

impl Quantity {
    fn reached(self, all: &[&Measured], ceilings: &[Measured], cipher: &Series) -> Option<Series> {
        let ours = all.iter().find(|measured| measured.name == MESHSPAN)?;
        match self {
            Self::Ours(metric) => ours.series(metric).cloned(),
            Self::CeilingOfWire => {
                let of = |name| find(ceilings, name)?.series(Metric::Tcp1);
                Some(of(NO_CRYPTO)?.ratio_to(of(VETH)?))
            }
            Self::CipherCost => {
                let ceiling = find(ceilings, NO_CRYPTO)?.series(Metric::CpuPerByte)?;
                let spent = ours.series(Metric::CpuPerByte)?.zip_with(ceiling, |ours, ceiling| ours - ceiling);
                Some(spent.ratio_to(cipher))
            }
            Self::Ratio(metric, against) => {
                let is_rival = |name: &str| name != MESHSPAN && find(ceilings, name).is_none();
                let others: Vec<&Series> = all
                    .iter()
                    .filter(|other| match against {
                        Against::One(name) => other.name == name,
                        Against::Better(names) => names.contains(&other.name.as_str()),
                        Against::BestRival => is_rival(&other.name),
                    })
                    .filter_map(|other| other.series(metric))
                    .collect();
                let best = Series::best_of(&others, |a, b| metric.better().pick(a, b));
                Some(ours.series(metric)?.ratio_to(&best))
            }
        }
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ratio(metric, Against::One(name)) => write!(f, "{} / {name}", metric.short()),
            Self::Ratio(metric, Against::Better(names)) => {
                write!(f, "{} / better of {}", metric.short(), names.join(", "))
            }
            Self::Ratio(metric, Against::BestRival) => write!(f, "{} / best rival", metric.short()),
            Self::CipherCost => f.write_str("cost of the cipher / seal + open alone"),
            Self::CeilingOfWire => f.write_str("no-crypto ceiling / bare wire, tcp1"),
            Self::Ours(metric) => write!(f, "{}", metric.label()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::report::tests::measured;

    /// A run in which every gate of `on` passes just so.
    fn passing() -> (Vec<Measured>, Vec<Measured>) {
        let rival = |name, tcp1, udp_cpu| {
            measured(
                name,
                &[
                    (Metric::Tcp1, tcp1),
                    (Metric::Udp200CpuPerByte, udp_cpu),
                    (Metric::Udp1400, 500.0),
                    (Metric::Udp64, 100.0),
                    (Metric::RttIdleP50, 200.0),
                    (Metric::RttLoadedP99, 9000.0),
                ],
            )
        };
        let ours = measured(
            MESHSPAN,
            &[
                (Metric::Tcp1, 5.0),
                (Metric::CpuPerByte, 3.0),
                (Metric::Udp200CpuPerByte, 5.0),
                (Metric::Udp1400, 1001.0),
                (Metric::Udp64, 201.0),
                (Metric::RttIdleP50, 199.0),
                (Metric::RttLoadedP99, 8999.0),
                (Metric::PeakRss, 57.0),
                (Metric::JunkLoss, 0.5),
            ],
        );
        let rivals = [
            rival("wireguard-go", 2.2, 20.0),
            rival("boringtun-cli", 0.5, 10.0),
            rival("boringtun-cli-t1", 1.0, 9.0),
            rival("gotatun", 1.0, 6.0),
        ];
        let ceilings = vec![
            measured(VETH, &[(Metric::Tcp1, 16.0)]),
            measured(NO_CRYPTO, &[(Metric::Tcp1, 10.0), (Metric::CpuPerByte, 1.5)]),
        ];
        ([ours].into_iter().chain(rivals).collect(), ceilings)
    }

    #[test]
    fn a_run_that_reaches_everything_passes_every_gate_and_not_every_goal() {
        let (contenders, ceilings) = passing();
        let judged = judge(Underlay::On, &contenders, &ceilings, &Series::from([1.1; 3]));
        assert_eq!(judged.len(), GATES.len());
        assert!(judged.iter().all(|gate| gate.passed == Some(true)), "{judged:#?}");
        let boringtun = judged.iter().find(|gate| gate.what.contains("better of")).unwrap();
        assert_eq!((boringtun.gate, boringtun.goal, boringtun.goal_passed), (4.5, Some(5.5), Some(false)));
        assert_eq!(boringtun.reached.median(), Some(5.0), "against -t 1, its better setting");
    }

    /// Each gate has a run that turns it red, and only it (but where two gates look at one figure).
    #[test]
    fn each_gate_is_turned_red_by_what_it_is_about() {
        let spoilers: [(&str, Metric, f64, &str); 11] = [
            ("wireguard-go", Metric::Tcp1, 1.5, "tcp1 / wireguard-go"),
            ("boringtun-cli-t1", Metric::Tcp1, 1.3, "tcp1 / better of"),
            ("gotatun", Metric::Tcp1, 1.3, "tcp1 / gotatun"),
            (MESHSPAN, Metric::CpuPerByte, 1.2, "cost of the cipher"),
            (VETH, Metric::Tcp1, 1.3, "no-crypto ceiling"),
            ("boringtun-cli", Metric::Udp200CpuPerByte, 0.8, "udp200_cpu / boringtun-cli"),
            ("gotatun", Metric::Udp200CpuPerByte, 0.8, "udp200_cpu / gotatun"),
            ("gotatun", Metric::Udp1400, 1.2, "udp1400 / best rival"),
            ("wireguard-go", Metric::Udp64, 1.2, "udp64 / best rival"),
            ("gotatun", Metric::RttIdleP50, 0.9, "rtt_idle_p50 / best rival"),
            (MESHSPAN, Metric::RttLoadedP99, 1.2, "rtt_loaded_p99 / best rival"),
        ];
        for (name, metric, factor, gate) in spoilers {
            let (mut contenders, mut ceilings) = passing();
            let spoiled = contenders.iter_mut().chain(&mut ceilings).find(|measured| measured.name == name).unwrap();
            let series = spoiled.figures.get_mut(&metric).unwrap();
            *series = series.zip_with(&series.clone(), |value, _| value * factor);
            let judged = judge(Underlay::On, &contenders, &ceilings, &Series::from([1.1; 3]));
            let red: Vec<_> = judged.iter().filter(|gate| gate.passed != Some(true)).map(|gate| &gate.what).collect();
            assert!(red.len() == 1 && red[0].starts_with(gate), "{name} {metric:?}: {red:?}");
        }
    }

    #[test]
    fn figures_of_ours_alone_are_gated_too() {
        for (metric, factor) in [(Metric::PeakRss, 1.2), (Metric::JunkLoss, 3.0)] {
            let (mut contenders, ceilings) = passing();
            let series = contenders[0].figures.get_mut(&metric).unwrap();
            *series = series.zip_with(&series.clone(), |value, _| value * factor);
            let judged = judge(Underlay::On, &contenders, &ceilings, &Series::from([1.1; 3]));
            assert_eq!(judged.iter().filter(|gate| gate.passed == Some(false)).count(), 1, "{metric:?}");
        }
    }

    #[test]
    fn a_gate_whose_rival_is_absent_is_open_and_limits_follow_the_wire() {
        let (mut contenders, ceilings) = passing();
        contenders.retain(|measured| measured.name != "wireguard-go");
        let judged = judge(Underlay::NoGso, &contenders, &ceilings, &Series::default());
        assert_eq!((judged[0].gate, judged[0].passed), (2.5, None));
        assert_eq!(judged[1].gate, 3.0);
        assert_eq!(judged[3].passed, None, "nor can the cipher's cost be told without the cipher's");
    }
}
