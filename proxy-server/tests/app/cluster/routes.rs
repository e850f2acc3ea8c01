//! Routes that nodes make: as they come, change and go, and which of several goes first.

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use super::{UNKNOWN, edge, is_told, node, start, told};
use crate::api::Api;
use crate::scrape::{BASIC, ask, exporter};
use crate::stack::{allow, shouter, within};

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
