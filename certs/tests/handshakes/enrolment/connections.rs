//! Connections to the service that say nothing, or nothing sensible, and their end.

use std::net::{Ipv4Addr, SocketAddr};

use certs::test_ca::TestCa;
use certs::{Clock, EnrollLimits, EnrollService, Revocations, ServeError, Store, TrustDomain};
use tokio::io::AsyncWriteExt as _;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::GRACE;

/// A connection to the service in memory, its handshake done.
async fn connection(
    ca: &TestCa,
) -> (
    tokio_rustls::client::TlsStream<tokio::io::DuplexStream>,
    tokio_rustls::server::TlsStream<tokio::io::DuplexStream>,
) {
    let own = ca.own(ca.server("s1"));
    let server = certs::enroll_server(&own, &Revocations::new(), GRACE).unwrap();
    let client =
        certs::enroll_client_pinned(ca.pin(), &TrustDomain::default(), &own.clock).unwrap();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = certs::SERVER_SNI.try_into().unwrap();
    let (client, server) = tokio::join!(
        TlsConnector::from(client).connect(name, near),
        TlsAcceptor::from(server).accept(far),
    );
    (client.unwrap(), server.unwrap())
}

fn service(ca: &TestCa) -> (tempfile::TempDir, EnrollService) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let limits = EnrollLimits::default();
    (
        dir,
        EnrollService::new(ca.issuer(), store, Clock::system(), limits, None),
    )
}

fn somewhere() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 1).into()
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_says_nothing_is_closed() {
    let ca = TestCa::new();
    let (_dir, service) = service(&ca);
    let (_silent, stream) = connection(&ca).await;
    let ended = service
        .serve_connection(stream, somewhere(), std::future::pending())
        .await;
    assert!(matches!(ended, Err(ServeError::Timeout)), "{ended:?}");
}

#[tokio::test]
async fn garbage_ends_its_connection() {
    let ca = TestCa::new();
    let (_dir, service) = service(&ca);
    let (mut client, stream) = connection(&ca).await;
    client.write_all(&[0xff; 4096]).await.unwrap();
    let ended = service
        .serve_connection(stream, somewhere(), std::future::pending())
        .await;
    assert!(matches!(ended, Err(ServeError::Http(_))), "{ended:?}");
}

#[tokio::test]
async fn an_idle_connection_ends_at_shutdown() {
    let ca = TestCa::new();
    let (_dir, service) = service(&ca);
    let (mut client, stream) = connection(&ca).await;
    // HTTP/2's preface and empty settings.
    client
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await
        .unwrap();
    client.flush().await.unwrap();
    let serve = service.serve_connection(stream, somewhere(), async {});
    let hang_up = async {
        let mut rest = Vec::new();
        // Reads GOAWAY and answers by closing.
        tokio::io::AsyncReadExt::read_buf(&mut client, &mut rest)
            .await
            .unwrap();
        client.shutdown().await.ok();
    };
    let (ended, ()) = tokio::join!(serve, hang_up);
    assert!(!matches!(ended, Err(ServeError::Timeout)), "{ended:?}");
}
