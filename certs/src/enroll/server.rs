//! The server's side: decides, signs, notes and audits.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio_rustls::server::TlsStream;
use tonic::{Request, Response, Status};

use super::MAX_MESSAGE;
use super::executor::executor;
use super::limit::{EnrollLimits, Limiter};
use super::pb::enrollment_server::{Enrollment, EnrollmentServer};
use super::pb::{CertificateResponse, EnrollRequest, RenewRequest};
use super::reason::Refusal;
use super::vouch::{NotVouched, Vouch, WhyNot};
use crate::clock::Clock;
use crate::csr::Csr;
use crate::identity::{Name, Role};
use crate::issuer::LiveIssuer;
use crate::node_uid::NodeUid;
use crate::service_token::ServiceAccountToken;
use crate::token::JoinToken;
use crate::token_store::{RedeemError, Store};
use crate::verify::{Peer, tls_peer};
use crate::x509;

/// A connection is for one request; a slow edge over a satellite needs a few seconds.
const CONNECTION_LIFE: Duration = Duration::from_secs(30);

/// A request is answered within this: the store's lock may be held by another process.
const REQUEST_TIME: Duration = Duration::from_secs(10);

/// Streams of one connection at a time: one is needed.
const MAX_STREAMS: u32 = 8;

/// Request headers in all, in bytes.
const MAX_HEADERS: u32 = 8 * 1024;

/// Store accesses at a time: they wait for one lock anyway, each on a thread.
const STORE_TURNS: usize = 4;

/// A connection ended otherwise than well.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// HTTP/2 broke.
    #[error("serve an enrolment connection")]
    Http(#[source] hyper::Error),
    /// Open for too long.
    #[error("an enrolment connection was open for more than 30 s")]
    Timeout,
}

/// The enrolment service of one server. Clones are the same service.
#[derive(Clone, Debug)]
pub struct EnrollService {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    issuer: LiveIssuer,
    store: Store,
    clock: Clock,
    limiter: Limiter,
    store_turns: Arc<Semaphore>,
    nodes: Option<Arc<dyn Vouch>>,
}

/// The service for one connection: it knows who is at the other end.
struct Connection {
    service: EnrollService,
    caller: Caller,
}

/// Who is at the other end.
struct Caller {
    remote: SocketAddr,
    agent: Option<Peer>,
}

