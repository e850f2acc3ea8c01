//! Who may enter: the webpki verifiers of rustls, and our rule on top of them, never instead.
//!
//! webpki decides whether a chain is genuine and in its time; the rule decides whether the holder is of
//! the role that the door is for, of our trust domain, and not revoked. Both are decided within the
//! handshake. Refusals carry the closest TLS alert, so that the other side learns which it was; the
//! detail is logged here, at debug level, because QUIC hands only the alert on.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::{CertificateError, Error};
use rustls_pki_types::{CertificateDer, UnixTime};

use crate::identity::{Identity, IdentityError, Name, Role, TrustDomain};
use crate::node_uid::NodeUid;
use crate::x509::{self, Facts, Malformed};

mod client;
mod server;

pub(crate) use client::{ClientVerifier, Presence};
pub use client::{FrontendTrust, OperatorPki, OperatorPkiError};
pub(crate) use server::{PinMismatch, PinnedVerifier, ServerName, ServerVerifier};

/// Who is at the other end of an accepted connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Who the certificate says it is.
    pub identity: Identity,
    /// Which node of that name an agent was certified for; `None` outside a cluster, and of other roles.
    pub node_uid: Option<NodeUid>,
    /// Start of the leaf's life.
    pub not_before: UnixTime,
    /// End of the leaf's life.
    pub not_after: UnixTime,
    /// SHA-256 of the leaf, hex.
    pub fingerprint: String,
}

