//! Which agent serves a destination. Pure: a table made of the configuration, the cluster's nodes, and the agents that
//! are known. What an agent says of its own addresses counts for nothing.
//!
//! In this order:
//!
//! | destination | route |
//! | --- | --- |
//! | name in `routes` | that entry's agent; it dials the entry's address, if it has one and is another machine |
//! | address in `routes`, the most specific entry first | its agent; two agents at the same length: refused, both named |
//! | name or address of a node of the cluster | [`ClusterTable`]; what a kubelet calls itself is not believed if it is the name of an agent that does not serve it |
//! | name or address of a pod or a Service | [`ClusterTable`]; an `ExternalName` begins here again with that name, once |
//! | name of a known agent (it enrolled, or has or had a session) | that agent: an edge outside the cluster |
//! | anything else | not at the edge: the frontend's own default |

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use proto::wire::PodPort;
use proto::{AgentName, Destination, Host, Reason};

use crate::cluster::ClusterTable;
use crate::config::{Cidr, Elsewhere, RouteEntry};
use crate::error::Refusal;

/// Where a destination is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// At the edge, behind that agent; `node` is what people call it.
    Edge {
        /// Who serves it.
        agent: AgentName,
        /// The node's name.
        node: String,
        /// What the agent dials. Not what was asked for where the node is another machine than the agent's, or the agent
        /// does not know that name.
        to: Destination,
        /// The pod that is meant, if it is one that is known.
        pod: Option<PodPort>,
    },
    /// Not at the edge: that is dialled from here, if anything is.
    Elsewhere(Destination),
}

impl Route {
    /// What is dialled in the end.
    #[must_use]
    pub const fn to(&self) -> &Destination {
        match self {
            Self::Edge { to, .. } | Self::Elsewhere(to) => to,
        }
    }
}

/// What is known of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// There is none of that name, for all that is known.
    Unknown,
    /// There is, and it can't be reached now.
    Absent,
    /// It has a session, here or at another server.
    Present,
}

impl Presence {
    /// Whether there is one.
    #[must_use]
    pub fn is_known(self) -> bool {
        self != Self::Unknown
    }
}

impl From<bool> for Presence {
    /// Where only names matter.
    fn from(known: bool) -> Self {
        if known { Self::Present } else { Self::Unknown }
    }
}

/// The table.
#[derive(Debug, Default, Clone)]
pub struct RouteTable {
    names: HashMap<String, (AgentName, Option<IpAddr>)>,
    /// Addresses that are one node's whole.
    own: HashMap<String, Vec<IpAddr>>,
    nets: BTreeMap<IpNet, Vec<Claim>>,
    /// Prefix lengths that there are.
    lengths: BTreeSet<u8>,
}

/// A configured node that has an address or CIDR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Its name.
    pub node: String,
    /// Who serves it.
    pub agent: AgentName,
}

impl RouteTable {
    /// The table of these entries.
    #[must_use]
    pub fn new(entries: &[RouteEntry]) -> Self {
        let mut table = Self::default();
        for entry in entries {
            let Some(agent) = entry.agent() else { continue };
            for cidr in &entry.addresses {
                let claim = Claim {
                    node: entry.node.clone(),
                    agent: agent.clone(),
                };
                table.nets.entry(cidr.0).or_default().push(claim);
                table.lengths.insert(cidr.0.prefix_len());
            }
            let whole = |cidr: &&Cidr| cidr.0.prefix_len() == cidr.0.max_prefix_len();
            let own = entry.addresses.iter().filter(whole);
            let own: Vec<_> = own.map(|cidr| cidr.0.addr()).collect();
            let is_other = entry.node != agent.as_str();
            let address = own.first().copied().filter(|_| is_other);
            table.own.entry(entry.node.clone()).or_default().extend(own);
            table.names.insert(entry.node.clone(), (agent, address));
        }
        table
    }