impl EnrollService {
    /// A service that signs with `issuer`, keeps its notes in `store`, and asks `nodes` about ServiceAccounts' tokens
    /// and certificates with a node's uid.
    #[must_use]
    pub fn new(
        issuer: impl Into<LiveIssuer>,
        store: Store,
        clock: Clock,
        limits: EnrollLimits,
        nodes: Option<Arc<dyn Vouch>>,
    ) -> Self {
        let shared = Shared {
            issuer: issuer.into(),
            store,
            clock,
            limiter: Limiter::new(limits),
            store_turns: Arc::new(Semaphore::new(STORE_TURNS)),
            nodes,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Serves one connection whose handshake with [`enroll_server`](crate::enroll_server) is done, until
    /// it ends; from `shutdown` on it takes no new request.
    ///
    /// The returned future owns all that runs for the connection: dropped, it ends it.
    ///
    /// # Errors
    /// HTTP/2 breaks, or the connection is open for too long.
    pub async fn serve_connection<S>(
        &self,
        stream: TlsStream<S>,
        remote: SocketAddr,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), ServeError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let agent = tls_peer(stream.get_ref().1).ok().flatten();
        let caller = Caller { remote, agent };
        let grpc = EnrollmentServer::new(Connection {
            service: self.clone(),
            caller,
        })
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
        let service = hyper::service::service_fn(move |request: http::Request<Incoming>| {
            let mut grpc = grpc.clone();
            async move { tower::Service::call(&mut grpc, request).await }
        });
        let (executor, mut tasks) = executor();
        let connection = hyper::server::conn::http2::Builder::new(executor)
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEADERS)
            .serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection, shutdown);
        let deadline = tokio::time::sleep(CONNECTION_LIFE);
        tokio::pin!(deadline);
        let mut stopping = false;
        loop {
            tokio::select! {
                ended = connection.as_mut() => return ended.map_err(ServeError::Http),
                never = tasks.run() => match never {},
                () = shutdown.as_mut(), if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = deadline.as_mut() => return Err(ServeError::Timeout),
            }
        }
    }

    async fn do_enroll(
        &self,
        caller: &Caller,
        request: EnrollRequest,
        note: &mut Note,
    ) -> Result<CertificateResponse, Refusal> {
        self.limit(caller)?;
        match (
            request.token.is_empty(),
            request.service_account_token.is_empty(),
        ) {
            (_, true) => self.enroll_by_token(request, note).await,
            (true, false) => self.enroll_node(request, note).await,
            (false, false) => Err(Refusal::BadRequest),
        }
    }

    async fn enroll_by_token(
        &self,
        request: EnrollRequest,
        note: &mut Note,
    ) -> Result<CertificateResponse, Refusal> {
        let token: Result<JoinToken, _> = request.token.parse();
        let Ok(token) = token else {
            return Err(Refusal::WrongToken);
        };
        note.token = Some(token.id().to_owned());
        let Ok(name) = Name::parse(&request.agent_name) else {
            return Err(Refusal::BadRequest);
        };
        note.agent = Some(name.clone());
        let csr = check_csr(&request.csr)?;
        let now = self.shared.clock.now();
        let (redeemed, digest) = (name.clone(), csr.key_digest());
        self.with_store(move |store| store.redeem(&token, &redeemed, &digest, now))
            .await?
            .map_err(|error| refusal_of(&error, note))?;
        self.sign(name, None, &csr, note).await
    }

    /// Certifies the node that the token is of. What is cheap to find out comes first: the rest costs the cluster work.
    async fn enroll_node(
        &self,
        request: EnrollRequest,
        note: &mut Note,
    ) -> Result<CertificateResponse, Refusal> {
        let token: Result<ServiceAccountToken, _> = request.service_account_token.parse();
        let (Ok(token), Ok(name)) = (token, Name::parse(&request.agent_name)) else {
            return Err(Refusal::BadRequest);
        };
        note.agent = Some(name.clone());
        let csr = check_csr(&request.csr)?;
        let Some(nodes) = &self.shared.nodes else {
            return Err(Refusal::NoServiceAccounts);
        };
        let vouched = nodes.vouch(&token).await;
        let vouched = vouched.map_err(|error| not_vouched(error, note))?;
        note.workload = Some(vouched.workload);
        note.node_uid = Some(vouched.node_uid.clone());
        if vouched.name != name {
            note.detail = Some(format!("its node is {}", vouched.name).into());
            return Err(Refusal::OtherNode);
        }
        if name.is_of_service() {
            return Err(Refusal::NameNotAllowed);
        }
        self.unless_revoked(&name).await?;
        self.sign(name, Some(&vouched.node_uid), &csr, note).await
    }

    async fn do_renew(
        &self,
        caller: &Caller,
        request: RenewRequest,
        note: &mut Note,
    ) -> Result<CertificateResponse, Refusal> {
        // The handshake let agents of ours in alone; who shows nothing has nothing to renew.
        let agent = caller
            .agent
            .as_ref()
            .filter(|peer| peer.identity.role == Role::Agent);
        let name = agent.map(|peer| peer.identity.name.clone());
        let node_uid = agent.and_then(|peer| peer.node_uid.as_ref());
        note.agent.clone_from(&name);
        note.node_uid = node_uid.cloned();
        let Some(name) = name else {
            self.limit(caller)?;
            return Err(Refusal::NoCertificate);
        };
        let limited = self.shared.limiter.check_agent(&name);
        limited.map_err(|after| Refusal::RateLimited { after })?;
        let csr = check_csr(&request.csr)?;
        self.unless_revoked(&name).await?;
        if let (Some(nodes), Some(uid)) = (&self.shared.nodes, node_uid)
            && nodes.is_gone(&name, uid).await
        {
            return Err(Refusal::NodeGone);
        }
        self.sign(name, node_uid, &csr, note).await
    }

    /// Asked of the file, not of a copy in memory: what is signed here lives for a day.
    async fn unless_revoked(&self, name: &Name) -> Result<(), Refusal> {
        let asked = name.clone();
        let revoked = self
            .with_store(move |store| store.is_revoked(&asked))
            .await?;
        match revoked {
            Ok(false) => Ok(()),
            Ok(true) => Err(Refusal::Revoked),
            Err(error) => {
                tracing::error!(error = %chain(&error), "could not read the token store");
                Err(Refusal::Unavailable)
            }
        }
    }

    fn limit(&self, caller: &Caller) -> Result<(), Refusal> {
        let limited = self.shared.limiter.check(caller.remote.ip());
        limited.map_err(|after| Refusal::RateLimited { after })
    }

    async fn sign(
        &self,
        name: Name,
        node_uid: Option<&NodeUid>,
        csr: &Csr,
        note: &mut Note,
    ) -> Result<CertificateResponse, Refusal> {
        let now = self.shared.clock.now();
        let issuer = self.shared.issuer.load();
        let issued = issuer.sign_agent(&name, node_uid, csr, now);
        let issued = issued.map_err(|error| {
            tracing::error!(error = %chain(&error), "could not sign an agent's certificate");
            Refusal::Unavailable
        })?;
        let not_after = issued.not_after;
        note.not_after = Some(not_after.as_secs());
        // A note that fails (a full disk) must not keep an edge from its certificate.
        let recorded = name.clone();
        match self
            .with_store(move |store| store.record_agent(&recorded, not_after, now))
            .await
        {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(agent = %name, error = %chain(&error), "could not note an agent");
            }
            Err(_logged) => {}
        }
        Ok(CertificateResponse {
            chain: x509::pem("CERTIFICATE", &issued.chain),
            bundle: issuer.bundle().to_pem(),
            server_time: now.as_secs(),
        })
    }

    /// Files are locked and synced on a thread where that may block; few at a time, so that a lock that
    /// another process holds doesn't use up the threads of everything else.
    async fn with_store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        let store = self.shared.store.clone();
        let turns = Arc::clone(&self.shared.store_turns);
        let done = tokio::time::timeout(REQUEST_TIME, async {
            let turn = turns.acquire_owned().await.ok()?;
            let task = tokio::task::spawn_blocking(move || {
                // Given back when the work is done, not when its asker has lost patience.
                let _turn = turn;
                work(&store)
            });
            task.await.ok()
        });
        if let Ok(Some(value)) = done.await {
            return Ok(value);
        }
        tracing::error!("the token store did not answer in time");
        Err(Refusal::Unavailable)
    }
}

