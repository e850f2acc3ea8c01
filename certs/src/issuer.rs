//! The private authority at work: its root, and the leaves it signs.
//!
//! What stands in a leaf follows from its role alone, never from the request for it. What an authority consists of and
//! how one follows another is [`crate::ca`].

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use aws_lc_rs::hmac;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, DnValue,
    ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use secrecy::ExposeSecret as _;

use crate::bundle::{BundleError, Pin, TrustBundle};
use crate::ca_dir::CaDir;
use crate::clock::from_secs;
use crate::credential::{Credential, CredentialError, Key, KeyError};
use crate::csr::Csr;
use crate::identity::{Identity, Name, Role, SERVER_SNI, TrustDomain};
use crate::node_uid::NodeUid;
use crate::store::{self, StoreError};

/// Life of a root. Its rotation is a deliberate act, hence long.
pub const ROOT_LIFE: Duration = days(3650);
/// Life of an agent's leaf: short, so that little is lost with a key, and revocation lists stay short.
pub const AGENT_LIFE: Duration = days(1);
/// Life of a server's leaf.
pub const SERVER_LIFE: Duration = days(90);
/// Life of a client's leaf unless asked otherwise, in days: kube-apiserver reads its only at start.
pub const CLIENT_DAYS: u32 = 365;

/// A leaf is valid from this long before it was signed: the verifier's clock may be behind the issuer's,
/// and "not valid yet" would refuse a peer for being new. Five minutes is the skew that Kerberos made
/// hosts keep to; more would lengthen the life of a stolen key for nothing.
pub const BACKDATE: Duration = Duration::from_secs(300);

/// X.520 serialNumber. SPIFFE allows no second URI, and a subject is copied by no verifier into a decision but ours.
pub(crate) const SUBJECT_SERIAL: &[u64] = &[2, 5, 4, 5];

/// Last second of the year 9999, the end of time of X.509.
const END_OF_TIME: u64 = 253_402_300_799;

const fn days(count: u64) -> Duration {
    Duration::from_secs(count * 86_400)
}

/// The authority can't be loaded, made or used.
#[derive(Debug, thiserror::Error)]
pub enum IssuerError {
    /// A file can't be read, written or locked.
    #[error("keep the authority's files")]
    Store(#[from] StoreError),
    /// The authority's key is unusable, or randomness failed.
    #[error("use the authority's key")]
    Key(#[from] KeyError),
    /// A root, present or old, is unusable.
    #[error("read the authority's certificates")]
    Bundle(#[from] BundleError),
    /// An old root is no PEM.
    #[error("{} is not a PEM certificate", path.display())]
    OldRoot {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// `ca.crt` is there, `ca.key` is not.
    #[error("the authority's key {} is missing beside its certificate", .0.display())]
    KeyMissing(PathBuf),
    /// `ca.key` belongs to another certificate.
    #[error("the authority's key does not belong to its certificate")]
    KeyMismatch,
    /// The root is past its life.
    #[error("the authority's certificate has expired")]
    Expired,
    /// Something of it is not there.
    #[error("the authority's {0} is missing")]
    Missing(&'static str),
    /// `ca.crt` has more than a root and a certificate for the root's key.
    #[error("what stands behind the root in ca.crt is no certificate for the root's key")]
    Cross,
    /// The notes are unreadable.
    #[error("read the authority's notes, ca.json")]
    Notes(#[source] serde_json::Error),
    /// The directory has a copy of what is kept elsewhere.
    #[error(
        "this is a copy of the authority in {origin}, and only that can be changed: give the configuration that names it; or remove {} to make the copy an authority of its own",
        marker.display()
    )]
    Copy {
        /// Where the authority is kept.
        origin: String,
        /// What says so.
        marker: PathBuf,
    },
    /// One rotation at a time: a peer that knows only the root before the last would be cut off.
    #[error(
        "a rotation is under way: an older root is still trusted; see `proxy-server ca show` for when it leaves, or take it away with `proxy-server ca retire`"
    )]
    UnderWay,
    /// It is another than the one that was decided about.
    #[error(
        "the authority was changed at the same moment, and nothing was done: see `proxy-server ca show` for what it is now"
    )]
    Changed,
    /// A configured SAN is no DNS name.
    #[error("{name:?} cannot stand in a certificate as DNS name")]
    DnsName {
        /// The name.
        name: String,
        /// What is wrong with it.
        #[source]
        source: rcgen::Error,
    },
    /// A life of no or too many days.
    #[error("a client certificate lives 1 to 3650 days")]
    Days,
    /// Signing failed.
    #[error("sign a certificate")]
    Sign(#[from] rcgen::Error),
    /// What was signed is unusable.
    #[error("use the signed certificate")]
    Credential(#[from] CredentialError),
}

/// Additional names of a server, for those who dial it by them over TLS (CONNECT clients).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerSans {
    /// DNS names.
    pub dns_names: Vec<String>,
    /// Addresses.
    pub ip_addresses: Vec<IpAddr>,
}

/// What a leaf shall say.
#[derive(Debug, Clone)]
pub(crate) struct Profile {
    pub(crate) identity: Identity,
    pub(crate) node_uid: Option<NodeUid>,
    pub(crate) not_before: UnixTime,
    pub(crate) not_after: UnixTime,
    pub(crate) sans: Vec<SanType>,
}

/// A signed chain, leaf first; the root is not in it.
#[derive(Debug, Clone)]
pub struct IssuedChain {
    /// Leaf first, DER.
    pub chain: Vec<CertificateDer<'static>>,
    /// End of the leaf's life.
    pub not_after: UnixTime,
}

/// The authority with its key.
pub struct Issuer {
    signer: rcgen::Issuer<'static, rcgen::KeyPair>,
    trust_domain: TrustDomain,
    root: TrustBundle,
    /// What stands behind each leaf, for peers that know an older root only.
    behind: Vec<CertificateDer<'static>>,
    bundle: TrustBundle,
}

impl Issuer {
    /// Loads the authority in `dir`, or makes one there; see [`CaDir::load_or_create`].
    ///
    /// # Errors
    /// As there, or the root has expired.
    pub fn load_or_create(
        dir: &Path,
        trust_domain: &TrustDomain,
        now: UnixTime,
    ) -> Result<Self, IssuerError> {
        let dir = CaDir::new(dir);
        let ca = dir.load_or_create(trust_domain, now)?;
        dir.issuer(&ca, now)
    }

