//! Why an agent got no certificate, in sentences that say what to do.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use crate::bundle::BundleError;
use crate::credential::{CredentialError, KeyError};
use crate::csr::CsrError;
use crate::failure::HandshakeFailure;
use crate::identity::Identity;
use crate::store::StoreError;
use crate::tls_config::TlsConfigError;
use crate::verify::PeerError;

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
    /// Its `kubernetes.enrol` is not set.
    #[error("this server takes no ServiceAccount tokens: its operator sets kubernetes.enrol")]
    NoServiceAccounts,
    /// Expired, for another audience, of another cluster, or its pod is deleted. The kubelet brings a new one.
    #[error(
        "the cluster does not accept the ServiceAccount token: it has expired, its audience or cluster is another, or its pod is deleted"
    )]
    ServiceAccountRefused,
    /// Of another namespace or name.
    #[error("the ServiceAccount token is not of the account that enrols agents")]
    OtherAccount,
    /// Its pod has ended, or is not where the token says.
    #[error("the ServiceAccount token's pod does not run, or not on the node that the token says")]
    NotRunning,
    /// The pod is on another node than the one whose name was asked for.
    #[error(
        "the ServiceAccount token is of a pod on another node: set `name` (CORVID_NAME) to the name of this pod's node"
    )]
    OtherNode,
    /// kube-apiserver does not answer the server.
    #[error("the server can't ask the cluster about the ServiceAccount token at the moment")]
    ClusterUnavailable,
    /// By the operator; `proxy-server agent allow` takes it back.
    #[error("this agent is revoked")]
    Revoked,
    /// Deleted; or deleted and joined again, and then a new certificate is needed.
    #[error("the node of this agent's certificate is no longer in the cluster")]
    NodeGone,
    /// Off for longer than the grace: a new join token is needed.
    #[error(
        "this agent's certificate expired too long ago to be renewed; enrol again with a new join token"
    )]
    TooLate,
    /// It was retired before this agent had anything newer: a new enrolment is needed.
    #[error("the server does not trust the authority of this agent's certificate any more")]
    UnknownAuthority,
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
    #[error("the trust bundle that the server sent lacks the authority by which it is known")]
    OtherBundle,
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
            | Self::NoServiceAccounts
            | Self::OtherAccount
            | Self::OtherNode
            | Self::Revoked
            | Self::TooLate
            | Self::PinMismatch
            | Self::BadRequest
            | Self::Tls(_) => true,
            Self::NodeGone
            | Self::ServiceAccountRefused
            | Self::NotRunning
            | Self::ClusterUnavailable
            | Self::RateLimited { .. }
            | Self::Clock
            | Self::Handshake { .. }
            | Self::Unreachable { .. }
            | Self::Timeout { .. }
            | Self::Unavailable
            | Self::Http { .. }
            | Self::Credential(_)
            | Self::OtherIdentity(_)
            | Self::Bundle(_)
            | Self::OtherBundle
            | Self::Pem(_)
            | Self::Peer(_)
            | Self::Key(_)
            | Self::Csr(_)
            | Self::Store(_)
            | Self::UnknownAuthority => false,
        }
    }
}
