//! Nodes as operators see them: what the cluster and the configuration say of each, and whether its agent is there.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use proto::AgentName;
use serde::{Deserialize, Serialize};

use super::{PathStatus, rows, yes};
use crate::cluster::dns::Published;
use crate::serve::Forwarder;

/// One node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub node: String,
    /// Its uid in the cluster.
    pub uid: String,
    /// Who serves it, or would.
    pub agent: String,
    /// Its pool.
    pub pool: Option<String>,
    /// Its region.
    pub region: Option<String>,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// Addresses of its pods.
    pub pod_cidrs: Vec<String>,
    /// Where its kubelet listens.
    pub kubelet_port: u16,
    /// It is reached through its agent.
    pub edge: bool,
    /// Kubernetes calls it ready; unknown outside a cluster.
    pub ready: Option<bool>,
    /// Its agent has a session, here or at another server.
    pub session: bool,
    /// Other servers where it has one.
    pub servers: Vec<String>,
    /// How it is reached; none where lines are not thought of at all, and of nodes that are not at the edge.
    pub path: Option<PathStatus>,
    /// Who says that there is such a node: `configuration`, `cluster` or `agent`.
    pub source: String,
}

/// What is known of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Kubernetes is asked at all.
    pub configured: bool,
    /// All nodes were read once.
    pub synced: bool,
    /// Seconds since kube-apiserver last answered.
    pub age_s: Option<u64>,
    /// Why it does not answer.
    pub failure: Option<String>,
    /// Nodes of the cluster.
    pub nodes: usize,
    /// Those of them at the edge.
    pub edge: usize,
    /// Those of them that are ready.
    pub ready: usize,
    /// The map of node names, where one is written.
    pub dns: Option<DnsStatus>,
}

/// The map of node names for CoreDNS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsStatus {
    /// `NAMESPACE/NAME` of the ConfigMap.
    pub map: String,
    /// This server writes it.
    pub leads: bool,
    /// Who does, by the Lease: `SERVER_RANDOM`.
    pub leader: Option<String>,
    /// Names in it, as far as this server wrote or saw it.
    pub names: Option<usize>,
    /// Seconds since this server last saw it to be as it should.
    pub age_s: Option<u64>,
    /// Why it is not as it should be.
    pub failure: Option<String>,
    /// Why it is not known who writes it.
    pub lease_failure: Option<String>,
}

/// Every node that is known, by name: those of the configuration, of the cluster, and agents that are neither.
#[must_use]
pub fn nodes(forwarder: &Forwarder) -> Vec<NodeStatus> {
    let routing = &forwarder.routing;
    let (cluster, configured) = (routing.cluster.table(), routing.table.load());
    let enrolled = routing.enrolled.load();
    let registered = forwarder.registry.names();
    let elsewhere = forwarder.peers.agents();
    let known = |agent: &AgentName| {
        enrolled.contains(agent) || registered.contains_key(agent) || elsewhere.contains_key(agent)
    };
    let sessions = |agent: &AgentName| {
        let servers = elsewhere.get(agent).into_iter().flatten();
        Sessions {
            here: registered.get(agent).is_some_and(|open| *open),
            servers: servers.map(ToString::to_string).collect(),
        }
    };
    let mut all = BTreeMap::new();
    let agents = enrolled.iter().chain(registered.keys());
    for agent in agents.chain(elsewhere.keys()) {
        let status = outside(agent.as_str(), agent, sessions(agent), "agent");
        all.insert(agent.as_str().to_owned(), status);
    }
    for (name, node) in cluster.nodes() {
        let status = NodeStatus {
            node: name.clone(),
            uid: node.uid.clone(),
            agent: node.agent.to_string(),
            pool: node.pool.clone(),
            region: node.region.clone(),
            addresses: node.addresses.iter().map(ToString::to_string).collect(),
            pod_cidrs: node.pod_cidrs.iter().map(ToString::to_string).collect(),
            kubelet_port: node.kubelet_port,
            edge: node.is_edge(known),
            ready: Some(node.ready),
            session: sessions(&node.agent).is_any(),
            servers: sessions(&node.agent).servers,
            path: None,
            source: "cluster".to_owned(),
        };
        all.insert(name.clone(), status);
    }
    for (name, agent) in configured.nodes() {
        let of_cluster = all.remove(name).filter(|status| status.source == "cluster");
        let status = outside(name, agent, sessions(agent), "configuration");
        let status = match of_cluster {
            // The route is the configuration's, the rest is still so.
            Some(node) => NodeStatus {
                agent: status.agent,
                edge: true,
                session: status.session,
                servers: status.servers,
                source: status.source,
                ..node
            },
            None => status,
        };
        all.insert(name.to_owned(), status);
    }
    let mut all: Vec<_> = all.into_values().collect();
    if !forwarder.paths.is_idle() {
        for node in all.iter_mut().filter(|node| node.edge) {
            node.path = Some(PathStatus::new(forwarder, node));
        }
    }
    all
}

