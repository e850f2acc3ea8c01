//! The names of the cluster's nodes as a `hosts` file. Pure: nodes and routes in, text out.
//!
//! | name | its lines |
//! | --- | --- |
//! | of a node at the edge, wherever the routes lead by that name | our addresses |
//! | of a node at the edge that we would always dial past the tunnel | the address that we would dial, and no other of it: nobody has looked whose those are |
//! | of any other node | its own first internal address of each family, else its first external ones |
//! | another name of a node (Hostname, DNS names) | the same, if the routes lead one way by it, and it can't be a name of somebody else: see below |
//! | of a node in the cloud without an address; no name of a host | none |
//!
//! A node's kubelet writes its further names as it likes, and whoever asks this CoreDNS would believe them. So a further
//! name counts if it has a single label (`worker-7`), begins with the node's own name (`edge1.site.example`) or lies in one
//! of the configured domains.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use crate::cluster::ClusterTable;
use crate::cluster::nodes::Node;
use crate::config::is_subdomain;
use crate::error::Refusal;

/// Where a name leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Led {
    /// To us.
    Us,
    /// Past us, to that address.
    At(IpAddr),
    /// To whatever addresses its node has.
    Elsewhere,
}

/// A hosts file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Hosts {
    pub(super) text: String,
    /// Names in it.
    pub(super) names: usize,
}

/// The file for these nodes: `route` says where a name leads, `ours` is where names at the edge point.
pub(super) fn hosts(
    table: &ClusterTable,
    ours: &BTreeSet<IpAddr>,
    domains: &[String],
    route: impl Fn(&str) -> Result<Led, Refusal>,
) -> Hosts {
    let mut lines: BTreeMap<&str, BTreeSet<IpAddr>> = BTreeMap::new();
    for node in table.nodes().values() {
        let further = node.aliases.iter().map(String::as_str);
        let further = further.filter(|alias| {
            // A node's own name goes before what others call themselves.
            is_its_own(&node.name, alias, domains) && !table.nodes().contains_key(*alias)
        });
        for name in std::iter::once(node.name.as_str()).chain(further) {
            if !is_host_name(name) {
                continue;
            }
            let is_its = || name == node.name || table.is_alone(name);
            let addresses = match route(name) {
                Ok(Led::Us) => ours.clone(),
                Ok(Led::At(address)) if is_its() => BTreeSet::from([address]),
                Ok(Led::Elsewhere) if is_its() => own(node),
                Ok(Led::At(_) | Led::Elsewhere) | Err(_) => continue,
            };
            if !addresses.is_empty() {
                lines.insert(name, addresses);
            }
        }
    }
    let mut text = String::new();
    for (name, addresses) in &lines {
        for address in addresses {
            writeln!(text, "{address}\t{name}").ok(); // writing to a string can't fail
        }
    }
    let names = lines.len();
    Hosts { text, names }
}

/// The node's own first address of each family: internal ones, if it has any.
fn own(node: &Node) -> BTreeSet<IpAddr> {
    let (internal, external) = node
        .addresses
        .split_at_checked(node.internal)
        .unwrap_or_default();
    let from = if internal.is_empty() {
        external
    } else {
        internal
    };
    let first = |v4: bool| from.iter().find(|ip| ip.is_ipv4() == v4).copied();
    [first(true), first(false)].into_iter().flatten().collect()
}

fn is_its_own(node: &str, alias: &str, domains: &[String]) -> bool {
    let begins = || {
        alias
            .strip_prefix(node)
            .is_some_and(|rest| rest.starts_with('.'))
    };
    let lies_in = |domain: &String| {
        alias
            .strip_suffix(domain.as_str())
            .is_some_and(|rest| rest.ends_with('.'))
    };
    !alias.contains('.') || begins() || domains.iter().any(lies_in)
}

