//! Where other servers come in: accept → identity from the certificate → handshake → what it asks for, until it ends.
//!
//! | failure | what happens |
//! | --- | --- |
//! | too many handshakes at once | Retry, then refused |
//! | TLS: no, foreign, expired or wrong-role certificate | refused in the handshake, counted, logged |
//! | no hello in time, garbage, another name | told with a GoAway where it can be read, closed, counted, logged |
//! | more sessions than there can be servers; more than two of one | told to come again; the older ones are closed with `replaced` |
//! | silence for the idle time-out | closed; its streams end with `session_lost` |
//! | it announces agents, opens more streams than it may | not listened to; held back by the transport |

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, UNIX_EPOCH};

use certs::{Clock, Role};
use daemon::Tasks;
use proto::control::{Control, ControlError, HANDSHAKE, Heard, Liveness};
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::{Endpoint, Incoming, QuicSession};
use proto::transport::{Session, SessionError};
use proto::wire::ServerOffer;
use proto::{Reason, ServerName, SessionId};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::announce::Announcer;
use super::{Accepted, ask, members};
use crate::backend::{leaf_schedule, next_to_enter, unix};
use crate::limits::Side;
use crate::serve::Forwarder;

/// Sessions of one server: the one that is used, and the one that takes over from it.
const OF_ONE: usize = 2;
/// Spread of `retry_after`.
const SPREAD: Duration = Duration::from_secs(2);

/// What serves other servers.
#[derive(Debug)]
pub(crate) struct Acceptor {
    pub(crate) forwarder: Arc<Forwarder>,
    /// This server's side of the handshake.
    pub(crate) offer: ServerOffer,
    pub(crate) clock: Clock,
    pub(crate) keepalive: Keepalive,
    /// Cancelled once no session may come about any more.
    pub(crate) stopping: CancellationToken,
    /// Cancelled once no stream is served any more.
    pub(crate) refusing: CancellationToken,
    /// Owner of the sessions.
    pub(crate) tasks: Tasks,
    /// Owner of the streams.
    pub(crate) streams: Tasks,
}

impl Acceptor {
    /// Accepts until the endpoint is closed.
    pub(crate) async fn accept(self: Arc<Self>, endpoint: Endpoint) {
        let overloaded = || self.count_refused(Reason::Overloaded);
        while let Some((incoming, permit)) =
            next_to_enter(&endpoint, Side::Servers, &self.forwarder.limits, overloaded).await
        {
            let acceptor = Arc::clone(&self);
            self.tasks.spawn("peer session", async move {
                // Boxed, so that a session does not keep what only its handshake needs.
                let arrived = Box::pin(acceptor.arrive(incoming)).await;
                drop(permit);
                if let Some((session, control, not_after)) = arrived {
                    acceptor.live(session, control, not_after).await;
                }
            });
        }
    }

    fn count_refused(&self, reason: Reason) {
        let refused = &self.forwarder.peers.metrics.refused;
        refused.get_or_create(&reason.into()).inc();
    }

