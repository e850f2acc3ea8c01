//! Sessions and streams as the server sees them.

use std::time::Duration;

use bytes::Bytes;
use proto::control::{ControlHandle, GoAway};
use proto::transport::quic::{QuicRecv, QuicSend, QuicSession};
use proto::transport::{RecvHalf, SendHalf, Session, StreamError};
use proto::wire::{StreamHeader, StreamReply, encode, pb};
use proto::{Destination, FrameReader, Reason, read_frame_within};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::DEADLINE;

/// One session, as the server sees it.
pub(crate) struct Peer {
    pub(crate) session: QuicSession,
    pub(crate) control: ControlHandle,
    pub(crate) hello: pb::Hello,
    pub(super) away: mpsc::Receiver<GoAway>,
}

impl Peer {
    /// Opens a stream and asks for a destination.
    pub(crate) async fn ask(&self, destination: &str) -> Stream {
        self.ask_within(destination, Duration::from_secs(10)).await
    }

    pub(crate) async fn ask_within(&self, destination: &str, deadline: Duration) -> Stream {
        let destination: Destination = destination.parse().unwrap();
        let header = StreamHeader {
            destination,
            deadline,
            trace: "00-test".to_owned(),
            pod: None,
        };
        let mut stream = self.open().await;
        stream
            .send
            .write_chunk(encode(&header.to_pb()))
            .await
            .unwrap();
        stream
    }

    /// Opens a stream and says nothing.
    pub(crate) async fn open(&self) -> Stream {
        let (send, recv) = self.session.open().await.unwrap();
        Stream {
            send,
            reader: FrameReader::new(recv),
        }
    }

    /// Opens a stream to a destination and waits for it.
    pub(crate) async fn connect(&self, destination: &str) -> (QuicSend, QuicRecv) {
        self.ask(destination).await.connected().await
    }

    /// Why the agent refuses a destination.
    pub(crate) async fn refusal(&self, destination: &str) -> Reason {
        self.ask(destination).await.reply().await.unwrap_err().0
    }

    /// Asks the agent to go elsewhere.
    pub(crate) fn go_away(&self, reason: Reason, retry_after: Duration) {
        let deadline = Duration::from_secs(30);
        let detail = "the test says so".to_owned();
        assert!(self.control.go_away(GoAway {
            reason,
            deadline,
            retry_after,
            detail
        }));
    }

    /// The agent's next GoAway.
    pub(crate) async fn told(&mut self) -> GoAway {
        timeout(DEADLINE, self.away.recv())
            .await
            .expect("no GoAway comes")
            .expect("the session is over")
    }

    /// Why the session ended.
    pub(crate) async fn closed(&self) -> Reason {
        timeout(DEADLINE, self.session.closed())
            .await
            .expect("the session stays")
            .reason()
    }
}

/// One stream, from the server's side.
pub(crate) struct Stream {
    pub(crate) send: QuicSend,
    pub(crate) reader: FrameReader<QuicRecv>,
}

impl Stream {
    pub(crate) async fn reply(&mut self) -> StreamReply {
        let reply: pb::StreamReply = read_frame_within(&mut self.reader, DEADLINE).await.unwrap();
        StreamReply::from(&reply)
    }

    pub(crate) async fn connected(mut self) -> (QuicSend, QuicRecv) {
        self.reply().await.unwrap();
        let (recv, rest) = self.reader.into_parts();
        assert!(rest.is_empty(), "the destinations here wait to be asked");
        (self.send, recv)
    }

    /// The reason it is reset with.
    pub(crate) async fn reset(self) -> Reason {
        let (_send, (mut recv, _rest)) = (self.send, self.reader.into_parts());
        match timeout(DEADLINE, read_to_end(&mut recv))
            .await
            .expect("the stream stays")
        {
            Err(StreamError::Reset(reason)) => reason,
            other => panic!("not reset: {other:?}"),
        }
    }
}

/// Reads up to the FIN.
pub(crate) async fn read_to_end(recv: &mut QuicRecv) -> Result<Vec<u8>, StreamError> {
    let mut all = Vec::new();
    let mut chunk = [Bytes::new()];
    while let Some(count) = recv.read_chunks(&mut chunk).await? {
        chunk
            .iter()
            .take(count)
            .for_each(|bytes| all.extend_from_slice(bytes));
    }
    Ok(all)
}
