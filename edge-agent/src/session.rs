//! One live session: its control stream, the streams that the server opens, and how it is left.
//!
//! A session is left in one of four ways: it ends (line, server); the server says GoAway and closes it later; a newer
//! session takes over and this one runs out; or its certificate ended an hour ago.

mod open;
mod terms;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use certs::{Own, UnixTime};
use daemon::Tasks;
pub(crate) use open::open;
use proto::control::{Control, ControlHandle, GoAway, Heard, Liveness, Quiet};
use proto::transport::keepalive::{Keepalive, Verdict};
use proto::transport::quic::{QuicSession, Tuning};
use proto::transport::{Session, SessionError, SessionStats};
use proto::wire::{Accepted, Offer};
use proto::{LineName, Reason, ServerName, session_over};
pub(crate) use terms::{offer, tuning};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::backoff;
use crate::metrics::AgentMetrics;
use crate::registry::Registry;
use crate::seeker::Standing;
use crate::serve::{Serving, serve};

/// How long a session may outlive its certificate: long sessions end in peace, stolen keys do not last.
const AFTERLIFE: Duration = Duration::from_secs(3600);
/// What a server gets beyond the deadline it named, before this end closes.
const LATE: Duration = Duration::from_secs(5);

/// What opening and running sessions needs.
pub(crate) struct Terms {
    pub(crate) own: Own,
    pub(crate) tls: Arc<quinn::crypto::rustls::QuicClientConfig>,
    pub(crate) tuning: Tuning,
    pub(crate) keepalive: Keepalive,
    pub(crate) offer: Offer,
    pub(crate) serving: Arc<Serving>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) metrics: AgentMetrics,
    pub(crate) sessions: Tasks,
    pub(crate) streams: Tasks,
}

/// Where a session stands, for its supervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It serves, and nobody wants it gone.
    Up,
    /// The server wants it gone. It goes on serving until the server closes it.
    Told(GoAway),
    /// A newer session of the same server has taken over.
    Superseded,
    /// It is over.
    Ended(End),
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) reason: Reason,
    pub(crate) useful: bool,
}

/// A session that is up.
#[derive(Debug)]
pub(crate) struct Live {
    session: QuicSession,
    /// The dedicated line that it goes over.
    line: Option<LineName>,
    control: ControlHandle,
    liveness: Arc<Liveness>,
    accepted: Accepted<ServerName>,
    since: UnixTime,
    started: Instant,
    /// When the certificate it was opened with ends.
    expires_in: Duration,
    served: AtomicU64,
    /// How many servers there are, as this one has said last.
    servers: AtomicU32,
    streams: watch::Sender<usize>,
    phase: watch::Sender<Phase>,
}

async fn run(terms: Arc<Terms>, control: Control<QuicSession>, live: Arc<Live>) {
    let _entered = terms.registry.enter(Arc::clone(&live));
    let end = tokio::select! {
        biased;
        error = control.run_with(&live.liveness, |heard| hear(&terms, &live, heard), Quiet) => error,
        never = accept(&terms, &live) => match never {},
        reason = live.left() => {
            live.session.close(reason);
            SessionError::Local(reason)
        }
    };
    let reason = end.reason();
    let useful = live.is_useful();
    terms
        .metrics
        .session_ends
        .get_or_create(&reason.into())
        .inc();
    tracing::info!(
        server = %live.server(), session = live.id(), line = live.line(), %reason, error = %end,
        streams = live.served.load(Ordering::Relaxed),
        lasted_s = live.started.elapsed().as_secs(), "session over"
    );
    live.phase
        .send_replace(Phase::Ended(End { reason, useful }));
}

fn hear(terms: &Terms, live: &Live, heard: Heard) {
    match heard {
        Heard::GoAway(away) => live.told(away),
        Heard::Servers(servers) => live.servers.store(servers, Ordering::Relaxed),
        // Said between servers.
        Heard::Announcement(_) => return,
    }
    terms.registry.touch();
}

/// Serves the streams that the server opens, each in a task of its own. The transport bounds how many there are.
#[expect(clippy::infinite_loop, reason = "ends with its session")]
async fn accept(terms: &Arc<Terms>, live: &Arc<Live>) -> std::convert::Infallible {
    loop {
        let Ok(halves) = live.session.accept().await else {
            // The control stream says how the session ended.
            std::future::pending().await
        };
        let open = OpenStream::new(live);
        let serving = Arc::clone(&terms.serving);
        terms.streams.spawn("stream", async move {
            let live = &open.0;
            let lost = session_over(&live.session);
            serve(serving, Some(Arc::clone(live)), halves, lost).await;
        });
    }
}

/// Counts one stream for as long as it is open.
#[derive(Debug)]
struct OpenStream(Arc<Live>);

impl OpenStream {
    fn new(live: &Arc<Live>) -> Self {
        live.served.fetch_add(1, Ordering::Relaxed);
        live.streams.send_modify(|open| *open += 1);
        Self(Arc::clone(live))
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0
            .streams
            .send_modify(|open| *open = open.saturating_sub(1));
    }
}

