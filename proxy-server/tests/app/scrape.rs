//! The forward proxy for scrapers.

use proto::transport::Session as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::stack::{
    Stack, allow, eventually, pair, reloaded, rewrite, shouter, status_line, text, tls, within,
};

/// An exporter that counts its connections and serves keep-alive HTTP.
pub(crate) async fn exporter(tasks: &mut JoinSet<()>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let say = |number, seen: &str| {
        let leaked = seen.to_ascii_lowercase().contains("proxy-authorization");
        format!("connection {number} leaked {leaked}\n")
    };
    exporter_on(tasks, listener, say);
    port
}

/// One that says to the request over the connection of that number what it is told to say.
pub(crate) fn exporter_on(
    tasks: &mut JoinSet<()>,
    listener: TcpListener,
    say: impl Fn(u32, &str) -> String + Copy + Send + Sync + 'static,
) {
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        let mut number = 0;
        while let Ok((mut stream, _)) = listener.accept().await {
            number += 1;
            connections.spawn(async move {
                let mut buffer = Vec::new();
                while let Ok(1..) = stream.read_buf(&mut buffer).await {
                    if !buffer.ends_with(b"\r\n\r\n") {
                        continue;
                    }
                    let seen = String::from_utf8(std::mem::take(&mut buffer)).unwrap();
                    let body = say(number, &seen);
                    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
                    stream.write_all((head + &body).as_bytes()).await.unwrap();
                }
            });
        }
    });
}

pub(crate) async fn ask(stack: &Stack, request: &str) -> (String, String) {
    let mut own = stack.client("nobody");
    own.credential = stack.client("prometheus").credential;
    let mut stream = anonymous(stack, 2).await;
    stream.write_all(request.as_bytes()).await.unwrap();
    let line = status_line(&mut stream).await;
    let mut body = String::new();
    within(stream.read_to_string(&mut body)).await.ok();
    (line, body)
}

/// TLS without a client certificate.
pub(crate) async fn anonymous(
    stack: &Stack,
    frontend: usize,
) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
    let mut roots = rustls::RootCertStore::empty();
    for root in stack.issuer().bundle().roots() {
        roots.add(root.clone()).unwrap();
    }
    let config = rustls::ClientConfig::builder_with_provider(certs::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    #[expect(clippy::disallowed_methods, reason = "a requester")]
    let stream = tokio::net::TcpStream::connect(stack.tcp(frontend))
        .await
        .unwrap();
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    tokio_rustls::TlsConnector::from(std::sync::Arc::new(config))
        .connect(name, stream)
        .await
        .unwrap()
}

/// Basic of prom:a-long-random-password
pub(crate) const BASIC: &str = "Proxy-Authorization: Basic cHJvbTphLWxvbmctcmFuZG9tLXBhc3N3b3Jk";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_exporters_are_scraped_over_kept_connections() {
    let mut stack = Stack::start("");
    let mut edge = JoinSet::new();
    let port = exporter(&mut edge).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    for _ in 0..3 {
        let request = format!(
            "GET http://edge1:{port}/metrics HTTP/1.1\r\nHost: edge1:{port}\r\n{BASIC}\r\nConnection: close\r\n\r\n"
        );
        let (line, body) = ask(&stack, &request).await;
        assert!(line.starts_with("HTTP/1.1 200"), "{line}");
        assert_eq!(
            body, "connection 1 leaked false\n",
            "the pool keeps one connection"
        );
    }
    stack.stop().await;
}

/// What the exporter that is called so says at its address.
async fn scrape(stack: &Stack, to: &str) -> String {
    // Prometheus sends the Host of the target; what is asked for counts.
    let request = format!(
        "GET http://{to}/metrics HTTP/1.1\r\nHost: other\r\n{BASIC}\r\nConnection: close\r\n\r\n"
    );
    let (line, body) = ask(stack, &request).await;
    if line.starts_with("HTTP/1.1 200") {
        body
    } else {
        line
    }
}

