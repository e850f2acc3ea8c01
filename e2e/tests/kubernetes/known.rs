//! What the proxy-server knows of the cluster, asked as a pod's service account: it comes, stays and goes as it should.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::client::Door;
use e2e::cluster::{ADDRESS, Cluster, NODES, aggregated_api, until};
use e2e::kubelet::Behaviour;
use e2e::lab::binary;
use e2e::process::{Process, Spawn};
use serde_json::{Value, json};

use crate::{logs, scrapers};

/// For what needs a try of the proxy-server to reach kube-apiserver: 10 s lie between two at most.
const DEADLINE: Duration = Duration::from_secs(60);
/// What a requester is told of what is not known.
const UNKNOWN: &str = "the destination is no node at the edge";
/// A listener of the proxy-server.
const OURS: &str = "203.0.113.10:8445";

/// Both nodes are known, as Kubernetes has them.
pub(super) fn nodes(cluster: &Cluster) -> Result<String> {
    for name in NODES {
        let node = cluster.tunnel().wait_node(name)?;
        let uid = ["get", "node", name, "-o", "jsonpath={.metadata.uid}"];
        let uid = String::from_utf8(cluster.kubectl().ok(&uid)?)?;
        ensure!(node.uid == uid, "{node:?} has not {uid}");
        ensure!(node.addresses == [ADDRESS.to_string()], "{node:?}");
        ensure!(node.edge && node.session && node.agent == name, "{node:?}");
        until(DEADLINE, "it is ready", || {
            let node = cluster.tunnel().wait_node(name)?;
            ensure!(node.ready == Some(true), "{node:?}");
            Ok(())
        })?;
    }
    let status = cluster.tunnel().status()?;
    ensure!(!status.contains("kube-apiserver: "), "{status}");
    ensure!(cluster.tunnel().metric("corvid_cluster_synced")? == 1.0);
    // Dashboard and alerts ask for these, which are nowhere without a cluster.
    until(DEADLINE, "nodes and writes are counted", || {
        let edge = cluster
            .tunnel()
            .metric("corvid_cluster_nodes{kind=\"edge\"}")?;
        let written = cluster
            .tunnel()
            .metric("corvid_dns_writes_total{result=\"ok\"}")?;
        ensure!(
            edge >= 2.0 && written >= 1.0,
            "{edge} at the edge, {written} writes"
        );
        Ok(())
    })?;
    Ok(status.lines().next().unwrap_or_default().to_owned())
}

/// A site without a kubelet of Kubernetes: an agent, a stand-in, and two Nodes that lead there: `edge3`, which the agent is
/// called too, and `press`, which nothing but the cluster knows.
pub(super) struct Site {
    _kubelet: Process,
    door: Door,
}

/// What leads to `edge3`, and what only the cluster leads there.
const EDGE3: [&str; 3] = ["edge3:10250", "192.168.3.10:10250", "edge3.site:10250"];
const PRESS: [&str; 2] = ["press:10250", "192.168.3.11:10250"];

impl Site {
    pub(super) fn start(cluster: &mut Cluster) -> Result<Self> {
        let edge = cluster.host("edge3")?;
        edge.ip("addr add 192.168.3.11/24 dev eth0")?;
        let kubelet = Spawn::new("kubelet-edge3", binary("kubelet")?)
            .args(["--name", "edge3"])
            .host(&edge)
            .start(&cluster.logs())?;
        kubelet.wait_for_line("ready", DEADLINE)?;
        cluster.tunnel_mut().join(&edge)?;
        cluster.tunnel().wait_session("edge3")?;
        create(cluster, "edge3", "192.168.3.10", &json!({}))?;
        create(
            cluster,
            "press",
            "192.168.3.11",
            &json!({"corvid.io/agent": "edge3"}),
        )?;
        let door = cluster.tunnel().forward_proxy()?;
        let site = Self {
            _kubelet: kubelet,
            door,
        };
        site.all_lead_there(cluster)?;
        Ok(site)
    }

    /// Whether a destination leads there, or what is said in place of it.
    fn leads_there(&self, to: &str) -> Result<()> {
        let mut tunnel = self.door.connect(to)??;
        writeln!(tunnel, "{}", Behaviour::Name)?;
        let name = tunnel.line()?;
        ensure!(name == "edge3", "{to} leads to {name}");
        Ok(())
    }

    fn all_lead_there(&self, cluster: &Cluster) -> Result<()> {
        for node in ["edge3", "press"] {
            cluster.tunnel().wait_node(node)?;
        }
        for to in EDGE3.iter().chain(&PRESS) {
            self.leads_there(to)?;
        }
        Ok(())
    }

