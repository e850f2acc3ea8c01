//! Enrolment and renewal over real connections: what is given, and what is refused and why.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests, where a panic is the report"
)]

use std::cell::RefCell;
use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use certs::test_ca::{TestCa, TestLeaf, now};
use certs::{
    AgentFiles, Answer, Ca, Clock, Credential, Csr, EnrollError, EnrollLimits, EnrollRequest,
    EnrollService, Enrolled, HandshakeFailure, JoinToken, Key, LiveBundle, LiveCredential,
    LiveIssuer, Name, NewToken, NodeUid, NotVouched, Own, Pin, Proof, Revocations, Role,
    ServeError, ServiceAccountToken, Store, Trust, TrustBundle, TrustDomain, Vouch, Vouched,
    WhyNot,
};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

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

#[tokio::test]
async fn an_agent_with_a_token_gets_its_certificate_and_keeps_it() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    let enrolled = agent
        .enroll(&server, &server.token(1, "edge*"))
        .await
        .unwrap();
    enrolled.stored.unwrap();
    assert_eq!(
        enrolled.credential.identity().to_string(),
        "spiffe://corvid/agent/edge1"
    );
    assert_eq!(enrolled.bundle.pins(), [server.ca.pin()]);
    assert!(enrolled.skew_seconds.abs() <= 1);
    let left = enrolled.credential.not_after().as_secs() - now().as_secs();
    assert!((86_000..=86_400).contains(&left), "{left}");

    let (credential, bundle) = agent.files.load().unwrap().unwrap();
    assert_eq!(credential.fingerprint(), enrolled.credential.fingerprint());
    assert_eq!(bundle.pins(), [server.ca.pin()]);
    let key = std::fs::metadata(agent.files.key()).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o600);
    let known = server.store.snapshot().unwrap().agents;
    assert_eq!(
        known[&agent.name].not_after,
        credential.not_after().as_secs()
    );
}

#[tokio::test]
async fn an_agent_that_was_never_enrolled_has_nothing_to_load() {
    assert!(Agent::new("edge1").files.load().unwrap().is_none());
}

#[tokio::test]
async fn a_token_that_was_used_is_refused() {
    let server = Server::start().await;
    let token = server.token(1, "*");
    Agent::new("edge1").enroll(&server, &token).await.unwrap();
    let again = Agent::new("edge2").enroll(&server, &token).await;
    assert!(matches!(again, Err(EnrollError::TokenUsedUp)), "{again:?}");
    let same_name = Agent::new("edge1").enroll(&server, &token).await;
    assert!(
        matches!(same_name, Err(EnrollError::TokenUsedUp)),
        "{same_name:?}"
    );
}

#[tokio::test]
async fn an_answer_that_was_lost_costs_no_second_use() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    let token = server.token(1, "*");
    // The first attempt reached the server, its answer did not reach the agent: the key waits.
    std::fs::create_dir_all(agent.files.dir()).unwrap();
    let key = Key::load_or_create(&agent.files.dir().join("agent.key.next")).unwrap();
    let csr = Csr::check(&Csr::make(&key).unwrap()).unwrap();
    server
        .store
        .redeem(&token, &agent.name, &csr.key_digest(), now())
        .unwrap();
    agent.enroll(&server, &token).await.unwrap();
    assert!(agent.files.load().unwrap().is_some());
}

#[tokio::test]
async fn wrong_tokens_are_refused_each_with_its_reason() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    let unknown = JoinToken::generate().unwrap();
    let known = server.token(1, "*");
    let wrong_secret = format!("{}.{}", known.id(), "a".repeat(32))
        .parse()
        .unwrap();
    for token in [unknown, wrong_secret] {
        let refused = agent.enroll(&server, &token).await.unwrap_err();
        assert!(
            matches!(refused, EnrollError::WrongToken) && refused.is_final(),
            "{refused:?}"
        );
    }
    let new = NewToken {
        ttl: HOUR,
        uses: 1,
        agents: "*".parse().unwrap(),
    };
    let expired = server
        .store
        .create_token(&new, certs::test_ca::in_seconds(-7200))
        .unwrap();
    let refused = agent.enroll(&server, &expired).await;
    assert!(
        matches!(refused, Err(EnrollError::TokenExpired)),
        "{refused:?}"
    );
    let other = server.token(1, "site-b-*");
    let refused = agent.enroll(&server, &other).await;
    assert!(
        matches!(refused, Err(EnrollError::NameNotAllowed)),
        "{refused:?}"
    );
    // None of all these was counted.
    assert!(
        server
            .store
            .list_tokens()
            .unwrap()
            .iter()
            .all(|token| token.uses_left == 1)
    );
    agent.enroll(&server, &known).await.unwrap();
}

