//! A throw-away authority for tests of this and other crates: right leaves and wrong ones.
//!
//! Every certificate is really signed and really verified; only the authority is of no importance.

use std::sync::Arc;
use std::time::Duration;

use rcgen::{CertificateParams, DnType, SanType};
use rustls_pki_types::{CertificateDer, UnixTime};

use crate::bundle::{LiveBundle, Pin, TrustBundle};
use crate::clock::{Clock, from_secs};
use crate::credential::Credential;
use crate::identity::{Identity, Name, Role, TrustDomain};
use crate::issuer::{Issuer, Profile, SUBJECT_SERIAL, ServerSans, server_sans};
use crate::live::LiveCredential;
use crate::tls_config::Own;

/// An authority that lives in memory. Methods panic where a product would return an error.
#[derive(Debug, Clone)]
pub struct TestCa {
    issuer: Arc<Issuer>,
    trust_domain: TrustDomain,
}

/// A leaf with each thing adjustable.
#[derive(Debug, Clone)]
pub struct TestLeaf {
    /// What it is.
    pub role: Role,
    /// Which one.
    pub name: String,
    /// Whose; that of the authority unless set.
    pub trust_domain: Option<String>,
    /// Seconds from now to the start of its life; negative is in the past.
    pub starts_in: i64,
    /// Seconds from now to its end; negative is in the past.
    pub ends_in: i64,
    /// DNS names and addresses; `None` are those of its role.
    pub dns_names: Option<Vec<String>>,
    /// Which node of its name.
    pub node_uid: Option<String>,
}

impl TestLeaf {
    /// A good leaf: valid for an hour.
    #[must_use]
    pub fn new(role: Role, name: &str) -> Self {
        Self {
            role,
            name: name.to_owned(),
            trust_domain: None,
            starts_in: -300,
            ends_in: 3600,
            dns_names: None,
            node_uid: None,
        }
    }

    /// Ended `ago` seconds ago, began an hour before that.
    #[must_use]
    pub const fn expired(mut self, ago: i64) -> Self {
        self.ends_in = -ago;
        self.starts_in = -ago - 3600;
        self
    }

    /// Begins in an hour.
    #[must_use]
    pub const fn not_yet_valid(mut self) -> Self {
        self.starts_in = 3600;
        self.ends_in = 7200;
        self
    }

    /// Of another trust domain, signed by the same authority.
    #[must_use]
    pub fn of_trust_domain(mut self, trust_domain: &str) -> Self {
        self.trust_domain = Some(trust_domain.to_owned());
        self
    }

    /// Of that node of its name.
    #[must_use]
    pub fn of_node(mut self, uid: &str) -> Self {
        self.node_uid = Some(uid.to_owned());
        self
    }

    /// With these DNS names alone (for servers: without the fixed one).
    #[must_use]
    pub fn with_dns_names(mut self, names: &[&str]) -> Self {
        self.dns_names = Some(names.iter().map(|name| (*name).to_owned()).collect());
        self
    }
}

#[expect(
    clippy::expect_used,
    reason = "for tests alone, where a panic is the report"
)]
impl TestCa {
    /// An authority of the default trust domain.
    #[must_use]
    pub fn new() -> Self {
        Self::of_trust_domain(&TrustDomain::default())
    }

    /// An authority of `trust_domain`.
    #[must_use]
    pub fn of_trust_domain(trust_domain: &TrustDomain) -> Self {
        let issuer = Issuer::in_memory(trust_domain, now()).expect("an authority");
        Self {
            issuer: Arc::new(issuer),
            trust_domain: trust_domain.clone(),
        }
    }

    /// An authority that was made elsewhere.
    #[must_use]
    pub fn of_issuer(issuer: Arc<Issuer>) -> Self {
        Self {
            trust_domain: issuer.trust_domain().clone(),
            issuer,
        }
    }

    /// The authority as the product knows it.
    #[must_use]
    pub fn issuer(&self) -> Arc<Issuer> {
        Arc::clone(&self.issuer)
    }

    /// Its root.
    #[must_use]
    pub fn bundle(&self) -> TrustBundle {
        self.issuer.bundle().clone()
    }

    /// Its root's pin.
    #[must_use]
    pub fn pin(&self) -> Pin {
        self.issuer.pin()
    }

    /// A good agent.
    #[must_use]
    pub fn agent(&self, name: &str) -> Credential {
        self.leaf(&TestLeaf::new(Role::Agent, name))
    }

    /// A good client.
    #[must_use]
    pub fn client(&self, name: &str) -> Credential {
        self.leaf(&TestLeaf::new(Role::Client, name))
    }