    /// An authority that is nowhere on disk.
    #[cfg(any(test, feature = "test-util"))]
    pub(crate) fn in_memory(
        trust_domain: &TrustDomain,
        now: UnixTime,
    ) -> Result<Self, IssuerError> {
        crate::ca::Ca::create(trust_domain, now)?.issuer(now)
    }

    /// Makes a key and an agent's leaf for it.
    ///
    /// # Errors
    /// Signing fails.
    #[cfg(any(test, feature = "test-util"))]
    pub fn issue_agent(
        &self,
        name: &Name,
        node_uid: Option<&NodeUid>,
        now: UnixTime,
    ) -> Result<Credential, IssuerError> {
        let mut profile = self.profile(Role::Agent, name, now, AGENT_LIFE);
        profile.node_uid = node_uid.cloned();
        self.issue(&profile)
    }

    /// Signs whatever `params` say.
    #[cfg(any(test, feature = "test-util"))]
    pub(crate) fn sign_plain(
        &self,
        params: &CertificateParams,
        key: &rcgen::KeyPair,
    ) -> Result<CertificateDer<'static>, IssuerError> {
        Ok(params.signed_by(key, &self.signer)?.der().clone())
    }

    /// The holder of `key`, whose root is `root`. `behind` stands behind each leaf.
    pub(crate) fn new(
        key: Key,
        root: TrustBundle,
        behind: Vec<CertificateDer<'static>>,
        bundle: TrustBundle,
        trust_domain: TrustDomain,
    ) -> Result<Self, IssuerError> {
        let [certificate] = root.roots() else {
            return Err(IssuerError::KeyMismatch);
        };
        if root.pins() != [Pin::of_public_key(&key.public_key())] {
            return Err(IssuerError::KeyMismatch);
        }
        let signer = rcgen::Issuer::from_ca_cert_der(certificate, key.into_pair())?;
        Ok(Self {
            signer,
            trust_domain,
            root,
            behind,
            bundle,
        })
    }