thread_local! {
    /// What was logged on this thread. A test has a thread of its own, and its server runs on it.
    static LINES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Writes to [`LINES`].
struct Sink;

impl std::io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LINES.with_borrow_mut(|lines| lines.extend_from_slice(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn each_decision_leaves_one_audit_line_without_the_secret() {
    // For the whole process: a subscriber of one thread misses what others met first.
    tracing_subscriber::fmt()
        .json()
        .with_env_filter("audit=info")
        .with_writer(|| Sink)
        .init();
    let server = Server::start().await;
    let token = server.token(1, "edge*");
    let wrong = format!("{}.{}", token.id(), "a".repeat(32))
        .parse()
        .unwrap();
    let unknown = JoinToken::generate().unwrap();
    let edge1 = Agent::new("edge1");
    edge1.enroll(&server, &wrong).await.unwrap_err();
    edge1.enroll(&server, &unknown).await.unwrap_err();
    let enrolled = edge1.enroll(&server, &token).await.unwrap();
    Agent::new("edge2")
        .enroll(&server, &token)
        .await
        .unwrap_err();
    edge1.renew(&server, enrolled.credential).await.unwrap();
    server.store.revoke_agent(&edge1.name, now()).unwrap();
    edge1
        .renew(&server, server.ca.agent("edge1"))
        .await
        .unwrap_err();

    let text = String::from_utf8(LINES.take()).unwrap();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let field = |line: &serde_json::Value, name: &str| {
        line["fields"][name].as_str().unwrap_or_default().to_owned()
    };
    let seen: Vec<[String; 5]> = lines
        .iter()
        .map(|line| ["event", "outcome", "detail", "agent", "token"].map(|name| field(line, name)))
        .collect();
    let id = token.id();
    let expected = [
        ["enroll", "wrong_token", "wrong secret", "edge1", id],
        [
            "enroll",
            "wrong_token",
            "unknown token",
            "edge1",
            unknown.id(),
        ],
        ["enroll", "granted", "", "edge1", id],
        ["enroll", "token_used_up", "", "edge2", id],
        ["renew", "granted", "", "edge1", ""],
        ["renew", "revoked", "", "edge1", ""],
    ];
    assert_eq!(seen, expected.map(|line| line.map(str::to_owned)));
    assert!(
        lines
            .iter()
            .all(|line| field(line, "remote").starts_with("127.0.0.1:"))
    );
    assert!(!text.contains(&"a".repeat(32)));
}

#[tokio::test]
async fn a_revoked_agent_gets_no_certificate_even_with_a_good_token() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    let token = server.token(1, "*");
    server.store.revoke_agent(&agent.name, now()).unwrap();
    let refused = agent.enroll(&server, &token).await;
    assert!(matches!(refused, Err(EnrollError::Revoked)), "{refused:?}");
    server.store.allow_agent(&agent.name).unwrap();
    agent.enroll(&server, &token).await.unwrap();
}

#[tokio::test]
async fn of_many_that_come_at_once_one_gets_the_token_of_one_use() {
    let server = Server::start().await;
    let token = server.token(1, "*");
    let agents: Vec<_> = (0..8)
        .map(|index| Agent::new(&format!("edge{index}")))
        .collect();
    let attempts = agents.iter().map(|agent| agent.enroll(&server, &token));
    let outcomes = futures_join(attempts).await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    let used_up = |outcome: &&Result<_, _>| matches!(outcome, Err(EnrollError::TokenUsedUp));
    assert_eq!(outcomes.iter().filter(used_up).count(), 7, "{outcomes:?}");
}

/// Polls all at once, on this task.
async fn futures_join<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut pending: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|cx| {
        for (future, output) in &mut pending {
            if output.is_none()
                && let std::task::Poll::Ready(ready) = future.as_mut().poll(cx)
            {
                *output = Some(ready);
            }
        }
        if pending.iter().all(|(_, output)| output.is_some()) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    pending
        .into_iter()
        .map(|(_, output)| output.unwrap())
        .collect()
}

#[tokio::test]
async fn who_asks_too_often_is_told_when_to_come_again() {
    let one = NonZeroU32::new(1).unwrap();
    let limits = EnrollLimits {
        per_address_per_minute: one,
        per_second: one,
    };
    let server = Server::with(TestCa::new(), limits).await;
    let token = server.token(2, "*");
    Agent::new("edge1").enroll(&server, &token).await.unwrap();
    let refused = Agent::new("edge2")
        .enroll(&server, &token)
        .await
        .unwrap_err();
    let EnrollError::RateLimited { after } = refused else {
        panic!("{refused:?}")
    };
    assert!((1..=60).contains(&after.as_secs()), "{after:?}");
    assert!(!refused.is_final());
}

#[tokio::test]
async fn strangers_who_ask_too_often_keep_no_agent_from_its_renewal() {
    let one = NonZeroU32::new(1).unwrap();
    let limits = EnrollLimits {
        per_address_per_minute: one,
        per_second: NonZeroU32::new(20).unwrap(),
    };
    let server = Server::with(TestCa::new(), limits).await;
    let token = server.token(2, "*");
    let agent = Agent::new("edge1");
    let enrolled = agent.enroll(&server, &token).await.unwrap();
    // The address, which they share, is used up.
    let refused = Agent::new("edge2").enroll(&server, &token).await;
    assert!(matches!(refused, Err(EnrollError::RateLimited { .. })));
    let credential = agent
        .renew(&server, enrolled.credential)
        .await
        .unwrap()
        .credential;
    // An agent has its own limit, whatever its certificate is used for.
    let mut refused = None;
    for _ in 0..30 {
        refused = agent.renew(&server, credential.clone()).await.err();
        if refused.is_some() {
            break;
        }
    }
    assert!(
        matches!(refused, Some(EnrollError::RateLimited { .. })),
        "{refused:?}"
    );
}

#[tokio::test]
async fn another_authority_than_the_pinned_one_sees_no_token() {
    let (server, other) = (Server::start().await, TestCa::new());
    let agent = Agent::new("edge1");
    let token = server.token(1, "*");
    let refused = agent
        .enroll_pinned(server.address, other.pin(), &token)
        .await;
    assert!(
        matches!(refused, Err(EnrollError::PinMismatch)),
        "{refused:?}"
    );
    assert_eq!(server.store.list_tokens().unwrap()[0].uses_left, 1);
}

#[tokio::test]
async fn an_agent_whose_clock_is_far_off_is_told_so() {
    let server = Server::start().await;
    let mut agent = Agent::new("edge1");
    agent.clock = Clock::fixed(certs::test_ca::in_seconds(400 * 86_400));
    let refused = agent.enroll(&server, &server.token(1, "*")).await;
    assert!(matches!(refused, Err(EnrollError::Clock)), "{refused:?}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unreachable() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let token = JoinToken::generate().unwrap();
    let refused = Agent::new("edge1")
        .enroll_pinned(address, TestCa::new().pin(), &token)
        .await;
    assert!(
        matches!(refused, Err(EnrollError::Unreachable { .. })),
        "{refused:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_nothing_is_given_up() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let token = JoinToken::generate().unwrap();
    let refused = Agent::new("edge1")
        .enroll_pinned(address, TestCa::new().pin(), &token)
        .await;
    assert!(
        matches!(refused, Err(EnrollError::Timeout { .. })),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_state_directory_that_cannot_be_made_costs_no_use() {
    let server = Server::start().await;
    let mut agent = Agent::new("edge1");
    let token = server.token(1, "*");
    agent.files = AgentFiles::new("/proc/none");
    let refused = agent.enroll(&server, &token).await;
    assert!(matches!(refused, Err(EnrollError::Store(_))), "{refused:?}");
    assert_eq!(server.store.list_tokens().unwrap()[0].uses_left, 1);
}

#[tokio::test]
async fn a_renewed_leaf_has_the_old_name_and_a_new_key() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    let enrolled = agent.enroll(&server, &server.token(1, "*")).await.unwrap();
    let renewed = agent
        .renew(&server, enrolled.credential.clone())
        .await
        .unwrap();
    renewed.stored.unwrap();
    assert_eq!(
        renewed.credential.identity(),
        enrolled.credential.identity()
    );
    assert_ne!(renewed.credential.serial(), enrolled.credential.serial());
    assert_ne!(
        secrecy::ExposeSecret::expose_secret(&renewed.credential.key_pem()),
        secrecy::ExposeSecret::expose_secret(&enrolled.credential.key_pem())
    );
    let (kept, _) = agent.files.load().unwrap().unwrap();
    assert_eq!(kept.fingerprint(), renewed.credential.fingerprint());
}

#[tokio::test]
async fn a_leaf_that_expired_within_the_grace_is_renewed() {
    let server = Server::start().await;
    let expired = server
        .ca
        .leaf(&TestLeaf::new(Role::Agent, "edge1").expired(29 * 86_400));
    let renewed = Agent::new("edge1").renew(&server, expired).await.unwrap();
    assert!(renewed.credential.not_after() > now());
}

#[tokio::test]
async fn a_leaf_that_expired_beyond_the_grace_is_not() {
    let server = Server::start().await;
    let expired = server
        .ca
        .leaf(&TestLeaf::new(Role::Agent, "edge1").expired(31 * 86_400));
    let refused = Agent::new("edge1")
        .renew(&server, expired)
        .await
        .unwrap_err();
    assert!(
        matches!(refused, EnrollError::TooLate) && refused.is_final(),
        "{refused:?}"
    );
}

/// A cluster with one node, and a pod there whose token is `a.b.c`.
#[derive(Debug)]
struct OneNode {
    name: &'static str,
    uid: &'static str,
}

impl OneNode {
    const TOKEN: &'static str = "a.b.c";
}

impl Vouch for OneNode {
    fn vouch<'a>(
        &'a self,
        token: &'a ServiceAccountToken,
    ) -> Answer<'a, Result<Vouched, NotVouched>> {
        let answer = match token.expose() {
            Self::TOKEN => Ok(Vouched {
                name: Name::parse(self.name).unwrap(),
                node_uid: self.uid.parse().unwrap(),
                workload: "a pod".to_owned(),
            }),
            other => {
                let why = match other {
                    "not.taken.here" => WhyNot::NotTaken,
                    "other.account.x" => WhyNot::OtherAccount,
                    "not.running.x" => WhyNot::NotRunning,
                    "node.gone.x" => WhyNot::NodeGone,
                    "api.away.x" => WhyNot::Unavailable,
                    _ => WhyNot::Refused,
                };
                Err(why.because("for the audit"))
            }
        };
        Box::pin(async move { answer })
    }

    fn is_gone<'a>(&'a self, name: &'a Name, uid: &'a NodeUid) -> Answer<'a, bool> {
        let there = (name.as_str(), uid.as_str()) == (self.name, self.uid);
        Box::pin(async move { !there })
    }
}

#[tokio::test]
async fn a_renewed_leaf_is_of_the_same_node_and_none_is_given_once_that_is_gone() {
    const UID: &str = "6f1c5b0e-9d1f-4c5e-8a55-0123456789ab";
    const OTHER: &str = "00000000-9d1f-4c5e-8a55-0123456789ab";
    let cluster = OneNode {
        name: "edge1",
        uid: UID,
    };
    let limits = EnrollLimits::default();
    let server = Server::of_cluster(TestCa::new(), limits, Some(Arc::new(cluster))).await;
    let leaf = |name: &str, uid: &str| {
        let leaf = TestLeaf::new(Role::Agent, name).of_node(uid);
        server.ca.leaf(&leaf)
    };
    let edge1 = Agent::new("edge1");
    let renewed = edge1.renew(&server, leaf("edge1", UID)).await.unwrap();
    let peer = certs::peer(renewed.credential.chain()).unwrap();
    assert_eq!(peer.node_uid.unwrap().as_str(), UID);
    for (name, uid) in [("edge1", OTHER), ("edge2", UID)] {
        let refused = edge1.renew(&server, leaf(name, uid)).await;
        assert!(matches!(refused, Err(EnrollError::NodeGone)), "{refused:?}");
    }
    // Edges outside the cluster have no uid, and nobody is asked about them.
    let outside = server.ca.agent("edge2");
    let renewed = edge1.renew(&server, outside).await.unwrap();
    let peer = certs::peer(renewed.credential.chain()).unwrap();
    assert_eq!(peer.node_uid, None);
}

#[tokio::test]
async fn whom_a_cluster_vouches_for_gets_the_certificate_of_its_node_and_no_other() {
    const UID: &str = "6f1c5b0e-9d1f-4c5e-8a55-0123456789ab";
    let cluster = OneNode {
        name: "edge1",
        uid: UID,
    };
    let limits = EnrollLimits::default();
    let server = Server::of_cluster(TestCa::new(), limits, Some(Arc::new(cluster))).await;
    let token = |text: &str| text.parse::<ServiceAccountToken>().unwrap();
    let good = token(OneNode::TOKEN);
    // Any of the roots will do, as during a rotation.
    let roots = TestCa::new().bundle().merge(&server.ca.bundle()).unwrap();
    let agent = Agent::new("edge1");
    // As often as it likes: what it gets is always the same node's.
    for _ in 0..2 {
        let enrolled = agent
            .enroll_trusting(&server, roots.clone(), &good)
            .await
            .unwrap();
        let peer = certs::peer(enrolled.credential.chain()).unwrap();
        assert_eq!(peer.identity.name.as_str(), "edge1");
        assert_eq!(peer.node_uid.unwrap().as_str(), UID);
        assert_eq!(enrolled.bundle.pins(), [server.ca.pin()]);
    }
    let other = Agent::new("edge2")
        .enroll_trusting(&server, roots.clone(), &good)
        .await;
    assert!(matches!(other, Err(EnrollError::OtherNode)), "{other:?}");

    for (text, is_final) in [
        ("not.taken.here", true),
        ("other.account.x", true),
        ("not.running.x", false),
        ("node.gone.x", false),
        ("api.away.x", false),
        ("ref.us.ed", false),
    ] {
        let refused = agent
            .enroll_trusting(&server, roots.clone(), &token(text))
            .await
            .unwrap_err();
        let named = match text {
            "not.taken.here" => matches!(refused, EnrollError::NoServiceAccounts),
            "other.account.x" => matches!(refused, EnrollError::OtherAccount),
            "not.running.x" => matches!(refused, EnrollError::NotRunning),
            "node.gone.x" => matches!(refused, EnrollError::NodeGone),
            "api.away.x" => matches!(refused, EnrollError::ClusterUnavailable),
            _ => matches!(refused, EnrollError::ServiceAccountRefused),
        };
        assert!(
            named && refused.is_final() == is_final,
            "{text}: {refused:?}"
        );
    }

    server.store.revoke_agent(&agent.name, now()).unwrap();
    let refused = agent.enroll_trusting(&server, roots, &good).await;
    assert!(matches!(refused, Err(EnrollError::Revoked)), "{refused:?}");

    // A server whose roots are others sees no token; one without a cluster takes none.
    let strangers = TestCa::new().bundle();
    let refused = agent.enroll_trusting(&server, strangers, &good).await;
    let Err(EnrollError::Handshake { failure, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(failure, HandshakeFailure::UnknownIssuer);
    let alone = Server::start().await;
    let refused = agent
        .enroll_trusting(&alone, alone.ca.bundle(), &good)
        .await;
    assert!(
        matches!(refused, Err(EnrollError::NoServiceAccounts)),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_revoked_agent_is_not_renewed_whoever_notices_first() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    server.store.revoke_agent(&agent.name, now()).unwrap();
    // The store knows, the handshake not yet.
    let refused = agent.renew(&server, server.ca.agent("edge1")).await;
    assert!(matches!(refused, Err(EnrollError::Revoked)), "{refused:?}");
    server.revoked.replace(HashSet::from([agent.name.clone()]));
    let refused = agent.renew(&server, server.ca.agent("edge1")).await;
    assert!(matches!(refused, Err(EnrollError::Revoked)), "{refused:?}");
}

#[tokio::test]
async fn clients_and_strangers_are_not_renewed() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    for credential in [server.ca.client("kube"), server.ca.server("s2")] {
        let refused = agent.renew(&server, credential).await.unwrap_err();
        let EnrollError::Handshake { failure, .. } = refused else {
            panic!("{refused:?}")
        };
        assert_eq!(failure, HandshakeFailure::WrongRole);
    }
    let stranger = TestCa::new().agent("edge1");
    let refused = agent.renew(&server, stranger).await.unwrap_err();
    assert!(
        matches!(refused, EnrollError::UnknownAuthority),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_renewal_during_rotation_brings_both_roots_and_a_chain_for_either() {
    let old = Ca::create(&TrustDomain::default(), now()).unwrap();
    let server = Server::start_with(&old).await;
    let agent = Agent::new("edge1");
    let before = agent.enroll(&server, &server.token(1, "*")).await.unwrap();
    let new = old.rotate(HOUR, now()).unwrap();
    server.issuer.replace(Arc::new(new.issuer(now()).unwrap()));
    let own = Own {
        credential: LiveCredential::new(before.credential),
        bundle: LiveBundle::new(before.bundle),
        clock: agent.clock.clone(),
        trust_domain: TrustDomain::default(),
    };
    let renewed = certs::renew(server.address, &own, &agent.files)
        .await
        .unwrap();
    assert_eq!(renewed.bundle.pins(), [new.pin(), old.pin()]);
    assert_eq!(renewed.credential.chain().len(), 2);
    let (kept, _) = agent.files.load().unwrap().unwrap();
    assert_eq!(kept.chain(), renewed.credential.chain());
}

#[tokio::test]
async fn a_full_disk_at_renewal_leaves_a_credential_that_works_in_memory() {
    let server = Server::start().await;
    let mut agent = Agent::new("edge1");
    let own = server.ca.own(server.ca.agent("edge1"));
    agent.files = AgentFiles::new("/proc/none");
    let renewed = certs::renew(server.address, &own, &agent.files)
        .await
        .unwrap();
    assert!(renewed.stored.is_err());
    assert_eq!(renewed.credential.identity().name, agent.name);
}

#[tokio::test]
async fn a_full_disk_at_the_server_keeps_no_agent_from_its_renewal() {
    let server = Server::start().await;
    // The store's place is taken by a directory: notes can't be written any more.
    std::fs::create_dir(server.store.path()).unwrap();
    let refused = Agent::new("edge1")
        .renew(&server, server.ca.agent("edge1"))
        .await;
    // But without a readable store nobody is certified: revocations are in it.
    assert!(
        matches!(refused, Err(EnrollError::Unavailable)),
        "{refused:?}"
    );
    std::fs::remove_dir(server.store.path()).unwrap();
    let lock = server.store.path().with_file_name("store.lock");
    std::fs::create_dir(&lock).unwrap();
    Agent::new("edge1")
        .renew(&server, server.ca.agent("edge1"))
        .await
        .unwrap();
}

/// A connection to the service in memory, its handshake done.
async fn connection(
    ca: &TestCa,
) -> (
    tokio_rustls::client::TlsStream<tokio::io::DuplexStream>,
    tokio_rustls::server::TlsStream<tokio::io::DuplexStream>,
) {
    let own = ca.own(ca.server("s1"));
    let server = certs::enroll_server(&own, &Revocations::new(), GRACE).unwrap();
    let client =
        certs::enroll_client_pinned(ca.pin(), &TrustDomain::default(), &own.clock).unwrap();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = certs::SERVER_SNI.try_into().unwrap();
    let (client, server) = tokio::join!(
        TlsConnector::from(client).connect(name, near),
        TlsAcceptor::from(server).accept(far),
    );
    (client.unwrap(), server.unwrap())
}

fn service(ca: &TestCa) -> (tempfile::TempDir, EnrollService) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let limits = EnrollLimits::default();
    (
        dir,
        EnrollService::new(ca.issuer(), store, Clock::system(), limits, None),
    )
}

fn somewhere() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 1).into()
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_says_nothing_is_closed() {
    let ca = TestCa::new();
    let (_dir, service) = service(&ca);
    let (_silent, stream) = connection(&ca).await;
    let ended = service
        .serve_connection(stream, somewhere(), std::future::pending())
        .await;
    assert!(matches!(ended, Err(ServeError::Timeout)), "{ended:?}");
}

#[tokio::test]
async fn garbage_ends_its_connection() {
    let ca = TestCa::new();
    let (_dir, service) = service(&ca);
    let (mut client, stream) = connection(&ca).await;
    client.write_all(&[0xff; 4096]).await.unwrap();
    let ended = service
        .serve_connection(stream, somewhere(), std::future::pending())
        .await;
    assert!(matches!(ended, Err(ServeError::Http(_))), "{ended:?}");
}

#[tokio::test]
async fn an_idle_connection_ends_at_shutdown() {
    let ca = TestCa::new();
    let (_dir, service) = service(&ca);
    let (mut client, stream) = connection(&ca).await;
    // HTTP/2's preface and empty settings.
    client
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await
        .unwrap();
    client.flush().await.unwrap();
    let serve = service.serve_connection(stream, somewhere(), async {});
    let hang_up = async {
        let mut rest = Vec::new();
        // Reads GOAWAY and answers by closing.
        tokio::io::AsyncReadExt::read_buf(&mut client, &mut rest)
            .await
            .unwrap();
        client.shutdown().await.ok();
    };
    let (ended, ()) = tokio::join!(serve, hang_up);
    assert!(!matches!(ended, Err(ServeError::Timeout)), "{ended:?}");
}