    /// Routes a destination; `presence` says what is known of the agent of a name, `elsewhere` what who asks gets of what is
    /// not at the edge.
    ///
    /// # Errors
    /// [`Reason::AmbiguousDestination`], never a guess; [`Reason::UnknownDestination`] and [`Reason::DialUnreachable`] for
    /// names and addresses of pods and Services that lead nowhere.
    pub fn route<P: Into<Presence>>(
        &self,
        destination: &Destination,
        cluster: &ClusterTable,
        elsewhere: Elsewhere,
        presence: impl Fn(&AgentName) -> P,
    ) -> Result<Route, Refusal> {
        if let Some(route) = self.configured(destination) {
            return route;
        }
        let Some(other) = cluster.external_name(&destination.host) else {
            return unconfigured(destination, cluster, elsewhere, presence);
        };
        let destination = Destination {
            host: other?,
            port: destination.port,
        };
        self.configured(&destination)
            .unwrap_or_else(|| unconfigured(&destination, cluster, elsewhere, presence))
    }

    fn configured(&self, destination: &Destination) -> Option<Result<Route, Refusal>> {
        match &destination.host {
            Host::Name(name) => self.by_name(name, destination.port).map(Ok),
            Host::Ip(ip) => self.by_address(*ip, destination),
        }
    }

    /// Names of configured nodes.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &AgentName)> {
        self.names
            .iter()
            .map(|(node, (agent, _))| (node.as_str(), agent))
    }

    /// The configured addresses of a node, networks left out.
    pub(crate) fn addresses_of(&self, node: &str) -> &[IpAddr] {
        self.own.get(node).map_or(&[], Vec::as_slice)
    }

    /// Every configured address and CIDR, with the nodes that have it.
    pub(crate) const fn nets(&self) -> &BTreeMap<IpNet, Vec<Claim>> {
        &self.nets
    }

    /// The nodes that have the most specific entry for an address.
    pub(crate) fn claims(&self, ip: IpAddr) -> &[Claim] {
        let entry = |length: &u8| self.nets.get(&IpNet::new(ip, *length).ok()?.trunc());
        let longest = self.lengths.iter().rev().find_map(entry);
        longest.map_or(&[], Vec::as_slice)
    }

    fn by_name(&self, name: &str, port: u16) -> Option<Route> {
        let (agent, address) = self.names.get(name)?;
        let host = address.map_or_else(|| Host::Name(name.to_owned()), Host::Ip);
        Some(Route::Edge {
            agent: agent.clone(),
            node: name.to_owned(),
            to: Destination { host, port },
            pod: None,
        })
    }

    /// The agent of the most specific entry for an address.
    pub(crate) fn by_address(
        &self,
        ip: IpAddr,
        destination: &Destination,
    ) -> Option<Result<Route, Refusal>> {
        let claims = self.claims(ip);
        let Claim { node, agent } = claims.first()?;
        if claims.iter().all(|claim| claim.agent == *agent) {
            return Some(Ok(Route::Edge {
                agent: agent.clone(),
                node: node.clone(),
                to: destination.clone(),
                pod: None,
            }));
        }
        let rivals = claims.iter().filter(|claim| claim.agent != *agent);
        let names: BTreeSet<&str> = rivals
            .map(|claim| claim.node.as_str())
            .chain([node.as_str()])
            .collect();
        let names = names.into_iter().collect::<Vec<_>>().join(" and ");
        Some(Err(Refusal {
            reason: Reason::AmbiguousDestination,
            sentence: format!("address {ip} is that of nodes {names}: ask by node name"),
        }))
    }
}

fn unconfigured<P: Into<Presence>>(
    destination: &Destination,
    cluster: &ClusterTable,
    elsewhere: Elsewhere,
    presence: impl Fn(&AgentName) -> P,
) -> Result<Route, Refusal> {
    let route = cluster.route(destination, elsewhere, &presence);
    route.unwrap_or_else(|| {
        Ok(by_agent(destination, |agent| {
            presence(agent).into().is_known()
        }))
    })
}

