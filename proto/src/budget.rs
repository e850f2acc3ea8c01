//! One bound for the memory that unread bytes cost a process (docs/protocol.md section 5).
//!
//! A stream whose reader keeps up holds next to nothing; one whose reader stopped holds at most its window, and what the
//! kernel keeps of its local connection where that is ours to say. So only readers that are behind are counted, each at
//! the most it can hold, and over the limit the one that has taken nothing for longest is reset.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
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
/// First read buffer of a stream, as most streams move little, and every one's while many wait.
pub(crate) const SMALL_READ: usize = 4 << 10;
/// Part of the budget that read bytes may be while the tunnel does not take them, before reads are small.
const WAITING_PART: u64 = 8;
/// What the kernel keeps of a connection whose other end is near gains nothing above this, and slows it below that.
const SOCKET_BUFFERS: (u32, u32) = (32 << 10, 256 << 10);
/// And below this each byte costs half as much CPU again.
const LEAST_SOCKET_BUFFER: u32 = 16 << 10;
/// Local connections whose buffers are large: each way a quarter of the budget for all of them.
const ROOMS: usize = 16;

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
    /// Bytes that were read of local connections and that the tunnel does not take yet.
    waiting: AtomicU64,
    rooms: Arc<Semaphore>,
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
            waiting: AtomicU64::new(0),
            rooms: Arc::new(Semaphore::new(ROOMS)),
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

    /// What to ask of the kernel for a local connection, where memory is bounded; left to itself it takes megabytes for each
    /// that is not read. Much for a few, little beside them: a connection whose reader behind the tunnel has stopped stays
    /// full, and none is reset for that, as nobody can tell it from one that waits for its turn.
    #[must_use]
    pub fn socket_buffer(&self) -> SocketBuffer {
        let most = (self.0.window / 4).clamp(SOCKET_BUFFERS.0, SOCKET_BUFFERS.1);
        match Arc::clone(&self.0.rooms).try_acquire_owned() {
            Ok(room) => SocketBuffer {
                bytes: most,
                _room: Some(room),
            },
            Err(_none_left) => SocketBuffer {
                bytes: (most / 3).max(LEAST_SOCKET_BUFFER),
                _room: None,
            },
        }
    }

    /// The most to read at once of a local connection, and to keep while the tunnel does not take it: little once many
    /// streams wait for that, whose readers have stopped or whose line is slow; which of both, nobody can tell here.
    #[must_use]
    pub fn read_buffer(&self) -> usize {
        if self.0.waiting.load(Ordering::Relaxed) >= self.0.limit / WAITING_PART {
            return SMALL_READ;
        }
        let bytes = (self.0.window / 8).clamp(READ_BUFFERS.0, READ_BUFFERS.1);
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    /// Counts bytes that were read and that the tunnel does not take, for as long as the guard lives.
    #[must_use]
    pub fn waiting(&self, bytes: usize) -> Waiting<'_> {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let waiting = &self.0.waiting;
        waiting.fetch_add(bytes, Ordering::Relaxed);
        Waiting { waiting, bytes }
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

/// How much the kernel may keep of a local connection; to be held as long as the connection.
#[derive(Debug)]
pub struct SocketBuffer {
    bytes: u32,
    _room: Option<OwnedSemaphorePermit>,
}

impl SocketBuffer {
    /// What to ask of it for each way.
    #[must_use]
    pub fn bytes(&self) -> u32 {
        self.bytes
    }

    /// What it then keeps each way at most: twice of that (socket(7)).
    #[must_use]
    pub fn cost(&self) -> u32 {
        self.bytes.saturating_mul(2)
    }
}

/// Bytes that wait for the tunnel.
#[derive(Debug)]
pub struct Waiting<'a> {
    waiting: &'a AtomicU64,
    bytes: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.waiting.fetch_sub(self.bytes, Ordering::Relaxed);
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
mod tests;
