//! Nodes of a cluster, from an emulated Kubernetes API: routes come and go with them, and stay while it is away.

mod routes;
mod shown;
mod watch;

use std::time::Duration;

use serde_json::{Value, json};

use crate::api::Api;
use crate::stack::{DEADLINE, Stack};

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
