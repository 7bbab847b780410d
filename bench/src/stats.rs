//! Series of one figure over the rounds of a run, and ratios between two series.
//!
//! A ratio is taken within each round, where both sides had the same machine in the same minute, and only then the
//! median: the machine drifts by more from minute to minute than rivals differ.

use serde::Serialize;

/// One figure in every round; `None` where it could not be measured.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Series {
    rounds: Vec<Option<f64>>,
}

impl Series {
    pub fn push(&mut self, value: Option<f64>) {
        self.rounds.push(value.filter(|value| value.is_finite()));
    }

    pub fn rounds(&self) -> &[Option<f64>] {
        &self.rounds
    }

    /// What was measured, in the order of the rounds.
    pub fn values(&self) -> impl Iterator<Item = f64> {
        self.rounds.iter().copied().flatten()
    }

    /// The middle value, of an even number the mean of the two in the middle; `None` when there is none.
    pub fn median(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.values().collect();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => None,
            len if len % 2 == 1 => Some(sorted[middle]),
            _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
        }
    }

    pub fn min(&self) -> Option<f64> {
        self.values().reduce(f64::min)
    }

    pub fn max(&self) -> Option<f64> {
        self.values().reduce(f64::max)
    }

    /// Combines two series round by round; a round that one of them lacks is lacking.
    pub fn zip_with(&self, other: &Self, combine: impl Fn(f64, f64) -> f64) -> Self {
        let mut combined = Self::default();
        for (a, b) in self.rounds.iter().zip(&other.rounds) {
            combined.push(a.zip(*b).map(|(a, b)| combine(a, b)));
        }
        combined
    }

    /// `self / other` within each round.
    pub fn ratio_to(&self, other: &Self) -> Self {
        self.zip_with(other, |a, b| a / b)
    }

    /// The better of several series within each round, where not all need to have it.
    pub fn best_of(all: &[&Self], better: impl Fn(f64, f64) -> f64) -> Self {
        let rounds = all.iter().map(|series| series.rounds.len()).max().unwrap_or_default();
        let mut best = Self::default();
        for round in 0..rounds {
            best.push(all.iter().filter_map(|series| *series.rounds.get(round)?).reduce(&better));
        }
        best
    }
}

impl<const N: usize> From<[f64; N]> for Series {
    fn from(rounds: [f64; N]) -> Self {
        Self { rounds: rounds.map(Some).into() }
    }
}

/// `{"median","min","max","rounds"}`, each `null` where nothing was measured.
impl Serialize for Series {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let short = |value: f64| if value.abs() >= 100.0 { value.round() } else { (value * 1e4).round() / 1e4 };
        let rounds: Vec<Option<f64>> = self.rounds.iter().map(|value| value.map(short)).collect();
        let mut fields = serializer.serialize_struct("Series", 4)?;
        fields.serialize_field("median", &self.median().map(short))?;
        fields.serialize_field("min", &self.min().map(short))?;
        fields.serialize_field("max", &self.max().map(short))?;
        fields.serialize_field("rounds", &rounds)?;
        fields.end()
    }
}

/// The value below which `percent` of the sorted values lie (nearest rank); `None` of nothing.
pub fn percentile(sorted: &[u64], percent: usize) -> Option<u64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn series(rounds: &[Option<f64>]) -> Series {
        let mut series = Series::default();
        rounds.iter().for_each(|value| series.push(*value));
        series
    }

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_the_two() {
        assert_eq!(Series::from([3.0, 1.0, 2.0]).median(), Some(2.0));
        assert_eq!(Series::from([4.0, 1.0, 2.0, 3.0]).median(), Some(2.5));
        assert_eq!(Series::default().median(), None);
        assert_eq!(series(&[None, Some(7.0), None]).median(), Some(7.0));
    }

    #[test]
    fn a_ratio_is_taken_within_rounds_not_between_medians() {
        // Medians are 20 and 20; yet within every round but the last ours is twice theirs or half of it.
        let ours = Series::from([10.0, 20.0, 60.0]);
        let theirs = Series::from([20.0, 10.0, 30.0]);
        let ratio = ours.ratio_to(&theirs);
        assert_eq!(ratio, Series::from([0.5, 2.0, 2.0]));
        assert_eq!(ratio.median(), Some(2.0));
    }

    #[test]
    fn a_round_that_one_side_lacks_has_no_ratio() {
        let ratio = series(&[Some(1.0), None, Some(3.0)]).ratio_to(&series(&[Some(2.0), Some(2.0), Some(0.0)]));
        assert_eq!(ratio.rounds(), [Some(0.5), None, None], "nor has one against nothing");
    }

    #[test]
    fn the_best_is_picked_anew_in_each_round() {
        let (a, b) = (Series::from([1.0, 5.0]), series(&[Some(2.0), None]));
        assert_eq!(Series::best_of(&[&a, &b], f64::max), Series::from([2.0, 5.0]));
        assert_eq!(Series::best_of(&[], f64::max), Series::default());
    }

    #[test]
    fn percentiles_are_values_that_were_seen() {
        let sorted: Vec<u64> = (1..=200).collect();
        assert_eq!(percentile(&sorted, 50), Some(100));
        assert_eq!(percentile(&sorted, 99), Some(198));
        assert_eq!(percentile(&[5], 99), Some(5));
        assert_eq!(percentile(&[], 50), None);
    }

    #[test]
    fn json_has_the_four_fields() {
        let json = serde_json::to_value(series(&[Some(1.0), None, Some(1234.56)])).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"median": 618.0, "min": 1.0, "max": 1235.0, "rounds": [1.0, null, 1235.0]})
        );
    }
}
