//! What is under way on a line: it is handed out when it is due, whatever the order in which it came.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// A queue of bounded length.
pub(super) struct Late<T> {
    most: usize,
    queue: Mutex<Queue<T>>,
    more: Notify,
}

struct Queue<T> {
    heap: BinaryHeap<Reverse<Item<T>>>,
    count: u64,
}

/// Ordered by the time of its arrival; equal times in the order of departure.
struct Item<T> {
    due: (Instant, u64),
    what: T,
}

impl<T> Late<T> {
    pub(super) fn new(most: usize) -> Self {
        let (heap, count) = (BinaryHeap::new(), 0);
        Self {
            most,
            queue: Mutex::new(Queue { heap, count }),
            more: Notify::new(),
        }
    }

    /// Puts something on its way; `false` when the queue is full, and it is lost.
    pub(super) fn add(&self, delay: Duration, what: T) -> bool {
        let mut queue = self.queue.lock();
        if queue.heap.len() == self.most {
            return false;
        }
        queue.count += 1;
        let due = (Instant::now() + delay, queue.count);
        queue.heap.push(Reverse(Item { due, what }));
        self.more.notify_one();
        true
    }

    /// Waits for what is due next. Cancel-safe; for one caller at a time.
    pub(super) async fn next(&self) -> T {
        loop {
            let next = match self.due() {
                Ok(what) => return what,
                Err(next) => next,
            };
            match next {
                None => self.more.notified().await,
                Some(next) => {
                    // Something that came later may be due before.
                    tokio::select! {
                        () = sleep_until(next) => {}
                        () = self.more.notified() => {}
                    }
                }
            }
        }
    }

    /// What is due, or when something will be.
    fn due(&self) -> Result<T, Option<Instant>> {
        let mut queue = self.queue.lock();
        let first = queue.heap.peek().ok_or(None)?.0.due.0;
        if first > Instant::now() {
            return Err(Some(first));
        }
        let first = queue.heap.pop().ok_or(None)?;
        Ok(first.0.what)
    }
}

impl<T> PartialEq for Item<T> {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl<T> Eq for Item<T> {}

impl<T> PartialOrd for Item<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Item<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.due.cmp(&other.due)
    }
}
