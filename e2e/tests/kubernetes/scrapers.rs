//! What asks kubelets and exporters past kube-apiserver: Prometheus, and metrics-server for `kubectl top`.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, NODES, Prometheus, pods, until};
use e2e::process::Process;
use serde_json::Value;

/// Both start within seconds; metrics-server needs two rounds of 10 s for a rate.
const DEADLINE: Duration = Duration::from_secs(60);

/// The jobs of `deploy/prometheus`, and a series that each target of theirs has.
const JOBS: [(&str, &str); 3] = [
    ("edge-kubelet", "kubelet_node_name"),
    ("edge-cadvisor", "cadvisor_version_info"),
    ("edge-node-exporter", "node_uname_info"),
];

fn label<'a>(sample: &'a Value, name: &str) -> Option<&'a str> {
    sample.pointer(&format!("/metric/{name}"))?.as_str()
}

/// Prometheus finds both nodes by itself and scrapes kubelet, cadvisor and exporter of each.
pub(super) fn prometheus(cluster: &Cluster) -> Result<String> {
    let prometheus = cluster.prometheus()?;
    all_up(&prometheus)?;
    for (job, series) in JOBS {
        let samples = prometheus.query(series)?;
        for node in NODES {
            let found = samples.iter().find(|sample| {
                label(sample, "job") == Some(job) && label(sample, "node") == Some(node)
            });
            let found = found.with_context(|| format!("{series} of {node}: {samples:?}"))?;
            // What the kubelet says of itself: the targets are told apart by nothing but their names.
            let own = label(found, "exported_node");
            ensure!(job != "edge-kubelet" || own == Some(node), "{found}");
        }
    }
    Ok(format!("{} jobs of {} nodes", JOBS.len(), NODES.len()))
}

/// What a query gives for each target, in the order of jobs and nodes.
fn of_each(prometheus: &Prometheus, query: &str) -> Result<Vec<f64>> {
    let samples = prometheus.query(query)?;
    let targets = JOBS
        .iter()
        .flat_map(|(job, _)| NODES.map(|node| (*job, node)));
    let value = |(job, node)| {
        let of_it = |sample: &&Value| {
            label(sample, "job") == Some(job) && label(sample, "node") == Some(node)
        };
        let found = samples.iter().find(of_it);
        let value = found.and_then(|sample| sample.pointer("/value/1")?.as_str());
        let value = value.with_context(|| format!("{job} of {node}: {samples:?}"))?;
        Ok(value.parse()?)
    };
    targets.map(value).collect()
}

/// Waits until every target was scraped well.
pub(super) fn all_up(prometheus: &Prometheus) -> Result<()> {
    until(DEADLINE, "Prometheus scrapes all targets", || {
        let up = of_each(prometheus, "up")?;
        ensure!(up.iter().all(|up| *up == 1.0), "{up:?}");
        Ok(())
    })
    .with_context(|| prometheus.log())
}

/// Waits until every target was scraped some times more, and always well.
pub(super) fn all_up_from_now_on(prometheus: &Prometheus) -> Result<()> {
    let scraped = "timestamp(up)";
    let before = of_each(prometheus, scraped)?;
    until(DEADLINE, "Prometheus goes on", || {
        let now = of_each(prometheus, scraped)?;
        let on = now
            .iter()
            .zip(&before)
            .all(|(now, before)| now - before >= 4.0);
        ensure!(on, "{now:?} after {before:?}");
        Ok(())
    })?;
    let worst = of_each(prometheus, "min_over_time(up[4s])")?;
    ensure!(worst.iter().all(|up| *up == 1.0), "{worst:?}");
    Ok(())
}

/// `kubectl top` shows rows of nodes and pods at the edge.
pub(super) fn top<T>(cluster: &Cluster<T>, metrics_server: &Process) -> Result<String> {
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
