//! PROXY headers: who asks, and the original destination; from whom they are taken.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::{ANYONE, DOOR, dial, is_reset, refused, rest, start};
use crate::stack::{allow, shouter, within};

/// A PROXY header of version 2 for TCP over IPv4.
fn v2(command: u8, source: &str, destination: &str) -> Vec<u8> {
    let (source, destination): (SocketAddr, SocketAddr) =
        (source.parse().unwrap(), destination.parse().unwrap());
    let mut all = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    all.extend([command, 0x11, 0, 12]);
    for end in [source, destination] {
        match end.ip() {
            std::net::IpAddr::V4(ip) => all.extend(ip.octets()),
            std::net::IpAddr::V6(ip) => panic!("{ip} is no IPv4"),
        }
    }
    all.extend(source.port().to_be_bytes());
    all.extend(destination.port().to_be_bytes());
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dial_by_a_line_that_was_led_back_is_refused_and_the_line_is_left_alone() {
    let node = TcpListener::bind("127.0.0.9:0").await.unwrap();
    let at = node.local_addr().unwrap();
    let beside = TcpListener::bind("127.0.0.10:0").await.unwrap();
    let other = beside.local_addr().unwrap();
    let lines = "lines: [{name: l, networks: [127.0.0.0/8]}]\nroutes: [{node: edge1, addresses: [127.0.0.9]}, {node: edge2, addresses: [127.0.0.10]}]";
    // The header stands for what rules of this machine keep of a connection.
    let settings = format!("{ANYONE}, proxyProtocol: {{trusted: [127.0.0.1]}}");
    let stack = start(&settings, lines);
    let by_line = stack.connect(&format!("edge1:{}", at.port())).await;
    let (_served, from) = within(node.accept()).await.unwrap();
    let led = async |to: SocketAddr| {
        let mut stream = dial(&stack).await;
        let header = v2(0x21, &from.to_string(), &to.to_string());
        stream.write_all(&header).await.unwrap();
        stream.write_all(b"\0opaque").await.unwrap();
        stream
    };
    let _asks = led(other).await;
    let (mut served, _) = within(beside.accept()).await.unwrap();
    let mut said = [0; 7];
    within(served.read_exact(&mut said)).await.unwrap();
    assert_eq!(&said, b"\0opaque");
    assert!(is_reset(rest(&mut led(at).await).await));
    refused(&stack, "forbidden_destination", 1.0).await;
    // From now on the line is left alone, though it would connect.
    for to in [at, other] {
        let node = if to == at { "edge1" } else { "edge2" };
        let by_tunnel = within(stack.connect(&format!("{node}:{}", to.port()))).await;
        let refused = by_tunnel.unwrap_err();
        assert!(refused.contains("no session"), "{refused}");
    }
    drop(by_line);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_header_says_who_asks_and_what_was_dialled() {
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    // The agent dials what was asked for.
    let routes = "routes: [{node: edge1, addresses: [127.0.0.0/8]}]";
    let settings = format!(
        "allow: [{{from: [192.0.2.0/24], nodes: [edge1], ports: [{port}]}}], proxyProtocol: {{trusted: [127.0.0.1]}}"
    );
    let mut stack = start(&settings, routes);
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let node = format!("127.0.0.1:{port}");
    let known = "192.0.2.7:999";
    let named = format!("GET / HTTP/1.1\r\nHost: edge1:{port}\r\n\r\n");
    let v1 = |source: &str| format!("PROXY TCP4 {source} 127.0.0.1 999 {port}\r\n").into_bytes();
    for header in [
        v2(0x21, known, &node),
        v2(0x21, known, "203.0.113.1:1"),
        v1("192.0.2.7"),
    ] {
        let mut stream = dial(&stack).await;
        // The header alone, so that it does not come with what follows.
        stream.write_all(&header[..10]).await.unwrap();
        stream.write_all(&header[10..]).await.unwrap();
        stream.write_all(named.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let answer = rest(&mut stream).await.unwrap();
        assert_eq!(answer, named.to_ascii_uppercase().into_bytes());
    }
    // Neither TLS nor HTTP goes by what was dialled, and so does one who waits to be spoken to.
    for said in [b"\0opaque".as_slice(), b""] {
        let mut stream = dial(&stack).await;
        stream.write_all(&v2(0x21, known, &node)).await.unwrap();
        stream.write_all(said).await.unwrap();
        let opened = "corvid_streams_open";
        while said.is_empty() && stack.metric(opened).await < 1.0 {
            tokio::task::yield_now().await;
        }
        stream.write_all(b" and more").await.unwrap();
        stream.shutdown().await.unwrap();
        let wanted = [said, b" and more"].concat().to_ascii_uppercase();
        assert_eq!(rest(&mut stream).await.unwrap(), wanted);
    }
    let own = stack.tcp(DOOR).to_string();
    for (what, header, reason, count) in [
        ("no header", b"\0\x01".to_vec(), "bad_request", 1.0),
        (
            "a source that may not",
            v2(0x21, "198.51.100.1:1", &node),
            "not_allowed",
            1.0,
        ),
        (
            "a source that may not, v1",
            v1("198.51.100.1"),
            "not_allowed",
            2.0,
        ),
        (
            "LOCAL is the balancer itself",
            v2(0x20, known, &node),
            "not_allowed",
            3.0,
        ),
        (
            "two headers",
            [v2(0x21, known, &node), v2(0x21, known, &node)].concat(),
            "not_allowed",
            4.0,
        ),
        (
            "a port that no rule has",
            [v2(0x21, known, "127.0.0.1:1"), b"\0".to_vec()].concat(),
            "not_allowed",
            5.0,
        ),
        (
            "ourselves",
            [v2(0x21, known, &own), b"\0".to_vec()].concat(),
            "bad_request",
            2.0,
        ),
    ] {
        let mut stream = dial(&stack).await;
        stream.write_all(&header).await.unwrap();
        assert!(is_reset(rest(&mut stream).await), "{what}");
        refused(&stack, reason, count).await;
    }
    let mut cut = dial(&stack).await;
    cut.write_all(&v2(0x21, known, &node)[..20]).await.unwrap();
    cut.shutdown().await.unwrap();
    assert!(is_reset(rest(&mut cut).await));
    refused(&stack, "bad_request", 3.0).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_header_from_anybody_else_is_refused() {
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    let settings = format!("{ANYONE}, proxyProtocol: {{trusted: [127.0.0.9]}}");
    let mut stack = start(&settings, "");
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    for header in [
        v2(0x21, "192.0.2.1:1", "192.0.2.2:2"),
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n".to_vec(),
    ] {
        let mut stream = dial(&stack).await;
        stream.write_all(&header).await.unwrap();
        let end = rest(&mut stream).await;
        let told = |bytes: &Vec<u8>| bytes.starts_with(b"HTTP/1.1 403 a PROXY header");
        assert!(end.as_ref().is_ok_and(told) || is_reset(end), "refused");
    }
    refused(&stack, "not_allowed", 2.0).await;
    // Without one it is a requester like any.
    let mut stream = dial(&stack).await;
    let request = format!("GET / HTTP/1.1\r\nHost: edge1:{port}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(
        rest(&mut stream).await.unwrap(),
        request.to_ascii_uppercase().into_bytes()
    );
    stack.stop().await;
}
