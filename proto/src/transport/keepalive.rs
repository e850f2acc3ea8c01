//! When to send a keepalive, and what silence means. Pure: time and randomness are arguments.

use std::time::Duration;

/// Settings of liveness (docs/protocol.md section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Middle of the interval between keepalives. 10 s: below the 30 s after which home routers forget a UDP flow.
    pub interval: Duration,
    /// Silence after which a session is suspect: three keepalives missed.
    pub suspect_after: Duration,
    /// Silence after which it is lost.
    pub idle_timeout: Duration,
    /// How often a suspect session is nudged; bounds what is lost after a line came back.
    pub nudge_every: Duration,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(10),
            suspect_after: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(120),
            nudge_every: Duration::from_secs(5),
        }
    }
}

/// What silence means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Heard of within `suspect_after`.
    Healthy,
    /// Not picked for new streams while there is another.
    Suspect,
    /// Over.
    Dead,
}

impl Keepalive {
    /// How long to wait until the next keepalive: the interval ± 20 %, so that thousands of agents spread out.
    /// `random` is uniform in 0..1.
    #[must_use]
    pub fn next(&self, random: f64) -> Duration {
        self.interval
            .mul_f64(0.4f64.mul_add(random.clamp(0.0, 1.0), 0.8))
    }

    /// What a silence of that length means.
    #[must_use]
    pub fn verdict(&self, silence: Duration) -> Verdict {
        if silence >= self.idle_timeout {
            Verdict::Dead
        } else if silence >= self.suspect_after {
            Verdict::Suspect
        } else {
            Verdict::Healthy
        }
    }

    /// When to look next, after a silence of that length while the next keepalive is due in `keepalive_in`.
    #[must_use]
    pub fn look_in(&self, silence: Duration, keepalive_in: Duration) -> Duration {
        let limit = match self.verdict(silence) {
            Verdict::Healthy => self.suspect_after.saturating_sub(silence),
            Verdict::Suspect | Verdict::Dead => self
                .nudge_every
                .min(self.idle_timeout.saturating_sub(silence)),
        };
        limit.min(keepalive_in)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keepalives_spread_by_a_fifth() {
        let keepalive = Keepalive::default();
        assert_eq!(keepalive.next(0.0), Duration::from_secs(8));
        assert_eq!(keepalive.next(0.5), Duration::from_secs(10));
        assert_eq!(keepalive.next(1.0), Duration::from_secs(12));
    }

    #[test]
    fn silence_makes_suspect_then_dead() {
        let keepalive = Keepalive::default();
        for (silence, verdict) in [
            (0, Verdict::Healthy),
            (29, Verdict::Healthy),
            (30, Verdict::Suspect),
            (119, Verdict::Suspect),
            (120, Verdict::Dead),
        ] {
            assert_eq!(
                keepalive.verdict(Duration::from_secs(silence)),
                verdict,
                "{silence}"
            );
        }
    }

    #[test]
    fn it_looks_again_when_something_can_change() {
        let keepalive = Keepalive::default();
        let look = |silence, due| {
            keepalive
                .look_in(Duration::from_secs(silence), Duration::from_secs(due))
                .as_secs()
        };
        assert_eq!(look(0, 10), 10);
        assert_eq!(look(25, 10), 5, "when it becomes suspect");
        assert_eq!(look(40, 10), 5, "the next nudge");
        assert_eq!(look(118, 10), 2, "when it is dead");
    }
}
