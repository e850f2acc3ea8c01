//! Nodes of a cluster, from an emulated Kubernetes API: routes come and go with them, and stay while it is away.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::api::{Api, Mood};
use crate::scrape::{BASIC, ask, exporter};
use crate::stack::{DEADLINE, Stack, allow, eventually, shouter, within};

/// A node at the edge, as a kubelet writes it.
pub(crate) fn edge(name: &str, addresses: &[&str]) -> Value {
    node(
        name,
        &json!({"openyurt.io/is-edge-worker": "true", "apps.openyurt.io/nodepool": "hz"}),
        &json!({}),
        addresses,
    )
}

pub(crate) fn node(name: &str, labels: &Value, annotations: &Value, addresses: &[&str]) -> Value {
    let addresses: Vec<_> = addresses
        .iter()
        .map(|address| {
            let kind = if address.parse::<std::net::IpAddr>().is_ok() {
                "InternalIP"
            } else {
                "InternalDNS"
            };
            json!({"type": kind, "address": address})
        })
        .collect();
    let images: Vec<_> = (0..20).map(|i| json!({"names": [format!("registry.example/image-{i}@sha256:{i:064}")], "sizeBytes": i})).collect();
    json!({
        "metadata": {
            "name": name, "uid": format!("uid-of-{name}"), "labels": labels, "annotations": annotations,
            "managedFields": [{"manager": "kubelet", "operation": "Update", "fieldsV1": {"f:status": {"f:images": {}}}}],
        },
        "spec": {"podCIDR": "10.42.1.0/24", "podCIDRs": ["10.42.1.0/24"]},
        "status": {
            "addresses": addresses,
            "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": "2026-01-01T00:00:00Z"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            "images": images,
        },
    })
}

/// A server that asks that API.
pub(crate) fn start(api: &Api, more: &str) -> Stack {
    let dir = tempfile::tempdir().unwrap();
    let kubeconfig = api.kubeconfig(dir.path());
    std::fs::write(dir.path().join("tokens"), "token-of-prometheus\n").unwrap();
    std::fs::write(dir.path().join("users"), "prom:a-long-password\n").unwrap();
    let more = if more.contains("kubernetes:") {
        more.replace("KUBECONFIG", &kubeconfig.display().to_string())
    } else {
        format!(
            "kubernetes: {{kubeconfig: {}}}\n{more}",
            kubeconfig.display()
        )
    };
    let file = crate::stack::configuration(dir.path(), &more);
    Stack::start_with(dir, &file)
}

/// What a request for that destination is told.
pub(crate) async fn told(stack: &Stack, to: &str) -> String {
    match stack.connect(to).await {
        Ok(_stream) => "200".to_owned(),
        Err(line) => line,
    }
}

