//! What the servers tell of nodes in Events, as kubectl sees it.

use anyhow::{Context as _, Result};
use e2e::cluster::Cluster;
use serde_json::Value;

/// The Events of ours on that node that have that reason.
pub(super) fn on_node<T>(cluster: &Cluster<T>, node: &str, reason: &str) -> Result<Vec<Value>> {
    let get = ["get", "events.events.k8s.io", "-n", "default", "-o", "json"];
    let all: Value = serde_json::from_slice(&cluster.kubectl().ok(&get)?)?;
    let all = all.pointer("/items").and_then(Value::as_array);
    let is_wanted = |event: &&Value| {
        let said = |pointer| event.pointer(pointer).and_then(Value::as_str);
        said("/reportingController") == Some("corvid.io/proxy-server")
            && said("/regarding/name") == Some(node)
            && said("/reason") == Some(reason)
    };
    let all = all.context("no list of Events")?;
    Ok(all.iter().filter(is_wanted).cloned().collect())
}
