//! Which addresses may be led to us: those that mean one agent, whoever is asked. Pure.
//!
//! | who has the address, in `routes` (the most specific entry) and in the cluster | led |
//! | --- | --- |
//! | nodes at the edge, all served by one agent | yes |
//! | nodes at the edge that different agents serve | no, told with all names |
//! | a node at the edge and one that is not | no, told with all names |
//! | only nodes that are not at the edge | no |
//! | this machine; an address that is never dialled | no, told if a node at the edge has it |
//! | nodes at the edge that are always dialled past the tunnel, as any machine's routes lead | no, told with all names: who dials it needs us for nothing |
//!
//! Stricter than routing, where an entry in `routes` goes before what the cluster says: there a request that goes wrong
//! is refused, here kube-apiserver would reach another machine than it dialled. A CIDR of `routes` is led without those
//! of its addresses that may not be. A node of the cluster is at the edge by label, annotation or pool: which agents are
//! known is known to the server alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proto::{is_loopback, is_never_dialled};
use serde::Serialize;

use crate::cluster::ClusterTable;
use crate::cluster::nodes::Node;
use crate::route::{Claim, RouteTable};

/// Parts of a CIDR that lead to this machine or to nobody, whatever the CIDR.
const NEVER: [IpNet; 9] = [
    v4([0, 0, 0, 0], 8),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([224, 0, 0, 0], 4),
    v4([255, 255, 255, 255], 32),
    v6([0; 8], 127),
    v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
];

const fn v4([a, b, c, d]: [u8; 4], length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length))
}

const fn v6([a, b, c, d, e, f, g, h]: [u16; 8], length: u8) -> IpNet {
    let address = Ipv6Addr::new(a, b, c, d, e, f, g, h);
    IpNet::V6(Ipv6Net::new_assert(address, length))
}

/// Why an address of a node at the edge is not led to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Why {
    /// A node that is not at the edge has it too.
    AlsoElsewhere,
    /// We would dial it past the tunnel, as who asks may as well.
    AlwaysDirect,
    /// It leads to nobody, or to whoever dials it.
    NeverDialled,
    /// Nodes that different agents serve have it.
    Shared,
    /// This machine has it.
    ThisMachine,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AlsoElsewhere => "also that of a node that is not at the edge",
            Self::AlwaysDirect => "always dialled past the tunnel, and left to whoever asks",
            Self::NeverDialled => "never dialled",
            Self::Shared => "shared by nodes that different agents serve",
            Self::ThisMachine => "this machine's own",
        })
    }
}

/// An address, or a CIDR of `routes`, that is not led to us.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct LeftOut {
    /// It.
    pub(super) address: IpNet,
    /// Why.
    pub(super) why: Why,
    /// Every node that has it.
    pub(super) nodes: Vec<String>,
}

/// What is led to us, and what is not though a node at the edge has it. Both in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) led: Vec<IpNet>,
    pub(super) left_out: Vec<LeftOut>,
}

impl Addresses {
    /// What `routes` and the cluster say on a machine with the addresses `own`; `past_us` says whether that node is always
    /// dialled at that address past the tunnel, as any machine's routes lead.
    pub(super) fn new(
        routes: &RouteTable,
        cluster: &ClusterTable,
        own: &[IpAddr],
        past_us: impl Fn(&str, IpAddr) -> bool,
    ) -> Self {
        let own: BTreeSet<IpAddr> = own.iter().map(IpAddr::to_canonical).collect();
        let claimed = cluster.addresses();
        let (whole, cidrs): (Vec<_>, Vec<_>) =
            routes.nets().iter().partition(|(net, _)| is_whole(**net));
        let mut leads = BTreeMap::new();
        let mut left_out = Vec::new();
        let mut decide = |address: IpNet, claims: Claims<'_>, own: &BTreeSet<IpAddr>| {
            let verdict = claims.judge(address, own, &past_us);
            leads.insert(address, verdict == Ok(true));
            if let Err(why) = verdict {
                left_out.push(LeftOut {
                    address,
                    why,
                    nodes: claims.names(),
                });
            }
        };
        for (net, configured) in cidrs {
            let claims = Claims {
                configured,
                cluster: &[],
            };
            decide(*net, claims, &own);
        }
        let whole = whole.into_iter().map(|(net, _)| net.addr());
        let all: BTreeSet<IpAddr> = whole
            .chain(claimed.keys().copied())
            .chain(own.iter().copied())
            .collect();
        for ip in all {
            let claims = Claims {
                configured: routes.claims(ip),
                cluster: claimed.get(&ip).copied().unwrap_or_default(),
            };
            decide(IpNet::from(ip), claims, &own);
        }
        leads.extend(NEVER.map(|net| (net, false)));
        left_out.sort_by_key(|left| left.address);
        Self {
            led: carve(&leads),
            left_out,
        }
    }
}

