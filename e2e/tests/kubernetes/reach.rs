//! Pods at the edge as destinations: by name, by address, and for kube-apiserver's own proxy.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::client::Tunnel;
use e2e::cluster::content::lines;
use e2e::cluster::{Cluster, NODES, pods, until};

/// Fetches the page of a node's pod by the pod's name.
pub(super) fn by_name(cluster: &Cluster, node: &str) -> Result<()> {
    let to = format!("{}.default.pod:{}", pods::name(node), pods::WEB_PORT);
    let tunnel = cluster.tunnel().forward_proxy()?.connect(&to)??;
    is_page_of(node, tunnel, "/lines")
}

/// Asks for that page, which has to be the node's.
pub(super) fn is_page_of(node: &str, mut tunnel: Tunnel, page: &str) -> Result<()> {
    write!(tunnel, "GET {page} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    tunnel.read_to_string(&mut answer)?;
    let (_head, body) = answer.split_once("\r\n\r\n").context("no head")?;
    let right = body == lines(node, pods::WEB_LINES);
    ensure!(
        right,
        "{} bytes that are not the page of {node}",
        body.len()
    );
    Ok(())
}

/// At a port that no container declares the same pod is not dialled, and the agent says why.
pub(super) fn undeclared(cluster: &Cluster) -> Result<String> {
    let to = format!("{}.default.pod:{}", pods::name("edge1"), pods::ECHO_PORT);
    let refused = cluster.tunnel().forward_proxy()?.connect(&to)?;
    let refused = refused.err().context("it was dialled")?.to_string();
    let why = format!("pod default/{} declares no such port", pods::name("edge1"));
    ensure!(refused.contains(&why), "{refused}");
    Ok(refused)
}

pub(super) fn address<T>(cluster: &Cluster<T>, pod: &str) -> Result<String> {
    let get = ["get", "pod", pod, "-o", "jsonpath={.status.podIP}"];
    Ok(String::from_utf8(cluster.kubectl().ok(&get)?)?)
}

/// Both nodes' pods have one address, as sites that know nothing of each other give it: by name each is reached, by the
/// address neither.
pub(super) fn twins(cluster: &Cluster) -> Result<String> {
    for node in NODES {
        by_name(cluster, node)?;
    }
    let [one, two] = NODES.map(|node| address(cluster, &pods::name(node)));
    let (one, two) = (one?, two?);
    ensure!(one == two, "{one} and {two}: nothing to mix up");
    let to = format!("{one}:{}", pods::WEB_PORT);
    let refused = cluster.tunnel().forward_proxy()?.connect(&to)?;
    let refused = refused
        .err()
        .context("an address of two was reached")?
        .to_string();
    for pod in NODES.map(pods::name) {
        ensure!(
            refused.contains(&format!("pod default/{pod} on ")),
            "{refused}"
        );
    }
    let raw = format!(
        "/api/v1/namespaces/default/pods/{}:{}/proxy/lines",
        pods::name("edge1"),
        pods::WEB_PORT
    );
    let told = cluster.kubectl().fails(&["get", "--raw", &raw])?;
    Ok(format!("{refused}; kubectl: {told}"))
}

/// kube-apiserver's own proxy reaches a pod whose address nobody else has.
pub(super) fn pod_proxy<T>(cluster: &Cluster<T>) -> Result<String> {
    let (name, ip) = alone(cluster)?;
    by_own_proxy(cluster, &format!("pods/{name}:{}", pods::WEB_PORT))?;
    Ok(format!("{name} at {ip}"))
}

/// Fetches the page of edge2's pods by kube-apiserver's own proxy.
pub(super) fn by_own_proxy<T>(cluster: &Cluster<T>, of: &str) -> Result<()> {
    let raw = format!("/api/v1/namespaces/default/{of}/proxy/lines");
    let page = until(Duration::from_secs(30), "it is known", || {
        cluster.kubectl().ok(&["get", "--raw", &raw])
    })?;
    let right = page == lines("edge2", pods::WEB_LINES).as_bytes();
    ensure!(right, "{} bytes", page.len());
    Ok(())
}

/// A pod on edge2 with an address that nobody else has; name and address.
pub(super) fn alone<T>(cluster: &Cluster<T>) -> Result<(String, String)> {
    let taken = || -> Result<Vec<String>> {
        let all = [
            "get",
            "pods",
            "-A",
            "-o",
            "jsonpath={.items[*].status.podIP}",
        ];
        let all = String::from_utf8(cluster.kubectl().ok(&all)?)?;
        Ok(all.split_whitespace().map(str::to_owned).collect())
    };
    for number in 0..8 {
        let name = format!("web-{number}");
        if cluster.kubectl().ok(&["get", "pod", &name]).is_err() {
            cluster.create(&pods::web(&name, "edge2"))?;
        }
        cluster.wait_ready(&name)?;
        let ip = address(cluster, &name)?;
        if taken()?.iter().filter(|other| **other == ip).count() == 1 {
            return Ok((name, ip));
        }
    }
    anyhow::bail!("every address is taken twice")
}
