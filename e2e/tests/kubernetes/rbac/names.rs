//! The election of the server that writes, and the map of names that it writes.

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{Cluster, NODES, until};
use serde_json::json;

use super::{DEADLINE, forbidden, restart};

const LEASE: &str = "corvid-proxy-server";
const MAP: &str = "edge-tunnel-nodes";
const MAP_KEY: &str = "tunnel-nodes";

/// Waits until `status` has kube-apiserver's refusal in the line of the election or of the map.
fn told_of(cluster: &Cluster, line: &str, verb: &str, resource: &str) -> Result<String> {
    let wanted = forbidden(verb, resource);
    until(DEADLINE, &format!("{line} {wanted}"), || {
        let status = cluster.tunnel().status()?;
        let found = status
            .lines()
            .find(|said| said.starts_with(line) && said.contains(&wanted));
        Ok(found.context(status.clone())?.to_owned())
    })
}

pub(super) fn nobody_leads_anew(cluster: &mut Cluster) -> Result<String> {
    cluster
        .kubectl()
        .ok(&["delete", "lease", LEASE, "-n", "corvid"])?;
    told_of(cluster, "lease: ", "create", "leases")
}

pub(super) fn no_leader_is_known(cluster: &mut Cluster) -> Result<String> {
    restart(cluster)?;
    told_of(cluster, "lease: ", "get", "leases")
}

pub(super) fn a_leader_can_not_go_on(cluster: &mut Cluster) -> Result<String> {
    let told = told_of(cluster, "lease: ", "update", "leases")?;
    // It stops by itself, and so does what it writes.
    until(DEADLINE, "nobody writes", || {
        let status = cluster.tunnel().status()?;
        ensure!(!status.contains("this server writes"), "{status}");
        Ok(())
    })?;
    Ok(told)
}

pub(super) fn names_have_nowhere_to_point(cluster: &mut Cluster) -> Result<String> {
    told_of(cluster, "dns: ", "get", "services")
}

pub(super) fn a_lost_map_stays_lost(cluster: &mut Cluster) -> Result<String> {
    cluster
        .kubectl()
        .ok(&["delete", "configmap", MAP, "-n", "kube-system"])?;
    told_of(cluster, "dns: ", "create", "configmaps")
}

pub(super) fn the_map_can_not_be_looked_at(cluster: &mut Cluster) -> Result<String> {
    told_of(cluster, "dns: ", "get", "configmaps")
}

pub(super) fn a_spoilt_map_stays_so(cluster: &mut Cluster) -> Result<String> {
    let patch = json!({"data": {MAP_KEY: "198.51.100.1\tedge1\n"}}).to_string();
    let patch = ["patch", "configmap", MAP, "-n", "kube-system", "-p", &patch];
    cluster.kubectl().ok(&patch)?;
    let told = told_of(cluster, "dns: ", "patch", "configmaps")?;
    ensure!(map(cluster)?.contains("198.51.100.1"), "it was repaired");
    Ok(told)
}

fn map(cluster: &Cluster) -> Result<String> {
    let data = format!("jsonpath={{.data.{MAP_KEY}}}");
    let get = ["get", "configmap", MAP, "-n", "kube-system", "-o", &data];
    Ok(String::from_utf8(cluster.kubectl().ok(&get)?)?)
}

/// This server leads, complains of nothing, and the names of both nodes point to the Service.
pub(super) fn the_map_is_written(cluster: &mut Cluster) -> Result<()> {
    let address = "jsonpath={.spec.clusterIP}";
    let address = [
        "get",
        "service",
        "proxy-server",
        "-n",
        "corvid",
        "-o",
        address,
    ];
    let address = String::from_utf8(cluster.kubectl().ok(&address)?)?;
    until(DEADLINE, "the map is written", || {
        let status = cluster.tunnel().status()?;
        let of_dns = |line: &&str| line.starts_with("dns: ") || line.starts_with("lease: ");
        let lines = status.lines().filter(of_dns).collect::<Vec<_>>();
        let wanted = format!("dns: this server writes kube-system/{MAP}; ");
        let [only] = lines.as_slice() else {
            bail!("{status}");
        };
        ensure!(only.starts_with(&wanted), "{status}");
        let map = map(cluster)?;
        for node in NODES {
            let line = format!("{address}\t{node}");
            ensure!(map.lines().any(|there| there == line), "{map}");
        }
        Ok(())
    })
}
