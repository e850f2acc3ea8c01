//! One bound for the memory that unread bytes cost a process (docs/protocol.md section 5).
//!
//! A stream whose reader keeps up holds next to nothing; one whose reader stopped holds at most its window. So only
//! readers that are behind are counted, each at a whole window, and over the limit the one that has taken nothing for
//! longest is reset.

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
        let mut stopped = self.0.stopped.lock();
        let id = stopped.0;
        stopped.0 += 1;
        let entry = Entry {
            since: Instant::now(),
            evict: Arc::clone(&evict),
        };
        stopped.1.insert(id, entry);
        drop(stopped);
        self.relieve();
        Stopped {
            budget: self.clone(),
            id,
            evict,
        }
    }

    /// Over the limit: those that stopped longest are reset, as many as it takes. A stream that stopped a moment ago
    /// is spared, unless twice the limit is held.
    fn relieve(&self) {
        let window = u64::from(self.0.window);
        let mut stopped = self.0.stopped.lock();
        loop {
            let held = stopped.1.len() as u64 * window;
            let Some(longest) = stopped.1.first_entry() else {
                return;
            };
            let spared = longest.get().since.elapsed() < GRACE && held <= 2 * self.0.limit;
            if held <= self.0.limit || spared {
                return;
            }
            longest.remove().evict.notify_one();
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
    /// Its reader took something: it is now the last to have stopped.
    pub fn moved(&mut self) {
        let mut stopped = self.budget.0.stopped.lock();
        let id = stopped.0;
        // One that was chosen to be reset stays chosen.
        if stopped.1.remove(&self.id).is_some() {
            stopped.0 += 1;
            let entry = Entry {
                since: Instant::now(),
                evict: Arc::clone(&self.evict),
            };
            stopped.1.insert(id, entry);
            self.id = id;
        }
    }

    /// Waits until the budget wants this stream's memory back.
    pub async fn evicted(&self) {
        loop {
            tokio::select! {
                () = self.evict.notified() => return,
                // Nobody else may stop for a long time, and grace is over meanwhile.
                () = tokio::time::sleep(GRACE) => self.budget.relieve(),
            }
        }
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

    #[tokio::test(start_paused = true)]
    async fn many_that_stop_at_once_are_brought_within_the_limit() {
        let budget = Budget::new(2 << 20);
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..1000 {
            let stopped = budget.stopped();
            assert!(budget.held() <= 2 * (2 << 20));
            tasks.spawn(async move { stopped.evicted().await });
        }
        tokio::time::sleep(GRACE * 3).await;
        assert!(budget.held() <= 2 << 20, "{}", budget.held());
    }

    async fn futures_pending(future: impl Future<Output = ()>) -> bool {
        tokio::time::timeout(Duration::from_millis(1), future)
            .await
            .is_err()
    }
}
