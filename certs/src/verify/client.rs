//! Server side: which client certificates open a door.

use std::fmt;
use std::time::Duration;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::{PeerError, Revocations, RuleError, check_rule};
use crate::bundle::{LiveBundle, TrustBundle};
use crate::clock::Clock;
use crate::identity::{Role, TrustDomain};
use crate::tls_config;
use crate::x509::Facts;

/// Whose clients may use a frontend.
#[derive(Debug, Clone)]
pub enum FrontendTrust {
    /// Those with a client certificate of our own authority.
    Ours,
    /// Those whom the operator's own PKI vouches for, by name.
    Operator(OperatorPki),
}

/// The operator's own PKI for a frontend: its roots, and the names of those who may enter.
///
/// A certificate's common name or any of its DNS or URI names must be in the list: an authority such as a
/// cluster's signs for many who have no business here.
#[derive(Debug, Clone)]
pub struct OperatorPki {
    bundle: LiveBundle,
    allowed_names: Vec<String>,
}

/// An operator's PKI can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OperatorPkiError {
    /// Without names everybody with a certificate would be let in.
    #[error("an own PKI needs at least one allowed name")]
    NoNames,
}

impl OperatorPki {
    /// Lets those in whom `roots` vouches for and whose name is in `allowed_names`.
    ///
    /// # Errors
    /// There is no name.
    pub fn new(roots: TrustBundle, allowed_names: Vec<String>) -> Result<Self, OperatorPkiError> {
        if allowed_names.is_empty() {
            return Err(OperatorPkiError::NoNames);
        }
        Ok(Self {
            bundle: LiveBundle::new(roots),
            allowed_names,
        })
    }

    /// The roots, to be replaced when their file changes.
    #[must_use]
    pub const fn bundle(&self) -> &LiveBundle {
        &self.bundle
    }

    fn check(&self, leaf: &CertificateDer<'_>) -> Result<(), RuleError> {
        let facts = Facts::read(leaf).map_err(PeerError::Malformed)?;
        let mut names = facts
            .common_name
            .iter()
            .chain(&facts.dns_names)
            .chain(&facts.uris);
        if names.any(|name| self.allowed_names.contains(name)) {
            Ok(())
        } else {
            Err(RuleError::NotAllowed)
        }
    }
}

/// Whether a client must show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    Optional,
    Required,
}

enum Trust {
    Ours {
        bundle: LiveBundle,
        trust_domain: TrustDomain,
        role: Role,
        revoked: Option<Revocations>,
    },
    Operator(OperatorPki),
}

/// Verifies client certificates for one door.
pub(crate) struct ClientVerifier {
    trust: Trust,
    presence: Presence,
    clock: Clock,
    /// How long after its end a leaf is still good; zero everywhere but at the enrolment.
    grace: Duration,
}

impl ClientVerifier {
    /// A door for `role` of our own authority.
    pub(crate) fn ours(own: &tls_config::Own, role: Role, presence: Presence) -> Self {
        let trust = Trust::Ours {
            bundle: own.bundle.clone(),
            trust_domain: own.trust_domain.clone(),
            role,
            revoked: None,
        };
        Self {
            trust,
            presence,
            clock: own.clock.clone(),
            grace: Duration::ZERO,
        }
    }

    /// A frontend.
    pub(crate) fn frontend(
        own: &tls_config::Own,
        trust: &FrontendTrust,
        presence: Presence,
    ) -> Self {
        match trust {
            FrontendTrust::Ours => Self::ours(own, Role::Client, presence),
            FrontendTrust::Operator(pki) => Self {
                trust: Trust::Operator(pki.clone()),
                presence,
                clock: own.clock.clone(),
                grace: Duration::ZERO,
            },
        }
    }

    /// Refuses revoked agents.
    pub(crate) fn unless_revoked(mut self, by: &Revocations) -> Self {
        if let Trust::Ours { revoked, .. } = &mut self.trust {
            *revoked = Some(by.clone());
        }
        self
    }

    /// Accepts a leaf that fails only for being expired, for `grace` after its end.
    pub(crate) const fn with_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// webpki's verdict; an expired leaf within the grace is judged as of its last valid second.
    fn verify_chain(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<ClientCertVerified, Error> {
        let bundle = match &self.trust {
            Trust::Ours { bundle, .. } => bundle.load(),
            Trust::Operator(pki) => pki.bundle.load(),
        };
        let webpki = bundle.client_verifier();
        let now = self.clock.now();
        let verdict = webpki.verify_client_cert(leaf, intermediates, now);
        let Err(error) = &verdict else { return verdict };
        if self.grace.is_zero() || !is_expired(error) {
            return verdict;
        }
        let Ok(facts) = Facts::read(leaf) else {
            return verdict;
        };
        let end = facts
            .not_after
            .as_secs()
            .saturating_add(self.grace.as_secs());
        if now.as_secs() > end {
            return verdict;
        }
        webpki.verify_client_cert(leaf, intermediates, facts.not_after)
    }
}

fn is_expired(error: &Error) -> bool {
    matches!(
        error,
        Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. }
        )
    )
}

impl ClientCertVerifier for ClientVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        self.presence == Presence::Required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // None: the roots change in place, and a client without hints shows what it has.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.verify_chain(end_entity, intermediates)?;
        match &self.trust {
            Trust::Ours {
                trust_domain,
                role,
                revoked,
                ..
            } => {
                check_rule(end_entity, trust_domain, *role, revoked.as_ref())
                    .map_err(RuleError::refuse)?;
            }
            Trust::Operator(pki) => pki.check(end_entity).map_err(RuleError::refuse)?,
        }
        Ok(verified)
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

impl fmt::Debug for ClientVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let door = match &self.trust {
            Trust::Ours { role, .. } => role.as_str(),
            Trust::Operator(_) => "operator",
        };
        f.debug_struct("ClientVerifier")
            .field("door", &door)
            .field("presence", &self.presence)
            .field("grace", &self.grace)
            .finish_non_exhaustive()
    }
}