    /// Signs the key of another root, so that who knows ours knows what that one signs. No authority may stand between
    /// it and leaves.
    pub(crate) fn sign_root(
        &self,
        key: &Key,
        now: UnixTime,
    ) -> Result<CertificateDer<'static>, IssuerError> {
        let mut params = root_params(key, &self.trust_domain, now, self.not_after(), 0)?;
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(key.pair(), &self.signer)?.der().clone())
    }

    /// The root that signs, and the old ones that are still trusted.
    #[must_use]
    pub const fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// The pin of the root that signs, for new agents.
    #[must_use]
    pub fn pin(&self) -> Pin {
        Pin::of_public_key(&rcgen::PublicKeyData::subject_public_key_info(
            self.signer.key(),
        ))
    }

    /// When the root that signs expires.
    #[must_use]
    pub fn not_after(&self) -> UnixTime {
        self.root.not_after()
    }

    /// The realm whose identities it gives.
    #[must_use]
    pub const fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// A secret that all who have this authority's key come to, for `purpose` and nothing else.
    #[must_use]
    pub fn secret_for(&self, purpose: &str) -> [u8; 32] {
        let key = hmac::Key::new(hmac::HMAC_SHA256, self.signer.key().serialized_der());
        let mut secret = [0; 32];
        let tag = hmac::sign(&key, purpose.as_bytes());
        for (to, from) in secret.iter_mut().zip(tag.as_ref()) {
            *to = *from;
        }
        secret
    }

    /// Signs an agent's leaf: 24 h, client authentication. With `node_uid` it is good for that node of its name alone.
    ///
    /// # Errors
    /// Signing fails.
    pub fn sign_agent(
        &self,
        name: &Name,
        node_uid: Option<&NodeUid>,
        csr: &Csr,
        now: UnixTime,
    ) -> Result<IssuedChain, IssuerError> {
        let mut profile = self.profile(Role::Agent, name, now, AGENT_LIFE);
        profile.node_uid = node_uid.cloned();
        let leaf = self.sign(&profile, csr)?;
        Ok(IssuedChain {
            chain: self.chain(leaf),
            not_after: profile.not_after,
        })
    }

    /// Makes a key and a server's leaf for it: 90 days, server and (for peers) client authentication,
    /// the fixed name of all servers and `sans`.
    ///
    /// # Errors
    /// A name is none, or signing fails.
    pub fn issue_server(
        &self,
        name: &Name,
        sans: &ServerSans,
        now: UnixTime,
    ) -> Result<Credential, IssuerError> {
        let mut profile = self.profile(Role::Server, name, now, SERVER_LIFE);
        profile.sans = server_sans(sans)?;
        self.issue(&profile)
    }

    /// Makes a key and a client's leaf for it, for `days` (usually [`CLIENT_DAYS`]).
    ///
    /// # Errors
    /// `days` is 0 or more than 3650, or signing fails.
    pub fn issue_client(
        &self,
        name: &Name,
        days_valid: u32,
        now: UnixTime,
    ) -> Result<Credential, IssuerError> {
        if !(1..=3650).contains(&days_valid) {
            return Err(IssuerError::Days);
        }
        self.issue(&self.profile(Role::Client, name, now, days(days_valid.into())))
    }

    fn profile(&self, role: Role, name: &Name, now: UnixTime, life: Duration) -> Profile {
        let end = now.as_secs().saturating_add(life.as_secs());
        Profile {
            identity: Identity::new(self.trust_domain.clone(), role, name.clone()),
            node_uid: None,
            not_before: from_secs(now.as_secs().saturating_sub(BACKDATE.as_secs())),
            // A leaf that outlives its root would promise what Go's verifier doesn't keep.
            not_after: from_secs(end.min(self.not_after().as_secs())),
            sans: Vec::new(),
        }
    }

    /// Makes a key and signs a leaf for it.
    pub(crate) fn issue(&self, profile: &Profile) -> Result<Credential, IssuerError> {
        let key = Key::generate()?;
        let leaf = self.sign(profile, &Csr::of_own_key(&key))?;
        Ok(Credential::new(self.chain(leaf), &key)?)
    }

    fn chain(&self, leaf: CertificateDer<'static>) -> Vec<CertificateDer<'static>> {
        std::iter::once(leaf)
            .chain(self.behind.iter().cloned())
            .collect()
    }

    fn sign(&self, profile: &Profile, csr: &Csr) -> Result<CertificateDer<'static>, IssuerError> {
        let mut params = params(profile.not_before, profile.not_after)?;
        let role = profile.identity.role;
        // X.520 limits a common name to 64 characters; nobody decides anything by it.
        let name = profile.identity.name.as_str();
        let common_name = if name.len() <= 64 {
            name
        } else {
            role.as_str()
        };
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        if let Some(uid) = &profile.node_uid {
            let serial = DnValue::PrintableString(uid.as_str().try_into()?);
            let kind = DnType::CustomDnType(SUBJECT_SERIAL.to_vec());
            params.distinguished_name.push(kind, serial);
        }
        let uri = profile.identity.to_string().try_into()?;
        params.subject_alt_names.push(SanType::URI(uri));
        params
            .subject_alt_names
            .extend(profile.sans.iter().cloned());
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match role {
            Role::Agent | Role::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
            Role::Server => {
                vec![
                    ExtendedKeyUsagePurpose::ServerAuth,
                    ExtendedKeyUsagePurpose::ClientAuth,
                ]
            }
        };
        let public_key = SubjectPublicKeyInfo::from_der(csr.public_key())?;
        Ok(params.signed_by(&public_key, &self.signer)?.der().clone())
    }
}

