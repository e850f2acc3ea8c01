//! One hop of a plain or TLS splice: what a tunnel that does nothing would cost.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::Args;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// As the relay's largest buffer.
const BUFFER: usize = 64 << 10;

/// Where to listen is printed as the first line.
#[derive(Debug, Args)]
pub(crate) struct Splice {
    /// Where to connect on.
    to: SocketAddr,
    /// Listen at this Unix socket, as the egress selector's frontend does.
    #[arg(long)]
    unix: Option<PathBuf>,
    /// TLS towards the next hop, which has this certificate.
    #[arg(long)]
    tls_to: Option<PathBuf>,
    /// TLS from the hop before, with this certificate and key.
    #[arg(long)]
    tls_from: Option<PathBuf>,
}

impl Splice {
    pub(crate) async fn run(self) -> Result<()> {
        if let Some(path) = &self.unix {
            return at_a_unix_socket(path, self.to).await;
        }
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_addr()?);
        let connector = self.tls_to.map(|file| connector(&file)).transpose()?;
        let acceptor = self.tls_from.map(|file| acceptor(&file)).transpose()?;
        let mut tasks = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await?;
            while tasks.try_join_next().is_some() {}
            let (connector, acceptor) = (connector.clone(), acceptor.clone());
            // A connection that fails is the client's to notice.
            tasks.spawn(async move { hop(stream, self.to, connector, acceptor).await.ok() });
        }
    }
}

async fn at_a_unix_socket(path: &Path, to: SocketAddr) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    println!("{}", path.display());
    let mut tasks = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await?;
        while tasks.try_join_next().is_some() {}
        // A connection that fails is the client's to notice.
        tasks.spawn(async move { copy(stream, connect(to).await?).await });
    }
}

async fn connect(to: SocketAddr) -> Result<TcpStream> {
    #[expect(clippy::disallowed_methods, reason = "what is compared with")]
    let to = TcpStream::connect(to).await?;
    to.set_nodelay(true)?;
    Ok(to)
}

async fn hop(
    from: TcpStream,
    to: SocketAddr,
    connector: Option<TlsConnector>,
    acceptor: Option<TlsAcceptor>,
) -> Result<()> {
    from.set_nodelay(true)?;
    let to = connect(to).await?;
    match (connector, acceptor) {
        (None, None) => copy(from, to).await,
        (Some(connector), _) => {
            copy(
                from,
                connector
                    .connect(ServerName::try_from("splice")?, to)
                    .await?,
            )
            .await
        }
        (None, Some(acceptor)) => copy(acceptor.accept(from).await?, to).await,
    }
}

async fn copy<A, B>(mut from: A, mut to: B) -> Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    tokio::io::copy_bidirectional_with_sizes(&mut from, &mut to, BUFFER, BUFFER).await?;
    Ok(())
}

fn connector(file: &PathBuf) -> Result<TlsConnector> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(file).context("read the certificate")?)?;
    let config = rustls::ClientConfig::builder_with_provider(certs::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

fn acceptor(file: &PathBuf) -> Result<TlsAcceptor> {
    let certificate = CertificateDer::from_pem_file(file).context("read the certificate")?;
    let key = PrivateKeyDer::from_pem_file(file).context("read the key")?;
    let config = rustls::ServerConfig::builder_with_provider(certs::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
