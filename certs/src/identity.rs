//! Who a certificate says its holder is: one URI SAN `spiffe://<trust domain>/<role>/<name>`.
//!
//! Pure: parsing is validation, and a value of these types is always well-formed. Nothing here decides
//! what an identity may do; that is [`crate::verify`].

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The DNS SAN that each server leaf carries and that agents send as SNI, whatever address they dial.
///
/// A server's address is thus no part of its identity: it may move without a new certificate.
pub const SERVER_SNI: &str = "server.corvid.internal";

/// Longest name, in bytes: that of a DNS-1123 subdomain, as Kubernetes limits node names.
const MAX_NAME: usize = 253;

/// Longest label of a name, in bytes (RFC 1123).
const MAX_LABEL: usize = 63;

/// Why a name or an identity is not well-formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// No bytes, or more than 253.
    #[error("a name has 1 to 253 characters")]
    Length,
    /// Not a DNS-1123 subdomain.
    #[error(
        "a name consists of labels of a-z, 0-9 and '-', separated by dots, each of 1 to 63 characters, not starting or ending with '-'"
    )]
    Label,
    /// Not of the form `spiffe://<trust domain>/<role>/<name>`.
    #[error("an identity has the form spiffe://<trust domain>/<agent|client|server>/<name>")]
    Form,
}

/// What the holder of a certificate is; it decides which door opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// An edge-agent: the tunnel and the renewal of its own leaf.
    Agent,
    /// kube-apiserver, a scraper, an operator: the frontends.
    Client,
    /// A proxy-server.
    Server,
}

impl Role {
    /// The word in the URI.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "agent" => Ok(Self::Agent),
            "client" => Ok(Self::Client),
            "server" => Ok(Self::Server),
            _ => Err(IdentityError::Form),
        }
    }
}

/// Checks a DNS-1123 subdomain.
fn check_subdomain(text: &str) -> Result<(), IdentityError> {
    if text.is_empty() || text.len() > MAX_NAME {
        return Err(IdentityError::Length);
    }
    let good_label = |label: &str| {
        !label.is_empty()
            && label.len() <= MAX_LABEL
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    };
    if text.split('.').all(good_label) {
        Ok(())
    } else {
        Err(IdentityError::Label)
    }
}

/// The name of an agent, a client or a server: a DNS-1123 subdomain, as node names are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// The realm of one private authority; `corvid` unless configured.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TrustDomain(String);

impl Name {
    /// Checks and takes a name.
    ///
    /// # Errors
    /// It is no DNS-1123 subdomain.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        check_subdomain(text).map(|()| Self(text.to_owned()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it reads as the name of a Kubernetes Service (`web.shop.svc`, with or without the cluster's domain). An
    /// agent of that name would be given what is meant for the Service.
    #[must_use]
    pub fn is_of_service(&self) -> bool {
        self.0.split('.').skip(2).any(|label| label == "svc")
    }
}

impl TrustDomain {
    /// Checks and takes a trust domain.
    ///
    /// # Errors
    /// It is no DNS-1123 subdomain.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        check_subdomain(text).map(|()| Self(text.to_owned()))
    }

    /// The trust domain as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TrustDomain {
    fn default() -> Self {
        Self("corvid".to_owned())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl TryFrom<String> for Name {
    type Error = IdentityError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        check_subdomain(&text).map(|()| Self(text))
    }
}

impl TryFrom<String> for TrustDomain {
    type Error = IdentityError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        check_subdomain(&text).map(|()| Self(text))
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl From<TrustDomain> for String {
    fn from(domain: TrustDomain) -> Self {
        domain.0
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for TrustDomain {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// Role and name within a trust domain; displayed as the URI that stands in the certificate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// Whose authority vouches for it.
    pub trust_domain: TrustDomain,
    /// What it is.
    pub role: Role,
    /// Which one it is.
    pub name: Name,
}

impl Identity {
    /// Puts an identity together.
    #[must_use]
    pub const fn new(trust_domain: TrustDomain, role: Role, name: Name) -> Self {
        Self {
            trust_domain,
            role,
            name,
        }
    }

    /// Reads the URI of a certificate.
    ///
    /// # Errors
    /// It has another form than `spiffe://<trust domain>/<role>/<name>`.
    pub fn parse(uri: &str) -> Result<Self, IdentityError> {
        let rest = uri.strip_prefix("spiffe://").ok_or(IdentityError::Form)?;
        let (trust_domain, rest) = rest.split_once('/').ok_or(IdentityError::Form)?;
        let (role, name) = rest.split_once('/').ok_or(IdentityError::Form)?;
        Ok(Self {
            trust_domain: TrustDomain::parse(trust_domain)?,
            role: role.parse()?,
            name: Name::parse(name)?,
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/{}/{}",
            self.trust_domain, self.role, self.name
        )
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_identity_survives_the_way_through_its_uri() {
        for uri in [
            "spiffe://corvid/agent/edge1",
            "spiffe://a.b/server/x.y-z.0",
            "spiffe://c/client/k",
        ] {
            assert_eq!(Identity::parse(uri).unwrap().to_string(), uri);
        }
    }

    #[test]
    fn malformed_identities_are_refused() {
        for uri in [
            "",
            "spiffe://",
            "spiffe://corvid",
            "spiffe://corvid/agent",
            "spiffe://corvid/agent/",
            "spiffe://corvid/agent/a/b",
            "spiffe://corvid/root/a",
            "spiffe://corvid/Agent/a",
            "spiffe:///agent/a",
            "spiffe://corvid:1/agent/a",
            "spiffe://corvid/agent/a?x",
            "https://corvid/agent/a",
        ] {
            assert!(Identity::parse(uri).is_err(), "{uri}");
        }
    }

    #[test]
    fn names_are_dns_1123_subdomains() {
        let longest = format!(
            "{}.{}.{}.{}",
            "a".repeat(63),
            "b".repeat(63),
            "c".repeat(63),
            "d".repeat(61)
        );
        assert_eq!(longest.len(), 253);
        for good in ["a", "0", "edge-1", "a.b", &longest] {
            assert!(Name::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "a-",
            "a..b",
            ".a",
            "a.",
            "A",
            "a_b",
            "é",
            "a b",
            "a\0",
            &"a".repeat(64),
            &format!("{longest}x"),
        ] {
            assert!(Name::parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn whatever_parses_displays_as_it_was(text in "[a-z0-9.:/-]{0,40}") {
            let uri = format!("spiffe://{text}");
            if let Ok(identity) = Identity::parse(&uri) {
                prop_assert_eq!(identity.to_string(), uri);
            }
        }
    }
}
