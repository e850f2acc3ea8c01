//! Certificate signing requests: proof that a peer holds the private key of a public one.
//!
//! Of a request *only the public key is used*. Names, extensions and attributes in it are never read:
//! what stands in a certificate is decided by the issuer.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls_pki_types::CertificateSigningRequestDer;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256,
};
use x509_parser::prelude::FromDer as _;

use crate::credential::Key;
use crate::x509;

/// Largest request: ours have 200 bytes.
pub const MAX_CSR: usize = 4096;

/// A signing request can't be made or used.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    /// Signing it failed.
    #[error("make a signing request")]
    Make(#[source] rcgen::Error),
    /// More than 4096 bytes, or no PKCS#10.
    #[error("the signing request is malformed")]
    Malformed,
    /// Another key or signature than ECDSA P-256 with SHA-256.
    #[error("the signing request's key is not ECDSA P-256")]
    Algorithm,
    /// Its sender doesn't hold the private key.
    #[error("the signing request's signature is wrong")]
    Signature,
}

/// SHA-256 of a public key; by it a token knows a repeated request from a second use.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct KeyDigest(String);

/// A checked request: a public key whose private key its sender holds.
#[derive(Debug, Clone)]
pub struct Csr {
    public_key: Vec<u8>,
}

impl Csr {
    /// Makes a request for `key`; DER. It carries no name: see the module's doc.
    ///
    /// # Errors
    /// Signing fails.
    pub fn make(key: &Key) -> Result<Vec<u8>, CsrError> {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let request = params
            .serialize_request(key.pair())
            .map_err(CsrError::Make)?;
        Ok(CertificateSigningRequestDer::from(request).to_vec())
    }

    /// Reads a request (DER) and checks its signature.
    ///
    /// # Errors
    /// It is malformed, of another algorithm, or not signed by the key it names.
    pub fn check(der: &[u8]) -> Result<Self, CsrError> {
        if der.len() > MAX_CSR {
            return Err(CsrError::Malformed);
        }
        let Ok((rest, request)) = X509CertificationRequest::from_der(der) else {
            return Err(CsrError::Malformed);
        };
        if !rest.is_empty() {
            return Err(CsrError::Malformed);
        }
        let info = &request.certification_request_info;
        let key = &info.subject_pki;
        let curve = key
            .algorithm
            .parameters
            .as_ref()
            .and_then(|curve| curve.as_oid().ok());
        if key.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY
            || curve != Some(OID_EC_P256)
            || request.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256
        {
            return Err(CsrError::Algorithm);
        }
        let point = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &key.subject_public_key.data);
        if point
            .verify(info.raw, &request.signature_value.data)
            .is_err()
        {
            return Err(CsrError::Signature);
        }
        Ok(Self {
            public_key: key.raw.to_vec(),
        })
    }

    /// The digest of its public key.
    #[must_use]
    pub fn key_digest(&self) -> KeyDigest {
        KeyDigest(x509::hex(&x509::sha256(&self.public_key)))
    }

    /// For a key of our own, which needs no proof.
    pub(crate) fn of_own_key(key: &Key) -> Self {
        Self {
            public_key: key.public_key(),
        }
    }

    /// Subject public key info, DER.
    pub(crate) fn public_key(&self) -> &[u8] {
        &self.public_key
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_carries_the_public_key_and_nothing_else() {
        let key = Key::generate().unwrap();
        let der = Csr::make(&key).unwrap();
        assert!(der.len() < 300, "{}", der.len());
        assert_eq!(Csr::check(&der).unwrap().public_key(), key.public_key());
    }

    #[test]
    fn a_request_with_another_key_in_it_is_refused() {
        let (mine, stolen) = (Key::generate().unwrap(), Key::generate().unwrap());
        let der = Csr::make(&mine).unwrap();
        let (from, to) = (mine.public_key(), stolen.public_key());
        let at = der
            .windows(from.len())
            .position(|window| window == from)
            .unwrap();
        let forged = [&der[..at], &to, &der[at + from.len()..]].concat();
        assert!(matches!(Csr::check(&forged), Err(CsrError::Signature)));
    }

    #[test]
    fn other_algorithms_are_refused() {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let request = rcgen::CertificateParams::default()
            .serialize_request(&pair)
            .unwrap();
        assert!(matches!(
            Csr::check(request.der()),
            Err(CsrError::Algorithm)
        ));
    }

    #[test]
    fn garbage_truncation_and_excess_are_refused() {
        let der = Csr::make(&Key::generate().unwrap()).unwrap();
        for length in 0..der.len() {
            assert!(Csr::check(&der[..length]).is_err(), "{length}");
        }
        assert!(Csr::check(&[der.as_slice(), b"x"].concat()).is_err());
        assert!(matches!(
            Csr::check(&vec![0x30; MAX_CSR + 1]),
            Err(CsrError::Malformed)
        ));
    }
}
