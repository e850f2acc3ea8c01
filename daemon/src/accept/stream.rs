//! An accepted connection, TCP or Unix, that counts against its listener's limit until it is dropped.

use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BufMut;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::OwnedSemaphorePermit;

/// Who connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Its address.
    Tcp(SocketAddr),
    /// Its credentials when it connected, if the kernel told them (unix(7), `SO_PEERCRED`).
    Unix {
        /// Effective user.
        uid: Option<u32>,
        /// Process.
        pid: Option<i32>,
    },
}

impl Peer {
    /// The TCP address; Unix peers have none.
    pub const fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(addr) => Some(*addr),
            Self::Unix { .. } => None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            Self::Unix {
                uid: Some(uid),
                pid: Some(pid),
            } => write!(f, "unix(uid {uid}, pid {pid})"),
            Self::Unix {
                uid: Some(uid),
                pid: None,
            } => write!(f, "unix(uid {uid})"),
            Self::Unix { .. } => f.write_str("unix"),
        }
    }
}

/// A connection. Dropping it closes it and makes room for another.
#[derive(Debug)]
pub struct Stream {
    kind: Kind,
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
pub(super) enum Kind {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub(super) const fn new(kind: Kind, permit: OwnedSemaphorePermit) -> Self {
        Self {
            kind,
            _permit: permit,
        }
    }

    /// Whether it is TCP.
    pub const fn is_tcp(&self) -> bool {
        matches!(self.kind, Kind::Tcp(_))
    }

    /// Our own TCP address; Unix connections have none.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match &self.kind {
            Kind::Tcp(socket) => socket.local_addr().ok(),
            Kind::Unix(_) => None,
        }
    }

    /// Where the peer wanted to go before a rule of this machine's firewall (REDIRECT, DNAT) sent it here; `None` when no
    /// rule did.
    pub fn original_dst(&self) -> Option<SocketAddr> {
        let Kind::Tcp(socket) = &self.kind else {
            return None;
        };
        let local = socket.local_addr().ok()?;
        let socket = SockRef::from(socket);
        // IPv4 on an IPv6 socket asks IPv4's connection tracking.
        let original = if local.ip().to_canonical().is_ipv4() {
            socket.original_dst_v4()
        } else {
            socket.original_dst_v6()
        };
        // Without connection tracking there is no answer; without a rule it is the address that was dialled.
        let original = original.ok()?.as_socket()?;
        let same = original.ip().to_canonical() == local.ip().to_canonical()
            && original.port() == local.port();
        (!same).then_some(original)
    }

    /// Closes it so that the peer sees an error and not an end: TCP sends a reset.
    ///
    /// Unix sockets know no reset: the peer's write fails, and its read only if bytes of it were never read here.
    pub fn abort(self) {
        if let Kind::Tcp(socket) = &self.kind {
            // If the connection is dead already, the peer has its error.
            SockRef::from(socket).set_linger(Some(Duration::ZERO)).ok();
        }
    }

    /// Waits until there is something to read (or the end), without holding a buffer meanwhile.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub async fn readable(&self) -> io::Result<()> {
        match &self.kind {
            Kind::Tcp(socket) => socket.readable().await,
            Kind::Unix(socket) => socket.readable().await,
        }
    }

    /// Reads what is there into `buffer`; 0 is the end.
    ///
    /// # Errors
    /// `WouldBlock` if nothing is there, or the connection's error.
    pub fn try_read_buf<B: BufMut>(&self, buffer: &mut B) -> io::Result<usize> {
        match &self.kind {
            Kind::Tcp(socket) => socket.try_read_buf(buffer),
            Kind::Unix(socket) => socket.try_read_buf(buffer),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().kind {
            Kind::Tcp(socket) => Pin::new(socket).poll_read(cx, buffer),
            Kind::Unix(socket) => Pin::new(socket).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().kind {
            Kind::Tcp(socket) => Pin::new(socket).poll_write(cx, bytes),
            Kind::Unix(socket) => Pin::new(socket).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().kind {
            Kind::Tcp(socket) => Pin::new(socket).poll_write_vectored(cx, bytes),
            Kind::Unix(socket) => Pin::new(socket).poll_write_vectored(cx, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().kind {
            Kind::Tcp(socket) => Pin::new(socket).poll_flush(cx),
            Kind::Unix(socket) => Pin::new(socket).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().kind {
            Kind::Tcp(socket) => Pin::new(socket).poll_shutdown(cx),
            Kind::Unix(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }
}
