use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Service as WatchedService;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use proto::wire::PodPort;
use serde_json::{Value, json};

use super::*;
use crate::cluster::nodes::tests::{node, trim};
use crate::cluster::pods::tests::pods;
use crate::cluster::services::tests::{service, services, slice};
use crate::config::{Elsewhere, Kubernetes};
use crate::route::tests::entry;
use crate::route::{Presence, RouteTable};

fn nodes() -> super::super::Nodes {
    let edge = json!({"openyurt.io/is-edge-worker": "true"});
    let node = |name: &str, labels: &Value, ips: &[&str]| {
        let ips: Vec<_> = ips.iter().map(|ip| ("InternalIP", *ip)).collect();
        let node = node(name, labels.clone(), json!({}), &ips);
        let node = trim(node, &Kubernetes::default()).unwrap();
        (name.to_owned(), Arc::new(node))
    };
    [
        node("edge1", &edge, &["192.168.1.10", "10.96.0.66"]),
        node("edge2", &edge, &["192.168.1.11", "192.168.1.99"]),
        node("edge3", &edge, &["192.168.1.99"]),
        node("cloud1", &json!({}), &["10.0.0.1"]),
    ]
    .into()
}

/// Endpoint of a pod, as `NAME ADDRESS NODE [unready]`.
fn of_pod(text: &str) -> Value {
    let mut parts = text.split(' ');
    let mut next = || parts.next().unwrap_or_default();
    let (name, address, node, ready) = (next(), next(), next(), next());
    json!({
        "addresses": [address], "nodeName": node, "hostname": name, "conditions": {"ready": ready.is_empty()},
        "targetRef": {"kind": "Pod", "namespace": "d", "name": name},
    })
}

fn behind(name: &str, ports: &Value, all: &[&str]) -> EndpointSlice {
    let endpoints: Vec<_> = all.iter().map(|text| of_pod(text)).collect();
    slice(&format!("d/{name}-1"), name, ports, &json!(endpoints))
}