/// Two exporters with one port, at the addresses of two agents' nodes.
async fn two_exporters(edge: &mut JoinSet<()>) -> u16 {
    let (one, two, port) = pair().await;
    let host = |seen: &str| {
        seen.lines()
            .find(|line| line.starts_with("host: "))
            .map(str::to_owned)
    };
    exporter_on(edge, one, move |number, seen| {
        format!("one {number} {:?}", host(seen))
    });
    exporter_on(edge, two, move |number, seen| {
        format!("two {number} {:?}", host(seen))
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_connection_is_not_used_for_what_leads_to_another_node_by_now() {
    let mut edge = JoinSet::new();
    let port = two_exporters(&mut edge).await;
    let routes = |agent: &str, node: &str, address: &str| {
        format!("routes: [{{node: {node}, agent: {agent}, addresses: [{address}]}}]")
    };
    let before = routes("edge1", "press", "127.0.0.2");
    let mut stack = Stack::start(&before);
    stack.agent("edge1", &allow(&[port]));
    // That one may not dial the first exporter, or its port at its own node.
    stack.agent(
        "edge2",
        &format!("allow: [{{cidr: 127.0.0.3, ports: [{port}]}}]"),
    );
    for agent in ["edge1", "edge2"] {
        stack.sessions(agent, 1).await;
    }
    let (name, address) = (format!("press:{port}"), format!("127.0.0.2:{port}"));
    let file = stack.dir.path().join("proxy-server.yaml");
    let mut reloads = 0.0;
    let mut reroute = async |from: &str, to: &str| {
        rewrite(&file, &text(&file).replace(from, to));
        stack.reload.reload();
        reloads += 1.0;
        reloaded(&stack, reloads).await;
    };
    // By name and by address it is one way, and one connection.
    for to in [&name, &address, &name] {
        let wanted = format!("one 1 Some(\"host: {to}\")");
        assert_eq!(scrape(&stack, to).await, wanted);
    }

    // The name moves to another agent and address; the address to another agent that may not dial it.
    let moved = routes("edge2", "press", "127.0.0.3");
    reroute(&before, &moved).await;
    for _ in 0..2 {
        assert!(scrape(&stack, &name).await.starts_with("two 1 "));
    }
    let given = routes("edge2", "lathe", "127.0.0.2");
    reroute(&moved, &given).await;
    let said = scrape(&stack, &address).await;
    let denied = "HTTP/1.1 403 node lathe (agent edge2): the agent's allow-list";
    assert!(said.starts_with(denied), "{said}");
    // Who has no route any more is not answered over what was kept for it.
    let said = scrape(&stack, &name).await;
    assert!(
        said.contains("403") && said.contains("no node at the edge"),
        "{said}"
    );

    // Back to the first node: its connection is as good as ever.
    reroute(&given, &before).await;
    assert!(scrape(&stack, &name).await.starts_with("one 1 "));
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_lost_session_a_scrape_goes_over_the_next_one_or_to_the_next_node() {
    let mut edge = JoinSet::new();
    let port = two_exporters(&mut edge).await;
    let before = "routes: [{node: press, agent: edge1, addresses: [127.0.0.2]}]";
    let after = "routes: [{node: press, agent: edge2, addresses: [127.0.0.3]}]";
    let mut stack = Stack::start(before);
    for agent in ["edge1", "edge2"] {
        stack.agent(agent, &allow(&[port]));
        stack.sessions(agent, 1).await;
    }
    let name = format!("press:{port}");
    let lose = async || {
        let sessions = stack.registry.of(&"edge1".parse().unwrap());
        let [session] = &sessions[..] else {
            panic!("{} sessions", sessions.len())
        };
        session.transport.close(proto::Reason::SessionLost);
        eventually("another session", || {
            let now = stack.registry.of(&"edge1".parse().unwrap());
            matches!(&now[..], [new] if new.id != session.id)
        })
        .await;
    };
    for _ in 0..2 {
        assert!(scrape(&stack, &name).await.starts_with("one 1 "));
    }
    lose().await;
    for _ in 0..2 {
        assert!(scrape(&stack, &name).await.starts_with("one 2 "));
    }
    // Lost and led elsewhere at once.
    let file = stack.dir.path().join("proxy-server.yaml");
    rewrite(&file, &text(&file).replace(before, after));
    stack.reload.reload();
    lose().await;
    reloaded(&stack, 1.0).await;
    for _ in 0..2 {
        assert!(scrape(&stack, &name).await.starts_with("two 1 "));
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connect_works_with_a_token_a_password_or_a_certificate() {
    let mut stack = Stack::start("");
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    for header in ["Proxy-Authorization: Bearer token-of-prometheus", BASIC, ""] {
        let mut stream = if header.is_empty() {
            tls(stack.tcp(2), &stack.client("prometheus"))
                .await
                .unwrap()
        } else {
            anonymous(&stack, 2).await
        };
        let header = if header.is_empty() {
            String::new()
        } else {
            format!("{header}\r\n")
        };
        let request = format!("CONNECT edge1:{port} HTTP/1.1\r\nHost: edge1\r\n{header}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        assert!(
            status_line(&mut stream).await.starts_with("HTTP/1.1 200"),
            "{header}"
        );
        stream.write_all(b"scrape").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        within(stream.read_to_string(&mut answer)).await.unwrap();
        assert_eq!(answer, "SCRAPE");
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_nothing_and_what_is_not_at_the_edge_is_refused() {
    let mut stack = Stack::start("");
    stack.agent("edge1", "");
    stack.sessions("edge1", 1).await;
    for (request, wanted) in [
        ("GET http://edge1:9100/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_owned(), "407"),
        ("CONNECT edge1:10250 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic bm86bm8=\r\nConnection: close\r\n\r\n".to_owned(), "407"),
        (format!("CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n{BASIC}\r\nConnection: close\r\n\r\n"), "403 example.com:443: the destination is no node at the edge"),
        (format!("GET http://10.0.0.1/ HTTP/1.1\r\nHost: x\r\n{BASIC}\r\nConnection: close\r\n\r\n"), "403 10.0.0.1:80"),
        (format!("GET http://edge1:22/ HTTP/1.1\r\nHost: x\r\n{BASIC}\r\nConnection: close\r\n\r\n"), "403 node edge1: the agent's allow-list"),
        (format!("GET /metrics HTTP/1.1\r\nHost: x\r\n{BASIC}\r\nConnection: close\r\n\r\n"), "400"),
    ] {
        let (line, _) = ask(&stack, &request).await;
        assert!(line.contains(wanted), "{request}: {line}");
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discovery_without_a_cluster_lists_agents_and_configured_nodes() {
    let mut stack = Stack::start("routes: [{node: press, agent: edge1, addresses: [10.9.0.7]}]");
    stack.agent("edge1", "");
    stack.sessions("edge1", 1).await;
    let get = async |path: &str, header: &str| {
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: x\r\n{header}\r\nConnection: close\r\n\r\n");
        ask(&stack, &request).await
    };
    let (line, body) = get("/sd/node-exporter", BASIC).await;
    assert!(line.starts_with("HTTP/1.1 200"), "{line}");
    let groups: serde_json::Value = serde_json::from_str(&body).unwrap();
    let labels = |node: &str| {
        serde_json::json!({
            "__metrics_path__": "/metrics", "__scheme__": "http", "__meta_corvid_agent": "edge1",
            "__meta_corvid_session": "true", "__meta_corvid_path": "tunnel", "node": node,
        })
    };
    let wanted = serde_json::json!([
        {"targets": ["edge1:9100"], "labels": labels("edge1")},
        {"targets": ["press:9100"], "labels": labels("press")},
    ]);
    assert_eq!(groups, wanted);
    let as_prometheus = BASIC.replace("Proxy-Authorization", "Authorization");
    let (line, again) = get("/sd/node-exporter", &as_prometheus).await;
    assert!(line.starts_with("HTTP/1.1 200") && again == body, "{line}");
    let (line, _) = get("http://edge1:9100/metrics", &as_prometheus).await;
    assert!(line.contains("407"), "that one is the exporter's: {line}");
    let (line, _) = get("/sd/node-exporter", "X: y").await;
    assert!(line.contains("407"), "{line}");
    let (line, body) = get("/sd/other", BASIC).await;
    assert!(
        line.contains("404") && body.contains("/sd/kubelet"),
        "{line} {body}"
    );
    stack.stop().await;
}

/// One that answers each request with these bytes, and says what was asked.
async fn answering(tasks: &mut JoinSet<()>, answer: &'static str) -> (u16, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, asked) = mpsc::channel(8);
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let tell = tell.clone();
            connections.spawn(async move {
                let mut buffer = Vec::new();
                while let Ok(1..) = stream.read_buf(&mut buffer).await {
                    let seen = String::from_utf8(buffer.clone()).unwrap();
                    let whole = match seen.contains("chunked") {
                        true => seen.ends_with("0\r\n\r\n"),
                        false => seen.contains("\r\n\r\n"),
                    };
                    if whole {
                        buffer.clear();
                        tell.send(seen).await.unwrap();
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                }
            });
        }
    });
    (port, asked)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_length_beside_a_coding_goes_no_further() {
    let mut stack = Stack::start("");
    let mut edge = JoinSet::new();
    // RFC 9112 section 6.3: the coding counts, and the length must not be passed on.
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nanswer\r\n0\r\n\r\n";
    let (port, mut asked) = answering(&mut edge, answer).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    for lengths in [
        "Content-Length: 3\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 3",
    ] {
        let request = format!(
            "POST http://edge1:{port}/ HTTP/1.1\r\nHost: x\r\n{BASIC}\r\nConnection: close\r\n{lengths}\r\n\r\n8\r\nquestion\r\n0\r\n\r\n"
        );
        let (line, body) = ask(&stack, &request).await;
        assert!(line.starts_with("HTTP/1.1 200"), "{line}");
        assert!(body.contains("answer"), "the answer is cut: {body}");
        let seen = within(asked.recv()).await.unwrap();
        assert!(seen.contains("question"), "the question is cut: {seen}");
        assert!(
            !seen.to_ascii_lowercase().contains("content-length"),
            "{seen}"
        );
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrape_whose_session_is_lost_is_told_so_and_not_that_the_exporter_broke() {
    let mut stack = Stack::start("");
    let mut edge = JoinSet::new();
    let (port, mut asked) = answering(&mut edge, "HTTP/1.1 200 OK\r\n").await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let request = format!(
        "GET http://edge1:{port}/ HTTP/1.1\r\nHost: x\r\n{BASIC}\r\nConnection: close\r\n\r\n"
    );
    let scraped = ask(&stack, &request);
    let lost = async {
        within(asked.recv()).await.unwrap();
        stack.registry.all()[0]
            .transport
            .close(proto::Reason::NodeGone);
    };
    let ((line, body), ()) = tokio::join!(scraped, lost);
    assert!(
        line.contains(&proto::Reason::NodeGone.http_status().to_string()),
        "{line}"
    );
    assert!(body.contains(proto::Reason::NodeGone.sentence()), "{body}");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_that_is_too_large_is_counted_as_that() {
    let stack = Stack::start("");
    let request = format!(
        "GET http://edge1:9100/ HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n",
        "x".repeat(20 << 10)
    );
    let (line, _) = ask(&stack, &request).await;
    assert!(line.starts_with("HTTP/1.1 431"), "{line}");
    let counted =
        "corvid_streams_total{frontend=\"forward_proxy\",path=\"none\",reason=\"too_large\"}";
    let counts = async {
        while stack.metric(counted).await < 1.0 {
            tokio::task::yield_now().await;
        }
    };
    within(counts).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_shown_nothing_holds_no_connection() {
    let stack = Stack::start("");
    for request in [
        "GET http://edge1:9100/ HTTP/1.1\r\nHost: x\r\n\r\n",
        "CONNECT edge1:10250 HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /sd/kubelet HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Bearer of-a-stranger\r\n\r\n",
    ] {
        let mut stream = anonymous(&stack, 2).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let line = status_line(&mut stream).await;
        assert!(line.starts_with("HTTP/1.1 407"), "{line}");
        // To its end, well before an idle one would be closed.
        let mut body = Vec::new();
        let rest = stream.read_to_end(&mut body);
        let ended = tokio::time::timeout(std::time::Duration::from_secs(30), rest).await;
        assert!(ended.is_ok(), "{request}: the connection stays open");
    }
    stack.stop().await;
}
