//! A private key, and the chain that says whose it is.
//!
//! Key bytes are never in `Debug` output, and on disk always 0600. A credential is two files that must
//! change together: the next key waits beside the present one (`<key>.next`), writing the chain is the
//! commit, and loading finishes what a crash left half done.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::PublicKeyData as _;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use secrecy::{ExposeSecret as _, SecretSlice, SecretString};

use crate::bundle::certificates;
use crate::identity::Identity;
use crate::store::{self, StoreError};
use crate::verify::{Peer, PeerError, peer};
use crate::x509::{self, Facts};
use crate::{renew, tls_config};

/// A private key can't be made or used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The random generator or the key generation failed.
    #[error("generate a key")]
    Generate(#[source] rcgen::Error),
    /// No private key in the text, or of an unknown form.
    #[error("the key is not a PEM private key")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// Another algorithm, or damaged.
    #[error("the key is not a usable ECDSA P-256 key")]
    Unusable(#[source] rcgen::Error),
    /// Its file could not be read or written.
    #[error("keep the key")]
    Store(#[from] StoreError),
}

/// An ECDSA P-256 private key.
pub struct Key {
    pair: rcgen::KeyPair,
}

impl Key {
    /// A new random key.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn generate() -> Result<Self, KeyError> {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256);
        Ok(Self {
            pair: pair.map_err(KeyError::Generate)?,
        })
    }

    /// Reads a PEM private key.
    ///
    /// # Errors
    /// It is none, or not on P-256.
    pub fn from_pem(pem: &[u8]) -> Result<Self, KeyError> {
        let der = PrivateKeyDer::from_pem_slice(pem).map_err(KeyError::Pem)?;
        let pair = rcgen::KeyPair::from_der_and_sign_algo(&der, &rcgen::PKCS_ECDSA_P256_SHA256);
        Ok(Self {
            pair: pair.map_err(KeyError::Unusable)?,
        })
    }

    /// PKCS#8, PEM.
    #[must_use]
    pub fn to_pem(&self) -> SecretString {
        SecretString::from(x509::pem("PRIVATE KEY", &[self.pair.serialized_der()]))
    }

    /// The key in `path`, made (0600) if there is none.
    ///
    /// # Errors
    /// It can't be read, made or kept.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        if let Some(pem) = store::read_if_there(path)? {
            return Self::from_pem(&pem);
        }
        let key = Self::generate()?;
        store::write_atomic(
            path,
            key.to_pem().expose_secret().as_bytes(),
            store::MODE_SECRET,
        )?;
        Ok(key)
    }

    /// Subject public key info, DER.
    pub(crate) fn public_key(&self) -> Vec<u8> {
        self.pair.subject_public_key_info()
    }

    pub(crate) const fn pair(&self) -> &rcgen::KeyPair {
        &self.pair
    }

    pub(crate) fn into_pair(self) -> rcgen::KeyPair {
        self.pair
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

/// A chain and key don't make a credential.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// A file can't be read.
    #[error("read the credential")]
    Store(#[from] StoreError),
    /// The chain is no PEM.
    #[error("the certificate chain is not PEM")]
    ChainPem(#[source] rustls_pki_types::pem::Error),
    /// The key is no PEM.
    #[error("the private key is not PEM")]
    KeyPem(#[source] rustls_pki_types::pem::Error),
    /// The leaf says not who it is.
    #[error("the certificate has no usable identity")]
    Identity(#[from] PeerError),
    /// The key is unusable, or belongs to another certificate.
    #[error("the private key does not fit the certificate")]
    Mismatch(#[source] rustls::Error),
}

/// Chain, key, and what the leaf says. Cheap to clone.
#[derive(Clone)]
pub struct Credential {
    shared: Arc<Shared>,
}

struct Shared {
    peer: Peer,
    serial: String,
    certified: Arc<CertifiedKey>,
    /// The key as it is written to disk (PEM sections of DER).
    key: SecretSlice<u8>,
    key_label: &'static str,
}

impl Credential {
    /// Puts a chain (leaf first) and its key together.
    ///
    /// # Errors
    /// Either is broken, they don't belong together, or the leaf has no identity.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, CredentialError> {
        let chain = certificates(chain).map_err(CredentialError::ChainPem)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(CredentialError::KeyPem)?;
        Self::from_der(chain, key)
    }

    /// Puts a chain and a key of ours together.
    pub(crate) fn new(
        chain: Vec<CertificateDer<'static>>,
        key: &Key,
    ) -> Result<Self, CredentialError> {
        let der = PrivatePkcs8KeyDer::from(key.pair().serialize_der());
        Self::from_der(chain, der.into())
    }

    fn from_der(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, CredentialError> {
        let peer = peer(&chain)?;
        let leaf = chain.first().ok_or(PeerError::NoCertificate)?;
        let serial = Facts::read(leaf).map_err(PeerError::Malformed)?.serial;
        let secret = SecretSlice::from(key.secret_der().to_vec());
        let key_label = if matches!(key, PrivateKeyDer::Pkcs1(_)) {
            "RSA PRIVATE KEY"
        } else if matches!(key, PrivateKeyDer::Sec1(_)) {
            "EC PRIVATE KEY"
        } else {
            "PRIVATE KEY"
        };
        let certified = CertifiedKey::from_der(chain, key, &tls_config::provider())
            .map_err(CredentialError::Mismatch)?;
        let shared = Shared {
            peer,
            serial,
            certified: Arc::new(certified),
            key: secret,
            key_label,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Loads a chain and its key; finishes a [`Credential::save`] that a crash interrupted.
    ///
    /// # Errors
    /// As [`Credential::from_pem`], or a file can't be read.
    pub fn load(chain_path: &Path, key_path: &Path) -> Result<Self, CredentialError> {
        let chain = store::read(chain_path)?;
        let next_path = next_key_path(key_path);
        let refused = match store::read_if_there(key_path)? {
            Some(key) => match Self::from_pem(&chain, &key) {
                Ok(credential) => return Ok(credential),
                Err(error) => Some(error),
            },
            None => None,
        };
        if let Some(next) = store::read_if_there(&next_path)?
            && let Ok(credential) = Self::from_pem(&chain, &next)
        {
            store::rename(&next_path, key_path)?;
            return Ok(credential);
        }
        match refused {
            Some(error) => Err(error),
            // For its message: the key file that is not there.
            None => Self::from_pem(&chain, &store::read(key_path)?),
        }
    }

    /// Writes chain and key such that a crash at any point leaves one that loads, old or new.
    ///
    /// # Errors
    /// A file can't be written; the old credential is then still the one on disk.
    pub fn save(&self, chain_path: &Path, key_path: &Path) -> Result<(), StoreError> {
        let next_path = next_key_path(key_path);
        store::write_atomic(
            &next_path,
            self.key_pem().expose_secret().as_bytes(),
            store::MODE_SECRET,
        )?;
        store::write_atomic(chain_path, self.chain_pem().as_bytes(), store::MODE_PUBLIC)?;
        store::rename(&next_path, key_path)
    }

    /// Who this is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.shared.peer.identity
    }

    /// Start of the leaf's life.
    #[must_use]
    pub fn not_before(&self) -> UnixTime {
        self.shared.peer.not_before
    }

    /// End of the leaf's life.
    #[must_use]
    pub fn not_after(&self) -> UnixTime {
        self.shared.peer.not_after
    }

    /// SHA-256 of the leaf, hex.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.shared.peer.fingerprint
    }

    /// Serial number of the leaf, hex.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.shared.serial
    }

    /// Leaf first, DER.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.shared.certified.cert
    }

    /// Leaf first, PEM.
    #[must_use]
    pub fn chain_pem(&self) -> String {
        x509::pem("CERTIFICATE", self.chain())
    }

    /// The private key, PEM.
    #[must_use]
    pub fn key_pem(&self) -> SecretString {
        SecretString::from(x509::pem(
            self.shared.key_label,
            &[self.shared.key.expose_secret()],
        ))
    }

    /// When to renew; see [`renew::renew_at`].
    #[must_use]
    pub fn renew_at(&self, jitter: f64) -> UnixTime {
        renew::renew_at(self.not_before(), self.not_after(), jitter)
    }

    pub(crate) fn certified(&self) -> &Arc<CertifiedKey> {
        &self.shared.certified
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("identity", &format_args!("{}", self.identity()))
            .field("not_before", &self.not_before().as_secs())
            .field("not_after", &self.not_after().as_secs())
            .field("fingerprint", &self.fingerprint())
            .finish_non_exhaustive()
    }
}

/// Where the next key waits.
pub(crate) fn next_key_path(key_path: &Path) -> PathBuf {
    let mut name = OsString::from(key_path);
    name.push(".next");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::test_ca::TestCa;

    #[test]
    fn a_credential_survives_the_way_through_files_and_its_key_is_0600() {
        let dir = tempfile::tempdir().unwrap();
        let (crt, key) = (dir.path().join("a.crt"), dir.path().join("a.key"));
        let credential = TestCa::new().agent("edge1");
        credential.save(&crt, &key).unwrap();
        let loaded = Credential::load(&crt, &key).unwrap();
        assert_eq!(loaded.fingerprint(), credential.fingerprint());
        assert_eq!(loaded.identity().to_string(), "spiffe://corvid/agent/edge1");
        assert_eq!(
            std::fs::metadata(&key).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(!next_key_path(&key).exists());
    }

    #[test]
    fn a_crash_between_chain_and_key_is_finished_by_the_next_load() {
        let dir = tempfile::tempdir().unwrap();
        let (crt, key) = (dir.path().join("a.crt"), dir.path().join("a.key"));
        let ca = TestCa::new();
        let (old, new) = (ca.agent("edge1"), ca.agent("edge1"));
        old.save(&crt, &key).unwrap();
        std::fs::write(next_key_path(&key), new.key_pem().expose_secret()).unwrap();
        assert_eq!(
            Credential::load(&crt, &key).unwrap().fingerprint(),
            old.fingerprint()
        );
        std::fs::write(&crt, new.chain_pem()).unwrap();
        assert_eq!(
            Credential::load(&crt, &key).unwrap().fingerprint(),
            new.fingerprint()
        );
        assert!(!next_key_path(&key).exists());
        assert_eq!(
            Credential::load(&crt, &key).unwrap().fingerprint(),
            new.fingerprint()
        );
    }

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let ca = TestCa::new();
        let chain = ca.agent("edge1").chain_pem();
        let key = ca.agent("edge1").key_pem();
        let refused = Credential::from_pem(chain.as_bytes(), key.expose_secret().as_bytes());
        assert!(matches!(refused, Err(CredentialError::Mismatch(_))));
    }

    #[test]
    fn key_bytes_are_not_in_debug_output() {
        let credential = TestCa::new().agent("edge1");
        let text = format!("{credential:?} {:?}", Key::generate().unwrap());
        assert!(
            text.contains("agent/edge1") && !text.contains("PRIVATE"),
            "{text}"
        );
        assert!(text.len() < 400, "{text}");
    }

    #[test]
    fn a_key_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let first = Key::load_or_create(&path).unwrap();
        assert_eq!(
            Key::load_or_create(&path).unwrap().public_key(),
            first.public_key()
        );
    }
}
