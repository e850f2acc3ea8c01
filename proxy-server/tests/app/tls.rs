//! The mTLS door of HTTP CONNECT: clients' certificates and nobody else's.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::stack::{Stack, allow, shouter, status_line, tls, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_certificate_opens_the_door() {
    let mut stack = Stack::start("");
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let mut stream = tls(stack.tcp(1), &stack.client("kube-apiserver"))
        .await
        .unwrap();
    stream
        .write_all(format!("CONNECT edge1:{port} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").as_bytes())
        .await
        .unwrap();
    assert!(status_line(&mut stream).await.starts_with("HTTP/1.1 200"));
    stream.write_all(b"over tls").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "OVER TLS");
    drop(stream);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_strangers_and_the_nameless_are_refused_in_the_handshake() {
    let stack = Stack::start("");
    let foreign = certs::test_ca::TestCa::new();
    let mut stranger = foreign.own(foreign.client("kube-apiserver"));
    stranger.bundle = certs::LiveBundle::new(stack.issuer().bundle().clone());
    let agent = stack.enrolled("edge1").await;
    let mut refused = 0.0;
    for own in [agent, stranger] {
        // TLS 1.3: the client may have finished before the server refuses, so the first read tells.
        let outcome = match tls(stack.tcp(1), &own).await {
            Ok(mut stream) => {
                stream
                    .write_all(b"CONNECT edge1:1 HTTP/1.1\r\n\r\n")
                    .await
                    .ok();
                within(stream.read_u8()).await.map(|_| ())
            }
            Err(error) => Err(error),
        };
        outcome.unwrap_err();
        refused += 1.0;
        while stack
            .metric("corvid_requesters_refused_total{reason=\"tls\"}")
            .await
            < refused
        {
            tokio::task::yield_now().await;
        }
    }
    stack.stop().await;
}
