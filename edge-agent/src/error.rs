//! Errors of this crate's boundary and of its sessions, each with the reason to report.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use certs::{
    AgentFilesError, BundleError, CredentialError, EnrollError, HandshakeFailure, PeerError,
};
use daemon::Exit;
use nix::errno::Errno;
use proto::control::ControlError;
use proto::transport::quic::QuicError;
use proto::transport::{SessionError, StreamError};
use proto::wire::HandshakeError;
use proto::{ReadFrameError, Reason};

/// Why an agent can't start or go on.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// An address can't be listened on.
    #[error("open the endpoints")]
    Endpoint(#[from] daemon::admin::AdminError),
    /// The files in the state directory can't be used.
    #[error("read the state directory {}", dir.display())]
    State {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: Box<AgentFilesError>,
    },
    /// The operator's credential can't be used.
    #[error("load the credential {}", file.display())]
    Credential {
        /// The chain.
        file: PathBuf,
        /// Why not.
        #[source]
        source: Box<CredentialError>,
    },
    /// The operator's trust bundle can't be used.
    #[error("load the trust bundle {}", file.display())]
    Bundle {
        /// The roots.
        file: PathBuf,
        /// Why not.
        #[source]
        source: Box<BundleError>,
    },
    /// The credential is somebody else's.
    #[error("the certificate is for {found}, but the configuration says {wanted}")]
    OtherIdentity {
        /// In the certificate.
        found: String,
        /// In the configuration.
        wanted: String,
    },
    /// Neither a credential nor a way to one.
    #[error(
        "this agent has no certificate in {} and no token: make one with `proxy-server token create` \
         and give it as join.tokenFile and join.caPin (or CORVID_JOIN_TOKEN and CORVID_CA_PIN); \
         in a pod, give join.serviceAccountTokenFile and join.caFile",
        dir.display()
    )]
    NotEnrolled {
        /// The state directory.
        dir: PathBuf,
    },
    /// The enrolment failed.
    #[error("enrol {name}")]
    Join {
        /// The agent.
        name: String,
        /// Why.
        #[source]
        source: Box<JoinError>,
    },
    /// The name is none that servers take.
    #[error("use the agent's name")]
    Name(#[from] proto::IdError),
    /// The TLS configuration can't be built.
    #[error("prepare TLS")]
    Tls(#[from] certs::TlsConfigError),
}

impl AppError {
    /// The process's exit code: starting again does not help where the configuration is to blame.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::NotEnrolled { .. } | Self::OtherIdentity { .. } | Self::Name(_) => Exit::Usage,
            Self::Endpoint(_)
            | Self::State { .. }
            | Self::Credential { .. }
            | Self::Bundle { .. }
            | Self::Join { .. }
            | Self::Tls(_) => Exit::Failed,
        }
    }
}

/// Why an enrolment or renewal failed.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token file can't be read.
    #[error("read the token from {}", file.display())]
    TokenFile {
        /// The file.
        file: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What was given is no token.
    #[error("read the join token")]
    Token(#[from] certs::TokenError),
    /// What was given is no ServiceAccount token.
    #[error("read the ServiceAccount token")]
    ServiceAccountToken(#[from] certs::ServiceAccountTokenError),
    /// The roots to expect can't be read.
    #[error("read the trust bundle {}", file.display())]
    CaFile {
        /// The file.
        file: PathBuf,
        /// Why not.
        #[source]
        source: Box<BundleError>,
    },
    /// No server has an address.
    #[error("none of the servers has an address")]
    NoAddress,
    /// The server refused, or could not be asked.
    #[error("ask {server} for a certificate")]
    Server {
        /// The last that was asked.
        server: SocketAddr,
        /// Why not.
        #[source]
        source: EnrollError,
    },
}

impl JoinError {
    /// Whether somebody has to do something before it can work.
    #[must_use]
    pub const fn is_final(&self) -> bool {
        match self {
            Self::Server { source, .. } => source.is_final(),
            Self::TokenFile { .. } | Self::Token(_) => true,
            // Both are replaced by the kubelet.
            Self::ServiceAccountToken(_) | Self::CaFile { .. } | Self::NoAddress => false,
        }
    }

    pub(crate) const fn server_error(&self) -> Option<&EnrollError> {
        match self {
            Self::Server { source, .. } => Some(source),
            Self::TokenFile { .. }
            | Self::Token(_)
            | Self::ServiceAccountToken(_)
            | Self::CaFile { .. }
            | Self::NoAddress => None,
        }
    }
}

/// Why a session did not come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("open a session with {address}")]
    Quic {
        address: SocketAddr,
        #[source]
        source: QuicError,
    },
    #[error("open a session with {address}: no answer within {after:?}")]
    Timeout {
        address: SocketAddr,
        after: Duration,
    },
    #[error("open a session with {address}")]
    Control {
        address: SocketAddr,
        #[source]
        source: ControlError,
    },
    #[error("read the identity of the server at {address}")]
    Peer {
        address: SocketAddr,
        #[source]
        source: PeerError,
    },
    #[error(
        "the server at {address} calls itself {claimed:?} but its certificate says {certified:?}"
    )]
    OtherServer {
        address: SocketAddr,
        claimed: String,
        certified: String,
    },
    #[error("{address} leads to {server}, which has a session already")]
    SameServer { address: SocketAddr, server: String },
}

