//! Scrapes over kept connections follow what is said of their node's path.

use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::api::Api;
use crate::cluster::{edge, start};
use crate::line::{LINE, QUICK, route};
use crate::scrape::{BASIC, ask, exporter_on};
use crate::stack::{DEADLINE, Stack, allow};

/// Two exporters at one port: where the tunnel leads, and on the line.
async fn exporters(tasks: &mut JoinSet<()>) -> u16 {
    for _ in 0..50 {
        let by_tunnel = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = by_tunnel.local_addr().unwrap().port();
        let Ok(by_line) = TcpListener::bind(("127.0.0.9", port)).await else {
            continue;
        };
        exporter_on(tasks, by_tunnel, |number, _| format!("tunnel {number}"));
        exporter_on(tasks, by_line, |number, _| format!("line {number}"));
        return port;
    }
    panic!("no port is free at both");
}

async fn scrape(stack: &Stack, port: u16) -> String {
    let request = format!(
        "GET http://edge1:{port}/metrics HTTP/1.1\r\nHost: edge1:{port}\r\n{BASIC}\r\nConnection: close\r\n\r\n"
    );
    let (line, body) = ask(stack, &request).await;
    let body = body.rsplit("\r\n\r\n").next().unwrap_or_default();
    format!("{line} {body}")
}

/// Scrapes until that one answers.
async fn until(stack: &Stack, port: u16, who: &str) -> String {
    let scraped = async {
        loop {
            let said = scrape(stack, port).await;
            if said.starts_with(&format!("HTTP/1.1 200 OK {who} ")) {
                return said;
            }
        }
    };
    tokio::time::timeout(DEADLINE, scraped).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scrapes_over_kept_connections_go_by_the_line_as_soon_as_they_may() {
    let mut tasks = JoinSet::new();
    let port = exporters(&mut tasks).await;
    let api = Api::start().await;
    let annotated = |path: &str| {
        let mut node = edge("edge1", &["192.168.1.10"]);
        node["metadata"]["annotations"] = json!({"corvid.io/path": path});
        node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"] = json!(port);
        node
    };
    api.put(annotated("tunnel"));
    let more = format!(
        "kubernetes: {{kubeconfig: KUBECONFIG}}\n{LINE}{QUICK}routes: [{}]",
        route("edge1", "127.0.0.9")
    );
    let mut stack = start(&api, &more);
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    // One connection through the tunnel, that is kept.
    let first = until(&stack, port, "tunnel").await;
    assert_eq!(scrape(&stack, port).await, first);
    for path in ["auto", "direct"] {
        api.put(annotated(path));
        let by_line = until(&stack, port, "line").await;
        assert_ne!(scrape(&stack, port).await, by_line, "each by a new one");
        api.put(annotated("tunnel"));
        until(&stack, port, "tunnel").await;
    }
    stack.stop().await;
}
