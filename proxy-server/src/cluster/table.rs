//! Where the nodes of a snapshot are, and their pods. Nodes and pods in, routes out; nothing is asked and nothing is guessed.
//!
//! | destination | route |
//! | --- | --- |
//! | name of a node | its agent if it is at the edge, else not at the edge |
//! | another name of one node (Hostname, InternalDNS, ExternalDNS) | as its name; a node's own name goes before, and that of an agent which none of the claimants is served by |
//! | address of one node | as its name, dialled as it was asked for |
//! | name or address that several nodes claim, one at the edge among them | refused, all named; unless one agent serves all of them |
//! | name or address that nodes claim, none at the edge | not at the edge |
//! | name, address or NodePort of a Service ([`services`]) | its endpoint; ClusterIPs before what kubelets claim |
//! | name or address of a pod ([`pods`](super::pods)) | the agent of its node; an address that is another pod's or a node's as well, one at the edge among them: refused, all named |
//! | address in the configured networks of a pool's pods | the agent of the most specific one; two agents at the same length: refused, both named |
//! | address in `podCIDRs` of nodes | as an address that those nodes claim |
//! | anything else | not known here |
//!
//! Services only with `kubernetes.services`, and the three rows after it with `kubernetes.pods`. What a kubelet writes counts
//! for no more than it must: networks wider than one node has are left out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Display;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proto::wire::PodPort;
use proto::{AgentName, Destination, Host, Reason};

use super::nodes::{Node, Nodes};
use super::pods::{Found, Pod, Pods};
use super::services::Services;
use crate::config::Elsewhere;
use crate::error::Refusal;
use crate::route::{Presence, Route, RouteTable};

mod endpoints;
mod services;

/// So many of the nodes that share an address are named; the rest is counted.
const NAMED: usize = 5;
/// No node has more addresses for its pods than these prefixes leave.
const WIDEST: (u8, u8) = (16, 48);

/// What is known of pods, where it is wanted.
#[derive(Debug, Clone)]
pub(crate) struct Reach {
    pub(crate) pods: Arc<Pods>,
    /// Services, where they are destinations, too.
    pub(crate) services: Option<Arc<Services>>,
    /// The cluster's domain, `cluster.local`.
    pub(crate) domain: String,
    /// Configured networks of the pods of whole pools.
    pub(crate) pools: RouteTable,
}

/// Who asks.
#[derive(Clone, Copy)]
struct Ask<'a> {
    presence: &'a dyn Fn(&AgentName) -> Presence,
    elsewhere: Elsewhere,
}

impl Ask<'_> {
    /// What is known of the agent of that name.
    fn presence(self, agent: &AgentName) -> Presence {
        (self.presence)(agent)
    }

    fn knows(self, agent: &AgentName) -> bool {
        self.presence(agent).is_known()
    }

    /// Whether what is not at the edge is dialled for him.
    fn dials(self) -> bool {
        self.elsewhere == Elsewhere::Direct
    }
}

/// The nodes of one moment, and who claims which name and address.
#[derive(Debug, Default)]
pub struct ClusterTable {
    nodes: Nodes,
    aliases: HashMap<String, Vec<Arc<Node>>>,
    addresses: HashMap<IpAddr, Vec<Arc<Node>>>,
    reach: Option<Reach>,
    /// Networks of pods, and the prefix lengths that there are.
    cidrs: HashMap<IpNet, Vec<Arc<Node>>>,
    lengths: BTreeSet<u8>,
}

impl ClusterTable {
    /// The table of these nodes.
    #[must_use]
    pub fn new(nodes: Nodes) -> Self {
        let mut table = Self::default();
        for node in nodes.values() {
            for alias in &node.aliases {
                let claims = table.aliases.entry(alias.clone()).or_default();
                claims.push(Arc::clone(node));
            }
            for address in &node.addresses {
                let claims = table.addresses.entry(*address).or_default();
                claims.push(Arc::clone(node));
            }
        }
        table.nodes = nodes;
        table
    }

