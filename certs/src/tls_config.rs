//! The only place that builds rustls configurations.
//!
//! * The provider (aws-lc-rs) is passed explicitly; nothing depends on a process-wide default.
//! * TLS 1.3 alone between our own; frontends speak 1.2 too, because their clients are not ours.
//! * X25519MLKEM768 is offered first: what is recorded today is not to be read later.
//! * No resumption: no tickets, no session storage, no 0-RTT. rustls doesn't verify a client again when
//!   it resumes, and identity, role and revocation count at each handshake.
//! * The time is the [`Clock`]'s everywhere.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ServerConfig, SupportedCipherSuite, SupportedProtocolVersion};

use crate::bundle::{LiveBundle, Pin, TrustBundle};
use crate::clock::Clock;
use crate::identity::{Role, TrustDomain};
use crate::live::LiveCredential;
use crate::verify::{
    ClientVerifier, FrontendTrust, PinnedVerifier, Presence, Revocations, ServerName,
    ServerVerifier,
};

/// ALPN of the tunnel over QUIC.
pub const ALPN_TUNNEL: &[u8] = b"corvid/1";
/// ALPN between servers, over QUIC.
pub const ALPN_PEER: &[u8] = b"corvid-peer/1";
/// ALPN of the enrolment (gRPC).
pub const ALPN_ENROLL: &[u8] = b"h2";

/// A configuration can't be built.
#[derive(Debug, thiserror::Error)]
pub enum TlsConfigError {
    /// rustls refuses it.
    #[error("build a TLS configuration")]
    Tls(#[from] rustls::Error),
    /// No cipher for QUIC's first packets.
    #[error("build a QUIC configuration")]
    Quic(#[from] NoInitialCipherSuite),
}

/// What a side has of its own. Clones share the credential, the bundle and the clock.
#[derive(Debug, Clone)]
pub struct Own {
    /// Who it is.
    pub credential: LiveCredential,
    /// Whom it trusts.
    pub bundle: LiveBundle,
    /// What time it is.
    pub clock: Clock,
    /// Where it belongs.
    pub trust_domain: TrustDomain,
}

/// AES-128 first: fastest where there is hardware for it, and as strong as the key exchange.
/// ChaCha20 is kept for those who have no such hardware and say so.
const TLS13_SUITES: [SupportedCipherSuite; 3] = [
    cipher_suite::TLS13_AES_128_GCM_SHA256,
    cipher_suite::TLS13_AES_256_GCM_SHA384,
    cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
];

/// For frontends; all have forward secrecy and authenticated encryption.
const TLS12_SUITES: [SupportedCipherSuite; 6] = [
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    cipher_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
];

const KEY_EXCHANGES: [&dyn SupportedKxGroup; 3] = [
    kx_group::X25519MLKEM768,
    kx_group::X25519,
    kx_group::SECP256R1,
];

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: TLS13_SUITES.into_iter().chain(TLS12_SUITES).collect(),
        kx_groups: KEY_EXCHANGES.to_vec(),
        ..default_provider()
    })
});

/// aws-lc-rs with our suites and key exchanges. `main` may also install it as the process's default,
/// for libraries that ask for one.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::clone(&PROVIDER)
}

/// The tunnel's door: agents of ours that are not revoked, nobody else.
///
/// # Errors
/// rustls refuses the configuration.
pub fn tunnel_server(
    own: &Own,
    revoked: &Revocations,
) -> Result<Arc<ServerConfig>, TlsConfigError> {
    let verifier =
        ClientVerifier::ours(own, Role::Agent, Presence::Required).unless_revoked(revoked);
    server(
        own,
        &[&TLS13],
        verifier,
        Arc::new(own.credential.clone()),
        &[ALPN_TUNNEL],
    )
}

/// [`tunnel_server`] for quinn.
///
/// # Errors
/// As [`tunnel_server`].
pub fn tunnel_server_quic(
    own: &Own,
    revoked: &Revocations,
) -> Result<Arc<QuicServerConfig>, TlsConfigError> {
    Ok(Arc::new(QuicServerConfig::try_from(tunnel_server(
        own, revoked,
    )?)?))
}

/// An agent's side of the tunnel: a server of ours, by [`crate::SERVER_SNI`] whatever is dialled.
///
/// # Errors
/// rustls refuses the configuration.
pub fn tunnel_client(own: &Own) -> Result<Arc<ClientConfig>, TlsConfigError> {
    let verifier = Arc::new(ServerVerifier::new(own, ServerName::Fixed));
    client(&own.clock, verifier, Some(&own.credential), &[ALPN_TUNNEL])
}

