//! How a session with another server comes up, and what is done while it lasts. When that is, is the affair of the
//! supervisor of its address.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use certs::{Own, SERVER_SNI};
use daemon::Tasks;
use parking_lot::Mutex;
use proto::control::{Control, ControlError, GoAway, HANDSHAKE, Heard, Liveness, Quiet};
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::{Endpoint, QuicError, QuicSession, Tuning};
use proto::transport::{Session, SessionError};
use proto::wire::{Accepted, AgentState, Announcement, HandshakeError, Offer};
use proto::{Reason, ServerName};
use quinn::crypto::rustls::QuicClientConfig;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::supervisor::Supervisor;
use super::{Members, PeerSession, Peers, SETTLE};
use crate::backend::Backend;
use crate::registry::Doubt;

/// How often it is looked at whether a session that is to go is still used.
const LOOK: Duration = Duration::from_secs(1);
/// A session that is to go still serves for so long, should its agents be nowhere else yet.
const LINGER: Duration = Duration::from_secs(10);

/// What dials other servers.
pub(crate) struct Dialler {
    pub(crate) peers: Arc<Peers<QuicSession>>,
    /// Whose sessions are asked for a sign of life when another server has a newer one.
    pub(crate) backend: Arc<Backend>,
    pub(crate) own: Own,
    pub(crate) tls: Arc<QuicClientConfig>,
    pub(crate) tuning: Tuning,
    pub(crate) keepalive: Keepalive,
    pub(crate) offer: Offer<ServerName>,
    /// Owner of the sessions.
    pub(crate) sessions: Tasks,
}