    /// The same, and where their pods are.
    pub(crate) fn reaching(nodes: Nodes, reach: Option<Reach>) -> Self {
        let mut table = Self::new(nodes);
        if reach.is_some() {
            for node in table.nodes.values() {
                for cidr in node.pod_cidrs.iter().map(IpNet::trunc) {
                    let widest = match cidr {
                        IpNet::V4(_) => WIDEST.0,
                        IpNet::V6(_) => WIDEST.1,
                    };
                    if cidr.prefix_len() >= widest {
                        table.lengths.insert(cidr.prefix_len());
                        table.cidrs.entry(cidr).or_default().push(Arc::clone(node));
                    }
                }
            }
        }
        table.reach = reach;
        table
    }

    /// Every node, by name.
    pub const fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// Whether one node and no other has that further name.
    pub(super) fn is_alone(&self, alias: &str) -> bool {
        let claims = self.aliases.get(alias);
        claims.is_some_and(|claims| claims.len() == 1)
    }

    /// Every address that a node has, with all nodes that have it.
    pub(crate) fn addresses(&self) -> BTreeMap<IpAddr, &[Arc<Node>]> {
        let all = self.addresses.iter();
        all.map(|(ip, claims)| (*ip, claims.as_slice())).collect()
    }

    /// Whether there is a node of that name and uid.
    #[must_use]
    pub fn has(&self, name: &str, uid: &str) -> bool {
        self.nodes.get(name).is_some_and(|node| node.uid == uid)
    }

    /// Routes a destination; `None` if nothing of the cluster has anything to do with it. `presence` says what is known of
    /// the agent of a name, `elsewhere` what who asks gets of what is not at the edge.
    ///
    /// # Errors
    /// [`Reason::AmbiguousDestination`], never a guess.
    pub fn route<P: Into<Presence>>(
        &self,
        destination: &Destination,
        elsewhere: Elsewhere,
        presence: impl Fn(&AgentName) -> P,
    ) -> Option<Result<Route, Refusal>> {
        let ask = Ask {
            presence: &|agent| presence(agent).into(),
            elsewhere,
        };
        let known = |agent: &AgentName| ask.knows(agent);
        match &destination.host {
            Host::Name(name) => {
                if let Some(node) = self.nodes.get(name) {
                    let to = aim(destination, node.dialled(name));
                    return self
                        .by_node_port(node, destination, ask)
                        .or_else(|| Some(Ok(towards(node, destination, to, None, known))));
                }
                if let Some(claims) = self.aliases.get(name) {
                    // Its certificate says whose name that is; a kubelet only says so.
                    let agent = name.parse::<AgentName>().ok().filter(&known);
                    if agent.is_some_and(|agent| claims.iter().all(|node| node.agent != agent)) {
                        return None;
                    }
                    let to = |node: &Node| aim(destination, node.dialled(name));
                    return Some(one_of(claims, destination, "name", to, known));
                }
                let reach = self.reach.as_ref()?;
                match reach.pods.named(name, &reach.domain) {
                    Found::Pods(found, at) => {
                        let to = |pod: &Pod, node: &Node| {
                            let own = at.or_else(|| pod.addresses.first().copied());
                            aim(
                                destination,
                                own.map(Host::Ip).or_else(|| node.dialled(name)),
                            )
                        };
                        Some(self.of_pods(&found, &[], format_args!("name {name}"), to, known))
                    }
                    Found::Missing(refusal) => Some(Err(refusal)),
                    Found::Nothing => self.by_service_name(name, destination, ask),
                }
            }
            Host::Ip(ip) => self
                .by_cluster_ip(*ip, destination, ask)
                .or_else(|| self.by_port_of_node(*ip, destination, ask))
                .or_else(|| self.by_address(*ip, destination, known))
                .or_else(|| self.by_balancer(*ip, destination, ask))
                .or_else(|| self.of_network(*ip, destination, known)),
        }
    }

    /// Routes to a Service by a port of the one node that has that address.
    fn by_port_of_node(
        &self,
        ip: IpAddr,
        destination: &Destination,
        ask: Ask<'_>,
    ) -> Option<Result<Route, Refusal>> {
        let [node] = self.addresses.get(&ip)?.as_slice() else {
            return None;
        };
        let is_a_pods = !self.reach.as_ref()?.pods.at(ip).is_empty();
        (!is_a_pods)
            .then(|| self.by_node_port(node, destination, ask))
            .flatten()
    }

