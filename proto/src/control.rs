//! The control stream of a session: handshake, keepalives, GoAway (docs/protocol.md sections 3, 4 and 6), and between
//! servers announcements (section 10).
//!
//! State: *dialled* → (hello, ack within [`HANDSHAKE`]) → *running* → *over*. Reading, writing and watching run beside
//! each other, so that a write that waits for credit on a dead line never hides that the line is dead.
//!
//! | failure | end |
//! | --- | --- |
//! | no or another first frame, garbage, an over-long frame | closed with [`Reason::Protocol`] |
//! | no whole frame within the limit | closed with [`Reason::Timeout`] |
//! | silence for the idle time-out | closed with [`Reason::SessionLost`] |

mod liveness;
mod run;

use std::fmt::Display;
use std::time::Duration;

use bytes::Bytes;
pub use liveness::Liveness;
pub use run::{Heard, Outbox, Quiet};
use tokio::sync::mpsc;

use crate::framed::{FrameReader, ReadFrameError, read_frame_within};
use crate::transport::{SendHalf, Session, SessionError, StreamError};
use crate::wire::pb::control_frame::Body;
use crate::wire::{
    Accepted, HandshakeError, Offer, ServerOffer, answer_hello, check_hello_ack, encode, pb,
    printable,
};
use crate::{Reason, ServerName, SessionId};

/// Each end's limit for the whole handshake. Ten round trips of the worst satellite line.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// Frames waiting to be written, encoded, as a session's queue takes memory for many of them. GoAways are few, and an ack
/// that finds no room is not needed: others are on their way.
const OUTGOING: usize = 8;