/// Services of namespace `d`, and what is behind them.
fn table() -> ClusterTable {
    let pods = pods(&[
        ("d/a", "edge1", &["10.244.1.5"]),
        ("d/b", "edge2", &["10.244.1.5", "fd00::5"]),
        ("d/c", "cloud1", &["10.244.0.5"]),
        ("d/host", "edge1", &[]),
        ("d/lost", "nowhere", &["10.244.9.9"]),
        ("d/alone", "edge2", &["10.244.2.7"]),
    ]);
    let http =
        json!([{"name": "http", "port": 80, "nodePort": 30_080}, {"name": "tls", "port": 443}]);
    let ports = json!([{"name": "http", "port": 8080}]);
    let of = |name: &str, ip: &str| {
        service(
            &format!("d/{name}"),
            &json!({"clusterIP": ip, "ports": http}),
            &[],
        )
    };
    let plain = |name: &str, ip: &str| {
        let ports = json!([{"name": "http", "port": 80}]);
        service(
            &format!("d/{name}"),
            &json!({"clusterIP": ip, "ports": ports}),
            &[],
        )
    };
    let all = vec![
        of("web", "10.96.0.1"),
        plain("cloud", "10.96.0.2"),
        plain("mixed", "10.96.0.3"),
        plain("idle", "10.96.0.4"),
        plain("empty", "10.96.0.5"),
        plain("thief", "10.96.0.66"),
        plain("liar", "10.96.0.7"),
        plain("host", "10.96.0.8"),
        plain("bare", "10.96.0.9"),
        plain("loop", "10.96.0.10"),
        plain("machine", "10.96.0.21"),
        plain("claimed", "10.96.0.22"),
        plain("misled", "10.96.0.23"),
        plain("twice", "10.96.0.24"),
        service(
            "d/local",
            &json!({"clusterIP": "10.96.0.11", "externalTrafficPolicy": "Local", "ports": [
                {"name": "http", "port": 80, "nodePort": 30_081}, {"name": "k", "port": 81, "nodePort": 10_250},
            ]}),
            &["198.51.100.1"],
        ),
        service(
            "d/headless",
            &json!({"clusterIP": "None", "ports": [{"name": "http", "port": 80}]}),
            &[],
        ),
        service("d/portless", &json!({"clusterIP": "None"}), &[]),
        service(
            "d/shared1",
            &json!({"clusterIP": "10.96.0.12", "ports": [{"name": "http", "port": 80}]}),
            &["198.51.100.2", "192.168.1.10"],
        ),
        service(
            "d/shared2",
            &json!({"clusterIP": "10.96.0.13", "ports": [{"name": "http", "port": 81}]}),
            &["198.51.100.2"],
        ),
        external("other", "edge2"),
        external("page", "www.example.com"),
        external("chain", "other.d.svc.cluster.local"),
        external("to-service", "cloud.d.svc"),
        external("number", "127.0.0.1"),
        external("configured", "press"),
    ];
    let bare = |name: &str, ip: &str, node: Option<&str>| {
        let endpoints = json!([{"addresses": [ip], "nodeName": node}]);
        slice(&format!("d/{name}-1"), name, &ports, &endpoints)
    };
    let slices = vec![
        behind(
            "web",
            &ports,
            &["a 10.244.1.5 edge1", "b 10.244.1.5 edge2 unready"],
        ),
        behind("cloud", &ports, &["c 10.244.0.5 cloud1"]),
        behind(
            "mixed",
            &ports,
            &["c 10.244.0.5 cloud1", "b 10.244.1.5 edge2"],
        ),
        behind("idle", &ports, &["a 10.244.1.5 edge1 unready"]),
        behind("thief", &ports, &["c 10.244.0.5 cloud1"]),
        behind(
            "liar",
            &ports,
            &[
                "a 10.244.0.5 edge1",
                "c 10.244.1.5 edge1",
                "nobody 10.244.1.5 edge1",
                "lost 10.244.9.9 edge1",
            ],
        ),
        behind("host", &ports, &["host 192.168.1.10 edge1"]),
        bare("bare", "10.244.2.7", Some("edge2")),
        bare("loop", "10.96.0.1", None),
        bare("machine", "192.168.1.11", Some("edge2")),
        bare("claimed", "192.168.1.11", None),
        bare("misled", "192.168.1.11", Some("edge1")),
        bare("twice", "192.168.1.99", Some("edge2")),
        behind(
            "local",
            &json!([{"name": "http", "port": 8080}, {"name": "k", "port": 8081}]),
            &["b 10.244.1.5 edge2"],
        ),
        behind(
            "headless",
            &ports,
            &[
                "a 10.244.1.5 edge1",
                "b 10.244.1.5 edge2",
                "c 10.244.0.5 cloud1",
            ],
        ),
        behind("portless", &json!([]), &["a 10.244.1.5 edge1"]),
        behind("shared1", &ports, &["a 10.244.1.5 edge1"]),
        behind("shared2", &ports, &["b 10.244.1.5 edge2"]),
    ];
    reaching(pods, services(all, slices))
}

fn external(name: &str, other: &str) -> WatchedService {
    let spec = json!({"type": "ExternalName", "externalName": other});
    service(&format!("d/{name}"), &spec, &[])
}

fn reaching(pods: Arc<crate::cluster::pods::Pods>, services: Arc<Services>) -> ClusterTable {
    let reach = Reach {
        pods,
        services: Some(services),
        domain: "cluster.local".to_owned(),
        pools: RouteTable::default(),
    };
    ClusterTable::reaching(nodes(), Some(reach))
}

/// `node>what is dialled[ pod[!]]`, with `!` for a declared port; `>` if it is not at the edge; or a refusal.
fn say(route: Result<Route, Refusal>) -> String {
    match route {
        Ok(Route::Elsewhere(to)) => format!(">{to}"),
        Ok(Route::Edge { node, to, pod, .. }) => {
            let pod = pod.map(
                |PodPort {
                     pod,
                     node: on,
                     declared,
                 }| {
                    assert_eq!(on, node);
                    format!(" {pod}{}", if declared { "!" } else { "" })
                },
            );
            format!("{node}>{to}{}", pod.unwrap_or_default())
        }
        Err(refusal) => format!("{}: {}", refusal.reason.label(), refusal.sentence),
    }
}

fn route_in(table: &ClusterTable, to: &str) -> String {
    let routes = RouteTable::new(&[entry("press", Some("site-a"), &["10.9.0.7"])]);
    say(
        routes.route(&to.parse().unwrap(), table, Elsewhere::Direct, |agent| {
            ["agent.d.svc", "edge1", "edge2"].contains(&agent.as_str())
        }),
    )
}

