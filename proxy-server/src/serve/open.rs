//! One attempt: a stream on one session, the header, and what is answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use proto::transport::quic::{QuicRecv, QuicSend, QuicSession};
use proto::transport::{SendHalf, Session, StreamError};
use proto::wire::{ForwardHeader, PodPort, StreamHeader, StreamReply, encode, pb};
use proto::{AgentName, Destination, FrameReader, ReadFrameError, Reason, read_frame_within};
use tokio::time::{Instant, timeout_at};

use crate::error::Refusal;
use crate::peer::PeerSession;
use crate::registry::{Doubt, LiveSession};

/// The agent's own limit for a dial; asking for more is no use (docs/protocol.md section 5).
const AGENT_DIAL: Duration = Duration::from_secs(10);

/// What is asked of the edge.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    /// Whose session.
    pub(crate) agent: AgentName,
    /// What the requester calls the node.
    pub(crate) node: String,
    /// What the agent dials.
    pub(crate) destination: Destination,
    /// The pod that is meant, as far as it is known.
    pub(crate) pod: Option<PodPort>,
    /// Who asks, in words.
    pub(crate) requester: String,
    /// When there must be an answer.
    pub(crate) deadline: Instant,
}

/// A session on which the agent can be asked.
#[derive(Debug, Clone)]
pub(crate) enum Way {
    /// Its own.
    Agent(Arc<LiveSession<QuicSession>>),
    /// That of another server which has one.
    Peer(Arc<PeerSession<QuicSession>>),
}

impl Way {
    pub(crate) fn transport(&self) -> &QuicSession {
        match self {
            Self::Agent(session) => &session.transport,
            Self::Peer(session) => &session.transport,
        }
    }

    pub(crate) fn id(&self) -> String {
        match self {
            Self::Agent(session) => session.id.to_string(),
            Self::Peer(session) => session.id.clone(),
        }
    }

    /// The dedicated line that it goes over, as far as is known here.
    pub(crate) fn line(&self) -> Option<&str> {
        match self {
            Self::Agent(session) => session.line(),
            Self::Peer(_) => None,
        }
    }

    pub(super) fn doubt(&self) -> &Doubt {
        match self {
            Self::Agent(session) => &session.doubt,
            Self::Peer(session) => &session.doubt,
        }
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Agent(a), Self::Agent(b)) => Arc::ptr_eq(a, b),
            (Self::Peer(a), Self::Peer(b)) => Arc::ptr_eq(a, b),
            (Self::Agent(_), Self::Peer(_)) | (Self::Peer(_), Self::Agent(_)) => false,
        }
    }

    fn streams(&self) -> &AtomicUsize {
        match self {
            Self::Agent(session) => &session.streams,
            Self::Peer(session) => &session.streams,
        }
    }

    /// What another server does wrong must not keep a request from those that do it right.
    pub(super) const fn is_peer(&self) -> bool {
        matches!(self, Self::Peer(_))
    }

    /// For how long who is at the other end has not been heard.
    fn silence(&self) -> String {
        let (who, liveness) = match self {
            Self::Agent(session) => ("the agent".to_owned(), &session.liveness),
            Self::Peer(session) => (format!("server {}", session.server), &session.liveness),
        };
        format!(
            "{who} was last heard {} s ago",
            liveness.silence().as_secs()
        )
    }

    fn header(&self, ask: &Ask, left: Duration) -> Bytes {
        let mut header = StreamHeader {
            destination: ask.destination.clone(),
            deadline: left,
            trace: String::new(),
            pod: ask.pod.clone(),
        };
        match self {
            Self::Agent(_) => {
                header.deadline = left.min(AGENT_DIAL);
                encode(&header.to_pb())
            }
            Self::Peer(_) => {
                let forward = ForwardHeader {
                    agent: ask.agent.clone(),
                    node: ask.node.clone(),
                    requester: ask.requester.clone(),
                    header,
                };
                encode(&forward.to_pb())
            }
        }
    }
}

/// A way that carries a stream, counted there.
#[derive(Debug)]
pub(crate) struct Carried(pub(crate) Way);

impl Carried {
    fn new(way: &Way) -> Self {
        way.streams().fetch_add(1, Ordering::Relaxed);
        Self(way.clone())
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.0.streams().fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream that the destination has accepted, before its first byte.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) carried: Carried,
    pub(crate) send: QuicSend,
    pub(crate) recv: QuicRecv,
    /// What came behind the answer.
    pub(crate) early: Bytes,
}

