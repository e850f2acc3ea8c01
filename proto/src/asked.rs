//! The side of a data stream that is asked (docs/protocol.md section 5), up to its relay: an agent, or a server that
//! another server asks. Every step has its time limit.

use std::future::pending;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::timeout;

use crate::Reason;
use crate::framed::{FrameReader, ReadFrameError, read_frame_within};
use crate::transport::{RecvHalf, SendHalf};
use crate::wire::{StreamReply, encode, pb};

/// For the header to arrive.
const HEADER: Duration = Duration::from_secs(10);
/// For a reply to leave, and for the other end to drop a stream that was refused.
const REPLY: Duration = Duration::from_secs(10);
/// Bytes that the other end may send before the reply: what is more waits in the transport.
const EARLY: usize = 64 << 10;

/// Reads the header. The half comes back with what was read behind it.
pub async fn read_header<R: RecvHalf>(
    recv: R,
) -> (Result<pb::StreamHeader, ReadFrameError>, R, BytesMut) {
    let mut reader = FrameReader::new(recv);
    let header = read_frame_within(&mut reader, HEADER).await;
    let (recv, rest) = reader.into_parts();
    (header, recv, BytesMut::from(rest))
}

/// Resolves when the stream is reset, while an answer is looked for. What comes meanwhile is kept, up to a limit.
pub async fn gone<R: RecvHalf>(recv: &mut R, early: &mut BytesMut) -> Reason {
    while early.len() < EARLY {
        let mut chunk = [Bytes::new()];
        match recv.read_chunks(&mut chunk).await {
            Ok(Some(_)) => chunk
                .iter()
                .for_each(|chunk| early.extend_from_slice(chunk)),
            // Half-closed before there is an answer: the relay passes it on.
            Ok(None) => break,
            Err(error) => return error.reason(),
        }
    }
    pending().await
}

/// Answers.
///
/// # Errors
/// Why the answer could not leave.
pub async fn reply<S: SendHalf>(send: &mut S, reply: &StreamReply) -> Result<(), Reason> {
    let frame = encode(&pb::StreamReply::from(reply));
    match timeout(REPLY, send.write_chunk(frame)).await {
        Ok(wrote) => wrote.map_err(|error| error.reason()),
        Err(_elapsed) => Err(Reason::Timeout),
    }
}

/// Tells why not, and waits until the other end has dropped the stream: to drop it here would take the words back.
pub async fn refuse<S: SendHalf, R: RecvHalf>(
    mut send: S,
    mut recv: R,
    reason: Reason,
    detail: String,
) {
    if reply(&mut send, &Err((reason, detail))).await.is_err() || send.finish().is_err() {
        return;
    }
    let dropped = async {
        let mut chunk = [Bytes::new()];
        while let Ok(Some(_)) = recv.read_chunks(&mut chunk).await {}
    };
    timeout(REPLY, dropped).await.ok(); // one that keeps it has had its time
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::Session as _;
    use crate::transport::memory::{MemoryRecv, MemorySend, MemorySession, pair};

    async fn stream() -> (
        (MemorySend, MemoryRecv),
        (MemorySend, MemoryRecv),
        [MemorySession; 2],
    ) {
        let (a, b) = pair(256 << 10, 4);
        let asking = a.open().await.unwrap();
        let asked = b.accept().await.unwrap();
        (asking, asked, [a, b])
    }

    #[tokio::test(start_paused = true)]
    async fn a_header_comes_with_what_is_behind_it_or_not_in_time() {
        let ((mut send, _r), (_s, recv), _sessions) = stream().await;
        let header = pb::StreamHeader {
            host: "edge1".into(),
            port: 1,
            ..Default::default()
        };
        let mut wire = encode(&header).to_vec();
        wire.extend_from_slice(b"early");
        send.write_chunk(wire.into()).await.unwrap();
        let (read, _recv, rest) = read_header(recv).await;
        assert_eq!((read.unwrap(), &rest[..]), (header, &b"early"[..]));

        let (_asking, (_s, recv), _sessions) = stream().await;
        let (read, ..) = read_header(recv).await;
        assert_eq!(read.unwrap_err().reason(), Reason::Timeout);
    }

    #[tokio::test(start_paused = true)]
    async fn a_requester_that_goes_is_noticed_however_much_it_has_sent() {
        let ((mut send, recv), (_s, mut asked), _sessions) = stream().await;
        send.write_chunk(vec![1; EARLY / 2].into()).await.unwrap();
        let mut early = BytesMut::new();
        let waits = timeout(Duration::from_secs(1), gone(&mut asked, &mut early));
        waits.await.unwrap_err();
        assert_eq!(early.len(), EARLY / 2);
        drop((send, recv));
        assert_eq!(gone(&mut asked, &mut early).await, Reason::Cancelled);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_arrives_whole_and_waits_for_the_other_end() {
        let ((send, recv), (to_send, to_recv), _sessions) = stream().await;
        let mut reader = FrameReader::new(recv);
        let asked = refuse(to_send, to_recv, Reason::DialRefused, "no".into());
        let asking = async {
            let reply = read_frame_within(&mut reader, REPLY).await.unwrap();
            drop(send);
            StreamReply::from(&reply)
        };
        let ((), reply) = tokio::join!(asked, asking);
        assert_eq!(reply, Err((Reason::DialRefused, "no".to_owned())));
    }
}
