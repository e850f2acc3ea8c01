//! Whether who takes a connection also answers, for `path.probes.tls`: a TLS handshake with the kubelet, and nothing after it.
//!
//! A firewall that takes connections for others, and a line that loses large packets alone, pass for well where they are
//! only connected to; both sides of a handshake have packets of full size. Kubelets log a connection that ends before one.
//!
//! | what comes | means |
//! | --- | --- |
//! | a handshake, an alert, anything else | good: the other end answers |
//! | the end of the connection first | bad: somebody between may have taken it |
//! | nothing until the deadline | bad |
//!
//! Who it is that answers is not looked at: nothing is told to them or believed of them but that they are there.

use std::io;
use std::sync::{Arc, LazyLock};

use proto::Reason;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

use super::dial::Failed;
use super::policy::Bypass;

/// Asks whoever took that connection.
///
/// # Errors
/// No answer, and how there was none.
pub(crate) async fn ask(
    stream: TcpStream,
    bypass: &Bypass,
    port: u16,
    deadline: Instant,
) -> Result<(), Failed> {
    let failed = |reason, more: &str| Failed::new(bypass, port, reason, more);
    let config = ANYBODY.as_ref();
    let config = config.map_err(|error| failed(Reason::Internal, &error.to_string()))?;
    let name = ServerName::IpAddress(bypass.address.into());
    let handshake = TlsConnector::from(Arc::clone(config)).connect(name, stream);
    match timeout_at(deadline, handshake).await {
        Err(_late) => Err(failed(
            Reason::DialTimeout,
            "connected, and no answer to TLS",
        )),
        Ok(Err(error)) if error.kind() != io::ErrorKind::InvalidData => {
            let more = format!("connected, and no answer to TLS: {error}");
            Err(Failed {
                is_of_line: true,
                ..failed(Reason::DialFailed, &more)
            })
        }
        Ok(_done_or_not_understood) => Ok(()),
    }
}

static ANYBODY: LazyLock<Result<Arc<ClientConfig>, Error>> = LazyLock::new(|| {
    let mut config = ClientConfig::builder_with_provider(certs::provider())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    // A resumed session would leave out the certificate, and with it the large packets.
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
});

/// Takes whoever answers.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        certs::provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