#[test]
fn services_lead_to_what_is_ready_behind_them() {
    let table = table();
    let no_port = "unknown_destination: service d/web has no TCP port 81 (ports: 80, 443)";
    let idle = "dial_unreachable: service d/idle has no ready endpoint";
    for (to, wanted) in [
        ("web.d.svc:80", "edge1>10.244.1.5:8080 d/a!"),
        ("WEB.d.svc.cluster.local.:80", "edge1>10.244.1.5:8080 d/a!"),
        ("10.96.0.1:80", "edge1>10.244.1.5:8080 d/a!"),
        ("web.d.svc:81", no_port),
        ("10.96.0.1:81", no_port),
        // Declared by the Service, and no slice has it.
        (
            "web.d.svc:443",
            "dial_unreachable: service d/web has no ready endpoint",
        ),
        ("idle.d.svc:80", idle),
        ("10.96.0.4:80", idle),
        // In the cloud or nowhere, as if there were no Services; also where it has no such port.
        ("empty.d.svc:80", ">empty.d.svc:80"),
        ("10.96.0.5:81", ">10.96.0.5:81"),
        ("cloud.d.svc:80", ">cloud.d.svc:80"),
        ("10.96.0.2:80", ">10.96.0.2:80"),
        ("10.96.0.2:81", ">10.96.0.2:81"),
        ("none.d.svc:80", ">none.d.svc:80"),
        ("10.96.0.200:80", ">10.96.0.200:80"),
        // On its node's network: the agent knows itself by its name.
        ("host.d.svc:80", "edge1>edge1:8080"),
        // Only an address: the node's that it is said to be on. Never a pod's, nor a Service again, nor a node's that only
        // claims it.
        ("machine.d.svc:80", "edge2>192.168.1.11:8080"),
        ("bare.d.svc:80", ">bare.d.svc:80"),
        ("loop.d.svc:80", ">loop.d.svc:80"),
        ("claimed.d.svc:80", ">claimed.d.svc:80"),
        ("misled.d.svc:80", ">misled.d.svc:80"),
        ("twice.d.svc:80", ">twice.d.svc:80"),
        // An address that edge1's kubelet claims.
        ("10.96.0.66:80", ">10.96.0.66:80"),
        ("10.96.0.66:10250", ">10.96.0.66:10250"),
        // An agent of that name, and no Service.
        ("agent.d.svc:80", "agent.d.svc>agent.d.svc:80"),
    ] {
        assert_eq!(route_in(&table, to), wanted, "{to}");
    }
}

#[test]
fn what_a_slice_says_falsely_leads_nowhere() {
    let table = table();
    for to in ["liar.d.svc:80", "10.96.0.7:80", "a.liar.d.svc:80"] {
        let told = route_in(&table, to);
        assert!(
            told.starts_with("dial_unreachable: service d/liar has no ready endpoint"),
            "{to}: {told}"
        );
    }
}

#[test]
fn a_headless_service_leads_to_the_endpoint_that_is_named() {
    let table = table();
    for (to, wanted) in [
        // The same address on two sites.
        ("a.headless.d.svc:8080", "edge1>10.244.1.5:8080 d/a!"),
        ("b.headless.d.svc:8080", "edge2>10.244.1.5:8080 d/b!"),
        ("b.headless.d.svc:80", "edge2>10.244.1.5:8080 d/b!"),
        ("c.headless.d.svc:8080", ">10.244.0.5:8080"),
        ("10-244-0-5.headless.d.svc:8080", ">10.244.0.5:8080"),
        (
            "z.headless.d.svc:8080",
            "unknown_destination: service d/headless has no endpoint z",
        ),
        (
            "a.headless.d.svc:81",
            "unknown_destination: service d/headless has no TCP port 81 (ports: 80)",
        ),
        (
            "b.web.d.svc:8080",
            "dial_unreachable: service d/web has no ready endpoint b",
        ),
        ("a.web.d.svc:8080", "edge1>10.244.1.5:8080 d/a!"),
        ("portless.d.svc:80", "edge1>10.244.1.5:80 d/a!"),
        ("portless.d.svc:9999", "edge1>10.244.1.5:9999 d/a"),
        ("a.portless.d.svc:9999", "edge1>10.244.1.5:9999 d/a"),
    ] {
        assert_eq!(route_in(&table, to), wanted, "{to}");
    }
    let found: BTreeSet<_> = (0..200)
        .map(|_| route_in(&table, "headless.d.svc:8080"))
        .collect();
    let wanted = [
        ">10.244.0.5:8080",
        "edge1>10.244.1.5:8080 d/a!",
        "edge2>10.244.1.5:8080 d/b!",
    ];
    assert_eq!(found, wanted.map(str::to_owned).into());
}