/// Where an agent has sessions.
struct Sessions {
    here: bool,
    servers: Vec<String>,
}

impl Sessions {
    const fn is_any(&self) -> bool {
        self.here || !self.servers.is_empty()
    }
}

fn outside(name: &str, agent: &AgentName, sessions: Sessions, source: &str) -> NodeStatus {
    NodeStatus {
        node: name.to_owned(),
        uid: String::new(),
        agent: agent.to_string(),
        pool: None,
        region: None,
        addresses: Vec::new(),
        pod_cidrs: Vec::new(),
        kubelet_port: crate::cluster::nodes::KUBELET_PORT,
        edge: true,
        ready: None,
        session: sessions.is_any(),
        servers: sessions.servers,
        path: None,
        source: source.to_owned(),
    }
}

/// How much is known, and how fresh it is.
#[must_use]
pub fn cluster(forwarder: &Forwarder) -> ClusterStatus {
    let cluster = &forwarder.routing.cluster;
    let freshness = cluster.freshness();
    let nodes = nodes(forwarder);
    let of_cluster = nodes.iter().filter(|node| node.ready.is_some());
    ClusterStatus {
        configured: freshness.configured,
        synced: freshness.synced,
        age_s: freshness.age().map(|age| age.as_secs()),
        failure: freshness.failure,
        nodes: of_cluster.clone().count(),
        edge: of_cluster.clone().filter(|node| node.edge).count(),
        ready: of_cluster.filter(|node| node.ready == Some(true)).count(),
        dns: cluster.published().map(|published| dns(published)),
    }
}

fn dns(published: &Published) -> DnsStatus {
    let (standing, state) = (published.leadership.standing(), published.state());
    DnsStatus {
        map: published.map.to_string(),
        leads: published.leadership.until().is_some(),
        leader: standing.holder,
        names: state.good.map(|_at| state.names),
        age_s: state.good.map(|at| at.elapsed().as_secs()),
        failure: state.failure,
        lease_failure: standing.failure,
    }
}

impl DnsStatus {
    fn lines(&self) -> String {
        let Self { map, leads, .. } = self;
        let mut out = match (leads, &self.leader, self.names.zip(self.age_s)) {
            (true, _, Some((names, age))) => {
                format!(
                    "dns: this server writes {map}; {names} names, as it should be {age} s ago\n"
                )
            }
            (true, _, None) => format!("dns: this server writes {map}; not done yet\n"),
            (false, Some(leader), _) => format!("dns: {leader} writes {map}\n"),
            (false, None, _) => format!("dns: nobody is known to write {map}\n"),
        };
        for (what, failure) in [("dns", &self.failure), ("lease", &self.lease_failure)] {
            if let Some(failure) = failure {
                writeln!(out, "{what}: {failure}").ok(); // writing to a string can't fail
            }
        }
        out
    }
}

impl ClusterStatus {
    /// Some lines for people; nothing where Kubernetes is not asked.
    #[must_use]
    pub fn lines(&self) -> String {
        if !self.configured {
            return String::new();
        }
        let mut out = if self.synced {
            let Self {
                nodes, edge, ready, ..
            } = self;
            format!("nodes: {nodes} known, {edge} at the edge, {ready} ready")
        } else {
            "nodes: not known yet".to_owned()
        };
        match self.age_s {
            Some(age) => writeln!(out, "; kube-apiserver last answered {age} s ago").ok(), // writing to a string can't fail
            None => writeln!(out, "; kube-apiserver has not answered yet").ok(),
        };
        if let Some(failure) = &self.failure {
            writeln!(out, "kube-apiserver: {failure}").ok();
        }
        if let Some(dns) = &self.dns {
            out.push_str(&dns.lines());
        }
        out
    }
}

/// The nodes as a table for people.
#[must_use]
pub fn table(nodes: &[NodeStatus]) -> String {
    let header = [
        "NODE",
        "AGENT",
        "POOL",
        "ADDRESSES",
        "EDGE",
        "READY",
        "SESSION",
        "SOURCE",
    ];
    let row = |node: &NodeStatus| {
        let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        let addresses = match node.addresses.is_empty() {
            true => "-".to_owned(),
            false => node.addresses.join(","),
        };
        [
            node.node.clone(),
            node.agent.clone(),
            or_dash(&node.pool),
            addresses,
            yes(node.edge).to_owned(),
            node.ready.map_or("-", yes).to_owned(),
            if node.servers.is_empty() {
                yes(node.session).to_owned()
            } else {
                node.servers.join(",")
            },
            node.source.clone(),
        ]
    };
    rows(header, nodes.iter().map(row))
}