impl OpenError {
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::Quic { source, .. } => match source {
                QuicError::Bind { source, .. } if is_out_of_files(source) => Reason::FilesExhausted,
                QuicError::Bind { .. } => Reason::Unreachable,
                QuicError::Tls(_) => Reason::Tls,
                QuicError::Connect(_) => Reason::Unreachable,
                QuicError::Dial { source, .. } => before_it_was_up(source),
            },
            Self::Timeout { .. } => Reason::Unreachable,
            // In TLS 1.3 a server that refuses this end's certificate says so after the dial.
            Self::Control { source, .. } => match source {
                ControlError::Session(lost)
                | ControlError::Stream(StreamError::Session(lost))
                | ControlError::Read(ReadFrameError::Stream(StreamError::Session(lost))) => {
                    before_it_was_up(lost)
                }
                ControlError::Handshake(_)
                | ControlError::Stream(_)
                | ControlError::Read(_)
                | ControlError::Timeout => source.reason(),
            },
            Self::Peer { .. } => Reason::Tls,
            Self::OtherServer { .. } => Reason::IdentityMismatch,
            Self::SameServer { .. } => Reason::Replaced,
        }
    }

    /// What TLS had against it, in words.
    pub(crate) fn tls_failure(&self) -> Option<&'static str> {
        self.alert().map(HandshakeFailure::sentence)
    }

    /// Whether a server that this end believes does not know the authority of this end's certificate: it says so once the
    /// dial has shown who it is.
    pub(crate) fn is_unknown(&self) -> bool {
        let dialled = matches!(self, Self::Control { .. });
        dialled && self.alert() == Some(HandshakeFailure::UnknownIssuer)
    }

    fn alert(&self) -> Option<HandshakeFailure> {
        let lost = match self {
            Self::Quic {
                source: QuicError::Dial { source, .. },
                ..
            }
            | Self::Control {
                source: ControlError::Session(source),
                ..
            } => source,
            Self::Control {
                source: ControlError::Stream(StreamError::Session(lost)),
                ..
            } => lost,
            Self::Control {
                source: ControlError::Read(ReadFrameError::Stream(StreamError::Session(lost))),
                ..
            } => lost,
            Self::Quic { .. }
            | Self::Timeout { .. }
            | Self::Control { .. }
            | Self::Peer { .. }
            | Self::OtherServer { .. }
            | Self::SameServer { .. } => return None,
        };
        match lost {
            SessionError::Tls { alert, .. } => Some(of_alert(*alert)),
            SessionError::Local(_)
            | SessionError::Peer(_)
            | SessionError::Silent
            | SessionError::Transport(_) => None,
        }
    }

    /// When the server wants to be asked again.
    pub(crate) const fn retry_after(&self) -> Duration {
        match self {
            Self::Control {
                source: ControlError::Handshake(HandshakeError::Refused { retry_after_ms, .. }),
                ..
            } => Duration::from_millis(*retry_after_ms as u64),
            Self::Quic { .. }
            | Self::Timeout { .. }
            | Self::Control { .. }
            | Self::Peer { .. }
            | Self::OtherServer { .. }
            | Self::SameServer { .. } => Duration::ZERO,
        }
    }
}

/// Whether the process or the host has no descriptors left.
pub(crate) fn is_out_of_files(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE))
}

/// What the end of a connection means that never was a session.
fn before_it_was_up(error: &SessionError) -> Reason {
    match error {
        SessionError::Silent | SessionError::Transport(_) => Reason::Unreachable,
        SessionError::Tls { alert, .. } => match of_alert(*alert) {
            HandshakeFailure::Revoked => Reason::Revoked,
            HandshakeFailure::Alpn
            | HandshakeFailure::BadCertificate
            | HandshakeFailure::Expired
            | HandshakeFailure::NoCertificate
            | HandshakeFailure::NotYetValid
            | HandshakeFailure::PinMismatch
            | HandshakeFailure::Protocol
            | HandshakeFailure::Timeout
            | HandshakeFailure::UnknownIssuer
            | HandshakeFailure::Unreachable
            | HandshakeFailure::WrongName
            | HandshakeFailure::WrongRole => Reason::Tls,
        },
        SessionError::Local(_) | SessionError::Peer(_) => error.reason(),
    }
}

fn of_alert(alert: u8) -> HandshakeFailure {
    HandshakeFailure::of(&rustls::Error::AlertReceived(alert.into()))
}

/// Whether trying again soon is of no use: somebody has to act, at the server or here.
pub(crate) const fn is_hopeless(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Revoked
            | Reason::NodeGone
            | Reason::IdentityMismatch
            | Reason::Version
            | Reason::Tls
    )
}
