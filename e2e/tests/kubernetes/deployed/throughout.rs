//! Everything is replaced, killed, added, deleted or renewed once, while requests go on.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{
    Cluster, Deployed, Egress, LATE, NODES, Prober, Probes, Running, Steps, WORKLOADS, pods, until,
};
use serde_json::Value;
use tokio::time::Instant;

use super::{DEADLINE, reached};
use crate::logs::{self, Followed};

/// Of all requests, this many are answered right.
const SHARE: f64 = 0.999;
/// What a program may have gained after all of it: caches that fill once, pools of the allocator.
const GROWTH: f64 = 1.3;
/// An agent that lands at the same server again and again pauses between its dials, ever longer.
const PATIENCE: Duration = Duration::from_secs(240);
/// Where an agent's and a server's metrics are, and what each is called.
const PROGRAMS: [(&str, u16); 2] = [("edge-agent", 9441), ("proxy-server", 9440)];
const RESIDENT: &str = "corvid_process_resident_memory_bytes";

/// One request each 100 ms while everything is replaced once.
pub(super) fn everything_is_replaced(steps: &mut Steps, cluster: &mut Cluster<Deployed>) {
    let mut before = None;
    steps.run("deployed_memory_before", || {
        let memory = memory(cluster)?;
        let shown = format!("{memory:.1?} MiB");
        before = Some(memory);
        Ok(shown)
    });
    let mut prober = None;
    steps.run("deployed_requests_begin", || {
        prober = Some(cluster.prober()?);
        Ok("one each 100 ms")
    });
    let Some(prober) = prober else { return };
    let mut during =
        |name: &str,
         cluster: &mut Cluster<Deployed>,
         step: &mut dyn FnMut(&mut Cluster<Deployed>) -> Result<String>| {
            steps.run(name, || {
                let earlier = prober.so_far();
                let note = step(cluster)?;
                Ok(format!("{note}; {}", since(&earlier, &prober)))
            });
        };
    for workload in WORKLOADS {
        let name = format!("deployed_restart_of_{}", workload.replace(['/', '-'], "_"));
        during(&name, cluster, &mut |cluster| restarted(cluster, workload));
    }
    during("deployed_a_killed_server", cluster, &mut killed_server);
    during("deployed_a_node_is_added", cluster, &mut added_node);
    during("deployed_a_node_is_deleted", cluster, &mut deleted_node);
    during(
        "deployed_an_edge_pod_is_made_anew",
        cluster,
        &mut recreated_pod,
    );
    during(
        "deployed_kube_apiserver_is_restarted",
        cluster,
        &mut restarted_apiserver,
    );
    during("deployed_the_authority_is_rotated", cluster, &mut rotated);
    steps.run("deployed_requests_were_answered_throughout", || {
        let probes = prober.finish()?;
        let all = probes.right + probes.wrong.len();
        // Rounded up: what is on its way through a server that is killed can't be answered.
        let most = (all as f64 * (1.0 - SHARE)).ceil();
        ensure!(
            probes.wrong.len() as f64 <= most,
            "{probes}: {:#?}",
            probes.wrong
        );
        Ok(probes.to_string())
    });
    steps.run("deployed_nothing_has_grown", || {
        let before = before.context("it is not known what it was before")?;
        let after = memory(cluster)?;
        for ((name, was), (_, is)) in before.iter().zip(&after) {
            ensure!(
                *is <= was * GROWTH,
                "{name}: {was:.1} MiB, then {is:.1} MiB"
            );
        }
        Ok(format!("{after:.1?} MiB"))
    });
}

/// What was not answered right in the meantime.
fn since(earlier: &Probes, prober: &Prober) -> String {
    let now = prober.so_far();
    let news = now.wrong.get(earlier.wrong.len()..).unwrap_or_default();
    let right = now.right - earlier.right;
    format!("{right} requests right, {} not {news:?}", news.len())
}

/// The most that a program of each kind has, in MiB.
fn memory(cluster: &Cluster<Deployed>) -> Result<Vec<(&'static str, f64)>> {
    let mut all = Vec::new();
    for (app, port) in PROGRAMS {
        let values = cluster.gauges(app, port, RESIDENT)?;
        let most = values.into_iter().fold(0.0, f64::max);
        all.push((app, most / f64::from(1 << 20)));
    }
    Ok(all)
}

