//! A UDP socket whose datagrams come one by one, each to memory of its own.
//!
//! The kernel hands over up to 64 datagrams of one sender as one (UDP GRO), quinn allocates once for all of them, and what
//! a stream has not read of one keeps the memory of all: beside running streams, a stopped reader pins many times its window,
//! and neither quinn's account (of single datagrams) nor [`crate::Budget`] knows. So each is copied out, from the cache.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

/// The longest that one read yields: a UDP payload, or as many datagrams as fit in one.
const LONGEST: usize = 64 << 10;

/// What was read of the socket and not yet taken.
struct Read {
    /// One piece of [`LONGEST`] for each read of one call. Untouched memory costs nothing.
    memory: Box<[u8]>,
    /// Of each read, what is left: its start in the piece is at `taken`.
    metas: Vec<RecvMeta>,
    /// How many of the reads are filled, and the one whose turn it is.
    filled: usize,
    turn: usize,
    /// Bytes taken of it.
    taken: usize,
}

impl Read {
    fn new(at_once: usize) -> Self {
        Self {
            memory: vec![0; LONGEST * at_once].into(),
            metas: vec![RecvMeta::default(); at_once],
            filled: 0,
            turn: 0,
            taken: 0,
        }
    }

    /// The next datagram: into `to`, what does not fit of it is lost, as with any socket.
    fn next(&mut self, to: &mut [u8]) -> Option<RecvMeta> {
        while self.turn < self.filled {
            let meta = *self.metas.get(self.turn)?;
            let piece = self.memory.chunks_exact(LONGEST).nth(self.turn)?;
            let rest = piece.get(self.taken..meta.len).unwrap_or_default();
            let datagram = rest.get(..meta.stride).unwrap_or(rest);
            self.taken += datagram.len();
            if self.taken >= meta.len || datagram.is_empty() {
                (self.turn, self.taken) = (self.turn + 1, 0);
            }
            if datagram.is_empty() {
                continue;
            }
            let length = datagram.len().min(to.len());
            let (into, from) = (to.get_mut(..length)?, datagram.get(..length)?);
            into.copy_from_slice(from);
            return Some(RecvMeta {
                len: length,
                stride: length,
                ..meta
            });
        }
        None
    }

    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        socket: &dyn AsyncUdpSocket,
    ) -> Poll<io::Result<()>> {
        let pieces = self.memory.chunks_exact_mut(LONGEST);
        let mut slices: Vec<_> = pieces.map(IoSliceMut::new).collect();
        let filled = ready!(socket.poll_recv(cx, &mut slices, &mut self.metas))?;
        (self.filled, self.turn, self.taken) = (filled, 0, 0);
        Poll::Ready(Ok(()))
    }
}

/// The socket. Sending is the inner one's.
pub(super) struct Apart {
    inner: Arc<dyn AsyncUdpSocket>,
    read: Mutex<Read>,
}

impl Apart {
    /// Around a socket of quinn's, from which so much is read at once.
    pub(super) fn new(inner: Arc<dyn AsyncUdpSocket>, at_once: usize) -> Self {
        Self {
            inner,
            read: Mutex::new(Read::new(at_once)),
        }
    }
}

impl std::fmt::Debug for Apart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Apart").field(&self.inner).finish()
    }
}

impl AsyncUdpSocket for Apart {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut read = self.read.lock();
        loop {
            let mut count = 0;
            for (buffer, meta) in bufs.iter_mut().zip(metas.iter_mut()) {
                let Some(next) = read.next(buffer) else {
                    break;
                };
                *meta = next;
                count += 1;
            }
            if count > 0 {
                return Poll::Ready(Ok(count));
            }
            ready!(read.poll_fill(cx, &*self.inner))?;
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::net::UdpSocket;
    use std::time::Duration;

    use quinn::{Runtime as _, TokioRuntime};

    use super::*;

    /// What quinn takes at once of a socket.
    async fn received(socket: &Apart) -> Vec<(RecvMeta, Vec<u8>)> {
        let mut memory = vec![0; 1472 * 32];
        let mut metas = [RecvMeta::default(); 32];
        let mut slices: Vec<_> = memory.chunks_mut(1472).map(IoSliceMut::new).collect();
        let count = poll_fn(|cx| socket.poll_recv(cx, &mut slices, &mut metas));
        let count = tokio::time::timeout(Duration::from_secs(30), count).await;
        let count = count.unwrap().unwrap();
        let all = metas.iter().zip(memory.chunks(1472)).take(count);
        all.map(|(meta, buffer)| (*meta, buffer[..meta.len].to_vec()))
            .collect()
    }

    #[tokio::test]
    async fn what_the_kernel_hands_over_as_one_comes_one_by_one() {
        let bound = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let wrapped = |socket| TokioRuntime.wrap_udp_socket(socket).unwrap();
        let (sender, socket) = (wrapped(bound()), Apart::new(wrapped(bound()), 2));
        let all: Vec<u8> = (0..40 * 1200 + 100_u32)
            .map(|i| (i / 7).to_le_bytes()[0])
            .collect();
        // As many at once as the kernel takes of this socket; without GSO, one.
        let segments = sender.max_transmit_segments().min(8);
        for burst in all.chunks(1200 * segments) {
            let transmit = Transmit {
                destination: socket.local_addr().unwrap(),
                ecn: None,
                contents: burst,
                segment_size: Some(1200),
                src_ip: None,
            };
            let mut writable = Arc::clone(&sender).create_io_poller();
            poll_fn(|cx| writable.as_mut().poll_writable(cx))
                .await
                .unwrap();
            sender.try_send(&transmit).unwrap();
        }
        let mut got: Vec<Vec<u8>> = Vec::new();
        while got.len() < 41 {
            for (meta, datagram) in received(&socket).await {
                assert_eq!(meta.stride, meta.len);
                assert_eq!(meta.addr, sender.local_addr().unwrap());
                got.push(datagram);
            }
        }
        let wanted: Vec<Vec<u8>> = all.chunks(1200).map(<[u8]>::to_vec).collect();
        assert_eq!(got, wanted);
    }

    fn read_of(reads: &[(&[u8], usize)]) -> Read {
        let mut read = Read::new(reads.len());
        for (i, (bytes, stride)) in reads.iter().enumerate() {
            read.memory[i * LONGEST..][..bytes.len()].copy_from_slice(bytes);
            read.metas[i].len = bytes.len();
            read.metas[i].stride = *stride;
        }
        read.filled = reads.len();
        read
    }

    #[test]
    fn the_last_of_several_is_shorter_and_empty_ones_are_none() {
        let mut read = read_of(&[(b"", 0), (b"aabbc", 2), (b"", 0), (b"dd", 2), (b"ee", 2)]);
        let mut to = [0; 8];
        for wanted in ["aa", "bb", "c", "dd", "ee"] {
            let meta = read.next(&mut to).unwrap();
            assert_eq!((meta.len, meta.stride), (wanted.len(), wanted.len()));
            assert_eq!(&to[..meta.len], wanted.as_bytes());
        }
        assert!(read.next(&mut to).is_none());
    }

    #[test]
    fn what_does_not_fit_is_lost_and_what_follows_is_not() {
        let mut read = read_of(&[(b"aaabbb", 3)]);
        let mut to = [0; 2];
        for wanted in [b"aa", b"bb"] {
            assert_eq!(read.next(&mut to).unwrap().len, 2);
            assert_eq!(&to, wanted);
        }
        assert!(read.next(&mut to).is_none());
    }
}
