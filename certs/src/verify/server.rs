//! Agent and client side: which server is believed.

use std::fmt;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, Error, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::{RuleError, check_rule};
use crate::bundle::{LiveBundle, Pin, TrustBundle};
use crate::clock::Clock;
use crate::identity::{Role, SERVER_SNI, TrustDomain};
use crate::tls_config;
use crate::x509::Facts;

/// Which name a server's leaf must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ServerName {
    /// The one that was dialled: clients of the frontends.
    Dialled,
    /// [`SERVER_SNI`], whatever was dialled: agents.
    Fixed,
}

/// Verifies servers by our own roots.
pub(crate) struct ServerVerifier {
    bundle: LiveBundle,
    trust_domain: TrustDomain,
    clock: Clock,
    name: ServerName,
}

impl ServerVerifier {
    pub(crate) fn new(own: &tls_config::Own, name: ServerName) -> Self {
        Self {
            bundle: own.bundle.clone(),
            trust_domain: own.trust_domain.clone(),
            clock: own.clock.clone(),
            name,
        }
    }

    /// For an agent that has nothing but the roots.
    pub(crate) fn of_roots(roots: TrustBundle, trust_domain: TrustDomain, clock: Clock) -> Self {
        Self {
            bundle: LiveBundle::new(roots),
            trust_domain,
            clock,
            name: ServerName::Fixed,
        }
    }
}

/// The server shows no authority with the pinned key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server shows no certificate authority that has the pinned key")]
pub(crate) struct PinMismatch;

/// Verifies a server at first contact: by the pin of its authority, which it must show in its chain.
pub(crate) struct PinnedVerifier {
    pin: Pin,
    trust_domain: TrustDomain,
    clock: Clock,
}

impl PinnedVerifier {
    pub(crate) const fn new(pin: Pin, trust_domain: TrustDomain, clock: Clock) -> Self {
        Self {
            pin,
            trust_domain,
            clock,
        }
    }

    /// The authority in `chain` that has the pinned key, as the only root.
    fn root(&self, chain: &[CertificateDer<'_>]) -> Result<TrustBundle, Error> {
        let pinned = chain.iter().find(|certificate| {
            Facts::read(certificate)
                .is_ok_and(|facts| facts.is_ca && Pin::of_public_key(&facts.public_key) == self.pin)
        });
        let Some(pinned) = pinned else {
            let reason = OtherError(std::sync::Arc::new(PinMismatch));
            return Err(CertificateError::Other(reason).into());
        };
        TrustBundle::from_der(vec![pinned.clone().into_owned()]).map_err(|error| {
            tracing::debug!(%error, "the pinned authority is unusable");
            CertificateError::BadEncoding.into()
        })
    }
}

/// webpki, then the rule.
fn verify(
    bundle: &TrustBundle,
    trust_domain: &TrustDomain,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    name: &rustls_pki_types::ServerName<'_>,
    now: UnixTime,
) -> Result<ServerCertVerified, Error> {
    let verified =
        bundle
            .server_verifier()
            .verify_server_cert(leaf, intermediates, name, &[], now)?;
    check_rule(leaf, trust_domain, Role::Server, None).map_err(RuleError::refuse)?;
    Ok(verified)
}

fn fixed_name() -> Result<rustls_pki_types::ServerName<'static>, Error> {
    rustls_pki_types::ServerName::try_from(SERVER_SNI)
        .map_err(|error| Error::General(error.to_string()))
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &rustls_pki_types::ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let name = match self.name {
            ServerName::Dialled => server_name.clone(),
            ServerName::Fixed => fixed_name()?,
        };
        let now = self.clock.now();
        let bundle = self.bundle.load();
        verify(
            &bundle,
            &self.trust_domain,
            end_entity,
            intermediates,
            &name,
            now,
        )
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &tls_config::provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &tls_config::provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        tls_config::provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &rustls_pki_types::ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let root = self.root(intermediates)?;
        let (name, now) = (fixed_name()?, self.clock.now());
        verify(
            &root,
            &self.trust_domain,
            end_entity,
            intermediates,
            &name,
            now,
        )
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &tls_config::provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &tls_config::provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        tls_config::provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl fmt::Debug for ServerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerVerifier")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for PinnedVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedVerifier")
            .field("pin", &self.pin)
            .finish_non_exhaustive()
    }
}