/// [`tunnel_client`] for quinn; to be used with the server name [`crate::SERVER_SNI`].
///
/// # Errors
/// As [`tunnel_client`].
pub fn tunnel_client_quic(own: &Own) -> Result<Arc<QuicClientConfig>, TlsConfigError> {
    Ok(Arc::new(QuicClientConfig::try_from(tunnel_client(own)?)?))
}

/// The door between servers: servers of ours, nobody else.
///
/// # Errors
/// rustls refuses the configuration.
pub fn peer_server(own: &Own) -> Result<Arc<ServerConfig>, TlsConfigError> {
    let verifier = ClientVerifier::ours(own, Role::Server, Presence::Required);
    let resolver = Arc::new(own.credential.clone());
    server(own, &[&TLS13], verifier, resolver, &[ALPN_PEER])
}

/// [`peer_server`] for quinn.
///
/// # Errors
/// As [`peer_server`].
pub fn peer_server_quic(own: &Own) -> Result<Arc<QuicServerConfig>, TlsConfigError> {
    Ok(Arc::new(QuicServerConfig::try_from(peer_server(own)?)?))
}

/// A server's side towards another one: a server of ours, by [`crate::SERVER_SNI`] whatever is dialled.
///
/// # Errors
/// rustls refuses the configuration.
pub fn peer_client(own: &Own) -> Result<Arc<ClientConfig>, TlsConfigError> {
    let verifier = Arc::new(ServerVerifier::new(own, ServerName::Fixed));
    client(&own.clock, verifier, Some(&own.credential), &[ALPN_PEER])
}

/// [`peer_client`] for quinn; to be used with the server name [`crate::SERVER_SNI`].
///
/// # Errors
/// As [`peer_client`].
pub fn peer_client_quic(own: &Own) -> Result<Arc<QuicClientConfig>, TlsConfigError> {
    Ok(Arc::new(QuicClientConfig::try_from(peer_client(own)?)?))
}

/// A frontend's door: a client certificate is demanded. No ALPN is: kube-apiserver offers none.
///
/// # Errors
/// rustls refuses the configuration.
pub fn frontend_server(
    own: &Own,
    trust: &FrontendTrust,
) -> Result<Arc<ServerConfig>, TlsConfigError> {
    frontend(own, trust, Presence::Required)
}

/// A frontend where a client may show no certificate, to prove itself in HTTP. A certificate that is shown
/// must be a good one.
///
/// # Errors
/// rustls refuses the configuration.
pub fn frontend_server_optional(
    own: &Own,
    trust: &FrontendTrust,
) -> Result<Arc<ServerConfig>, TlsConfigError> {
    frontend(own, trust, Presence::Optional)
}

fn frontend(
    own: &Own,
    trust: &FrontendTrust,
    presence: Presence,
) -> Result<Arc<ServerConfig>, TlsConfigError> {
    let verifier = ClientVerifier::frontend(own, trust, presence);
    server(
        own,
        &[&TLS13, &TLS12],
        verifier,
        Arc::new(own.credential.clone()),
        &[],
    )
}

/// A client of a frontend: a server of ours, by the name or address that is dialled.
///
/// # Errors
/// rustls refuses the configuration.
pub fn frontend_client(own: &Own) -> Result<Arc<ClientConfig>, TlsConfigError> {
    let verifier = Arc::new(ServerVerifier::new(own, ServerName::Dialled));
    client(&own.clock, verifier, Some(&own.credential), &[])
}

/// The enrolment's door: no certificate (then a token decides), or an agent's, which may be expired by no
/// more than `grace` (then it may be renewed).
///
/// # Errors
/// rustls refuses the configuration.
pub fn enroll_server(
    own: &Own,
    revoked: &Revocations,
    grace: Duration,
) -> Result<Arc<ServerConfig>, TlsConfigError> {
    let verifier = ClientVerifier::ours(own, Role::Agent, Presence::Optional)
        .unless_revoked(revoked)
        .with_grace(grace);
    let resolver = Arc::new(WithRoots {
        credential: own.credential.clone(),
        bundle: own.bundle.clone(),
    });
    server(own, &[&TLS13], verifier, resolver, &[ALPN_ENROLL])
}

/// The first enrolment: no certificate yet, and the server is known by the pin of its authority.
///
/// # Errors
/// rustls refuses the configuration.
pub fn enroll_client_pinned(
    pin: Pin,
    trust_domain: &TrustDomain,
    clock: &Clock,
) -> Result<Arc<ClientConfig>, TlsConfigError> {
    let verifier = Arc::new(PinnedVerifier::new(
        pin,
        trust_domain.clone(),
        clock.clone(),
    ));
    client(clock, verifier, None, &[ALPN_ENROLL])
}

