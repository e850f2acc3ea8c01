//! Where agents come in: accept → identity from the certificate → handshake → register → until it ends.
//!
//! | failure | what happens |
//! | --- | --- |
//! | too many handshakes at once | Retry, then refused |
//! | TLS: no, foreign, expired, revoked or wrong-role certificate | refused in the handshake, counted, logged once |
//! | no hello in time, garbage, another name | told with a GoAway where the peer can read, closed, counted, logged once |
//! | the Node that the certificate is for was deleted | GoAway with `node_gone`; an open session is closed |
//! | more sessions a second than the limit, or too many of one agent | GoAway with `retry_after` |
//! | silence for the idle time-out | closed; its streams end with `session_lost` |
//! | the leaf is over by an hour | closed with `certificate_expired` |

use std::convert::Infallible;
use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use certs::{Clock, HandshakeFailure, Name, Peer, Revocations, Role};
use daemon::Tasks;
use parking_lot::Mutex;
use proto::control::{Control, ControlError, GoAway, Liveness};
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::{Endpoint, Incoming, QuicSession};
use proto::transport::{Session, SessionError};
use proto::wire::{Accepted, Limits as StreamLimits, ServerOffer};
use proto::{AgentName, Reason, SessionId};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::cluster::{Standing, Verdict};
use crate::limits::{Knock, Limits, Side};
use crate::registry::{Doubt, LiveSession, Loss, Lost, Rank};
use crate::serve::Forwarder;

/// A session may outlive its leaf by this: the agent opens one with the new leaf long before.
const LEAF_GRACE: Duration = Duration::from_secs(3600);
/// Once a newer session of an agent is there, an older one that does not answer within this is dead.
const PROBE: Duration = Duration::from_secs(5);
/// Spread of `retry_after`, so that those who were sent away do not come back together.
pub(crate) const RETRY_SPREAD: Duration = Duration::from_secs(5);
/// The same where only those come whom a balancer has led to a server that stops: the next one is an attempt away.
const NEXT_SPREAD: Duration = Duration::from_millis(500);
/// How often it is looked whether agents have come to another server.
const LOOK: Duration = Duration::from_millis(100);

/// What serves agents.
#[derive(Debug)]
pub struct Backend {
    /// Registry, limits and metrics.
    pub forwarder: Arc<Forwarder>,
    /// This server's side of the handshake.
    pub offer: ServerOffer,
    /// The server's time.
    pub clock: Clock,
    /// Liveness of sessions.
    pub keepalive: Keepalive,
    /// Most sessions of one agent.
    pub sessions_per_agent: usize,
    /// Servers that agents may go to, as it changes; they are told.
    pub servers: watch::Receiver<u32>,
    /// Agents that are refused.
    pub revoked: Revocations,
    /// Knows the nodes of certificates, where a cluster is asked.
    pub(crate) standing: Option<Arc<Standing>>,
    /// Cancelled once no session may come about any more.
    pub stopping: CancellationToken,
    /// Owner of session tasks.
    pub tasks: Tasks,
}

impl Backend {
    /// Accepts until the endpoint is closed.
    pub async fn accept(self: Arc<Self>, endpoint: Endpoint) {
        let refused = || self.forwarder.metrics.refused(Reason::Overloaded);
        while let Some((incoming, permit)) =
            next_to_enter(&endpoint, Side::Agents, &self.forwarder.limits, refused).await
        {
            let backend = Arc::clone(&self);
            self.tasks.spawn("session", async move {
                // Boxed, so that a session does not keep what only its handshake needs.
                let arrived = Box::pin(backend.arrive(incoming)).await;
                drop(permit);
                if let Some((session, control)) = arrived {
                    backend.live(session, control).await;
                }
            });
        }
    }

