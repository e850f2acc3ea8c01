//! The overlay `dedicated-line`: both edges by lines of their own, with the tunnel beside them, and each without the other.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{Cluster, Deployed, LINES, NODES, Running, Steps, WORKLOADS, pods, until};
use tokio::time::Instant;

use super::DEADLINE;
use crate::logs::Followed;
use crate::{events, exec, logs, matrix, metrics};

/// Shorter than what is shipped: a run has minutes.
const SHORT: &str = "{silence: 10s, stable: 5s, probes: {interval: 2s, tls: true}}";
/// What runs over a line that went silent is reset after `silence`, and a second at most.
const RESET: Duration = Duration::from_secs(40);
/// For a new request after the line was cut, beside everything else that runs; the figure is told.
const FAILED_OVER: Duration = Duration::from_secs(20);

pub(super) fn beside_the_tunnel(steps: &mut Steps, cluster: &mut Cluster<Deployed>) {
    let up = steps.run("line_overlay_comes_up", || come_up(cluster));
    if !up {
        return;
    }
    let blocked = steps.run("line_serves_with_the_tunnel_blocked", || {
        cluster.block_tunnel(true)?;
        without_sessions(cluster)
    });
    if blocked {
        matrix("line", steps, cluster);
    }
    steps.run("line_annotation_acts_at_once_and_cuts_nothing", || {
        annotated(cluster)
    });
    steps.run("line_and_tunnel_are_both_there", || {
        cluster.block_tunnel(false)?;
        sessions(cluster, true)
    });
    steps.run("line_cut_under_what_runs", || cut(cluster));
    matrix("line_cut", steps, cluster);
    steps.run("line_is_taken_again", || {
        cluster.cut_lines(false)?;
        let by_line = by_line(cluster)?;
        has_events(cluster, "LineUp")?;
        Ok(by_line)
    });
    steps.run("line_needs_no_agent", || without_agents(cluster));
}

/// The lines, and the overlay with what a user edits.
fn come_up(cluster: &mut Cluster<Deployed>) -> Result<String> {
    cluster.lay_lines()?;
    for file in ["proxy-server.yaml", "control-plane.yaml"] {
        let file = format!("overlays/dedicated-line/{file}");
        cluster.edit(&file, "192.0.2.0/24", LINES)?;
        cluster.edit(&file, "lines:\n", &format!("path: {SHORT}\nlines:\n"))?;
    }
    // Sessions without their agents are over soon.
    cluster.edit(
        "overlays/dedicated-line/proxy-server.yaml",
        "lines:\n",
        "backend: {idleTimeout: 15s}\nlines:\n",
    )?;
    cluster.apply("dedicated-line")?;
    let restart = ["-n", "corvid", "rollout", "restart"];
    cluster
        .kubectl()
        .ok(&[&restart[..], &WORKLOADS[..2]].concat())?;
    for workload in WORKLOADS {
        cluster.rolled_out(workload)?;
    }
    by_line(cluster)
}

/// Waits until both are reached by their lines.
fn by_line(cluster: &Cluster<Deployed>) -> Result<String> {
    let start = Instant::now();
    until(DEADLINE, "both nodes are reached by line", || {
        for node in NODES {
            let next = cluster.explained(node)?;
            ensure!(next.starts_with("goes by line express"), "{node}: {next}");
        }
        Ok(())
    })
    .with_context(|| cluster.told())?;
    logs::one_line_of_each(cluster)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(format!("by line after {seconds:.1} s"))
}

/// Waits until both agents have a session with a server, or none has one with any.
fn sessions(cluster: &Cluster<Deployed>, wanted: bool) -> Result<String> {
    until(DEADLINE, "sessions", || {
        let nodes = cluster.server(&["nodes", "--json"])?;
        let nodes: serde_json::Value = serde_json::from_str(&nodes)?;
        for node in nodes.as_array().context("no list of nodes")? {
            let name = node.get("node").and_then(serde_json::Value::as_str);
            if NODES.iter().any(|ours| Some(*ours) == name) {
                ensure!(node.get("session") == Some(&wanted.into()), "{node}");
            }
        }
        Ok(())
    })?;
    Ok(format!("sessions: {wanted}"))
}

fn without_sessions(cluster: &Cluster<Deployed>) -> Result<String> {
    let said = sessions(cluster, false)?;
    logs::one_line_of_each(cluster)?;
    Ok(said)
}