/// Why an attempt brought no stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) reason: Reason,
    /// What is said of it.
    pub(crate) detail: String,
    /// Another session may do: nothing of the request was on its way, and it is this one that failed.
    pub(crate) another: bool,
    /// These are the words of who was asked, about what was to be dialled.
    pub(crate) answered: bool,
}

impl Failure {
    /// Whether it is about what was to be dialled, not about who was asked: another way leads to the same.
    pub(super) const fn is_final(&self) -> bool {
        self.answered
            && matches!(
                self.reason,
                Reason::DestinationDenied
                    | Reason::ForbiddenDestination
                    | Reason::DialRefused
                    | Reason::DialTimeout
                    | Reason::DialUnreachable
                    | Reason::DialFailed
                    | Reason::Resolve
            )
    }

    /// In words for the requester.
    pub(crate) fn refusal(&self, ask: &Ask) -> Refusal {
        let (reason, detail) = (self.reason, self.detail.as_str());
        let subject = subject(ask);
        if reason == Reason::NoSession {
            let sentence = format!("{subject}: {} {detail}", reason.sentence());
            return Refusal { reason, sentence };
        }
        if self.answered && !detail.is_empty() {
            let detail = format!("{}: {detail}", ask.destination);
            return Refusal::detailed(subject, reason, &detail);
        }
        Refusal::detailed(subject, reason, detail)
    }
}

fn subject(ask: &Ask) -> String {
    let Ask { agent, node, .. } = ask;
    if agent.as_str() == node {
        format!("node {node}")
    } else {
        format!("node {node} (agent {agent})")
    }
}

/// Opens a stream on that way.
pub(super) async fn open_on(way: &Way, ask: &Ask) -> Result<Stream, Failure> {
    let silent = || Failure {
        reason: Reason::Timeout,
        detail: way.silence(),
        another: false,
        answered: false,
    };
    let ended = |error: StreamError| ended(way, &error);
    let carried = Carried::new(way);
    let opened = timeout_at(ask.deadline, way.transport().open())
        .await
        .map_err(|_late| silent())?;
    let (mut send, recv) = opened.map_err(|e| ended(StreamError::Session(e)))?;
    let left = ask.deadline.saturating_duration_since(Instant::now());
    let mut reader = FrameReader::new(recv);
    let exchange = async {
        send.write_chunk(way.header(ask, left))
            .await
            .map_err(ended)?;
        read_frame_within::<pb::StreamReply, _>(&mut reader, left)
            .await
            .map_err(|error| match error {
                ReadFrameError::Stream(error) => ended(error),
                ReadFrameError::Timeout(_) => silent(),
                ReadFrameError::Frame(error) => Failure {
                    reason: Reason::Protocol,
                    detail: error.to_string(),
                    another: way.is_peer(),
                    answered: false,
                },
            })
    };
    let reply = timeout_at(ask.deadline, exchange)
        .await
        .map_err(|_late| silent())??;
    match StreamReply::from(&reply) {
        Ok(()) => {
            let (recv, early) = reader.into_parts();
            Ok(Stream {
                carried,
                send,
                recv,
                early,
            })
        }
        Err((reason, detail)) => Err(refused(way, reason, detail)),
    }
}

/// The stream or its session ended before there was an answer.
fn ended(way: &Way, error: &StreamError) -> Failure {
    // Only a requester cancels; who is asked owes a reply to each header.
    let reason = Some(error.reason()).filter(|reason| *reason != Reason::Cancelled);
    let of_session = matches!(error, StreamError::Session(_));
    Failure {
        reason: reason.unwrap_or(Reason::Protocol),
        detail: error.to_string(),
        another: of_session || way.is_peer(),
        answered: false,
    }
}

/// What was answered.
fn refused(way: &Way, reason: Reason, detail: String) -> Failure {
    let (fitting, another) = match way {
        // An agent speaks of its dial and of itself, not of the requester's credentials.
        Way::Agent(_) => (reason.is_of_agent(), false),
        Way::Peer(_) => (reason.is_of_server(), leads_on(reason)),
    };
    Failure {
        reason: if fitting { reason } else { Reason::Protocol },
        detail,
        another,
        answered: true,
    }
}

/// Whether another server may have what this one lacks, or behave where this one does not.
const fn leads_on(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::NoSession | Reason::SessionLost | Reason::Draining | Reason::Overloaded
    ) || !reason.is_of_server()
}