    /// Routes by an address that pods or nodes have.
    fn by_address(
        &self,
        ip: IpAddr,
        destination: &Destination,
        known: impl Fn(&AgentName) -> bool,
    ) -> Option<Result<Route, Refusal>> {
        let nodes = self.addresses.get(&ip).map_or(&[][..], Vec::as_slice);
        let pods = self.reach.as_ref().map(|reach| reach.pods.at(ip));
        let to = |_: &Pod, _: &Node| destination.clone();
        match pods {
            Some(pods) if !pods.is_empty() => {
                Some(self.of_pods(&pods, nodes, format_args!("address {ip}"), to, known))
            }
            Some(_) | None if !nodes.is_empty() => {
                let to = |_: &Node| destination.clone();
                Some(one_of(nodes, destination, "address", to, known))
            }
            Some(_) | None => None,
        }
    }

    /// Among whose pods that address would be: those of a pool by our configuration, else those of nodes, of all that claim
    /// it however narrow their networks are.
    fn of_network(
        &self,
        ip: IpAddr,
        destination: &Destination,
        known: impl Fn(&AgentName) -> bool,
    ) -> Option<Result<Route, Refusal>> {
        let reach = self.reach.as_ref()?;
        let of = |length: &u8| self.cidrs.get(&IpNet::new(ip, *length).ok()?.trunc());
        let of_nodes = || {
            let claims = self.lengths.iter().filter_map(of).flatten();
            let claims: Vec<_> = claims.cloned().collect();
            let asked = |_: &Node| destination.clone();
            (!claims.is_empty()).then(|| one_of(&claims, destination, "address", asked, known))
        };
        let route = reach.pools.by_address(ip, destination).or_else(of_nodes)?;
        if matches!(route, Ok(Route::Edge { .. })) && !reach.pods.are_known() {
            // A pod elsewhere may have it.
            return Some(Err(Refusal {
                reason: Reason::UnknownDestination,
                sentence: format!("address {ip}: the cluster's pods are not read yet"),
            }));
        }
        Some(route)
    }

    /// Where those pods are; `nodes` have the same address.
    fn of_pods(
        &self,
        pods: &[Arc<Pod>],
        nodes: &[Arc<Node>],
        what: impl Display,
        to: impl Fn(&Pod, &Node) -> Destination,
        known: impl Fn(&AgentName) -> bool,
    ) -> Result<Route, Refusal> {
        let on = |pod: &Arc<Pod>| self.nodes.get(&pod.node);
        if let ([pod], []) = (pods, nodes) {
            let Some(node) = on(pod) else {
                return Err(Refusal {
                    reason: Reason::UnknownDestination,
                    sentence: format!("pod {}: its node {} is not known", pod.key, pod.node),
                });
            };
            let to = to(pod, node);
            // On its node's network nothing tells its ports from the node's own.
            let meant = (!pod.addresses.is_empty()).then(|| pod.port(to.port));
            return Ok(towards(node, &to.clone(), to, meant, known));
        }
        let is_cloud = |node: &Arc<Node>| !node.is_edge(&known);
        if let Some(first) = pods.first()
            && pods.iter().all(|pod| on(pod).is_some_and(is_cloud))
            && nodes.iter().all(is_cloud)
            && let Some(node) = on(first)
        {
            return Ok(Route::Elsewhere(to(first, node)));
        }
        let pods = pods
            .iter()
            .map(|pod| format!("pod {} on {}", pod.key, pod.node));
        let nodes = nodes.iter().map(|node| format!("node {}", node.name));
        Err(Refusal {
            reason: Reason::AmbiguousDestination,
            sentence: format!(
                "{what} is that of {}: ask by name, pods as NAME.NAMESPACE.pod",
                listed(pods.chain(nodes).collect())
            ),
        })
    }
}

