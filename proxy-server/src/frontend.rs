//! How requests come in. Each frontend reads its own kind of request, asks [`crate::serve::Forwarder`] for a stream,
//! answers in its own words and hands the connection over.

pub mod credentials;
pub mod forward_proxy;
pub mod http_connect;
pub mod intercept;
mod io;
pub mod konnectivity;
pub mod policy;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
pub use io::Io;
use proto::Reason;
use rustls::ServerConfig;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use self::policy::{Requester, Who};
use crate::metrics::Metrics;

/// TLS of a frontend; swapped when certificates or the operator's CA change.
pub type LiveTls = Arc<ArcSwap<ServerConfig>>;

/// Does the TLS handshake and says who the requester is; a Unix connection has none and is known by its credentials.
/// Where a certificate is optional and none came, that is still [`Who::Unproved`].
///
/// # Errors
/// Why not; it is logged and counted here.
pub async fn handshake(
    stream: daemon::Stream,
    peer: &daemon::Peer,
    tls: Option<&LiveTls>,
    limit: Duration,
    metrics: &Metrics,
) -> Result<(Io, Requester), Reason> {
    let requester = Requester::new(peer);
    let Some(tls) = tls else {
        return Ok((Io::Plain(stream), requester));
    };
    let acceptor = TlsAcceptor::from(tls.load_full());
    let refused = |reason: Reason, detail: &str| {
        metrics.requester_refused(reason);
        tracing::info!(target: "audit", %peer, reason = reason.label(), detail, "requester refused");
        reason
    };
    let stream = match timeout(limit, acceptor.accept(stream)).await {
        Err(_elapsed) => return Err(refused(Reason::Timeout, "no TLS handshake in time")),
        Ok(Err(error)) => {
            let failure = certs::HandshakeFailure::of(&error);
            return Err(refused(Reason::Tls, failure.sentence()));
        }
        Ok(Ok(stream)) => stream,
    };
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let requester = if chain.is_empty() {
        requester
    } else {
        requester.proved(Who::Client(certs::holder(chain)))
    };
    Ok((Io::Tls(Box::new(stream)), requester))
}
