//! Pauses between attempts to reach a server. Pure: randomness is an argument.
//!
//! The ceiling doubles with each failure and is set back only by a session that was *useful*: a server that accepts
//! and then drops everybody must not be stormed.

use std::time::Duration;

use crate::config::BackoffLimits;

/// The longest `retry_after` that is obeyed: a server that asks for more is mistaken, and an edge that stays away for
/// a day has to be visited.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(600);
/// A session that heard its server after the first keepalive was due has exchanged one.
const FIRST_KEEPALIVE: Duration = Duration::from_secs(8);

/// How many failures came in a row.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    limits: BackoffLimits,
    failures: u32,
}

/// Whether a session has shown that its server works for this agent: it served a stream, or answered a keepalive.
pub(crate) fn is_useful(served: u64, heard_after: Duration) -> bool {
    served > 0 || heard_after >= FIRST_KEEPALIVE
}

impl Backoff {
    pub(crate) const fn new(limits: BackoffLimits) -> Self {
        Self {
            limits,
            failures: 0,
        }
    }

    /// After a useful session.
    pub(crate) const fn reset(&mut self) {
        self.failures = 0;
    }

    /// The pause after one more failure: anywhere between the shortest and a ceiling that doubles up to the longest.
    /// `random` is uniform in 0..1.
    pub(crate) fn failed(&mut self, random: f64) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let doubled = self.limits.min.saturating_mul(1 << self.failures.min(16));
        let ceiling = doubled.min(self.limits.max);
        let spread = ceiling.saturating_sub(self.limits.min);
        self.limits.min + spread.mul_f64(random.clamp(0.0, 1.0))
    }

    /// The pause after a refusal that trying again does not mend: between half of the longest and the longest.
    pub(crate) fn hopeless(&mut self, random: f64) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.limits
            .max
            .mul_f64(0.5f64.mul_add(random.clamp(0.0, 1.0), 0.5))
    }
}

/// Never sooner than the server asked, and up to half later, so that its agents do not all come at once.
pub(crate) fn obey(pause: Duration, retry_after: Duration, random: f64) -> Duration {
    let asked = retry_after.min(LONGEST_RETRY_AFTER);
    pause.max(asked.mul_f64(0.5f64.mul_add(random.clamp(0.0, 1.0), 1.0)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn backoff() -> Backoff {
        Backoff::new(BackoffLimits::default())
    }

    #[test]
    fn pauses_grow_to_the_longest() {
        let mut backoff = backoff();
        let longest: Vec<_> = (0..8).map(|_| backoff.failed(1.0).as_millis()).collect();
        assert_eq!(
            longest,
            [1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]
        );
        assert_eq!(
            backoff.failed(0.0),
            Duration::from_millis(500),
            "full jitter, never a busy loop"
        );
    }

    #[test]
    fn only_a_useful_session_sets_them_back() {
        assert!(!is_useful(0, Duration::ZERO));
        assert!(
            !is_useful(0, Duration::from_secs(2)),
            "a GoAway after two seconds is no use"
        );
        assert!(is_useful(1, Duration::ZERO));
        assert!(
            is_useful(0, Duration::from_secs(9)),
            "a keepalive was answered"
        );
        let mut backoff = backoff();
        for _ in 0..9 {
            backoff.failed(1.0);
        }
        backoff.reset();
        assert_eq!(backoff.failed(1.0), Duration::from_secs(1));
    }

    #[test]
    fn a_server_is_not_asked_sooner_than_it_said() {
        let pause = Duration::from_secs(1);
        assert_eq!(
            obey(pause, Duration::from_secs(5), 0.0),
            Duration::from_secs(5)
        );
        assert_eq!(
            obey(pause, Duration::from_secs(4), 1.0),
            Duration::from_secs(6)
        );
        assert_eq!(obey(pause, Duration::ZERO, 1.0), pause);
        assert!(obey(pause, Duration::from_secs(1 << 40), 1.0) <= LONGEST_RETRY_AFTER.mul_f64(1.5));
    }

    proptest! {
        #[test]
        fn pauses_stay_within_their_limits(randoms in proptest::collection::vec(0.0f64..=1.0, 1..200)) {
            let mut backoff = backoff();
            for random in randoms {
                let pause = backoff.failed(random);
                prop_assert!(pause >= Duration::from_millis(500) && pause <= Duration::from_secs(30));
                let pause = backoff.hopeless(random);
                prop_assert!(pause >= Duration::from_secs(15) && pause <= Duration::from_secs(30));
            }
        }
    }
}
