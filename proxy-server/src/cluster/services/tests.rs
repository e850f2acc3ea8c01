use serde_json::{Value, json};

use super::*;

/// A Service as Kubernetes has it.
pub(in crate::cluster) fn service(key: &str, spec: &Value, balanced: &[&str]) -> WatchedService {
    let (namespace, name) = key.split_once('/').unwrap();
    let ingress: Vec<_> = balanced.iter().map(|ip| json!({"ip": ip})).collect();
    serde_json::from_value(json!({
        "metadata": {"namespace": namespace, "name": name},
        "spec": spec,
        "status": {"loadBalancer": {"ingress": ingress}},
    }))
    .unwrap()
}

/// A slice as Kubernetes has it.
pub(in crate::cluster) fn slice(
    key: &str,
    service: &str,
    ports: &Value,
    endpoints: &Value,
) -> WatchedSlice {
    let (namespace, name) = key.split_once('/').unwrap();
    serde_json::from_value(json!({
        "metadata": {"namespace": namespace, "name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
    }))
    .unwrap()
}

/// All that there is.
pub(in crate::cluster) fn services(
    all: Vec<WatchedService>,
    behind: Vec<WatchedSlice>,
) -> Arc<Services> {
    let services = Services::default();
    list(&services, all);
    let mut listed = None;
    services.take_slice(&mut listed, Event::Init);
    for slice in behind {
        services.take_slice(&mut listed, Event::InitApply(slice));
    }
    services.take_slice(&mut listed, Event::InitDone);
    Arc::new(services)
}

fn list(services: &Services, all: Vec<WatchedService>) {
    let mut listed = None;
    services.take_service(&mut listed, Event::Init);
    for service in all {
        services.take_service(&mut listed, Event::InitApply(service));
    }
    services.take_service(&mut listed, Event::InitDone);
}

fn web(ip: &str) -> WatchedService {
    let ports = json!([{"name": "http", "port": 80, "nodePort": 30_080}]);
    service("d/web", &json!({"clusterIP": ip, "ports": ports}), &[])
}

fn keys(all: &[Arc<Service>]) -> Vec<&str> {
    all.iter().map(|service| service.key.as_str()).collect()
}

fn at(services: &Services, ip: &str) -> Vec<String> {
    let all = services.at(ip.parse().unwrap());
    keys(&all).into_iter().map(str::to_owned).collect()
}

#[test]
fn names_are_those_of_services_and_of_their_endpoints() {
    let services = services(vec![web("10.96.0.9")], vec![]);
    let domain = "cluster.local";
    for (name, wanted) in [
        ("web.d.svc", Some(None)),
        ("web.d.svc.cluster.local", Some(None)),
        ("web-0.web.d.svc", Some(Some("web-0"))),
        ("10-0-0-1.web.d.svc.cluster.local", Some(Some("10-0-0-1"))),
        ("a.b.web.d.svc", None),
        ("web.d.svc.example.com", None),
        ("web.d.svccluster.local", None),
        ("web.e.svc", None),
        ("web.d.pod", None),
        ("d.svc", None),
        ("svc", None),
        (".svc", None),
    ] {
        let found = match services.named(name, domain) {
            Named::Service(found, host) => {
                assert_eq!(found.key, "d/web");
                Some(host)
            }
            Named::Nothing => None,
            Named::Unread => panic!("{name}"),
        };
        let wanted = wanted.map(|host: Option<&str>| host.map(str::to_owned));
        assert_eq!(found, wanted, "{name}");
    }
}

#[test]
fn nothing_is_said_before_both_kinds_were_read() {
    let services = Services::default();
    list(&services, vec![web("10.96.0.9")]);
    assert_eq!(services.named("web.d.svc", "x"), Named::Unread);
    assert_eq!(services.named("other.d.svc", "x"), Named::Unread);
    assert_eq!(services.named("web.d", "x"), Named::Nothing);
    assert_eq!(at(&services, "10.96.0.9"), Vec::<String>::new());
    assert_eq!(services.on_nodes(30_080), []);
    let mut listed = None;
    services.take_slice(&mut listed, Event::Init);
    services.take_slice(&mut listed, Event::InitDone);
    assert_eq!(at(&services, "10.96.0.9"), ["d/web"]);
    assert_eq!(keys(&services.on_nodes(30_080)), ["d/web"]);
}

#[test]
fn addresses_follow_their_services_and_a_list_counts_once_it_is_complete() {
    let services = services(vec![web("10.96.0.9")], vec![]);
    let mut listed = None;
    services.take_service(&mut listed, Event::Apply(web("10.96.0.8")));
    assert_eq!(at(&services, "10.96.0.9"), Vec::<String>::new());
    assert_eq!(at(&services, "10.96.0.8"), ["d/web"]);
    services.take_service(&mut listed, Event::Init);
    services.take_service(&mut listed, Event::InitApply(web("10.96.0.7")));
    assert_eq!(at(&services, "10.96.0.8"), ["d/web"]);
    services.take_service(&mut listed, Event::InitDone);
    assert_eq!(at(&services, "10.96.0.8"), Vec::<String>::new());
    assert_eq!(at(&services, "10.96.0.7"), ["d/web"]);
    services.take_service(&mut listed, Event::Delete(web("10.96.0.7")));
    assert_eq!(at(&services, "10.96.0.7"), Vec::<String>::new());
    assert_eq!(services.on_nodes(30_080), []);
    assert_eq!(services.named("web.d.svc", "x"), Named::Nothing);
}

#[test]
fn slices_follow_their_service() {
    let one = |key: &str, service: &str| slice(key, service, &json!([]), &json!([]));
    let services = services(
        vec![web("10.96.0.9")],
        vec![one("d/a", "web"), one("d/b", "web")],
    );
    let behind = || {
        let found = services.services.read().all.called("d/web").unwrap();
        services.behind(&found).len()
    };
    assert_eq!(behind(), 2);
    let mut listed = None;
    services.take_slice(&mut listed, Event::Apply(one("d/a", "other")));
    assert_eq!(behind(), 1, "it was given to another Service");
    services.take_slice(&mut listed, Event::Apply(one("e/a", "web")));
    assert_eq!(behind(), 1, "one of that name in another namespace");
    let mut orphan = one("d/b", "web");
    orphan.metadata.labels = None;
    services.take_slice(&mut listed, Event::Apply(orphan));
    assert_eq!(behind(), 0);
    services.take_slice(&mut listed, Event::Apply(one("d/b", "web")));
    services.take_slice(&mut listed, Event::Delete(one("d/b", "web")));
    assert_eq!(behind(), 0);
}

#[test]
fn of_a_service_its_tcp_ports_and_addresses_are_kept() {
    let kept = Service::trim(&service(
        "d/a",
        &json!({
            "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1", "127.0.0.1", "nonsense"],
            "externalIPs": ["203.0.113.9"], "externalTrafficPolicy": "Local",
            "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP"},
                {"name": "http", "port": 80, "nodePort": 30_080, "protocol": "TCP"},
                {"port": 443}, {"port": 0}, {"port": 70_000},
            ],
        }),
        &["198.51.100.1", "169.254.169.254"],
    ));
    let port = |name: &str, port, node_port| service::Port {
        name: name.into(),
        port,
        node_port,
    };
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    assert_eq!(
        kept.kind,
        Kind::Cluster(vec![ip("10.96.0.1"), ip("fd00::1")])
    );
    assert_eq!(kept.balanced, [ip("198.51.100.1")]);
    assert_eq!(
        kept.ports,
        [port("http", 80, Some(30_080)), port("", 443, None)]
    );
    assert_eq!(kept.listed(), "80, 443");
    assert!(kept.stays_local);
}