#[test]
fn agents_that_can_be_reached_are_asked_before_others() {
    use Elsewhere::{Direct, Refuse};
    let (table, routes) = (table(), RouteTable::new(&[]));
    let asked = |to: &str, elsewhere, present: &'static str| {
        let to = to.parse().unwrap();
        let presence = move |agent: &AgentName| match agent.as_str() {
            name if name == present => Presence::Present,
            "edge1" | "edge2" => Presence::Absent,
            _ => Presence::Unknown,
        };
        let each = (0..100).map(|_| say(routes.route(&to, &table, elsewhere, presence)));
        each.collect::<BTreeSet<_>>()
    };
    let (a, b, c) = (
        "edge1>10.244.1.5:8080 d/a!",
        "edge2>10.244.1.5:8080 d/b!",
        ">10.244.0.5:8080",
    );
    for (to, elsewhere, present, wanted) in [
        ("headless.d.svc:8080", Refuse, "edge2", &[b][..]),
        ("headless.d.svc:8080", Direct, "edge2", &[c, b]),
        ("mixed.d.svc:80", Refuse, "edge2", &[b]),
        // Nobody is the better one because he is at the edge.
        ("mixed.d.svc:80", Direct, "edge2", &[c, b]),
        ("mixed.d.svc:80", Direct, "nobody", &[c]),
        // Who asked is told why not.
        ("headless.d.svc:8080", Refuse, "nobody", &[a, b]),
        ("mixed.d.svc:80", Refuse, "nobody", &[b]),
        ("web.d.svc:80", Direct, "nobody", &[a]),
    ] {
        let wanted = wanted.iter().map(|route| (*route).to_owned()).collect();
        assert_eq!(
            asked(to, elsewhere, present),
            wanted,
            "{to} {elsewhere:?} {present}"
        );
    }
}

#[test]
fn node_ports_and_balancers_lead_to_services() {
    let table = table();
    for (to, wanted) in [
        ("192.168.1.10:30080", "edge1>10.244.1.5:8080 d/a!"),
        ("edge2:30080", "edge1>10.244.1.5:8080 d/a!"),
        ("10.0.0.1:30080", "edge1>10.244.1.5:8080 d/a!"),
        // Of one node alone.
        ("192.168.1.11:30081", "edge2>10.244.1.5:8080 d/b!"),
        (
            "192.168.1.10:30081",
            "dial_unreachable: service d/local has no ready endpoint on node edge1",
        ),
        (
            "10.0.0.1:30081",
            "dial_unreachable: service d/local has no ready endpoint on node cloud1",
        ),
        // No NodePorts, whatever a Service says; and the kubelet's own port, which `node` makes 10350.
        ("192.168.1.11:10250", "edge2>192.168.1.11:10250"),
        ("192.168.1.10:30082", "edge1>192.168.1.10:30082"),
        (
            "192.168.1.99:30080",
            "ambiguous_destination: address 192.168.1.99 is that of nodes edge2 and edge3: ask by node name",
        ),
        ("198.51.100.1:80", "edge2>10.244.1.5:8080 d/b!"),
        // A balancer may have more than this Service.
        ("198.51.100.1:82", ">198.51.100.1:82"),
        ("198.51.100.2:80", "edge1>10.244.1.5:8080 d/a!"),
        ("198.51.100.2:81", "edge2>10.244.1.5:8080 d/b!"),
        ("198.51.100.2:82", ">198.51.100.2:82"),
        // A balancer with a node's address is that node.
        ("192.168.1.10:80", "edge1>192.168.1.10:80"),
    ] {
        assert_eq!(route_in(&table, to), wanted, "{to}");
    }
}