/// Why a session did not come about.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The terms were not accepted.
    #[error("agree with the other end")]
    Handshake(#[source] HandshakeError),
    /// The transport session failed.
    #[error("use the session")]
    Session(#[source] SessionError),
    /// The control stream failed.
    #[error("write to the control stream")]
    Stream(#[source] StreamError),
    /// Nothing fit to read came.
    #[error("read the control stream")]
    Read(#[source] ReadFrameError),
    /// It took longer than [`HANDSHAKE`].
    #[error("no end of the handshake within {HANDSHAKE:?}")]
    Timeout,
}

impl ControlError {
    /// The reason to report.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Handshake(error) => error.reason(),
            Self::Session(error) => error.reason(),
            Self::Stream(error) => error.reason(),
            Self::Read(error) => error.reason(),
            Self::Timeout => Reason::Timeout,
        }
    }
}

/// "Open no further sessions here": sent by an end that stops or that wants this session gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoAway {
    /// Why.
    pub reason: Reason,
    /// When its sender closes the session at the latest.
    pub deadline: Duration,
    /// How long to stay away.
    pub retry_after: Duration,
    /// Words for a log.
    pub detail: String,
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

impl From<GoAway> for pb::ControlFrame {
    fn from(away: GoAway) -> Self {
        frame(Body::GoAway(pb::GoAway {
            reason: away.reason.code(),
            deadline_ms: millis(away.deadline),
            retry_after_ms: millis(away.retry_after),
            detail: away.detail,
        }))
    }
}

impl From<pb::GoAway> for GoAway {
    fn from(away: pb::GoAway) -> Self {
        Self {
            reason: Reason::from_code(away.reason.into()),
            deadline: Duration::from_millis(away.deadline_ms.into()),
            retry_after: Duration::from_millis(away.retry_after_ms.into()),
            detail: printable(&away.detail, 300),
        }
    }
}

const fn frame(body: Body) -> pb::ControlFrame {
    pb::ControlFrame { body: Some(body) }
}

/// Sends frames on a running control stream. Clones are handles to the same one.
#[derive(Debug, Clone)]
pub struct ControlHandle(mpsc::Sender<Bytes>);

impl ControlHandle {
    /// Tells the other end to go. Says whether there was room; a control stream so stuck that there is none ends
    /// by its idle time-out anyway.
    pub fn go_away(&self, away: GoAway) -> bool {
        self.0
            .try_send(encode(&pb::ControlFrame::from(away)))
            .is_ok()
    }

    /// Tells an agent how many servers there are. Says whether there was room; it is told again with the next change.
    pub fn servers(&self, servers: u32) -> bool {
        let frame = frame(Body::Servers(pb::Servers { servers }));
        self.0.try_send(encode(&frame)).is_ok()
    }

    /// Asks for a sign of life now; [`Liveness`] shows whether it came.
    pub fn probe(&self) {
        let probe = frame(Body::Keepalive(pb::Keepalive { sequence: 0 }));
        self.0.try_send(encode(&probe)).ok(); // full: see OUTGOING
    }
}

/// A control stream after its handshake.
#[derive(Debug)]
pub struct Control<S: Session> {
    session: S,
    send: S::Send,
    reader: FrameReader<S::Recv>,
    handle: mpsc::Sender<Bytes>,
    outgoing: mpsc::Receiver<Bytes>,
}

impl<S: Session> Control<S> {
    fn new(session: S, (mut send, recv): (S::Send, S::Recv)) -> Self {
        send.prioritise();
        let (handle, outgoing) = mpsc::channel(OUTGOING);
        Self {
            session,
            send,
            reader: FrameReader::new(recv),
            handle,
            outgoing,
        }
    }

    /// The dialler's handshake, with its time limit.
    ///
    /// # Errors
    /// [`ControlError`]; the session is closed with its reason.
    pub async fn dial<Name: Display + Sync>(
        session: S,
        ours: &Offer<Name>,
    ) -> Result<(Self, Accepted<ServerName>), ControlError> {
        let handshake = async {
            let stream = session.open().await.map_err(ControlError::Session)?;
            let mut control = Self::new(session.clone(), stream);
            control.write(&frame(Body::Hello(ours.to_pb()))).await?;
            let answer = read_frame_within(&mut control.reader, HANDSHAKE).await;
            let answer = answer.map_err(ControlError::Read)?;
            let accepted = check_hello_ack(answer, ours).map_err(ControlError::Handshake)?;
            Ok((control, accepted))
        };
        within_handshake(&session, handshake).await
    }

    /// The server's side up to the dialler's hello, with its time limit.
    ///
    /// # Errors
    /// [`ControlError`]; the session is closed with its reason.
    pub async fn accept(session: S) -> Result<(Self, pb::Hello), ControlError> {
        let handshake = async {
            let stream = session.accept().await.map_err(ControlError::Session)?;
            let mut control = Self::new(session.clone(), stream);
            let first: pb::ControlFrame = read_frame_within(&mut control.reader, HANDSHAKE)
                .await
                .map_err(ControlError::Read)?;
            match first.body {
                Some(Body::Hello(hello)) => Ok((control, hello)),
                Some(
                    Body::HelloAck(_)
                    | Body::Keepalive(_)
                    | Body::KeepaliveAck(_)
                    | Body::GoAway(_)
                    | Body::Announce(_)
                    | Body::Servers(_),
                )
                | None => Err(ControlError::Handshake(HandshakeError::Unexpected)),
            }
        };
        within_handshake(&session, handshake).await
    }

    /// The server's answer to a hello: accepted, or refused and closed.
    ///
    /// # Errors
    /// [`ControlError`]; the dialler was told and the session is closed.
    pub async fn answer<Name: Display + Clone + Send + Sync>(
        mut self,
        hello: &pb::Hello,
        certified: &Name,
        ours: &ServerOffer,
        id: SessionId,
        server_time_ms: i64,
    ) -> Result<(Self, Accepted<Name>), ControlError> {
        let session = self.session.clone();
        let (ack, accepted) = match answer_hello(hello, certified, ours, id, server_time_ms) {
            Ok(terms) => terms,
            Err(error) => {
                self.refuse(error.reason(), error.to_string(), Duration::ZERO)
                    .await;
                return Err(ControlError::Handshake(error));
            }
        };
        let answered = async {
            self.write(&frame(Body::HelloAck(ack))).await?;
            Ok((self, accepted))
        };
        within_handshake(&session, answered).await
    }

    /// Tells the dialler why not and when to come again, then closes the session.
    pub async fn refuse(mut self, reason: Reason, detail: String, retry_after: Duration) {
        let away = GoAway {
            reason,
            deadline: Duration::ZERO,
            retry_after,
            detail,
        };
        let session = self.session.clone();
        let told = async {
            self.write(&away.into()).await.ok()?; // a peer that is gone needs no words
            self.send.finish().ok()?;
            // The dialler closes once it has read why; a close of ours could overtake the words.
            Some(session.closed().await)
        };
        tokio::time::timeout(HANDSHAKE, told).await.ok();
        session.close(reason);
    }

    /// For sending frames while it runs.
    #[must_use]
    pub fn handle(&self) -> ControlHandle {
        ControlHandle(self.handle.clone())
    }

    async fn write(&mut self, frame: &pb::ControlFrame) -> Result<(), ControlError> {
        self.send
            .write_chunk(encode(frame))
            .await
            .map_err(ControlError::Stream)
    }
}

async fn within_handshake<S: Session, T>(
    session: &S,
    handshake: impl Future<Output = Result<T, ControlError>>,
) -> Result<T, ControlError> {
    let done = tokio::time::timeout(HANDSHAKE, handshake)
        .await
        .unwrap_or(Err(ControlError::Timeout));
    if let Err(error) = &done {
        session.close(error.reason());
    }
    done
}
