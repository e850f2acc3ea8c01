//! Who may enter where: real handshakes of every role at every door, right and wrong.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests, where a panic is the report"
)]

mod frontends;
mod protocols;
mod replaced;
mod roles;
mod servers;

use std::sync::Arc;
use std::time::Duration;

use certs::test_ca::TestCa;
use certs::{
    ALPN_ENROLL, ALPN_PEER, ALPN_TUNNEL, Credential, FrontendTrust, HandshakeFailure, Own, Peer,
    Revocations, SERVER_SNI,
};
use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig, SignatureScheme};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const GRACE: Duration = Duration::from_secs(30 * 86_400);

/// What became of a handshake, as each side saw it.
#[derive(Debug)]
struct Outcome {
    server: Result<Option<Peer>, HandshakeFailure>,
    client: Result<Peer, HandshakeFailure>,
}

impl Outcome {
    /// Accepted by both; who the client was to the server.
    fn accepted(self) -> Option<Peer> {
        self.client.expect("the client is content");
        self.server.expect("the server is content")
    }

    /// Refused by the server, and the client knows why.
    fn refused_by_server(self) -> HandshakeFailure {
        let failure = self.server.expect_err("the server refuses");
        assert_eq!(self.client.expect_err("the client learns of it"), failure);
        failure
    }

    /// Refused by the client.
    fn refused_by_client(self) -> HandshakeFailure {
        self.server.expect_err("the server learns of it");
        self.client.expect_err("the client refuses")
    }
}

async fn shake(server: &Arc<ServerConfig>, client: &Arc<ClientConfig>) -> Outcome {
    shake_as(server, client, SERVER_SNI).await
}

/// Both sides of a handshake in memory. In TLS 1.3 the client learns of a refusal only when it reads.
async fn shake_as(server: &Arc<ServerConfig>, client: &Arc<ClientConfig>, name: &str) -> Outcome {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let failure = |error: std::io::Error| HandshakeFailure::of(&error);
    let serve = async {
        let mut stream = TlsAcceptor::from(Arc::clone(server))
            .accept(far)
            .await
            .map_err(failure)?;
        let peer = certs::tls_peer(stream.get_ref().1).unwrap_or(None);
        stream.write_all(b"!").await.map_err(failure)?;
        stream.shutdown().await.map_err(failure)?;
        Ok(peer)
    };
    let dial = async {
        let name = name.to_owned().try_into().unwrap();
        let connector = TlsConnector::from(Arc::clone(client));
        let mut stream = connector.connect(name, near).await.map_err(failure)?;
        let peer = certs::tls_peer(stream.get_ref().1).unwrap().unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).await.map_err(failure)?;
        Ok(peer)
    };
    let (server, client) = tokio::join!(serve, dial);
    Outcome { server, client }
}

/// The doors of one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Door {
    Tunnel,
    Frontend,
    FrontendOptional,
    Enroll,
    Peer,
}

const DOORS: [Door; 5] = [
    Door::Tunnel,
    Door::Frontend,
    Door::FrontendOptional,
    Door::Enroll,
    Door::Peer,
];

fn door(door: Door, own: &Own, revoked: &Revocations) -> Arc<ServerConfig> {
    match door {
        Door::Tunnel => certs::tunnel_server(own, revoked),
        Door::Frontend => certs::frontend_server(own, &FrontendTrust::Ours),
        Door::FrontendOptional => certs::frontend_server_optional(own, &FrontendTrust::Ours),
        Door::Enroll => certs::enroll_server(own, revoked, GRACE),
        Door::Peer => certs::peer_server(own),
    }
    .unwrap()
}

#[derive(Debug)]
struct NoCertificate;

impl ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// A client that comes to `door` with `credential`, or with none.
fn visitor(door: Door, ca: &TestCa, credential: Option<Credential>) -> Arc<ClientConfig> {
    let shown = credential.is_some();
    let own = ca.own(credential.unwrap_or_else(|| ca.agent("nobody")));
    let mut config = ClientConfig::clone(&certs::tunnel_client(&own).unwrap());
    config.alpn_protocols = match door {
        Door::Tunnel => vec![ALPN_TUNNEL.to_vec()],
        Door::Frontend | Door::FrontendOptional => Vec::new(),
        Door::Enroll => vec![ALPN_ENROLL.to_vec()],
        Door::Peer => vec![ALPN_PEER.to_vec()],
    };
    if !shown {
        config.client_auth_cert_resolver = Arc::new(NoCertificate);
    }
    Arc::new(config)
}

/// `credential` of `ca` at each door of a server of `ca`: what each said.
async fn at_each_door(
    ca: &TestCa,
    credential: Option<&Credential>,
    revoked: &Revocations,
) -> Vec<Outcome> {
    let own = ca.own(ca.server("s1"));
    let mut outcomes = Vec::new();
    for each in DOORS {
        let client = visitor(each, ca, credential.cloned());
        outcomes.push(shake(&door(each, &own, revoked), &client).await);
    }
    outcomes
}