/// The first enrolment: no certificate yet, and the server is known by its roots.
///
/// # Errors
/// rustls refuses the configuration.
pub fn enroll_client_trusting(
    roots: TrustBundle,
    trust_domain: &TrustDomain,
    clock: &Clock,
) -> Result<Arc<ClientConfig>, TlsConfigError> {
    let verifier = Arc::new(ServerVerifier::of_roots(
        roots,
        trust_domain.clone(),
        clock.clone(),
    ));
    client(clock, verifier, None, &[ALPN_ENROLL])
}

/// A renewal: with the certificate that is to be renewed, even an expired one.
///
/// # Errors
/// rustls refuses the configuration.
pub fn enroll_client(own: &Own) -> Result<Arc<ClientConfig>, TlsConfigError> {
    let verifier = Arc::new(ServerVerifier::new(own, ServerName::Fixed));
    client(&own.clock, verifier, Some(&own.credential), &[ALPN_ENROLL])
}

fn server(
    own: &Own,
    versions: &[&'static SupportedProtocolVersion],
    verifier: ClientVerifier,
    resolver: Arc<dyn ResolvesServerCert>,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, TlsConfigError> {
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(own.clock.clone()))
        .with_protocol_versions(versions)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(resolver);
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

fn client(
    clock: &Clock,
    verifier: Arc<dyn ServerCertVerifier>,
    credential: Option<&LiveCredential>,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, TlsConfigError> {
    let builder = ClientConfig::builder_with_details(provider(), Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match credential {
        Some(credential) => builder.with_client_cert_resolver(Arc::new(credential.clone())),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(Arc::new(config))
}

/// Shows the roots behind the leaf: an agent that has only a pin finds there what it pins. Elsewhere the
/// roots would be dead weight in each handshake.
#[derive(Debug)]
struct WithRoots {
    credential: LiveCredential,
    bundle: LiveBundle,
}

impl ResolvesServerCert for WithRoots {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let credential = self.credential.load();
        let bundle = self.bundle.load();
        let chain = credential
            .chain()
            .iter()
            .chain(bundle.roots())
            .cloned()
            .collect();
        let key = Arc::clone(&credential.certified().key);
        Some(Arc::new(CertifiedKey::new(chain, key)))
    }
}

#[cfg(test)]
mod tests {
    use rustls::NamedGroup;
    use rustls::server::Acceptor;

    use super::*;
    use crate::test_ca::TestCa;

    #[test]
    fn the_first_key_exchange_offered_is_post_quantum_and_the_first_cipher_aes_128() {
        let ca = TestCa::new();
        let config = tunnel_client(&ca.own(ca.agent("edge1"))).unwrap();
        let name = crate::SERVER_SNI.try_into().unwrap();
        let mut connection = rustls::ClientConnection::new(config, name).unwrap();
        let mut wire = Vec::new();
        connection.write_tls(&mut wire).unwrap();
        let mut acceptor = Acceptor::default();
        acceptor.read_tls(&mut wire.as_slice()).unwrap();
        let accepted = acceptor.accept().unwrap().unwrap();
        let hello = accepted.client_hello();
        assert_eq!(
            hello.named_groups().unwrap(),
            [
                NamedGroup::X25519MLKEM768,
                NamedGroup::X25519,
                NamedGroup::secp256r1
            ]
        );
        assert_eq!(
            hello.cipher_suites()[0],
            rustls::CipherSuite::TLS13_AES_128_GCM_SHA256
        );
        assert_eq!(hello.server_name(), Some(crate::SERVER_SNI));
        assert_eq!(hello.alpn().unwrap().collect::<Vec<_>>(), [ALPN_TUNNEL]);
    }

    #[test]
    fn nothing_is_resumed() {
        let ca = TestCa::new();
        let own = ca.own(ca.server("s1"));
        let revoked = Revocations::new();
        let servers = [
            tunnel_server(&own, &revoked),
            enroll_server(&own, &revoked, Duration::ZERO),
            frontend_server(&own, &FrontendTrust::Ours),
            frontend_server_optional(&own, &FrontendTrust::Ours),
            peer_server(&own),
        ];
        for config in servers {
            let config = config.unwrap();
            assert!(!config.session_storage.can_cache());
            assert!(!config.ticketer.enabled());
            assert_eq!(config.send_tls13_tickets, 0);
            assert_eq!(config.max_early_data_size, 0);
        }
    }
}