    /// From the first packet to an accepted hello. `None` once the peer was refused, which is logged and counted.
    async fn arrive(
        &self,
        incoming: Incoming,
    ) -> Option<(Arc<LiveSession<QuicSession>>, (Control<QuicSession>, Peer))> {
        let remote = incoming.remote_address();
        let refused = |reason: Reason, agent: &str, detail: &str| {
            self.forwarder.metrics.refused(reason);
            tracing::info!(target: "audit", %remote, agent, reason = reason.label(), detail, "session refused");
        };
        let transport = match timeout(proto::control::HANDSHAKE, incoming.handshake()).await {
            Ok(Ok(transport)) => transport,
            Ok(Err(error)) => {
                refused(error.reason(), "", &error.to_string());
                return None;
            }
            Err(_elapsed) => {
                refused(Reason::Timeout, "", "no handshake in time");
                return None;
            }
        };
        let (peer, agent) = match identity(&transport) {
            Ok(known) => known,
            Err(failure) => {
                transport.close(Reason::Tls);
                refused(Reason::Tls, "", failure.sentence());
                return None;
            }
        };
        match self.greet(&transport, &agent, &peer).await {
            Ok((control, accepted, id)) => {
                let stable = self.forwarder.paths.settings.stable;
                let line = accepted.line.map(|name| {
                    let registry = &self.forwarder.registry;
                    registry.over_line(&agent, name, stable)
                });
                let session = LiveSession {
                    id,
                    agent,
                    node_uid: peer.node_uid.clone(),
                    line,
                    instance: accepted.instance,
                    kind: "quic",
                    liveness: Liveness::new(self.keepalive),
                    control: control.handle(),
                    since: std::time::UNIX_EPOCH + unix(&self.clock),
                    software: accepted.software,
                    going: AtomicBool::new(false),
                    probed: AtomicBool::new(false),
                    doubt: Doubt::default(),
                    streams: AtomicUsize::new(0),
                    loss: Mutex::new(Loss::new(Instant::now())),
                    transport,
                };
                Some((Arc::new(session), (control, peer)))
            }
            // It has a session here, and sought another server.
            Err(error) if error.reason() == Reason::Replaced => None,
            Err(error) => {
                refused(
                    error.reason(),
                    agent.as_str(),
                    &daemon::chain(&error).to_string(),
                );
                None
            }
        }
    }

    async fn greet(
        &self,
        transport: &QuicSession,
        agent: &AgentName,
        peer: &Peer,
    ) -> Result<(Control<QuicSession>, Accepted<AgentName>, SessionId), ControlError> {
        let (control, hello) = Control::accept(transport.clone()).await?;
        if self.stopping.is_cancelled() {
            let spread = if self.is_alone() {
                RETRY_SPREAD
            } else {
                NEXT_SPREAD
            };
            let retry_after = spread.mul_f64(rand::random());
            control
                .refuse(
                    Reason::Draining,
                    "the proxy-server stops".to_owned(),
                    retry_after,
                )
                .await;
            return Err(ControlError::Session(SessionError::Local(Reason::Draining)));
        }
        if let Err(wait) = self.forwarder.limits.admit(agent) {
            let retry_after = wait + RETRY_SPREAD.mul_f64(rand::random());
            let detail = "too many agents at once".to_owned();
            control
                .refuse(Reason::Overloaded, detail, retry_after)
                .await;
            return Err(ControlError::Session(SessionError::Local(
                Reason::Overloaded,
            )));
        }
        if let (Some(standing), Some(uid)) = (&self.standing, &peer.node_uid)
            && standing.verdict(agent.as_str(), uid).await == Verdict::Gone
        {
            let detail = Reason::NodeGone.sentence().to_owned();
            let retry_after = RETRY_SPREAD.mul_f64(rand::random());
            control.refuse(Reason::NodeGone, detail, retry_after).await;
            return Err(ControlError::Session(SessionError::Local(Reason::NodeGone)));
        }
        let id = SessionId::random();
        let now = i64::try_from(unix(&self.clock).as_millis()).unwrap_or(i64::MAX);
        let servers = *self.servers.borrow();
        let offer = ServerOffer {
            servers,
            ..self.offer.clone()
        };
        let (control, accepted) = control.answer(&hello, agent, &offer, id, now).await?;
        Ok((control, accepted, id))
    }

