//! A stream that remembers why it failed, for a client whose certificate is refused.
//!
//! In TLS 1.3 a server that refuses it says so only after the handshake, in the first read; HTTP/2 doesn't
//! hand that error on by type.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::failure::HandshakeFailure;

/// A stream that remembers why it failed.
///
/// A server that refuses our certificate sends its alert and closes. Our next write may fail before that
/// alert was read; a write that fails is therefore held back until what the server sent is read.
pub(super) struct Watched {
    inner: TlsStream<TcpStream>,
    failure: Arc<OnceLock<HandshakeFailure>>,
    broken: Option<io::Error>,
}

impl Watched {
    /// Watches `inner`; the first failure is put into `failure`.
    pub(super) const fn new(
        inner: TlsStream<TcpStream>,
        failure: Arc<OnceLock<HandshakeFailure>>,
    ) -> Self {
        Self {
            inner,
            failure,
            broken: None,
        }
    }

    fn note(&self, error: &io::Error) {
        self.failure.get_or_init(|| HandshakeFailure::of(error));
    }

    /// Reads to the end, then hands the error of the write on. Never longer than the request's time.
    fn poll_broken<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        loop {
            let mut scratch = [0; 256];
            let mut scratch = ReadBuf::new(&mut scratch);
            match Pin::new(&mut self.inner).poll_read(cx, &mut scratch) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => {
                    self.note(&error);
                    break;
                }
                Poll::Ready(Ok(())) if scratch.filled().is_empty() => break,
                Poll::Ready(Ok(())) => {}
            }
        }
        let error = self
            .broken
            .as_ref()
            .map_or(io::ErrorKind::BrokenPipe, io::Error::kind);
        Poll::Ready(Err(error.into()))
    }

    /// Does what writes, unless a write failed before.
    fn poll_unless_broken<T>(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut TlsStream<TcpStream>>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if self.broken.is_none() {
            let polled = write(Pin::new(&mut self.inner), cx);
            let Poll::Ready(Err(error)) = polled else {
                return polled;
            };
            self.broken = Some(error);
        }
        self.poll_broken(cx)
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_read(cx, buffer);
        if let Poll::Ready(Err(error)) = &polled {
            self.note(error);
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_unless_broken(cx, |stream, cx| stream.poll_write(cx, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_unless_broken(cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
