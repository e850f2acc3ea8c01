//! The agent's side: one connection, one request, and what came back kept on disk.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ClientConfig;
use rustls_pki_types::{ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Status;

use super::MAX_MESSAGE;
use super::error::EnrollError;
use super::executor::executor;
use super::files::AgentFiles;
use super::pb::enrollment_client::EnrollmentClient;
use super::pb::{self, CertificateResponse};
use super::reason::Refusal;
use super::trust::{Proof, Trust};
use super::watched::Watched;
use crate::bundle::{TrustBundle, certificates};
use crate::clock::{Clock, from_secs};
use crate::credential::{Credential, Key, next_key_path};
use crate::csr::Csr;
use crate::failure::HandshakeFailure;
use crate::identity::{Identity, Name, Role, SERVER_SNI, TrustDomain};
use crate::store::{self, StoreError};
use crate::tls_config::{self, Own};
use crate::verify::{Peer, PeerError, tls_peer};

/// For TCP's connect: three SYNs.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// For the TLS handshake: two round trips over a satellite, and a slow board's arithmetic.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// For request and answer: the server's own 10 s and the way.
const REQUEST_TIME: Duration = Duration::from_secs(15);

/// What a first enrolment needs.
#[derive(Debug, Clone, Copy)]
pub struct EnrollRequest<'a> {
    /// The server's address, 8443/tcp.
    pub server: SocketAddr,
    /// By what its authority is known.
    pub trust: &'a Trust,
    /// What entitles us.
    pub proof: &'a Proof,
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
    let tls = request.trust.tls(request.trust_domain, request.clock)?;
    let (name, csr) = (request.name.to_string(), Csr::make(&key)?);
    let call = Call::Enroll(request.proof.request(name, csr));
    let (response, server) = Box::pin(exchange(request.server, tls, call)).await?;
    let identity = Identity::new(
        request.trust_domain.clone(),
        Role::Agent,
        request.name.clone(),
    );
    let enrolled = accept(&response, &server, &key, &identity, request.clock)?;
    if !request.trust.agrees_with(&enrolled.bundle) {
        return Err(EnrollError::OtherBundle);
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
    let refused = Arc::new(OnceLock::new());
    let stream = Watched::new(stream, Arc::clone(&refused));
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
        (HandshakeFailure::UnknownIssuer, Side::Server) => EnrollError::UnknownAuthority,
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
                Some(Refusal::ClusterUnavailable) => EnrollError::ClusterUnavailable,
                Some(Refusal::NameNotAllowed) => EnrollError::NameNotAllowed,
                Some(Refusal::NodeGone) => EnrollError::NodeGone,
                Some(Refusal::NoServiceAccounts) => EnrollError::NoServiceAccounts,
                Some(Refusal::NotRunning) => EnrollError::NotRunning,
                Some(Refusal::OtherAccount) => EnrollError::OtherAccount,
                Some(Refusal::OtherNode) => EnrollError::OtherNode,
                Some(Refusal::RateLimited { after }) => EnrollError::RateLimited { after },
                Some(Refusal::Revoked) => EnrollError::Revoked,
                Some(Refusal::ServiceAccountRefused) => EnrollError::ServiceAccountRefused,
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
