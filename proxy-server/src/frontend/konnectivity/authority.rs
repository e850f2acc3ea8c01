//! What stands between kube-apiserver and an HTTP/2 server that follows RFC 3986: it gives every request of a
//! connection an `:authority` that one can read (docs/adr/0005).
//!
//! | what comes | what becomes of it |
//! | --- | --- |
//! | the preface, any other frame | passed on as it is, in the reader's own buffer |
//! | HEADERS with its CONTINUATIONs, trailers too | one HEADERS frame with the same END_STREAM, without padding and priority |
//! | a frame larger than 16 KiB, a block larger than 16 KiB, one in more than 8 pieces | the connection ends |
//! | another frame within a block, a CONTINUATION without one, garbage in a block | the connection ends |
//!
//! Nothing is touched on the way back. A read that fails here is the end of the connection for hyper.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::block::Blocks;

/// The client's connection preface (RFC 9113 section 3.4): it is no frame.
const PREFACE: usize = 24;
/// A frame's head (section 4.1).
const HEAD: usize = 9;
/// Largest frame that hyper announces, HTTP/2's default.
const MAX_FRAME: usize = 16 << 10;
/// Pieces of one block: CONTINUATIONs may be empty, and so endless.
const MAX_PIECES: usize = 8;
/// What is read at once while a block is put together.
const READ: usize = 4 << 10;

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// A frame's head.
#[derive(Debug, Clone, Copy)]
struct Head {
    length: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Head {
    /// The head at the beginning of `bytes`, if it is all there.
    fn peek(mut bytes: &[u8]) -> Option<Self> {
        if bytes.len() < HEAD {
            return None;
        }
        Some(Self {
            length: usize::try_from(bytes.get_uint(3)).ok()?,
            kind: bytes.get_u8(),
            flags: bytes.get_u8(),
            stream: bytes.get_u32(),
        })
    }

    const fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    const fn is_of_block(self) -> bool {
        matches!(self.kind, HEADERS | CONTINUATION)
    }
}

/// A header block that is not whole yet.
#[derive(Debug)]
struct Partial {
    stream: u32,
    end_stream: u8,
    block: BytesMut,
    pieces: usize,
}

/// A connection whose requests all have a readable authority.
pub(super) struct Readable<S> {
    inner: S,
    blocks: Blocks,
    /// Bytes to pass on as they are before the next head.
    pass: usize,
    /// Read, and not looked at: begins with a head when `pass` is 0.
    input: BytesMut,
    /// To be read next.
    output: Bytes,
    partial: Option<Partial>,
}

fn broken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl<S> Readable<S> {
    pub(super) fn new(inner: S) -> Self {
        Self {
            inner,
            blocks: Blocks::new(),
            pass: PREFACE,
            input: BytesMut::new(),
            output: Bytes::new(),
            partial: None,
        }
    }

    /// How many of these bytes, just read, are passed on where they are.
    fn skim(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        loop {
            let rest = bytes.get(at..).unwrap_or_default();
            if self.pass > 0 {
                let passed = self.pass.min(rest.len());
                self.pass -= passed;
                at += passed;
                if self.pass > 0 {
                    return at;
                }
                continue;
            }
            match Head::peek(rest) {
                Some(head) if self.partial.is_none() && !head.is_of_block() => {
                    self.pass = HEAD + head.length;
                }
                _ => return at,
            }
        }
    }

    /// Makes output of input; false when more input is needed.
    fn step(&mut self) -> io::Result<bool> {
        if self.pass > 0 {
            let passed = self.pass.min(self.input.len());
            self.pass -= passed;
            self.output = self.input.split_to(passed).freeze();
            return Ok(passed > 0);
        }
        let Some(head) = Head::peek(&self.input) else {
            return Ok(false);
        };
        match (&self.partial, head.kind) {
            (None, HEADERS) | (Some(_), CONTINUATION) => {}
            (None, CONTINUATION) => return Err(broken("a CONTINUATION continues nothing")),
            (Some(_), _) => return Err(broken("a frame within a header block")),
            (None, _) => {
                self.pass = HEAD + head.length;
                return Ok(true);
            }
        }
        if head.length > MAX_FRAME {
            return Err(broken("a frame is larger than 16 KiB"));
        }
        if self.input.len() < HEAD + head.length {
            return Ok(false);
        }
        self.input.advance(HEAD);
        let payload = self.input.split_to(head.length);
        self.take(head, payload)?;
        Ok(true)
    }

    /// Takes one piece of a block, and hands the block on with its last.
    fn take(&mut self, head: Head, payload: BytesMut) -> io::Result<()> {
        let partial = match self.partial.take() {
            None => Partial {
                stream: head.stream,
                end_stream: head.flags & END_STREAM,
                block: fragment(head, payload)?,
                pieces: 1,
            },
            Some(mut partial) => {
                if partial.stream != head.stream {
                    return Err(broken("a CONTINUATION of another stream"));
                }
                partial.pieces += 1;
                partial.block.unsplit(payload);
                if partial.block.len() > MAX_FRAME || partial.pieces > MAX_PIECES {
                    return Err(broken("a header block is too large"));
                }
                partial
            }
        };
        if !head.has(END_HEADERS) {
            self.partial = Some(partial);
            return Ok(());
        }
        let mut frame = BytesMut::with_capacity(HEAD + partial.block.len() * 2);
        frame.put_bytes(0, HEAD);
        self.blocks
            .rewrite(&partial.block, &mut frame)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let length = u64::try_from(frame.len() - HEAD).unwrap_or(u64::MAX);
        if let Some(mut place) = frame.get_mut(..HEAD) {
            place.put_uint(length, 3);
            place.put_u8(HEADERS);
            place.put_u8(partial.end_stream | END_HEADERS);
            place.put_u32(partial.stream);
        }
        self.output = frame.freeze();
        Ok(())
    }
}

/// A HEADERS frame's piece of the block, without padding and priority (section 6.2).
fn fragment(head: Head, mut payload: BytesMut) -> io::Result<BytesMut> {
    let short = || broken("a HEADERS frame is shorter than its padding");
    if head.has(PADDED) {
        let padding = usize::from(payload.try_get_u8().map_err(|_short| short())?);
        let rest = payload.len().checked_sub(padding).ok_or_else(short)?;
        payload.truncate(rest);
    }
    if head.has(PRIORITY) {
        if payload.len() < 5 {
            return Err(short());
        }
        payload.advance(5);
    }
    Ok(payload)
}

impl<S: AsyncRead + Unpin> AsyncRead for Readable<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if !this.output.is_empty() {
                let some = this.output.len().min(buffer.remaining());
                buffer.put_slice(&this.output.split_to(some));
                return Poll::Ready(Ok(()));
            }
            if !this.input.is_empty() || this.partial.is_some() {
                if this.step()? {
                    continue;
                }
                this.input.reserve(READ);
                let inner = Pin::new(&mut this.inner);
                let read = ready!(tokio_util::io::poll_read_buf(inner, cx, &mut this.input))?;
                if read == 0 {
                    // Whatever was begun is not completed by its end.
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            let before = buffer.filled().len();
            ready!(Pin::new(&mut this.inner).poll_read(cx, buffer))?;
            let bytes = buffer.filled().get(before..).unwrap_or_default();
            if bytes.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let passed = this.skim(bytes);
            this.input
                .extend_from_slice(bytes.get(passed..).unwrap_or_default());
            buffer.set_filled(before + passed);
            if passed > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Readable<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
