//! Reads frames from a transport's receiving half, never more than one frame ahead.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use prost::Message;

use crate::Reason;
use crate::transport::{RecvHalf, StreamError};
use crate::wire::{FrameError, decode};

/// Why no frame came.
#[derive(Debug, thiserror::Error)]
pub enum ReadFrameError {
    /// The stream is over.
    #[error("read from the stream")]
    Stream(#[source] StreamError),
    /// What came is no frame.
    #[error("read a frame")]
    Frame(#[source] FrameError),
    /// Nothing whole came in time.
    #[error("no frame within {0:?}")]
    Timeout(Duration),
}

impl ReadFrameError {
    /// The reason to report.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Stream(error) => error.reason(),
            Self::Frame(_) => Reason::Protocol,
            Self::Timeout(_) => Reason::Timeout,
        }
    }
}

/// A receiving half that begins with frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    recv: R,
    buffer: BytesMut,
}

impl<R: RecvHalf> FrameReader<R> {
    /// Reads from `recv`.
    pub fn new(recv: R) -> Self {
        Self {
            recv,
            buffer: BytesMut::new(),
        }
    }

    /// The next frame, or `None` after a FIN between frames. Cancel-safe.
    ///
    /// # Errors
    /// When the stream ends otherwise, or the frame breaks a rule.
    pub async fn read<M: Message + Default>(&mut self) -> Result<Option<M>, ReadFrameError> {
        loop {
            if let Some(message) = decode(&mut self.buffer).map_err(ReadFrameError::Frame)? {
                return Ok(Some(message));
            }
            let mut chunk = [Bytes::new()];
            match self
                .recv
                .read_chunks(&mut chunk)
                .await
                .map_err(ReadFrameError::Stream)?
            {
                Some(_) => self.buffer.extend_from_slice(&chunk[0]),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(ReadFrameError::Frame(FrameError::Truncated)),
            }
        }
    }

    /// The half again, and the bytes behind the frames.
    pub fn into_parts(self) -> (R, Bytes) {
        (self.recv, self.buffer.freeze())
    }
}

/// One frame within a time limit; a FIN in its place is [`FrameError::Truncated`].
///
/// # Errors
/// As [`FrameReader::read`], and when the time is over.
pub async fn read_frame_within<M: Message + Default, R: RecvHalf>(
    reader: &mut FrameReader<R>,
    limit: Duration,
) -> Result<M, ReadFrameError> {
    tokio::time::timeout(limit, reader.read())
        .await
        .map_err(|_elapsed| ReadFrameError::Timeout(limit))??
        .ok_or(ReadFrameError::Frame(FrameError::Truncated))
}
