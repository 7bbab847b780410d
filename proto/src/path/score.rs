//! Which of two proven paths is the better one.

use std::net::SocketAddr;
use std::time::Duration;

use crate::path::candidate::RemoteKind;

/// How good a kind of path is: a better one wins at once, whatever its delay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// In a subnet this node is connected to.
    Lan,
    /// An address of the peer's own, without a translation on its side.
    Host,
    /// Through the NAT of the peer.
    Translated,
    Relay,
}

impl Tier {
    pub fn of(kind: RemoteKind, is_on_link: bool) -> Self {
        match kind {
            RemoteKind::Relay => Self::Relay,
            _ if is_on_link => Self::Lan,
            RemoteKind::Host => Self::Host,
            RemoteKind::Static | RemoteKind::Mapped | RemoteKind::Reflexive | RemoteKind::PeerReflexive => {
                Self::Translated
            }
        }
    }
}

/// What is known of a path that answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Score {
    pub tier: Tier,
    /// Answers come from where the questions went. Where they come from elsewhere nothing the peer sends keeps its NAT open
    /// for us: RFC 8445, section 7.2.5.2.1, has no use for such a path, and it is taken here for want of another.
    pub is_symmetric: bool,
    pub rtt: Duration,
    pub is_v6: bool,
}

/// IPv6 is less often translated and throttled: worth this much delay.
const V6_BONUS: Duration = Duration::from_millis(3);
/// Within a tier a switch must gain this much, and a fifth: less is noise, and a switch is a risk.
const MIN_GAIN: Duration = Duration::from_millis(5);

impl Score {
    pub fn new(tier: Tier, is_symmetric: bool, rtt: Duration, at: Option<SocketAddr>) -> Self {
        Self { tier, is_symmetric, rtt, is_v6: at.is_some_and(|at| at.is_ipv6()) }
    }

    /// Whether it is worth leaving `current`, which works, for this one.
    pub fn is_worth_leaving(&self, current: &Self) -> bool {
        if self.tier != current.tier {
            return self.tier < current.tier;
        }
        if self.is_symmetric != current.is_symmetric {
            return self.is_symmetric;
        }
        let (new, old) = (self.judged_rtt(), current.judged_rtt());
        new + MIN_GAIN <= old && new <= old * 4 / 5
    }

    fn judged_rtt(&self) -> Duration {
        self.rtt.saturating_sub(if self.is_v6 { V6_BONUS } else { Duration::ZERO })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(tier: Tier, rtt_ms: u64, is_v6: bool) -> Score {
        Score { tier, is_symmetric: true, rtt: Duration::from_millis(rtt_ms), is_v6 }
    }

    #[test]
    fn a_better_tier_wins_whatever_its_delay() {
        let tiers = [Tier::Lan, Tier::Host, Tier::Translated, Tier::Relay];
        for (better, worse) in tiers.iter().zip(&tiers[1..]) {
            assert!(score(*better, 300, false).is_worth_leaving(&score(*worse, 1, true)));
            assert!(!score(*worse, 1, true).is_worth_leaving(&score(*better, 300, false)));
        }
    }

    #[test]
    fn within_a_tier_answers_from_elsewhere_are_worth_less_than_any_delay() {
        let direct = score(Tier::Translated, 300, false);
        let crooked = Score { is_symmetric: false, ..score(Tier::Translated, 1, true) };
        assert!(direct.is_worth_leaving(&crooked) && !crooked.is_worth_leaving(&direct));
        let crooked_lan = Score { tier: Tier::Lan, ..crooked };
        assert!(crooked_lan.is_worth_leaving(&direct));
    }

    #[test]
    fn within_a_tier_only_a_clear_gain_is_worth_a_switch() {
        for (new, old, worth) in [
            ((20, false), (40, false), true),
            ((16, false), (20, false), false),  // a fifth, but less than 5 ms
            ((90, false), (100, false), false), // 10 ms, but less than a fifth
            ((80, false), (100, false), true),
            ((1, false), (5, false), false),
            ((23, true), (25, false), true), // IPv6: 20 against 25
            ((23, false), (25, false), false),
            ((40, false), (40, true), false),
        ] {
            let (new, old) = (score(Tier::Host, new.0, new.1), score(Tier::Host, old.0, old.1));
            assert_eq!(new.is_worth_leaving(&old), worth, "{new:?} for {old:?}");
        }
    }
}
