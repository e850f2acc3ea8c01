use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::cluster::nodes::AGENT;
use crate::cluster::nodes::tests::{node, trim};
use crate::cluster::pods::tests::pods;
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
fn a_node_that_is_not_at_the_edge_is_dialled_at_its_address_by_whatever_name() {
    let nodes = [
        (
            "cloud1",
            &[("InternalIP", "10.0.0.2"), ("Hostname", "cloud1.vpc")][..],
        ),
        ("bare", &[]),
    ];
    let nodes = nodes.map(|(name, addresses)| {
        let node = node(name, json!({}), json!({}), addresses);
        (
            name.to_owned(),
            Arc::new(trim(node, &Kubernetes::default()).unwrap()),
        )
    });
    let table = ClusterTable::new(nodes.into());
    for (to, wanted) in [
        ("cloud1:10250", "10.0.0.2:10250"),
        ("cloud1.vpc:9100", "10.0.0.2:9100"),
        ("10.0.0.2:1", "10.0.0.2:1"),
        ("bare:10250", "bare:10250"),
    ] {
        let route = table.route(&to.parse().unwrap(), Elsewhere::Direct, |_| false);
        let wanted = Route::Elsewhere(wanted.parse().unwrap());
        assert_eq!(route.unwrap().unwrap(), wanted, "{to}");
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

pub(super) fn reaching() -> ClusterTable {
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
