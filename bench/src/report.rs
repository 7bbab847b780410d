//! What a run found, as data; and its forms: a JSON line, a table, a page, a picture.

pub mod chart;
pub mod page;
pub mod table;

use std::collections::BTreeMap;

use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::{
    conditions::Conditions,
    contender::{MESHSPAN, NO_CRYPTO, VETH},
    gates::Judged,
    machine::Machine,
    measure::Figures,
    metric::Metric,
    peers::PeersReport,
    stats::Series,
};

/// A whole run. Fields in the order of the JSON line.
#[derive(Debug, Serialize)]
pub struct Report {
    pub ok: bool,
    #[serde(flatten)]
    pub conditions: Conditions,
    pub machine: Machine,
    /// Known rivals that are not installed.
    pub missing: Vec<String>,
    pub contenders: Vec<Measured>,
    /// By name.
    #[serde(serialize_with = "by_name")]
    pub ceilings: Vec<Measured>,
    /// Ours / theirs, by name of the other and of the figure.
    pub ratios: BTreeMap<String, BTreeMap<&'static str, Series>>,
    pub gates: Vec<Judged>,
    /// What could not be measured, in words.
    pub failures: Vec<String>,
    /// Seal and open of one packet by one thread, ns per byte of payload: what the cipher alone costs.
    pub cipher_ns_per_byte: Series,
    /// iperf3 / ours of one TCP stream, by name, where it was asked for.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub iperf3_ratio: BTreeMap<String, Series>,
    /// Many peers against one, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peers: Option<PeersReport>,
    pub rounds: u32,
    pub seconds: f64,
}

/// One contender's figures over all rounds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Measured {
    pub name: String,
    pub version: String,
    #[serde(flatten, serialize_with = "by_key")]
    pub figures: BTreeMap<Metric, Series>,
}

impl Measured {
    pub fn new(name: &str, version: String) -> Self {
        Self { name: name.to_owned(), version, figures: BTreeMap::new() }
    }

    /// Adds a round; figures that it lacks are lacking in it.
    pub fn push(&mut self, round: usize, figures: &Figures) {
        for metric in figures.keys() {
            self.figures.entry(*metric).or_insert_with(|| {
                let mut series = Series::default();
                (0..round).for_each(|_| series.push(None));
                series
            });
        }
        for (metric, series) in &mut self.figures {
            series.push(figures.get(metric).copied());
        }
    }

    pub fn series(&self, metric: Metric) -> Option<&Series> {
        self.figures.get(&metric)
    }

    pub fn median(&self, metric: Metric) -> Option<f64> {
        self.series(metric)?.median()
    }
}

impl Report {
    pub fn ours(&self) -> Option<&Measured> {
        find(&self.contenders, MESHSPAN)
    }

    pub fn rivals(&self) -> impl Iterator<Item = &Measured> {
        self.contenders.iter().filter(|measured| measured.name != MESHSPAN)
    }
}

pub fn find<'a>(all: &'a [Measured], name: &str) -> Option<&'a Measured> {
    all.iter().find(|measured| measured.name == name)
}

/// Ours / theirs within each round, for every figure both have.
pub fn ratios(contenders: &[Measured], ceilings: &[Measured]) -> BTreeMap<String, BTreeMap<&'static str, Series>> {
    let Some(ours) = find(contenders, MESHSPAN) else { return BTreeMap::new() };
    let others = contenders.iter().chain(ceilings).filter(|other| other.name != MESHSPAN);
    others
        .map(|other| {
            let of = |metric: Metric| Some(ours.series(metric)?.ratio_to(other.series(metric)?));
            let all = Metric::ALL.into_iter().filter(|metric| metric.has_ratio());
            let found = all.filter_map(|metric| Some((metric.short(), of(metric)?)));
            (other.name.clone(), found.filter(|(_, ratio)| ratio.median().is_some()).collect())
        })
        .collect()
}

/// The two ceilings in the order of the table.
pub const CEILINGS: [&str; 2] = [VETH, NO_CRYPTO];