impl Live {
    /// Who is at the other end.
    pub(crate) const fn server(&self) -> &ServerName {
        &self.accepted.peer
    }

    /// The dedicated line that it goes over.
    pub(crate) fn line(&self) -> Option<&str> {
        self.line.as_ref().map(LineName::as_str)
    }

    /// Where it leads and over what: of two that are the same the newer one is kept.
    pub(crate) const fn way(&self) -> (&ServerName, Option<&LineName>) {
        (self.server(), self.line.as_ref())
    }

    /// Where it leads and to which address.
    pub(crate) fn far_end(&self) -> (&ServerName, SocketAddr) {
        (self.server(), self.remote())
    }

    /// The session's id.
    pub(crate) const fn id(&self) -> &str {
        self.accepted.session.as_str()
    }

    /// The server's software.
    pub(crate) const fn software(&self) -> &str {
        self.accepted.software.as_str()
    }

    /// When it came up.
    pub(crate) const fn since(&self) -> UnixTime {
        self.since
    }

    /// Where the server is.
    pub(crate) fn remote(&self) -> SocketAddr {
        self.session.remote_address()
    }

    /// Streams that are open.
    pub(crate) fn streams(&self) -> usize {
        *self.streams.borrow()
    }

    /// The transport's figures.
    pub(crate) fn stats(&self) -> SessionStats {
        self.session.stats()
    }

    /// Whether nothing was heard for too long.
    pub(crate) fn is_suspect(&self) -> bool {
        self.liveness.verdict() != Verdict::Healthy
    }

    /// Where it stands, as it changes.
    pub(crate) fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Waits until no stream is open.
    pub(crate) async fn idle(&self) {
        let mut streams = self.streams.subscribe();
        streams.wait_for(|open| *open == 0).await.ok(); // the sender lives in `self`
    }

    /// What of it bears on whether another server is sought.
    pub(crate) fn standing(&self) -> Standing {
        Standing {
            server: self.server().clone(),
            up: *self.phase.borrow() == Phase::Up,
            servers: self.servers.load(Ordering::Relaxed),
        }
    }

    /// Whether it has shown that its server works for this agent.
    pub(crate) fn is_useful(&self) -> bool {
        let heard_after = self
            .started
            .elapsed()
            .saturating_sub(self.liveness.silence());
        backoff::is_useful(self.served.load(Ordering::Relaxed), heard_after)
    }

    fn told(&self, away: GoAway) {
        tracing::info!(
            server = %self.server(), session = self.id(), line = self.line(), reason = %away.reason, detail = away.detail,
            deadline_ms = millis(away.deadline), retry_after_ms = millis(away.retry_after),
            "server asks to go elsewhere"
        );
        self.phase.send_if_modified(|phase| {
            let is_up = *phase == Phase::Up;
            if is_up {
                *phase = Phase::Told(away);
            }
            is_up
        });
    }

    /// A newer session has taken over: this one runs out.
    pub(crate) fn supersede(&self) {
        self.phase.send_if_modified(|phase| {
            let runs = !matches!(phase, Phase::Superseded | Phase::Ended(_));
            if runs {
                *phase = Phase::Superseded;
            }
            runs
        });
    }

    /// Tells the server that this end stops.
    pub(crate) fn go_away(&self, reason: Reason, deadline: Duration) {
        let detail = String::new();
        self.control.go_away(GoAway {
            reason,
            deadline,
            retry_after: Duration::ZERO,
            detail,
        });
    }

    /// Ends it with all its streams.
    pub(crate) fn close(&self, reason: Reason) {
        self.session.close(reason);
    }

    /// Waits until the server has been told of the end, `most` at the longest.
    pub(crate) async fn flush(&self, most: Duration) {
        self.session.flush(most).await;
    }

    /// How long until the server has certainly read what was sent, a loss or two included.
    pub(crate) fn settled(&self) -> Duration {
        (self.stats().rtt * 4).clamp(Duration::from_millis(100), Duration::from_secs(2))
    }

    /// Resolves with the reason when this end should close the session.
    async fn left(&self) -> Reason {
        let last = self.started + self.expires_in + AFTERLIFE;
        let mut phase = self.phase();
        let mut last = (last, Reason::CertificateExpired);
        loop {
            let now = phase.borrow_and_update().clone();
            match now {
                Phase::Up | Phase::Ended(_) => {}
                Phase::Told(away) => {
                    last = last.min((Instant::now() + away.deadline + LATE, away.reason));
                }
                Phase::Superseded => return self.run_out(last.0).await,
            }
            tokio::select! {
                () = sleep_until(last.0) => return last.1,
                Ok(()) = phase.changed() => {}
            }
        }
    }

    /// Lets the open streams end, until `last`.
    async fn run_out(&self, last: Instant) -> Reason {
        let left = last.saturating_duration_since(Instant::now());
        self.go_away(Reason::Replaced, left);
        sleep(self.settled()).await;
        timeout_at(last, self.idle()).await.ok(); // over time they are cut
        Reason::Replaced
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