/// Some of several, in words.
fn listed(mut names: Vec<String>) -> String {
    names.sort_unstable();
    let more = names.len().saturating_sub(NAMED);
    names.truncate(NAMED);
    let named = names.join(" and ");
    if more > 0 {
        return format!("{named} and {more} more");
    }
    named
}

/// What was asked for, at another host if there is one.
fn aim(asked: &Destination, other: Option<Host>) -> Destination {
    Destination {
        host: other.unwrap_or_else(|| asked.host.clone()),
        port: asked.port,
    }
}

fn towards(
    node: &Node,
    asked: &Destination,
    to: Destination,
    pod: Option<PodPort>,
    known: impl Fn(&AgentName) -> bool,
) -> Route {
    if !node.is_edge(known) {
        return Route::Elsewhere(asked.clone());
    }
    Route::Edge {
        agent: node.agent.clone(),
        node: node.name.clone(),
        to,
        pod,
    }
}

fn one_of(
    claims: &[Arc<Node>],
    asked: &Destination,
    what: &str,
    to: impl Fn(&Node) -> Destination,
    known: impl Fn(&AgentName) -> bool,
) -> Result<Route, Refusal> {
    let edge = || claims.iter().filter(|node| node.is_edge(&known));
    // Rules are about nodes: the machine of the agent is meant before others that say they are served by it.
    let machine = edge().find(|node| node.agent.as_str() == node.name);
    let Some(first) = machine.or_else(|| edge().next()) else {
        return Ok(Route::Elsewhere(asked.clone()));
    };
    // One machine of a site has the address, and the site's agent finds it: nothing to mix up. By name each claimant
    // might be dialled at another address.
    let answer = |node: &Node| (node.agent.clone(), to(node));
    if claims.iter().all(|node| answer(node) == answer(first)) {
        return Ok(towards(first, asked, to(first), None, known));
    }
    let named = listed(claims.iter().map(|node| node.name.clone()).collect());
    Err(Refusal {
        reason: Reason::AmbiguousDestination,
        sentence: format!(
            "{what} {} is that of nodes {named}: ask by node name",
            asked.host
        ),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::nodes::tests::{node, trim};
    use super::super::pods::tests::pods;
    use super::*;
    use crate::cluster::nodes::AGENT;
    use crate::config::Kubernetes;

    const EDGE: &str = "openyurt.io/is-edge-worker";

    fn table() -> ClusterTable {
        let edge = || json!({EDGE: "true"});
        let site = || json!({AGENT: "site-a"});
        let nodes = [
            node(
                "edge1",
                edge(),
                json!({}),
                &[
                    ("InternalIP", "192.168.1.10"),
                    ("InternalIP", "10.0.0.1"),
                    ("InternalDNS", "one.site"),
                ],
            ),
            node(
                "edge2",
                edge(),
                json!({}),
                &[
                    ("InternalIP", "192.168.1.10"),
                    ("Hostname", "edge1"),
                    ("InternalDNS", "twins"),
                ],
            ),
            node(
                "cloud1",
                json!({}),
                json!({}),
                &[
                    ("InternalIP", "10.0.0.2"),
                    ("InternalIP", "10.0.0.3"),
                    ("InternalDNS", "twins"),
                ],
            ),
            node(
                "cloud2",
                json!({}),
                json!({}),
                &[("InternalIP", "10.0.0.3")],
            ),
            node("thief", edge(), json!({}), &[("InternalIP", "10.0.0.2")]),
            // Says that it is served by another node's agent, at that node's address.
            node(
                "accomplice",
                edge(),
                json!({AGENT: "edge1"}),
                &[("InternalIP", "10.0.0.1")],
            ),
            node(
                "press",
                json!({}),
                site(),
                &[
                    ("InternalIP", "10.9.0.7"),
                    ("InternalIP", "10.9.0.1"),
                    ("InternalDNS", "press.site"),
                ],
            ),
            node(
                "lathe",
                json!({}),
                site(),
                &[("InternalIP", "10.9.0.7"), ("Hostname", "lathe.site")],
            ),
            node("nowhere", json!({}), site(), &[]),
            node(
                "joined",
                json!({}),
                json!({}),
                &[("InternalIP", "10.8.0.1")],
            ),
        ];
        let settings = Kubernetes::default();
        let nodes = nodes.map(|node| Arc::new(trim(node, &settings).unwrap()));
        ClusterTable::new(nodes.map(|node| (node.name.clone(), node)).into())
    }

    /// `agent/node/dialled`, `elsewhere`, `unknown` or a refusal's sentence.
    fn route(to: &str) -> String {
        route_in(&table(), to)
    }

    fn route_in(table: &ClusterTable, to: &str) -> String {
        let to: Destination = format!("{to}:10250").parse().unwrap();
        match table.route(&to, Elsewhere::Refuse, |agent| agent.as_str() == "joined") {
            None => "unknown".into(),
            Some(Ok(Route::Elsewhere(_))) => "elsewhere".into(),
            Some(Ok(Route::Edge {
                agent,
                node,
                to: dialled,
                ..
            })) => {
                assert_eq!(dialled.port, to.port);
                match dialled.host {
                    Host::Ip(ip) if dialled.host != to.host => format!("{agent}/{node}/{ip}"),
                    Host::Name(ref name) if dialled.host != to.host => {
                        format!("{agent}/{node}/{name}")
                    }
                    Host::Ip(_) | Host::Name(_) => format!("{agent}/{node}"),
                }
            }
            Some(Err(refusal)) => {
                let missing = ["no pod", "pod "]
                    .iter()
                    .any(|it| refusal.sentence.starts_with(it));
                let reason = if missing {
                    Reason::UnknownDestination
                } else {
                    Reason::AmbiguousDestination
                };
                assert_eq!(refusal.reason, reason);
                refusal.sentence
            }
        }
    }

    #[test]
    fn names_and_addresses_lead_to_their_node() {
        for (to, wanted) in [
            ("edge1", "edge1/edge1"),
            ("one.site", "edge1/edge1/edge1"),
            ("edge2", "edge2/edge2"),
            ("10.0.0.1", "edge1/edge1"),
            (
                "192.168.1.10",
                "address 192.168.1.10 is that of nodes edge1 and edge2: ask by node name",
            ),
            ("cloud1", "elsewhere"),
            ("10.0.0.3", "elsewhere"),
            (
                "10.0.0.2",
                "address 10.0.0.2 is that of nodes cloud1 and thief: ask by node name",
            ),
            (
                "twins",
                "name twins is that of nodes cloud1 and edge2: ask by node name",
            ),
            ("press", "site-a/press/10.9.0.7"),
            ("press.site", "site-a/press/10.9.0.7"),
            ("lathe.site", "site-a/lathe/10.9.0.7"),
            ("10.9.0.7", "site-a/lathe"),
            ("10.9.0.1", "site-a/press"),
            ("nowhere", "site-a/nowhere"),
            ("joined", "joined/joined"),
            ("10.8.0.1", "joined/joined"),
            ("site-a", "unknown"),
            ("webhook.default.svc", "unknown"),
            ("203.0.113.1", "unknown"),
        ] {
            assert_eq!(route(to), wanted, "{to}");
        }
    }

    #[test]
    fn of_many_claimants_some_are_named() {
        let settings = Kubernetes::default();
        let claim = |i: u32| {
            let claim = node(
                &format!("n{i}"),
                json!({EDGE: "true"}),
                json!({}),
                &[("ExternalIP", "203.0.113.9")],
            );
            let claim = trim(claim, &settings).unwrap();
            (claim.name.clone(), Arc::new(claim))
        };
        let table = ClusterTable::new((0..9).map(claim).collect());
        let refused = table.route(&"203.0.113.9:1".parse().unwrap(), Elsewhere::Refuse, |_| {
            false
        });
        let sentence = refused.unwrap().unwrap_err().sentence;
        assert!(
            sentence.contains("n0 and n1 and n2 and n3 and n4 and 4 more:"),
            "{sentence}"
        );
    }

    fn reaching() -> ClusterTable {
        let pods = pods(&[
            ("default/web", "edge1", &["10.244.1.5", "fd00::5"]),
            ("default/twin", "edge1", &["10.244.1.6"]),
            ("default/posing", "edge1", &["10.8.0.1"]),
            ("default/half", "edge1", &["10.244.1.7"]),
            ("other/half", "unknown", &["10.244.1.7"]),
            ("other/twin", "edge2", &["10.244.1.6"]),
            ("default/press", "press", &["10.244.3.1"]),
            ("default/cloud", "cloud1", &["10.244.0.1"]),
            ("default/cloud2", "cloud2", &["10.244.0.1"]),
            ("default/lost", "unknown", &["10.244.9.9"]),
            ("default/host", "edge1", &[]),
        ]);
        let mut nodes = table().nodes;
        let mut with = |name: &str, cidrs: &[&str]| {
            let node = Arc::make_mut(nodes.get_mut(name).unwrap());
            node.pod_cidrs = cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect();
        };
        with("edge1", &["10.244.1.0/24", "fd00::/64", "0.0.0.0/0"]);
        with("edge2", &["10.244.2.0/24", "10.245.7.0/24"]);
        with("thief", &["10.245.0.0/16", "10.240.0.0/12", "::/0"]);
        with("cloud1", &["10.244.0.0/24"]);
        with("press", &["10.246.0.0/24", "10.247.0.0/24"]);
        with("lathe", &["10.246.0.0/24", "10.247.0.0/24"]);
        let settings = Kubernetes {
            pools: serde_json::from_value(json!({
                "hz": {"agent": "site-a", "podNetworks": ["10.250.0.0/16", "10.251.0.0/16"]},
                "bj": {"agent": "edge1", "podNetworks": ["10.250.7.0/24", "10.251.0.0/16", "10.246.0.0/24"]},
            }))
            .unwrap(),
            ..Kubernetes::default()
        };
        let domain = "cluster.local".to_owned();
        ClusterTable::reaching(
            nodes,
            Some(Reach {
                pods,
                services: None,
                domain,
                pools: settings.pod_networks(),
            }),
        )
    }

    #[test]
    fn pods_lead_to_their_node_and_are_never_mixed_up() {
        let twins = "address 10.244.1.6 is that of pod default/twin on edge1 and pod other/twin on edge2: ask by name, pods as NAME.NAMESPACE.pod";
        let table = reaching();
        for (to, wanted) in [
            ("10.244.1.5", "edge1/edge1"),
            ("[fd00::5]", "edge1/edge1"),
            ("web.default.pod", "edge1/edge1/10.244.1.5"),
            ("WEB.default.pod.cluster.local.", "edge1/edge1/10.244.1.5"),
            ("10.244.1.6", twins),
            ("twin.default.pod", "edge1/edge1/10.244.1.6"),
            ("twin.other.pod", "edge2/edge2/10.244.1.6"),
            ("10-244-1-6.other.pod", "edge2/edge2/10.244.1.6"),
            ("press.default.pod", "site-a/press/10.244.3.1"),
            ("10.244.0.1", "elsewhere"),
            ("cloud.default.pod", "elsewhere"),
            (
                "lost.default.pod",
                "pod default/lost: its node unknown is not known",
            ),
            (
                "10.244.9.9",
                "pod default/lost: its node unknown is not known",
            ),
            (
                "10.8.0.1",
                "address 10.8.0.1 is that of node joined and pod default/posing on edge1: ask by name, pods as NAME.NAMESPACE.pod",
            ),
            (
                "10.244.1.7",
                "address 10.244.1.7 is that of pod default/half on edge1 and pod other/half on unknown: ask by name, pods as NAME.NAMESPACE.pod",
            ),
            (
                "gone.default.pod",
                "no pod gone with an address in namespace default",
            ),
            // Addresses that no known pod has, in networks of nodes.
            ("10.244.1.77", "edge1/edge1"),
            ("[fd00::77]", "edge1/edge1"),
            ("10.244.2.77", "edge2/edge2"),
            ("10.244.0.77", "elsewhere"),
            (
                "10.245.7.1",
                "address 10.245.7.1 is that of nodes edge2 and thief: ask by node name",
            ),
            // A pool's, by our configuration: more than what nodes have, the most specific one, never one of two.
            ("10.246.0.9", "edge1/edge1"),
            ("10.250.1.1", "site-a/site-a"),
            ("10.250.7.1", "edge1/edge1"),
            (
                "10.251.0.1",
                "address 10.251.0.1 is that of nodes edge1 and site-a: ask by node name",
            ),
            ("10.247.0.9", "site-a/lathe"),
            // Networks that no node has for itself.
            ("10.241.0.1", "unknown"),
            ("203.0.113.1", "unknown"),
            ("[2001:db8::1]", "unknown"),
            // Nodes go before.
            ("10.0.0.1", "edge1/edge1"),
            ("edge1", "edge1/edge1"),
        ] {
            assert_eq!(route_in(&table, to), wanted, "{to}");
        }
        for to in ["10.244.1.5", "web.default.pod", "10.244.1.77"] {
            assert_eq!(route(to), "unknown", "{to} without `kubernetes.pods`");
        }
    }

    #[test]
    fn the_agent_is_told_which_pod_is_meant_and_nothing_of_addresses_that_no_pod_has() {
        let table = reaching();
        for (to, pod) in [
            ("10.244.1.5:80", Some(("default/web", "edge1", true))),
            ("10.244.1.5:81", Some(("default/web", "edge1", false))),
            ("web.default.pod:80", Some(("default/web", "edge1", true))),
            (
                "press.default.pod:81",
                Some(("default/press", "press", false)),
            ),
            ("host.default.pod:80", None),
            ("10.244.1.77:80", None),
            ("edge1:80", None),
            ("10.0.0.1:80", None),
        ] {
            let route = table
                .route(&to.parse().unwrap(), Elsewhere::Refuse, |_| false)
                .unwrap();
            let Ok(Route::Edge { pod: told, .. }) = route else {
                panic!("{to}: {route:?}")
            };
            let told = told.as_ref();
            let told = told.map(|it| (it.pod.as_str(), it.node.as_str(), it.declared));
            assert_eq!(told, pod, "{to}");
        }
    }

    proptest! {
        /// Whatever nodes claim: an address leads to a node that claims it or nowhere, and to an agent only if every
        /// claimant has that agent.
        #[test]
        fn nothing_is_guessed(claims in proptest::collection::vec((0_u8..4, 0_u8..3, any::<bool>()), 0..12)) {
            let settings = Kubernetes::default();
            let mut nodes = Nodes::new();
            for (i, (host, agent, edge)) in claims.iter().enumerate() {
                let labels = if *edge { json!({EDGE: "true"}) } else { json!({}) };
                let annotations = if *agent == 0 { json!({}) } else { json!({AGENT: format!("a{agent}")}) };
                let address = format!("10.0.0.{host}");
                let node = trim(node(&format!("n{i}"), labels, annotations, &[("InternalIP", &address)]), &settings).unwrap();
                nodes.insert(node.name.clone(), Arc::new(node));
            }
            let table = ClusterTable::new(nodes.clone());
            for host in 0..4 {
                let ip: IpAddr = format!("10.0.0.{host}").parse().unwrap();
                let to = format!("{ip}:1").parse().unwrap();
                let owners: Vec<_> = nodes.values().filter(|node| node.addresses.contains(&ip)).collect();
                match table.route(&to, Elsewhere::Refuse, |_| false) {
                    None => prop_assert!(owners.is_empty()),
                    Some(Ok(Route::Elsewhere(_))) => prop_assert!(owners.iter().all(|node| !node.edge)),
                    Some(Ok(Route::Edge { agent, node, .. })) => {
                        prop_assert!(owners.iter().all(|owner| owner.agent == agent));
                        prop_assert!(owners.iter().any(|owner| owner.name == node));
                    }
                    Some(Err(refusal)) => {
                        prop_assert_eq!(refusal.reason, Reason::AmbiguousDestination);
                        prop_assert!(owners.iter().any(|a| owners.iter().any(|b| a.agent != b.agent)));
                    }
                }
            }
        }
    }
}
