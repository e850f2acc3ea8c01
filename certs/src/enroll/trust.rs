//! What a first enrolment starts from: by what the server is known, and what entitles the agent.

use std::sync::Arc;

use rustls::ClientConfig;
use secrecy::ExposeSecret as _;

use super::pb;
use crate::bundle::{Pin, TrustBundle};
use crate::clock::Clock;
use crate::identity::TrustDomain;
use crate::service_token::ServiceAccountToken;
use crate::tls_config::{self, TlsConfigError};
use crate::token::JoinToken;

/// By what the server's authority is known before anything was given.
#[derive(Debug, Clone)]
pub enum Trust {
    /// The pin of its key; the server shows the rest.
    Pin(Pin),
    /// Its roots.
    Bundle(TrustBundle),
}

/// What entitles an agent to its first certificate.
#[derive(Debug, Clone)]
pub enum Proof {
    /// A token of the server's own making.
    Join(JoinToken),
    /// A token that its cluster has given it.
    ServiceAccount(ServiceAccountToken),
}

impl Trust {
    pub(super) fn tls(
        &self,
        trust_domain: &TrustDomain,
        clock: &Clock,
    ) -> Result<Arc<ClientConfig>, TlsConfigError> {
        match self {
            Self::Pin(pin) => tls_config::enroll_client_pinned(*pin, trust_domain, clock),
            Self::Bundle(roots) => {
                tls_config::enroll_client_trusting(roots.clone(), trust_domain, clock)
            }
        }
    }

    /// Whether roots that were given have something in common with what was trusted before.
    pub(super) fn agrees_with(&self, given: &TrustBundle) -> bool {
        let known = match self {
            Self::Pin(pin) => std::slice::from_ref(pin),
            Self::Bundle(roots) => roots.pins(),
        };
        known.iter().any(|pin| given.pins().contains(pin))
    }
}

impl Proof {
    pub(super) fn request(&self, agent_name: String, csr: Vec<u8>) -> pb::EnrollRequest {
        let (token, service_account_token) = match self {
            Self::Join(token) => (token.expose().expose_secret().to_owned(), String::new()),
            Self::ServiceAccount(token) => (String::new(), token.expose().to_owned()),
        };
        pb::EnrollRequest {
            token,
            agent_name,
            csr,
            service_account_token,
        }
    }
}
