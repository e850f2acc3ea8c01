//! The halves of a QUIC stream. A reset is RESET_STREAM and STOP_SENDING with the same code (RFC 9000 section 3).

use std::sync::Arc;

use bytes::Bytes;
use quinn::VarInt;

use super::Ledger;
use crate::Reason;
use crate::transport::{Half, RecvHalf, SendHalf, Shared, StreamError};

/// Above the data streams, whose priority is 0.
const CONTROL_PRIORITY: i32 = 1;

/// Sending half.
#[derive(Debug)]
pub struct QuicSend {
    stream: quinn::SendStream,
    shared: Arc<Shared>,
    ledger: Arc<Ledger>,
    finished: bool,
}

/// Receiving half.
#[derive(Debug)]
pub struct QuicRecv {
    stream: quinn::RecvStream,
    shared: Arc<Shared>,
    ledger: Arc<Ledger>,
    finished: bool,
}

fn code(reason: Reason) -> VarInt {
    reason.code().into()
}

impl QuicSend {
    pub(super) fn new(stream: quinn::SendStream, shared: Arc<Shared>, ledger: Arc<Ledger>) -> Self {
        Self {
            stream,
            shared,
            ledger,
            finished: false,
        }
    }

    fn fail(&mut self, error: &quinn::WriteError) -> StreamError {
        match error {
            quinn::WriteError::Stopped(stopped) => {
                let reason = self.shared.reset(Reason::from_code(stopped.into_inner()));
                StreamError::Reset(reason)
            }
            quinn::WriteError::ConnectionLost(lost) => {
                StreamError::Session(self.ledger.error(lost))
            }
            quinn::WriteError::ClosedStream | quinn::WriteError::ZeroRttRejected => {
                StreamError::Reset(self.shared.reset(Reason::Cancelled))
            }
        }
    }
}

impl SendHalf for QuicSend {
    async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), StreamError> {
        let wrote = tokio::select! {
            biased;
            reason = self.shared.until_reset(Half::Send) => return Err(StreamError::Reset(reason)),
            wrote = self.stream.write_chunk(chunk) => wrote,
        };
        wrote.map_err(|error| self.fail(&error))
    }

    fn finish(&mut self) -> Result<(), StreamError> {
        if let Some(reason) = self.shared.reason() {
            return Err(StreamError::Reset(reason));
        }
        // The only error is that the peer stopped the stream; reading tells why.
        self.stream
            .finish()
            .map_err(|_closed| StreamError::Reset(self.shared.reset(Reason::Cancelled)))?;
        self.finished = true;
        Ok(())
    }

    async fn flushed(&mut self) {
        self.stream.stopped().await.ok(); // over is as good as taken
    }

    fn reset(&mut self, reason: Reason) {
        let first = self.shared.reset(reason);
        self.stream.reset(code(first)).ok(); // already closed is as good
        self.finished = true;
    }

    fn prioritise(&mut self) {
        self.stream.set_priority(CONTROL_PRIORITY).ok(); // a closed stream needs none
    }
}

impl Drop for QuicSend {
    fn drop(&mut self) {
        if !self.finished || self.shared.reason().is_some() {
            self.reset(Reason::Cancelled);
        }
    }
}

impl QuicRecv {
    pub(super) fn new(stream: quinn::RecvStream, shared: Arc<Shared>, ledger: Arc<Ledger>) -> Self {
        Self {
            stream,
            shared,
            ledger,
            finished: false,
        }
    }

    fn fail(&mut self, error: &quinn::ReadError) -> StreamError {
        match error {
            quinn::ReadError::Reset(reset) => {
                StreamError::Reset(self.shared.reset(Reason::from_code(reset.into_inner())))
            }
            quinn::ReadError::ConnectionLost(lost) => StreamError::Session(self.ledger.error(lost)),
            quinn::ReadError::ClosedStream
            | quinn::ReadError::IllegalOrderedRead
            | quinn::ReadError::ZeroRttRejected => {
                StreamError::Reset(self.shared.reset(Reason::Cancelled))
            }
        }
    }
}

impl RecvHalf for QuicRecv {
    async fn read_chunks(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, StreamError> {
        if self.finished {
            return Ok(None);
        }
        let read = tokio::select! {
            biased;
            reason = self.shared.until_reset(Half::Recv) => return Err(StreamError::Reset(reason)),
            read = self.stream.read_chunks(chunks) => read,
        };
        match read {
            Ok(None) => {
                self.finished = true;
                Ok(None)
            }
            Ok(count) => Ok(count),
            Err(error) => Err(self.fail(&error)),
        }
    }

    fn reset(&mut self, reason: Reason) {
        let first = self.shared.reset(reason);
        self.stream.stop(code(first)).ok(); // already closed is as good
        self.finished = true;
    }
}

impl Drop for QuicRecv {
    fn drop(&mut self) {
        if !self.finished || self.shared.reason().is_some() {
            self.reset(Reason::Cancelled);
        }
    }
}
