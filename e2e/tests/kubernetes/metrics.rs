//! What kube-apiserver fetches from a kubelet by plain requests: metrics and lists of pods.

use std::thread;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, NODES, pods};
use serde_json::Value;

use crate::forward::panicked;

fn raw<T>(cluster: &Cluster<T>, node: &str, path: &str) -> Result<String> {
    let path = format!("/api/v1/nodes/{node}/proxy/{path}");
    Ok(String::from_utf8(
        cluster.kubectl().ok(&["get", "--raw", &path])?,
    )?)
}

/// Asks each node what only it can know. Both are at one address: only the name in the request tells them apart.
pub(super) fn each_node_answers_for_itself<T>(cluster: &Cluster<T>) -> Result<String> {
    for node in NODES {
        let list: Value = serde_json::from_str(&raw(cluster, node, "pods")?)?;
        let items = list
            .get("items")
            .and_then(Value::as_array)
            .context("no list of pods")?;
        let names = items
            .iter()
            .filter_map(|pod| pod.pointer("/metadata/name").and_then(Value::as_str))
            .filter(|name| name.starts_with("box-"));
        ensure!(names.eq([pods::name(node).as_str()]), "{node} runs {list}");
        let metrics = raw(cluster, node, "metrics")?;
        let own = format!("kubelet_node_name{{node=\"{node}\"}} 1");
        ensure!(
            metrics.lines().any(|line| line == own),
            "no {own} in what {node} says"
        );
        let line = cluster
            .kubectl()
            .ok(&["logs", &pods::name(node), "-c", "book", "--tail=1"])?;
        let line = String::from_utf8(line)?;
        ensure!(line.split(' ').nth(1) == Some(node), "{node} logs {line}");
    }
    Ok("pods, metrics and logs".to_owned())
}

/// Fetches cadvisor's metrics of a node and looks at their beginning, middle and end.
fn cadvisor_of<T>(cluster: &Cluster<T>, node: &str) -> Result<usize> {
    let text = raw(cluster, node, "metrics/cadvisor")?;
    for name in [
        "cadvisor_version_info{",
        "container_cpu_usage_seconds_total{",
        "machine_cpu_cores{",
    ] {
        ensure!(
            text.lines().any(|line| line.starts_with(name)),
            "{node} has no {name}: {text}"
        );
    }
    let last = text.lines().next_back().unwrap_or_default();
    ensure!(
        text.ends_with('\n') && !last.starts_with('#'),
        "{node} ends with {last:?}"
    );
    Ok(text.len())
}

pub(super) fn cadvisor<T>(cluster: &Cluster<T>) -> Result<String> {
    let mut notes = Vec::new();
    for node in NODES {
        notes.push(format!("{node} {} bytes", cadvisor_of(cluster, node)?));
    }
    Ok(notes.join(", "))
}

pub(super) fn twenty_at_once<T: Sync>(cluster: &Cluster<T>) -> Result<String> {
    thread::scope(|scope| {
        let nodes = NODES.iter().cycle().take(20);
        let threads = nodes.map(|node| scope.spawn(move || cadvisor_of(cluster, node)));
        let threads = threads.collect::<Vec<_>>();
        let mut bytes = 0;
        for thread in threads {
            bytes += thread.join().map_err(panicked)??;
        }
        Ok(format!("{bytes} bytes in all"))
    })
}
