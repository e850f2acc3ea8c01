//! Intercepted connections: by server name, by Host, by original destination; and what can't be served.

mod ends;
mod names;
mod proxy_header;
mod rules;

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use certs::Role;
use certs::test_ca::{TestCa, TestLeaf};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{AlertDescription, ClientConfig, RootCertStore, ServerConfig};
use secrecy::ExposeSecret as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::stack::{Stack, configuration, rewrite, text, within};

/// Where the intercepting frontend stands in the configuration.
const DOOR: usize = 4;
/// Whoever runs the tests.
const ANYONE: &str = "allow: [{from: [127.0.0.0/8], nodes: ['*'], ports: ['1-65535']}]";

/// A server with an intercepting frontend of these settings.
fn start(settings: &str, more: &str) -> Stack {
    let dir = tempfile::tempdir().unwrap();
    let file = configuration(dir.path(), more);
    let door = format!("- {{type: intercept, listen: '127.0.0.1:0', {settings}}}\nobserve:");
    rewrite(&file, &text(&file).replacen("observe:", &door, 1));
    Stack::start_with(dir, &file)
}

async fn dial(stack: &Stack) -> TcpStream {
    dial_from(stack, Ipv4Addr::LOCALHOST).await.unwrap()
}

/// One that is refused at once may be reset before it knows that it is connected.
async fn dial_from(stack: &Stack, source: Ipv4Addr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from((source, 0))).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a requester")]
    let connecting = socket.connect(stack.tcp(DOOR));
    within(connecting).await
}

/// TLS to a node as kube-apiserver does it: the certificate is verified.
async fn tls_to(stack: &Stack, ca: &TestCa, node: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    for root in ca.bundle().roots() {
        roots.add(root.clone()).unwrap();
    }
    let config = ClientConfig::builder_with_provider(certs::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(node.to_owned()).unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let stream = dial(stack).await;
    within(connector.connect(name, stream)).await
}

/// The alert that the client got.
fn alert(error: &std::io::Error) -> AlertDescription {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    match inner {
        Some(rustls::Error::AlertReceived(alert)) => *alert,
        other => panic!("no alert: {error} {other:?}"),
    }
}

/// A stand-in kubelet that speaks TLS under that name, says it, and echoes.
pub(crate) fn kubelet(
    tasks: &mut JoinSet<()>,
    listener: TcpListener,
    ca: &TestCa,
    name: &'static str,
) {
    let leaf = ca.leaf(&TestLeaf::new(Role::Server, name).with_dns_names(&[name]));
    let key = PrivateKeyDer::from_pem_slice(leaf.key_pem().expose_secret().as_bytes()).unwrap();
    let config = ServerConfig::builder_with_provider(certs::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(leaf.chain().to_vec(), key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            connections.spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    return;
                };
                stream.write_all(name.as_bytes()).await.ok();
                let (mut from, mut to) = tokio::io::split(stream);
                tokio::io::copy(&mut from, &mut to).await.ok();
                to.shutdown().await.ok();
            });
        }
    });
}

/// Nodes of two agents, each at an address of its own, so that both can be here.
const TWO_NODES: &str = "routes: [{node: press, agent: edge1, addresses: [127.0.0.2]}, {node: lathe, agent: edge2, addresses: [127.0.0.3]}, {node: silent}]";

async fn refused(stack: &Stack, reason: &str, count: f64) {
    let name =
        format!("corvid_streams_total{{frontend=\"intercept\",path=\"none\",reason=\"{reason}\"}}");
    let enough = async {
        while stack.metric(&name).await < count {
            tokio::task::yield_now().await;
        }
    };
    within(enough).await;
}

/// Reads until the end; a reset is an error.
async fn rest(stream: &mut (impl AsyncReadExt + Unpin)) -> std::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    within(stream.read_to_end(&mut all)).await.map(|_| all)
}

fn is_reset(end: std::io::Result<Vec<u8>>) -> bool {
    end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}