/// Asks until it is told that.
pub(crate) async fn is_told(stack: &Stack, to: &str, wanted: &str) {
    let mut last = String::new();
    let asked = async {
        loop {
            last = told(stack, to).await;
            if last.contains(wanted) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let in_time = tokio::time::timeout(DEADLINE, asked).await;
    assert!(
        in_time.is_ok(),
        "{to}: {wanted:?} is never told, but {last:?}"
    );
}

pub(crate) async fn until_metric(stack: &Stack, name: &str, value: f64) {
    let read = async {
        while (stack.metric(name).await - value).abs() > f64::EPSILON {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(
        tokio::time::timeout(DEADLINE, read).await.is_ok(),
        "{name} is never {value}"
    );
}

pub(crate) const UNKNOWN: &str = "the destination is no node at the edge";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routes_appear_change_and_vanish_with_their_nodes() {
    let api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10", "one.site"]));
    api.put(node("cloud1", &json!({}), &json!({}), &["10.0.0.2"]));
    let mut stack = start(&api, "");
    let mut tasks = JoinSet::new();
    let port = shouter(&mut tasks).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;

    // Another name of the node leads to it, and bytes come back.
    is_told(&stack, &format!("one.site:{port}"), "200").await;
    let mut stream = stack.connect(&format!("one.site:{port}")).await.unwrap();
    stream.write_all(b"by another name").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "BY ANOTHER NAME");

    assert!(told(&stack, "cloud1:10250").await.contains(UNKNOWN));
    assert!(told(&stack, "10.0.0.2:10250").await.contains(UNKNOWN));
    assert!(told(&stack, "edge2:10250").await.contains(UNKNOWN));
    assert!(
        told(&stack, "192.168.1.10:1")
            .await
            .contains("403 node edge1: the agent's allow-list")
    );

    // Appear: at the edge by label, before its agent was ever seen. Its address is now that of two.
    api.put(edge("edge2", &["192.168.1.10", "192.168.1.11"]));
    is_told(&stack, "edge2:10250", "503 node edge2: no session").await;
    is_told(&stack, "192.168.1.11:10250", "503 node edge2: no session").await;
    is_told(
        &stack,
        "192.168.1.10:1",
        "409 address 192.168.1.10 is that of nodes edge1 and edge2",
    )
    .await;

    // Change: of address, of agent, of side.
    api.put(edge("edge2", &["192.168.1.12"]));
    is_told(&stack, "192.168.1.12:10250", "503 node edge2").await;
    is_told(&stack, "192.168.1.11:10250", UNKNOWN).await;
    is_told(
        &stack,
        "192.168.1.10:1",
        "403 node edge1: the agent's allow-list",
    )
    .await;
    api.put(node(
        "edge2",
        &json!({}),
        &json!({"corvid.io/agent": "edge1"}),
        &["10.9.0.7"],
    ));
    is_told(
        &stack,
        "edge2:10250",
        "403 node edge2 (agent edge1): the agent's allow-list",
    )
    .await;
    assert!(told(&stack, "edge2:10250").await.contains("10.9.0.7:10250"));
    api.put(node("edge2", &json!({}), &json!({}), &["10.9.0.7"]));
    is_told(&stack, "edge2:10250", UNKNOWN).await;

    // Vanish.
    api.put(edge("edge3", &["192.168.1.13"]));
    is_told(&stack, "edge3:10250", "503 node edge3").await;
    api.delete("edge3");
    is_told(&stack, "edge3:10250", UNKNOWN).await;
    is_told(&stack, "192.168.1.13:10250", UNKNOWN).await;
    assert_eq!(api.seen("list"), 1, "all of it came by the watch");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn configured_routes_go_first_then_annotations_then_pools_then_names() {
    let api = Api::start().await;
    let pool = json!({"alibabacloud.com/nodepool-id": "hz"});
    api.put(node("press", &pool, &json!({}), &["10.9.0.7"]));
    api.put(node(
        "lathe",
        &pool,
        &json!({"corvid.io/agent": "annotated"}),
        &["10.9.0.8"],
    ));
    api.put(node(
        "drill",
        &json!({"edge": "yes"}),
        &json!({}),
        &["10.9.0.9"],
    ));
    api.put(node(
        "saw",
        &json!({"edge": "yes"}),
        &json!({}),
        &["10.8.0.1"],
    ));
    let more = "kubernetes: {kubeconfig: KUBECONFIG, edgeSelector: edge=yes, pools: {hz: {agent: site-a}}}\n\
                routes: [{node: saw, agent: configured, addresses: [10.8.0.0/16]}]";
    let stack = start(&api, more);
    is_told(
        &stack,
        "press:1",
        "503 node press (agent site-a): no session",
    )
    .await;
    for (to, wanted) in [
        ("10.9.0.7:1", "503 node press (agent site-a)"),
        ("lathe:1", "503 node lathe (agent annotated)"),
        ("drill:1", "503 node drill: no session"),
        ("10.9.0.9:1", "503 node drill: no session"),
        ("saw:1", "503 node saw (agent configured)"),
        ("10.8.0.1:1", "503 node saw (agent configured)"),
    ] {
        let line = told(&stack, to).await;
        assert!(line.contains(wanted), "{to}: {line}");
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_route_is_lost_while_the_apiserver_is_away() {
    let mut api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.1"]));
    api.put(edge("edge2", &["192.168.1.2"]));
    let stack = start(&api, "");
    is_told(&stack, "edge1:1", "503 node edge1").await;
    let all_are_there = async || {
        for to in ["edge1:1", "192.168.1.1:1", "edge2:1", "192.168.1.2:1"] {
            let line = told(&stack, to).await;
            assert!(line.contains("503 node edge"), "{to}: {line}");
        }
    };
    // Refused connections, then errors of each kind, until several were seen; routes are there throughout.
    api.down().await;
    while stack.metric("corvid_cluster_failures_total").await < 3.0 {
        all_are_there().await;
    }
    api.mood(Mood::Status(500));
    api.up().await;
    for code in [500, 503, 429, 403, 401] {
        api.mood(Mood::Status(code));
        let before = stack.metric("corvid_cluster_failures_total").await;
        while stack.metric("corvid_cluster_failures_total").await < before + 1.0 {
            all_are_there().await;
        }
    }
    assert_eq!(
        stack.metric("corvid_cluster_synced").await,
        1.0,
        "it was, once"
    );
    // What happened meanwhile is caught up with.
    api.delete("edge2");
    api.put(edge("edge3", &["192.168.1.3"]));
    api.mood(Mood::Well);
    is_told(&stack, "edge3:1", "503 node edge3").await;
    is_told(&stack, "edge2:1", UNKNOWN).await;
    assert!(told(&stack, "edge1:1").await.contains("503 node edge1"));
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_410_all_is_read_anew_without_a_gap() {
    let mut api = Api::start().await;
    let names: Vec<_> = (0..1200).map(|i| format!("edge{i:04}")).collect();
    api.put_all(names.iter().map(|name| edge(name, &[])));
    let stack = start(&api, "");
    is_told(&stack, "edge1199:1", "503 node edge1199").await;
    assert_eq!(
        (api.seen("list"), api.seen("list+")),
        (1, 2),
        "pages of 500"
    );

    // In the watch: it is behind, and history is gone. One node goes and one comes unseen.
    api.down().await;
    api.delete("edge0000");
    api.put(edge("new", &[]));
    api.compact();
    api.mood(Mood::PagesGone);
    api.up().await;
    // The new list fails at its second page, again and again; nothing is lost by its half.
    while api.seen("list+") < 5 {
        for to in ["edge0000:1", "edge1199:1"] {
            let line = told(&stack, to).await;
            assert!(line.contains("503 node edge"), "{to}: {line}");
        }
    }
    api.mood(Mood::Well);
    is_told(&stack, "new:1", "503 node new").await;
    assert!(told(&stack, "edge0000:1").await.contains(UNKNOWN));

    // At the watch's start, as a plain status: resuming would fail for ever.
    let lists = api.seen("list");
    api.down().await;
    api.mood(Mood::Status(410));
    api.up().await;
    let failures = stack.metric("corvid_cluster_failures_total").await;
    while stack.metric("corvid_cluster_failures_total").await < failures + 1.0 {
        assert!(told(&stack, "new:1").await.contains("503 node new"));
    }
    api.put(edge("newer", &[]));
    api.mood(Mood::Well);
    is_told(&stack, "newer:1", "503 node newer").await;
    assert!(api.seen("list") > lists);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_watch_resumes_at_its_bookmark() {
    let mut api = Api::start().await;
    api.put(edge("edge1", &[]));
    let stack = start(&api, "");
    is_told(&stack, "edge1:1", "503 node edge1").await;
    // A change behind the bookmark shows that the bookmark has arrived.
    api.bookmark();
    api.put(edge("edge2", &[]));
    is_told(&stack, "edge2:1", "503 node edge2").await;
    api.compact();
    api.bookmark();
    let watches = api.seen("watch");
    api.down().await;
    api.up().await;
    api.put(edge("edge3", &[]));
    is_told(&stack, "edge3:1", "503 node edge3").await;
    assert!(api.seen("watch") > watches);
    assert_eq!(api.seen("list"), 1, "nothing was read anew");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_ends_each_watch_at_once_is_asked_ever_slower_and_followed_all_the_same() {
    const WATCHES: usize = 5;
    let api = Api::start().await;
    api.put(edge("edge1", &[]));
    api.mood(Mood::EndsWatches);
    let began = tokio::time::Instant::now();
    let stack = start(&api, "");
    eventually("watches", || api.seen("watch") >= WATCHES).await;
    // Pauses of at least 0.2, 0.4, 0.8 and 1.6 s are between them.
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(3), "{WATCHES} in {took:?}");
    api.put(edge("edge2", &[]));
    is_told(&stack, "edge2:1", "503 node edge2").await;
    assert_eq!(stack.metric("corvid_cluster_failures_total").await, 0.0);
    api.mood(Mood::Well);
    api.put(edge("edge3", &[]));
    is_told(&stack, "edge3:1", "503 node edge3").await;
    assert_eq!(api.seen("list"), 1, "nothing was read anew");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_is_ready_and_serves_before_the_first_sync() {
    let mut api = Api::start().await;
    api.down().await;
    api.put(edge("labelled", &[]));
    let mut stack = start(&api, "routes: [{node: configured}]");
    let mut tasks = JoinSet::new();
    let port = shouter(&mut tasks).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    until_metric(&stack, "corvid_cluster_synced", 0.0).await;
    let ready = daemon::admin::client::get(&stack.observe, "/readyz").await;
    assert!(
        ready.is_ok(),
        "kube-apiserver may wait for this server: {ready:?}"
    );
    is_told(&stack, &format!("edge1:{port}"), "200").await;
    assert!(
        told(&stack, "configured:1")
            .await
            .contains("503 node configured")
    );
    let line = told(&stack, "labelled:1").await;
    assert!(
        line.contains("the cluster's nodes are not known yet"),
        "{line}"
    );
    api.up().await;
    is_told(&stack, "labelled:1", "503 node labelled").await;
    until_metric(&stack, "corvid_cluster_synced", 1.0).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_shown_and_discovered() {
    let api = Api::start().await;
    let mut old = edge("edge2", &["192.168.1.2"]);
    old["metadata"]["labels"]["topology.kubernetes.io/region"] = json!("r1");
    old["status"]["conditions"][0]["status"] = json!("Unknown");
    old["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"] = json!(10350);
    api.put(old);
    api.put(edge("edge1", &["192.168.1.1"]));
    api.put(node("cloud1", &json!({}), &json!({}), &["10.0.0.2"]));
    api.put(node(
        "press",
        &json!({}),
        &json!({"corvid.io/agent": "edge1"}),
        &[],
    ));
    let mut stack = start(&api, "");
    stack.agent("edge1", "");
    stack.agent("site-a", "");
    stack.sessions("edge1", 1).await;
    stack.sessions("site-a", 1).await;
    is_told(&stack, "edge2:1", "503 node edge2").await;

    let body = daemon::admin::client::get(&stack.admin, "/nodes")
        .await
        .unwrap();
    let nodes: Vec<proxy_server::status::NodeStatus> = serde_json::from_slice(&body).unwrap();
    let shown: Vec<_> = nodes
        .iter()
        .map(|n| {
            format!(
                "{} {} {} {:?} {} {}",
                n.node, n.agent, n.edge, n.ready, n.session, n.source
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            "cloud1 cloud1 false Some(true) false cluster",
            "edge1 edge1 true Some(true) true cluster",
            "edge2 edge2 true Some(false) false cluster",
            "press edge1 true Some(true) true cluster",
            "site-a site-a true None true agent",
        ]
    );
    let table = proxy_server::status::node_table(&nodes);
    assert!(
        table.lines().nth(2).unwrap().contains("192.168.1.1"),
        "{table}"
    );

    let body = daemon::admin::client::get(&stack.admin, "/cluster")
        .await
        .unwrap();
    let cluster: proxy_server::status::ClusterStatus = serde_json::from_slice(&body).unwrap();
    assert_eq!((cluster.nodes, cluster.edge, cluster.ready), (4, 3, 3));
    let lines = cluster.lines();
    assert!(
        lines.starts_with("nodes: 4 known, 3 at the edge, 3 ready; kube-apiserver last answered "),
        "{lines}"
    );

    let request =
        format!("GET /sd/cadvisor HTTP/1.1\r\nHost: x\r\n{BASIC}\r\nConnection: close\r\n\r\n");
    let (line, body) = ask(&stack, &request).await;
    assert!(line.starts_with("HTTP/1.1 200"), "{line}");
    let groups: Value = serde_json::from_str(&body).unwrap();
    let targets: Vec<_> = groups
        .as_array()
        .unwrap()
        .iter()
        .map(|group| group["targets"][0].as_str().unwrap())
        .collect();
    assert_eq!(targets, ["edge1:10250", "edge2:10350", "press:10250"]);
    let wanted = json!({
        "__metrics_path__": "/metrics/cadvisor", "__scheme__": "https", "__meta_corvid_agent": "edge2", "__meta_corvid_session": "false",
        "__meta_corvid_ready": "false", "__meta_corvid_path": "tunnel", "node": "edge2", "pool": "hz", "region": "r1",
    });
    assert_eq!(groups[1]["labels"], wanted);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_connection_is_not_used_once_its_nodes_name_is_anothers() {
    let api = Api::start().await;
    api.put(edge("edge1", &["one.site"]));
    let mut stack = start(&api, "");
    let mut tasks = JoinSet::new();
    let port = exporter(&mut tasks).await;
    stack.agent("edge1", &allow(&[port]));
    stack.agent("edge2", "");
    for agent in ["edge1", "edge2"] {
        stack.sessions(agent, 1).await;
    }
    let request = format!(
        "GET http://one.site:{port}/metrics HTTP/1.1\r\nHost: x\r\n{BASIC}\r\nConnection: close\r\n\r\n"
    );
    is_told(&stack, &format!("one.site:{port}"), "200").await;
    let (line, kept) = ask(&stack, &request).await;
    assert!(line.starts_with("HTTP/1.1 200"), "{line}");
    assert_eq!(ask(&stack, &request).await, (line, kept));
    // The node is deleted, and another one is given its name in the site's DNS.
    api.delete("edge1");
    api.put(edge("edge2", &["one.site"]));
    is_told(&stack, "one.site:1", "403 node edge2").await;
    let (line, _) = ask(&stack, &request).await;
    assert!(
        line.starts_with("HTTP/1.1 403 node edge2: the agent's allow-list"),
        "{line}"
    );
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_nodes_are_read_and_all_are_found() {
    const NODES: usize = 10_000;
    let name = |i: usize| format!("edge{i:05}");
    let address = |i: usize| format!("10.{}.{}.{}", i >> 16, (i >> 8) & 255, i & 255);
    let api = Api::start().await;
    api.put_all((0..NODES).map(|i| edge(&name(i), &[&address(i)])));
    // The rest of this process, the API among it, is in these numbers too: the difference is the server's.
    let before = resident();
    let began = tokio::time::Instant::now();
    let stack = start(&api, "");
    is_told(
        &stack,
        &format!("{}:1", name(NODES - 1)),
        "503 node edge09999",
    )
    .await;
    let (took, after) = (began.elapsed(), resident());
    assert_eq!(
        stack.metric("corvid_cluster_nodes{kind=\"edge\"}").await,
        10_000.0
    );
    for i in (0..NODES).step_by(97) {
        let wanted = format!("503 node {}: no session", name(i));
        for to in [name(i), address(i)] {
            let line = told(&stack, &format!("{to}:10250")).await;
            assert!(line.contains(&wanted), "{to}: {line}");
        }
    }
    let began = tokio::time::Instant::now();
    api.put(edge("late", &["10.200.0.1"]));
    is_told(&stack, "10.200.0.1:1", "503 node late").await;
    println!(
        "{NODES} nodes: read after {took:?}, {} MiB more resident; one more is routed after {:?}",
        after.saturating_sub(before) >> 20,
        began.elapsed()
    );
    stack.stop().await;
}

/// Bytes of this process in memory.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<usize>()
        .unwrap()
        << 10
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_claims_an_impossible_port_hides_no_other() {
    let api = Api::start().await;
    // A kubelet writes its port itself, and kube-apiserver takes any number.
    let claiming = |name: &str, address: &str, port: i64| {
        let mut node = edge(name, &[address]);
        node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"] = json!(port);
        node
    };
    api.put(claiming("hostile1", "192.168.1.1", 70_000));
    api.put(edge("edge1", &["192.168.1.10"]));
    let stack = start(&api, "");
    is_told(&stack, "192.168.1.10:10250", "node edge1: no session").await;
    is_told(&stack, "192.168.1.1:10250", "node hostile1: no session").await;
    // Nor one that comes later.
    api.put(claiming("hostile2", "192.168.1.2", -1));
    api.put(edge("edge2", &["192.168.1.20"]));
    is_told(&stack, "192.168.1.20:10250", "node edge2: no session").await;
    is_told(&stack, "192.168.1.2:10250", "node hostile2: no session").await;
    assert_eq!(stack.metric("corvid_cluster_failures_total").await, 0.0);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agents_own_name_leads_to_it_whatever_a_kubelet_calls_itself() {
    let api = Api::start().await;
    let mut stack = start(&api, "");
    let mut tasks = JoinSet::new();
    let port = shouter(&mut tasks).await;
    // An edge outside the cluster, and a node of the cluster that takes its name; only the former lets anybody in.
    stack.agent("press", &allow(&[port]));
    stack.agent("edge1", "");
    stack.sessions("press", 1).await;
    stack.sessions("edge1", 1).await;
    is_told(&stack, &format!("press:{port}"), "200").await;
    api.put(edge("edge1", &["192.168.1.10", "press", "one.site"]));
    is_told(&stack, &format!("one.site:{port}"), "node edge1").await;
    assert_eq!(told(&stack, &format!("press:{port}")).await, "200");
    stack.stop().await;
}
