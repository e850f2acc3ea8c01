//! The seam between the tunnel and what carries it: [`Session`], [`SendHalf`], [`RecvHalf`].
//!
//! Rules that every transport keeps, and that `tests/conformance` holds each of them to:
//! * bytes of a stream arrive in order and unchanged; each half closes on its own by FIN ([`SendHalf::finish`]);
//! * a reset is of the whole stream, both ways, and carries a [`Reason`];
//! * a half dropped before its end is a reset with [`Reason::Cancelled`]: a crash must not look like a clean end;
//! * a stopped reader holds back its own stream only, and costs at most one stream window of memory;
//! * a lost session ends every stream of it with [`StreamError::Session`].

use std::fmt::Debug;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::Reason;

pub mod keepalive;
#[cfg(any(test, feature = "test-util"))]
pub mod memory;
pub mod quic;
mod stream;
pub mod tcp;

pub(crate) use stream::{Half, Shared};

/// Most chunks that one read takes: 64 datagrams of about 1.4 KiB, for one vectored write.
pub const READ_CHUNKS: usize = 64;

/// Why a session is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// This end closed it.
    #[error("closed by this end: {0}")]
    Local(Reason),
    /// The other end closed it.
    #[error("closed by the other end: {0}")]
    Peer(Reason),
    /// Nothing was heard for the idle time-out.
    #[error("nothing heard for the idle time-out")]
    Silent,
    /// TLS refused, at either end.
    #[error("TLS alert {alert}: {text}")]
    Tls {
        /// Its number (RFC 8446 section 6).
        alert: u8,
        /// The transport's words.
        text: String,
    },
    /// The transport failed; its words.
    #[error("transport: {0}")]
    Transport(String),
}

impl SessionError {
    /// The reason to report for what was lost with the session.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Local(reason) | Self::Peer(reason) => *reason,
            Self::Silent | Self::Transport(_) => Reason::SessionLost,
            Self::Tls { .. } => Reason::Tls,
        }
    }
}

/// Why a stream is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// Reset, by either end.
    #[error("stream reset: {0}")]
    Reset(Reason),
    /// Its session is over.
    #[error("the stream's session is over")]
    Session(#[source] SessionError),
}

impl StreamError {
    /// The reason to report.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Reset(reason) => *reason,
            Self::Session(error) => error.reason(),
        }
    }
}

/// What a transport knows of a session.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionStats {
    /// Round trip, smoothed.
    pub rtt: Duration,
    /// Bytes sent on the wire.
    pub sent: u64,
    /// Bytes received on the wire.
    pub received: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets sent that were found lost.
    pub lost_packets: u64,
    /// Largest datagram the path takes; 0 where the transport has none.
    pub mtu: u16,
}

/// One authenticated connection between an agent and a server. Clones are handles to the same one.
pub trait Session: Clone + Debug + Send + Sync + 'static {
    /// The sending half of its streams.
    type Send: SendHalf;
    /// The receiving half of its streams.
    type Recv: RecvHalf;

    /// Opens a stream towards the peer; waits while the peer's stream limit is reached.
    fn open(&self) -> impl Future<Output = Result<(Self::Send, Self::Recv), SessionError>> + Send;

    /// Takes the next stream that the peer opened. Cancel-safe.
    fn accept(&self)
    -> impl Future<Output = Result<(Self::Send, Self::Recv), SessionError>> + Send;

    /// Ends the session and all its streams at once.
    fn close(&self, reason: Reason);

    /// Waits for the end. Cancel-safe.
    fn closed(&self) -> impl Future<Output = SessionError> + Send;

    /// Makes the transport look for a way that works now, in place of waiting out its time-outs. A no-op where
    /// the transport can't.
    fn nudge(&self);

    /// Where the peer is.
    fn remote_address(&self) -> SocketAddr;

    /// Its figures now.
    fn stats(&self) -> SessionStats;

    /// When the newest packet was sent that the peer has acknowledged: until then both directions have worked. `None`
    /// before the first, and where the transport does not know.
    fn answered(&self) -> Option<Instant>;
}

/// Where bytes go. Dropped unfinished it resets the stream.
pub trait SendHalf: Debug + Send + 'static {
    /// Sends the chunk; waits for credit. Cancelled midway, a part may have been sent.
    ///
    /// # Errors
    /// When the stream or session is over.
    fn write_chunk(&mut self, chunk: Bytes)
    -> impl Future<Output = Result<(), StreamError>> + Send;

    /// Ends this way with a FIN behind what was written.
    ///
    /// # Errors
    /// When the stream or session is over.
    fn finish(&mut self) -> Result<(), StreamError>;

    /// After [`SendHalf::finish`]: waits until the other end has taken everything, or the stream is over. A session that
    /// is closed before that throws away what is still on its way.
    fn flushed(&mut self) -> impl Future<Output = ()> + Send;

    /// Ends the whole stream, both ways.
    fn reset(&mut self, reason: Reason);

    /// Sends what this stream has before what others have.
    fn prioritise(&mut self);
}

/// Where bytes come from. Dropped before its FIN it resets the stream.
pub trait RecvHalf: Debug + Send + 'static {
    /// Fills the front of `chunks` with what is there, in order, and says how many; `None` after the peer's FIN.
    /// Cancel-safe.
    ///
    /// # Errors
    /// When the stream or session is over.
    fn read_chunks(
        &mut self,
        chunks: &mut [Bytes],
    ) -> impl Future<Output = Result<Option<usize>, StreamError>> + Send;

    /// Ends the whole stream, both ways.
    fn reset(&mut self, reason: Reason);
}
