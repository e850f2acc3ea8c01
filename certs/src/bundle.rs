//! The roots that are trusted, old and new ones alike while the authority is rotated.
//!
//! A bundle is never empty, each of its certificates is an authority, and the webpki verifiers for it are
//! built once, with it. It decides only about chains; who may enter where is [`crate::verify`].

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, UnixTime};
use serde::{Deserialize, Serialize};

use crate::store::{self, StoreError};
use crate::tls_config;
use crate::x509::{self, Facts, Malformed};

/// Largest number of roots: more than any rotation needs, few enough for a handshake.
const MAX_ROOTS: usize = 64;

/// A set of roots can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file could not be read.
    #[error("read the trust bundle")]
    Read(#[from] StoreError),
    /// Broken PEM.
    #[error("the trust bundle is not PEM")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// No certificate in it.
    #[error("the trust bundle has no certificate")]
    Empty,
    /// More than 64 certificates.
    #[error("the trust bundle has more than 64 certificates")]
    TooMany,
    /// A section is no certificate.
    #[error("a section of the trust bundle is broken")]
    Certificate(#[from] Malformed),
    /// A leaf among the roots.
    #[error("a certificate of the trust bundle is not an authority")]
    NotAnAuthority,
    /// webpki can't use a root.
    #[error("a certificate of the trust bundle cannot be a root")]
    Root(#[source] rustls::Error),
    /// webpki can't verify with these roots.
    #[error("build a verifier for the trust bundle")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// SHA-256 of an authority's public key; what a new agent is given to recognise it by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pin([u8; 32]);

/// A text is no pin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a CA pin has the form sha256:<64 hex digits>")]
pub struct PinError;

impl Pin {
    /// The pin of a subject public key info, DER.
    pub(crate) fn of_public_key(public_key: &[u8]) -> Self {
        Self(x509::sha256(public_key))
    }
}

impl FromStr for Pin {
    type Err = PinError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hex = text.strip_prefix("sha256:").ok_or(PinError)?.as_bytes();
        let mut pin = [0; 32];
        if hex.len() != 2 * pin.len() || !hex.is_ascii() {
            return Err(PinError);
        }
        for (byte, pair) in pin.iter_mut().zip(hex.chunks_exact(2)) {
            let digit = |digit: &u8| char::from(*digit).to_digit(16);
            let [high, low] = pair else {
                return Err(PinError);
            };
            let (Some(high), Some(low)) = (digit(high), digit(low)) else {
                return Err(PinError);
            };
            *byte = u8::try_from(high * 16 + low).unwrap_or_default();
        }
        Ok(Self(pin))
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", x509::hex(&self.0))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for Pin {
    type Error = PinError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Pin> for String {
    fn from(pin: Pin) -> Self {
        pin.to_string()
    }
}

/// One or more trusted roots. Cheap to clone.
#[derive(Clone)]
pub struct TrustBundle {
    shared: Arc<Shared>,
}

struct Shared {
    roots: Vec<CertificateDer<'static>>,
    pins: Vec<Pin>,
    not_after: UnixTime,
    client_verifier: Arc<dyn ClientCertVerifier>,
    server_verifier: Arc<WebPkiServerVerifier>,
}

impl TrustBundle {
    /// Takes roots; one that occurs twice is kept once.
    ///
    /// # Errors
    /// There is none, too many, or one that is no authority.
    pub fn from_der(certificates: Vec<CertificateDer<'static>>) -> Result<Self, BundleError> {
        let mut roots: Vec<CertificateDer<'static>> = Vec::new();
        for certificate in certificates {
            if !roots.contains(&certificate) {
                roots.push(certificate);
            }
        }
        if roots.len() > MAX_ROOTS {
            return Err(BundleError::TooMany);
        }
        let mut anchors = RootCertStore::empty();
        let mut pins = Vec::new();
        let mut not_after: Option<UnixTime> = None;
        for root in &roots {
            let facts = Facts::read(root)?;
            if !facts.is_ca {
                return Err(BundleError::NotAnAuthority);
            }
            anchors.add(root.clone()).map_err(BundleError::Root)?;
            pins.push(Pin::of_public_key(&facts.public_key));
            not_after = Some(not_after.map_or(facts.not_after, |least| least.min(facts.not_after)));
        }
        let not_after = not_after.ok_or(BundleError::Empty)?;
        let anchors = Arc::new(anchors);
        let provider = tls_config::provider();
        let client_verifier = WebPkiClientVerifier::builder_with_provider(
            Arc::clone(&anchors),
            Arc::clone(&provider),
        )
        .build()?;
        let server_verifier =
            WebPkiServerVerifier::builder_with_provider(anchors, provider).build()?;
        let shared = Shared {
            roots,
            pins,
            not_after,
            client_verifier,
            server_verifier,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Reads concatenated PEM certificates; other sections and text between are ignored.
    ///
    /// # Errors
    /// As [`TrustBundle::from_der`], or broken PEM.
    pub fn from_pem(pem: &[u8]) -> Result<Self, BundleError> {
        Self::from_der(certificates(pem).map_err(BundleError::Pem)?)
    }

    /// Reads a PEM file.
    ///
    /// # Errors
    /// As [`TrustBundle::from_pem`], or the file can't be read.
    pub fn load(path: &Path) -> Result<Self, BundleError> {
        Self::from_pem(&store::read(path)?)
    }

    /// Writes a PEM file, as a whole or not at all.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn save(&self, path: &Path) -> Result<(), StoreError> {
        store::write_atomic(path, self.to_pem().as_bytes(), store::MODE_PUBLIC)
    }

    /// Concatenated PEM certificates.
    #[must_use]
    pub fn to_pem(&self) -> String {
        x509::pem("CERTIFICATE", &self.shared.roots)
    }

    /// Both sets of roots: what is trusted while an authority is rotated.
    ///
    /// # Errors
    /// They are too many together.
    pub fn merge(&self, other: &Self) -> Result<Self, BundleError> {
        Self::from_der(self.roots().iter().chain(other.roots()).cloned().collect())
    }

    /// The roots, DER.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.shared.roots
    }

    /// The pin of each root, in their order.
    #[must_use]
    pub fn pins(&self) -> &[Pin] {
        &self.shared.pins
    }

    /// When the first of the roots expires.
    #[must_use]
    pub fn not_after(&self) -> UnixTime {
        self.shared.not_after
    }

    pub(crate) fn client_verifier(&self) -> &Arc<dyn ClientCertVerifier> {
        &self.shared.client_verifier
    }

    pub(crate) fn server_verifier(&self) -> &Arc<WebPkiServerVerifier> {
        &self.shared.server_verifier
    }
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.shared.pins).finish()
    }
}

/// The certificates of a PEM text.
pub(crate) fn certificates(
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, rustls_pki_types::pem::Error> {
    CertificateDer::pem_slice_iter(pem).collect()
}

/// A bundle that is replaced in place: the next handshake verifies with the new one.
#[derive(Clone, Debug)]
pub struct LiveBundle {
    current: Arc<ArcSwap<TrustBundle>>,
}

impl LiveBundle {
    /// Starts with `bundle`.
    #[must_use]
    pub fn new(bundle: TrustBundle) -> Self {
        Self {
            current: Arc::new(ArcSwap::from_pointee(bundle)),
        }
    }

    /// The bundle of now.
    #[must_use]
    pub fn load(&self) -> Arc<TrustBundle> {
        self.current.load_full()
    }

    /// Uses `bundle` from the next handshake on.
    pub fn replace(&self, bundle: TrustBundle) {
        self.current.store(Arc::new(bundle));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_ca::TestCa;

    #[test]
    fn a_pin_survives_the_way_through_text() {
        let pin = TestCa::new().pin();
        let text = pin.to_string();
        assert_eq!(text.len(), "sha256:".len() + 64);
        assert_eq!(text.parse::<Pin>().unwrap(), pin);
        assert_eq!(
            text.to_uppercase()
                .replace("SHA256", "sha256")
                .parse::<Pin>()
                .unwrap(),
            pin
        );
    }

    #[test]
    fn malformed_pins_are_refused() {
        let digits = "0".repeat(64);
        for bad in [
            "",
            "sha256:",
            &digits,
            &format!("sha256:{digits}0"),
            &format!("sha256:+{}", &digits[1..]),
        ] {
            assert!(bad.parse::<Pin>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_bundle_survives_the_way_through_pem() {
        let (one, other) = (TestCa::new(), TestCa::new());
        let bundle = one.bundle().merge(&other.bundle()).unwrap();
        let read = TrustBundle::from_pem(bundle.to_pem().as_bytes()).unwrap();
        assert_eq!(read.pins(), [one.pin(), other.pin()]);
        assert_eq!(read.roots(), bundle.roots());
    }

    #[test]
    fn a_root_that_occurs_twice_is_kept_once() {
        let bundle = TestCa::new().bundle();
        assert_eq!(bundle.merge(&bundle).unwrap().roots().len(), 1);
    }

    #[test]
    fn a_bundle_is_neither_empty_nor_a_leaf_nor_garbage() {
        assert!(matches!(
            TrustBundle::from_pem(b""),
            Err(BundleError::Empty)
        ));
        assert!(matches!(
            TrustBundle::from_pem(b"hello"),
            Err(BundleError::Empty)
        ));
        let leaf = TestCa::new().agent("edge1").chain_pem();
        assert!(matches!(
            TrustBundle::from_pem(leaf.as_bytes()),
            Err(BundleError::NotAnAuthority)
        ));
        let broken = x509::pem("CERTIFICATE", &[b"garbage"]);
        assert!(matches!(
            TrustBundle::from_pem(broken.as_bytes()),
            Err(BundleError::Certificate(_))
        ));
    }
}
