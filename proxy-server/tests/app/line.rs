//! Nodes that are dialled past the tunnel. Sites are addresses of loopback, and the tunnel leads to 127.0.0.1: each says its
//! own word at the same port, so that every answer tells which way it came.

use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use proxy_server::status::Explained;
use serde_json::{Value, json};
use socket2::{Domain, SockFilter, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinSet;

use crate::allow::{LINES, line as logged};
use crate::api::Api;
use crate::cluster::{edge, is_told, start, told};
use crate::scrape::{BASIC, ask, exporter_on};
use crate::stack::{DEADLINE, Stack, allow, within};

/// Something at an address that says a word to whoever connects, then echoes.
pub(crate) struct Site {
    listener: Arc<TcpListener>,
    answering: JoinSet<()>,
    /// What fills the queue of a site that is silent.
    waiting: Vec<TcpStream>,
    word: &'static str,
}

impl Site {
    /// One that answers.
    pub(crate) fn open(address: SocketAddr, word: &'static str) -> std::io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        // So short that it can be filled, and long enough for who comes at once.
        socket.listen(16)?;
        let mut site = Self {
            listener: Arc::new(TcpListener::from_std(socket.into())?),
            answering: JoinSet::new(),
            waiting: Vec::new(),
            word,
        };
        site.answer();
        Ok(site)
    }

    pub(crate) fn port(&self) -> u16 {
        self.listener.local_addr().unwrap().port()
    }

    /// From now on nobody is answered in any way, as behind a line that is cut: the queue is full, and the kernel drops
    /// what comes. What was connected is cut.
    pub(crate) async fn fall_silent(&mut self) {
        self.answering.shutdown().await;
        let address = self.listener.local_addr().unwrap();
        #[expect(clippy::disallowed_methods, reason = "what fills the queue")]
        while let Ok(connected) =
            tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(address)).await
        {
            self.waiting.push(connected.unwrap());
        }
    }

    /// From now on nobody listens there, and whoever comes is refused.
    pub(crate) async fn close(mut self) {
        self.answering.shutdown().await;
    }

    /// Whoever comes is answered again.
    pub(crate) async fn come_back(&mut self) {
        self.answer();
        let address = self.listener.local_addr().unwrap();
        // Who waits in the queue goes first.
        #[expect(clippy::disallowed_methods, reason = "a look from outside")]
        let mut seen = within(TcpStream::connect(address)).await.unwrap();
        assert_eq!(word(&mut seen).await, self.word);
    }

    /// Whoever comes, and still waits, is answered.
    pub(crate) fn answer(&mut self) {
        self.waiting.clear();
        let (listener, word) = (Arc::clone(&self.listener), self.word);
        self.answering.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                connections.spawn(async move {
                    if stream.write_all(word.as_bytes()).await.is_ok() {
                        let (mut read, mut write) = stream.split();
                        tokio::io::copy(&mut read, &mut write).await.ok();
                    }
                });
            }
        });
    }
}

/// What the tunnel leads to, and a site at each of these addresses, all at one port.
pub(crate) fn sites<const N: usize>(addresses: [&str; N]) -> (Site, [Site; N]) {
    for _ in 0..50 {
        let agents = Site::open("127.0.0.1:0".parse().unwrap(), "tunnel").unwrap();
        let port = agents.port();
        let open = addresses.map(|address| {
            let word: &'static str = format!("line {address}").leak();
            Site::open(format!("{address}:{port}").parse().unwrap(), word)
        });
        if open.iter().all(Result::is_ok) {
            return (agents, open.map(Result::unwrap));
        }
    }
    panic!("no port is free at all of {addresses:?}");
}

/// The word of whoever answers.
pub(crate) async fn word(stream: &mut (impl AsyncReadExt + Unpin)) -> String {
    let mut buffer = [0; 64];
    let count = within(stream.read(&mut buffer)).await.unwrap_or(0);
    String::from_utf8(buffer[..count].to_vec()).unwrap()
}

/// Who answers there, or the status line.
pub(crate) async fn who(stack: &Stack, to: &str) -> String {
    match within(stack.connect(to)).await {
        Ok(mut stream) => word(&mut stream).await,
        Err(line) => line,
    }
}