/// A certificate doesn't say who its holder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// There is none.
    #[error("the peer has shown no certificate")]
    NoCertificate,
    /// The bytes are no certificate.
    #[error("the peer's certificate is malformed")]
    Malformed(#[source] Malformed),
    /// No URI SAN, or several: SPIFFE demands exactly one.
    #[error("the certificate has not exactly one URI name")]
    NotOneUri,
    /// The URI is no identity.
    #[error("the certificate's URI name is no identity")]
    Identity(#[from] IdentityError),
    /// An agent's subject has serial numbers that are not one node's uid.
    #[error("the serial number in the certificate's subject is no node's uid")]
    NodeUid,
}

/// Reads who a chain (leaf first) says its holder is. Of any use only after the chain was verified.
///
/// # Errors
/// There is no leaf, or it has no identity of ours.
pub fn peer(chain: &[CertificateDer<'_>]) -> Result<Peer, PeerError> {
    let leaf = chain.first().ok_or(PeerError::NoCertificate)?;
    let facts = Facts::read(leaf).map_err(PeerError::Malformed)?;
    let [uri] = facts.uris.as_slice() else {
        return Err(PeerError::NotOneUri);
    };
    let identity = Identity::parse(uri)?;
    Ok(Peer {
        node_uid: node_uid(&identity, &facts)?,
        identity,
        not_before: facts.not_before,
        not_after: facts.not_after,
        fingerprint: x509::hex(&x509::sha256(leaf)),
    })
}

/// Of agents alone: what an operator's PKI writes there for others is its own affair.
fn node_uid(identity: &Identity, facts: &Facts) -> Result<Option<NodeUid>, PeerError> {
    match (identity.role, facts.subject_serials.as_slice()) {
        (Role::Client | Role::Server, _) | (Role::Agent, []) => Ok(None),
        (Role::Agent, [serial]) => serial
            .parse()
            .map(Some)
            .map_err(|_no_uid| PeerError::NodeUid),
        (Role::Agent, [_, _, ..]) => Err(PeerError::NodeUid),
    }
}

/// The peer of a TLS connection whose handshake is done; `None` if it showed no certificate.
///
/// # Errors
/// Its certificate has no identity of ours.
pub fn tls_peer(connection: &rustls::CommonState) -> Result<Option<Peer>, PeerError> {
    connection.peer_certificates().map(peer).transpose()
}

/// The peer of a QUIC connection whose handshake is done.
///
/// # Errors
/// It showed no certificate, or one without an identity of ours.
pub fn quic_peer(connection: &quinn::Connection) -> Result<Peer, PeerError> {
    let identity = connection.peer_identity().ok_or(PeerError::NoCertificate)?;
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>();
    chain.map_or(Err(PeerError::NoCertificate), |chain| peer(&chain))
}

/// How to call the holder of a verified certificate in a log: `role/name` of ours, else the common name,
/// else the first name it has.
#[must_use]
pub fn requester(chain: &[CertificateDer<'_>]) -> String {
    if let Ok(peer) = peer(chain) {
        return format!("{}/{}", peer.identity.role, peer.identity.name);
    }
    let facts = chain.first().and_then(|leaf| Facts::read(leaf).ok());
    facts
        .and_then(|facts| {
            facts
                .common_name
                .or_else(|| facts.dns_names.into_iter().chain(facts.uris).next())
        })
        .unwrap_or_else(|| "unnamed".to_owned())
}

/// The name of the holder of a certificate that a frontend has verified, for rules about clients: the identity's of
/// ours, else the common name, else the first name it has. Nothing tells roles apart here; the handshake has done so.
#[must_use]
pub fn holder(chain: &[CertificateDer<'_>]) -> String {
    peer(chain).map_or_else(
        |_foreign| requester(chain),
        |peer| peer.identity.name.to_string(),
    )
}

/// The agents that are refused, replaced as a whole when the token store changes. Clones share it.
#[derive(Clone, Default)]
pub struct Revocations {
    names: Arc<ArcSwap<HashSet<Name>>>,
}

impl Revocations {
    /// Nobody.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Refuses `names` from the next handshake on, and nobody else.
    pub fn replace(&self, names: HashSet<Name>) {
        self.names.store(Arc::new(names));
    }

    /// Whether the agent `name` is refused.
    #[must_use]
    pub fn contains(&self, name: &Name) -> bool {
        self.names.load().contains(name)
    }
}

impl fmt::Debug for Revocations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Revocations({})", self.names.load().len())
    }
}

/// Why a genuine certificate doesn't open this door.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RuleError {
    /// It says not who its holder is.
    #[error("read the certificate's identity")]
    Peer(#[from] PeerError),
    /// Another realm.
    #[error("trust domain {found} is not ours")]
    TrustDomain {
        /// Of the certificate.
        found: TrustDomain,
    },
    /// The door is for others.
    #[error("a certificate of role {found} at a door for role {wanted}")]
    Role {
        /// Of the certificate.
        found: Role,
        /// Of the door.
        wanted: Role,
    },
    /// The operator has revoked the agent.
    #[error("agent {0} is revoked")]
    Revoked(Name),
    /// Operator's own PKI: none of the names is allowed.
    #[error("none of the certificate's names is allowed")]
    NotAllowed,
}

impl RuleError {
    /// Logs the detail and turns it into what rustls knows.
    fn refuse(self) -> Error {
        tracing::debug!(error = %self, "certificate refused");
        Error::InvalidCertificate(match self {
            Self::Revoked(_) => CertificateError::Revoked,
            Self::Peer(_) => CertificateError::BadEncoding,
            Self::TrustDomain { .. } | Self::Role { .. } | Self::NotAllowed => {
                CertificateError::ApplicationVerificationFailure
            }
        })
    }
}

/// Our rule for certificates of our own authority.
fn check_rule(
    leaf: &CertificateDer<'_>,
    trust_domain: &TrustDomain,
    wanted: Role,
    revoked: Option<&Revocations>,
) -> Result<Peer, RuleError> {
    let peer = peer(std::slice::from_ref(leaf))?;
    let identity = &peer.identity;
    if identity.trust_domain != *trust_domain {
        return Err(RuleError::TrustDomain {
            found: identity.trust_domain.clone(),
        });
    }
    if identity.role != wanted {
        return Err(RuleError::Role {
            found: identity.role,
            wanted,
        });
    }
    if wanted == Role::Agent && revoked.is_some_and(|revoked| revoked.contains(&identity.name)) {
        return Err(RuleError::Revoked(identity.name.clone()));
    }
    Ok(peer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_ca::{TestCa, TestLeaf};

    #[test]
    fn a_leaf_says_who_it_is() {
        let credential = TestCa::new().agent("edge1");
        let peer = peer(credential.chain()).unwrap();
        assert_eq!(peer.identity, *credential.identity());
        assert_eq!(peer.fingerprint, credential.fingerprint());
        assert_eq!(requester(credential.chain()), "agent/edge1");
        assert_eq!(holder(credential.chain()), "edge1");
    }

    #[test]
    fn a_certificate_with_two_uris_or_none_is_nobody() {
        let ca = TestCa::new();
        let leaf = |uris: &[&str]| ca.plain_leaf("someone", uris);
        let two = leaf(&["spiffe://corvid/agent/a", "spiffe://corvid/agent/b"]);
        assert_eq!(peer(&[two]), Err(PeerError::NotOneUri));
        let none = leaf(&[]);
        assert_eq!(requester(std::slice::from_ref(&none)), "someone");
        assert_eq!(holder(std::slice::from_ref(&none)), "someone");
        assert_eq!(peer(&[none]), Err(PeerError::NotOneUri));
        assert_eq!(peer(&[]), Err(PeerError::NoCertificate));
        assert!(matches!(
            peer(&[leaf(&["https://x"])]),
            Err(PeerError::Identity(_))
        ));
    }

    #[test]
    fn an_agents_leaf_says_which_node_of_its_name() {
        let ca = TestCa::new();
        let uid = "6f1c5b0e-9d1f-4c5e-8a55-0123456789ab";
        let certified = ca.leaf(&TestLeaf::new(Role::Agent, "edge1").of_node(uid));
        let read = peer(certified.chain()).unwrap();
        assert_eq!(read.node_uid.unwrap().as_str(), uid);
        assert_eq!(peer(ca.agent("edge1").chain()).unwrap().node_uid, None);
        let uri = ["spiffe://corvid/agent/edge1"];
        for serial in ["7", "", "edge1"] {
            let leaf = ca.leaf_with_serial(serial, &uri);
            assert_eq!(peer(&[leaf]), Err(PeerError::NodeUid), "{serial:?}");
        }
        let mut twice = Facts::read(&certified.chain()[0]).unwrap();
        twice.subject_serials = vec![uid.to_owned(), uid.to_owned()];
        let refused = node_uid(certified.identity(), &twice);
        assert_eq!(refused, Err(PeerError::NodeUid));
        let client = ca.leaf_with_serial("7", &["spiffe://corvid/client/prom"]);
        assert_eq!(peer(&[client]).unwrap().node_uid, None);
    }

    #[test]
    fn the_rule_wants_domain_and_role_and_no_revocation() {
        let ca = TestCa::new();
        let leaf = ca.agent("edge1").chain()[0].clone();
        let ours = TrustDomain::default();
        let revoked = Revocations::new();
        assert!(check_rule(&leaf, &ours, Role::Agent, Some(&revoked)).is_ok());
        let wrong = check_rule(&leaf, &ours, Role::Client, None);
        assert_eq!(
            wrong,
            Err(RuleError::Role {
                found: Role::Agent,
                wanted: Role::Client
            })
        );
        let other = TrustDomain::parse("other").unwrap();
        let wrong = check_rule(&leaf, &other, Role::Agent, None);
        assert_eq!(
            wrong,
            Err(RuleError::TrustDomain {
                found: ours.clone()
            })
        );
        let edge1 = Name::parse("edge1").unwrap();
        revoked.replace(HashSet::from([edge1.clone()]));
        let wrong = check_rule(&leaf, &ours, Role::Agent, Some(&revoked));
        assert_eq!(wrong, Err(RuleError::Revoked(edge1)));
    }
}