/// Why a dial brought no session.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("dial {0}")]
    Quic(SocketAddr, #[source] QuicError),
    #[error("no answer of {0} in time")]
    Timeout(SocketAddr),
    #[error("read the certificate of {0}")]
    Certificate(SocketAddr, #[source] certs::PeerError),
    #[error("read the name in the certificate of {0}")]
    Name(SocketAddr, #[source] proto::IdError),
    #[error("agree with {0}")]
    Control(SocketAddr, #[source] ControlError),
    #[error("{address} calls itself {claimed} but its certificate says {certified}")]
    Identity {
        address: SocketAddr,
        claimed: ServerName,
        certified: String,
    },
    #[error("{0} leads to this very server")]
    Ourselves(SocketAddr),
    #[error("{0} leads to {1}, which has a session already")]
    Twin(SocketAddr, ServerName),
}

impl DialError {
    pub(super) const fn reason(&self) -> Reason {
        match self {
            Self::Quic(_, QuicError::Dial { source, .. }) => source.reason(),
            Self::Quic(..) => Reason::Unreachable,
            Self::Timeout(_) => Reason::Timeout,
            Self::Certificate(..) | Self::Name(..) => Reason::Tls,
            Self::Control(_, error) => error.reason(),
            Self::Identity { .. } => Reason::IdentityMismatch,
            Self::Ourselves(_) | Self::Twin(..) => Reason::Replaced,
        }
    }

    /// How long the other server asked to stay away.
    pub(super) const fn retry_after(&self) -> Duration {
        match self {
            Self::Control(
                _,
                ControlError::Handshake(HandshakeError::Refused { retry_after_ms, .. }),
            ) => Duration::from_millis(*retry_after_ms as u64),
            Self::Quic(..)
            | Self::Timeout(_)
            | Self::Certificate(..)
            | Self::Name(..)
            | Self::Control(..)
            | Self::Identity { .. }
            | Self::Ourselves(_)
            | Self::Twin(..) => Duration::ZERO,
        }
    }
}

/// Where a session stands, for its supervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    Up,
    /// Its server wants it gone, and not come again for so long.
    Told(Duration),
    Ended(Reason),
}

/// A session that is held; once dropped it runs out.
pub(super) struct Held {
    pub(super) session: Arc<PeerSession<QuicSession>>,
    pub(super) phase: watch::Receiver<Phase>,
    leave: CancellationToken,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.leave.cancel();
    }
}

impl Dialler {
    /// Starts a supervisor for each member as it becomes known, for ever.
    #[expect(clippy::infinite_loop, reason = "ended by being dropped")]
    pub(crate) async fn run(self: Arc<Self>, mut members: Members, tasks: Tasks) -> Infallible {
        let patience = Arc::clone(&self.peers);
        tasks.spawn("settling", async move {
            sleep(SETTLE).await;
            patience.settle();
        });
        let mut running: BTreeMap<SocketAddr, CancellationToken> = BTreeMap::new();
        loop {
            let wanted = members.next().await;
            self.peers.expect(&wanted);
            running.retain(|address, unwanted| {
                let stays = wanted.contains(address);
                if !stays {
                    unwanted.cancel();
                }
                stays
            });
            for address in wanted {
                running.entry(address).or_insert_with(|| {
                    let unwanted = CancellationToken::new();
                    let supervisor = Supervisor::new(&self, address, &unwanted);
                    tasks.spawn("peer", supervisor.run());
                    unwanted
                });
            }
        }
    }

    /// Opens a session and runs it in a task of its own. `was_twin_of` is the server that the address led to when another
    /// address did as well.
    pub(super) async fn open(
        self: &Arc<Self>,
        address: SocketAddr,
        was_twin_of: Option<&ServerName>,
    ) -> Result<Held, DialError> {
        let dial = Endpoint::dial(address, SERVER_SNI, Arc::clone(&self.tls), self.tuning);
        let transport = timeout(HANDSHAKE, dial)
            .await
            .map_err(|_elapsed| DialError::Timeout(address))?
            .map_err(|error| DialError::Quic(address, error))?;
        let server = self
            .identify(&transport, address, was_twin_of)
            .inspect_err(|error| transport.close(error.reason()))?;
        let (control, accepted) = Control::dial(transport.clone(), &self.offer)
            .await
            .map_err(|error| DialError::Control(address, error))?;
        if accepted.peer != server {
            transport.close(Reason::IdentityMismatch);
            let (claimed, certified) = (accepted.peer, server.to_string());
            return Err(DialError::Identity {
                address,
                claimed,
                certified,
            });
        }
        Ok(self.start(address, transport, control, accepted))
    }

    /// Who the certificate says that is, if there is to be a session with it.
    fn identify(
        &self,
        transport: &QuicSession,
        address: SocketAddr,
        was_twin_of: Option<&ServerName>,
    ) -> Result<ServerName, DialError> {
        let chain = transport.peer_certificates();
        let peer = certs::peer(&chain).map_err(|error| DialError::Certificate(address, error))?;
        if chain.first() == self.own.credential.load().chain().first() {
            return Err(DialError::Ourselves(address));
        }
        let name = peer.identity.name.as_str().parse::<ServerName>();
        let server = name.map_err(|error| DialError::Name(address, error))?;
        let all = self.peers.all();
        let others = all
            .iter()
            .filter(|other| other.server == server && other.address != address)
            .map(|other| Other {
                same: other.transport.peer_certificates().first() == chain.first(),
                suspect: other.is_suspect(),
            });
        match kinship(others, was_twin_of == Some(&server)) {
            Kinship::Twin => return Err(DialError::Twin(address, server)),
            Kinship::Namesake => say_one_name(address, &server),
            Kinship::None if server == self.offer.agent => say_one_name(address, &server),
            Kinship::None => {}
        }
        Ok(server)
    }

    fn start(
        self: &Arc<Self>,
        address: SocketAddr,
        transport: QuicSession,
        control: Control<QuicSession>,
        accepted: Accepted<ServerName>,
    ) -> Held {
        let since = Duration::from_secs(self.own.clock.now().as_secs());
        let session = Arc::new(PeerSession {
            id: accepted.session,
            server: accepted.peer,
            address,
            transport,
            liveness: Liveness::new(self.keepalive),
            control: control.handle(),
            since: UNIX_EPOCH + since,
            software: accepted.software,
            going: AtomicBool::new(false),
            doubt: Doubt::default(),
            streams: AtomicUsize::new(0),
            table: Mutex::default(),
        });
        let (say, phase) = watch::channel(Phase::Up);
        let leave = CancellationToken::new();
        let run = Arc::clone(self).live(Arc::clone(&session), control, say, leave.clone());
        self.sessions.spawn("peer session", run);
        Held {
            session,
            phase,
            leave,
        }
    }

    /// A session until its end.
    async fn live(
        self: Arc<Self>,
        session: Arc<PeerSession<QuicSession>>,
        control: Control<QuicSession>,
        phase: watch::Sender<Phase>,
        leave: CancellationToken,
    ) {
        let (address, server) = (session.address, &session.server);
        tracing::info!(%server, session = session.id, %address, software = session.software, "peer up");
        let entered = self.peers.enter(Arc::clone(&session));
        let on = |heard| match heard {
            Heard::GoAway(GoAway {
                retry_after,
                reason,
                detail,
                ..
            }) => {
                // Once: a server may send as many as it likes.
                if !session.going.swap(true, Ordering::Relaxed) {
                    tracing::info!(%server, session = session.id, reason = reason.label(), detail, "the peer goes away");
                    phase.send_replace(Phase::Told(retry_after));
                }
            }
            Heard::Announcement(announcement) => self.hear(&session, announcement),
            // Said to agents.
            Heard::Servers(_) => {}
        };
        // Pinned out here: its control stream must not be reset before the session is closed with the reason.
        let mut run = pin!(control.run_with(&session.liveness, on, Quiet));
        let end = tokio::select! {
            end = &mut run => end,
            // Only the side that dials opens streams.
            Ok(_) = session.transport.accept() => SessionError::Local(Reason::Protocol),
            reason = run_out(&session, &leave) => SessionError::Local(reason),
        };
        let reason = end.reason();
        session.transport.close(reason);
        drop(entered);
        let metrics = &self.peers.metrics;
        metrics.ended.get_or_create(&reason.into()).inc();
        tracing::info!(%server, session = session.id, %address, reason = reason.label(), "peer down");
        phase.send_replace(Phase::Ended(reason));
        session.transport.flush(LOOK).await;
    }

    fn hear(&self, session: &PeerSession<QuicSession>, announcement: Announcement) {
        // The first telling is of sessions that may be older than ours.
        if session.table.lock().is_complete() {
            let came = |(_, state): &&(_, AgentState)| *state == AgentState::Session;
            for (agent, _) in announcement.agents.iter().filter(came) {
                self.backend.probe_all(agent);
            }
        }
        if let Err(excess) = self.peers.hear(session, announcement) {
            tracing::error!(server = %session.server, %excess, "a peer is left");
            session.transport.close(Reason::Overloaded);
        }
    }
}

/// A session, by another address, with a server of the name that the dialled one has.
#[derive(Debug, Clone, Copy)]
struct Other {
    /// Its certificate is the very same one.
    same: bool,
    suspect: bool,
}

/// What a server that was dialled is to those of its name that there are sessions with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kinship {
    None,
    /// It is that one, by another way.
    Twin,
    /// It is another one.
    Namesake,
}

