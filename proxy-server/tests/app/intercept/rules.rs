//! Who may connect and ask for what: by source, node and port, and as a reload changes it.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use certs::test_ca::TestCa;
use rustls::AlertDescription;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::{TWO_NODES, alert, dial_from, is_reset, kubelet, refused, rest, start, tls_to};
use crate::stack::{
    Stack, allow, configuration_of, pair, rewrite, shouter, status_line, text, within,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_named_sources_may_connect_and_a_reload_changes_them() {
    let rule = |from: &str| format!("allow: [{{from: [{from}], nodes: ['*'], ports: [10250]}}]");
    let stack = start(&rule("127.0.0.1"), "");
    let ask = async |source: Ipv4Addr| {
        let mut stream = dial_from(&stack, source).await?;
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: nobody\r\n\r\n")
            .await
            .ok();
        rest(&mut stream).await
    };
    let stranger = Ipv4Addr::new(127, 0, 0, 9);
    assert!(
        ask(Ipv4Addr::LOCALHOST)
            .await
            .unwrap()
            .starts_with(b"HTTP/1.1 403 nobody")
    );
    assert!(is_reset(ask(stranger).await));
    refused(&stack, "not_allowed", 1.0).await;
    let file = stack.dir.path().join("proxy-server.yaml");
    rewrite(
        &file,
        &text(&file).replace(&rule("127.0.0.1"), &rule("127.0.0.9")),
    );
    stack.reload.reload();
    while !is_reset(ask(Ipv4Addr::LOCALHOST).await) {
        tokio::task::yield_now().await;
    }
    assert!(
        ask(stranger)
            .await
            .unwrap()
            .starts_with(b"HTTP/1.1 403 nobody")
    );
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_say_which_network_may_reach_which_node_at_which_port() {
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    let other = shouter(&mut edge).await;
    let rules = format!(
        "allow: [{{from: [127.0.0.2], nodes: [edge1], ports: [{port}]}}, {{from: [127.0.0.3], nodes: ['edge*'], ports: [{port}, {other}]}}]"
    );
    let mut stack = start(&rules, "");
    stack.agent("edge1", &allow(&[port, other]));
    stack.agent("edge2", &allow(&[port, other]));
    stack.sessions("edge1", 1).await;
    stack.sessions("edge2", 1).await;
    let ask = async |source: u8, node: &str, port: u16| {
        let mut stream = dial_from(&stack, Ipv4Addr::new(127, 0, 0, source)).await?;
        let head = format!("GET / HTTP/1.1\r\nHost: {node}:{port}\r\n\r\n");
        stream.write_all(head.as_bytes()).await?;
        stream.shutdown().await?;
        rest(&mut stream).await
    };
    let mut refusals = 0.0;
    for (source, node, to, may) in [
        (2, "edge1", port, true),
        (2, "edge1", other, false),
        (2, "edge2", port, false),
        (3, "edge1", other, true),
        (3, "edge2", port, true),
    ] {
        let answer = String::from_utf8(ask(source, node, to).await.unwrap()).unwrap();
        let case = format!("{source} {node}:{to}: {answer}");
        if may {
            assert!(answer.starts_with("GET / HTTP/1.1\r\nHOST: EDGE"), "{case}");
        } else {
            let wanted = format!("HTTP/1.1 403 {node}:{to}: ");
            assert!(
                answer.starts_with(&wanted)
                    && answer.contains(&format!("source/127.0.0.{source} may not ask for it")),
                "{case}"
            );
            refusals += 1.0;
            refused(&stack, "not_allowed", refusals).await;
        }
    }
    // From nowhere that a rule names: nothing is read.
    assert!(is_reset(ask(4, "edge1", port).await));
    refused(&stack, "not_allowed", refusals + 1.0).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_request_is_decided_by_source_node_and_port() {
    let (ca, mut edge) = (TestCa::new(), JoinSet::new());
    let (one, two, port) = pair().await;
    kubelet(&mut edge, one, &ca, "press");
    kubelet(&mut edge, two, &ca, "lathe");
    let rules = |node: &str| {
        format!(
            "[{{from: [127.0.0.1], nodes: [{node}], ports: [{port}]}}, \
             {{from: [127.0.0.9], nodes: ['*'], ports: ['1-65535']}}]"
        )
    };
    let mut stack = start(
        &format!("allow: {}, port: {port}", rules("press")),
        TWO_NODES,
    );
    for agent in ["edge1", "edge2"] {
        stack.agent(agent, &allow(&[port]));
        stack.sessions(agent, 1).await;
    }
    let says = async |source: Ipv4Addr, request: &str| {
        let mut stream = dial_from(&stack, source).await?;
        stream.write_all(request.as_bytes()).await?;
        Ok::<_, std::io::Error>(status_line(&mut stream).await)
    };
    let get = |host: &str| format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let (known, wide) = (Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 9));
    tls_to(&stack, &ca, "press").await.unwrap();
    let error = tls_to(&stack, &ca, "lathe").await.unwrap_err();
    assert_eq!(alert(&error), AlertDescription::AccessDenied);
    for (host, wanted) in [
        (
            format!("lathe:{port}"),
            format!("HTTP/1.1 403 lathe:{port}: not allowed: source/127.0.0.1 may not ask for it"),
        ),
        (
            "press:1".to_owned(),
            "HTTP/1.1 403 press:1: not allowed: source/127.0.0.1 may not ask for it".to_owned(),
        ),
    ] {
        assert_eq!(says(known, &get(&host)).await.unwrap(), wanted);
    }
    refused(&stack, "not_allowed", 3.0).await;
    // The agent's own allow-list answers whom the rules let through.
    let through = says(wide, &get("lathe:1")).await.unwrap();
    assert!(
        through.starts_with("HTTP/1.1 403 node lathe (agent edge2): the agent's allow-list"),
        "{through}"
    );
    // No rule names it.
    let stranger = dial_from(&stack, Ipv4Addr::new(127, 0, 0, 7)).await;
    if let Ok(mut stranger) = stranger {
        assert!(is_reset(rest(&mut stranger).await));
    }
    refused(&stack, "not_allowed", 4.0).await;
    // A reload is for the next request, and touches no stream.
    let mut open = tls_to(&stack, &ca, "press").await.unwrap();
    let file = stack.dir.path().join("proxy-server.yaml");
    rewrite(
        &file,
        &text(&file).replace(&rules("press"), &rules("lathe")),
    );
    stack.reload.reload();
    while tls_to(&stack, &ca, "lathe").await.is_err() {
        tokio::task::yield_now().await;
    }
    let error = tls_to(&stack, &ca, "press").await.unwrap_err();
    assert_eq!(alert(&error), AlertDescription::AccessDenied);
    let mut said = [0; 5];
    within(open.read_exact(&mut said)).await.unwrap();
    open.write_all(b"still here").await.unwrap();
    let mut echoed = [0; 10];
    within(open.read_exact(&mut echoed)).await.unwrap();
    assert_eq!((&said, &echoed), (b"press", b"still here"));
    drop(open);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ipv4_over_an_ipv6_socket_counts_as_ipv4() {
    let dir = tempfile::tempdir().unwrap();
    let door = |rule: &str| {
        format!(
            "- {{type: intercept, listen: '[::]:0', allow: [{{{rule}, nodes: ['*'], ports: [10250]}}]}}\n"
        )
    };
    let doors = [
        door("from: [127.0.0.1]"),
        door("from: ['::ffff:127.0.0.0/104']"),
        door("from: ['::1', '::/1']"),
    ];
    let file = configuration_of(dir.path(), &doors.concat(), "");
    let stack = Stack::start_with(dir, &file);
    for (door, v4, v6) in [(0, true, false), (1, true, false), (2, false, true)] {
        let port = stack.tcp(door).port();
        for (from, heard) in [
            (SocketAddr::from((Ipv4Addr::LOCALHOST, port)), v4),
            (SocketAddr::from((Ipv6Addr::LOCALHOST, port)), v6),
        ] {
            let asked = async {
                #[expect(clippy::disallowed_methods, reason = "a requester")]
                let mut stream = TcpStream::connect(from).await?;
                stream
                    .write_all(b"GET / HTTP/1.1\r\nHost: nobody\r\n\r\n")
                    .await
                    .ok();
                rest(&mut stream).await
            };
            let said = within(asked).await;
            let told = |bytes: &Vec<u8>| bytes.starts_with(b"HTTP/1.1 403 nobody is no node");
            assert_eq!(
                said.as_ref().is_ok_and(told),
                heard,
                "{door} {from} {said:?}"
            );
            assert_eq!(is_reset(said), !heard, "{door} {from}");
        }
    }
    stack.stop().await;
}