/// A name by RFC 1123, and not an address. One that ends in a number is a name here: some clouds name nodes
/// `REGION.ADDRESS`.
fn is_host_name(name: &str) -> bool {
    is_subdomain(name) && name.parse::<IpAddr>().is_err()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use proto::{AgentName, Destination, Host};
    use serde_json::{Value, json};

    use super::*;
    use crate::cluster::nodes::tests::{node, trim};
    use crate::config::{Elsewhere, Kubernetes, RouteEntry};
    use crate::route::{Route, RouteTable};

    fn table(nodes: impl IntoIterator<Item = Value>) -> ClusterTable {
        let settings = Kubernetes::default();
        let nodes = nodes.into_iter().filter_map(|node| trim(node, &settings));
        let nodes = nodes.map(|node| (node.name.clone(), Arc::new(node)));
        ClusterTable::new(nodes.collect())
    }

    fn edge(name: &str, addresses: &[(&str, &str)]) -> Value {
        node(
            name,
            json!({"openyurt.io/is-edge-worker": "true"}),
            json!({}),
            addresses,
        )
    }

    fn cloud(name: &str, addresses: &[(&str, &str)]) -> Value {
        node(name, json!({}), json!({}), addresses)
    }

    /// As the server routes: agent `joined` is known, and `routes` has `configured`.
    fn made(table: &ClusterTable, ours: &[&str], domains: &[&str]) -> Hosts {
        let routes = RouteTable::new(&[RouteEntry {
            node: "configured".into(),
            agent: None,
            addresses: Vec::new(),
        }]);
        let ours = ours.iter().map(|ip| ip.parse().unwrap()).collect();
        let domains: Vec<_> = domains.iter().map(|domain| (*domain).to_owned()).collect();
        let known = |agent: &AgentName| agent.as_str() == "joined";
        hosts(table, &ours, &domains, |name| {
            let host = Host::Name(name.to_owned());
            let to = Destination { host, port: 1 };
            Ok(match routes.route(&to, table, Elsewhere::Refuse, known)? {
                Route::Edge { .. } => Led::Us,
                Route::Elsewhere(_) => Led::Elsewhere,
            })
        })
    }

    #[test]
    fn a_node_that_is_led_past_us_has_the_address_that_was_looked_at_and_no_other() {
        let addresses = [
            ("InternalIP", "10.0.0.7"),
            ("InternalIP", "10.20.0.7"),
            ("InternalIP", "fd00::7"),
            ("ExternalIP", "203.0.113.7"),
            ("Hostname", "press"),
        ];
        let twin = [("InternalIP", "10.0.0.8"), ("Hostname", "press")];
        let led = |_: &str| Ok(Led::At("10.20.0.7".parse().unwrap()));
        let ours = BTreeSet::from(["10.96.0.50".parse().unwrap()]);
        let alone = hosts(&table([edge("edge1", &addresses)]), &ours, &[], led);
        assert_eq!(alone.text, "10.20.0.7\tedge1\n10.20.0.7\tpress\n");
        // What two call themselves is nobody's.
        let table = table([edge("edge1", &addresses), edge("edge2", &twin)]);
        let both = hosts(&table, &ours, &[], |name| match name {
            "edge2" => Ok(Led::Us),
            _ => led(name),
        });
        assert_eq!(both.text, "10.20.0.7\tedge1\n10.96.0.50\tedge2\n");
    }

    #[test]
    fn edges_point_to_us_and_clouds_to_themselves() {
        let table = table([
            edge(
                "edge2",
                &[("InternalIP", "192.168.1.10"), ("Hostname", "edge2")],
            ),
            edge("edge1", &[("InternalIP", "192.168.1.10")]),
            edge("nowhere", &[]),
            cloud("joined", &[("InternalIP", "10.0.0.9")]),
            cloud("configured", &[("InternalIP", "10.0.0.8")]),
            cloud(
                "cloud1",
                &[
                    ("ExternalIP", "203.0.113.1"),
                    ("ExternalIP", "2001:db8::1"),
                    ("InternalIP", "10.0.0.1"),
                    ("InternalIP", "10.0.0.2"),
                ],
            ),
            cloud(
                "cloud2",
                &[("InternalIP", "fd00::2"), ("InternalIP", "10.0.0.3")],
            ),
            cloud("outside", &[("ExternalIP", "203.0.113.7")]),
            cloud("cn-hangzhou.192.168.0.5", &[("InternalIP", "192.168.0.5")]),
            cloud("without", &[]),
        ]);
        let made = made(&table, &["10.96.0.50"], &[]);
        let wanted = "10.0.0.1\tcloud1\n10.0.0.3\tcloud2\nfd00::2\tcloud2\n192.168.0.5\tcn-hangzhou.192.168.0.5\n\
                      10.96.0.50\tconfigured\n10.96.0.50\tedge1\n10.96.0.50\tedge2\n10.96.0.50\tjoined\n10.96.0.50\tnowhere\n\
                      203.0.113.7\toutside\n";
        assert_eq!((made.text.as_str(), made.names), (wanted, 9));
    }

    #[test]
    fn each_family_of_ours_has_its_line() {
        let table = table([edge("edge1", &[])]);
        let made = made(&table, &["fd00::50", "10.96.0.50", "10.96.0.51"], &[]);
        assert_eq!(
            made.text,
            "10.96.0.50\tedge1\n10.96.0.51\tedge1\nfd00::50\tedge1\n"
        );
        assert_eq!(made.names, 1);
    }

    #[test]
    fn further_names_count_where_nobody_else_could_be_meant() {
        let table = table([
            edge(
                "edge1",
                &[
                    ("Hostname", "machine-7"),
                    ("InternalDNS", "edge1.site.example"),
                    ("InternalDNS", "press.factory.example"),
                    // What is somebody else's, or could be.
                    ("Hostname", "cloud1"),
                    ("Hostname", "twins"),
                    ("InternalDNS", "www.bank.example"),
                    ("InternalDNS", "edge1x.site.example"),
                    ("InternalDNS", "factory.example"),
                    ("InternalDNS", "edge1.default.svc"),
                    ("Hostname", "under_score"),
                ],
            ),
            cloud(
                "cloud1",
                &[
                    ("InternalIP", "10.0.0.1"),
                    ("Hostname", "twins"),
                    ("Hostname", "of-two-clouds"),
                    ("Hostname", "machine-8"),
                ],
            ),
            cloud(
                "cloud2",
                &[("InternalIP", "10.0.0.2"), ("Hostname", "of-two-clouds")],
            ),
        ]);
        let made = made(&table, &["10.96.0.50"], &["factory.example"]);
        let wanted = "10.0.0.1\tcloud1\n10.0.0.2\tcloud2\n10.96.0.50\tedge1\n10.96.0.50\tedge1.site.example\n\
                      10.96.0.50\tmachine-7\n10.0.0.1\tmachine-8\n10.96.0.50\tpress.factory.example\n";
        assert_eq!(made.text, wanted);
    }

    #[test]
    fn what_is_no_host_name_stays_out() {
        let agent = |name: &str| node(name, json!({}), json!({"corvid.io/agent": "site"}), &[]);
        let long = format!("{}.{}", "a".repeat(63), "b".repeat(63));
        let names = [
            "10.0.0.7", "fd00::7", "a b", "a\tb", "a\nb", "a#b", "", ".", "a.", ".a", "a..b", "-a",
            "a-", "A", "a_b", "ä",
        ];
        let longer = [format!("{}.c", "a".repeat(64)), format!("{long}.{long}")];
        let bad = names
            .iter()
            .map(|name| agent(name))
            .chain(longer.iter().map(|name| agent(name)));
        let table = table(bad.chain([agent(&long)]));
        assert!(
            table.nodes().len() > 10,
            "nodes may have such names as far as we know"
        );
        assert_eq!(
            made(&table, &["10.96.0.50"], &[]).text,
            format!("10.96.0.50\t{long}\n")
        );
    }

    proptest! {
        /// Whatever kubelets write: each line is an address, a tab and a name; names are sorted; a node's own name leads to us
        /// or to one of its own addresses.
        #[test]
        fn a_node_can_not_take_the_name_of_another(
            nodes in proptest::collection::vec((0_u8..6, any::<bool>(), "[a-c0#_.\t\n -]{0,6}", 0_u8..4), 0..10),
        ) {
            let made_of = nodes.iter().map(|(i, edge, alias, address)| {
                let labels = if *edge { json!({"openyurt.io/is-edge-worker": "true"}) } else { json!({}) };
                let address = format!("10.0.0.{address}");
                node(&format!("n{i}"), labels, json!({}), &[("InternalIP", &address), ("Hostname", alias), ("InternalDNS", &format!("n{}", i + 1))])
            });
            let table = table(made_of);
            let made = made(&table, &["10.96.0.50"], &[]);
            let lines: Vec<_> = made.text.lines().map(|line| line.split_once('\t').unwrap()).collect();
            prop_assert!(lines.is_sorted_by_key(|(_, name)| *name));
            for (address, name) in &lines {
                let address: IpAddr = address.parse().unwrap();
                prop_assert!(is_host_name(name), "{name:?}");
                if let Some(node) = table.nodes().get(*name) {
                    let ours = address.to_string() == "10.96.0.50";
                    let right = (node.edge && ours) || (!node.edge && node.addresses.contains(&address));
                    prop_assert!(right, "{address} {name}");
                }
            }
            let own = |node: &&Arc<Node>| lines.iter().any(|(_, name)| *name == node.name);
            prop_assert_eq!(table.nodes().values().filter(own).count(), table.nodes().len());
        }
    }
}
