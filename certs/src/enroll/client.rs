//! The agent's side: one connection, one request, and what came back kept on disk.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;
use std::{io, pin};

use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ClientConfig;
use rustls_pki_types::{ServerName, UnixTime};
use secrecy::ExposeSecret as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Status;

use super::MAX_MESSAGE;
use super::executor::executor;
use super::files::AgentFiles;
use super::pb::enrollment_client::EnrollmentClient;
use super::pb::{self, CertificateResponse};
use super::reason::Refusal;
use crate::bundle::{BundleError, Pin, TrustBundle, certificates};
use crate::clock::{Clock, from_secs};
use crate::credential::{Credential, CredentialError, Key, KeyError, next_key_path};
use crate::csr::{Csr, CsrError};
use crate::failure::HandshakeFailure;
use crate::identity::{Identity, Name, Role, SERVER_SNI, TrustDomain};
use crate::store::{self, StoreError};
use crate::tls_config::{self, Own, TlsConfigError};
use crate::token::JoinToken;
use crate::verify::{Peer, PeerError, tls_peer};

/// For TCP's connect: three SYNs.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// For the TLS handshake: two round trips over a satellite, and a slow board's arithmetic.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// For request and answer: the server's own 10 s and the way.
const REQUEST_TIME: Duration = Duration::from_secs(15);

