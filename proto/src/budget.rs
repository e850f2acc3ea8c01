//! One bound for the memory that unread bytes cost a process (docs/protocol.md section 5).
//!
//! A stream whose reader keeps up holds next to nothing; one whose reader stopped holds at most its window, and what the
//! kernel keeps of its local connection where that is ours to say. So only readers that are behind are counted, each at
//! the most it can hold, and over the limit the one that has taken nothing for longest is reset.

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
/// How many stopped readers a budget holds, were there nothing but their windows.
const STREAMS_WITHIN: u64 = 32;
/// Unacknowledged bytes above this gain nothing on a 100 Mbit/s line of 300 ms.
pub(crate) const MAX_SEND_WINDOW: u32 = 4 << 20;
/// And below this even an ordinary line is slow.
const MIN_SEND_WINDOW: u32 = 1 << 20;
/// Larger read buffers only cost cache (docs/performance.md), smaller ones cost calls.
const READ_BUFFERS: (u32, u32) = (8 << 10, 64 << 10);
/// What the kernel keeps of a connection whose other end is near gains nothing above this, and slows it below that.
const SOCKET_BUFFERS: (u32, u32) = (32 << 10, 256 << 10);

#[derive(Debug)]
struct Entry {
    since: Instant,
    cost: u64,
    evict: Arc<Notify>,
}

/// Readers that are behind.
#[derive(Debug, Default)]
struct Behind {
    next: u64,
    /// What all of them may hold.
    held: u64,
    /// By order of stopping, so that the first is the one that stopped longest.
    entries: BTreeMap<u64, Entry>,
}

impl Behind {
    fn add(&mut self, cost: u64, evict: &Arc<Notify>) -> u64 {
        let id = self.next;
        self.next += 1;
        self.held += cost;
        let entry = Entry {
            since: Instant::now(),
            cost,
            evict: Arc::clone(evict),
        };
        self.entries.insert(id, entry);
        id
    }

    /// Whether it was still there: one that was chosen to be reset is not.
    fn remove(&mut self, id: u64) -> bool {
        let gone = self.entries.remove(&id);
        self.held -= gone.as_ref().map_or(0, |entry| entry.cost);
        gone.is_some()
    }
}

#[derive(Debug)]
struct Inner {
    limit: u64,
    window: u32,
    behind: Mutex<Behind>,
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
            behind: Mutex::default(),
        }))
    }

    /// Receive window of each stream, bytes.
    #[must_use]
    pub fn stream_window(&self) -> u32 {
        self.0.window
    }

    /// Unacknowledged bytes of a session, and the kernel's buffer of its socket.
    #[must_use]
    pub fn send_window(&self) -> u32 {
        let window = u32::try_from(self.0.limit / 4).unwrap_or(u32::MAX);
        window.clamp(MIN_SEND_WINDOW, MAX_SEND_WINDOW)
    }

    /// What is asked of the kernel for a local connection each way, where memory is bounded. Left to itself it takes
    /// megabytes for each that is not read.
    #[must_use]
    pub fn socket_buffer(&self) -> u32 {
        (self.0.window / 4).clamp(SOCKET_BUFFERS.0, SOCKET_BUFFERS.1)
    }

    /// What is read at once of a local connection, and kept while the tunnel does not take it.
    #[must_use]
    pub fn read_buffer(&self) -> usize {
        let bytes = (self.0.window / 8).clamp(READ_BUFFERS.0, READ_BUFFERS.1);
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    /// Bytes that stopped streams may hold now.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.0.behind.lock().held
    }

    /// Counts a stream, which may hold so many bytes, as stopped for as long as the guard lives.
    #[must_use]
    pub fn stopped(&self, cost: u64) -> Stopped {
        let evict = Arc::new(Notify::new());
        let id = self.0.behind.lock().add(cost, &evict);
        self.relieve();
        Stopped {
            budget: self.clone(),
            id,
            cost,
            evict,
        }
    }

    /// Over the limit: those that stopped longest are reset, as many as it takes. A stream that stopped a moment ago
    /// is spared, unless a quarter more than the limit is held.
    fn relieve(&self) {
        let mut behind = self.0.behind.lock();
        while behind.held > self.0.limit {
            let spare = behind.held <= self.0.limit + self.0.limit / 4;
            let Some((id, longest)) = behind.entries.first_key_value() else {
                return;
            };
            if spare && longest.since.elapsed() < GRACE {
                return;
            }
            longest.evict.notify_one();
            let id = *id;
            behind.remove(id);
        }
    }
}

/// A stopped stream.
#[derive(Debug)]
pub struct Stopped {
    budget: Budget,
    id: u64,
    cost: u64,
    evict: Arc<Notify>,
}

impl Stopped {
    /// Its reader took something: it is now the last to have stopped.
    pub fn moved(&mut self) {
        let mut behind = self.budget.0.behind.lock();
        // One that was chosen to be reset stays chosen.
        if behind.remove(self.id) {
            self.id = behind.add(self.cost, &self.evict);
        }
    }

    /// Waits until the budget wants this stream's memory back.
    pub fn evicted(&self) -> impl Future<Output = ()> + Send {
        // Apart, as most streams never wait here and each would have the room for it.
        Box::pin(async {
            loop {
                tokio::select! {
                    () = self.evict.notified() => return,
                    // Nobody else may stop for a long time, and grace is over meanwhile.
                    () = tokio::time::sleep(GRACE) => self.budget.relieve(),
                }
            }
        })
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.budget.0.behind.lock().remove(self.id);
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
            all.push(budget.stopped(window));
            tokio::time::advance(GRACE).await;
        }
        assert_eq!(budget.held(), 32 * window);
        let late = budget.stopped(window);
        all[0].evicted().await;
        assert_eq!(budget.held(), 32 * window);
        assert!(futures_pending(all[1].evicted()).await && futures_pending(late.evicted()).await);
        drop(all);
        drop(late);
        assert_eq!(budget.held(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_costs_more_makes_more_go() {
        let budget = Budget::new(8 << 20);
        let small: Vec<_> = (0..64).map(|_| budget.stopped(128 << 10)).collect();
        assert_eq!(budget.held(), 8 << 20);
        tokio::time::advance(GRACE).await;
        let large = budget.stopped(384 << 10);
        for gone in &small[..3] {
            gone.evicted().await;
        }
        assert!(futures_pending(small[3].evicted()).await);
        assert_eq!(budget.held(), 8 << 20);
        drop((small, large));
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn what_else_costs_memory_derives_from_the_budget_too() {
        for (limit, send, socket, read) in [
            (256 << 20, 4 << 20, 256 << 10, 64 << 10),
            (20 << 20, 4 << 20, 160 << 10, 64 << 10),
            (8 << 20, 2 << 20, 64 << 10, 32 << 10),
            (1 << 20, 1 << 20, 32 << 10, 8 << 10),
        ] {
            let budget = Budget::new(limit);
            assert_eq!(
                (
                    budget.send_window(),
                    budget.socket_buffer(),
                    budget.read_buffer()
                ),
                (send, socket, read)
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn many_that_stop_at_once_are_brought_within_the_limit() {
        let budget = Budget::new(2 << 20);
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..1000 {
            let stopped = budget.stopped(budget.stream_window().into());
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