    /// A registered session until its end.
    async fn live(
        &self,
        session: Arc<LiveSession<QuicSession>>,
        (control, peer): (Control<QuicSession>, Peer),
    ) {
        let metrics = &self.forwarder.metrics;
        let older = self.forwarder.registry.of(&session.agent);
        let registration = self.forwarder.registry.register(Arc::clone(&session));
        metrics.sessions.inc();
        let over_lines = i64::from(session.line.is_some());
        metrics.sessions_over_lines.inc_by(over_lines);
        let remote = session.transport.remote_address();
        tracing::info!(agent = %session.agent, session = %session.id, %remote, line = session.line(), software = session.software, "session up");
        // Revoked or stopping since the handshake: whoever ended the registered sessions did not see this one.
        if self.revoked.contains(&peer.identity.name) {
            session.transport.close(Reason::Revoked);
        } else if self.stopping.is_cancelled() {
            session.transport.close(Reason::Draining);
        }
        self.relieve(&session, older);
        let going = Arc::clone(&session);
        // Pinned out here: its control stream must not be reset before the session is closed with the reason.
        let mut run = pin!(control.run(&session.liveness, move |away| {
            // Once: a peer may send as many as it likes.
            if going.going.swap(true, Ordering::Relaxed) {
                return;
            }
            tracing::info!(agent = %going.agent, session = %going.id, reason = away.reason.label(), detail = away.detail, "the agent goes away");
        }));
        let end = tokio::select! {
            end = &mut run => end,
            reason = self.outlived(&session, &peer) => {
                session.transport.close(reason);
                SessionError::Local(reason)
            }
            never = self.tell_servers(&session) => match never {},
            // Agent-opened streams are reserved (docs/protocol.md section 1).
            Ok(_) = session.transport.accept() => {
                session.transport.close(Reason::Protocol);
                SessionError::Local(Reason::Protocol)
            }
        };
        let reason = end.reason();
        metrics.sessions.dec();
        metrics.sessions_over_lines.dec_by(over_lines);
        metrics.sessions_ended.get_or_create(&reason.into()).inc();
        registration.lost(Lost {
            at: std::time::UNIX_EPOCH + unix(&self.clock),
            reason,
        });
        tracing::info!(agent = %session.agent, session = %session.id, %remote, line = session.line(), reason = reason.label(), "session down");
    }

    /// Tells the agent how many servers there are, whenever that has changed.
    async fn tell_servers(&self, session: &LiveSession<QuicSession>) -> Infallible {
        let mut servers = self.servers.clone();
        loop {
            if servers.changed().await.is_err() {
                return pending().await;
            }
            let now = *servers.borrow_and_update();
            session.control.servers(now);
        }
    }

    /// What a new session means for the older ones of its agent: those that are dead are found out, above the limit the
    /// oldest are told to go, those first in whose place it is, and above twice the limit they are closed, so that no agent
    /// can fill the server.
    fn relieve(
        &self,
        newer: &LiveSession<QuicSession>,
        mut older: Vec<Arc<LiveSession<QuicSession>>>,
    ) {
        let count = older.len() + 1;
        older.sort_by_key(|old| !newer.tells_of(old));
        for (i, old) in older.into_iter().enumerate() {
            // So many would be left if this one and all before it went.
            let left = count - i - 1;
            if left >= 2 * self.sessions_per_agent {
                old.transport.close(Reason::Replaced);
                continue;
            }
            if left >= self.sessions_per_agent {
                old.go_away(GoAway {
                    reason: Reason::Replaced,
                    deadline: LEAF_GRACE,
                    retry_after: Duration::ZERO,
                    detail: "too many sessions of one agent".to_owned(),
                });
            }
            if newer.tells_of(&old) {
                self.probe(old);
            }
        }
    }

    /// Another server has a newer session of that agent: those here that are dead are found out, as in
    /// [`Backend::relieve`]. What that one goes over is not known here, so it tells nothing of those over a line: an agent
    /// that has started anew comes here by itself.
    pub(crate) fn probe_all(&self, agent: &AgentName) {
        let all = self.forwarder.registry.of(agent).into_iter();
        all.filter(|session| session.line.is_none())
            .for_each(|session| self.probe(session));
    }

    /// Closes the session unless a sign of life comes soon: its agent was killed and has started again.
    fn probe(&self, session: Arc<LiveSession<QuicSession>>) {
        if session.probed.swap(true, Ordering::Relaxed) {
            return;
        }
        let before = session.liveness.frames();
        session.control.probe();
        let stopping = self.tasks.stopping();
        self.tasks.spawn("probe", async move {
            tokio::select! {
                () = sleep(PROBE) => {}
                () = stopping.cancelled() => return,
            }
            session.probed.store(false, Ordering::Relaxed);
            if session.liveness.frames() == before {
                session.transport.close(Reason::Replaced);
            }
        });
    }

    /// Resolves when the session is older than its leaf may be.
    async fn outlived(&self, session: &LiveSession<QuicSession>, peer: &Peer) -> Reason {
        let not_after = Duration::from_secs(peer.not_after.as_secs());
        let (told, closed) = leaf_schedule(unix(&self.clock), not_after);
        sleep(told).await;
        session.go_away(GoAway {
            reason: Reason::CertificateExpired,
            deadline: LEAF_GRACE,
            retry_after: Duration::ZERO,
            detail: "the session's certificate is over".to_owned(),
        });
        sleep(closed - told).await;
        Reason::CertificateExpired
    }

