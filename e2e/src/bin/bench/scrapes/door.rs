//! How the load gets in: TLS without resumption, as Go's clients, and CONNECT.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use rustls::RootCertStore;
use rustls::client::Resumption;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;

/// Longest head of an answer to CONNECT.
const HEAD: usize = 4 << 10;

/// Any connection.
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Trusts the authority in that file and nobody else.
pub(super) fn tls(ca: &Path) -> Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca)?)?;
    let mut config = rustls::ClientConfig::builder_with_provider(certs::provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Sends CONNECT with more header fields, and reads the head of the answer and not a byte more.
pub(super) async fn connect(io: &mut impl Io, destination: &str, fields: &str) -> Result<()> {
    let request = format!("CONNECT {destination} HTTP/1.1\r\nHost: {destination}\r\n{fields}\r\n");
    io.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        ensure!(head.len() < HEAD, "an endless answer to CONNECT");
        head.push(io.read_u8().await?);
    }
    if !head.starts_with(b"HTTP/1.1 200 ") {
        let head = String::from_utf8_lossy(&head);
        bail!("CONNECT {destination}: {}", head.trim_end());
    }
    Ok(())
}
