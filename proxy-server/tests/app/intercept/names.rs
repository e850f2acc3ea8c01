//! The node that TLS or a Host names, and what those are told that name none.

use certs::test_ca::TestCa;
use rustls::AlertDescription;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use super::{ANYONE, TWO_NODES, alert, dial, is_reset, kubelet, refused, rest, start, tls_to};
use crate::stack::{allow, pair, shouter, status_line, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_are_told_apart_by_server_name_and_tls_stays_end_to_end() {
    let (ca, mut edge) = (TestCa::new(), JoinSet::new());
    let (one, two, port) = pair().await;
    kubelet(&mut edge, one, &ca, "press");
    kubelet(&mut edge, two, &ca, "lathe");
    let mut stack = start(&format!("{ANYONE}, port: {port}"), TWO_NODES);
    for agent in ["edge1", "edge2"] {
        stack.agent(agent, &allow(&[port]));
        stack.sessions(agent, 1).await;
    }
    for node in ["press", "lathe", "press"] {
        let mut stream = tls_to(&stack, &ca, node).await.unwrap();
        let mut said = vec![0; node.len()];
        within(stream.read_exact(&mut said)).await.unwrap();
        assert_eq!(said, node.as_bytes());
        let data = vec![b'x'; 300_000];
        let (mut from, mut to) = tokio::io::split(stream);
        let sent = async {
            to.write_all(&data).await.unwrap();
            to.shutdown().await.unwrap();
        };
        let (back, ()) = tokio::join!(rest(&mut from), sent);
        assert!(
            back.unwrap() == data,
            "every byte comes back, and a clean end"
        );
    }
    // A client that wants another certificate than the node's finds out by itself.
    let stranger = TestCa::new();
    let error = tls_to(&stack, &stranger, "press").await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_leads_to_its_node_and_port() {
    let mut stack = start(ANYONE, "");
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let request = format!("GET /metrics HTTP/1.1\r\nHost: Edge1:{port}\r\n\r\nbody");
    let mut stream = dial(&stack).await;
    // The head in two parts, and a half-close at once.
    let (head, tail) = request.as_bytes().split_at(20);
    stream.write_all(head).await.unwrap();
    stream.flush().await.unwrap();
    stream.write_all(tail).await.unwrap();
    stream.shutdown().await.unwrap();
    let answer = rest(&mut stream).await.unwrap();
    assert_eq!(
        String::from_utf8(answer).unwrap(),
        request.to_ascii_uppercase()
    );
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_refusal_is_an_alert_or_a_status_with_a_sentence() {
    let ca = TestCa::new();
    let mut stack = start(&format!("{ANYONE}, port: 22"), TWO_NODES);
    stack.agent("edge1", &allow(&[1]));
    stack.sessions("edge1", 1).await;
    for (node, wanted) in [
        ("nobody", AlertDescription::UnrecognisedName),
        ("127.0.0.1", AlertDescription::UnrecognisedName),
        ("silent", AlertDescription::InternalError),
        ("press", AlertDescription::AccessDenied),
    ] {
        let error = tls_to(&stack, &ca, node).await.unwrap_err();
        assert_eq!(alert(&error), wanted, "{node}");
    }
    refused(&stack, "unknown_destination", 2.0).await;
    for (request, wanted) in [
        (
            "GET / HTTP/1.1\r\nHost: nobody:1\r\n\r\n",
            "HTTP/1.1 403 nobody is no node, and there is no original destination",
        ),
        (
            "GET / HTTP/1.1\r\n\r\n",
            "HTTP/1.1 403 no node is named, and there is no original destination",
        ),
        (
            "GET / HTTP/1.1\r\nHost: silent:1\r\n\r\n",
            "HTTP/1.1 503 node silent: no session since this server started",
        ),
        (
            "GET / HTTP/1.1\r\nHost: press\r\n\r\n",
            "HTTP/1.1 403 node press (agent edge1): the agent's allow-list",
        ),
        (
            "GET / HTTP/1.1\r\nHost: press:1\r\n\r\n",
            "HTTP/1.1 502 node press (agent edge1): connection refused",
        ),
        ("SSH-2.0-x\r\n", "HTTP/1.1 400 the request is not HTTP/1.1"),
    ] {
        let mut stream = dial(&stack).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let answer = String::from_utf8(rest(&mut stream).await.unwrap()).unwrap();
        assert!(answer.starts_with(wanted), "{request}: {answer}");
    }
    let mut stream = dial(&stack).await;
    let long = format!("GET / HTTP/1.1\r\na: {}", "b".repeat(17 << 10));
    stream.write_all(long.as_bytes()).await.unwrap();
    assert!(status_line(&mut stream).await.starts_with("HTTP/1.1 431 "));
    for garbage in [b"\0\x01\x02".as_slice(), b"get / \r\n"] {
        let mut stream = dial(&stack).await;
        stream.write_all(garbage).await.unwrap();
        assert!(is_reset(rest(&mut stream).await), "{garbage:?}");
    }
    let mut stream = dial(&stack).await;
    stream.write_all(&[22, 3, 1, 0, 5, 2]).await.unwrap();
    assert_eq!(rest(&mut stream).await.unwrap(), [21, 3, 3, 0, 2, 2, 50]);
    refused(&stack, "bad_request", 4.0).await;
    stack.stop().await;
}
