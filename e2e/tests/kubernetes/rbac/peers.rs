//! The other proxy-servers, by their EndpointSlice.

use anyhow::{Result, ensure};
use e2e::cluster::{Cluster, until};
use serde_json::json;

use super::{DEADLINE, forbidden, restart, told_soon};

pub(super) fn other_servers_are_not_listed(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    told_soon(cluster, mark, &in_a_namespace("list"))
}

/// The sentence about slices of one namespace; about those of all there may be another.
fn in_a_namespace(verb: &str) -> String {
    let said = forbidden(verb, "endpointslices");
    format!("{said} in API group \"discovery.k8s.io\" in the namespace")
}

pub(super) fn other_servers_are_not_followed(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    told_soon(cluster, mark, &in_a_namespace("watch"))
}

/// A server that comes is heard of: one that nobody runs, at an address of documentation.
pub(super) fn other_servers_are_followed(cluster: &mut Cluster) -> Result<()> {
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": "proxy-server-peers-other", "namespace": "corvid",
            "labels": {"kubernetes.io/service-name": "proxy-server-peers"},
        },
        "ports": [{"name": "peers", "port": 8446, "protocol": "UDP"}],
        "endpoints": [{"addresses": ["192.0.2.7"], "conditions": {"ready": true}}],
    });
    cluster.create(&slice)?;
    until(DEADLINE, "the other server is known", || {
        let peers = cluster.tunnel().peers()?;
        ensure!(peers.contains("192.0.2.7:8446"), "{peers}");
        Ok(())
    })?;
    let delete = [
        "delete",
        "endpointslice",
        "proxy-server-peers-other",
        "-n",
        "corvid",
    ];
    cluster.kubectl().ok(&delete)?;
    until(DEADLINE, "the other server is gone", || {
        let peers = cluster.tunnel().peers()?;
        ensure!(!peers.contains("192.0.2.7:8446"), "{peers}");
        Ok(())
    })
}