    /// A good server, also for `localhost` and the loopback addresses.
    #[must_use]
    pub fn server(&self, name: &str) -> Credential {
        self.leaf(&TestLeaf::new(Role::Server, name))
    }

    /// Any leaf.
    #[must_use]
    pub fn leaf(&self, leaf: &TestLeaf) -> Credential {
        let trust_domain = leaf.trust_domain.as_ref().map_or_else(
            || self.trust_domain.clone(),
            |text| TrustDomain::parse(text).expect("a trust domain"),
        );
        let name = Name::parse(&leaf.name).expect("a name");
        let at = |seconds: i64| from_secs(now().as_secs().saturating_add_signed(seconds));
        let profile = Profile {
            identity: Identity::new(trust_domain, leaf.role, name),
            node_uid: leaf
                .node_uid
                .as_ref()
                .map(|uid| uid.parse().expect("a uid")),
            not_before: at(leaf.starts_in),
            not_after: at(leaf.ends_in),
            sans: leaf
                .dns_names
                .as_ref()
                .map_or_else(|| usual_sans(leaf.role), |names| sans(names)),
        };
        self.issuer.issue(&profile).expect("a signed leaf")
    }

    /// A leaf of an ordinary PKI: common name and URIs as given, no key to it.
    #[must_use]
    pub fn plain_leaf(&self, common_name: &str, uris: &[&str]) -> CertificateDer<'static> {
        self.plain(common_name, None, uris).0
    }

    /// A leaf whose subject has that serial number, no key to it.
    #[must_use]
    pub fn leaf_with_serial(&self, serial: &str, uris: &[&str]) -> CertificateDer<'static> {
        self.plain("someone", Some(serial), uris).0
    }

    /// A client credential of an ordinary PKI, as an operator's: chain and key in PEM.
    #[must_use]
    pub fn plain_client(&self, common_name: &str, uris: &[&str]) -> (String, String) {
        let (leaf, key) = self.plain(common_name, None, uris);
        (
            crate::x509::pem("CERTIFICATE", &[leaf]),
            key.serialize_pem(),
        )
    }

    fn plain(
        &self,
        common_name: &str,
        serial: Option<&str>,
        uris: &[&str],
    ) -> (CertificateDer<'static>, rcgen::KeyPair) {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        if let Some(serial) = serial {
            let kind = DnType::CustomDnType(SUBJECT_SERIAL.to_vec());
            params.distinguished_name.push(kind, serial);
        }
        for uri in uris {
            params
                .subject_alt_names
                .push(SanType::URI((*uri).try_into().expect("a URI")));
        }
        let key = rcgen::KeyPair::generate().expect("a key");
        (
            self.issuer
                .sign_plain(&params, &key)
                .expect("a signed leaf"),
            key,
        )
    }

    /// What a side has that holds `credential` and trusts this authority.
    #[must_use]
    pub fn own(&self, credential: Credential) -> Own {
        Own {
            credential: LiveCredential::new(credential),
            bundle: LiveBundle::new(self.bundle()),
            clock: Clock::system(),
            trust_domain: self.trust_domain.clone(),
        }
    }
}

impl Default for TestCa {
    fn default() -> Self {
        Self::new()
    }
}

/// The system's time.
#[must_use]
pub fn now() -> UnixTime {
    Clock::system().now()
}

/// `seconds` from now; negative is in the past.
#[must_use]
pub fn in_seconds(seconds: i64) -> UnixTime {
    from_secs(now().as_secs().saturating_add_signed(seconds))
}

/// A day.
pub const DAY: Duration = Duration::from_secs(86_400);

#[expect(
    clippy::expect_used,
    reason = "for tests alone, where a panic is the report"
)]
fn sans(names: &[String]) -> Vec<SanType> {
    let name = |name: &String| name.as_str().try_into().expect("a DNS name");
    names
        .iter()
        .map(|text| SanType::DnsName(name(text)))
        .collect()
}

#[expect(
    clippy::expect_used,
    reason = "for tests alone, where a panic is the report"
)]
fn usual_sans(role: Role) -> Vec<SanType> {
    match role {
        Role::Agent | Role::Client => Vec::new(),
        Role::Server => {
            let local = ServerSans {
                dns_names: vec!["localhost".to_owned()],
                ip_addresses: vec![[127, 0, 0, 1].into(), std::net::Ipv6Addr::LOCALHOST.into()],
            };
            server_sans(&local).expect("good names")
        }
    }
}
