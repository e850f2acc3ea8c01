//! A transport within the process, for tests: the same rules as QUIC, no sockets, works with paused time.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};

use crate::Reason;
use crate::transport::stream::Release;
use crate::transport::{
    Half, RecvHalf, SendHalf, Session, SessionError, SessionStats, Shared, StreamError,
};

/// One direction of a stream: at most `window` unread bytes.
#[derive(Debug)]
struct Pipe {
    state: Mutex<PipeState>,
    /// Woken when there is something to read.
    readable: Notify,
    /// Woken when there is room.
    writable: Notify,
    window: usize,
}

#[derive(Debug, Default)]
struct PipeState {
    chunks: VecDeque<Bytes>,
    bytes: usize,
    finished: bool,
}

impl Pipe {
    fn new(window: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            readable: Notify::new(),
            writable: Notify::new(),
            window,
        })
    }
}

/// The session's end, once it is known: how each side sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Open,
    /// By side 0 or 1, with a reason.
    Closed(u8, Reason),
    /// As if the line had been cut for the idle time-out.
    Cut,
}

type NewStream = (MemorySend, MemoryRecv);

#[derive(Debug)]
struct Core {
    side: u8,
    end: watch::Sender<End>,
    peer: mpsc::Sender<NewStream>,
    incoming: tokio::sync::Mutex<mpsc::Receiver<NewStream>>,
    /// Streams the peer still lets this side open.
    permits: Arc<Semaphore>,
    window: usize,
    sent: AtomicU64,
}

/// One side of an in-memory session.
#[derive(Debug, Clone)]
pub struct MemorySession(Arc<Core>);

/// Two sides of a session; each stream holds at most `window` unread bytes a direction and each side lets the
/// other open `max_streams`.
#[must_use]
pub fn pair(window: usize, max_streams: usize) -> (MemorySession, MemorySession) {
    let (end, _) = watch::channel(End::Open);
    let (to_one, at_one) = mpsc::channel(max_streams.max(1));
    let (to_zero, at_zero) = mpsc::channel(max_streams.max(1));
    let side = |side, peer, incoming| {
        MemorySession(Arc::new(Core {
            side,
            end: end.clone(),
            peer,
            incoming: tokio::sync::Mutex::new(incoming),
            permits: Arc::new(Semaphore::new(max_streams)),
            window,
            sent: AtomicU64::new(0),
        }))
    };
    (side(0, to_one, at_zero), side(1, to_zero, at_one))
}

fn seen_from(side: u8, end: &End) -> Option<SessionError> {
    match end {
        End::Open => None,
        End::Closed(by, reason) if *by == side => Some(SessionError::Local(*reason)),
        End::Closed(_, reason) => Some(SessionError::Peer(*reason)),
        End::Cut => Some(SessionError::Silent),
    }
}

impl MemorySession {
    /// Ends the session as a dead line does.
    pub fn cut(&self) {
        self.0.end.send_replace(End::Cut);
    }

    fn ended(&self) -> Option<SessionError> {
        seen_from(self.0.side, &self.0.end.borrow())
    }

    async fn until_ended(&self) -> SessionError {
        until_ended(self.0.side, self.0.end.subscribe()).await
    }
}

async fn until_ended(side: u8, mut end: watch::Receiver<End>) -> SessionError {
    let seen = end
        .wait_for(|end| *end != End::Open)
        .await
        .map(|end| end.clone());
    seen.ok()
        .and_then(|end| seen_from(side, &end))
        .unwrap_or(SessionError::Silent)
}

impl Session for MemorySession {
    type Send = MemorySend;
    type Recv = MemoryRecv;

    async fn open(&self) -> Result<NewStream, SessionError> {
        let core = &self.0;
        let permit = tokio::select! {
            biased;
            error = self.until_ended() => return Err(error),
            permit = Arc::clone(&core.permits).acquire_owned() => permit,
        };
        let permit = permit.map_err(|_closed| SessionError::Silent)?;
        let (out, back) = (Pipe::new(core.window), Pipe::new(core.window));
        // Either end may reset the stream for both, so the four halves share one state.
        let shared = Shared::new(Some(Box::new(Permit { _permit: permit })));
        let theirs = Shared::new(None);
        let halves =
            |side, out: &Arc<Pipe>, back: &Arc<Pipe>, own: &Arc<Shared>, other: &Arc<Shared>| {
                let link = |pipe: &Arc<Pipe>| Link {
                    side,
                    end: core.end.subscribe(),
                    pipe: Arc::clone(pipe),
                    own: Arc::clone(own),
                    other: Arc::clone(other),
                    finished: false,
                };
                (MemorySend(link(out)), MemoryRecv(link(back)))
            };
        let ours = halves(core.side, &out, &back, &shared, &theirs);
        let peers = halves(1 - core.side, &back, &out, &theirs, &shared);
        core.sent.fetch_add(1, Ordering::Relaxed);
        core.peer
            .send(peers)
            .await
            .map_err(|_gone| SessionError::Silent)?;
        Ok(ours)
    }

