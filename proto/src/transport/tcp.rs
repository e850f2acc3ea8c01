//! A plain TCP connection as a stream's two halves, so that a destination dialled without a tunnel goes through the
//! same relay. There is no session and no header; a reset is a TCP RST.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use socket2::SockRef;
use tokio::net::TcpStream;

use crate::Reason;
use crate::transport::{Half, RecvHalf, SendHalf, Shared, StreamError};

/// As the relay's own: larger reads only cost cache.
const READ: usize = 64 << 10;

/// Sending half.
#[derive(Debug)]
pub struct TcpSend(Socket);

/// Receiving half.
#[derive(Debug)]
pub struct TcpRecv(Socket);

/// Both halves hold the whole socket: tokio's own halves send a FIN when they are dropped, which would make a cut look
/// like an end.
#[derive(Debug)]
struct Socket {
    socket: Arc<TcpStream>,
    shared: Arc<Shared>,
    finished: bool,
}

impl Socket {
    fn reset(&mut self, reason: Reason) {
        self.shared.reset(reason);
        // The close is a RST then; a socket that is closed already needs none.
        SockRef::from(&*self.socket)
            .set_linger(Some(Duration::ZERO))
            .ok();
        self.finished = true;
    }

    fn cut(&self, _error: &io::Error) -> StreamError {
        StreamError::Reset(self.shared.reset(Reason::DestinationReset))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.finished {
            self.reset(Reason::Cancelled);
        }
    }
}

/// The halves of a connection to a destination. It is closed when they are dropped, and whoever else holds it.
#[must_use]
pub fn halves(stream: impl Into<Arc<TcpStream>>) -> (TcpSend, TcpRecv) {
    let (socket, shared) = (stream.into(), Shared::new(None));
    let half = || Socket {
        socket: Arc::clone(&socket),
        shared: Arc::clone(&shared),
        finished: false,
    };
    (TcpSend(half()), TcpRecv(half()))
}

impl SendHalf for TcpSend {
    async fn write_chunk(&mut self, mut chunk: Bytes) -> Result<(), StreamError> {
        let half = &self.0;
        while !chunk.is_empty() {
            tokio::select! {
                biased;
                reason = half.shared.until_reset(Half::Send) => return Err(StreamError::Reset(reason)),
                ready = half.socket.writable() => ready.map_err(|error| half.cut(&error))?,
            }
            match half.socket.try_write(&chunk) {
                Ok(wrote) => drop(chunk.split_to(wrote)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(half.cut(&error)),
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), StreamError> {
        let half = &mut self.0;
        SockRef::from(&*half.socket)
            .shutdown(Shutdown::Write)
            .map_err(|error| half.cut(&error))?;
        half.finished = true;
        Ok(())
    }

    /// The kernel delivers what it has taken, whatever becomes of this process's half.
    async fn flushed(&mut self) {}

    fn reset(&mut self, reason: Reason) {
        self.0.reset(reason);
    }

    fn prioritise(&mut self) {}
}

impl RecvHalf for TcpRecv {
    async fn read_chunks(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, StreamError> {
        let Some(first) = chunks.first_mut() else {
            return Ok(Some(0));
        };
        let half = &mut self.0;
        loop {
            tokio::select! {
                biased;
                reason = half.shared.until_reset(Half::Recv) => return Err(StreamError::Reset(reason)),
                ready = half.socket.readable() => ready.map_err(|error| half.cut(&error))?,
            }
            // Made only now: waiting costs no buffer.
            let mut buffer = BytesMut::with_capacity(READ);
            match half.socket.try_read_buf(&mut buffer) {
                Ok(0) => {
                    half.finished = true;
                    return Ok(None);
                }
                Ok(_) => {
                    *first = buffer.freeze();
                    return Ok(Some(1));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(half.cut(&error)),
            }
        }
    }

    fn reset(&mut self, reason: Reason) {
        self.0.reset(reason);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_cut_is_never_a_clean_end_for_the_destination() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        for drop_it in [false, true] {
            #[expect(clippy::disallowed_methods, reason = "a test dials")]
            let (dialled, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
            let (mut send, recv) = halves(dialled.unwrap());
            send.write_chunk(Bytes::from_static(b"half of it"))
                .await
                .unwrap();
            if !drop_it {
                send.reset(Reason::RequesterReset);
            }
            drop((send, recv));
            let (mut stream, _) = accepted.unwrap();
            let ended = stream.read_to_end(&mut Vec::new()).await;
            assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
    }
}
