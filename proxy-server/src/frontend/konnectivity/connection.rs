//! One dialled connection within a call: DATA packets on one side, an `AsyncRead` and `AsyncWrite` for the relay on the
//! other.
//!
//! Towards the destination there is a queue of its own, at most [`QUEUE`] bytes and one packet. Towards the requester
//! there is none: what the relay writes becomes a DATA packet in the call's channel, which all connections of the call
//! share, in order. Whoever takes the connection out of the call's table says CLOSE_RSP, nobody else, and after it no
//! DATA is sent: both are decided under one lock.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use parking_lot::Mutex;
use proto::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, PollSender};

use super::packet;
use super::pb::Packet;
use super::table::Table;

/// Bytes that wait for the destination, beside those in the tunnel. What one read of the relay takes at most.
const QUEUE: usize = 64 << 10;
/// Largest DATA packet. The konnectivity client keeps ten of them for a reader that has stopped, before it gives up: the
/// larger, the more a paused `kubectl logs -f` may miss without harm. A frame of the tunnel is no larger.
const LARGEST: usize = 64 << 10;
/// For a destination to take what is queued for it and to say its last, once the requester has closed: the requester has
/// what it wants and waits for nothing.
const LINGER: Duration = Duration::from_secs(30);

/// What the call and the relay share of a connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) id: i64,
    /// The requester's name for the dial: it may still close it by that.
    pub(super) random: i64,
    state: Mutex<State>,
    cut: watch::Sender<Option<Reason>>,
    over: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Bytes>,
    queued: usize,
    /// CLOSE_RSP is said or about to be: no more DATA either way. What is queued still goes out.
    closed: bool,
    reader: Option<Waker>,
    filler: Option<Waker>,
}

impl State {
    fn wake(&mut self) {
        for waker in [self.reader.take(), self.filler.take()]
            .into_iter()
            .flatten()
        {
            waker.wake();
        }
    }
}

impl Connection {
    pub(super) fn new(id: i64, random: i64) -> Arc<Self> {
        Arc::new(Self {
            id,
            random,
            state: Mutex::default(),
            cut: watch::Sender::new(None),
            over: CancellationToken::new(),
        })
    }

    /// Resolves when there is room for a packet, or when none is wanted any more.
    pub(super) async fn room(&self) {
        poll_fn(|cx| {
            let mut state = self.state.lock();
            if state.closed || state.queued < QUEUE {
                return Poll::Ready(());
            }
            state.filler = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Queues a packet for the destination; to be called when there is room. What comes after the end is dropped.
    pub(super) fn push(&self, data: Bytes) {
        let mut state = self.state.lock();
        if state.closed || data.is_empty() {
            return;
        }
        // A small packet would keep the whole buffer that it was received in.
        let data = if data.len() < LARGEST / 16 {
            Bytes::copy_from_slice(&data)
        } else {
            data
        };
        state.queued += data.len();
        state.queue.push_back(data);
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }

    /// No DATA after this: the destination gets what is queued and an end of file, and what it sends is dropped.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        self.shut(&mut state);
    }

    fn shut(&self, state: &mut State) {
        state.closed = true;
        state.wake();
        self.over.cancel();
    }

    /// Ends the relay with a reset.
    pub(super) fn cut(&self, reason: Reason) {
        self.cut.send_replace(Some(reason));
        self.close();
    }

    /// Resolves when the relay has to end: cut, or closed for a while.
    pub(super) async fn must_end(&self) -> Reason {
        let mut cut = self.cut.subscribe();
        let closed = async {
            self.over.cancelled().await;
            sleep(LINGER).await;
        };
        tokio::select! {
            biased;
            reason = cut.wait_for(Option::is_some) => reason.ok().and_then(|r| *r).unwrap_or(Reason::Internal),
            () = closed => Reason::Cancelled,
        }
    }
}

/// The relay's side of a connection. Dropped before its end was said, after a panic, it says so if it can.
pub(super) struct ConnectionIo {
    connection: Arc<Connection>,
    table: Arc<Table>,
    packets: PollSender<Option<Packet>>,
}

impl ConnectionIo {
    pub(super) fn new(
        connection: &Arc<Connection>,
        table: &Arc<Table>,
        packets: &mpsc::Sender<Option<Packet>>,
    ) -> Self {
        Self {
            connection: Arc::clone(connection),
            table: Arc::clone(table),
            packets: PollSender::new(packets.clone()),
        }
    }

    /// Sends what `make` makes of the state, once there is room for a packet; nothing after the end.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        make: impl FnOnce(&Self, &mut State) -> Option<Packet>,
    ) -> Poll<io::Result<()>> {
        if self.connection.state.lock().closed {
            // The call may end: this was not the last to hold its channel.
            self.packets.close();
            return Poll::Ready(Ok(()));
        }
        let gone = |_closed| io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.packets.poll_reserve(cx)).map_err(gone)?;
        let connection = Arc::clone(&self.connection);
        let mut state = connection.state.lock();
        let packet = if state.closed {
            None
        } else {
            make(self, &mut state)
        };
        match packet {
            Some(packet) => self.packets.send_item(Some(packet)).map_err(gone)?,
            None => {
                self.packets.abort_send();
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for ConnectionIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.connection.state.lock();
        if state.queue.is_empty() {
            if state.closed {
                return Poll::Ready(Ok(()));
            }
            state.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        while buffer.remaining() > 0
            && let Some(first) = state.queue.front_mut()
        {
            let some = first.len().min(buffer.remaining());
            buffer.put_slice(first.get(..some).unwrap_or_default());
            first.advance(some);
            let empty = first.is_empty();
            state.queued -= some;
            if empty {
                state.queue.pop_front();
            }
        }
        if state.queued < QUEUE
            && let Some(filler) = state.filler.take()
        {
            filler.wake();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ConnectionIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let wanted = slices.iter().map(|slice| slice.len()).sum::<usize>();
        let length = wanted.min(LARGEST);
        if length == 0 {
            return Poll::Ready(Ok(0));
        }
        let id = this.connection.id;
        let data = |_: &Self, _: &mut State| Some(packet::data(id, gather(slices, length)));
        ready!(this.poll_send(cx, data))?;
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// The destination's end of file. The protocol knows no half: it is the end both ways, behind the last DATA.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let end = |this: &Self, state: &mut State| {
            // Whoever took it out of the table is about to say it.
            let connection = this.table.remove(this.connection.id)?;
            connection.shut(state);
            Some(packet::close_response(connection.id, ""))
        };
        ready!(this.poll_send(cx, end))?;
        this.packets.close();
        Poll::Ready(Ok(()))
    }
}

impl Drop for ConnectionIo {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        if let Some(connection) = self.table.remove(self.connection.id) {
            connection.close();
            if let Some(packets) = self.packets.get_ref() {
                let said = packet::close_response(connection.id, Reason::Internal.sentence());
                // Full: the requester reads nothing, and finds out when it gives up.
                packets.try_send(Some(said)).ok();
            }
        }
    }
}

/// The first `length` bytes of the slices.
fn gather(slices: &[IoSlice<'_>], length: usize) -> Bytes {
    let mut data = BytesMut::with_capacity(length);
    for slice in slices {
        let some = slice.len().min(length - data.len());
        data.extend_from_slice(slice.get(..some).unwrap_or_default());
    }
    data.freeze()
}
