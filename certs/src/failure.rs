//! Why a handshake failed, from whatever error it surfaced as: one closed list, for reasons, metrics and
//! sentences. Classified by type; no message is ever read.

use std::error::Error as StdError;
use std::io;

use rustls::{AlertDescription, CertificateError};

use crate::verify::PinMismatch;

/// Why two sides did not come together. Of both: a refusal by the other side arrives as its alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HandshakeFailure {
    /// No protocol in common (ALPN).
    Alpn,
    /// Broken, wrongly signed or without an identity.
    BadCertificate,
    /// Past its life (or, seen from the other side, before it).
    Expired,
    /// A certificate is needed, none was shown.
    NoCertificate,
    /// Before its life: one of the clocks is wrong.
    NotYetValid,
    /// The authority is not the pinned one.
    PinMismatch,
    /// Not TLS, or TLS that broke off.
    Protocol,
    /// The operator has revoked it.
    Revoked,
    /// Took too long.
    Timeout,
    /// Signed by an authority that is not trusted.
    UnknownIssuer,
    /// Nobody answered, or the connection broke.
    Unreachable,
    /// Of another name than the one dialled.
    WrongName,
    /// Genuine, but not for this door.
    WrongRole,
}

impl HandshakeFailure {
    /// For metrics and log fields.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Alpn => "alpn",
            Self::BadCertificate => "bad_certificate",
            Self::Expired => "expired",
            Self::NoCertificate => "no_certificate",
            Self::NotYetValid => "not_yet_valid",
            Self::PinMismatch => "pin_mismatch",
            Self::Protocol => "protocol",
            Self::Revoked => "revoked",
            Self::Timeout => "timeout",
            Self::UnknownIssuer => "unknown_issuer",
            Self::Unreachable => "unreachable",
            Self::WrongName => "wrong_name",
            Self::WrongRole => "wrong_role",
        }
    }

    /// For people.
    #[must_use]
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::Alpn => "both sides have no protocol in common",
            Self::BadCertificate => "the certificate is unusable",
            Self::Expired => "the certificate is not valid at this time",
            Self::NoCertificate => "a certificate is required",
            Self::NotYetValid => "the certificate is not valid yet; check the clocks",
            Self::PinMismatch => "the server's authority is not the pinned one",
            Self::Protocol => "the TLS handshake failed",
            Self::Revoked => "the certificate is revoked",
            Self::Timeout => "no answer in time",
            Self::UnknownIssuer => "the certificate is of an unknown authority",
            Self::Unreachable => "the peer cannot be reached",
            Self::WrongName => "the certificate is for another name",
            Self::WrongRole => "the certificate is not for this door",
        }
    }

    /// Classifies an error of a TLS connection: the first in its chain of sources that says more than
    /// "it broke".
    #[must_use]
    pub fn of(error: &(dyn StdError + 'static)) -> Self {
        let mut found = Self::Protocol;
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(tls) = error.downcast_ref::<rustls::Error>() {
                return Self::of_tls(tls);
            }
            if let Some(io) = error.downcast_ref::<io::Error>() {
                // An io::Error's source is that of its inner error: the inner one itself is looked at here.
                if let Some(inner) = io.get_ref() {
                    if let Some(tls) = inner.downcast_ref::<rustls::Error>() {
                        return Self::of_tls(tls);
                    }
                    next = Some(inner);
                    found = Self::of_kind(io.kind());
                    continue;
                }
                return Self::of_kind(io.kind());
            }
            next = error.source();
        }
        found
    }

    /// Classifies the end of a QUIC connection.
    #[must_use]
    pub fn of_quic(error: &quinn::ConnectionError) -> Self {
        use quinn::ConnectionError as Quic;

        match error {
            Quic::TransportError(error) => Self::of_quic_code(error.code.into()),
            Quic::ConnectionClosed(frame) => Self::of_quic_code(frame.error_code.into()),
            Quic::TimedOut => Self::Timeout,
            Quic::Reset => Self::Unreachable,
            Quic::VersionMismatch
            | Quic::ApplicationClosed(_)
            | Quic::LocallyClosed
            | Quic::CidsExhausted => Self::Protocol,
        }
    }

    /// RFC 9001, 4.8: 0x100 + alert.
    fn of_quic_code(code: u64) -> Self {
        code.checked_sub(0x100)
            .and_then(|alert| u8::try_from(alert).ok())
            .map_or(Self::Protocol, |alert| {
                Self::of_alert(AlertDescription::from(alert))
            })
    }

    fn of_tls(error: &rustls::Error) -> Self {
        if let rustls::Error::InvalidCertificate(error) = error {
            Self::of_certificate(error)
        } else if let rustls::Error::AlertReceived(alert) = error {
            Self::of_alert(*alert)
        } else if matches!(error, rustls::Error::NoCertificatesPresented) {
            Self::NoCertificate
        } else if matches!(error, rustls::Error::NoApplicationProtocol) {
            Self::Alpn
        } else {
            Self::Protocol
        }
    }

    fn of_certificate(error: &CertificateError) -> Self {
        use CertificateError as Certificate;

        if let Certificate::Other(other) = error {
            let pin = other.0.downcast_ref::<PinMismatch>();
            return if pin.is_some() {
                Self::PinMismatch
            } else {
                Self::BadCertificate
            };
        }
        if matches!(
            error,
            Certificate::NotValidYet | Certificate::NotValidYetContext { .. }
        ) {
            return Self::NotYetValid;
        }
        if matches!(
            error,
            Certificate::NotValidForName | Certificate::NotValidForNameContext { .. }
        ) {
            return Self::WrongName;
        }
        Self::of_alert(AlertDescription::from(error.clone()))
    }

    fn of_alert(alert: AlertDescription) -> Self {
        if alert == AlertDescription::CertificateExpired {
            Self::Expired
        } else if alert == AlertDescription::CertificateRevoked {
            Self::Revoked
        } else if alert == AlertDescription::UnknownCA {
            Self::UnknownIssuer
        } else if alert == AlertDescription::CertificateRequired {
            Self::NoCertificate
        } else if alert == AlertDescription::NoApplicationProtocol {
            Self::Alpn
        } else if [
            AlertDescription::AccessDenied,
            AlertDescription::UnsupportedCertificate,
        ]
        .contains(&alert)
        {
            Self::WrongRole
        } else if [
            AlertDescription::BadCertificate,
            AlertDescription::CertificateUnknown,
            AlertDescription::DecryptError,
        ]
        .contains(&alert)
        {
            Self::BadCertificate
        } else {
            Self::Protocol
        }
    }

    fn of_kind(kind: io::ErrorKind) -> Self {
        if kind == io::ErrorKind::TimedOut {
            Self::Timeout
        } else if kind == io::ErrorKind::InvalidData {
            Self::Protocol
        } else {
            Self::Unreachable
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_refusal_is_found_behind_io_errors() {
        let tls = rustls::Error::AlertReceived(AlertDescription::CertificateRevoked);
        let io = io::Error::new(io::ErrorKind::InvalidData, tls);
        assert_eq!(HandshakeFailure::of(&io), HandshakeFailure::Revoked);
        let outer = io::Error::other(io);
        assert_eq!(HandshakeFailure::of(&outer), HandshakeFailure::Revoked);
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        assert_eq!(
            HandshakeFailure::of(&refused),
            HandshakeFailure::Unreachable
        );
    }

    #[test]
    fn both_sides_of_a_refusal_give_it_the_same_name() {
        use CertificateError as Certificate;
        let cases = [
            (Certificate::Expired, HandshakeFailure::Expired),
            (Certificate::Revoked, HandshakeFailure::Revoked),
            (Certificate::UnknownIssuer, HandshakeFailure::UnknownIssuer),
            (
                Certificate::ApplicationVerificationFailure,
                HandshakeFailure::WrongRole,
            ),
            (Certificate::BadEncoding, HandshakeFailure::BadCertificate),
        ];
        for (error, failure) in cases {
            let alert = AlertDescription::from(error.clone());
            let here = rustls::Error::InvalidCertificate(error);
            assert_eq!(HandshakeFailure::of(&here), failure);
            assert_eq!(
                HandshakeFailure::of(&rustls::Error::AlertReceived(alert)),
                failure
            );
            let code = 0x100 + u64::from(u8::from(alert));
            assert_eq!(HandshakeFailure::of_quic_code(code), failure);
        }
        let pin = rustls::OtherError(Arc::new(PinMismatch));
        let error = rustls::Error::InvalidCertificate(Certificate::Other(pin));
        assert_eq!(HandshakeFailure::of(&error), HandshakeFailure::PinMismatch);
    }
}
