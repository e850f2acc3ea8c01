//! One bound for the memory that unread bytes cost a process (docs/protocol.md section 5).
//!
//! A stream whose reader keeps up holds next to nothing; one whose reader stopped holds at most its window. So only
//! stopped streams are counted, each at a whole window, and over the limit the one that stopped longest is reset.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

/// A reader that was stopped for less is only a moment late, and is not reset.
const GRACE: Duration = Duration::from_secs(1);
/// Windows above this gain nothing on lines up to 100 Mbit/s at 80 ms.
const MAX_WINDOW: u32 = 1 << 20;
/// Windows below this make even a short line slow.
const MIN_WINDOW: u32 = 64 << 10;
/// How many stopped readers a budget holds at the least.
const STREAMS_WITHIN: u64 = 32;

#[derive(Debug)]
struct Entry {
    since: Instant,
    evict: Arc<Notify>,
}

#[derive(Debug)]
struct Inner {
    limit: u64,
    window: u32,
    /// By order of stopping, so that the first is the one that stopped longest.
    stopped: Mutex<(u64, BTreeMap<u64, Entry>)>,
}

/// The budget of a process. Clones are handles to the same one.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Inner>);

impl Budget {
    /// A budget of that many bytes; the stream window follows from it.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        let window = u32::try_from(limit / STREAMS_WITHIN).unwrap_or(MAX_WINDOW);
        let window = window.clamp(MIN_WINDOW, MAX_WINDOW);
        Self(Arc::new(Inner {
            limit,
            window,
            stopped: Mutex::default(),
        }))
    }

    /// Receive window of each stream, bytes.
    #[must_use]
    pub fn stream_window(&self) -> u32 {
        self.0.window
    }

    /// Bytes that stopped streams may hold now.
    #[must_use]
    pub fn held(&self) -> u64 {
        let count = self.0.stopped.lock().1.len();
        u64::from(self.0.window) * u64::try_from(count).unwrap_or(u64::MAX)
    }

    /// Counts a stream as stopped for as long as the guard lives.
    #[must_use]
    pub fn stopped(&self) -> Stopped {
        let evict = Arc::new(Notify::new());
        let now = Instant::now();
        let mut stopped = self.0.stopped.lock();
        let id = stopped.0;
        stopped.0 += 1;
        stopped.1.insert(
            id,
            Entry {
                since: now,
                evict: Arc::clone(&evict),
            },
        );
        let over = stopped.1.len() as u64 * u64::from(self.0.window) > self.0.limit;
        if over
            && let Some(longest) = stopped.1.first_entry()
            && now.duration_since(longest.get().since) >= GRACE
        {
            longest.remove().evict.notify_one();
        }
        drop(stopped);
        Stopped {
            budget: self.clone(),
            id,
            evict,
        }
    }
}

/// A stopped stream.
#[derive(Debug)]
pub struct Stopped {
    budget: Budget,
    id: u64,
    evict: Arc<Notify>,
}

impl Stopped {
    /// Waits until the budget wants this stream's memory back.
    pub async fn evicted(&self) {
        self.evict.notified().await;
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.budget.0.stopped.lock().1.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_derive_from_the_budget() {
        for (limit, window) in [
            (256 << 20, 1 << 20),
            (20 << 20, 640 << 10),
            (1 << 20, 64 << 10),
        ] {
            assert_eq!(Budget::new(limit).stream_window(), window);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn over_budget_the_one_that_stopped_longest_goes() {
        let budget = Budget::new(2 << 20);
        let window = u64::from(budget.stream_window());
        let mut all = Vec::new();
        for _ in 0..32 {
            all.push(budget.stopped());
            tokio::time::advance(GRACE).await;
        }
        assert_eq!(budget.held(), 32 * window);
        let late = budget.stopped();
        all[0].evicted().await;
        assert_eq!(budget.held(), 32 * window);
        assert!(futures_pending(all[1].evicted()).await && futures_pending(late.evicted()).await);
        drop(all);
        drop(late);
        assert_eq!(budget.held(), 0);
    }

    async fn futures_pending(future: impl Future<Output = ()>) -> bool {
        tokio::time::timeout(Duration::from_millis(1), future)
            .await
            .is_err()
    }
}