fn by_agent(destination: &Destination, known: impl Fn(&AgentName) -> bool) -> Route {
    let to = destination.clone();
    let Host::Name(name) = &destination.host else {
        return Route::Elsewhere(to);
    };
    match name.parse::<AgentName>() {
        Ok(agent) if known(&agent) => Route::Edge {
            node: name.clone(),
            agent,
            to,
            pod: None,
        },
        Ok(_) | Err(_) => Route::Elsewhere(to),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn entry(node: &str, agent: Option<&str>, addresses: &[&str]) -> RouteEntry {
        let cidr = |a: &&str| Cidr::try_from((*a).to_owned()).unwrap();
        RouteEntry {
            node: node.into(),
            agent: agent.map(Into::into),
            addresses: addresses.iter().map(cidr).collect(),
        }
    }

    fn table() -> RouteTable {
        RouteTable::new(&[
            entry("edge1", None, &["192.168.1.10", "10.0.0.0/8"]),
            entry("edge2", None, &["192.168.1.10", "fd00::/64"]),
            entry("press", Some("site-a"), &["10.9.0.0/24"]),
            entry("lathe", Some("site-a"), &["10.9.0.7", "10.9.1.0/24"]),
            entry("drill", Some("site-a"), &["10.9.1.0/24"]),
        ])
    }

    fn route(to: &str) -> Result<Route, Refusal> {
        let Ok(to) = to.parse() else {
            panic!("{to} is no destination")
        };
        table().route(&to, &ClusterTable::default(), Elsewhere::Refuse, |agent| {
            agent.as_str() == "edge9"
        })
    }

    fn edge(node: &str, agent: &str, to: &str) -> Route {
        Route::Edge {
            agent: agent.parse().unwrap(),
            node: node.into(),
            to: to.parse().unwrap(),
            pod: None,
        }
    }

    /// At the edge, with what was asked for dialled.
    fn leads(to: &str, node: &str, agent: &str) {
        assert_eq!(route(to).unwrap(), edge(node, agent, to), "{to}");
    }

    fn elsewhere(to: &str) {
        assert_eq!(
            route(to).unwrap(),
            Route::Elsewhere(to.parse().unwrap()),
            "{to}"
        );
    }

    #[test]
    fn a_node_behind_another_machines_agent_is_dialled_by_its_address() {
        let lathe = edge("lathe", "site-a", "10.9.0.7:10250");
        assert_eq!(route("lathe:10250").unwrap(), lathe);
        // An agent knows its own node.
        leads("edge1:10250", "edge1", "edge1");
    }

    #[test]
    fn names_lead_to_their_agent() {
        leads("edge1:10250", "edge1", "edge1");
        leads("press:10250", "press", "site-a");
        // Known by its enrolment.
        leads("edge9:10250", "edge9", "edge9");
        // An agent's name is no node's.
        elsewhere("site-a:1");
        elsewhere("webhook.default.svc:443");
    }

    #[test]
    fn the_most_specific_address_wins() {
        leads("10.1.2.3:1", "edge1", "edge1");
        leads("10.9.0.1:1", "press", "site-a");
        leads("10.9.0.7:1", "lathe", "site-a");
        leads("[fd00::1]:1", "edge2", "edge2");
        leads("[::ffff:10.1.2.3]:1", "edge1", "edge1");
        elsewhere("203.0.113.9:1");
    }

    #[test]
    fn an_address_that_two_agents_share_is_refused_and_both_are_named() {
        let refusal = route("192.168.1.10:10250").unwrap_err();
        assert_eq!(refusal.reason, Reason::AmbiguousDestination);
        assert!(refusal.sentence.contains("edge1 and edge2"), "{refusal}");
    }

    #[test]
    fn two_nodes_of_one_agent_may_share_an_address() {
        leads("10.9.1.5:1", "lathe", "site-a");
    }
}
