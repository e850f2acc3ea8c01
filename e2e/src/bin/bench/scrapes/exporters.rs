//! The stand-ins at the edge: of each node an exporter (plain HTTP) and a kubelet (TLS, certificate with the node's name).

use std::convert::Infallible;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use bytes::Bytes;
use clap::Args;
use futures_util::stream;
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::ServerConfig;
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::content::Content;
use super::nodes::{self, Node};

/// Prints `ready` once all of them listen and `nodes.json` and `kubelets.crt` are there.
#[derive(Debug, Args)]
pub(crate) struct Exporters {
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    nodes: usize,
    #[arg(long)]
    exporter_kib: usize,
    #[arg(long)]
    cadvisor_kib: usize,
}

/// One node's answers.
#[derive(Debug, Clone)]
struct Answers {
    exporter: [Bytes; 3],
    cadvisor: [Bytes; 3],
}

impl Exporters {
    pub(crate) async fn run(self) -> Result<()> {
        daemon::limits::raise_nofile();
        let authority = Authority::new()?;
        fs::write(self.dir.join("kubelets.crt"), &authority.pem)?;
        let exporter = Content::exporter(self.exporter_kib << 10);
        let cadvisor = Content::cadvisor(self.cadvisor_kib << 10);
        let mut nodes = Vec::new();
        let mut tasks = JoinSet::new();
        for index in 0..self.nodes {
            let name = nodes::name(index);
            let plain = TcpListener::bind("127.0.0.1:0").await?;
            let tls = TcpListener::bind("127.0.0.1:0").await?;
            nodes.push(Node {
                name: name.clone(),
                exporter: plain.local_addr()?.port(),
                kubelet: tls.local_addr()?.port(),
            });
            let answers = Arc::new(Answers {
                exporter: exporter.of(index, &name),
                cadvisor: cadvisor.of(index, &name),
            });
            let acceptor = authority.acceptor(&name)?;
            tasks.spawn(serve(plain, None, Arc::clone(&answers)));
            tasks.spawn(serve(tls, Some(acceptor), answers));
        }
        nodes::write(&self.dir, &nodes)?;
        println!("ready");
        tasks.join_all().await;
        Ok(())
    }
}

/// Signs the kubelets' certificates.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key)?.pem();
        let issuer = Issuer::new(params, key);
        Ok(Self { issuer, pem })
    }

    fn acceptor(&self, name: &str) -> Result<TlsAcceptor> {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new([name.to_owned()])?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let config = ServerConfig::builder_with_provider(certs::provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)?;
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, answers: Arc<Answers>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        connections.spawn(connection(stream, tls.clone(), Arc::clone(&answers)));
    }
}

/// What goes wrong is seen by whoever asked.
async fn connection(stream: TcpStream, tls: Option<TlsAcceptor>, answers: Arc<Answers>) {
    stream.set_nodelay(true).ok(); // it is as good, only later
    match tls {
        None => requests(stream, answers).await,
        Some(acceptor) => {
            if let Ok(stream) = acceptor.accept(stream).await {
                requests(stream, answers).await;
            }
        }
    }
}

async fn requests<S>(stream: S, answers: Arc<Answers>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let service = service_fn(|request: Request<Incoming>| {
        let pieces = match request.uri().path() {
            "/metrics" => Some(answers.exporter.clone()),
            "/metrics/cadvisor" => Some(answers.cadvisor.clone()),
            "/healthz" => Some([Bytes::from_static(b"ok"), Bytes::new(), Bytes::new()]),
            _ => None,
        };
        async move { answer(pieces) }
    });
    http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await
        .ok(); // a requester that leaves is its own business
}

type Pieces = std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>;

fn answer(
    pieces: Option<[Bytes; 3]>,
) -> Result<Response<StreamBody<stream::Iter<Pieces>>>, http::Error> {
    let status = match pieces {
        Some(_) => StatusCode::OK,
        None => StatusCode::NOT_FOUND,
    };
    let pieces: Vec<Bytes> = pieces
        .into_iter()
        .flatten()
        .filter(|piece| !piece.is_empty())
        .collect();
    let length: usize = pieces.iter().map(Bytes::len).sum();
    let frames: Vec<_> = pieces.into_iter().map(|p| Ok(Frame::data(p))).collect();
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "text/plain; version=0.0.4")
        .header(header::CONTENT_LENGTH, length)
        .body(StreamBody::new(stream::iter(frames)))
}