/// Everybody who has an address.
#[derive(Debug, Clone, Copy)]
struct Claims<'a> {
    configured: &'a [Claim],
    cluster: &'a [Arc<Node>],
}

impl Claims<'_> {
    /// Whether it is led to us; an error if a node at the edge has it and it is not.
    fn judge(
        self,
        net: IpNet,
        own: &BTreeSet<IpAddr>,
        past_us: &impl Fn(&str, IpAddr) -> bool,
    ) -> Result<bool, Why> {
        // `routes` speak for a node of that name: what the cluster says of it counts no more.
        let configured = |node: &Node| self.configured.iter().any(|claim| claim.node == node.name);
        let others = || self.cluster.iter().filter(|node| !configured(node));
        let edge = others().filter(|node| node.edge).map(|node| &node.agent);
        let mut agents = self.configured.iter().map(|claim| &claim.agent).chain(edge);
        let Some(agent) = agents.next() else {
            return Ok(false);
        };
        let ip = net.addr();
        let never = if is_whole(net) {
            is_never_dialled(ip) || is_loopback(ip)
        } else {
            NEVER.iter().any(|never| never.contains(&net))
        };
        if never {
            return Err(Why::NeverDialled);
        }
        if is_whole(net) && own.contains(&ip) {
            return Err(Why::ThisMachine);
        }
        if others().any(|node| !node.edge) {
            return Err(Why::AlsoElsewhere);
        }
        if agents.any(|other| other != agent) {
            return Err(Why::Shared);
        }
        if is_whole(net) && self.names().iter().all(|node| past_us(node, ip)) {
            return Err(Why::AlwaysDirect);
        }
        Ok(true)
    }

    fn names(self) -> Vec<String> {
        let configured = self.configured.iter().map(|claim| &claim.node);
        let names: BTreeSet<_> = configured
            .chain(self.cluster.iter().map(|node| &node.name))
            .collect();
        names.into_iter().cloned().collect()
    }
}

