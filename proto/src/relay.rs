//! Moves bytes between a tunnel stream and a local connection, the same function at both ends of the tunnel, or between
//! two tunnel streams ([`relay_streams`]); the only place that copies bytes.
//!
//! * Chunks go from quinn to the socket without a copy of ours (vectored), and from the socket into a buffer that is
//!   handed over whole. No queue in between: back-pressure is the transport's and the socket's own.
//! * End of file travels as FIN, each way alone. Anything else resets the stream with a [`Reason`]; the caller then
//!   makes the local connection end abnormally too.
//! * One way closed and silence on the other for `half_open` is [`Reason::HalfOpenIdle`].

mod streams;

use std::future::{pending, poll_fn};
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
pub use streams::relay_streams;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep_until};

use crate::budget::SMALL_READ;
use crate::transport::{READ_CHUNKS, RecvHalf, SendHalf, Session};
use crate::{Budget, Reason, Stopped};

/// For the local side to take what came before its session was lost.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// For the other end to take the last bytes, once both ways are finished.
const FLUSH: Duration = Duration::from_secs(30);

/// What the local connection leads to, for naming its failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Local {
    /// Whoever asked: the relay runs at the server.
    Requester,
    /// What was dialled: the relay runs at the agent.
    Destination,
}

impl Local {
    const fn cut(self) -> Reason {
        match self {
            Self::Requester => Reason::RequesterReset,
            Self::Destination => Reason::DestinationReset,
        }
    }
}

/// Bytes moved, readable while it runs.
#[derive(Debug, Default)]
pub struct Counters {
    /// From the local connection into the tunnel.
    sent: AtomicU64,
    /// Out of the tunnel to the local connection.
    received: AtomicU64,
}

impl Counters {
    /// Bytes from the local connection into the tunnel.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes out of the tunnel to the local connection.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// How to relay.
#[derive(Debug, Clone)]
pub struct Relay {
    /// What the local connection leads to.
    pub local: Local,
    /// Bound of what stopped readers cost.
    pub budget: Budget,
    /// The most that the kernel keeps of what the local connection was given, where that is ours to say and so part of what a
    /// stopped reader costs; else 0.
    pub local_buffer: u32,
    /// Longest silence of the open way once the other is closed.
    pub half_open: Duration,
    /// Filled as bytes move.
    pub counters: Arc<Counters>,
}

/// How a relay ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelayEnd {
    /// Both ways ended with their end of file.
    Finished,
    /// Cut: by whom says the reason.
    Cut(Reason),
}

/// Relays until both ways are finished, one fails, or `stop` says why to end it. `early` is what was already read
/// from the tunnel behind the header, or from the local connection behind the request: it goes to the other side first.
pub async fn relay<S: SendHalf, R: RecvHalf, I: AsyncRead + AsyncWrite + Unpin + Send>(
    settings: &Relay,
    tunnel: (&mut S, &mut R),
    local: &mut I,
    early: Early,
    stop: impl Future<Output = Reason> + Send,
) -> RelayEnd {
    let (send, recv) = tunnel;
    let (mut reader, mut writer) = tokio::io::split(local);
    let ended = {
        let up = pin!(into_tunnel(settings, &mut reader, send, early.from_local));
        let down = pin!(out_of_tunnel(
            settings,
            recv,
            &mut writer,
            early.from_tunnel
        ));
        both(settings, up, down, pin!(stop)).await
    };
    match ended {
        Ok(()) => {
            tokio::time::timeout(FLUSH, send.flushed()).await.ok(); // a peer that takes nothing more has gone
            RelayEnd::Finished
        }
        Err(reason) => {
            send.reset(reason);
            recv.reset(reason);
            RelayEnd::Cut(reason)
        }
    }
}

/// Both ways until each has finished, one has failed, or there is another reason to stop. Pinned by the caller: a future
/// that is handed over takes its memory twice.
async fn both(
    settings: &Relay,
    mut up: Pin<&mut (impl Future<Output = Result<(), Reason>> + Send)>,
    mut down: Pin<&mut (impl Future<Output = Result<(), Reason>> + Send)>,
    mut stop: Pin<&mut (impl Future<Output = Reason> + Send)>,
) -> Result<(), Reason> {
    let (mut up_done, mut down_done) = (false, false);
    loop {
        tokio::select! {
            biased;
            reason = &mut stop => return Err(reason),
            end = &mut up, if !up_done => { end?; up_done = true; }
            end = &mut down, if !down_done => { end?; down_done = true; }
            () = silent(settings, up_done || down_done) => return Err(Reason::HalfOpenIdle),
        }
        if up_done && down_done {
            return Ok(());
        }
    }
}

/// For `stop`: resolves a while after the session is over. A relay that waits for its local side would not notice; what
/// was already received is still handed over meanwhile.
pub async fn session_over(session: &impl Session) -> Reason {
    let error = session.closed().await;
    tokio::time::sleep(LAST_WORDS).await;
    error.reason()
}

/// Bytes that came together with the header or request.
#[derive(Debug, Default)]
pub struct Early {
    /// Behind the request, from the local connection.
    pub from_local: Bytes,
    /// Behind the header, from the tunnel.
    pub from_tunnel: Bytes,
}

/// Resolves when, with one way closed, no byte moved for the whole of `half_open`.
async fn silent(settings: &Relay, half_open: bool) {
    if !half_open {
        return pending().await;
    }
    let moved = || settings.counters.sent() + settings.counters.received();
    loop {
        let before = moved();
        sleep_until(Instant::now() + settings.half_open).await;
        if moved() == before {
            return;
        }
    }
}