    async fn accept(&self) -> Result<NewStream, SessionError> {
        let mut incoming = self.0.incoming.lock().await;
        tokio::select! {
            biased;
            error = self.until_ended() => Err(error),
            stream = incoming.recv() => stream.ok_or(SessionError::Silent),
        }
    }

    fn close(&self, reason: Reason) {
        if self.ended().is_none() {
            self.0.end.send_replace(End::Closed(self.0.side, reason));
        }
    }

    async fn closed(&self) -> SessionError {
        self.until_ended().await
    }

    fn nudge(&self) {}

    fn remote_address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, u16::from(self.0.side) + 1))
    }

    fn stats(&self) -> SessionStats {
        SessionStats {
            sent: self.0.sent.load(Ordering::Relaxed),
            ..SessionStats::default()
        }
    }

    fn answered(&self) -> Option<tokio::time::Instant> {
        None
    }
}

#[derive(Debug)]
struct Permit {
    _permit: OwnedSemaphorePermit,
}

impl Release for Permit {}

/// What a half needs: its pipe, and the resets of both ends.
#[derive(Debug)]
struct Link {
    side: u8,
    end: watch::Receiver<End>,
    pipe: Arc<Pipe>,
    own: Arc<Shared>,
    other: Arc<Shared>,
    finished: bool,
}

impl Link {
    fn reset(&mut self, reason: Reason) {
        let first = self.own.reset(reason);
        self.other.reset(first);
        self.finished = true;
    }

    async fn over(&self, half: Half) -> StreamError {
        tokio::select! {
            biased;
            reason = self.own.until_reset(half) => StreamError::Reset(reason),
            error = until_ended(self.side, self.end.clone()) => StreamError::Session(error),
        }
    }

    fn is_whole(&self) -> bool {
        *self.end.borrow() == End::Open
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if !self.finished && self.is_whole() {
            self.reset(Reason::Cancelled);
        }
    }
}

/// Sending half.
#[derive(Debug)]
pub struct MemorySend(Link);

/// Receiving half.
#[derive(Debug)]
pub struct MemoryRecv(Link);

impl SendHalf for MemorySend {
    async fn write_chunk(&mut self, mut chunk: Bytes) -> Result<(), StreamError> {
        let link = &self.0;
        while !chunk.is_empty() {
            let room = {
                let mut state = link.pipe.state.lock();
                let room = link
                    .pipe
                    .window
                    .saturating_sub(state.bytes)
                    .min(chunk.len());
                if room > 0 && link.own.reason().is_none() {
                    state.bytes += room;
                    state.chunks.push_back(chunk.split_to(room));
                }
                room
            };
            if room > 0 {
                link.pipe.readable.notify_one();
            }
            if let Some(reason) = link.own.reason() {
                return Err(StreamError::Reset(reason));
            }
            if !link.is_whole() {
                return Err(link.over(Half::Send).await);
            }
            if room == 0 {
                tokio::select! {
                    biased;
                    error = link.over(Half::Send) => return Err(error),
                    () = link.pipe.writable.notified() => {}
                }
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), StreamError> {
        if let Some(reason) = self.0.own.reason() {
            return Err(StreamError::Reset(reason));
        }
        self.0.pipe.state.lock().finished = true;
        self.0.pipe.readable.notify_one();
        self.0.finished = true;
        Ok(())
    }

    async fn flushed(&mut self) {}

    fn reset(&mut self, reason: Reason) {
        self.0.reset(reason);
    }

    fn prioritise(&mut self) {}
}

impl RecvHalf for MemoryRecv {
    async fn read_chunks(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, StreamError> {
        let link = &mut self.0;
        loop {
            if let Some(reason) = link.own.reason() {
                return Err(StreamError::Reset(reason));
            }
            {
                let mut state = link.pipe.state.lock();
                let mut count = 0;
                for slot in chunks.iter_mut() {
                    let Some(chunk) = state.chunks.pop_front() else {
                        break;
                    };
                    state.bytes -= chunk.len();
                    *slot = chunk;
                    count += 1;
                }
                if count > 0 {
                    link.pipe.writable.notify_one();
                    return Ok(Some(count));
                }
                if state.finished {
                    link.finished = true;
                    return Ok(None);
                }
            }
            tokio::select! {
                biased;
                error = link.over(Half::Recv) => return Err(error),
                () = link.pipe.readable.notified() => {}
            }
        }
    }

    fn reset(&mut self, reason: Reason) {
        self.0.reset(reason);
    }
}
