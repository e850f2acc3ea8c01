//! What asks kubelets past kube-apiserver: metrics-server, for `kubectl top`.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, NODES, pods, until};

/// metrics-server starts within seconds and needs two rounds of 10 s for a rate.
const DEADLINE: Duration = Duration::from_secs(120);

/// `kubectl top` shows rows of nodes and pods at the edge.
pub(super) fn top(cluster: &Cluster) -> Result<String> {
    let metrics_server = cluster.metrics_server()?;
    let rows = |what: &str, names: &[String]| -> Result<String> {
        let text = cluster.kubectl().ok(&["top", what, "--no-headers"])?;
        let text = String::from_utf8(text)?;
        for name in names {
            let row = text.lines().find(|row| row.split(' ').next() == Some(name));
            let row = row.with_context(|| format!("no {name} in {text:?}"))?;
            let memory = row.split_whitespace().find(|word| word.ends_with("Mi"));
            ensure!(memory.is_some_and(|word| word != "0Mi"), "{row}");
        }
        Ok(text)
    };
    until(DEADLINE, "kubectl top shows all rows", || {
        let nodes = rows("node", &NODES.map(str::to_owned))?;
        rows("pod", &NODES.map(pods::name))?;
        Ok(nodes.lines().next().unwrap_or_default().to_owned())
    })
    .with_context(|| {
        let service = ["get", "apiservice", "v1beta1.metrics.k8s.io", "-o=yaml"];
        let service = cluster.kubectl().ok(&service).unwrap_or_default();
        let log = metrics_server.log();
        format!(
            "{}\nmetrics-server says:\n{log}",
            String::from_utf8_lossy(&service)
        )
    })
}