    /// Waits until none of these leads anywhere.
    fn none_lead_there(&self, all: &[&str]) -> Result<()> {
        for to in all {
            until(DEADLINE, &format!("{to} leads nowhere"), || {
                let refusal = self.door.refusal(to)?;
                ensure!(refusal.sentence.contains(UNKNOWN), "{refusal}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// A deleted Node takes its address and its other names with it. Its agent is known by the name still, as one outside
    /// the cluster is.
    pub(super) fn deleted_node(&self, cluster: &Cluster) -> Result<String> {
        self.all_lead_there(cluster)?;
        cluster
            .kubectl()
            .ok(&["delete", "node", "edge3", "press"])?;
        let (agents, rest) = EDGE3.split_at(1);
        self.none_lead_there(rest)?;
        self.none_lead_there(&PRESS)?;
        for to in agents {
            self.leads_there(to)?;
        }
        let nodes = cluster.tunnel().nodes()?;
        let left = nodes
            .iter()
            .find(|node| node.node == "edge3")
            .context("no edge3")?;
        ensure!(left.source == "agent" && left.uid.is_empty(), "{left:?}");
        ensure!(nodes.iter().all(|node| node.node != "press"), "{nodes:?}");
        create(cluster, "edge3", "192.168.3.10", &json!({}))?;
        create(
            cluster,
            "press",
            "192.168.3.11",
            &json!({"corvid.io/agent": "edge3"}),
        )?;
        self.all_lead_there(cluster)?;
        Ok("gone with its address and alias, back with another uid".to_owned())
    }

    /// While kube-apiserver is away everything that is known leads where it did, and Prometheus goes on.
    pub(super) fn apiserver_away(&self, cluster: &mut Cluster) -> Result<String> {
        let prometheus = cluster.prometheus()?;
        scrapers::all_up(&prometheus)?;
        let failures = cluster.tunnel().metric("corvid_cluster_failures_total")?;
        cluster.stop_apiserver()?;
        let away = cluster.tunnel().wait_status("\nkube-apiserver: ")?;
        self.all_lead_there(cluster)?;
        scrapers::all_up_from_now_on(&prometheus)?;
        ensure!(cluster.tunnel().metric("corvid_cluster_failures_total")? > failures);
        ensure!(cluster.tunnel().metric("corvid_cluster_synced")? == 1.0);
        let egress = cluster.tunnel().with_direct();
        cluster.start_apiserver(&egress)?;
        until(DEADLINE, "kube-apiserver answers again", || {
            let status = cluster.tunnel().status()?;
            ensure!(!status.contains("kube-apiserver: "), "{status}");
            Ok(())
        })?;
        let said = away.lines().nth(1).unwrap_or_default();
        Ok(said.to_owned())
    }

    /// Both are killed and started in either order: the first one up waits for nothing, and nothing is left to be done.
    pub(super) fn both_restarted(&self, cluster: &mut Cluster) -> Result<String> {
        let egress = cluster.tunnel().with_direct();
        cluster.tunnel().server().kill()?;
        cluster.stop_apiserver()?;
        cluster.tunnel_mut().start_server()?;
        let alone = cluster.tunnel().wait_status("nodes: not known yet")?;
        // Agents come back, and lead by their names; what only the cluster knows is said to be missing.
        for agent in ["edge1", "edge2", "edge3"] {
            cluster.tunnel().wait_session(agent)?;
        }
        self.leads_there("edge3:10250")?;
        let refusal = self.door.refusal("press:10250")?;
        let wanted = "the cluster's nodes are not known yet";
        ensure!(refusal.sentence.contains(wanted), "{refusal}");
        cluster.start_apiserver(&egress)?;
        self.all_lead_there(cluster)?;
        logs::one_line_of_each(cluster)?;

        cluster.tunnel().server().kill()?;
        cluster.stop_apiserver()?;
        cluster.start_apiserver(&egress)?;
        let failed = logs::one_line_of_each(cluster).err();
        ensure!(failed.is_some(), "logs came without a proxy-server");
        cluster.tunnel_mut().start_server()?;
        for agent in ["edge1", "edge2", "edge3"] {
            cluster.tunnel().wait_session(agent)?;
        }
        logs::one_line_of_each(cluster)?;
        self.all_lead_there(cluster)?;
        Ok(alone.lines().next().unwrap_or_default().to_owned())
    }
}

/// Makes a Node at the edge, as a kubelet would.
fn create(cluster: &Cluster, name: &str, address: &str, annotations: &Value) -> Result<()> {
    cluster.create(&json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {"openyurt.io/is-edge-worker": "true"},
            "annotations": annotations,
        },
        "status": {"addresses": [
            {"type": "InternalIP", "address": address},
            {"type": "InternalDNS", "address": format!("{name}.site")},
        ]},
    }))
}

/// An aggregated API whose endpoint is the proxy-server itself: kube-apiserver asks for it by an egress that dials what is
/// in the cloud, and the proxy-server does not dial itself. Its own requests to kube-apiserver go past the proxies of its
/// environment, which would be itself, or it would know of no node.
pub(super) fn own_dials(cluster: &Cluster) -> Result<String> {
    let endpoint = OURS.parse::<std::net::SocketAddrV4>()?;
    let mark = cluster.tunnel().server().mark();
    let objects = aggregated_api("loop", "v1.loop.corvid.dev", endpoint);
    for object in &objects {
        cluster.create(object)?;
    }
    let available = "jsonpath={.status.conditions[?(@.type=='Available')].message}";
    let available = ["get", "apiservice", "v1.loop.corvid.dev", "-o", available];
    let wanted = format!("{OURS}: {}", proto::Reason::ForbiddenDestination.sentence());
    let told = until(DEADLINE, "the availability is told", || {
        let told = String::from_utf8(cluster.kubectl().ok(&available)?)?;
        ensure!(told.contains(&wanted), "{told:?} does not tell {wanted:?}");
        Ok(told)
    })?;
    for object in &objects {
        let at = |path| object.pointer(path).and_then(Value::as_str);
        let (kind, name) = (
            at("/kind").context("no kind")?,
            at("/metadata/name").context("no name")?,
        );
        let namespace = at("/metadata/namespace").unwrap_or("default");
        cluster
            .kubectl()
            .ok(&["delete", kind, name, "-n", namespace])?;
    }
    let log = cluster.tunnel().server().log_since(mark);
    let refused = |line: &str| line.contains(OURS) && line.contains("forbidden_destination");
    ensure!(log.lines().any(refused), "not in the access log: {log}");
    // Who dials from the server's own host is kube-apiserver, over Unix sockets: nothing has come by TCP.
    let looped = log
        .lines()
        .find(|line| line.contains("from=\"203.0.113.10"));
    ensure!(looped.is_none(), "{looped:?}");
    cluster.tunnel().wait_node("edge1")?;
    Ok(told)
}