/// What the audit line says beside the outcome.
#[derive(Default)]
struct Note {
    agent: Option<Name>,
    token: Option<String>,
    /// Whose ServiceAccount token it was.
    workload: Option<String>,
    node_uid: Option<NodeUid>,
    not_after: Option<u64>,
    detail: Option<Cow<'static, str>>,
}

fn check_csr(der: &[u8]) -> Result<Csr, Refusal> {
    Csr::check(der).map_err(|error| {
        tracing::debug!(%error, "signing request refused");
        Refusal::BadRequest
    })
}

fn not_vouched(error: NotVouched, note: &mut Note) -> Refusal {
    note.detail = Some(error.detail.into());
    match error.why {
        WhyNot::NotTaken => Refusal::NoServiceAccounts,
        WhyNot::Refused => Refusal::ServiceAccountRefused,
        WhyNot::OtherAccount => Refusal::OtherAccount,
        WhyNot::NotRunning => Refusal::NotRunning,
        WhyNot::NodeGone => Refusal::NodeGone,
        WhyNot::Unavailable => Refusal::ClusterUnavailable,
    }
}

fn refusal_of(error: &RedeemError, note: &mut Note) -> Refusal {
    match error {
        // Which of the two it was is the auditor's business, not the asker's.
        RedeemError::UnknownToken => {
            note.detail = Some("unknown token".into());
            Refusal::WrongToken
        }
        RedeemError::WrongSecret => {
            note.detail = Some("wrong secret".into());
            Refusal::WrongToken
        }
        RedeemError::Expired => Refusal::TokenExpired,
        RedeemError::UsedUp => Refusal::TokenUsedUp,
        RedeemError::NameNotAllowed => Refusal::NameNotAllowed,
        RedeemError::Revoked => Refusal::Revoked,
        RedeemError::Store(error) => {
            tracing::error!(error = %chain(error), "could not look a join token up");
            Refusal::Unavailable
        }
    }
}

/// An error with its sources, for the log.
fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    sources.fold(error.to_string(), |text, source| {
        format!("{text}: {source}")
    })
}

/// One line for each decision. What a stranger sent stands in it only once it was found well-formed.
fn audit(
    event: &'static str,
    caller: &Caller,
    note: Note,
    decided: Result<CertificateResponse, Refusal>,
) -> Result<Response<CertificateResponse>, Status> {
    let Note {
        agent,
        token,
        workload,
        node_uid,
        not_after,
        detail,
    } = note;
    let agent = agent.as_ref().map(tracing::field::display);
    let node_uid = node_uid.as_ref().map(tracing::field::display);
    let detail = detail.as_deref();
    let remote = caller.remote;
    match decided {
        Ok(response) => {
            let outcome = "granted";
            tracing::info!(target: "audit", event, outcome, agent, token, workload, node_uid, not_after, %remote);
            Ok(Response::new(response))
        }
        Err(refusal) => {
            let outcome = refusal.label();
            tracing::warn!(target: "audit", event, outcome, detail, agent, token, workload, node_uid, %remote);
            Err(refusal.into())
        }
    }
}

#[tonic::async_trait]
impl Enrollment for Connection {
    async fn enroll(
        &self,
        request: Request<EnrollRequest>,
    ) -> Result<Response<CertificateResponse>, Status> {
        let mut note = Note::default();
        let decided = self
            .service
            .do_enroll(&self.caller, request.into_inner(), &mut note)
            .await;
        audit("enroll", &self.caller, note, decided)
    }

    async fn renew(
        &self,
        request: Request<RenewRequest>,
    ) -> Result<Response<CertificateResponse>, Status> {
        let mut note = Note::default();
        let decided = self
            .service
            .do_renew(&self.caller, request.into_inner(), &mut note)
            .await;
        audit("renew", &self.caller, note, decided)
    }
}
