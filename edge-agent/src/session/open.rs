//! How a session comes up: QUIC, both identities, the hello, and the server's time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use certs::{Own, SERVER_SNI, UnixTime};
use proto::control::{Control, HANDSHAKE, Liveness};
use proto::transport::Session;
use proto::transport::quic::Endpoint;
use proto::wire::Offer;
use proto::{Reason, ServerName};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::{Live, Phase, Terms, run};
use crate::candidate::Candidate;
use crate::error::OpenError;

/// A server's time that differs by more is worth a warning.
const SKEW_WARNING: u64 = 60;

/// Opens a session with the server at that address and runs it in a task of its own, unless the server turns out to be one
/// that `held` says is not wanted.
pub(crate) async fn open(
    terms: &Arc<Terms>,
    way: &Candidate,
    held: impl Fn(&ServerName) -> bool,
) -> Result<Arc<Live>, OpenError> {
    let address = way.address;
    let expires = terms.own.credential.load().not_after();
    let dial = Endpoint::dial(address, SERVER_SNI, Arc::clone(&terms.tls), terms.tuning);
    let session = timeout(HANDSHAKE, dial)
        .await
        .map_err(|_elapsed| OpenError::Timeout {
            address,
            after: HANDSHAKE,
        })?
        .map_err(|source| OpenError::Quic { address, source })?;
    let server = certs::peer(&session.peer_certificates())
        .map_err(|source| OpenError::Peer { address, source })?;
    let name = server.identity.name.as_str();
    if name.parse().is_ok_and(|name| held(&name)) {
        session.close(Reason::Replaced);
        session.flush(HANDSHAKE).await;
        let server = name.to_owned();
        return Err(OpenError::SameServer { address, server });
    }
    let offer = Offer {
        line: way.line.clone(),
        ..terms.offer.clone()
    };
    let (control, accepted) = Control::dial(session.clone(), &offer)
        .await
        .map_err(|source| OpenError::Control { address, source })?;
    if accepted.peer.as_str() != server.identity.name.as_str() {
        session.close(Reason::IdentityMismatch);
        let (claimed, certified) = (accepted.peer.to_string(), server.identity.name.to_string());
        return Err(OpenError::OtherServer {
            address,
            claimed,
            certified,
        });
    }
    observe_time(&terms.own, accepted.server_time_ms, &server);
    let now = terms.own.clock.now();
    let live = Arc::new(Live {
        servers: AtomicU32::new(accepted.servers),
        control: control.handle(),
        liveness: Liveness::new(terms.keepalive),
        accepted,
        since: now,
        started: Instant::now(),
        expires_in: Duration::from_secs(expires.as_secs().saturating_sub(now.as_secs())),
        served: AtomicU64::new(0),
        streams: watch::Sender::new(0),
        phase: watch::Sender::new(Phase::Up),
        line: offer.line,
        session,
    });
    terms.metrics.sessions_opened.inc();
    tracing::info!(
        server = %live.server(), session = live.id(), remote = %address, line = live.line(),
        version = live.software(), "session up"
    );
    let run = run(Arc::clone(terms), control, Arc::clone(&live));
    terms.sessions.spawn("session", run);
    Ok(live)
}

/// Believed only now, as the server has proved who it is.
fn observe_time(own: &Own, server_time_ms: i64, server: &certs::Peer) {
    let Ok(millis) = u64::try_from(server_time_ms) else {
        return;
    };
    let told = UnixTime::since_unix_epoch(Duration::from_millis(millis));
    let skew_seconds = own.clock.observe(told, server);
    if skew_seconds.unsigned_abs() > SKEW_WARNING {
        tracing::warn!(skew_seconds, "this host's clock differs from the server's");
    }
}
