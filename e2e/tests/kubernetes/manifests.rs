//! What `kubectl apply -k` sends is what the real kube-apiserver takes: all of it validated and admitted, nothing stored.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::Cluster;
use e2e::manifests::{Overlay, overlays, text};
use serde_json::{Value, json};

/// Of the Prometheus operator, which this cluster has not.
const FOREIGN: &str = "monitoring.coreos.com/";

/// Has kube-apiserver look at objects as if they were applied; warnings are returned.
fn looked_at(cluster: &Cluster, objects: &[&Value]) -> Result<String> {
    let file = cluster.dir().join("dry-run.json");
    let all = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    fs::write(&file, all.to_string())?;
    let file = file.to_str().context("a strange folder")?;
    let args = [
        "apply",
        "--server-side",
        // Not as kubectl itself, by whom some of it is there already.
        "--field-manager=test",
        "--force-conflicts",
        "--dry-run=server",
        "--validate=strict",
        "-f",
        file,
    ];
    let output = cluster.kubectl().output(&args)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{said}");
    Ok(said)
}

/// Every overlay is accepted without a warning; one with a mistake is not.
pub(super) fn accepted(cluster: &Cluster) -> Result<String> {
    let mut notes = Vec::new();
    for name in overlays()? {
        let overlay = Overlay::build(&name)?;
        let ours = |object: &&Value| !text(object, "/apiVersion").starts_with(FOREIGN);
        let objects: Vec<_> = overlay.objects.iter().filter(ours).collect();
        let said = looked_at(cluster, &objects).with_context(|| name.clone())?;
        ensure!(said.is_empty(), "{name}: {said}");
        notes.push(format!("{name} {}", objects.len()));
    }
    let overlay = Overlay::build("default")?;
    let mut wrong = overlay.object("DaemonSet", "edge-agent")?.clone();
    let container = wrong.pointer_mut("/spec/template/spec/containers/0");
    container.context("no container")?["resourcs"] = json!({});
    let refused = looked_at(cluster, &[&wrong]);
    ensure!(refused.is_err(), "a field that is none is accepted");
    Ok(format!("objects: {}", notes.join(", ")))
}