impl fmt::Debug for Issuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issuer")
            .field("trust_domain", &self.trust_domain.as_str())
            .field("pin", &self.pin())
            .finish_non_exhaustive()
    }
}

/// The authority of now, replaced in place when it is rotated. Clones share it.
#[derive(Clone, Debug)]
pub struct LiveIssuer {
    current: Arc<ArcSwap<Issuer>>,
}

impl LiveIssuer {
    /// The authority of now.
    #[must_use]
    pub fn load(&self) -> Arc<Issuer> {
        self.current.load_full()
    }

    /// Signs with `issuer` from now on.
    pub fn replace(&self, issuer: Arc<Issuer>) {
        self.current.store(issuer);
    }
}

impl From<Arc<Issuer>> for LiveIssuer {
    fn from(issuer: Arc<Issuer>) -> Self {
        Self {
            current: Arc::new(ArcSwap::new(issuer)),
        }
    }
}

/// Writes a credential for a client into `dir`: `NAME.crt`, `NAME.key` and `ca.crt`.
///
/// # Errors
/// A file can't be written.
pub fn export_client(
    credential: &Credential,
    bundle: &TrustBundle,
    dir: &Path,
) -> Result<(), StoreError> {
    store::create_dir(dir)?;
    let name = &credential.identity().name;
    let key = credential.key_pem();
    store::write_atomic(
        &dir.join(format!("{name}.key")),
        key.expose_secret().as_bytes(),
        store::MODE_SECRET,
    )?;
    let chain = credential.chain_pem();
    store::write_atomic(
        &dir.join(format!("{name}.crt")),
        chain.as_bytes(),
        store::MODE_PUBLIC,
    )?;
    bundle.save(&dir.join("ca.crt"))
}

/// The fixed name, then what is configured.
pub(crate) fn server_sans(sans: &ServerSans) -> Result<Vec<SanType>, IssuerError> {
    let fixed = SERVER_SNI.to_owned();
    let dns = std::iter::once(&fixed).chain(&sans.dns_names).map(|name| {
        let san = name.as_str().try_into().map(SanType::DnsName);
        san.map_err(|source| IssuerError::DnsName {
            name: name.clone(),
            source,
        })
    });
    let addresses = sans
        .ip_addresses
        .iter()
        .map(|address| Ok(SanType::IpAddress(*address)));
    dns.chain(addresses).collect()
}

/// Makes a self-signed root for `key`.
pub(crate) fn make_root(
    key: &Key,
    trust_domain: &TrustDomain,
    now: UnixTime,
) -> Result<TrustBundle, IssuerError> {
    let end = from_secs(now.as_secs().saturating_add(ROOT_LIFE.as_secs()));
    // One authority may stand between: the next root, signed by this one during a rotation.
    let root = root_params(key, trust_domain, now, end, 1)?.self_signed(key.pair())?;
    Ok(TrustBundle::from_der(vec![root.der().clone()])?)
}

fn root_params(
    key: &Key,
    trust_domain: &TrustDomain,
    now: UnixTime,
    end: UnixTime,
    path_length: u8,
) -> Result<CertificateParams, IssuerError> {
    let start = from_secs(now.as_secs().saturating_sub(BACKDATE.as_secs()));
    let mut params = params(start, end)?;
    // Part of the pin in the subject tells an old root from a new one, to people and to webpki.
    let pin = Pin::of_public_key(&key.public_key()).to_string();
    let mark: String = pin.chars().skip("sha256:".len()).take(8).collect();
    params
        .distinguished_name
        .push(DnType::CommonName, format!("Corvid CA {mark}"));
    params
        .distinguished_name
        .push(DnType::OrganizationName, trust_domain.as_str());
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn params(not_before: UnixTime, not_after: UnixTime) -> Result<CertificateParams, IssuerError> {
    let date = |time: UnixTime| {
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(time.as_secs().min(END_OF_TIME))
    };
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = date(not_before);
    params.not_after = date(not_after);
    params.serial_number = Some(serial()?);
    Ok(params)
}

/// 126 random bits; positive and of full length (RFC 5280, 4.1.2.2).
fn serial() -> Result<SerialNumber, IssuerError> {
    let mut bytes = [0; 16];
    if aws_lc_rs::rand::fill(&mut bytes).is_err() {
        return Err(KeyError::Generate(rcgen::Error::RingUnspecified).into());
    }
    let [first, ..] = &mut bytes;
    *first = *first & 0x3f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

#[cfg(test)]
mod tests;