/// Waits until that one answers: a dial that was slow, or a probe that was lost, may lead another way for a while.
pub(crate) async fn until_word(stack: &Stack, to: &str, wanted: &str) -> UnixStream {
    let asked = async {
        loop {
            if let Ok(mut stream) = stack.connect(to).await
                && word(&mut stream).await == wanted
            {
                return stream;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let in_time = tokio::time::timeout(DEADLINE, asked).await;
    in_time.unwrap_or_else(|_| panic!("{to}: {wanted:?} never answers"))
}

/// That a stream still carries bytes both ways.
pub(crate) async fn carries(stream: &mut UnixStream) {
    stream.write_all(b"still there").await.unwrap();
    let mut answer = [0; 11];
    within(stream.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"still there");
}

pub(crate) const LINE: &str = "lines: [{name: express, networks: [127.0.0.0/8]}]\n";

pub(crate) fn route(node: &str, address: &str) -> String {
    format!("{{node: {node}, addresses: [{address}]}}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_on_a_line_is_dialled_without_any_agent() {
    let (_agents, [site]) = sites(["127.0.0.9"]);
    let port = site.port();
    let routes = format!("routes: [{}]", route("edge1", "127.0.0.9"));
    for mode in ["auto", "direct"] {
        let line = format!(
            "lines: [{{name: express, networks: [127.0.0.0/8], interface: lo, source: 127.0.0.5, mode: {mode}}}]\n"
        );
        let stack = Stack::start(&(line + &routes));
        for to in ["edge1", "127.0.0.9"] {
            let mut stream = stack.connect(&format!("{to}:{port}")).await.unwrap();
            assert_eq!(word(&mut stream).await, "line 127.0.0.9", "{to}");
            carries(&mut stream).await;
        }
        let ok = stack
            .metric("corvid_line_dials_total{line=\"express\",result=\"ok\"}")
            .await;
        assert!((ok - 2.0).abs() < f64::EPSILON, "{ok}");
        stack.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_fails_is_left_for_the_tunnel_and_taken_again() {
    let (agents, [mut site]) = sites(["127.0.0.9"]);
    let port = site.port();
    let to = format!("edge1:{port}");
    let routes = format!("routes: [{}]", route("edge1", "127.0.0.9"));
    let mut stack = Stack::start(&(LINE.to_owned() + &routes));
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    until_word(&stack, &to, "line 127.0.0.9").await;

    // Silent: the tunnel is tried beside it and answers. One after the other does not help: nothing comes of the line.
    site.fall_silent().await;
    assert_eq!(who(&stack, &to).await, "tunnel");
    let lost = "corvid_line_dials_total{line=\"express\",result=\"lost\"}";
    assert!(stack.metric(lost).await >= 1.0);
    site.come_back().await;
    until_word(&stack, &to, "line 127.0.0.9").await;

    // Neither: both are told.
    site.close().await;
    agents.close().await;
    let neither = who(&stack, &to).await;
    assert!(
        neither.contains("502 node edge1: connection refused"),
        "{neither}"
    );
    let by_line = format!("dialled 127.0.0.9:{port} by line express");
    assert!(neither.contains(&by_line), "{neither}");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_refuses_is_left_at_once_and_what_runs_stays_where_it_is() {
    let (_agents, [site]) = sites(["127.0.0.9"]);
    let port = site.port();
    let to = format!("edge1:{port}");
    let routes = format!("routes: [{}]", route("edge1", "127.0.0.9"));
    let times = "timeouts: {dial: 29s}\npath: {raceAfter: 28s}\n";
    let mut stack = Stack::start(&format!("{LINE}{times}{routes}"));
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let mut by_line = until_word(&stack, &to, "line 127.0.0.9").await;
    carries(&mut by_line).await;
    site.close().await;
    let at_once = tokio::time::timeout(Duration::from_secs(20), stack.connect(&to)).await;
    let mut by_tunnel = at_once.unwrap().unwrap();
    assert_eq!(word(&mut by_tunnel).await, "tunnel");
    let again = Site::open(format!("127.0.0.9:{port}").parse().unwrap(), "back").unwrap();
    until_word(&stack, &to, "back").await;
    carries(&mut by_tunnel).await;
    drop((by_line, by_tunnel));
    again.close().await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_session_the_line_has_all_the_time_there_is() {
    let (_agents, [mut site]) = sites(["127.0.0.9"]);
    let to = format!("edge1:{}", site.port());
    let routes = format!("routes: [{}]", route("edge1", "127.0.0.9"));
    let stack = Stack::start(&(LINE.to_owned() + &routes));
    site.fall_silent().await;
    let asked = who(&stack, &to);
    let comes_back = async {
        // The tunnel has failed by then.
        tokio::time::sleep(Duration::from_millis(500)).await;
        site.answer();
    };
    let (answer, ()) = tokio::join!(asked, comes_back);
    assert_eq!(answer, "line 127.0.0.9");
    site.close().await;
    let refused = who(&stack, &to).await;
    assert!(
        refused.contains("502 node edge1: connection refused: dialled 127.0.0.9"),
        "{refused}"
    );
    assert!(
        refused.contains("by the tunnel node edge1: no session"),
        "{refused}"
    );
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_over_a_line_that_goes_silent_is_cut_and_a_reader_that_pauses_is_not() {
    let node = TcpListener::bind("127.0.0.9:0").await.unwrap();
    let to = format!("edge1:{}", node.local_addr().unwrap().port());
    let routes = format!("routes: [{}]", route("edge1", "127.0.0.9"));
    let stack = Stack::start(&format!("{LINE}path: {{silence: 1s}}\n{routes}"));
    let open = async || {
        let stream = stack.connect(&to).await.unwrap();
        (stream, within(node.accept()).await.unwrap().0)
    };
    let (mut writer, mut reader) = open().await;
    let mut sent = 0;
    let writes = async {
        loop {
            sent += writer.write(&[7; 1 << 16]).await.unwrap();
        }
    };
    // Until nothing more fits anywhere on the way.
    let full = tokio::time::timeout(Duration::from_millis(500), writes).await;
    assert!(full.is_err());

    // Beside it others go silent one after the other, so that the pause is many times as long.
    let cut = "corvid_streams_total{frontend=\"http_connect\",path=\"direct\",reason=\"timeout\"}";
    for count in 1..=5 {
        let (mut asks, gone) = open().await;
        let nothing = [SockFilter::new(0x06, 0, 0, 0)];
        SockRef::from(&gone).attach_filter(&nothing).unwrap();
        asks.write_all(b"is anybody there?").await.unwrap();
        let end = within(asks.read(&mut [0; 1])).await;
        assert!(!matches!(end, Ok(1..)), "{end:?}");
        until_at_least(&stack, cut, f64::from(count)).await;
    }
    let cuts = stack.metric(cut).await;
    assert!((cuts - 5.0).abs() < f64::EPSILON, "{cuts}");

    // It has lost nothing, and goes on.
    let reads = async {
        let mut some = vec![0; 1 << 16];
        let mut all = 0;
        while all < sent {
            all += reader.read(&mut some).await.unwrap();
        }
        assert_eq!(all, sent);
    };
    within(reads).await;
    writer.write_all(b"still there").await.unwrap();
    let mut word = [0; 11];
    within(reader.read_exact(&mut word)).await.unwrap();
    assert_eq!(&word, b"still there");
    drop((writer, reader));
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_two_nodes_have_is_never_dialled_by_a_line() {
    let (_agents, [site]) = sites(["127.0.0.9"]);
    let port = site.port();
    let routes = format!(
        "routes: [{}, {}, {}]",
        route("edge1", "127.0.0.9"),
        route("edge2", "127.0.0.9"),
        route("edge3", "127.0.0.10"),
    );
    let mut stack = Stack::start(&(LINE.to_owned() + &routes));
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    assert_eq!(who(&stack, &format!("edge1:{port}")).await, "tunnel");
    let alone = who(&stack, &format!("edge2:{port}")).await;
    assert!(alone.contains("503 node edge2: no session"), "{alone}");
    stack.stop().await;

    let direct = LINE.replace("}]", ", mode: direct}]");
    let stack = Stack::start(&(direct + &routes));
    let refused = who(&stack, &format!("edge1:{port}")).await;
    let wanted = "409 node edge1: more than one node has that address: its path is direct, and 127.0.0.9 is also that of node edge2, and no interface of a line says which is meant";
    assert!(refused.contains(wanted), "{refused}");
    // Nothing there, and no tunnel in its place.
    let nothing = who(&stack, &format!("edge3:{port}")).await;
    let wanted =
        format!("502 node edge3: connection refused: dialled 127.0.0.10:{port} by line express");
    assert!(nothing.contains(&wanted), "{nothing}");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nodes_annotation_acts_on_the_next_request_and_cuts_nothing() {
    let api = Api::start().await;
    let (_agents, [site]) = sites(["127.0.0.9"]);
    let port = site.port();
    let to = format!("edge1:{port}");
    let said = |path: Option<&str>| {
        let mut node = edge("edge1", &["192.168.1.10"]);
        if let Some(path) = path {
            node["metadata"]["annotations"] = json!({"corvid.io/path": path});
        }
        node
    };
    api.put(said(None));
    let more = format!(
        "kubernetes: {{kubeconfig: KUBECONFIG}}\n{LINE}routes: [{}]",
        route("edge1", "127.0.0.9")
    );
    let mut stack = start(&api, &more);
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let mut runs = vec![until_word(&stack, &to, "line 127.0.0.9").await];
    for (path, wanted) in [
        (Some("tunnel"), "tunnel"),
        (Some("direct"), "line 127.0.0.9"),
        (Some("tunnel"), "tunnel"),
        // None of the words for it: as if nothing were said.
        (Some("Direct!"), "line 127.0.0.9"),
        (Some("tunnel"), "tunnel"),
        (None, "line 127.0.0.9"),
    ] {
        api.put(said(path));
        runs.push(until_word(&stack, &to, wanted).await);
    }
    for stream in &mut runs {
        carries(stream).await;
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_leads_back_to_servers_is_dialled_by_no_line() {
    let api = Api::start().await;
    let (_agents, [map, service]) = sites(["127.0.0.9", "127.0.0.10"]);
    let port = map.port();
    // One of them has the address where names at the edge point.
    let (one, two) = (route("edge1", "127.0.0.9"), route("edge2", "127.0.0.10"));
    let has = json!({"spec": {"clusterIP": "127.0.0.10", "clusterIPs": ["127.0.0.10"]}});
    api.set("services", "corvid/tunnel", has);
    for (dns, node, free) in [
        ("addresses: [127.0.0.9]", "edge1", "edge2"),
        ("service: corvid/tunnel", "edge2", "edge1"),
    ] {
        for (mode, reason) in [
            ("auto", "no session"),
            (
                "direct",
                "that address is never dialled: its path is direct, and 127.0.0.",
            ),
        ] {
            let line = LINE.replace("}]", &format!(", mode: {mode}}}]"));
            let more = format!(
                "kubernetes: {{kubeconfig: KUBECONFIG, dns: {{{dns}}}}}\n{line}routes: [{one}, {two}]"
            );
            let mut stack = start(&api, &more);
            is_told(&stack, &format!("{node}:{port}"), reason).await;
            if mode == "auto" {
                stack.agent(node, &allow(&[port]));
                stack.sessions(node, 1).await;
                assert_eq!(who(&stack, &format!("{node}:{port}")).await, "tunnel");
            }
            let beside = who(&stack, &format!("{free}:{port}")).await;
            assert!(beside.starts_with("line 127.0.0."), "{dns} {beside}");
            stack.stop().await;
        }
    }
    drop(service);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_says_of_itself_leads_to_no_address_that_no_line_has() {
    let api = Api::start().await;
    let (_agents, [site]) = sites(["127.0.0.9"]);
    let port = site.port();
    let mut node = edge("edge1", &["192.168.1.10"]);
    node["metadata"]["annotations"] = json!({"corvid.io/path": "direct"});
    node["metadata"]["labels"]["alibabacloud.com/interconnection-mode"] = json!("private");
    api.put(node);
    // Its address is on no line.
    let more = format!(
        "kubernetes: {{kubeconfig: KUBECONFIG}}\nlines: [{{name: other, networks: [10.0.0.0/8]}}]\nroutes: [{}]",
        route("edge1", "127.0.0.9")
    );
    let stack = start(&api, &more);
    is_told(&stack, "192.168.1.10:1", "503 node edge1").await;
    let by_name = told(&stack, &format!("edge1:{port}")).await;
    assert!(by_name.contains("503 node edge1: no session"), "{by_name}");
    assert!((stack.metric("corvid_line_dials_total").await).abs() < f64::EPSILON);
    stack.stop().await;
}

/// So that verdicts come within a test's patience.
pub(crate) const QUICK: &str = "path: {stable: 1s, probes: {interval: 200ms, timeout: 150ms}}\n";

/// A node whose kubelet is at that port.
pub(crate) fn kubelet_at(port: u16) -> Value {
    let mut node = edge("edge1", &["192.168.1.10"]);
    node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"] = json!(port);
    node
}

/// A node whose kubelet is at that port, on the line `express` at 127.0.0.9.
pub(crate) fn probed(api: &Api, port: u16) -> Stack {
    api.put(kubelet_at(port));
    let more = format!(
        "kubernetes: {{kubeconfig: KUBECONFIG}}\n{LINE}{QUICK}routes: [{}]",
        route("edge1", "127.0.0.9")
    );
    start(api, &more)
}

/// Waits until that has happened so often.
pub(crate) async fn until_at_least(stack: &Stack, name: &str, count: f64) {
    let read = async {
        while stack.metric(name).await < count {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let in_time = tokio::time::timeout(DEADLINE, read).await;
    assert!(in_time.is_ok(), "{name} is never {count}");
}

const DIALS: &str = "corvid_line_dials_total";

pub(crate) fn switched(to: &str) -> String {
    format!("corvid_line_switches_total{{line=\"express\",of=\"node\",to=\"{to}\"}}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_is_known_to_be_down_is_not_waited_for_until_it_has_been_stable() {
    let api = Api::start().await;
    let (_agents, [mut site]) = sites(["127.0.0.9"]);
    let to = format!("edge1:{}", site.port());
    let mut stack = probed(&api, site.port());
    stack.agent("edge1", &allow(&[site.port()]));
    stack.sessions("edge1", 1).await;
    until_at_least(&stack, "corvid_line_probes_total", 1.0).await;
    until_word(&stack, &to, "line 127.0.0.9").await;

    site.fall_silent().await;
    until_at_least(&stack, &switched("down"), 1.0).await;
    let before = stack.metric(DIALS).await;
    for _ in 0..5 {
        assert_eq!(who(&stack, &to).await, "tunnel");
    }
    let dials = stack.metric(DIALS).await - before;
    assert!(
        dials.abs() < f64::EPSILON,
        "{dials} dials by a line that is down"
    );

    site.answer();
    until_at_least(&stack, &switched("up"), 1.0).await;
    until_word(&stack, &to, "line 127.0.0.9").await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_is_down_is_better_than_no_session() {
    let api = Api::start().await;
    let (_agents, [mut site]) = sites(["127.0.0.9"]);
    let to = format!("edge1:{}", site.port());
    let stack = probed(&api, site.port());
    until_at_least(&stack, "corvid_line_probes_total", 1.0).await;
    site.fall_silent().await;
    until_at_least(&stack, &switched("down"), 1.0).await;
    site.come_back().await;
    // Not stable yet, and there is nothing else.
    assert_eq!(who(&stack, &to).await, "line 127.0.0.9");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_has_to_do_without_the_line_has_it_looked_at() {
    let api = Api::start().await;
    let (_agents, [mut site]) = sites(["127.0.0.9"]);
    let port = site.port();
    let to = format!("edge1:{port}");
    api.put(kubelet_at(port));
    // Never probed of itself within this test.
    let settings = "path: {probes: {interval: 1h, timeout: 150ms}}\n";
    let more = format!(
        "kubernetes: {{kubeconfig: KUBECONFIG}}\n{LINE}{settings}routes: [{}]",
        route("edge1", "127.0.0.9")
    );
    let mut stack = start(&api, &more);
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    // The nodes on lines are looked up with the cluster's.
    until_at_least(&stack, "corvid_line_nodes", 1.0).await;
    site.fall_silent().await;
    assert_eq!(who(&stack, &to).await, "tunnel");
    // The second probe follows the first bad one within a second.
    until_at_least(&stack, &switched("down"), 1.0).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrape_by_a_line_keeps_no_connection_that_could_be_dead_at_the_next() {
    let listener = TcpListener::bind("127.0.0.9:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut tasks = JoinSet::new();
    exporter_on(&mut tasks, listener, |number, _seen| {
        format!("connection {number}")
    });
    let routes = format!("routes: [{}]", route("edge1", "127.0.0.9"));
    let stack = Stack::start(&(LINE.to_owned() + &routes));
    for wanted in ["connection 1", "connection 2"] {
        let request = format!(
            "GET http://edge1:{port}/metrics HTTP/1.1\r\nHost: edge1:{port}\r\n{BASIC}\r\nConnection: close\r\n\r\n"
        );
        let (line, body) = ask(&stack, &request).await;
        assert_eq!(line, "HTTP/1.1 200 OK");
        assert!(body.ends_with(wanted), "{body}");
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_access_log_says_by_which_line() {
    LazyLock::force(&LINES);
    let (_agents, [mut site]) = sites(["127.0.0.9"]);
    let to = format!("logged:{}", site.port());
    let routes = format!("routes: [{}]", route("logged", "127.0.0.9"));
    let mut stack = Stack::start(&(LINE.to_owned() + &routes));
    stack.agent("logged", &allow(&[site.port()]));
    stack.sessions("logged", 1).await;
    until_word(&stack, &to, "line 127.0.0.9").await;
    let by_line = logged(&to, |line| line["path"] == "direct").await;
    assert_eq!(by_line["line"], "express", "{by_line}");
    assert_eq!(by_line["session"], "", "{by_line}");
    site.fall_silent().await;
    assert_eq!(who(&stack, &to).await, "tunnel");
    let by_tunnel = logged(&to, |line| line["path"] == "tunnel").await;
    assert!(by_tunnel.get("line").is_none(), "{by_tunnel}");
    assert_ne!(by_tunnel["session"], "", "{by_tunnel}");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_a_destination_leads_is_explained() {
    let api = Api::start().await;
    let (_agents, [mut site]) = sites(["127.0.0.9"]);
    let port = site.port();
    let mut stack = probed(&api, port);
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    until_at_least(&stack, "corvid_line_probes_total", 1.0).await;
    let socket = stack.dir.path().join("admin.sock");
    let ask = async |to: &str, json| {
        let (socket, to) = (socket.clone(), to.parse().unwrap());
        let asked = move || proxy_server::commands::explain(&socket, &to, json).unwrap();
        tokio::task::spawn_blocking(asked).await.unwrap()
    };
    let told = ask(&format!("edge1:{port}"), false).await;
    for wanted in [
        &format!("route:        node edge1, agent edge1, dialled as edge1:{port}\n"),
        "path:         auto, by line express to 127.0.0.9\n",
        "annotation corvid.io/path: says nothing\n",
        "configured lines: decides: auto\n",
        "path.default: not looked at\n",
        "1 of its nodes up, 0 down\n",
        "node:         up on it for ",
        "sessions:     here (",
        "next request: goes by line express, with the tunnel beside it after 250ms\n",
    ] {
        assert!(told.contains(wanted), "{wanted:?} is missing in:\n{told}");
    }

    site.fall_silent().await;
    until_at_least(&stack, &switched("down"), 1.0).await;
    let told: Explained =
        serde_json::from_str(&ask(&format!("127.0.0.9:{port}"), true).await).unwrap();
    let line = told.line.unwrap();
    let node = line.node.unwrap();
    assert!(!node.up && node.loss.unwrap() > 0.0, "{node:?}");
    assert_eq!((line.up, line.nodes_up, line.nodes_down), (true, 0, 1));
    assert!(
        told.next
            .contains("goes through the tunnel, as the node is down on line express"),
        "{}",
        told.next
    );

    for (to, wanted) in [
        ("nobody:1", "next request: is not for the edge"),
        ("[2001:db8::1]:1", "next request: is not for the edge"),
        ("edge1:10250", "path:         auto"),
    ] {
        let told = ask(to, false).await;
        assert!(told.contains(wanted), "{to}: {told}");
    }
    let bad = daemon::admin::client::get(&stack.admin, "/explain?to=nothing").await;
    assert!(bad.unwrap_err().to_string().contains("400"));
    stack.stop().await;
}
