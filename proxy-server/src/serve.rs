//! One request end to end: route → policy → pick → open → header and reply → relay → record.
//!
//! | step | failure | what the requester reads |
//! | --- | --- | --- |
//! | permits | none left | overloaded |
//! | route | two nodes share the address; not at the edge and `refuse` | both names; unknown destination |
//! | policy | the frontend's rules don't permit it | destination, requester: not allowed |
//! | pick | no session | node X: no session since …, last error: … |
//! | open, header | session lost | the next session is tried, as no byte of the request is on its way; else session lost |
//! | open, header | stream reset, garbage | node X: the agent's reason or protocol; not tried again |
//! | reply | none in time; a reason of the agent | node X: no answer in time; the agent's words |
//! | relay | any | nothing can be said any more: a reset, the reason in log, metric and the next answer |

use std::future::pending;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use proto::transport::quic::{QuicRecv, QuicSend, QuicSession};
use proto::transport::tcp::{self, TcpRecv, TcpSend};
use proto::transport::{SendHalf, Session, StreamError};
use proto::wire::{StreamHeader, StreamReply, encode, pb};
use proto::{
    AgentName, Budget, Destination, Early, FrameReader, Local, ReadFrameError, Reason, Relay,
    RelayEnd, read_frame_within, relay, session_over,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::cluster::Cluster;
use crate::config::{Elsewhere, Mark, Timeouts};
use crate::error::Refusal;
use crate::frontend::policy::{Policy, Requester, Target};
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::path::direct;
use crate::record::{Outcome, Path, StreamRecord};
use crate::registry::{Absent, LiveSession, Registry};
use crate::route::{Route, RouteTable};

/// Sessions of one agent that are tried for a request.
const TRIES: usize = 3;
/// The agent's own limit for a dial; asking for more is no use (docs/protocol.md section 5).
const AGENT_DIAL: Duration = Duration::from_secs(10);

/// What changes while the server runs.
#[derive(Debug, Default)]
pub struct Routing {
    /// The configured part.
    pub table: ArcSwap<RouteTable>,
    /// Names of agents that enrolled.
    pub enrolled: ArcSwap<std::collections::HashSet<AgentName>>,
    /// What the cluster knows.
    pub cluster: Arc<Cluster>,
}

/// Carries requests to where they want to go.
#[derive(Debug)]
pub struct Forwarder {
    /// Where destinations are.
    pub routing: Arc<Routing>,
    /// Who has sessions.
    pub registry: Registry<QuicSession>,
    /// How much at once.
    pub limits: Limits,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What unread bytes may cost.
    pub budget: Budget,
    /// Time limits.
    pub timeouts: Timeouts,
    /// Our own listeners, never dialled directly.
    pub own: ArcSwap<Vec<SocketAddr>>,
    /// The mark of direct dials, if they have one.
    pub mark: Option<Mark>,
    /// Cancelled when the drain is over: what still runs is reset.
    pub cut: CancellationToken,
}

/// What a frontend wants.
#[derive(Debug)]
pub struct Request {
    /// Which frontend; metric label.
    pub frontend: &'static str,
    /// Who asks.
    pub requester: Requester,
    /// Where to.
    pub destination: Destination,
    /// What about destinations that are not at the edge.
    pub elsewhere: Elsewhere,
    /// Who may ask for what.
    pub policy: Arc<Policy>,
}

#[derive(Debug)]
enum Halves {
    Tunnel(Carried, QuicSend, QuicRecv),
    Direct(TcpSend, TcpRecv),
}

/// Counts a stream on its session.
#[derive(Debug)]
struct Carried(Arc<LiveSession<QuicSession>>);

impl Carried {
    fn new(session: &Arc<LiveSession<QuicSession>>) -> Self {
        session.streams.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(session))
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream that the destination has accepted, before its first byte.
#[derive(Debug)]
pub struct Opened {
    forwarder: Arc<Forwarder>,
    halves: Halves,
    from_tunnel: Bytes,
    record: StreamRecord,
    _permit: OwnedSemaphorePermit,
}

impl Forwarder {
    /// Finds the way and opens a stream; `gone` resolves when the requester hangs up meanwhile.
    ///
    /// # Errors
    /// A refusal for the requester; it is recorded already.
    pub async fn open(
        self: &Arc<Self>,
        request: Request,
        gone: impl Future<Output = ()> + Send,
    ) -> Result<Opened, Refusal> {
        self.open_by(request, None, gone).await
    }

    /// As [`Forwarder::open`], for a request that [`Forwarder::admit`] routed before.
    ///
    /// # Errors
    /// As there.
    pub async fn open_on(
        self: &Arc<Self>,
        request: Request,
        route: Route,
        gone: impl Future<Output = ()> + Send,
    ) -> Result<Opened, Refusal> {
        self.open_by(request, Some(route), gone).await
    }

    async fn open_by(
        self: &Arc<Self>,
        request: Request,
        routed: Option<Route>,
        gone: impl Future<Output = ()> + Send,
    ) -> Result<Opened, Refusal> {
        let mut record = StreamRecord::new(&self.metrics, &request);
        let opened = tokio::select! {
            biased;
            opened = self.try_open(&request, routed, &mut record) => opened,
            () = gone => Err(Refusal::about(&request.destination, Reason::Cancelled)),
        };
        match opened {
            Ok((halves, from_tunnel, permit)) => {
                record.answered();
                let forwarder = Arc::clone(self);
                Ok(Opened {
                    forwarder,
                    halves,
                    from_tunnel,
                    record,
                    _permit: permit,
                })
            }
            Err(refusal) => {
                record.end(Outcome::Failed(refusal.reason), &refusal.sentence);
                Err(refusal)
            }
        }
    }

    /// Where a destination is now.
    ///
    /// # Errors
    /// As [`RouteTable::route`].
    pub fn route(&self, destination: &Destination) -> Result<Route, Refusal> {
        let enrolled = self.routing.enrolled.load();
        let known = |agent: &AgentName| enrolled.contains(agent) || self.registry.knows(agent);
        let (table, cluster) = (self.routing.table.load(), self.routing.cluster.table());
        table.route(destination, &cluster, known)
    }

    /// Routes a request and decides about it; `node` is set once it is routed to one.
    ///
    /// # Errors
    /// No such way, or not for this requester.
    pub fn admit(&self, request: &Request, node: &mut String) -> Result<Route, Refusal> {
        let Request {
            requester,
            destination,
            elsewhere,
            policy,
            ..
        } = request;
        let route = self.route(destination)?;
        match (&route, elsewhere) {
            (Route::Edge { node: name, .. }, _) => node.clone_from(name),
            (Route::Elsewhere, Elsewhere::Direct) => {}
            // Said to whoever may use the frontend at all: a name that is mistyped is no question of rules.
            (Route::Elsewhere, Elsewhere::Refuse) => {
                let detail = if self.routing.cluster.is_waiting() {
                    "the cluster's nodes are not known yet"
                } else {
                    ""
                };
                let reason = Reason::UnknownDestination;
                return Err(Refusal::detailed(destination, reason, detail));
            }
        }
        policy.check(requester, destination, Target::from(&route))?;
        Ok(route)
    }

    async fn try_open(
        &self,
        request: &Request,
        routed: Option<Route>,
        record: &mut StreamRecord,
    ) -> Result<(Halves, Bytes, OwnedSemaphorePermit), Refusal> {
        let destination = &request.destination;
        let deadline = Instant::now() + self.timeouts.dial;
        let overloaded = |reason| Refusal::about("proxy-server", reason);
        let permit = self.limits.stream().map_err(overloaded)?;
        let _pending = self.limits.pending_dial().map_err(overloaded)?;
        let route = match routed {
            Some(route) => route,
            None => self.admit(request, &mut record.node)?,
        };
        match route {
            Route::Edge {
                agent,
                node,
                dialled,
            } => {
                record.path = Path::Tunnel;
                record.node.clone_from(&node);
                let host = dialled.unwrap_or_else(|| destination.host.clone());
                let dialled = Destination {
                    host,
                    port: destination.port,
                };
                let (halves, early) = self
                    .through_tunnel(&agent, &node, &dialled, deadline, record)
                    .await?;
                Ok((halves, early, permit))
            }
            Route::Elsewhere => {
                record.path = Path::Direct;
                let own = self.own.load();
                let stream = direct::dial(destination, &own, self.mark, deadline).await?;
                let (send, recv) = tcp::halves(stream);
                Ok((Halves::Direct(send, recv), Bytes::new(), permit))
            }
        }
    }

    async fn through_tunnel(
        &self,
        agent: &AgentName,
        node: &str,
        destination: &Destination,
        deadline: Instant,
        record: &mut StreamRecord,
    ) -> Result<(Halves, Bytes), Refusal> {
        let mut tried = Vec::new();
        let mut last = None;
        while tried.len() < TRIES {
            let session = match self.registry.pick(agent) {
                Ok(session) => session,
                Err(absent) => return Err(last.unwrap_or_else(|| no_session(agent, node, absent))),
            };
            // The registry forgets a lost session a moment after it is lost.
            if tried.contains(&session.id) {
                break;
            }
            tried.push(session.id);
            record.session = session.id.to_string();
            match open_on(&session, node, destination, deadline).await {
                Ok(opened) => return Ok(opened),
                Err(Attempt::Final(refusal)) => return Err(refusal),
                Err(Attempt::Lost(refusal)) => last = Some(refusal),
            }
        }
        Err(last.unwrap_or_else(|| no_session(agent, node, Absent::Never)))
    }
}

/// How an attempt on one session failed.
enum Attempt {
    /// Another session would not help.
    Final(Refusal),
    /// The session is lost; nothing of the request was sent.
    Lost(Refusal),
}

fn no_session(agent: &AgentName, node: &str, absent: Absent) -> Refusal {
    let subject = subject(agent, node);
    let reason = Reason::NoSession;
    let sentence = match absent {
        Absent::Never => format!("{subject}: no session since this server started"),
        Absent::Since(lost) => format!(
            "{subject}: no session since {}, last error: {}",
            clock_time(lost.at),
            lost.reason.sentence()
        ),
    };
    Refusal { reason, sentence }
}

fn subject(agent: &AgentName, node: &str) -> String {
    if agent.as_str() == node {
        format!("node {node}")
    } else {
        format!("node {node} (agent {agent})")
    }
}

/// UTC, to the second.
fn clock_time(at: SystemTime) -> String {
    jiff::Timestamp::try_from(at)
        .map(|t| t.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
        .unwrap_or_default()
}

async fn open_on(
    session: &Arc<LiveSession<QuicSession>>,
    node: &str,
    destination: &Destination,
    deadline: Instant,
) -> Result<(Halves, Bytes), Attempt> {
    let subject = subject(&session.agent, node);
    let silent = || {
        let silence = session.liveness.silence().as_secs();
        let detail = format!("the agent was last heard {silence} s ago");
        Attempt::Final(Refusal::detailed(&subject, Reason::Timeout, &detail))
    };
    let ended = |error: StreamError| {
        // Only a requester cancels; an agent owes a reply to each header.
        let reason = Some(error.reason()).filter(|reason| *reason != Reason::Cancelled);
        let reason = reason.unwrap_or(Reason::Protocol);
        let refusal = Refusal::detailed(&subject, reason, &error.to_string());
        match error {
            StreamError::Session(_) => Attempt::Lost(refusal),
            StreamError::Reset(_) => Attempt::Final(refusal),
        }
    };
    let carried = Carried::new(session);
    let opened = timeout_at(deadline, session.transport.open())
        .await
        .map_err(|_late| silent())?;
    let (mut send, recv) = opened.map_err(|e| ended(StreamError::Session(e)))?;
    let left = deadline.saturating_duration_since(Instant::now());
    let header = StreamHeader {
        destination: destination.clone(),
        deadline: left.min(AGENT_DIAL),
        trace: String::new(),
    };
    let mut reader = FrameReader::new(recv);
    let exchange = async {
        send.write_chunk(encode(&header.to_pb()))
            .await
            .map_err(ended)?;
        read_frame_within::<pb::StreamReply, _>(&mut reader, left)
            .await
            .map_err(|error| match error {
                ReadFrameError::Stream(error) => ended(error),
                ReadFrameError::Timeout(_) => silent(),
                ReadFrameError::Frame(error) => {
                    let refusal = Refusal::detailed(&subject, Reason::Protocol, &error.to_string());
                    Attempt::Final(refusal)
                }
            })
    };
    let reply = timeout_at(deadline, exchange)
        .await
        .map_err(|_late| silent())??;
    match StreamReply::from(&reply) {
        Ok(()) => {
            let (recv, early) = reader.into_parts();
            Ok((Halves::Tunnel(carried, send, recv), early))
        }
        Err((reason, detail)) => {
            // An agent speaks of its dial and of itself, not of the requester's credentials.
            let reason = if reason.is_of_agent() {
                reason
            } else {
                Reason::Protocol
            };
            let detail = if detail.is_empty() {
                String::new()
            } else {
                format!("{destination}: {detail}")
            };
            Err(Attempt::Final(Refusal::detailed(&subject, reason, &detail)))
        }
    }
}

impl Opened {
    /// Relays between the requester's connection and the destination until both are done, and records the end.
    /// `from_requester` is what was already read behind the request. After [`RelayEnd::Cut`] the caller makes `io` end
    /// abnormally.
    pub async fn relay<I: AsyncRead + AsyncWrite + Unpin + Send>(
        self,
        io: &mut I,
        from_requester: Bytes,
    ) -> RelayEnd {
        self.relay_until(io, from_requester, pending()).await
    }

    /// As [`Opened::relay`], for a frontend that may have a reason of its own to cut: `stop` resolves with it.
    pub async fn relay_until<I: AsyncRead + AsyncWrite + Unpin + Send>(
        self,
        io: &mut I,
        from_requester: Bytes,
        stop: impl Future<Output = Reason> + Send,
    ) -> RelayEnd {
        let Self {
            forwarder,
            halves,
            from_tunnel,
            mut record,
            _permit,
        } = self;
        let settings = Relay {
            local: Local::Requester,
            budget: forwarder.budget.clone(),
            half_open: forwarder.timeouts.half_open,
            counters: Arc::clone(&record.counters),
        };
        let early = Early {
            from_local: from_requester,
            from_tunnel,
        };
        let session = match &halves {
            Halves::Tunnel(carried, ..) => Some(Arc::clone(&carried.0)),
            Halves::Direct(..) => None,
        };
        let lost = async {
            match &session {
                Some(session) => session_over(&session.transport).await,
                None => pending().await,
            }
        };
        let cut = async {
            tokio::select! {
                () = forwarder.cut.cancelled() => Reason::Draining,
                reason = lost => reason,
                reason = stop => reason,
            }
        };
        let end = match halves {
            Halves::Tunnel(_carried, mut send, mut recv) => {
                relay(&settings, (&mut send, &mut recv), io, early, cut).await
            }
            Halves::Direct(mut send, mut recv) => {
                relay(&settings, (&mut send, &mut recv), io, early, cut).await
            }
        };
        let outcome = match end {
            RelayEnd::Finished => Outcome::Ok,
            RelayEnd::Cut(reason) => Outcome::Failed(reason),
        };
        record.end(outcome, "");
        end
    }
}