/// An exec that counts for some seconds and ends, and one that goes on for ever.
struct Runs {
    short: Running,
    long: Running,
    followed: Followed,
}

const SHORT: u64 = 12;

impl Runs {
    fn start(cluster: &Cluster<Deployed>, node: &'static str) -> Result<Self> {
        let run = |script: &str| {
            let args = [
                "exec",
                &pods::name(node),
                "-c",
                "tools",
                "--",
                "sh",
                "-c",
                script,
            ];
            cluster.kubectl().start(&args)
        };
        let short = run(&format!(
            "i=0; while [ $i -lt {SHORT} ]; do echo line $i; i=$((i+1)); sleep 1; done; echo the end; exit 3"
        ))?;
        let long = run("i=0; while :; do echo line $i; i=$((i+1)); sleep 1; done")?;
        let followed = Followed::start(cluster, node)?;
        short.wait_for("line 0\n", DEADLINE)?;
        long.wait_for("line 0\n", DEADLINE)?;
        until(DEADLINE, "the log flows", || {
            ensure!(followed.count()? > 0, "nothing yet");
            Ok(())
        })?;
        Ok(Self {
            short,
            long,
            followed,
        })
    }

    /// What was short has ended by itself, whole; what goes on for ever goes on, or was ended with an error.
    fn judge(mut self) -> Result<String> {
        let status = self.short.wait(DEADLINE)?;
        let text = self.short.text();
        let whole = (0..SHORT)
            .map(|i| format!("line {i}\n"))
            .collect::<String>()
            + "the end\n";
        ensure!(
            status.code() == Some(3) && text == whole,
            "what ends within the drain: {status}, {text:?}, {}",
            self.short.errors()
        );
        let long = match self.long.wait(Duration::ZERO) {
            Err(_runs) => "exec goes on".to_owned(),
            Ok(status) if status.success() => {
                bail!("exec ended with {status}, as if all were well")
            }
            Ok(status) => format!("exec: {status}"),
        };
        // Whatever it has shown is without a gap.
        let lines = self.followed.count()?;
        Ok(format!("{long}, {lines} lines followed"))
    }
}

fn restarted(cluster: &mut Cluster<Deployed>, workload: &str) -> Result<String> {
    let runs = Runs::start(cluster, "edge1")?;
    let start = Instant::now();
    cluster
        .kubectl()
        .ok(&["-n", "corvid", "rollout", "restart", workload])?;
    cluster.rolled_out(workload)?;
    let seconds = start.elapsed().as_secs_f64();
    let judged = runs.judge()?;
    for node in NODES {
        reached(cluster, node)?;
    }
    Ok(format!("in {seconds:.0} s; {judged}"))
}

/// Waits until each edge has a session with each server: which one a dial lands at is kube-proxy's choice.
fn doubly_connected(cluster: &Cluster<Deployed>) -> Result<()> {
    until(PATIENCE, "each edge has a session with each server", || {
        for (pod, _) in cluster.pods_of("proxy-server", ".status.podIP")? {
            let status = [
                "-n",
                "corvid",
                "exec",
                &pod,
                "--",
                "/bin/proxy-server",
                "status",
                "--json",
            ];
            let sessions: Value = serde_json::from_slice(&cluster.kubectl().ok(&status)?)?;
            let sessions = sessions.as_array().context("no list of sessions")?;
            let agents = sessions
                .iter()
                .filter_map(|session| session.get("agent")?.as_str());
            let agents = agents.collect::<Vec<_>>();
            ensure!(
                NODES.iter().all(|node| agents.contains(node)),
                "{pod}: {agents:?}"
            );
        }
        Ok(())
    })
}