    /// From the first packet to an accepted hello. `None` once it was refused, which is logged and counted.
    async fn arrive(
        &self,
        incoming: Incoming,
    ) -> Option<(Arc<Accepted<QuicSession>>, Control<QuicSession>, Duration)> {
        let remote = incoming.remote_address();
        let refused = |reason: Reason, server: &str, detail: &str| {
            self.count_refused(reason);
            tracing::info!(target: "audit", %remote, server, reason = reason.label(), detail, "peer refused");
        };
        let transport = match timeout(HANDSHAKE, incoming.handshake()).await {
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
        let Some((server, not_after)) = identity(&transport) else {
            transport.close(Reason::Tls);
            refused(Reason::Tls, "", "no certificate of a server");
            return None;
        };
        match self.greet(&transport, &server).await {
            Ok((control, software, id)) => {
                let session = Accepted {
                    id,
                    server,
                    control: control.handle(),
                    liveness: Liveness::new(self.keepalive),
                    since: UNIX_EPOCH + unix(&self.clock),
                    software,
                    streams: AtomicUsize::new(0),
                    transport,
                };
                Some((Arc::new(session), control, not_after))
            }
            // It has found out that it leads to itself, or to a server that it has a session with.
            Err(error) if error.reason() == Reason::Replaced => None,
            Err(error) => {
                let why = daemon::chain(&error).to_string();
                refused(error.reason(), server.as_str(), &why);
                None
            }
        }
    }

    async fn greet(
        &self,
        transport: &QuicSession,
        server: &ServerName,
    ) -> Result<(Control<QuicSession>, String, SessionId), ControlError> {
        let (control, hello) = Control::accept(transport.clone()).await?;
        let full = self.forwarder.peers.accepted().len() >= OF_ONE * members::MOST;
        let why = match (self.stopping.is_cancelled(), full) {
            (true, _) => Some((Reason::Draining, "the proxy-server stops")),
            (false, true) => Some((Reason::Overloaded, "too many proxy-servers")),
            (false, false) => None,
        };
        if let Some((reason, detail)) = why {
            let retry_after = SPREAD.mul_f64(rand::random());
            control.refuse(reason, detail.to_owned(), retry_after).await;
            return Err(ControlError::Session(SessionError::Local(reason)));
        }
        let id = SessionId::random();
        let now = i64::try_from(unix(&self.clock).as_millis()).unwrap_or(i64::MAX);
        let (control, accepted) = control.answer(&hello, server, &self.offer, id, now).await?;
        Ok((control, accepted.software, id))
    }

    /// A session until its end.
    async fn live(
        self: Arc<Self>,
        session: Arc<Accepted<QuicSession>>,
        control: Control<QuicSession>,
        not_after: Duration,
    ) {
        let (server, remote) = (&session.server, session.remote());
        tracing::info!(%server, session = %session.id, %remote, software = session.software, "peer came in");
        let peers = &self.forwarder.peers;
        let (entered, older) = peers.came_in(Arc::clone(&session));
        // Of the same server's older ones only the newest may run out beside it.
        for old in older.iter().rev().skip(OF_ONE - 1) {
            old.transport.close(Reason::Replaced);
        }
        if self.stopping.is_cancelled() {
            // Whoever told the others to go did not see this one.
            session.transport.close(Reason::Draining);
        }
        let announcer = Announcer::new(&self.forwarder.registry, &peers.metrics);
        let on = |heard| {
            if let Heard::GoAway(away) = heard {
                tracing::debug!(%server, session = %session.id, reason = away.reason.label(), "the peer goes away");
            }
        };
        // Pinned out here: its control stream must not be reset before the session is closed with the reason.
        let mut run = pin!(control.run_with(&session.liveness, on, announcer));
        let end = tokio::select! {
            end = &mut run => end,
            never = self.serve(&session) => match never {},
            reason = self.outlived(&session, not_after) => {
                session.transport.close(reason);
                SessionError::Local(reason)
            }
        };
        let reason = end.reason();
        drop(entered);
        peers.metrics.ended.get_or_create(&reason.into()).inc();
        tracing::info!(%server, session = %session.id, %remote, reason = reason.label(), "peer went");
    }

    /// Serves the streams that the other server opens, each in a task of its own. The transport bounds how many there are.
    #[expect(clippy::infinite_loop, reason = "ends with its session")]
    async fn serve(
        self: &Arc<Self>,
        session: &Arc<Accepted<QuicSession>>,
    ) -> std::convert::Infallible {
        loop {
            let Ok(halves) = session.transport.accept().await else {
                // The control stream says how the session ended.
                std::future::pending().await
            };
            let serve = ask::serve(Arc::clone(self), Arc::clone(session), halves);
            self.streams.spawn("peer stream", serve);
        }
    }

    /// Resolves when the session is older than its leaf may be.
    async fn outlived(&self, session: &Accepted<QuicSession>, not_after: Duration) -> Reason {
        let (told, closed) = leaf_schedule(unix(&self.clock), not_after);
        sleep(told).await;
        session.go_away(Reason::CertificateExpired, closed - told, Duration::ZERO);
        sleep(closed - told).await;
        Reason::CertificateExpired
    }

    /// Tells every server to go, for the drain.
    pub(crate) fn go_away(&self, deadline: Duration) {
        self.stopping.cancel();
        for session in self.forwarder.peers.accepted() {
            session.go_away(Reason::Draining, deadline, SPREAD.mul_f64(rand::random()));
        }
    }

    /// Closes every session, at the end of the drain.
    pub(crate) fn close_all(&self) {
        for session in self.forwarder.peers.accepted() {
            session.transport.close(Reason::Draining);
        }
    }
}

/// Who the certificate says this is, and until when. The verifier has checked the role already; that it is asked again
/// keeps this file right on its own.
fn identity(transport: &QuicSession) -> Option<(ServerName, Duration)> {
    let peer = certs::peer(&transport.peer_certificates()).ok()?;
    if peer.identity.role != Role::Server {
        return None;
    }
    let server = peer.identity.name.as_str().parse().ok()?;
    Some((server, Duration::from_secs(peer.not_after.as_secs())))
}
