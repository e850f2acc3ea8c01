//! What kube-apiserver and a scraper do, in small.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::edge::{Edge, NODE};

/// The demo's scraper.
pub(crate) const USER: &str = "demo";
/// Its password.
pub(crate) const PASSWORD: &str = "only-for-this-demo";

/// As kube-apiserver: CONNECT over the Unix socket, TLS to the kubelet within, then a request.
pub(crate) async fn logs(socket: &Path, edge: &Edge) -> Result<String> {
    let (stream, line) = connect(socket, &format!("{NODE}:{}", edge.kubelet)).await?;
    ensure!(line.starts_with("HTTP/1.1 200"), "{line}");
    let connector = tls([edge.certificate.clone()])?;
    let stream = connector
        .connect(ServerName::try_from(NODE)?, stream)
        .await
        .context("TLS with the kubelet")?;
    let request = Request::get("/containerLogs/default/hello/app").header("host", NODE);
    exchange(stream, request.body(Empty::new())?).await
}

/// As Prometheus with a `proxy_url`: an absolute-form request over TLS, with a password.
pub(crate) async fn scrape(dir: &Path, proxy: SocketAddr, edge: &Edge) -> Result<String> {
    let ca = CertificateDer::from_pem_file(dir.join("server/ca/ca.crt"))?;
    #[expect(clippy::disallowed_methods, reason = "the scraper")]
    let stream = TcpStream::connect(proxy).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::from(proxy.ip());
    let stream = tls([ca])?
        .connect(name, stream)
        .await
        .context("TLS with the proxy-server")?;
    let password = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let request = Request::get(format!("http://{NODE}:{}/metrics", edge.exporter))
        .header("host", NODE)
        .header("proxy-authorization", format!("Basic {password}"));
    exchange(stream, request.body(Empty::new())?).await
}

/// The sentence that a destination outside the allow-list gets.
pub(crate) async fn refused(socket: &Path, destination: &str) -> Result<String> {
    let (_, line) = connect(socket, destination).await?;
    Ok(line)
}

/// Sends CONNECT and reads the head of the answer and not a byte more; its first line is returned.
async fn connect(socket: &Path, destination: &str) -> Result<(UnixStream, String)> {
    let mut stream = UnixStream::connect(socket).await?;
    let request = format!("CONNECT {destination} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.context("read the answer")?);
    }
    let line = String::from_utf8_lossy(&head)
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned();
    Ok((stream, line))
}

fn tls(roots: impl IntoIterator<Item = CertificateDer<'static>>) -> Result<TlsConnector> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root)?;
    }
    let config = rustls::ClientConfig::builder_with_provider(certs::provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

async fn exchange<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    stream: S,
    request: Request<Empty<Bytes>>,
) -> Result<String> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        ensure!(status.is_success(), "{status}");
        Ok(String::from_utf8_lossy(&body).into_owned())
    };
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        text = &mut answer => text,
        ended = connection => {
            ended?;
            answer.await
        }
    }
}