#[test]
fn where_nothing_is_dialled_it_is_said_that_nothing_is_at_the_edge() {
    let (table, routes) = (table(), RouteTable::new(&[]));
    let none =
        |name: &str| format!("unknown_destination: service d/{name} has no endpoint at the edge");
    for (to, wanted) in [
        ("cloud.d.svc:80", none("cloud")),
        ("10.96.0.2:80", none("cloud")),
        ("empty.d.svc:80", none("empty")),
        // A node's port may be its own.
        ("10.0.0.1:30082", ">10.0.0.1:30082".to_owned()),
    ] {
        let asked = to.parse().unwrap();
        let route = routes.route(&asked, &table, Elsewhere::Refuse, |_| false);
        assert_eq!(say(route), wanted, "{to}");
    }
}

#[test]
fn before_all_pods_were_read_nothing_is_any_services() {
    let web = json!({"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]});
    let ports = json!([{"name": "http", "port": 8080}]);
    let slices = vec![behind("web", &ports, &["a 10.244.1.5 edge1"])];
    let services = services(vec![service("d/web", &web, &[])], slices);
    let table = reaching(Arc::default(), services);
    for to in ["web.d.svc:80", "10.96.0.1:80"] {
        assert_eq!(route_in(&table, to), format!(">{to}"));
    }
}

#[test]
fn another_name_is_routed_in_its_place_once() {
    let table = table();
    for (to, wanted) in [
        ("other.d.svc:10250", "edge2>edge2:10250"),
        ("page.d.svc.cluster.local:443", ">www.example.com:443"),
        ("to-service.d.svc:80", ">cloud.d.svc:80"),
        ("configured.d.svc:80", "press>10.9.0.7:80"),
        (
            "chain.d.svc:80",
            "unknown_destination: service d/other is another name, and was led to by one",
        ),
        (
            "number.d.svc:80",
            "unknown_destination: service d/number: its externalName is no name",
        ),
        ("x.page.d.svc:80", ">x.page.d.svc:80"),
    ] {
        assert_eq!(route_in(&table, to), wanted, "{to}");
    }
}

#[test]
fn nothing_is_guessed_before_all_were_read() {
    let table = reaching(pods(&[("d/a", "edge1", &["10.244.1.5"])]), Arc::default());
    for (to, wanted) in [
        ("web.d.svc:80", ">web.d.svc:80"),
        ("10.96.0.1:80", ">10.96.0.1:80"),
        ("192.168.1.10:30080", "edge1>192.168.1.10:30080"),
        (
            "agent.d.svc:80",
            "unknown_destination: name agent.d.svc: the cluster's services are not read yet",
        ),
    ] {
        assert_eq!(route_in(&table, to), wanted, "{to}");
    }
}

#[test]
fn two_services_with_one_address_are_refused() {
    let two = |name: &str| {
        let spec = json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]});
        service(&format!("d/{name}"), &spec, &[])
    };
    let table = reaching(pods(&[]), services(vec![two("x"), two("y")], vec![]));
    assert_eq!(
        route_in(&table, "10.96.0.1:80"),
        "ambiguous_destination: address 10.96.0.1 is that of services d/x and d/y: ask by name, as NAME.NAMESPACE.svc"
    );
}

#[test]
fn an_address_of_a_service_is_one_that_leads_back() {
    let all = vec![
        service(
            "d/web",
            &json!({"clusterIP": "10.96.0.66", "ports": [{"port": 80}]}),
            &[],
        ),
        service(
            "d/lb",
            &json!({"type": "LoadBalancer", "clusterIP": "10.96.0.7", "ports": [{"port": 443}]}),
            &["192.168.1.10"],
        ),
    ];
    let table = reaching(pods(&[]), services(all, Vec::new()));
    for (ip, port, wanted) in [
        ("10.96.0.66", 80, "service d/web"),
        // Whatever comes of a port that it has not.
        ("10.96.0.66", 10_250, "service d/web"),
        ("10.96.0.7", 1, "service d/lb"),
        // Of a balancer that has the address of a node, its own ports alone.
        ("192.168.1.10", 443, "service d/lb"),
        ("192.168.1.10", 10_250, ""),
    ] {
        let others = table.others_at((ip.parse().unwrap(), port), "edge1", None);
        let back = others.iter().filter(|other| other.leads_back);
        let names: Vec<_> = back.map(|other| other.name.as_str()).collect();
        assert_eq!(names.join(", "), wanted, "{ip} {port}");
    }
}
