//! One request end to end: route → policy → pick → open → header and reply → relay → record.
//!
//! | step | failure | what the requester reads |
//! | --- | --- | --- |
//! | permits | none left | overloaded |
//! | route | two nodes share the address; not at the edge and `refuse` | both names; unknown destination |
//! | policy | the frontend's rules don't permit it | destination, requester: not allowed |
//! | path | by a line and nothing else, and none may be taken | node X: more than one node has that address: … |
//! | dial by a line | refused, unreachable, or silent for a while | the tunnel is tried, too, if that may be (`serve/line.rs`) |
//! | pick | no session, here or at another server | node X: no session since …, last error: … |
//! | open, header | session lost, or another server lacks it | the next way is tried, as no byte of the request is on its way; else session lost |
//! | open, header | no sign of life | the next way is tried beside it (`serve/tunnel.rs`) |
//! | open, header | stream reset, garbage | node X: the agent's reason or protocol; not tried again |
//! | reply | none in time; a reason of the agent | node X: no answer in time; the agent's words |
//! | relay | any | nothing can be said any more: a reset, the reason in log, metric and the next answer |

pub(crate) mod line;
pub(crate) mod open;
pub(crate) mod tunnel;

use std::future::pending;
use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use line::ByLine;
use open::{Ask, Carried};
use proto::transport::quic::{QuicRecv, QuicSend, QuicSession};
use proto::transport::tcp::{self, TcpRecv, TcpSend};
use proto::{
    AgentName, Budget, Destination, Early, Local, Reason, Relay, RelayEnd, relay, session_over,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::cluster::Cluster;
use crate::config::{Elsewhere, Mark, Timeouts};
use crate::error::Refusal;
use crate::frontend::policy::{Policy, Requester};
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::path::{Paths, direct};
use crate::peer::Peers;
use crate::record::{Outcome, Path, StreamRecord};
use crate::registry::Registry;
use crate::route::{Presence, Route, RouteTable};

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
    /// Who else has sessions.
    pub peers: Arc<Peers<QuicSession>>,
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
    /// How nodes are reached.
    pub paths: Paths,
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
    Direct(TcpSend, TcpRecv, Option<ByLine>),
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

    /// Where a destination is now, for a frontend that does so with what is not at the edge.
    ///
    /// # Errors
    /// As [`RouteTable::route`].
    pub fn route(&self, destination: &Destination, elsewhere: Elsewhere) -> Result<Route, Refusal> {
        let presence = |agent: &AgentName| self.presence(agent);
        let (table, cluster) = (self.routing.table.load(), self.routing.cluster.table());
        table.route(destination, &cluster, elsewhere, presence)
    }

    fn presence(&self, agent: &AgentName) -> Presence {
        if self.registry.pick(agent).is_ok() || !self.peers.with_session_of(agent).is_empty() {
            Presence::Present
        } else if self.knows(agent) {
            Presence::Absent
        } else {
            Presence::Unknown
        }
    }

    /// Whether there is such an agent: it enrolled here, or has or had a session, here or at another server.
    pub fn knows(&self, agent: &AgentName) -> bool {
        self.routing.enrolled.load().contains(agent)
            || self.registry.knows(agent)
            || self.peers.knows(agent)
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
        let route = self.route(destination, *elsewhere)?;
        match (&route, elsewhere) {
            (Route::Edge { node: name, .. }, _) => node.clone_from(name),
            (Route::Elsewhere(_), Elsewhere::Direct) => {}
            // Said to whoever may use the frontend at all: a name that is mistyped is no question of rules.
            (Route::Elsewhere(_), Elsewhere::Refuse) => {
                let detail = if self.routing.cluster.is_waiting() {
                    "the cluster's nodes are not known yet"
                } else {
                    ""
                };
                let reason = Reason::UnknownDestination;
                return Err(Refusal::detailed(destination, reason, detail));
            }
        }
        policy.check(requester, destination, &route)?;
        Ok(route)
    }

    async fn try_open(
        &self,
        request: &Request,
        routed: Option<Route>,
        record: &mut StreamRecord,
    ) -> Result<(Halves, Bytes, OwnedSemaphorePermit), Refusal> {
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
                to,
                pod,
            } => {
                record.path = Path::Tunnel;
                record.node.clone_from(&node);
                let ask = Ask {
                    agent,
                    node,
                    destination: to,
                    pod,
                    requester: request.requester.words(),
                    deadline,
                };
                let (halves, early) = self.to_edge(&ask, record).await?;
                Ok((halves, early, permit))
            }
            Route::Elsewhere(to) => {
                record.path = Path::Direct;
                let own = self.own.load();
                let stream = direct::dial(&to, &own, self.mark, deadline).await?;
                let (send, recv) = tcp::halves(stream);
                Ok((Halves::Direct(send, recv, None), Bytes::new(), permit))
            }
        }
    }
}

impl Opened {
    /// Which way it takes.
    #[must_use]
    pub const fn path(&self) -> Path {
        self.record.path
    }

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
            local_buffer: 0,
            half_open: forwarder.timeouts.half_open,
            counters: Arc::clone(&record.counters),
        };
        let early = Early {
            from_local: from_requester,
            from_tunnel,
        };
        let (way, watch) = match &halves {
            Halves::Tunnel(carried, ..) => (Some(carried.0.clone()), None),
            Halves::Direct(.., by_line) => {
                let watched = by_line.as_ref();
                (None, watched.map(|it| (it.watch.clone(), it.key.clone())))
            }
        };
        let lost = async {
            match (&way, &watch) {
                (Some(way), _) => session_over(way.transport()).await,
                (None, Some((watch, key))) => {
                    watch.silent().await;
                    forwarder.paths.suspect(key.clone());
                    Reason::Timeout
                }
                (None, None) => pending().await,
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
            Halves::Direct(mut send, mut recv, _by_line) => {
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