/// `corvid.io/path=tunnel` where there is no tunnel: what is new is refused, what runs goes on; without it all is well again.
fn annotated(cluster: &Cluster<Deployed>) -> Result<String> {
    let followed = Followed::start(cluster, "edge1")?;
    flows(&followed)?;
    let annotate = |value| cluster.kubectl().ok(&["annotate", "node", "edge1", value]);
    // Not by a connection that kube-apiserver keeps, as its requests for logs.
    let pod = pods::name("edge1");
    let one = ["exec", &pod, "-c", "tools", "--", "true"];
    annotate("corvid.io/path=tunnel")?;
    let start = Instant::now();
    let refused = until(
        DEADLINE,
        "it goes by the tunnel, which is not there",
        || cluster.kubectl().fails(&one),
    )?;
    let took = start.elapsed().as_secs_f64();
    ensure!(refused.contains("no session"), "{refused}");
    flows(&followed).context("what ran by the line")?;
    annotate("corvid.io/path-")?;
    until(DEADLINE, "it goes by the line again", || {
        cluster.kubectl().ok(&one)
    })?;
    flows(&followed).context("what ran by the line")?;
    Ok(format!("after {took:.1} s: {}", refused.trim()))
}

/// Ten more lines come.
fn flows(followed: &Followed) -> Result<()> {
    let before = followed.count()?;
    until(DEADLINE, "ten more lines", || {
        let now = followed.count()?;
        ensure!(now >= before + 10, "{now} after {before}");
        Ok(())
    })
}

/// What goes on for ever on a node, one of each kind.
fn running(cluster: &Cluster<Deployed>, node: &'static str) -> Result<Vec<(String, Running)>> {
    let pod = pods::name(node);
    let count = "i=0; while :; do echo line $i; i=$((i+1)); usleep 200000; done";
    let kinds: [(&str, &[&str], &str); 3] = [
        (
            "exec",
            &["exec", &pod, "-c", "tools", "--", "sh", "-c", count],
            "line 3\n",
        ),
        (
            "exec -i",
            &["exec", "-i", &pod, "-c", "tools", "--", "cat"],
            "",
        ),
        ("logs -f", &["logs", "-f", &pod, "-c", "ticker"], "\n"),
    ];
    let mut all = Vec::new();
    for (kind, args, first) in kinds {
        let mut kubectl = cluster.kubectl().start(args)?;
        if first.is_empty() {
            kubectl.write(b"heard\n")?;
            kubectl.wait_for("heard\n", DEADLINE)?;
        } else {
            kubectl.wait_for(first, DEADLINE)?;
        }
        all.push((format!("{kind} on {node}"), kubectl));
    }
    Ok(all)
}

/// New requests go by the tunnel; what ran by the line ends, and never as if all were well.
fn cut(cluster: &Cluster<Deployed>) -> Result<String> {
    by_line(cluster)?;
    let mut runs = Vec::new();
    for node in NODES {
        runs.extend(running(cluster, node)?);
    }
    cluster.cut_lines(true)?;
    let start = Instant::now();
    // What kube-apiserver asks by the connections that it keeps waits for their end; what opens one does not.
    for node in NODES {
        let args = ["exec", &pods::name(node), "-c", "tools", "--", "hostname"];
        until(FAILED_OVER, "a new request is answered", || {
            let said = String::from_utf8(cluster.kubectl().ok(&args)?)?;
            ensure!(said.trim() == pods::name(node), "{said}");
            Ok(())
        })?;
    }
    let answered = start.elapsed().as_secs_f64();
    for (what, kubectl) in &mut runs {
        let status = kubectl.wait(RESET).with_context(|| what.clone())?;
        // `kubectl logs -f` ends with 0 and a word, whatever it was that ended it.
        if status.success() && !what.starts_with("logs") {
            bail!("{what} ended as if all were well: {}", kubectl.errors());
        }
    }
    let ended = start.elapsed().as_secs_f64();
    has_events(cluster, "LineDown")?;
    Ok(format!(
        "both answered again after {answered:.1} s; all {} ended after {ended:.1} s",
        runs.len()
    ))
}

/// Waits until both Nodes have an Event of ours with that reason.
fn has_events(cluster: &Cluster<Deployed>, reason: &str) -> Result<()> {
    until(DEADLINE, &format!("both nodes have {reason}"), || {
        for node in NODES {
            let there = events::on_node(cluster, node, reason)?;
            ensure!(!there.is_empty(), "{node} has none");
        }
        Ok(())
    })
    .with_context(|| cluster.told())
}

/// Without any agent in the cluster the lines lead to the nodes all the same.
fn without_agents(cluster: &Cluster<Deployed>) -> Result<String> {
    cluster
        .kubectl()
        .ok(&["-n", "corvid", "delete", WORKLOADS[2], "--wait"])?;
    sessions(cluster, false)?;
    metrics::each_node_answers_for_itself(cluster)?;
    exec::exit_codes(cluster)
}
