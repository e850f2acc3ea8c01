//! A plain TCP connection as a stream's two halves, so that a destination dialled without a tunnel goes through the
//! same relay. There is no session and no header; a reset is a TCP RST.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use crate::Reason;
use crate::transport::{Half, RecvHalf, SendHalf, Shared, StreamError};

/// As the relay's own: larger reads only cost cache.
const READ: usize = 64 << 10;

/// Sending half.
#[derive(Debug)]
pub struct TcpSend {
    half: OwnedWriteHalf,
    shared: Arc<Shared>,
    finished: bool,
}

/// Receiving half.
#[derive(Debug)]
pub struct TcpRecv {
    half: OwnedReadHalf,
    shared: Arc<Shared>,
    finished: bool,
}

/// The halves of a connection to a destination.
#[must_use]
pub fn halves(stream: TcpStream) -> (TcpSend, TcpRecv) {
    let (recv, send) = stream.into_split();
    let shared = Shared::new(None);
    (
        TcpSend {
            half: send,
            shared: Arc::clone(&shared),
            finished: false,
        },
        TcpRecv {
            half: recv,
            shared,
            finished: false,
        },
    )
}

/// Makes the close of this connection a RST.
fn abort(stream: &TcpStream) {
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).ok(); // a closed socket needs none
}

fn cut(shared: &Shared, _error: &io::Error) -> StreamError {
    StreamError::Reset(shared.reset(Reason::DestinationReset))
}

impl SendHalf for TcpSend {
    async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), StreamError> {
        tokio::select! {
            biased;
            reason = self.shared.until_reset(Half::Send) => Err(StreamError::Reset(reason)),
            wrote = self.half.write_all(&chunk) => wrote.map_err(|error| cut(&self.shared, &error)),
        }
    }

    fn finish(&mut self) -> Result<(), StreamError> {
        SockRef::from(self.half.as_ref())
            .shutdown(Shutdown::Write)
            .map_err(|error| cut(&self.shared, &error))?;
        self.finished = true;
        Ok(())
    }

    fn reset(&mut self, reason: Reason) {
        self.shared.reset(reason);
        abort(self.half.as_ref());
        self.finished = true;
    }

    fn prioritise(&mut self) {}
}

impl Drop for TcpSend {
    fn drop(&mut self) {
        if !self.finished {
            self.reset(Reason::Cancelled);
        }
    }
}

impl RecvHalf for TcpRecv {
    async fn read_chunks(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, StreamError> {
        let Some(first) = chunks.first_mut() else {
            return Ok(Some(0));
        };
        let mut buffer = BytesMut::new();
        let read = tokio::select! {
            biased;
            reason = self.shared.until_reset(Half::Recv) => return Err(StreamError::Reset(reason)),
            // Waiting costs no buffer.
            read = async {
                self.half.readable().await?;
                buffer.reserve(READ);
                self.half.read_buf(&mut buffer).await
            } => read.map_err(|error| cut(&self.shared, &error))?,
        };
        if read == 0 {
            self.finished = true;
            return Ok(None);
        }
        *first = buffer.freeze();
        Ok(Some(1))
    }

    fn reset(&mut self, reason: Reason) {
        self.shared.reset(reason);
        abort(self.half.as_ref());
        self.finished = true;
    }
}

impl Drop for TcpRecv {
    fn drop(&mut self) {
        if !self.finished {
            self.reset(Reason::Cancelled);
        }
    }
}