/// No certificate was given, or it could not be used.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// Unknown, or mistyped.
    #[error("the join token is wrong: the server knows no such token")]
    WrongToken,
    /// Make another one.
    #[error("the join token has expired; make a new one with `proxy-server token create`")]
    TokenExpired,
    /// Make another one.
    #[error("the join token is used up; make a new one with `proxy-server token create`")]
    TokenUsedUp,
    /// Its pattern is another.
    #[error("the join token is not for an agent of this name")]
    NameNotAllowed,
    /// By the operator; `proxy-server agent allow` takes it back.
    #[error("this agent is revoked")]
    Revoked,
    /// Off for longer than the grace: a new join token is needed.
    #[error(
        "this agent's certificate expired too long ago to be renewed; enrol again with a new join token"
    )]
    TooLate,
    /// Ask later.
    #[error("the server is asked too often; it may be asked again in {} s", after.as_secs())]
    RateLimited {
        /// When to ask again.
        after: Duration,
    },
    /// Another server, or a wrong pin in the configuration.
    #[error("the server's authority does not have the pinned key")]
    PinMismatch,
    /// One of the clocks is wrong.
    #[error(
        "the server's certificate is not valid at this host's time; check the clock of both hosts"
    )]
    Clock,
    /// TLS failed otherwise.
    #[error("the TLS handshake with {server} failed: {}", failure.sentence())]
    Handshake {
        /// Which server.
        server: SocketAddr,
        /// Why.
        failure: HandshakeFailure,
    },
    /// No connection.
    #[error("connect to {server}")]
    Unreachable {
        /// Which server.
        server: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No answer in time.
    #[error("no answer from {server} in time while {doing}")]
    Timeout {
        /// Which server.
        server: SocketAddr,
        /// What was waited for.
        doing: &'static str,
    },
    /// The server can't certify at the moment.
    #[error("the server cannot certify at the moment")]
    Unavailable,
    /// The server finds the request malformed: of another version, or a fault.
    #[error("the server does not understand the request")]
    BadRequest,
    /// HTTP/2 or gRPC broke.
    #[error("ask {server} for a certificate")]
    Http {
        /// Which server.
        server: SocketAddr,
        /// What broke.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The certificate that was sent is unusable.
    #[error("use the certificate that the server sent")]
    Credential(#[source] CredentialError),
    /// The certificate that was sent is somebody else's.
    #[error("the server sent a certificate for {0}")]
    OtherIdentity(Identity),
    /// The roots that were sent are unusable.
    #[error("use the trust bundle that the server sent")]
    Bundle(#[source] BundleError),
    /// The roots that were sent don't vouch for the server that sent them.
    #[error("the trust bundle that the server sent lacks the pinned authority")]
    BundleWithoutPin,
    /// The PEM that was sent is broken.
    #[error("read the certificate that the server sent")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// The server says not who it is.
    #[error("read the server's identity")]
    Peer(#[from] PeerError),
    /// No key could be made.
    #[error("make a key")]
    Key(#[source] KeyError),
    /// No request could be made.
    #[error("make a signing request")]
    Csr(#[from] CsrError),
    /// No TLS configuration could be made.
    #[error("prepare TLS")]
    Tls(#[from] TlsConfigError),
    /// The state directory can't be written; nothing was asked for, so no use of the token is lost.
    #[error("prepare the state directory")]
    Store(#[from] StoreError),
}

impl From<KeyError> for EnrollError {
    fn from(error: KeyError) -> Self {
        if let KeyError::Store(error) = error {
            Self::Store(error)
        } else {
            Self::Key(error)
        }
    }
}

impl EnrollError {
    /// Whether asking again with the same token and configuration is of no use.
    #[must_use]
    pub const fn is_final(&self) -> bool {
        match self {
            Self::WrongToken
            | Self::TokenExpired
            | Self::TokenUsedUp
            | Self::NameNotAllowed
            | Self::Revoked
            | Self::TooLate
            | Self::PinMismatch
            | Self::BadRequest
            | Self::Tls(_) => true,
            Self::RateLimited { .. }
            | Self::Clock
            | Self::Handshake { .. }
            | Self::Unreachable { .. }
            | Self::Timeout { .. }
            | Self::Unavailable
            | Self::Http { .. }
            | Self::Credential(_)
            | Self::OtherIdentity(_)
            | Self::Bundle(_)
            | Self::BundleWithoutPin
            | Self::Pem(_)
            | Self::Peer(_)
            | Self::Key(_)
            | Self::Csr(_)
            | Self::Store(_) => false,
        }
    }
}

/// What a first enrolment needs.
#[derive(Debug, Clone, Copy)]
pub struct EnrollRequest<'a> {
    /// The server's address, 8443/tcp.
    pub server: SocketAddr,
    /// By what its authority is known.
    pub pin: Pin,
    /// What entitles us.
    pub token: &'a JoinToken,
    /// The name to be certified.
    pub name: &'a Name,
    /// The realm the server must belong to.
    pub trust_domain: &'a TrustDomain,
    /// Where to keep what is given.
    pub files: &'a AgentFiles,
    /// The time; learns the server's.
    pub clock: &'a Clock,
}

/// What was given.
#[derive(Debug)]
pub struct Enrolled {
    /// The new certificate with its key.
    pub credential: Credential,
    /// The roots to trust from now on.
    pub bundle: TrustBundle,
    /// What time the server has.
    pub server_time: UnixTime,
    /// By how much the server's clock is ahead of ours.
    pub skew_seconds: i64,
    /// Whether it is on disk. If not (a full disk) it works until the next restart; log it.
    pub stored: Result<(), StoreError>,
}

/// Asks for the first certificate, and keeps it in the state directory.
///
/// The key is on disk before the token is sent: if the answer is lost, the next attempt comes with the same
/// key, and the server counts it as the same use.
///
/// # Errors
/// See [`EnrollError`].
pub async fn enroll(request: &EnrollRequest<'_>) -> Result<Enrolled, EnrollError> {
    let key = on_disk(request.files, |files| {
        store::create_dir(files.dir())?;
        Key::load_or_create(&next_key_path(&files.key()))
    })
    .await??;
    let tls = tls_config::enroll_client_pinned(request.pin, request.trust_domain, request.clock)?;
    let call = Call::Enroll(pb::EnrollRequest {
        token: request.token.expose().expose_secret().to_owned(),
        agent_name: request.name.to_string(),
        csr: Csr::make(&key)?,
    });
    let (response, server) = Box::pin(exchange(request.server, tls, call)).await?;
    let identity = Identity::new(
        request.trust_domain.clone(),
        Role::Agent,
        request.name.clone(),
    );
    let enrolled = accept(&response, &server, &key, &identity, request.clock)?;
    if !enrolled.bundle.pins().contains(&request.pin) {
        return Err(EnrollError::BundleWithoutPin);
    }
    Ok(keep(enrolled, request.files).await)
}

/// Asks for the next certificate with the present one, even an expired one, and keeps it in the state
/// directory. To use it, replace `own`'s credential and bundle by those returned.
///
/// # Errors
/// See [`EnrollError`].
pub async fn renew(
    server: SocketAddr,
    own: &Own,
    files: &AgentFiles,
) -> Result<Enrolled, EnrollError> {
    // Neither a full disk nor a damaged leftover of an earlier attempt must end an agent's life: it goes
    // on with a key in memory.
    let kept = on_disk(files, |files| {
        Key::load_or_create(&next_key_path(&files.key()))
    })
    .await;
    let key = match kept {
        Ok(Ok(key)) => key,
        Ok(Err(_)) | Err(_) => Key::generate()?,
    };
    let tls = tls_config::enroll_client(own)?;
    let call = Call::Renew(pb::RenewRequest {
        csr: Csr::make(&key)?,
    });
    let identity = own.credential.load().identity().clone();
    let (response, server) = Box::pin(exchange(server, tls, call)).await?;
    let enrolled = accept(&response, &server, &key, &identity, &own.clock)?;
    Ok(keep(enrolled, files).await)
}

/// Checks an answer.
fn accept(
    response: &CertificateResponse,
    server: &Peer,
    key: &Key,
    identity: &Identity,
    clock: &Clock,
) -> Result<Enrolled, EnrollError> {
    let chain = certificates(response.chain.as_bytes()).map_err(EnrollError::Pem)?;
    let credential = Credential::new(chain, key).map_err(EnrollError::Credential)?;
    if credential.identity() != identity {
        return Err(EnrollError::OtherIdentity(credential.identity().clone()));
    }
    let bundle = TrustBundle::from_pem(response.bundle.as_bytes()).map_err(EnrollError::Bundle)?;
    let server_time = from_secs(response.server_time);
    let skew_seconds = clock.observe(server_time, server);
    Ok(Enrolled {
        credential,
        bundle,
        server_time,
        skew_seconds,
        stored: Ok(()),
    })
}

async fn keep(mut enrolled: Enrolled, files: &AgentFiles) -> Enrolled {
    let (credential, bundle) = (enrolled.credential.clone(), enrolled.bundle.clone());
    let saved = on_disk(files, move |files| files.save(&credential, &bundle)).await;
    enrolled.stored = saved.flatten();
    enrolled
}

/// Syncing a worn flash card takes seconds: on a thread where that may block.
async fn on_disk<T: Send + 'static>(
    files: &AgentFiles,
    work: impl FnOnce(&AgentFiles) -> T + Send + 'static,
) -> Result<T, StoreError> {
    let there = files.clone();
    tokio::task::spawn_blocking(move || work(&there))
        .await
        .map_err(|error| StoreError::Write {
            path: files.dir().to_owned(),
            source: io::Error::other(error),
        })
}

enum Call {
    Enroll(pb::EnrollRequest),
    Renew(pb::RenewRequest),
}

/// One connection, one request. Returns the answer and who gave it.
async fn exchange(
    server: SocketAddr,
    tls: Arc<ClientConfig>,
    call: Call,
) -> Result<(CertificateResponse, Peer), EnrollError> {
    let stream = connect(server, tls).await?;
    let peer = tls_peer(stream.get_ref().1)?.ok_or(PeerError::NoCertificate)?;
    // In TLS 1.3 a server that refuses our certificate says so only after the handshake, in the first
    // read; HTTP/2 doesn't hand that error on by type.
    let refused = Arc::new(OnceLock::new());
    let stream = Watched {
        inner: stream,
        failure: Arc::clone(&refused),
        broken: None,
    };
    let (executor, mut tasks) = executor();
    let work = timeout(REQUEST_TIME, request(stream, executor, call));
    let done = tokio::select! {
        done = work => done,
        never = tasks.run() => match never {},
    };
    match done {
        Ok(Ok(response)) => Ok((response, peer)),
        Ok(Err(failed)) => Err(match refused.get() {
            Some(failure) => of_handshake(server, *failure, Side::Server),
            None => failed.into_error(server),
        }),
        Err(_elapsed) => Err(EnrollError::Timeout {
            server,
            doing: "waiting for a certificate",
        }),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the enrolment's own dial; it goes through no tunnel"
)]
async fn connect(
    server: SocketAddr,
    tls: Arc<ClientConfig>,
) -> Result<TlsStream<TcpStream>, EnrollError> {
    let unreachable = |source| EnrollError::Unreachable { server, source };
    let tcp = timeout(CONNECT_TIME, TcpStream::connect(server)).await;
    let Ok(tcp) = tcp else {
        return Err(EnrollError::Timeout {
            server,
            doing: "connecting",
        });
    };
    let tcp = tcp.map_err(unreachable)?;
    tcp.set_nodelay(true).map_err(unreachable)?;
    let name =
        ServerName::try_from(SERVER_SNI).map_err(|error| unreachable(io::Error::other(error)))?;
    let handshake = TlsConnector::from(tls).connect(name, tcp);
    let Ok(stream) = timeout(HANDSHAKE_TIME, handshake).await else {
        return Err(EnrollError::Timeout {
            server,
            doing: "the TLS handshake",
        });
    };
    stream.map_err(|error| of_handshake(server, HandshakeFailure::of(&error), Side::Own))
}

/// Whose certificate a failure is about.
#[derive(Clone, Copy)]
enum Side {
    /// We refused the server's.
    Own,
    /// The server refused ours.
    Server,
}

fn of_handshake(server: SocketAddr, failure: HandshakeFailure, by: Side) -> EnrollError {
    match (failure, by) {
        (HandshakeFailure::PinMismatch, Side::Own) => EnrollError::PinMismatch,
        (HandshakeFailure::Expired | HandshakeFailure::NotYetValid, Side::Own) => {
            EnrollError::Clock
        }
        (HandshakeFailure::Expired, Side::Server) => EnrollError::TooLate,
        (HandshakeFailure::Revoked, Side::Server) => EnrollError::Revoked,
        (failure, _) => EnrollError::Handshake { server, failure },
    }
}

/// HTTP/2 failed, or the server refused.
enum Failed {
    Http(hyper::Error),
    Status(Status),
}

impl Failed {
    fn into_error(self, server: SocketAddr) -> EnrollError {
        match self {
            Self::Http(source) => EnrollError::Http {
                server,
                source: source.into(),
            },
            Self::Status(status) => match Refusal::of(&status) {
                Some(Refusal::BadRequest | Refusal::NoCertificate) => EnrollError::BadRequest,
                Some(Refusal::NameNotAllowed) => EnrollError::NameNotAllowed,
                Some(Refusal::RateLimited { after }) => EnrollError::RateLimited { after },
                Some(Refusal::Revoked) => EnrollError::Revoked,
                Some(Refusal::TokenExpired) => EnrollError::TokenExpired,
                Some(Refusal::TokenUsedUp) => EnrollError::TokenUsedUp,
                Some(Refusal::Unavailable) => EnrollError::Unavailable,
                Some(Refusal::WrongToken) => EnrollError::WrongToken,
                None => EnrollError::Http {
                    server,
                    source: status.into(),
                },
            },
        }
    }
}

async fn request(
    stream: Watched,
    executor: super::executor::Executor,
    call: Call,
) -> Result<CertificateResponse, Failed> {
    let (sender, connection) = hyper::client::conn::http2::Builder::new(executor)
        .timer(TokioTimer::new())
        .handshake(TokioIo::new(stream))
        .await
        .map_err(Failed::Http)?;
    let channel = tower::service_fn(move |request: http::Request<tonic::body::Body>| {
        let mut sender = sender.clone();
        async move { sender.send_request(request).await }
    });
    let origin = http::Uri::from_static("https://server.corvid.internal");
    let mut client = EnrollmentClient::with_origin(channel, origin)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let ask = async {
        match call {
            Call::Enroll(message) => client.enroll(message).await,
            Call::Renew(message) => client.renew(message).await,
        }
    };
    tokio::pin!(ask, connection);
    tokio::select! {
        biased;
        answer = ask.as_mut() => return answer.map(tonic::Response::into_inner).map_err(Failed::Status),
        ended = connection.as_mut() => ended.map_err(Failed::Http)?,
    }
    // The connection ended well, with the answer on its last frames.
    ask.await
        .map(tonic::Response::into_inner)
        .map_err(Failed::Status)
}

/// A stream that remembers why it failed.
///
/// A server that refuses our certificate sends its alert and closes. Our next write may fail before that
/// alert was read; a write that fails is therefore held back until what the server sent is read.
struct Watched {
    inner: TlsStream<TcpStream>,
    failure: Arc<OnceLock<HandshakeFailure>>,
    broken: Option<io::Error>,
}

impl Watched {
    fn note(&self, error: &io::Error) {
        self.failure.get_or_init(|| HandshakeFailure::of(error));
    }

    /// Reads to the end, then hands the error of the write on. Never longer than the request's time.
    fn poll_broken<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        loop {
            let mut scratch = [0; 256];
            let mut scratch = ReadBuf::new(&mut scratch);
            match pin::Pin::new(&mut self.inner).poll_read(cx, &mut scratch) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => {
                    self.note(&error);
                    break;
                }
                Poll::Ready(Ok(())) if scratch.filled().is_empty() => break,
                Poll::Ready(Ok(())) => {}
            }
        }
        let error = self
            .broken
            .as_ref()
            .map_or(io::ErrorKind::BrokenPipe, io::Error::kind);
        Poll::Ready(Err(error.into()))
    }

    /// Does what writes, unless a write failed before.
    fn poll_unless_broken<T>(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(pin::Pin<&mut TlsStream<TcpStream>>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if self.broken.is_none() {
            let polled = write(pin::Pin::new(&mut self.inner), cx);
            let Poll::Ready(Err(error)) = polled else {
                return polled;
            };
            self.broken = Some(error);
        }
        self.poll_broken(cx)
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: pin::Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = pin::Pin::new(&mut self.inner).poll_read(cx, buffer);
        if let Poll::Ready(Err(error)) = &polled {
            self.note(error);
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: pin::Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_unless_broken(cx, |stream, cx| stream.poll_write(cx, bytes))
    }

    fn poll_flush(mut self: pin::Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_unless_broken(cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_shutdown(mut self: pin::Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        pin::Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