#[test]
fn a_balancer_that_does_more_than_to_lead_there_is_left_out() {
    for spec in [
        json!({"loadBalancerSourceRanges": ["192.0.2.0/24"]}),
        json!({"loadBalancerSourceRanges": []}),
    ] {
        let is_open = spec["loadBalancerSourceRanges"] == json!([]);
        let kept = Service::trim(&service("d/a", &spec, &["198.51.100.1"]));
        assert_eq!(kept.balanced.is_empty(), !is_open);
    }
    for (mode, leads) in [("VIP", true), ("Proxy", false)] {
        let mut watched = service("d/a", &json!({}), &["198.51.100.1"]);
        let ingress = watched
            .status
            .as_mut()
            .and_then(|it| it.load_balancer.as_mut());
        let ingress = ingress.and_then(|it| it.ingress.as_mut()).unwrap();
        ingress[0].ip_mode = Some(mode.to_owned());
        assert_eq!(
            !Service::trim(&watched).balanced.is_empty(),
            leads,
            "{mode}"
        );
    }
}

#[test]
fn of_a_slice_what_can_be_dialled_is_kept() {
    let pod = |namespace: &str| json!({"kind": "Pod", "namespace": namespace, "name": "p"});
    let endpoints = json!([
        {"addresses": ["10.0.0.1", "10.0.0.99"], "conditions": {}, "targetRef": pod("d"), "nodeName": "edge1", "hostname": "p"},
        {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
        {"addresses": ["10.0.0.3"], "targetRef": {"kind": "Node", "name": "edge1"}},
        {"addresses": ["10.0.0.4"], "targetRef": pod("other")},
        {"addresses": ["169.254.169.254"]}, {"addresses": ["127.0.0.1"]}, {"addresses": ["::1"]}, {"addresses": ["0.0.0.0"]},
        {"addresses": ["example.com"]}, {"addresses": []},
    ]);
    let ports = json!([
        {"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"},
        {"port": 9}, {"name": "all", "port": null}, {"name": "x", "port": 70_000},
    ]);
    let kept = Slice::trim(&slice("d/a", "web", &ports, &endpoints)).unwrap();
    assert_eq!(kept.service, "d/web");
    assert_eq!(kept.ports, [("http".into(), 8080), ("".into(), 9)]);
    let endpoint = |address: &str, is_ready| Endpoint {
        address: address.parse().unwrap(),
        is_ready,
        pod: None,
        node: None,
        hostname: None,
    };
    let first = Endpoint {
        pod: Some("d/p".into()),
        node: Some("edge1".into()),
        hostname: Some("p".into()),
        ..endpoint("10.0.0.1", true)
    };
    let wanted = [
        first,
        endpoint("10.0.0.2", false),
        endpoint("10.0.0.3", true),
    ];
    assert_eq!(kept.endpoints, wanted);
}

#[test]
fn no_more_is_kept_than_there_can_be() {
    let endpoint = |i: usize| json!({"addresses": [format!("10.1.{}.{}", i / 250, 1 + i % 250)]});
    let endpoints: Vec<_> = (0..10_000).map(endpoint).collect();
    let ports: Vec<_> = (1..10_000)
        .map(|port| json!({"name": format!("p{port}"), "port": port}))
        .collect();
    let watched = slice("d/a", "web", &json!(ports), &json!(endpoints));
    let kept = Slice::trim(&watched).unwrap();
    assert_eq!((kept.endpoints.len(), kept.ports.len()), (1_000, 1_000));
    let kept = Service::trim(&service("d/web", &json!({"ports": ports}), &[]));
    assert_eq!(kept.ports.len(), 1_000);
}
