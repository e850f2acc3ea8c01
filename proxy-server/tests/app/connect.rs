//! HTTP CONNECT over the Unix socket: what works, and what each failure says.

use proto::Reason;
use proto::transport::{RecvHalf, SendHalf};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::stack::{
    Stack, allow, configuration, echo, eventually, half_agent, rewrite, shouter, status_line, text,
    within,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_reaches_the_node_and_half_close_travels() {
    let mut stack = Stack::start("");
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    for _ in 0..3 {
        let mut stream = stack.connect(&format!("edge1:{port}")).await.unwrap();
        stream
            .write_all(b"half-closed by the requester")
            .await
            .unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        within(stream.read_to_string(&mut answer)).await.unwrap();
        assert_eq!(answer, "HALF-CLOSED BY THE REQUESTER");
    }
    // The guard is dropped a moment after the requester has its last byte.
    while stack.metric("corvid_streams_open").await > 0.0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(
        stack
            .metric("corvid_streams_total{frontend=\"http_connect\",path=\"tunnel\",reason=\"ok\"}")
            .await,
        3.0
    );
    let session = &stack.registry.all()[0];
    eventually("no stream is counted", || {
        session.streams.load(std::sync::atomic::Ordering::Relaxed) == 0
    })
    .await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_behind_the_request_are_not_lost() {
    let mut stack = Stack::start("");
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let mut stream = stack.unix().await;
    stream
        .write_all(format!("CONNECT edge1:{port} HTTP/1.1\r\nHost: x\r\n\r\nearly, ").as_bytes())
        .await
        .unwrap();
    stream.write_all(b"late").await.unwrap();
    assert!(status_line(&mut stream).await.starts_with("HTTP/1.1 200"));
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "EARLY, LATE");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_refusal_is_one_sentence_in_the_status_line() {
    let more = "routes: [{node: press, agent: edge1, addresses: [127.0.0.1]}, {node: twin-a, addresses: [192.168.1.10]}, {node: twin-b, addresses: [192.168.1.10]}, {node: silent}]";
    let mut stack = Stack::start(more);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = listener.local_addr().unwrap().port();
    drop(listener);
    stack.agent("edge1", &allow(&[closed]));
    stack.sessions("edge1", 1).await;
    for (to, wanted) in [
        (
            format!("edge1:{closed}"),
            vec!["502 node edge1: connection refused"],
        ),
        (
            format!("press:{closed}"),
            vec!["502 node press (agent edge1):"],
        ),
        (
            "edge1:22".to_owned(),
            vec!["403 node edge1: the agent's allow-list does not have the destination"],
        ),
        (
            "silent:10250".to_owned(),
            vec!["503 node silent: no session since this server started"],
        ),
        (
            "192.168.1.10:10250".to_owned(),
            vec!["409", "twin-a and twin-b", "ask by node name"],
        ),
        (
            "webhook.svc:443".to_owned(),
            vec!["403 webhook.svc:443: the destination is no node at the edge"],
        ),
        ("edge1".to_owned(), vec!["400 CONNECT edge1:"]),
    ] {
        let line = stack.connect(&to).await.unwrap_err();
        for part in wanted {
            assert!(line.contains(part), "{to}: {line}");
        }
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_agent_left_says_since_when_and_why() {
    let mut stack = Stack::start("");
    stack.agent("edge1", "");
    stack.sessions("edge1", 1).await;
    stack.agents_stop.cancel();
    stack.sessions("edge1", 0).await;
    let line = stack.connect("edge1:10250").await.unwrap_err();
    assert!(
        line.contains("503 node edge1: no session since 2") && line.contains("last error: "),
        "{line}"
    );
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_syntax_and_oversized_heads_are_refused_in_words() {
    let stack = Stack::start("");
    let huge = format!("CONNECT a:1 HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(9000));
    for (sent, wanted) in [
        ("GET / HTTP/1.1\r\n\r\n", "400 only CONNECT is served here"),
        (
            "\u{16}\u{3}\u{1}\u{0}\u{0}\r\n\r\n",
            "400 the request is not HTTP/1.1",
        ),
        (huge.as_str(), "431 the request's head is larger than 8 KiB"),
    ] {
        let mut stream = stack.unix().await;
        stream.write_all(sent.as_bytes()).await.unwrap();
        let line = status_line(&mut stream).await;
        assert!(line.contains(wanted), "{line}");
    }
    let mut truncated = stack.unix().await;
    truncated.write_all(b"CONNECT edge1:1").await.unwrap();
    truncated.shutdown().await.unwrap();
    assert!(
        status_line(&mut truncated)
            .await
            .contains("400 the request ended within its head")
    );
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_say_nothing_are_closed_and_hurt_nobody() {
    let mut stack = Stack::start("timeouts: {header: 300ms}");
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(stack.unix().await);
    }
    stack.connect(&format!("edge1:{port}")).await.unwrap();
    for mut stream in silent {
        assert!(
            status_line(&mut stream)
                .await
                .contains("504 no request came in time")
        );
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_never_answers_ends_in_a_timeout_that_names_it() {
    let stack = Stack::start("timeouts: {dial: 500ms}");
    let _agent = half_agent(&stack, "edge1", |send, recv| async move {
        let _held = (send, recv);
        std::future::pending::<()>().await;
    })
    .await;
    stack.sessions("edge1", 1).await;
    let line = stack.connect("edge1:10250").await.unwrap_err();
    assert!(
        line.contains("504 node edge1: no answer in time: the agent was last heard"),
        "{line}"
    );
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_in_place_of_a_reply_ends_that_stream_alone() {
    let stack = Stack::start("");
    let _agent = half_agent(&stack, "edge1", |mut send, recv| async move {
        send.write_chunk(bytes::Bytes::from_static(b"\xff\xff\xff\xff"))
            .await
            .ok();
        let _held = (send, recv);
        std::future::pending::<()>().await;
    })
    .await;
    stack.sessions("edge1", 1).await;
    {
        let line = stack.connect("edge1:10250").await.unwrap_err();
        assert!(
            line.contains("502 node edge1: the other end broke the tunnel protocol"),
            "{line}"
        );
    }
    assert_eq!(stack.registry.len(), 1);
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_the_agent_drops_before_its_reply_is_answered_all_the_same() {
    let stack = Stack::start("");
    let _agent = half_agent(
        &stack,
        "edge1",
        |send, recv| async move { drop((send, recv)) },
    )
    .await;
    stack.sessions("edge1", 1).await;
    let line = stack.connect("edge1:10250").await.unwrap_err();
    assert!(
        line.contains("502 node edge1: the other end broke the tunnel protocol"),
        "{line}"
    );
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_requester_that_hangs_up_cancels_the_dial() {
    let stack = Stack::start("");
    let (told, mut seen) = tokio::sync::mpsc::channel(1);
    let _agent = half_agent(&stack, "edge1", move |send, mut recv| {
        let told = told.clone();
        async move {
            let _held = send;
            let mut chunks = [bytes::Bytes::new()];
            let end = loop {
                match recv.read_chunks(&mut chunks).await {
                    Ok(Some(_)) => {}
                    other => break other.map_err(|e| e.reason()),
                }
            };
            told.send(end).await.unwrap();
        }
    })
    .await;
    stack.sessions("edge1", 1).await;
    let mut stream = stack.unix().await;
    stream
        .write_all(b"CONNECT edge1:10250 HTTP/1.1\r\n\r\n")
        .await
        .unwrap();
    eventually("the stream is open", || {
        stack
            .registry
            .all()
            .iter()
            .any(|s| s.streams.load(std::sync::atomic::Ordering::Relaxed) == 1)
    })
    .await;
    drop(stream);
    assert_eq!(within(seen.recv()).await.unwrap(), Err(Reason::Cancelled));
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_at_the_edge_is_dialled_where_the_frontend_says_so_but_never_loopback() {
    let dir = tempfile::tempdir().unwrap();
    let file = configuration(dir.path(), "");
    let direct = text(&file).replace("connect.sock'}", "connect.sock', default: direct}");
    rewrite(&file, &direct);
    let stack = Stack::start_with(dir, &file);
    let mut cloud = JoinSet::new();
    let port = echo(&mut cloud).await;
    for to in [
        format!("127.0.0.1:{port}"),
        format!("localhost:{port}"),
        format!("[::1]:{port}"),
        "169.254.169.254:80".to_owned(),
    ] {
        let line = stack.connect(&to).await.unwrap_err();
        assert!(
            line.contains("403") && line.contains("never dialled"),
            "{line}"
        );
    }
    let own = nix::ifaddrs::getifaddrs().unwrap();
    let outside = own
        .filter_map(|i| Some(i.address?.as_sockaddr_in()?.ip()))
        .find(|ip| !ip.is_loopback());
    // A machine with no other address has nothing that may be dialled directly.
    if let Some(ip) = outside {
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        let to = listener.local_addr().unwrap();
        let accept = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"direct").await.unwrap();
        };
        let (mut stream, ()) = tokio::join!(
            async { stack.connect(&to.to_string()).await.unwrap() },
            accept
        );
        let mut answer = String::new();
        within(stream.read_to_string(&mut answer)).await.unwrap();
        assert_eq!(answer, "direct");
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routes_reload_and_a_wrong_reload_changes_nothing() {
    let mut stack = Stack::start("");
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let session = stack.registry.all()[0].id;
    assert!(
        stack
            .connect(&format!("press:{port}"))
            .await
            .unwrap_err()
            .contains("no node at the edge")
    );
    let file = configuration(
        stack.dir.path(),
        "routes: [{node: press, agent: edge1, addresses: [127.0.0.1]}]",
    );
    stack.reload.reload();
    while stack
        .metric("corvid_config_reloads_total{result=\"ok\"}")
        .await
        < 1.0
    {
        tokio::task::yield_now().await;
    }
    stack.connect(&format!("press:{port}")).await.unwrap();
    rewrite(&file, &text(&file).replace("press", "Press!"));
    stack.reload.reload();
    while stack
        .metric("corvid_config_reloads_total{result=\"error\"}")
        .await
        < 1.0
    {
        tokio::task::yield_now().await;
    }
    stack.connect(&format!("press:{port}")).await.unwrap();
    assert_eq!(
        stack.registry.all()[0].id,
        session,
        "the session is untouched"
    );
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_smallest_configuration_works() {
    let dir = tempfile::tempdir().unwrap();
    let example = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../deploy/examples/proxy-server.yaml"
    );
    let there = dir.path().display().to_string();
    // Other tests and daemons of this machine have the usual paths and ports.
    let moved = text(std::path::Path::new(example))
        .replace("/var/lib/corvid", &format!("{there}/state"))
        .replace("/run/corvid", &there);
    let ports = format!(
        "{moved}name: proxy-1\nbackend: {{listen: ['127.0.0.1:0']}}\nobserve: {{listen: '127.0.0.1:0'}}\n\
         admin: {{listen: '127.0.0.1:0', socket: {there}/admin.sock}}\ndrain: {{minDelay: 10ms}}\n"
    );
    let file = dir.path().join("proxy-server.yaml");
    std::fs::write(&file, ports).unwrap();
    let mut stack = Stack::start_with(dir, &file);
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    stack.connect(&format!("edge1:{port}")).await.unwrap();
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_changes_what_becomes_of_other_destinations() {
    let stack = Stack::start("");
    let to = "169.254.169.254:80";
    assert!(
        stack
            .connect(to)
            .await
            .unwrap_err()
            .contains("no node at the edge")
    );
    let file = stack.dir.path().join("proxy-server.yaml");
    rewrite(
        &file,
        &text(&file).replace("connect.sock'}", "connect.sock', default: direct}"),
    );
    stack.reload.reload();
    while stack
        .metric("corvid_config_reloads_total{result=\"ok\"}")
        .await
        < 1.0
    {
        tokio::task::yield_now().await;
    }
    assert!(
        stack
            .connect(to)
            .await
            .unwrap_err()
            .contains("never dialled")
    );
    stack.stop().await;
}
