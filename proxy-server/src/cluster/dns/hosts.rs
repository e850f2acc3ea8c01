//! The names of the cluster's nodes as a `hosts` file. Pure: nodes and routes in, text out.
//!
//! | name | its lines |
//! | --- | --- |
//! | of a node at the edge, wherever the routes lead by that name | our addresses |
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
use crate::route::Route;

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
    route: impl Fn(&str) -> Result<Route, Refusal>,
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
            let addresses = match route(name) {
                Ok(Route::Edge { .. }) => ours.clone(),
                Ok(Route::Elsewhere) if name == node.name || table.is_alone(name) => own(node),
                Ok(Route::Elsewhere) | Err(_) => continue,
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

    use proto::Reason;
    use serde_json::json;

    use super::*;
    use crate::cluster::nodes::tests::{node, trim};
    use crate::config::Kubernetes;

    #[test]
    fn edge_names_point_to_us_and_cloud_names_to_their_nodes() {
        let all = [
            node(
                "edge1",
                json!({}),
                json!({}),
                &[
                    ("InternalIP", "192.168.1.10"),
                    ("InternalDNS", "edge1.site"),
                    ("Hostname", "box-7"),
                ],
            ),
            node(
                "edge2",
                json!({}),
                json!({}),
                &[
                    ("InternalIP", "192.168.1.10"),
                    ("Hostname", "edge1"),
                    ("InternalDNS", "registry.example"),
                    ("InternalDNS", "a.lan"),
                ],
            ),
            node(
                "cloud1",
                json!({}),
                json!({}),
                &[
                    ("ExternalIP", "203.0.113.9"),
                    ("InternalIP", "fd00::9"),
                    ("InternalIP", "10.0.0.9"),
                    ("InternalIP", "10.0.0.10"),
                    ("Hostname", "twin"),
                ],
            ),
            node(
                "cloud2",
                json!({}),
                json!({}),
                &[("ExternalIP", "203.0.113.8"), ("Hostname", "twin")],
            ),
            node("cloud3", json!({}), json!({}), &[]),
            node(
                "10.0.0.7",
                json!({}),
                json!({}),
                &[("InternalIP", "10.0.0.7")],
            ),
            node(
                "shared",
                json!({}),
                json!({}),
                &[("InternalIP", "10.0.0.11")],
            ),
        ];
        let settings = Kubernetes::default();
        let nodes = all.into_iter().filter_map(|node| trim(node, &settings));
        let table = ClusterTable::new(
            nodes
                .map(|node| (node.name.clone(), Arc::new(node)))
                .collect(),
        );
        let route = |name: &str| match name {
            "shared" => Err(Refusal::about(name, Reason::AmbiguousDestination)),
            name if name.starts_with("edge")
                || name.starts_with("box")
                || name.ends_with(".lan") =>
            {
                Ok(Route::Edge {
                    agent: "edge1".parse().unwrap(),
                    node: name.to_owned(),
                    dialled: None,
                })
            }
            _ => Ok(Route::Elsewhere),
        };
        let ours = ["10.96.0.50", "fd96::50"]
            .map(|ip| ip.parse().unwrap())
            .into();
        let file = hosts(&table, &ours, &["lan".to_owned()], route);
        let wanted = "\
            10.96.0.50\ta.lan\nfd96::50\ta.lan\n\
            10.96.0.50\tbox-7\nfd96::50\tbox-7\n\
            10.0.0.9\tcloud1\nfd00::9\tcloud1\n\
            203.0.113.8\tcloud2\n\
            10.96.0.50\tedge1\nfd96::50\tedge1\n\
            10.96.0.50\tedge1.site\nfd96::50\tedge1.site\n\
            10.96.0.50\tedge2\nfd96::50\tedge2\n";
        assert_eq!(file.text, wanted);
        assert_eq!(file.names, 7);
    }

    #[test]
    fn what_is_no_name_of_a_host_gets_no_line() {
        for bad in [
            "",
            "A",
            "a b",
            "a\nb",
            "a\t10.0.0.1",
            "#a",
            "-a",
            "a..b",
            "10.0.0.1",
            "::1",
        ] {
            assert!(!is_host_name(bad), "{bad:?}");
        }
        assert!(is_host_name("cn-hangzhou.10.0.0.1") && is_host_name("edge1"));
    }
}