fn by_key<S: Serializer>(figures: &BTreeMap<Metric, Series>, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(figures.len()))?;
    for (metric, series) in figures {
        map.serialize_entry(metric.key(), series)?;
    }
    map.end()
}

fn by_name<S: Serializer>(all: &[Measured], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(all.len()))?;
    for measured in all {
        map.serialize_entry(&measured.name, measured)?;
    }
    map.end()
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::underlay::Underlay;

    /// A contender with the same figures in each of three rounds but for a little noise.
    pub(crate) fn measured(name: &str, figures: &[(Metric, f64)]) -> Measured {
        let mut measured = Measured::new(name, "1.0".into());
        for (round, noise) in [1.0, 1.1, 0.9].into_iter().enumerate() {
            measured.push(round, &figures.iter().map(|(metric, value)| (*metric, value * noise)).collect());
        }
        measured
    }

    pub(crate) fn report(contenders: Vec<Measured>, ceilings: Vec<Measured>) -> Report {
        Report {
            ok: true,
            conditions: Conditions { underlay: Underlay::On, congestion: "cubic".into() },
            machine: Machine {
                cpu_model: "A <fast> CPU & more".into(),
                cores: 2,
                kernel: "6.18".into(),
                memory_mib: 1,
            },
            missing: vec!["gotatun".into()],
            ratios: ratios(&contenders, &ceilings),
            contenders,
            ceilings,
            gates: Vec::new(),
            failures: Vec::new(),
            cipher_ns_per_byte: Series::from([1.1; 3]),
            iperf3_ratio: BTreeMap::new(),
            peers: None,
            rounds: 3,
            seconds: 4.0,
        }
    }

    #[test]
    fn the_json_line_has_the_promised_shape() {
        let report = report(
            vec![
                measured(MESHSPAN, &[(Metric::Tcp1, 4.0), (Metric::Udp64, 300.0), (Metric::PeakRss, 30.0)]),
                measured("wireguard-go", &[(Metric::Tcp1, 2.0), (Metric::Udp64, 100.0)]),
            ],
            vec![measured(VETH, &[(Metric::Tcp1, 16.0)])],
        );
        let json = serde_json::to_value(&report).unwrap();
        for field in ["ok", "underlay", "machine", "missing", "contenders", "ceilings", "ratios"] {
            assert!(!json[field].is_null(), "no {field} in {json}");
        }
        assert_eq!((json["underlay"].as_str(), json["congestion"].as_str()), (Some("on"), Some("cubic")));
        let ours = &json["contenders"][0];
        assert_eq!((ours["name"].as_str(), ours["version"].as_str()), (Some("meshspan"), Some("1.0")));
        for key in ["tcp1_gbps", "udp64_lossfree_kpps", "peak_rss_mib"] {
            for part in ["median", "min", "max", "rounds"] {
                assert!(!ours[key][part].is_null(), "no {key}.{part} in {ours}");
            }
        }
        assert_eq!(json["ceilings"]["veth"]["tcp1_gbps"]["median"], 16.0);
        assert_eq!(json["ratios"]["wireguard-go"]["tcp1"]["median"], 2.0);
        assert_eq!(json["ratios"]["wireguard-go"]["udp64"]["median"], 3.0);
        assert_eq!(json["ratios"]["veth"]["tcp1"]["rounds"].as_array().unwrap().len(), 3);
        assert!(!serde_json::to_string(&report).unwrap().contains('\n'));
    }

    #[test]
    fn a_figure_that_came_late_or_once_keeps_its_round() {
        let mut measured = Measured::new("x", String::new());
        measured.push(0, &Figures::from([(Metric::Tcp1, 1.0)]));
        measured.push(1, &Figures::from([(Metric::Tcp8, 2.0)]));
        assert_eq!(measured.series(Metric::Tcp1).unwrap().rounds(), [Some(1.0), None]);
        assert_eq!(measured.series(Metric::Tcp8).unwrap().rounds(), [None, Some(2.0)]);
    }
}
