//! Keys, chains, trust, enrolment and rotation: who is who in Corvid.
//!
//! In reading order: who ([`Identity`]), when ([`Clock`]), whom to trust ([`TrustBundle`]), what one has
//! ([`Credential`]), how it is signed ([`Csr`], [`Issuer`]), by whom ([`Ca`]) and renewed ([`renew_at`], [`LiveCredential`]),
//! who may enter ([`Peer`] and the doors of [`tls_config`]), and how an agent gets its first certificate
//! ([`JoinToken`], [`Store`], [`EnrollService`], [`enroll`](fn@enroll)).
//!
//! It knows nothing of the tunnel's protocol, of HTTP frontends and of Kubernetes.

mod bundle;
mod ca;
mod ca_dir;
mod clock;
mod credential;
mod csr;
mod enroll;
mod failure;
mod identity;
mod issuer;
mod live;
mod node_uid;
mod renew;
mod service_token;
mod store;
#[cfg(any(test, feature = "test-util"))]
pub mod test_ca;
pub mod tls_config;
mod token;
mod token_store;
mod verify;
mod x509;

pub use bundle::{BundleError, LiveBundle, Pin, PinError, TrustBundle};
pub use ca::Ca;
pub use ca_dir::CaDir;
pub use clock::Clock;
pub use credential::{Credential, CredentialError, Key, KeyError};
pub use csr::{Csr, CsrError, KeyDigest, MAX_CSR};
pub use enroll::{
    AgentFiles, AgentFilesError, Answer, EnrollError, EnrollLimits, EnrollRequest, EnrollService,
    Enrolled, NotVouched, Proof, ServeError, Trust, Vouch, Vouched, WhyNot, enroll, renew,
};
pub use failure::HandshakeFailure;
pub use identity::{Identity, IdentityError, Name, Role, SERVER_SNI, TrustDomain};
pub use issuer::{
    AGENT_LIFE, BACKDATE, CLIENT_DAYS, IssuedChain, Issuer, IssuerError, LiveIssuer, ROOT_LIFE,
    SERVER_LIFE, ServerSans, export_client,
};
pub use live::LiveCredential;
pub use node_uid::{NodeUid, NodeUidError};
pub use renew::{renew_at, retry_after};
pub use rustls_pki_types::UnixTime;
pub use service_token::{ServiceAccountToken, ServiceAccountTokenError};
pub use store::{MODE_PUBLIC, MODE_SECRET, StoreError, write_atomic};
pub use tls_config::{
    ALPN_ENROLL, ALPN_PEER, ALPN_TUNNEL, Own, TlsConfigError, enroll_client, enroll_client_pinned,
    enroll_client_trusting, enroll_server, frontend_client, frontend_server,
    frontend_server_optional, peer_client, peer_client_quic, peer_server, peer_server_quic,
    provider, tunnel_client, tunnel_client_quic, tunnel_server, tunnel_server_quic,
};
pub use token::{AgentPattern, JoinToken, NoRandomness, PatternError, TokenError, fits};
pub use token_store::{
    AgentEntry, MAX_USES, NewToken, RedeemError, Snapshot, Store, TokenEntry, TokenStoreError,
};
pub use verify::{
    FrontendTrust, OperatorPki, OperatorPkiError, Peer, PeerError, Revocations, holder, peer,
    quic_peer, requester, tls_peer,
};
pub use x509::Malformed;