fn killed_server(cluster: &mut Cluster<Deployed>) -> Result<String> {
    doubly_connected(cluster)?;
    let servers = cluster.pods_of("proxy-server", ".status.podIP")?;
    let (pod, _) = servers.first().context("no server")?;
    cluster.kill(pod)?;
    for node in NODES {
        reached(cluster, node)?;
    }
    let restarts = [
        "-n",
        "corvid",
        "get",
        "pod",
        pod,
        "-o",
        "jsonpath={.status.containerStatuses[0].restartCount}",
    ];
    until(DEADLINE, "Kubernetes has started it again", || {
        let count = String::from_utf8(cluster.kubectl().ok(&restarts)?)?;
        ensure!(count == "1", "{count}");
        Ok(())
    })?;
    cluster.rolled_out("deployment/proxy-server")?;
    Ok(pod.clone())
}

fn added_node(cluster: &mut Cluster<Deployed>) -> Result<String> {
    cluster.add_node()?;
    cluster.rolled_out("daemonset/edge-agent")?;
    reached(cluster, LATE)?;
    Ok(format!("{LATE} is reached"))
}

/// What `proxy-server nodes` says of a node, if it knows it.
fn known(cluster: &Cluster<Deployed>, name: &str) -> Result<Option<Value>> {
    let nodes: Value = serde_json::from_str(&cluster.server(&["nodes", "--json"])?)?;
    let nodes = nodes.as_array().context("no list of nodes")?;
    Ok(nodes
        .iter()
        .find(|node| node.get("node").and_then(Value::as_str) == Some(name))
        .cloned())
}

fn deleted_node(cluster: &mut Cluster<Deployed>) -> Result<String> {
    ensure!(known(cluster, LATE)?.is_some(), "{LATE} was not known");
    cluster.delete_node()?;
    until(DEADLINE, "its sessions are closed", || {
        let sessions: Value = serde_json::from_str(&cluster.server(&["status", "--json"])?)?;
        let sessions = sessions.as_array().context("no list of sessions")?.clone();
        let its = sessions
            .iter()
            .any(|session| session.get("agent").and_then(Value::as_str) == Some(LATE));
        ensure!(!its, "{sessions:?}");
        // Who looks for it still reads that its agent was there.
        let node = known(cluster, LATE)?.context("its agent is forgotten")?;
        ensure!(
            node.get("source").and_then(Value::as_str) == Some("agent"),
            "{node}"
        );
        Ok(())
    })?;
    Ok(format!("{LATE} is gone, and its sessions"))
}

fn recreated_pod(cluster: &mut Cluster<Deployed>) -> Result<String> {
    let pod = pods::name("edge1");
    cluster.kubectl().ok(&["delete", "pod", &pod])?;
    cluster.create(&pods::pod("edge1"))?;
    cluster.wait_ready(&pod)?;
    reached(cluster, "edge1")?;
    logs::long_logs(cluster)
}

fn restarted_apiserver(cluster: &mut Cluster<Deployed>) -> Result<String> {
    cluster.start_apiserver(&Egress::Addresses)?;
    for node in NODES {
        reached(cluster, node)?;
    }
    Ok("reached again".to_owned())
}

fn rotated(cluster: &mut Cluster<Deployed>) -> Result<String> {
    let runs = Runs::start(cluster, "edge2")?;
    let said = cluster.server(&["ca", "rotate", "--config", "/etc/corvid/proxy-server.yaml"])?;
    let pin = said.lines().find_map(|line| line.strip_prefix("caPin:"));
    let pin = pin.context(said.clone())?.trim().to_owned();
    let annotation = "jsonpath={.metadata.annotations.corvid\\.io/ca-pin}";
    let get = [
        "-n",
        "corvid",
        "get",
        "configmap",
        "corvid-trust",
        "-o",
        annotation,
    ];
    until(DEADLINE, "the new root is where agents look", || {
        let now = String::from_utf8(cluster.kubectl().ok(&get)?)?;
        ensure!(now == pin, "{now}");
        Ok(())
    })?;
    let judged = runs.judge()?;
    ensure!(
        judged.contains("goes on"),
        "a rotation ends nothing: {judged}"
    );
    // Who enrols now does so with the new authority.
    cluster
        .kubectl()
        .ok(&["-n", "corvid", "rollout", "restart", "daemonset/edge-agent"])?;
    cluster.rolled_out("daemonset/edge-agent")?;
    for node in NODES {
        reached(cluster, node)?;
    }
    Ok(judged)
}
