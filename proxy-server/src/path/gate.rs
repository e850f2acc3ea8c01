//! What is up or down, and when it is up again. Pure.
//!
//! What goes down again before it has held for ten times `stable` is waited for twice as long the next time, up to sixteen
//! times. So what bounces does not lead requests back and forth: the way out is quick, the way back is not.

use std::time::Duration;

use tokio::time::Instant;

/// It has held after so many times `stable`.
const HELD: u32 = 10;
/// So often the wait is doubled.
const DOUBLED: u32 = 4;

/// Something that is up or down.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gate {
    pub(super) is_up: bool,
    /// Since when.
    pub(super) since: Instant,
    /// While it is down: since when all is well again.
    pub(super) well: Option<Instant>,
    /// How often the wait is doubled.
    doubled: u32,
    /// It has been down before.
    has_returned: bool,
}

impl Gate {
    pub(crate) const fn new(now: Instant) -> Self {
        Self {
            is_up: true,
            since: now,
            well: None,
            doubled: 0,
            has_returned: false,
        }
    }

    pub(super) fn fall(&mut self, now: Instant, stable: Duration) {
        let too_soon = now.duration_since(self.since) < stable * HELD;
        self.doubled = match self.has_returned && too_soon {
            true => (self.doubled + 1).min(DOUBLED),
            false => 0,
        };
        (self.is_up, self.since, self.well) = (false, now, None);
    }

    /// Whether it is up again, all being well.
    pub(super) fn rise(&mut self, now: Instant, stable: Duration) -> bool {
        let well = *self.well.get_or_insert(now);
        if now.duration_since(well) < stable * (1 << self.doubled) {
            return false;
        }
        (self.is_up, self.since, self.has_returned) = (true, now, true);
        true
    }

    /// Takes in a look and says whether it is up, where a single bad one brings it down.
    pub(crate) fn look(&mut self, is_well: bool, now: Instant, stable: Duration) -> bool {
        match (is_well, self.is_up) {
            (true, true) => true,
            (true, false) => self.rise(now, stable),
            (false, true) => {
                self.fall(now, stable);
                false
            }
            (false, false) => {
                self.well = None;
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STABLE: Duration = Duration::from_secs(30);

    #[test]
    fn a_look_is_enough_to_fall_and_it_takes_good_ones_over_stable_to_rise() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut gate = Gate::new(start);
        for (at, is_well, is_up) in [
            (0, true, true),
            (1, false, false),
            (10, true, false),
            (39, true, false),
            (39, false, false),
            // From here on.
            (50, true, false),
            (79, true, false),
            (80, true, true),
            (81, true, true),
            (400, false, false),
            (401, true, false),
            (431, true, true),
        ] {
            assert_eq!(gate.look(is_well, after(at), STABLE), is_up, "{at} s");
        }
    }

    #[test]
    fn what_bounces_is_waited_for_ever_longer() {
        let start = Instant::now();
        let mut gate = Gate::new(start);
        let (mut was_up, mut switches) = (true, 0_u32);
        // Gone for 3 s, back for 3 s; nobody looks at it while it is down but to see that it is there.
        for tenth in 0..36_000_u64 {
            let now = start + Duration::from_millis(100 * tenth);
            let is_cut = tenth % 60 < 30;
            let is_up = gate.look(!(is_cut && was_up), now, STABLE);
            switches += u32::from(is_up != was_up);
            was_up = is_up;
        }
        assert!(switches <= 24, "{switches} in an hour");
    }
}
