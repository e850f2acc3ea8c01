//! The facts that this crate reads from a certificate. Parsing only: nothing here is trusted by being
//! parsed, and nothing here verifies a signature.

use aws_lc_rs::digest;
use rustls_pki_types::UnixTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::oid_registry::OID_X509_SERIALNUMBER;
use x509_parser::prelude::FromDer as _;
use x509_parser::time::ASN1Time;

use crate::clock::from_secs;

/// What stands in a certificate, as far as we care.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) common_name: Option<String>,
    /// Of the subject (X.520 serialNumber), not of the certificate. What is no text counts as empty.
    pub(crate) subject_serials: Vec<String>,
    pub(crate) dns_names: Vec<String>,
    pub(crate) uris: Vec<String>,
    pub(crate) not_before: UnixTime,
    pub(crate) not_after: UnixTime,
    /// Subject public key info, DER.
    pub(crate) public_key: Vec<u8>,
    /// Lower-case hex.
    pub(crate) serial: String,
    pub(crate) is_ca: bool,
}

/// The bytes are no X.509 certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an X.509 certificate")]
pub struct Malformed;

impl Facts {
    pub(crate) fn read(der: &[u8]) -> Result<Self, Malformed> {
        let Ok((rest, certificate)) = X509Certificate::from_der(der) else {
            return Err(Malformed);
        };
        if !rest.is_empty() {
            return Err(Malformed);
        }
        let mut dns_names = Vec::new();
        let mut uris = Vec::new();
        let Ok(names) = certificate.subject_alternative_name() else {
            return Err(Malformed);
        };
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            if let GeneralName::DNSName(name) = name {
                dns_names.push((*name).to_owned());
            } else if let GeneralName::URI(uri) = name {
                uris.push((*uri).to_owned());
            }
        }
        let common_name = certificate
            .subject()
            .iter_common_name()
            .next()
            .and_then(|name| name.as_str().ok())
            .map(str::to_owned);
        let subject_serials = certificate
            .subject()
            .iter_by_oid(&OID_X509_SERIALNUMBER)
            .map(|serial| serial.as_str().unwrap_or_default().to_owned())
            .collect();
        Ok(Self {
            common_name,
            subject_serials,
            dns_names,
            uris,
            not_before: time(certificate.validity().not_before),
            not_after: time(certificate.validity().not_after),
            public_key: certificate.public_key().raw.to_vec(),
            serial: hex(certificate.raw_serial()),
            is_ca: certificate.is_ca(),
        })
    }
}

/// Times before 1970 count as 1970.
fn time(time: ASN1Time) -> UnixTime {
    from_secs(u64::try_from(time.timestamp()).unwrap_or_default())
}

/// SHA-256.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;

    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            // Writing to a String can't fail.
            write!(text, "{byte:02x}").ok();
            text
        })
}

/// PEM of DER sections, 64 columns (RFC 7468).
pub(crate) fn pem(label: &str, sections: &[impl AsRef<[u8]>]) -> String {
    use base64::Engine as _;

    let mut text = String::new();
    for section in sections {
        let mut rest = base64::engine::general_purpose::STANDARD.encode(section);
        text.push_str(&format!("-----BEGIN {label}-----\n"));
        while !rest.is_empty() {
            let tail = rest.split_off(rest.len().min(64));
            text.push_str(&rest);
            text.push('\n');
            rest = tail;
        }
        text.push_str(&format!("-----END {label}-----\n"));
    }
    text
}
