//! Nodes as `proxy-server` shows them and as Prometheus discovers them.

use serde_json::{Value, json};

use super::{edge, is_told, node, start};
use crate::api::Api;
use crate::scrape::{BASIC, ask};

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
