//! What part of the packets that were sent of late was lost. Pure: counters and the time in.
//!
//! Counted since a mark that is moved on: so it is of the last one to two minutes, and of more where that is less than twice
//! [`LEAST`] packets. It is of what this end has sent; what was lost on its way here only the other end knows.

use std::time::Duration;

use proto::transport::SessionStats;
use tokio::time::Instant;

/// A mark is moved on after so long at least,
const LATE: Duration = Duration::from_secs(60);
/// and so many packets at least: one of fewer says little.
const LEAST: u64 = 32;

/// How far the counters were.
#[derive(Debug, Clone, Copy)]
struct Mark {
    at: Instant,
    sent: u64,
    lost: u64,
}

/// The marks of a session.
#[derive(Debug)]
pub struct Loss {
    /// From which is counted.
    from: Mark,
    /// The next to count from.
    next: Mark,
}

impl Loss {
    /// Of a session that begins.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        let begin = Mark {
            at: now,
            sent: 0,
            lost: 0,
        };
        Self {
            from: begin,
            next: begin,
        }
    }

    /// Moves the mark on; to be called now and then.
    pub fn look(&mut self, now: Instant, stats: &SessionStats) {
        let sent = stats.sent_packets.saturating_sub(self.next.sent);
        if now.saturating_duration_since(self.next.at) >= LATE && sent >= LEAST {
            self.from = self.next;
            self.next = Mark {
                at: now,
                sent: stats.sent_packets,
                lost: stats.lost_packets,
            };
        }
    }

    /// The part that was lost, 0 to 1; `None` as long as too few were sent.
    #[must_use]
    pub fn part(&self, stats: &SessionStats) -> Option<f64> {
        let sent = stats.sent_packets.saturating_sub(self.from.sent);
        let lost = stats.lost_packets.saturating_sub(self.from.lost);
        let number = |count| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
        // What was sent before the mark may be found lost after it.
        (sent >= LEAST).then(|| number(lost.min(sent)) / number(sent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(sent_packets: u64, lost_packets: u64) -> SessionStats {
        SessionStats {
            sent_packets,
            lost_packets,
            ..SessionStats::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_lost_long_ago_does_not_count_and_a_few_packets_say_nothing() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut loss = Loss::new(start);
        assert_eq!(loss.part(&stats(LEAST - 1, 5)), None);
        assert_eq!(loss.part(&stats(100, 50)), Some(0.5));
        // All of it is still of late.
        loss.look(at(59), &stats(100, 50));
        loss.look(at(60), &stats(100, 50));
        assert_eq!(loss.part(&stats(200, 50)), Some(0.25));
        // After two marks it is not.
        loss.look(at(119), &stats(1000, 50));
        loss.look(at(120), &stats(1100, 50));
        assert_eq!(loss.part(&stats(1100, 50)), Some(0.0));
        // On an idle session nothing moves on without packets that show something.
        for seconds in 121..500 {
            loss.look(at(seconds), &stats(1110, 60));
        }
        assert_eq!(loss.part(&stats(1110, 60)), Some(10.0 / 1010.0));
        // All that is found lost was sent once.
        assert_eq!(loss.part(&stats(1132, 5000)), Some(1.0));
    }
}
