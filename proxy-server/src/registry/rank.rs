//! How good a session is for the next stream: of an agent, or of another server.

use std::sync::atomic::{AtomicU64, Ordering};

/// Better ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// Nothing is heard of it, and it is to go.
    SilentAndGoing,
    /// Nothing is heard of it.
    Silent,
    /// It is to go, and serves until then.
    Going,
    /// It serves.
    Healthy,
}

impl Rank {
    /// The rank of a session that is so.
    #[must_use]
    pub const fn of(silent: bool, going: bool) -> Self {
        match (silent, going) {
            (true, true) => Self::SilentAndGoing,
            (true, false) => Self::Silent,
            (false, true) => Self::Going,
            (false, false) => Self::Healthy,
        }
    }
}

/// Whether a request has found a session silent, long before its keepalives would show it. It lasts until a byte comes.
#[derive(Debug, Default)]
pub struct Doubt(AtomicU64);

impl Doubt {
    /// Nothing has come since this many bytes.
    pub fn raise(&self, received: u64) {
        self.0.store(received.saturating_add(1), Ordering::Relaxed);
    }

    /// Whether it is doubted still; `received` says how many bytes have come by now.
    pub fn is_there(&self, received: impl FnOnce() -> u64) -> bool {
        let raised = self.0.load(Ordering::Relaxed);
        // A transport's figures cost a lock, and doubts are rare.
        let there = raised != 0 && received() < raised;
        if raised != 0 && !there {
            self.0.store(0, Ordering::Relaxed);
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn healthy_goes_before_going_before_silent() {
        let ranks = [(true, true), (true, false), (false, true), (false, false)];
        let ranks = ranks.map(|(silent, going)| Rank::of(silent, going));
        assert!(ranks.is_sorted() && ranks[0] < ranks[3]);
    }

    #[test]
    fn a_doubt_lasts_until_something_is_heard() {
        let doubt = Doubt::default();
        assert!(!doubt.is_there(|| 0));
        for before in [0, 100] {
            doubt.raise(before);
            assert!(doubt.is_there(|| before) && doubt.is_there(|| before));
            assert!(!doubt.is_there(|| before + 1));
            assert!(!doubt.is_there(|| before), "it is over once and for all");
        }
    }
}
