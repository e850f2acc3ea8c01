//! How good a session is for the next stream: of an agent, or of another server.

use parking_lot::Mutex;
use tokio::time::Instant;

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

/// Whether a request has found a session silent, long before its keepalives would show it. It lasts until something is
/// acknowledged that was sent later: bytes that come show one direction alone.
#[derive(Debug, Default)]
pub struct Doubt(Mutex<Option<Instant>>);

impl Doubt {
    /// Nothing is acknowledged that was sent since then.
    pub fn raise(&self, since: Instant) {
        *self.0.lock() = Some(since);
    }

    /// Whether it is doubted still; `answered` says when the newest packet was sent that is acknowledged by now.
    pub fn is_there(&self, answered: impl FnOnce() -> Option<Instant>) -> bool {
        let mut raised = self.0.lock();
        // What a transport knows costs a lock, and doubts are rare.
        let there = raised.is_some_and(|since| answered().is_none_or(|sent| sent < since));
        if !there {
            *raised = None;
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn healthy_goes_before_going_before_silent() {
        let ranks = [(true, true), (true, false), (false, true), (false, false)];
        let ranks = ranks.map(|(silent, going)| Rank::of(silent, going));
        assert!(ranks.is_sorted() && ranks[0] < ranks[3]);
    }

    #[test]
    fn a_doubt_lasts_until_something_is_acknowledged_that_was_sent_later() {
        let doubt = Doubt::default();
        assert!(!doubt.is_there(|| None));
        let since = Instant::now();
        let (earlier, later) = (
            since - Duration::from_millis(1),
            since + Duration::from_millis(1),
        );
        for answered in [since, later] {
            doubt.raise(since);
            assert!(doubt.is_there(|| None) && doubt.is_there(|| Some(earlier)));
            assert!(!doubt.is_there(|| Some(answered)));
            assert!(!doubt.is_there(|| None), "it is over once and for all");
        }
    }
}