    /// Ends the sessions of agents that are revoked.
    pub fn end_revoked(&self, revoked: &std::collections::HashSet<Name>) {
        for session in self.forwarder.registry.all() {
            if Name::parse(session.agent.as_str()).is_ok_and(|name| revoked.contains(&name)) {
                tracing::info!(target: "audit", agent = %session.agent, session = %session.id, "session of a revoked agent ended");
                session.transport.close(Reason::Revoked);
            }
        }
    }

    /// Tells every agent to go, for the drain.
    pub fn go_away(&self, deadline: Duration) {
        self.stopping.cancel();
        for session in self.forwarder.registry.all() {
            session.go_away(GoAway {
                reason: Reason::Draining,
                deadline,
                retry_after: RETRY_SPREAD.mul_f64(rand::random()),
                detail: "the proxy-server stops".to_owned(),
            });
        }
    }

    /// Waits until each agent has a session with another server, too. Where there is no other, and for agents of which
    /// nothing is heard, there is nothing to wait for.
    pub async fn handed_over(&self) {
        let is_elsewhere = |agent: &AgentName| {
            let peers = self.forwarder.peers.with_session_of(agent);
            peers.iter().any(|(rank, ..)| *rank == Rank::Healthy)
        };
        let is_left = || {
            let all = self.forwarder.registry.all();
            all.iter()
                .any(|session| !session.is_suspect() && !is_elsewhere(&session.agent))
        };
        let mut looks = interval(LOOK);
        while !self.is_alone() && is_left() {
            looks.tick().await;
        }
    }

    /// Whether agents have no other server to go to.
    fn is_alone(&self) -> bool {
        *self.servers.borrow() < 2
    }

    /// Closes every session, at the end of the drain.
    pub fn close_all(&self) {
        for session in self.forwarder.registry.all() {
            session.transport.close(Reason::Draining);
        }
    }
}

/// The next connection that may begin its handshake, and its place among those that do; `None` once the endpoint is
/// closed. Those for whom there is none are turned away.
pub(crate) async fn next_to_enter(
    endpoint: &Endpoint,
    side: Side,
    limits: &Limits,
    refused: impl Fn(),
) -> Option<(Incoming, OwnedSemaphorePermit)> {
    loop {
        let incoming = endpoint.accept().await?;
        match limits.knock(side, incoming.is_validated()) {
            Knock::Enter(permit) => return Some((incoming, permit)),
            Knock::Retry => incoming.retry(),
            Knock::Refuse => {
                refused();
                incoming.refuse();
            }
        }
    }
}

/// What the server accepts from an agent.
#[must_use]
pub fn stream_limits(stream_window: u32, max_streams: u32) -> StreamLimits {
    StreamLimits {
        max_streams,
        stream_window: stream_window.into(),
    }
}

/// From now until the agent is told that its leaf is over, and until its session is closed.
pub(crate) fn leaf_schedule(now: Duration, not_after: Duration) -> (Duration, Duration) {
    let told = not_after.saturating_sub(now);
    (
        told,
        told + LEAF_GRACE.saturating_sub(now.saturating_sub(not_after)),
    )
}

pub(crate) fn unix(clock: &Clock) -> Duration {
    Duration::from_secs(clock.now().as_secs())
}

/// Who the certificate says this is. The verifier has checked the role already; that it is asked again keeps this file
/// right on its own.
fn identity(transport: &QuicSession) -> Result<(Peer, AgentName), HandshakeFailure> {
    let peer = certs::peer(&transport.peer_certificates())
        .map_err(|_error| HandshakeFailure::BadCertificate)?;
    if peer.identity.role != Role::Agent {
        return Err(HandshakeFailure::WrongRole);
    }
    let agent = peer
        .identity
        .name
        .as_str()
        .parse()
        .map_err(|_error| HandshakeFailure::WrongName)?;
    Ok((peer, agent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_outlives_its_leaf_by_an_hour_at_most() {
        let minutes = |m: u64| Duration::from_secs(m * 60);
        for (now, not_after, told, closed) in [
            (0, 600, 600, 660),
            (600, 600, 0, 60),
            (630, 600, 0, 30),
            (660, 600, 0, 0),
            (900, 600, 0, 0),
        ] {
            let schedule = leaf_schedule(minutes(now), minutes(not_after));
            assert_eq!(
                schedule,
                (minutes(told), minutes(closed)),
                "{now} {not_after}"
            );
        }
    }
}
