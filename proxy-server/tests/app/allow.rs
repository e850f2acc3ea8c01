//! Who may ask for what, at each frontend: what is permitted passes, and everything else is refused and recorded.

use std::io::Write;
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;

use crate::scrape::{BASIC, anonymous, exporter};
use crate::stack::{
    Stack, allow, configuration_of, echo, reloaded, rewrite, status_line, text, tls, within,
};

/// How a requester comes.
#[derive(Debug, Clone, Copy)]
enum As {
    /// With a client certificate of that name.
    Client(&'static str),
    /// With that header.
    Header(&'static str),
    /// Over that Unix socket.
    Socket(&'static str),
}

const BEARER: &str = "Proxy-Authorization: Bearer token-of-prometheus";

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// Asks with this request line; the status line, and the connection.
async fn ask(stack: &Stack, frontend: usize, how: As, line: &str) -> (String, Box<dyn Io>) {
    let mut header = String::new();
    let mut io: Box<dyn Io> = match how {
        As::Client(name) => Box::new(tls(stack.tcp(frontend), &stack.client(name)).await.unwrap()),
        As::Header(given) => {
            header = format!("{given}\r\n");
            Box::new(anonymous(stack, frontend).await)
        }
        As::Socket(file) => Box::new(
            UnixStream::connect(stack.dir.path().join(file))
                .await
                .unwrap(),
        ),
    };
    let request = format!("{line} HTTP/1.1\r\nHost: x\r\n{header}\r\n");
    io.write_all(request.as_bytes()).await.unwrap();
    (status_line(&mut io).await, io)
}

/// Doors with narrow rules and doors without; `port` is the one that is permitted at edge1.
fn doors(dir: &std::path::Path, port: u16) -> String {
    let d = dir.display();
    let uid = nix::unistd::geteuid().as_raw();
    let other = uid + 1;
    format!(
        "- {{type: httpConnect, listen: 'unix:{d}/connect.sock', allow: [{{uids: [{uid}], nodes: [edge1], ports: [{port}]}}]}}\n\
         - {{type: httpConnect, listen: '127.0.0.1:0', allow: [{{clients: [kube-apiserver], nodes: [edge1], ports: [{port}]}}, \
            {{clients: [far], from: [203.0.113.0/24], nodes: ['*'], ports: ['1-65535']}}]}}\n\
         - {{type: forwardProxy, listen: '127.0.0.1:0', bearerTokenFile: {d}/tokens, basicAuthFile: {d}/users, \
            allow: [{{users: [prom], clients: [near], from: [127.0.0.0/8], nodes: [edge1], ports: [{port}]}}, \
            {{clients: [far], from: [203.0.113.0/24], nodes: ['*'], ports: ['1-65535']}}]}}\n\
         - {{type: httpConnect, listen: '127.0.0.1:0'}}\n\
         - {{type: forwardProxy, listen: '127.0.0.1:0', bearerTokenFile: {d}/tokens, basicAuthFile: {d}/users}}\n\
         - {{type: httpConnect, listen: 'unix:{d}/other.sock', allow: [{{uids: [{other}], nodes: ['*'], ports: ['1-65535']}}]}}\n\
         - {{type: httpConnect, listen: 'unix:{d}/nobody.sock', allow: [], default: direct}}\n\
         - {{type: httpConnect, listen: 'unix:{d}/edge.sock', allow: [{{uids: [{uid}], nodes: ['*'], ports: ['1-65535']}}], default: direct}}\n\
         - {{type: httpConnect, listen: 'unix:{d}/open.sock'}}\n"
    )
}

async fn guarded(edge: &mut JoinSet<()>) -> (Stack, u16) {
    let port = exporter(edge).await;
    let dir = tempfile::tempdir().unwrap();
    let file = configuration_of(dir.path(), &doors(dir.path(), port), "");
    let mut stack = Stack::start_with(dir, &file);
    for name in ["edge1", "edge2"] {
        stack.agent(name, &allow(&[port]));
    }
    for name in ["edge1", "edge2"] {
        stack.sessions(name, 1).await;
    }
    (stack, port)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_rules_permit_passes() {
    let mut edge = JoinSet::new();
    let (stack, port) = guarded(&mut edge).await;
    let connect = format!("CONNECT edge1:{port}");
    let scrape = format!("GET http://edge1:{port}/metrics");
    for (frontend, how, line) in [
        (0, As::Socket("connect.sock"), &connect),
        (1, As::Client("kube-apiserver"), &connect),
        (2, As::Client("near"), &connect),
        (2, As::Header(BASIC), &connect),
        (2, As::Header(BEARER), &connect),
        (2, As::Client("near"), &scrape),
        (2, As::Header(BASIC), &scrape),
        (2, As::Header(BEARER), &scrape),
        (7, As::Socket("edge.sock"), &connect),
        (8, As::Socket("open.sock"), &connect),
    ] {
        let (said, _io) = ask(&stack, frontend, how, line).await;
        assert!(
            said.starts_with("HTTP/1.1 200"),
            "{frontend} {how:?} {line}: {said}"
        );
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_else_is_refused_at_every_door() {
    let mut edge = JoinSet::new();
    let (stack, port) = guarded(&mut edge).await;
    let to = |node: &str, port: u16| format!("{node}:{port}");
    let (good, node, wrong) = (to("edge1", port), to("edge2", port), to("edge1", 1));
    let user = "user/prom";
    let uid = format!("uid/{}", nix::unistd::geteuid());
    // A kept connection that others may use is no way round.
    let line = format!("GET http://{good}/metrics");
    let (said, _io) = ask(&stack, 2, As::Header(BASIC), &line).await;
    assert!(said.starts_with("HTTP/1.1 200"), "{said}");
    let mut refused = 0;
    for (frontend, how, to, who) in [
        // Unknown client, wrong node, wrong port, wrong network.
        (1, As::Client("other"), &good, "client/other"),
        (
            1,
            As::Client("kube-apiserver"),
            &node,
            "client/kube-apiserver",
        ),
        (
            1,
            As::Client("kube-apiserver"),
            &wrong,
            "client/kube-apiserver",
        ),
        (1, As::Client("far"), &good, "client/far"),
        (2, As::Client("other"), &good, "client/other"),
        (2, As::Client("near"), &node, "client/near"),
        (2, As::Client("near"), &wrong, "client/near"),
        (2, As::Client("far"), &good, "client/far"),
        // A certificate that is called as the user is not the user.
        (2, As::Client("prom"), &good, "client/prom"),
        (2, As::Header(BASIC), &node, user),
        (2, As::Header(BASIC), &wrong, user),
        (2, As::Header(BEARER), &node, user),
        (2, As::Header(BEARER), &wrong, user),
        // TCP without rules.
        (
            3,
            As::Client("kube-apiserver"),
            &good,
            "client/kube-apiserver",
        ),
        (4, As::Client("near"), &good, "client/near"),
        (4, As::Header(BASIC), &good, user),
        (4, As::Header(BEARER), &good, user),
        // Unix: wrong node, wrong port, wrong uid, no rule at all.
        (0, As::Socket("connect.sock"), &node, &uid),
        (0, As::Socket("connect.sock"), &wrong, &uid),
        (5, As::Socket("other.sock"), &good, &uid),
        (6, As::Socket("nobody.sock"), &good, &uid),
        // Not at the edge, and no rule says `elsewhere`.
        (
            6,
            As::Socket("nobody.sock"),
            &"203.0.113.7:80".to_owned(),
            &uid,
        ),
        (
            7,
            As::Socket("edge.sock"),
            &"203.0.113.7:80".to_owned(),
            &uid,
        ),
    ] {
        let plain = format!("GET http://{to}/metrics");
        let mut lines = vec![format!("CONNECT {to}")];
        if matches!(frontend, 2 | 4) {
            lines.push(plain);
        }
        for line in lines {
            let (said, _io) = ask(&stack, frontend, how, &line).await;
            assert_eq!(
                said,
                format!("HTTP/1.1 403 {to}: not allowed: {who} may not ask for it"),
                "{frontend} {how:?} {line}"
            );
            refused += 1;
        }
    }
    for frontend in [2, 4] {
        let (said, _io) = ask(&stack, frontend, As::Header("X-Nothing: 1"), &line).await;
        assert!(said.starts_with("HTTP/1.1 407"), "{said}");
    }
    let counted = ["http_connect", "forward_proxy"].map(|frontend| {
        format!(
            "corvid_streams_total{{frontend=\"{frontend}\",path=\"none\",reason=\"not_allowed\"}}"
        )
    });
    let mut sum = 0.0;
    for metric in counted {
        sum += stack.metric(&metric).await;
    }
    assert_eq!(sum, f64::from(refused));
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_rules_are_for_new_requests_and_touch_no_stream() {
    let mut edge = JoinSet::new();
    let port = echo(&mut edge).await;
    let dir = tempfile::tempdir().unwrap();
    let file = configuration_of(dir.path(), &doors(dir.path(), port), "");
    let mut stack = Stack::start_with(dir, &file);
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let session = stack.registry.all()[0].id;
    let connect = format!("CONNECT edge1:{port}");
    let mut open = Vec::new();
    let ways = [
        (0, As::Socket("connect.sock")),
        (1, As::Client("kube-apiserver")),
        (2, As::Header(BASIC)),
    ];
    for (frontend, how) in ways {
        let (said, io) = ask(&stack, frontend, how, &connect).await;
        assert!(said.starts_with("HTTP/1.1 200"), "{said}");
        open.push(io);
    }
    let before = text(&file);
    rewrite(&file, &before.replace("nodes: [edge1]", "nodes: [edge7]"));
    stack.reload.reload();
    reloaded(&stack, 1.0).await;
    for (frontend, how) in ways {
        let (said, _io) = ask(&stack, frontend, how, &connect).await;
        assert!(said.contains("403"), "{said}");
    }
    for io in &mut open {
        io.write_all(b"still here").await.unwrap();
        let mut answer = [0; 10];
        within(io.read_exact(&mut answer)).await.unwrap();
        assert_eq!(&answer, b"still here");
    }
    rewrite(&file, &before);
    stack.reload.reload();
    reloaded(&stack, 2.0).await;
    for (frontend, how) in ways {
        let (said, _io) = ask(&stack, frontend, how, &connect).await;
        assert!(said.starts_with("HTTP/1.1 200"), "{said}");
    }
    assert_eq!(stack.registry.all()[0].id, session);
    drop(open);
    stack.stop().await;
}

/// The access log of every test of this process.
pub(crate) static LINES: LazyLock<Arc<Mutex<Vec<u8>>>> = LazyLock::new(|| {
    let lines = Arc::<Mutex<Vec<u8>>>::default();
    let sink = Arc::clone(&lines);
    let json = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_writer(move || Sink(Arc::clone(&sink)));
    let only = Targets::new()
        .with_target("access", tracing::Level::INFO)
        .with_target("proxy_server::cluster::events", tracing::Level::INFO);
    let subscriber = tracing_subscriber::registry().with(json.with_filter(only));
    tracing::subscriber::set_global_default(subscriber).unwrap();
    lines
});

pub(crate) struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Waits for the line about `destination` for which `fits` is true.
pub(crate) async fn line(destination: &str, fits: impl Fn(&Value) -> bool) -> Value {
    let found = async {
        loop {
            let text = String::from_utf8(LINES.lock().clone()).unwrap();
            let lines = text
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let mut about = lines.filter(|line| line["destination"] == destination);
            if let Some(line) = about.find(|line| fits(line)) {
                return line;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    within(found).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_request_leaves_one_line_that_says_who_from_where_what_and_how_it_went() {
    LazyLock::force(&LINES);
    let mut edge = JoinSet::new();
    let (stack, port) = guarded(&mut edge).await;
    let (good, bad) = (format!("edge1:{port}"), format!("edge2:{port}"));
    let uid = format!("uid/{}", nix::unistd::geteuid());
    let (pid, told) = (std::process::id(), nix::unistd::geteuid());
    let unix = format!("unix(uid {told}, pid {pid})");
    for (frontend, how, name, requester) in [
        (0, As::Socket("connect.sock"), "http_connect", uid.as_str()),
        (
            1,
            As::Client("kube-apiserver"),
            "http_connect",
            "client/kube-apiserver",
        ),
        (2, As::Client("near"), "forward_proxy", "client/near"),
        (2, As::Header(BASIC), "forward_proxy", "user/prom"),
    ] {
        let (said, mut io) = ask(&stack, frontend, how, &format!("CONNECT {good}")).await;
        assert!(said.starts_with("HTTP/1.1 200"), "{said}");
        io.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        io.shutdown().await.unwrap();
        let mut answer = Vec::new();
        within(io.read_to_end(&mut answer)).await.unwrap();
        let (said, _io) = ask(&stack, frontend, how, &format!("CONNECT {bad}")).await;
        assert!(said.contains(" 403 "), "{said}");
        let of = |line: &Value| line["requester"] == requester && line["message"] == "stream";
        let served = line(&good, of).await;
        let refused = line(&bad, of).await;
        for line in [&served, &refused] {
            assert_eq!(line["frontend"], name, "{line}");
            let from = line["from"].as_str().unwrap();
            let address = from.parse::<std::net::SocketAddr>();
            let right = address.map_or(from == unix, |address| address.ip().is_loopback());
            assert!(right, "{line}");
            assert!(
                line["ms"].is_u64() && line["timestamp"].is_string(),
                "{line}"
            );
        }
        for (line, node, path, reason) in [
            (&served, "edge1", "tunnel", "ok"),
            (&refused, "edge2", "none", "not_allowed"),
        ] {
            assert_eq!(line["node"], node, "{line}");
            assert_eq!(line["path"], path, "{line}");
            assert_eq!(line["reason"], reason, "{line}");
        }
        assert_eq!(served["to_edge"], 18, "{served}");
        assert_eq!(served["from_edge"], answer.len(), "{served}");
        assert_eq!(refused["to_edge"], 0, "{refused}");
        let sentence = refused["said"].as_str().unwrap();
        assert!(sentence.contains(requester), "{refused}");
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_over_a_kept_connection_has_a_line_of_its_own() {
    LazyLock::force(&LINES);
    let mut edge = JoinSet::new();
    let (stack, port) = guarded(&mut edge).await;
    let (good, bad) = (format!("edge1:{port}"), format!("edge2:{port}"));
    for (how, requester) in [
        (As::Client("near"), "client/near"),
        (As::Header(BEARER), "user/prom"),
    ] {
        let path = "metrics?secret=1";
        let (said, mut io) = ask(&stack, 2, how, &format!("GET http://{good}/{path}")).await;
        assert!(said.starts_with("HTTP/1.1 200"), "{said}");
        let mut body = [0; 26];
        within(io.read_exact(&mut body)).await.unwrap();
        let (said, _io) = ask(&stack, 2, how, &format!("GET http://{bad}/{path}")).await;
        assert!(said.contains(" 403 "), "{said}");
        let of = |line: &Value| line["requester"] == requester && line["message"] == "request";
        let served = line(&good, of).await;
        let refused = line(&bad, of).await;
        for line in [&served, &refused] {
            assert_eq!(line["frontend"], "forward_proxy", "{line}");
            assert_eq!(line["url_path"], "/metrics", "{line}");
            let from = line["from"].as_str().unwrap();
            assert!(from.starts_with("127.0.0.1:"), "{line}");
            assert!(
                line["ms"].is_u64() && line["timestamp"].is_string(),
                "{line}"
            );
            assert_eq!(line["to_edge"], 0, "{line}");
        }
        assert_eq!(served["node"], "edge1", "{served}");
        assert_eq!(served["path"], "tunnel", "{served}");
        assert_eq!(served["status"], 200, "{served}");
        assert_eq!(served["reason"], "ok", "{served}");
        assert_eq!(served["from_edge"], body.len(), "{served}");
        assert_eq!(refused["node"], "edge2", "{refused}");
        assert_eq!(refused["path"], "none", "{refused}");
        assert_eq!(refused["reason"], "not_allowed", "{refused}");
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whom_no_rule_names_is_not_told_which_nodes_there_are() {
    let mut edge = JoinSet::new();
    let (stack, _port) = guarded(&mut edge).await;
    let discovery = "GET /sd/kubelet";
    for how in [As::Client("near"), As::Header(BASIC), As::Header(BEARER)] {
        let (said, _io) = ask(&stack, 2, how, discovery).await;
        assert!(said.starts_with("HTTP/1.1 200"), "{how:?}: {said}");
    }
    // `far` is named for another network; the last frontend permits nothing to anybody.
    for (frontend, how) in [
        (2, As::Client("far")),
        (2, As::Client("stranger")),
        (4, As::Client("near")),
        (4, As::Header(BASIC)),
        (4, As::Header(BEARER)),
    ] {
        let (said, _io) = ask(&stack, frontend, how, discovery).await;
        assert!(said.starts_with("HTTP/1.1 403"), "{how:?}: {said}");
    }
    stack.stop().await;
}