async fn into_tunnel<S: SendHalf, I: AsyncRead + Unpin>(
    settings: &Relay,
    from: &mut ReadHalf<&mut I>,
    to: &mut S,
    early: Bytes,
) -> Result<(), Reason> {
    let count = |n: usize| {
        settings
            .counters
            .sent
            .fetch_add(n as u64, Ordering::Relaxed);
    };
    if !early.is_empty() {
        count(early.len());
        to.write_chunk(early)
            .await
            .map_err(|error| error.reason())?;
    }
    let mut capacity = SMALL_READ;
    let mut buffer = BytesMut::new();
    loop {
        // Small reads share what is left of a large buffer, so that a trickle does not pin a fresh one each.
        if buffer.capacity() < SMALL_READ {
            capacity = capacity.min(settings.budget.read_buffer());
            buffer.reserve(capacity);
        }
        let offered = buffer.capacity();
        let read = from
            .read_buf(&mut buffer)
            .await
            .map_err(|_cut| settings.local.cut())?;
        if read == 0 {
            return to.finish().map_err(|error| error.reason());
        }
        capacity = match read {
            full if full == offered => capacity * 2,
            little if little < capacity / 4 => (capacity / 2).max(SMALL_READ),
            _ => capacity,
        };
        count(read);
        let chunk = buffer.split().freeze();
        hand_over(&settings.budget, to, chunk, offered).await?;
    }
}

/// Gives the tunnel a chunk in memory of so many bytes, which counts as waiting once it is not taken at once.
async fn hand_over<S: SendHalf>(
    budget: &Budget,
    to: &mut S,
    chunk: Bytes,
    memory: usize,
) -> Result<(), Reason> {
    let mut write = pin!(to.write_chunk(chunk));
    let wrote = match poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx))).await {
        Poll::Ready(wrote) => wrote,
        Poll::Pending => {
            let _waiting = budget.waiting(memory);
            write.await
        }
    };
    wrote.map_err(|error| error.reason())
}

async fn out_of_tunnel<R: RecvHalf, I: AsyncWrite + Unpin>(
    settings: &Relay,
    from: &mut R,
    to: &mut WriteHalf<&mut I>,
    early: Bytes,
) -> Result<(), Reason> {
    let mut chunks = [const { Bytes::new() }; READ_CHUNKS];
    let mut filled = 0;
    if !early.is_empty()
        && let Some(first) = chunks.first_mut()
    {
        *first = early;
        filled = 1;
    }
    let mut stopped = None;
    loop {
        if filled > 0 {
            let pending = chunks.get_mut(..filled).unwrap_or_default();
            write_out(settings, to, pending, &mut stopped).await?;
        }
        let read = {
            let mut read = pin!(from.read_chunks(&mut chunks));
            match poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx))).await {
                Poll::Ready(read) => read,
                Poll::Pending => {
                    // The reader has caught up: nothing is held for it any more.
                    stopped = None;
                    read.await
                }
            }
        };
        match read.map_err(|error| error.reason())? {
            Some(count) => filled = count,
            None => return to.shutdown().await.map_err(|_cut| settings.local.cut()),
        }
    }
}

/// Writes the chunks out; once it can't, the stream counts as stopped until its reader has caught up.
async fn write_out<I: AsyncWrite + Unpin>(
    settings: &Relay,
    to: &mut I,
    chunks: &mut [Bytes],
    stopped: &mut Option<Stopped>,
) -> Result<(), Reason> {
    let cut = |_error: io::Error| settings.local.cut();
    let mut write = pin!(write_chunks(settings, to, chunks));
    let at_once = poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx))).await;
    let wrote = match at_once {
        Poll::Ready(wrote) => wrote,
        Poll::Pending => {
            let cost = settings.budget.stream_window() + settings.local_buffer;
            let stopped = stopped.get_or_insert_with(|| settings.budget.stopped(cost.into()));
            tokio::select! {
                wrote = &mut write => wrote,
                () = stopped.evicted() => return Err(Reason::SlowReader),
            }
        }
    };
    if let Some(stopped) = stopped {
        stopped.moved();
    }
    wrote.map_err(cut)
}

async fn write_chunks<I: AsyncWrite + Unpin>(
    settings: &Relay,
    to: &mut I,
    chunks: &mut [Bytes],
) -> io::Result<()> {
    let mut rest = chunks;
    loop {
        while rest.first().is_some_and(Bytes::is_empty) {
            rest = rest.get_mut(1..).unwrap_or_default();
        }
        if rest.is_empty() {
            break;
        }
        let mut slices = [IoSlice::new(&[]); READ_CHUNKS];
        for (slice, chunk) in slices.iter_mut().zip(rest.iter()) {
            *slice = IoSlice::new(chunk);
        }
        let used = slices
            .get(..rest.len().min(READ_CHUNKS))
            .unwrap_or_default();
        let mut wrote = poll_fn(|cx| Pin::new(&mut *to).poll_write_vectored(cx, used)).await?;
        if wrote == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        settings
            .counters
            .received
            .fetch_add(wrote as u64, Ordering::Relaxed);
        for chunk in rest.iter_mut() {
            let taken = wrote.min(chunk.len());
            // Freed as soon as it is written: the transport then gives its credit back.
            drop(chunk.split_to(taken));
            wrote -= taken;
            if wrote == 0 {
                break;
            }
        }
    }
    // TLS keeps records back until it is flushed.
    to.flush().await
}
