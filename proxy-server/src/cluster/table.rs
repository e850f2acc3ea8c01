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

mod claimants;
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

/// A node that is not at the edge. Asked for by name it is dialled at its address: names of nodes mean something to the
/// cluster, and often nothing to a name server.
fn beside_the_edge(node: &Node, asked: &Destination) -> Route {
    let is_name = matches!(asked.host, Host::Name(_));
    let address = node.addresses.first().filter(|_| is_name);
    Route::Elsewhere(aim(asked, address.copied().map(Host::Ip)))
}

fn towards(
    node: &Node,
    asked: &Destination,
    to: Destination,
    pod: Option<PodPort>,
    known: impl Fn(&AgentName) -> bool,
) -> Route {
    if !node.is_edge(known) {
        return beside_the_edge(node, asked);
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
        return Ok(match claims {
            [node] => beside_the_edge(node, asked),
            _ => Route::Elsewhere(asked.clone()),
        });
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
mod tests;