/// A server renews its certificate while a session that began with the old one lasts, so an address that was seen to
/// lead to the same server still does. A session that is silent may be with a process that is no more.
fn kinship(mut others: impl Iterator<Item = Other> + Clone, was_twin: bool) -> Kinship {
    let alive = |other: &Other| !other.suspect;
    if others.clone().any(|o| alive(&o) && (o.same || was_twin)) {
        Kinship::Twin
    } else if others.any(|o| alive(&o) && !o.same) {
        Kinship::Namesake
    } else {
        Kinship::None
    }
}

fn say_one_name(address: SocketAddr, server: &ServerName) {
    tracing::error!(%address, %server, "two proxy-servers have one name: agents take them for the same one and keep a session with one of them only; set `name`");
}

/// Once told to leave: resolves when no stream is left, after a while in which what is nowhere else may still be asked
/// for here.
async fn run_out<S>(session: &PeerSession<S>, leave: &CancellationToken) -> Reason {
    leave.cancelled().await;
    session.going.store(true, Ordering::Relaxed);
    sleep(LINGER).await;
    while session.streams.load(Ordering::Relaxed) > 0 {
        sleep(LOOK).await;
    }
    Reason::Replaced
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::peer::known::testing::session;

    #[test]
    fn a_renewed_certificate_makes_no_other_server_of_a_second_address() {
        let other = |same, suspect| Other { same, suspect };
        let (same, renewed, silent) = (other(true, false), other(false, false), other(false, true));
        for (others, was_twin, is) in [
            (&[][..], true, Kinship::None),
            (&[same], false, Kinship::Twin),
            (&[renewed, same], false, Kinship::Twin),
            (&[renewed], true, Kinship::Twin),
            (&[renewed], false, Kinship::Namesake),
            // What is silent is taken over from, and may be what was before a restart.
            (&[silent], true, Kinship::None),
            (&[silent], false, Kinship::None),
            (&[other(true, true)], false, Kinship::None),
            (&[silent, renewed], false, Kinship::Namesake),
        ] {
            assert_eq!(kinship(others.iter().copied(), was_twin), is, "{others:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_that_is_to_go_stays_a_while_and_until_its_streams_have_ended() {
        let (idle, _far) = session(1).await;
        let leave = CancellationToken::new();
        leave.cancel();
        let begin = Instant::now();
        assert_eq!(run_out(&idle, &leave).await, Reason::Replaced);
        assert!(begin.elapsed() == LINGER && idle.going.load(Ordering::Relaxed));

        let (busy, _far) = session(2).await;
        busy.streams.store(1, Ordering::Relaxed);
        let waits = timeout(LINGER * 100, run_out(&busy, &leave)).await;
        waits.unwrap_err();
        busy.streams.store(0, Ordering::Relaxed);
        run_out(&busy, &leave).await;
    }
}
