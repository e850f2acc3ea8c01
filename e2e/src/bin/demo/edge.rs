//! What stands in for an edge node: a kubelet that serves logs over TLS, and an exporter.

use std::convert::Infallible;
use std::sync::Arc;

use anyhow::Result;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// The node's name.
pub(crate) const NODE: &str = "edge1";

/// The node's ports, and its kubelet's certificate.
pub(crate) struct Edge {
    pub(crate) kubelet: u16,
    pub(crate) exporter: u16,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) stop: CancellationToken,
}

pub(crate) async fn start(tasks: &mut JoinSet<()>) -> Result<Edge> {
    let signed = rcgen::generate_simple_self_signed([NODE.to_owned()])?;
    let key = PrivatePkcs8KeyDer::from(signed.signing_key.serialize_der()).into();
    let tls = rustls::ServerConfig::builder_with_provider(certs::provider())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![signed.cert.der().clone()], key)?;
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let stop = CancellationToken::new();
    let kubelet = TcpListener::bind("127.0.0.1:0").await?;
    let exporter = TcpListener::bind("127.0.0.1:0").await?;
    let edge = Edge {
        kubelet: kubelet.local_addr()?.port(),
        exporter: exporter.local_addr()?.port(),
        certificate: signed.cert.der().clone(),
        stop: stop.clone(),
    };
    tasks.spawn(serve(kubelet, Some(acceptor), stop.clone()));
    tasks.spawn(serve(exporter, None, stop));
    Ok(edge)
}

async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                connections.spawn(connection(stream, tls.clone()));
            }
        }
    }
}

async fn connection(stream: TcpStream, tls: Option<TlsAcceptor>) {
    // As Go's servers: an answer in two writes would wait 40 ms for an acknowledgement between them.
    stream.set_nodelay(true).ok();
    let service = service_fn(|request| async move { Ok::<_, Infallible>(answer(&request)) });
    // A stand-in has no log; whoever asked sees what went wrong.
    match tls {
        None => http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service)
            .await
            .ok(),
        Some(acceptor) => match acceptor.accept(stream).await {
            Ok(stream) => http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await
                .ok(),
            Err(_) => None,
        },
    };
}

fn answer(request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let text = match request.uri().path() {
        "/metrics" => "# TYPE node_load1 gauge\nnode_load1 0.42\n",
        path if path.starts_with("/containerLogs/") => {
            "hello from a pod on edge1\nnobody can dial this node\n"
        }
        _ => {
            return Response::builder()
                .status(404)
                .body(Full::default())
                .unwrap_or_default();
        }
    };
    Response::new(Full::from(text))
}
