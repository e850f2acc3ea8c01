//! kube-apiserver without an egress selector: what it dials itself is led to us, by DNS or by rules of the kernel.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, CoreDns, Egress, NODES, until};
use serde_json::json;

use crate::logs;

/// For what is written, mounted and read again within seconds.
const DEADLINE: Duration = Duration::from_secs(60);

/// Names of nodes come from CoreDNS, and lead to the Service.
pub(super) fn names(cluster: &mut Cluster) -> Result<(CoreDns, String)> {
    // What has to be asked for before names are known.
    cluster.start_apiserver(&Egress::Addresses)?;
    let dns = cluster.coredns()?;
    let address = cluster.service_address()?;
    for node in NODES {
        resolves(cluster, &dns, node, &address)?;
    }
    cluster.start_apiserver(&Egress::Names(dns.resolver()))?;
    Ok((dns, format!("edge1 and edge2 are {address}")))
}

fn resolves(cluster: &Cluster, dns: &CoreDns, node: &str, address: &str) -> Result<()> {
    until(DEADLINE, &format!("{node} is {address}"), || {
        let told = dns.resolve(cluster, node)?;
        ensure!(told.contains(address), "{told}");
        Ok(())
    })
}

/// A node that comes has a name soon, and one that goes has none.
pub(super) fn names_follow_nodes(cluster: &Cluster, dns: &CoreDns) -> Result<String> {
    cluster.create(&json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "newcomer", "labels": {"openyurt.io/is-edge-worker": "true"}},
    }))?;
    resolves(cluster, dns, "newcomer", &cluster.service_address()?)?;
    cluster.kubectl().ok(&["delete", "node", "newcomer"])?;
    until(DEADLINE, "newcomer has no name", || {
        let told = dns.resolve(cluster, "newcomer");
        ensure!(told.is_err(), "{told:?}");
        Ok(())
    })?;
    Ok("came and went".to_owned())
}

/// An address that two nodes have leads nowhere, and is reported with what to do.
pub(super) fn shared_address(cluster: &Cluster) -> Result<String> {
    // It has that address as well, and is not at the edge.
    cluster
        .kubectl()
        .ok(&["delete", "node", "ghost", "--ignore-not-found"])?;
    let shown = cluster.tunnel().redirect_rules()?;
    let wanted =
        "# left out: 192.168.1.10 is shared by nodes that different agents serve: edge1, edge2";
    let line = shown.lines().find(|line| line.contains(wanted));
    Ok(line.with_context(|| shown.clone())?.trim().to_owned())
}

/// The nodes get addresses of their own; kube-apiserver dials those, and the rules lead it to us.
pub(super) fn addresses(cluster: &mut Cluster) -> Result<String> {
    let addresses = cluster.readdress()?;
    cluster.tunnel_mut().redirect()?;
    until(DEADLINE, "the addresses are led to us", || {
        let rules = cluster
            .host("cloud")?
            .run("nft", &["list", "table", "inet", "corvid_redirect"])?;
        for address in &addresses {
            ensure!(rules.contains(&address.to_string()), "{rules}");
        }
        Ok(())
    })?;
    cluster.start_apiserver(&Egress::Addresses)?;
    // The rules are kept by a process of its own; who is meant is known to the proxy-server.
    for (node, address) in NODES.iter().zip(&addresses) {
        until(DEADLINE, &format!("{address} is known"), || {
            let known = cluster.tunnel().wait_node(node)?;
            ensure!(known.addresses == [address.to_string()], "{known:?}");
            Ok(())
        })?;
    }
    // And that an address is its own is seen by an agent within seconds.
    until(DEADLINE, "the agents know their addresses", || {
        logs::one_line_of_each(cluster)
    })?;
    Ok(format!("{addresses:?}"))
}

/// Once the rules are gone the same kube-apiserver reaches nobody: it was they that led it.
pub(super) fn without_rules(cluster: &mut Cluster) -> Result<String> {
    cluster.tunnel_mut().end_redirect(DEADLINE)?;
    let tables = cluster.host("cloud")?.run("nft", &["list", "tables"])?;
    ensure!(!tables.contains("corvid_redirect"), "{tables}");
    // What it has open would go on: the kernel knows those connections.
    cluster.start_apiserver(&Egress::Addresses)?;
    let pod = e2e::cluster::pods::name("edge1");
    cluster.kubectl().fails(&[
        "logs",
        &pod,
        "-c",
        "book",
        "--tail=1",
        "--request-timeout=5s",
    ])
}
