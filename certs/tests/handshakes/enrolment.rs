//! Enrolment and renewal over real connections: what is given, and what is refused and why.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests, where a panic is the report"
)]

mod audit;
mod cluster;
mod connections;
mod limits;
mod renewal;
mod servers;
mod tokens;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use certs::test_ca::{TestCa, now};
use certs::{
    AgentFiles, Ca, Clock, Credential, EnrollError, EnrollLimits, EnrollRequest, EnrollService,
    Enrolled, JoinToken, LiveIssuer, Name, NewToken, Own, Pin, Proof, Revocations,
    ServiceAccountToken, Store, Trust, TrustBundle, TrustDomain, Vouch,
};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

const GRACE: Duration = Duration::from_secs(30 * 86_400);
const HOUR: Duration = Duration::from_secs(3600);

/// A server that enrols, on a port of its own; dropped, it is gone.
struct Server {
    ca: TestCa,
    address: SocketAddr,
    store: Store,
    revoked: Revocations,
    issuer: LiveIssuer,
    _dir: tempfile::TempDir,
    _tasks: JoinSet<()>,
}

impl Server {
    async fn start() -> Self {
        Self::with(TestCa::new(), EnrollLimits::default()).await
    }

    async fn with(ca: TestCa, limits: EnrollLimits) -> Self {
        Self::of_cluster(ca, limits, None).await
    }

    async fn of_cluster(ca: TestCa, limits: EnrollLimits, nodes: Option<Arc<dyn Vouch>>) -> Self {
        Self::serve(ca.issuer().into(), ca, limits, nodes).await
    }

    /// With that authority; its own leaf is of it too.
    async fn start_with(ca: &Ca) -> Self {
        let issuer = Arc::new(ca.issuer(now()).unwrap());
        let ca = TestCa::of_issuer(Arc::clone(&issuer));
        Self::serve(issuer.into(), ca, EnrollLimits::default(), None).await
    }

    async fn serve(
        issuer: LiveIssuer,
        ca: TestCa,
        limits: EnrollLimits,
        nodes: Option<Arc<dyn Vouch>>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let revoked = Revocations::new();
        let own = ca.own(ca.server("s1"));
        let tls = certs::enroll_server(&own, &revoked, GRACE).unwrap();
        let service = EnrollService::new(
            issuer.clone(),
            store.clone(),
            Clock::system(),
            limits,
            nodes,
        );
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, TlsAcceptor::from(tls), service.clone()));
        Self {
            ca,
            address,
            store,
            revoked,
            issuer,
            _dir: dir,
            _tasks: tasks,
        }
    }

    fn token(&self, uses: u32, agents: &str) -> JoinToken {
        let new = NewToken {
            ttl: HOUR,
            uses,
            agents: agents.parse().unwrap(),
        };
        self.store.create_token(&new, now()).unwrap()
    }
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, service: EnrollService) {
    let mut connections = JoinSet::new();
    while let Ok((tcp, remote)) = listener.accept().await {
        let (tls, service) = (tls.clone(), service.clone());
        connections.spawn(async move {
            if let Ok(stream) = tls.accept(tcp).await {
                service
                    .serve_connection(stream, remote, std::future::pending())
                    .await
                    .ok();
            }
        });
    }
}

/// An agent with a state directory of its own.
struct Agent {
    name: Name,
    files: AgentFiles,
    clock: Clock,
    _dir: tempfile::TempDir,
}

impl Agent {
    fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let files = AgentFiles::new(dir.path().join("state"));
        let clock = Clock::with_file(files.clock());
        Self {
            name: Name::parse(name).unwrap(),
            files,
            clock,
            _dir: dir,
        }
    }

    async fn enroll(&self, server: &Server, token: &JoinToken) -> Result<Enrolled, EnrollError> {
        self.enroll_pinned(server.address, server.ca.pin(), token)
            .await
    }

    async fn enroll_trusting(
        &self,
        server: &Server,
        roots: TrustBundle,
        token: &ServiceAccountToken,
    ) -> Result<Enrolled, EnrollError> {
        let proof = Proof::ServiceAccount(token.clone());
        self.enroll_by(server.address, &Trust::Bundle(roots), &proof)
            .await
    }

    async fn enroll_pinned(
        &self,
        server: SocketAddr,
        pin: Pin,
        token: &JoinToken,
    ) -> Result<Enrolled, EnrollError> {
        self.enroll_by(server, &Trust::Pin(pin), &Proof::Join(token.clone()))
            .await
    }

    async fn enroll_by(
        &self,
        server: SocketAddr,
        trust: &Trust,
        proof: &Proof,
    ) -> Result<Enrolled, EnrollError> {
        let trust_domain = TrustDomain::default();
        certs::enroll(&EnrollRequest {
            server,
            trust,
            proof,
            name: &self.name,
            trust_domain: &trust_domain,
            files: &self.files,
            clock: &self.clock,
        })
        .await
    }

    async fn renew(&self, server: &Server, with: Credential) -> Result<Enrolled, EnrollError> {
        std::fs::create_dir_all(self.files.dir()).unwrap();
        let own = Own {
            clock: self.clock.clone(),
            ..server.ca.own(with)
        };
        certs::renew(server.address, &own, &self.files).await
    }
}
