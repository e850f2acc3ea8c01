//! When to renew. Pure functions over values: no clock, no IO, no randomness of their own.

use std::time::Duration;

use rustls_pki_types::UnixTime;

use crate::clock::from_secs;

/// Share of a leaf's life after which it is renewed: 24 h leaves have 8 h left then, enough for an outage.
const RENEW_AFTER: (u64, u64) = (2, 3);

/// Share of the life over which agents that were enrolled together spread: a tenth.
const SPREAD: u64 = 10;

/// First pause after a renewal that failed.
const FIRST_RETRY: Duration = Duration::from_secs(5);

/// Longest pause: an edge that comes back after an outage renews within ten minutes.
const LAST_RETRY: Duration = Duration::from_secs(600);

/// The moment to renew a leaf: two thirds of its life, plus up to a tenth of it by `jitter` (0 to 1).
#[must_use]
pub fn renew_at(not_before: UnixTime, not_after: UnixTime, jitter: f64) -> UnixTime {
    let life = not_after.as_secs().saturating_sub(not_before.as_secs());
    let (share, of) = RENEW_AFTER;
    let spread = Duration::from_secs(life / SPREAD).mul_f64(unit(jitter));
    let after = life / of * share + spread.as_secs();
    from_secs(not_before.as_secs().saturating_add(after.min(life)))
}

/// The pause before attempt `attempt` + 1 after `attempt` (1, 2, …) failed with `left` of the leaf's life.
///
/// Doubles from 5 s to 10 min, never more than a quarter of what is left (but at least 5 s), and between
/// half and all of that by `jitter` (0 to 1).
#[must_use]
pub fn retry_after(attempt: u32, left: Duration, jitter: f64) -> Duration {
    let doubled = FIRST_RETRY.saturating_mul(1 << attempt.saturating_sub(1).min(16));
    let ceiling = LAST_RETRY.min(left / 4).max(FIRST_RETRY);
    doubled.min(ceiling).mul_f64(0.5 + 0.5 * unit(jitter))
}

/// Anything that is no number between 0 and 1 becomes the nearest one.
const fn unit(jitter: f64) -> f64 {
    if jitter.is_nan() {
        0.0
    } else {
        jitter.clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY: u64 = 86_400;

    #[test]
    fn an_agents_leaf_is_renewed_after_sixteen_hours() {
        let at = |jitter| renew_at(from_secs(0), from_secs(DAY), jitter).as_secs();
        assert_eq!(at(0.0), 16 * 3600);
        assert_eq!(at(1.0), 16 * 3600 + 8640);
        assert_eq!(at(f64::NAN), 16 * 3600);
        assert_eq!(at(7.0), at(1.0));
    }

    #[test]
    fn retries_double_up_to_ten_minutes() {
        let pause = |attempt| retry_after(attempt, Duration::from_secs(DAY), 1.0).as_secs();
        assert_eq!([pause(1), pause(2), pause(3)], [5, 10, 20]);
        assert_eq!([pause(8), pause(1000), pause(u32::MAX)], [600; 3]);
    }

    #[test]
    fn retries_come_closer_as_the_end_does() {
        assert_eq!(
            retry_after(20, Duration::from_secs(400), 1.0),
            Duration::from_secs(100)
        );
        assert_eq!(retry_after(20, Duration::ZERO, 1.0), FIRST_RETRY);
    }

    proptest! {
        #[test]
        fn renewal_lies_in_the_last_third_of_the_life(start in 0u64..4_000_000_000, life in 3u64..400_000_000, jitter in 0.0f64..=1.0) {
            let at = renew_at(from_secs(start), from_secs(start + life), jitter).as_secs() - start;
            prop_assert!(at + 2 >= life / 3 * 2);
            prop_assert!(at <= life * 4 / 5);
        }
    }
}
