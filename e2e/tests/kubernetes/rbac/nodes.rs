//! The nodes of the cluster; without them those of agents are all there is.

use anyhow::{Result, ensure};
use e2e::cluster::{Cluster, NODES, until};
use serde_json::json;

use super::{DEADLINE, forbidden, restart, told};

pub(super) fn no_node_is_known(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    let status = cluster.tunnel().wait_status(&forbidden("list", "nodes"))?;
    ensure!(status.starts_with("nodes: not known yet"), "{status}");
    let nodes = cluster.tunnel().nodes()?;
    ensure!(nodes.iter().all(|node| node.source == "agent"), "{nodes:?}");
    ensure!(cluster.tunnel().metric("corvid_cluster_synced")? == 0.0);
    told(cluster, mark, &forbidden("list", "nodes"))
}

pub(super) fn nodes_are_not_followed(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    let failures = cluster.tunnel().metric("corvid_cluster_failures_total")?;
    // All nodes are read anew before each try to watch them: they are known, and not followed.
    cluster.tunnel().wait_status(&forbidden("watch", "nodes"))?;
    cluster.tunnel().wait_node("edge1")?;
    until(DEADLINE, "failures are counted", || {
        let now = cluster.tunnel().metric("corvid_cluster_failures_total")?;
        ensure!(now > failures, "{now}");
        Ok(())
    })?;
    told(cluster, mark, &forbidden("watch", "nodes"))
}

/// Known and followed: a change is seen.
pub(super) fn nodes_are_known(cluster: &mut Cluster) -> Result<()> {
    for name in NODES {
        cluster.tunnel().wait_node(name)?;
    }
    until(DEADLINE, "nothing is complained of", || {
        let status = cluster.tunnel().status()?;
        ensure!(!status.contains("kube-apiserver: "), "{status}");
        Ok(())
    })?;
    for pool in ["press-shop", ""] {
        let value = if pool.is_empty() {
            json!(null)
        } else {
            json!(pool)
        };
        let patch = json!({"metadata": {"labels": {"apps.openyurt.io/nodepool": value}}});
        let patch = patch.to_string();
        cluster
            .kubectl()
            .ok(&["patch", "node", "edge1", "--type=merge", "-p", &patch])?;
        until(DEADLINE, &format!("edge1 is in pool {pool:?}"), || {
            let node = cluster.tunnel().wait_node("edge1")?;
            ensure!(node.pool.as_deref().unwrap_or_default() == pool, "{node:?}");
            Ok(())
        })?;
    }
    Ok(())
}
