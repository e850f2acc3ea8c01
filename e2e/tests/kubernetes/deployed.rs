//! Corvid by its own manifests: `kubectl apply -k`, its pods come up, kubectl reaches the edge through them, and goes on doing so
//! whatever is replaced, killed or renewed meanwhile.

mod line;
mod throughout;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{ADDRESS, Cluster, Deployed, NODES, Steps, WORKLOADS, pods, report, until};
use tokio::time::Instant;

use crate::logs::Followed;
use crate::{exec, forward, logs, metrics, reach, scrapers};

/// For what takes Kubernetes some rounds of its own.
const DEADLINE: Duration = Duration::from_secs(120);

#[test]
fn corvid_by_its_manifests_serves_kubectl_whatever_happens_to_it() {
    if !e2e::net::may_run() {
        return;
    }
    let _alone = crate::ALONE.lock();
    let start = Instant::now();
    let mut cluster = Cluster::whole().unwrap_or_else(|error| panic!("{error:#}"));
    report(&format!(
        "\n  the whole cluster stands after {:.1} s",
        start.elapsed().as_secs_f64()
    ));
    let mut steps = Steps::default();
    let up = steps.run("deployed_by_kubectl_apply", || {
        cluster.apply("default")?;
        come_up(&cluster)
    });
    if up {
        matrix(&mut steps, &cluster);
        throughout::everything_is_replaced(&mut steps, &mut cluster);
        by_egress(&mut steps, &mut cluster);
        line::beside_the_tunnel(&mut steps, &mut cluster);
    }
    steps.finish();
}

/// All pods are ready, and each edge has a session with each server.
fn come_up(cluster: &Cluster<Deployed>) -> Result<String> {
    let start = Instant::now();
    for workload in WORKLOADS {
        cluster.rolled_out(workload)?;
    }
    for node in NODES {
        reached(cluster, node)?;
    }
    Ok(format!(
        "kubectl reaches both edges after {:.1} s",
        start.elapsed().as_secs_f64()
    ))
}

/// Waits until kubectl gets through to a node's pod.
fn reached(cluster: &Cluster<Deployed>, node: &str) -> Result<()> {
    let args = ["exec", &pods::name(node), "-c", "tools", "--", "hostname"];
    until(DEADLINE, &format!("{node} is reached"), || {
        let said = String::from_utf8(cluster.kubectl().ok(&args)?)?;
        ensure!(said.trim() == pods::name(node), "{said}");
        Ok(())
    })
    .with_context(|| cluster.told())
}

fn matrix(steps: &mut Steps, cluster: &Cluster<Deployed>) {
    let followed = NODES.map(|node| Followed::start(cluster, node));
    steps.run("deployed_each_node_answers_for_itself", || {
        metrics::each_node_answers_for_itself(cluster)
    });
    steps.run("deployed_long_logs_arrive_whole", || {
        logs::long_logs(cluster)
    });
    steps.run("deployed_exec_hands_on_stdin_and_its_end", || {
        exec::stdin(cluster)
    });
    steps.run("deployed_exec_tells_exit_codes", || {
        exec::exit_codes(cluster)
    });
    steps.run("deployed_exec_has_a_terminal", || exec::terminal(cluster));
    steps.run("deployed_attach_hears_and_speaks", || exec::attach(cluster));
    steps.run("deployed_port_forward_carries_10_connections", || {
        forward::connections(cluster, 10)
    });
    steps.run("deployed_cp_copies_both_ways", || forward::copy(cluster));
    steps.run("deployed_kubectl_top_shows_the_edge", || {
        scrapers::top(cluster, &cluster.metrics_server()?)
    });
    steps.run(
        "deployed_followed_logs_miss_no_line",
        || -> Result<String> {
            let mut notes = Vec::new();
            for followed in followed {
                notes.push(followed?.finish(cluster)?);
            }
            Ok(notes.join(", "))
        },
    );
}

/// Both edges at one address: `default` refuses it and says what to do, `egress` tells them apart.
fn by_egress(steps: &mut Steps, cluster: &mut Cluster<Deployed>) {
    steps.run("deployed_a_shared_address_is_refused_by_default", || {
        for node in NODES {
            cluster.move_node(node, ADDRESS)?;
        }
        let log = [
            "-n",
            "corvid",
            "logs",
            "daemonset/proxy-server-control-plane",
            "-c",
            "redirect",
        ];
        until(DEADLINE, "the shared address is told of", || {
            let log = String::from_utf8(cluster.kubectl().ok(&log)?)?;
            let line = log.lines().rev().find(|line| line.contains("shared"));
            let line = line.with_context(|| log.clone())?.to_owned();
            ensure!(NODES.iter().all(|node| line.contains(node)), "{line}");
            Ok(line)
        })
    });
    let up = steps.run("deployed_egress_overlay_comes_up", || {
        // As the README says: the two run as different users, who can't share the host's addresses.
        cluster
            .kubectl()
            .ok(&["-n", "corvid", "delete", WORKLOADS[1]])?;
        cluster.apply("egress")?;
        for workload in WORKLOADS {
            cluster.rolled_out(workload)?;
        }
        let egress = cluster.sockets()?;
        cluster.start_apiserver(&egress)?;
        for node in NODES {
            reached(cluster, node)?;
        }
        Ok("both edges reached by name")
    });
    if !up {
        return;
    }
    steps.run("deployed_egress_each_node_answers_for_itself", || {
        metrics::each_node_answers_for_itself(cluster)
    });
    steps.run("deployed_egress_long_logs_arrive_whole", || {
        logs::long_logs(cluster)
    });
    steps.run("deployed_egress_exec_tells_exit_codes", || {
        exec::exit_codes(cluster)
    });
    steps.run("deployed_egress_exec_hands_on_stdin_and_its_end", || {
        exec::stdin(cluster)
    });
    steps.run("deployed_egress_cp_copies_both_ways", || {
        forward::copy(cluster)
    });
    steps.run(
        "deployed_egress_pods_are_reached_by_kube_apiservers_own_proxy",
        || reach::pod_proxy(cluster),
    );
    steps.run(
        "deployed_egress_port_forward_carries_10_connections",
        || forward::connections(cluster, 10),
    );
}
