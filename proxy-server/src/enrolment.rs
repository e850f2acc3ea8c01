//! The TCP listener where agents enrol and renew.

use std::sync::Arc;
use std::time::Duration;

use certs::{EnrollLimits, EnrollService, Vouch};
use daemon::{Peer, Stream};
use rustls::ServerConfig;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::authority::Authority;
use crate::cluster::Tokens;
use crate::config::Config;

/// The enrolment listener's settings.
#[derive(Debug)]
pub(crate) struct Enrolment {
    service: EnrollService,
    tls: Arc<ServerConfig>,
    limit: Duration,
    stop: CancellationToken,
}

impl Enrolment {
    pub(crate) fn new(
        authority: &Authority,
        config: &Config,
        nodes: Option<Tokens>,
        stop: CancellationToken,
    ) -> Result<Self, certs::TlsConfigError> {
        let tls = certs::enroll_server(
            &authority.own,
            &authority.revoked,
            config.backend.renew_grace,
        )?;
        let service = EnrollService::new(
            authority.issuer.clone(),
            authority.store.clone(),
            authority.own.clock.clone(),
            EnrollLimits::default(),
            nodes.map(|nodes| Arc::new(nodes) as Arc<dyn Vouch>),
        );
        Ok(Self {
            service,
            tls,
            limit: config.timeouts.header,
            stop,
        })
    }

    /// Serves one connection.
    pub(crate) async fn serve(self: Arc<Self>, stream: Stream, peer: Peer) {
        let Some(remote) = peer.tcp() else { return };
        let acceptor = TlsAcceptor::from(Arc::clone(&self.tls));
        let stream = match timeout(self.limit, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                let failure = certs::HandshakeFailure::of(&error);
                tracing::info!(target: "audit", %remote, reason = failure.label(), "enrolment refused in the handshake");
                return;
            }
            Err(_elapsed) => {
                tracing::info!(target: "audit", %remote, reason = "timeout", "enrolment refused in the handshake");
                return;
            }
        };
        let stopped = self.stop.clone().cancelled_owned();
        if let Err(error) = self.service.serve_connection(stream, remote, stopped).await {
            tracing::debug!(%remote, error = %daemon::chain(&error), "enrolment connection ended");
        }
    }
}