/// Whether it is one address.
fn is_whole(net: IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

/// The addresses for which the most specific entry says yes, as nets: whole ones, and what is left of others.
fn carve(leads: &BTreeMap<IpNet, bool>) -> Vec<IpNet> {
    let entries: Vec<_> = leads.iter().map(|(net, leads)| (*net, *leads)).collect();
    let first6 = entries.partition_point(|(net, _)| matches!(net, IpNet::V4(_)));
    let (entries4, entries6) = entries.split_at(first6);
    let mut led = Vec::new();
    carve_within(v4([0; 4], 0), false, entries4, &mut led);
    carve_within(v6([0; 8], 0), false, entries6, &mut led);
    led
}

/// `leads` is what the entries around `net` say; `entries` are those within it, in order.
fn carve_within(net: IpNet, leads: bool, entries: &[(IpNet, bool)], led: &mut Vec<IpNet>) {
    // A net stands before those within it.
    let (leads, entries) = match entries.split_first() {
        Some(((own, own_leads), rest)) if *own == net => (*own_leads, rest),
        _ => (leads, entries),
    };
    if entries.iter().all(|(_, other)| *other == leads) {
        if leads {
            led.push(net);
        }
        return;
    }
    let Ok(halves) = net.subnets(net.prefix_len() + 1) else {
        return; // a single address has nothing within it
    };
    for half in halves {
        let start = entries.partition_point(|(entry, _)| entry.addr() < half.addr());
        let end = entries.partition_point(|(entry, _)| entry.addr() <= half.broadcast());
        carve_within(
            half,
            leads,
            entries.get(start..end).unwrap_or_default(),
            led,
        );
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::{Destination, Host};
    use serde_json::{Value, json};

    use super::*;
    use crate::cluster::nodes::tests::{node, trim};
    use crate::cluster::nodes::{AGENT, Nodes};
    use crate::config::{Elsewhere, Kubernetes};
    use crate::route::Route;
    use crate::route::tests::entry;

    /// Nodes with a name, an agent (empty: the one of its name; `-`: not at the edge) and addresses.
    fn cluster(nodes: &[(&str, &str, &[&str])]) -> ClusterTable {
        let trimmed = nodes.iter().map(|(name, agent, addresses)| {
            let (labels, annotations): (Value, Value) = match *agent {
                "-" => (json!({}), json!({})),
                "" => (json!({"openyurt.io/is-edge-worker": "true"}), json!({})),
                agent => (json!({}), json!({AGENT: agent})),
            };
            let addresses: Vec<_> = addresses.iter().map(|a| ("InternalIP", *a)).collect();
            let value = node(name, labels, annotations, &addresses);
            trim(value, &Kubernetes::default()).unwrap()
        });
        ClusterTable::new(trimmed.map(|n| (n.name.clone(), Arc::new(n))).collect())
    }

    fn led(addresses: &Addresses) -> Vec<String> {
        let whole = |net: &IpNet| net.to_string().replace("/32", "").replace("/128", "");
        addresses.led.iter().map(whole).collect()
    }

    fn left_out(addresses: &Addresses) -> Vec<(String, Why, String)> {
        let one = |left: &LeftOut| (left.address.to_string(), left.why, left.nodes.join(" "));
        addresses.left_out.iter().map(one).collect()
    }

    #[test]
    fn an_address_is_led_if_it_means_one_agent() {
        let routes = RouteTable::new(&[
            entry(
                "edge1",
                None,
                &["10.1.0.1", "192.168.1.10", "fd00::1", "10.1.0.7"],
            ),
            entry("edge2", None, &["10.1.0.2", "192.168.1.10"]),
            entry("odd", None, &["127.0.0.1", "169.254.169.254", "10.1.0.99"]),
        ]);
        let cluster = cluster(&[
            ("edge3", "", &["10.1.0.3", "10.1.0.5"]),
            ("edge4", "", &["10.1.0.4", "10.1.0.5"]),
            ("cloud1", "-", &["10.1.0.4", "10.1.0.6", "10.1.0.7"]),
            ("cloud2", "-", &["10.1.0.6"]),
            ("press", "site-a", &["10.9.0.7", "fd00::9"]),
            ("lathe", "site-a", &["10.9.0.7"]),
            ("edge1", "-", &["10.1.0.1"]),
        ]);
        let own = ["10.1.0.99", "10.1.0.98"].map(|ip| ip.parse().unwrap());
        let addresses = Addresses::new(&routes, &cluster, &own, |_, _| false);
        assert_eq!(
            led(&addresses),
            [
                "10.1.0.1", "10.1.0.2", "10.1.0.3", "10.9.0.7", "fd00::1", "fd00::9"
            ]
        );
        let wanted = [
            ("10.1.0.4/32", Why::AlsoElsewhere, "cloud1 edge4"),
            ("10.1.0.5/32", Why::Shared, "edge3 edge4"),
            ("10.1.0.7/32", Why::AlsoElsewhere, "cloud1 edge1"),
            ("10.1.0.99/32", Why::ThisMachine, "odd"),
            ("127.0.0.1/32", Why::NeverDialled, "odd"),
            ("169.254.169.254/32", Why::NeverDialled, "odd"),
            ("192.168.1.10/32", Why::Shared, "edge1 edge2"),
        ];
        let wanted = wanted.map(|(a, why, nodes)| (a.to_owned(), why, nodes.to_owned()));
        assert_eq!(left_out(&addresses), wanted);
    }

    #[test]
    fn an_address_of_which_all_nodes_are_dialled_past_us_is_left_to_whoever_asks() {
        let routes = RouteTable::new(&[entry("site", Some("site-a"), &["10.9.0.4/30"])]);
        let cluster = cluster(&[
            ("press", "site-a", &["10.9.0.1", "10.9.0.2", "10.9.0.5"]),
            ("lathe", "site-a", &["10.9.0.2"]),
            ("cloud1", "-", &["10.9.0.8"]),
        ]);
        let past_us = |node: &str, ip: IpAddr| node == "press" || ip.to_string() == "10.9.0.8";
        let addresses = Addresses::new(&routes, &cluster, &[], past_us);
        // One of two nodes is no reason, nor is a node within a network that an entry of `routes` has.
        assert_eq!(led(&addresses), ["10.9.0.2", "10.9.0.4/30"]);
        let wanted = (
            "10.9.0.1/32".to_owned(),
            Why::AlwaysDirect,
            "press".to_owned(),
        );
        assert_eq!(left_out(&addresses), [wanted]);
    }

    #[test]
    fn a_cidr_is_led_without_what_may_not_be() {
        let routes = RouteTable::new(&[
            entry("site", Some("site-a"), &["10.9.0.0/29", "fd09::/126"]),
            entry("rival", None, &["10.9.0.6/31"]),
            entry("other", None, &["10.9.0.6/31", "fd09::3"]),
            entry("inner", None, &["10.9.0.7"]),
            entry("twin", Some("site-a"), &["10.9.0.3"]),
            entry("self", None, &["127.1.0.0/16"]),
        ]);
        let cluster = cluster(&[
            ("cloud1", "-", &["10.9.0.1"]),
            ("press", "", &["10.9.0.2"]),
            ("lathe", "site-a", &["10.9.0.4"]),
        ]);
        let own = ["10.9.0.0".parse().unwrap(), "fd09::".parse().unwrap()];
        let addresses = Addresses::new(&routes, &cluster, &own, |_, _| false);
        assert_eq!(
            led(&addresses),
            [
                "10.9.0.3",
                "10.9.0.4/31",
                "10.9.0.7",
                "fd09::1",
                "fd09::2/127"
            ]
        );
        let wanted = [
            ("10.9.0.0/32", Why::ThisMachine, "site"),
            ("10.9.0.1/32", Why::AlsoElsewhere, "cloud1 site"),
            ("10.9.0.2/32", Why::Shared, "press site"),
            ("10.9.0.6/31", Why::Shared, "other rival"),
            ("127.1.0.0/16", Why::NeverDialled, "self"),
            ("fd09::/128", Why::ThisMachine, "site"),
        ];
        let wanted = wanted.map(|(a, why, nodes)| (a.to_owned(), why, nodes.to_owned()));
        assert_eq!(left_out(&addresses), wanted);
    }

    #[test]
    fn a_route_for_everything_leaves_this_machine_and_nobody_alone() {
        let routes = RouteTable::new(&[entry("all", None, &["0.0.0.0/0", "::/0"])]);
        let own = ["203.0.113.10".parse().unwrap()];
        let led = Addresses::new(&routes, &ClusterTable::default(), &own, |_, _| false).led;
        let is_led = |ip: &str| {
            led.iter()
                .any(|net| net.contains(&ip.parse::<IpAddr>().unwrap()))
        };
        for ip in ["1.2.3.4", "203.0.113.9", "203.0.113.11", "2001:db8::1"] {
            assert!(is_led(ip), "{ip}");
        }
        for ip in [
            "203.0.113.10",
            "127.0.0.1",
            "0.0.0.0",
            "169.254.1.1",
            "::1",
            "::",
            "fe80::1",
            "ff02::1",
        ] {
            assert!(!is_led(ip), "{ip}");
        }
    }

    #[test]
    fn ten_thousand_nodes_are_no_work() {
        let name = |i: usize| format!("n{i}");
        let address = |i: usize| format!("10.{}.{}.{}", i >> 16, (i >> 8) & 255, i & 255);
        let nodes: Nodes = (0..10_000)
            .map(|i| {
                let value = node(
                    &name(i),
                    json!({"openyurt.io/is-edge-worker": "true"}),
                    json!({}),
                    &[
                        ("InternalIP", &address(i)),
                        ("InternalIP", &format!("fd00::{i:x}")),
                    ],
                );
                let node = trim(value, &Kubernetes::default()).unwrap();
                (node.name.clone(), Arc::new(node))
            })
            .collect();
        let addresses = Addresses::new(
            &RouteTable::default(),
            &ClusterTable::new(nodes),
            &[],
            |_, _| false,
        );
        assert_eq!(addresses.led.len(), 20_000);
        assert!(addresses.left_out.is_empty());
    }

    proptest! {
        /// Whatever is configured and claimed: what is led is routed to one agent, whom nobody who has the address
        /// contradicts; what the routes send to one agent uncontradicted is led; and no two nets overlap.
        #[test]
        fn nothing_is_led_astray(
            entries in proptest::collection::vec((0_u8..3, 0_u8..3, 0_u8..16, 28_u8..=32), 0..6),
            claims in proptest::collection::vec((0_u8..16, 0_u8..4), 0..8),
            own in proptest::collection::vec(0_u8..16, 0..2),
        ) {
            let entries: Vec<_> = entries
                .iter()
                .map(|(node, agent, host, length)| {
                    let (node, agent) = (format!("r{node}"), format!("a{agent}"));
                    entry(&node, Some(&agent), &[&format!("10.0.0.{host}/{length}")])
                })
                .collect();
            let claimed: Vec<_> = claims
                .iter()
                .enumerate()
                .map(|(i, (host, agent))| {
                    let agent = if *agent == 3 { "-".to_owned() } else { format!("a{agent}") };
                    (format!("c{i}"), agent, format!("10.0.0.{host}"))
                })
                .collect();
            let nodes: Vec<_> = claimed.iter().map(|(n, a, ip)| (n.as_str(), a.as_str(), [ip.as_str()])).collect();
            let nodes: Vec<(&str, &str, &[&str])> = nodes.iter().map(|(n, a, ip)| (*n, *a, ip.as_slice())).collect();
            let (routes, cluster) = (RouteTable::new(&entries), cluster(&nodes));
            let own: Vec<IpAddr> = own.iter().map(|host| format!("10.0.0.{host}").parse().unwrap()).collect();
            let led = Addresses::new(&routes, &cluster, &own, |_, _| false).led;
            for host in 0..16 {
                let ip: IpAddr = format!("10.0.0.{host}").parse().unwrap();
                let times = led.iter().filter(|net| net.contains(&ip)).count();
                prop_assert!(times <= 1);
                let to = Destination { host: Host::Ip(ip), port: 10250 };
                let route = routes.route(&to, &cluster, Elsewhere::Refuse, |_| false);
                let claims = cluster.addresses();
                let claims = claims.get(&ip).copied().unwrap_or_default();
                let uncontradicted = match &route {
                    Ok(Route::Edge { agent, .. }) => claims.iter().all(|node| node.edge && node.agent == *agent),
                    Ok(Route::Elsewhere(_)) | Err(_) => false,
                };
                prop_assert_eq!(times == 1, uncontradicted && !own.contains(&ip), "{} {:?} {:?}", ip, route, led);
            }
        }
    }
}
