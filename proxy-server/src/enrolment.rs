//! What this server may sign and whom it lets in: the authority, the server's own leaf, the token store, and the TCP
//! listener where agents enrol and renew.

use std::collections::HashSet;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use certs::{
    Clock, Credential, EnrollLimits, EnrollService, Issuer, LiveBundle, LiveCredential, Name, Own,
    Revocations, ServerSans, Store, UnixTime, Vouch,
};
use daemon::{Peer, Stream};
use proto::AgentName;
use rustls::ServerConfig;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::cluster::Tokens;
use crate::config::Config;
use crate::metrics::{CertificateLabels, Metrics};

/// The authority and what follows from it.
#[derive(Debug)]
pub(crate) struct Authority {
    issuer: Arc<Issuer>,
    pub(crate) own: Own,
    pub(crate) store: Store,
    pub(crate) revoked: Revocations,
    name: Name,
    sans: ServerSans,
    shown: PathBuf,
}

impl Authority {
    /// Opens the state directory, making the authority on the first start. The server's leaf is made anew at each
    /// start: its key never touches the disk.
    pub(crate) fn open(config: &Config) -> anyhow::Result<Self> {
        let clock = Clock::system();
        let now = clock.now();
        let dir = config.state_dir.join("ca");
        let issuer = Issuer::load_or_create(&dir, &config.trust_domain, now)
            .with_context(|| format!("open the authority in {}", dir.display()))?;
        let store = Store::open(&config.state_dir)
            .with_context(|| format!("open the token store in {}", config.state_dir.display()))?;
        let name = config.server_name().context("read the server's name")?;
        let sans = ServerSans {
            dns_names: config.certificate.dns_names.clone(),
            ip_addresses: config.certificate.ip_addresses.clone(),
        };
        let credential = issuer
            .issue_server(&name, &sans, now)
            .context("issue the server's certificate")?;
        let own = Own {
            credential: LiveCredential::new(credential),
            bundle: LiveBundle::new(issuer.bundle().clone()),
            clock,
            trust_domain: config.trust_domain.clone(),
        };
        let authority = Self {
            issuer: Arc::new(issuer),
            own,
            store,
            revoked: Revocations::new(),
            name,
            sans,
            shown: config.state_dir.join("server.crt"),
        };
        authority.show();
        Ok(authority)
    }

    /// Keeps the chain, without its key, where `cert show` finds it.
    fn show(&self) {
        let chain = self.own.credential.load().chain_pem();
        if let Err(error) = certs::write_atomic(&self.shown, chain.as_bytes(), certs::MODE_PUBLIC) {
            tracing::warn!(error = %daemon::chain(&error), "could not store the server's certificate; it is used all the same");
        }
    }

    /// Reads revocations and enrolled agents again.
    pub(crate) fn refresh(
        &self,
    ) -> Result<(HashSet<Name>, HashSet<AgentName>), certs::TokenStoreError> {
        let snapshot = self.store.snapshot()?;
        self.revoked.replace(snapshot.revoked.clone());
        let enrolled = snapshot
            .agents
            .keys()
            .filter_map(|name| name.as_str().parse().ok())
            .collect();
        Ok((snapshot.revoked, enrolled))
    }

    /// Sets the expiry gauges.
    pub(crate) fn export(&self, metrics: &Metrics) {
        let set = |certificate, at: UnixTime| {
            let gauge = metrics
                .expiry
                .get_or_create(&CertificateLabels { certificate })
                .clone();
            gauge.set(i64::try_from(at.as_secs()).unwrap_or(i64::MAX));
        };
        set("ca", self.issuer.not_after());
        set("server", self.own.credential.not_after());
    }

    fn renew(&self) -> Result<Credential, certs::IssuerError> {
        self.issuer
            .issue_server(&self.name, &self.sans, self.own.clock.now())
    }

    /// Renews the server's leaf at two thirds of its life, for ever; swapped in place.
    #[expect(clippy::infinite_loop, reason = "ended by being dropped")]
    pub(crate) async fn keep_renewed(self: Arc<Self>, metrics: Arc<Metrics>) -> Infallible {
        let mut failures = 0;
        loop {
            let now = self.own.clock.now().as_secs();
            let current = self.own.credential.load();
            let wait = if failures == 0 {
                let at = current.renew_at(rand::random()).as_secs();
                Duration::from_secs(at.saturating_sub(now))
            } else {
                let left = Duration::from_secs(current.not_after().as_secs().saturating_sub(now));
                certs::retry_after(failures, left, rand::random())
            };
            sleep(wait).await;
            match self.renew() {
                Ok(credential) => {
                    failures = 0;
                    self.own.credential.replace(credential);
                    self.show();
                    self.export(&metrics);
                    tracing::info!("the server's certificate is renewed");
                }
                Err(error) => {
                    failures += 1;
                    tracing::error!(error = %daemon::chain(&error), "could not renew the server's certificate");
                }
            }
        }
    }
}

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
            Arc::clone(&authority.issuer),
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
