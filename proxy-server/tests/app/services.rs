//! Services as destinations, from an emulated Kubernetes API: each kind by name and by address, as they change, while it is
//! away, and with what nobody should believe.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::api::{Api, Mood};
use crate::cluster::{UNKNOWN, edge, is_told, node, start, told};
use crate::pods::pod;
use crate::stack::{Stack, allow, eventually, shouter, within};

const ON: &str = "kubernetes: {kubeconfig: KUBECONFIG, pods: {}, services: {}}";
const IDLE: &str = "502 service default/web has no ready endpoint";
const NOT_AT_EDGE: &str = "403 service default/web has no endpoint at the edge";

fn service(name: &str, spec: &Value) -> Value {
    json!({"metadata": {"namespace": "default", "name": name}, "spec": spec, "status": {"loadBalancer": {}}})
}

/// One with an address of its own and port 80.
fn plain(name: &str, ip: &str) -> Value {
    let ports = json!([{"name": "http", "port": 80}]);
    service(
        name,
        &json!({"clusterIP": ip, "clusterIPs": [ip], "ports": ports}),
    )
}

fn slice(name: &str, service: &str, port: u16, endpoints: &[Value]) -> Value {
    json!({
        "metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
        "endpoints": endpoints,
    })
}

/// An endpoint that is ready, of that pod.
fn of_pod(name: &str, ip: &str) -> Value {
    json!({
        "addresses": [ip], "hostname": name, "conditions": {"ready": true},
        "targetRef": {"kind": "Pod", "namespace": "default", "name": name},
    })
}

/// What that destination answers to `hello`.
async fn asked(stack: &Stack, to: &str) -> String {
    is_told(stack, to, "200").await;
    let mut stream = stack.connect(to).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

/// A stand-in that answers with that word, whatever it is asked.
async fn says(word: &'static str, tasks: &mut JoinSet<()>) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tasks.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut text = Vec::new();
            if stream.read_to_end(&mut text).await.is_ok() {
                stream.write_all(word.as_bytes()).await.ok();
            }
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_of_service_is_reached_by_its_names_and_addresses() {
    let api = Api::start().await;
    let mut tasks = JoinSet::new();
    let port = shouter(&mut tasks).await;
    api.put(edge("edge1", &["192.168.1.10"]));
    api.put_pod(pod("web-0", "edge1", "10.244.1.5"));
    let mut web = service(
        "web",
        &json!({
            "type": "LoadBalancer", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00:96::1"],
            "externalIPs": ["203.0.113.7"],
            "ports": [{"name": "http", "port": 80, "nodePort": 30_080, "targetPort": "named"}, {"name": "u", "port": 53, "protocol": "UDP"}],
        }),
    );
    web["status"]["loadBalancer"]["ingress"] = json!([{"ip": "198.51.100.1"}]);
    api.put_service(web);
    api.put_service(service(
        "set",
        &json!({"clusterIP": "None", "ports": [{"name": "http", "port": 80}]}),
    ));
    api.put_service(service(
        "alias",
        &json!({"type": "ExternalName", "externalName": "web.default.svc.cluster.local"}),
    ));
    api.put_service(service(
        "ring",
        &json!({"type": "ExternalName", "externalName": "ring.default.svc"}),
    ));
    for name in ["web", "set"] {
        api.put_slice(slice(name, name, port, &[of_pod("web-0", "10.244.1.5")]));
    }
    let mut stack = start(&api, ON);
    // The agent takes the pod's address for one of its machine, and finds the pod at 127.0.0.1.
    let own = format!(
        "nodeAddresses: [10.244.1.5]\nlocalhostPorts: [{port}]\n{}",
        allow(&[port])
    );
    stack.agent("edge1", &own);
    stack.sessions("edge1", 1).await;
    for host in [
        "web.default.svc:80",
        "WEB.default.svc.cluster.local.:80",
        "10.96.0.1:80",
        "[fd00:96::1]:80",
        "198.51.100.1:80",
        "192.168.1.10:30080",
        "edge1:30080",
        "set.default.svc:PORT",
        "web-0.set.default.svc:PORT",
        "web-0.set.default.svc:80",
        "10-244-1-5.set.default.svc.cluster.local:80",
        "alias.default.svc:80",
    ] {
        let to = host.replace("PORT", &port.to_string());
        assert_eq!(asked(&stack, &to).await, "HELLO", "{to}");
    }
    for (to, wanted) in [
        (
            "web.default.svc:53",
            "403 service default/web has no TCP port 53 (ports: 80)",
        ),
        (
            "10.96.0.1:81",
            "403 service default/web has no TCP port 81 (ports: 80)",
        ),
        (
            "set.default.svc:81",
            "403 service default/set has no TCP port 81 (ports: 80)",
        ),
        (
            "web-1.set.default.svc:80",
            "403 service default/set has no endpoint web-1",
        ),
        (
            "ring.default.svc:80",
            "403 service default/ring is another name, and was led to by one",
        ),
        ("203.0.113.7:80", UNKNOWN),
        ("none.default.svc:80", UNKNOWN),
        // Not a NodePort of any Service: the node's own.
        ("192.168.1.10:30081", "403 node edge1"),
    ] {
        let line = told(&stack, to).await;
        assert!(line.contains(wanted), "{to}: {line}");
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_pods_with_one_address_behind_a_service_answer_each_for_itself() {
    let api = Api::start().await;
    let mut tasks = JoinSet::new();
    let (one, two) = (says("one", &mut tasks).await, says("two", &mut tasks).await);
    let mut stack = start(&api, ON);
    for (node, name, address, port) in [
        ("edge1", "a", "192.168.1.10", one),
        ("edge2", "b", "192.168.1.11", two),
    ] {
        api.put(edge(node, &[address]));
        api.put_pod(pod(name, node, "10.244.1.5"));
        api.put_slice(slice(
            &format!("web-{name}"),
            "web",
            port,
            &[of_pod(name, "10.244.1.5")],
        ));
        // Either agent would dial either port.
        let own = format!(
            "nodeAddresses: [10.244.1.5]\nlocalhostPorts: [{one}, {two}]\n{}",
            allow(&[one, two])
        );
        stack.agent(node, &own);
        stack.sessions(node, 1).await;
    }
    api.put_service(plain("web", "10.96.0.1"));
    assert_eq!(asked(&stack, "a.web.default.svc:80").await, "one");
    assert_eq!(asked(&stack, "b.web.default.svc:80").await, "two");
    let mut answers = std::collections::BTreeSet::new();
    let both = async {
        while answers.len() < 2 {
            answers.insert(asked(&stack, "10.96.0.1:80").await);
        }
    };
    within(both).await;
    assert_eq!(answers, ["one".to_owned(), "two".to_owned()].into());
    // The pod says whose the stream is, not the address.
    assert!(
        told(&stack, "10.244.1.5:80")
            .await
            .contains("409 address 10.244.1.5")
    );
    // Only one is left.
    let mut gone = of_pod("a", "10.244.1.5");
    gone["conditions"]["ready"] = json!(false);
    api.put_slice(slice("web-a", "web", one, &[gone]));
    is_told(
        &stack,
        "a.web.default.svc:80",
        "502 service default/web has no ready endpoint a",
    )
    .await;
    for _ in 0..20 {
        assert_eq!(asked(&stack, "10.96.0.1:80").await, "two");
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_and_endpoints_come_change_and_go() {
    let api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    api.put(edge("edge2", &["192.168.1.11"]));
    api.put(node("cloud1", &json!({}), &json!({}), &["10.0.0.2"]));
    for (name, node, ip) in [
        ("a", "edge1", "10.244.1.5"),
        ("b", "edge2", "10.244.2.5"),
        ("c", "cloud1", "10.244.0.5"),
    ] {
        api.put_pod(pod(name, node, ip));
    }
    let stack = start(&api, ON);
    is_told(&stack, "10.244.1.5:80", "503 node edge1").await;
    for to in ["web.default.svc:80", "10.96.0.1:80"] {
        let line = told(&stack, to).await;
        assert!(line.contains(UNKNOWN), "{to}: {line}");
    }
    api.put_service(plain("web", "10.96.0.1"));
    is_told(&stack, "web.default.svc:80", NOT_AT_EDGE).await;
    api.put_slice(slice("web-1", "web", 8080, &[of_pod("a", "10.244.1.5")]));
    is_told(&stack, "web.default.svc:80", "503 node edge1: no session").await;
    // Another pod, and another address of the Service.
    api.put_slice(slice("web-1", "web", 8080, &[of_pod("b", "10.244.2.5")]));
    is_told(&stack, "web.default.svc:80", "503 node edge2").await;
    api.put_service(plain("web", "10.96.0.2"));
    is_told(&stack, "10.96.0.2:80", "503 node edge2").await;
    is_told(&stack, "10.96.0.1:80", UNKNOWN).await;
    // It goes to the cloud, and comes back by another slice.
    api.put_slice(slice("web-1", "web", 8080, &[of_pod("c", "10.244.0.5")]));
    is_told(&stack, "10.96.0.2:80", NOT_AT_EDGE).await;
    api.put_slice(slice("web-2", "web", 8080, &[of_pod("a", "10.244.1.5")]));
    is_told(&stack, "10.96.0.2:80", "503 node edge1").await;
    // The pod behind an endpoint moves before its slice tells.
    api.put_pod(pod("a", "edge1", "10.244.1.6"));
    is_told(&stack, "10.244.1.6:80", "503 node edge1").await;
    api.delete_slice("web-1");
    is_told(&stack, "10.96.0.2:80", IDLE).await;
    api.put_slice(slice("web-2", "web", 8080, &[of_pod("a", "10.244.1.6")]));
    is_told(&stack, "10.96.0.2:80", "503 node edge1").await;
    api.delete_service("web");
    is_told(&stack, "10.96.0.2:80", UNKNOWN).await;
    is_told(&stack, "web.default.svc:80", UNKNOWN).await;
    assert_eq!(
        (api.seen("services"), api.seen("all slices")),
        (1, 1),
        "all of it came by watches"
    );
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_stay_while_the_apiserver_is_away_and_are_read_anew_after_it() {
    let mut api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    api.put_pod(pod("a", "edge1", "10.244.1.5"));
    // More than a page of each.
    for i in 0..60 {
        let name = format!("w{i:02}");
        api.put_service(plain(&name, &format!("10.96.1.{}", i + 1)));
        api.put_slice(slice(&name, &name, 8080, &[of_pod("a", "10.244.1.5")]));
    }
    let stack = start(&api, ON);
    for to in ["w00.default.svc:80", "w59.default.svc:80", "10.96.1.60:80"] {
        is_told(&stack, to, "503 node edge1").await;
    }
    api.down().await;
    // What happens meanwhile, and a history that is forgotten.
    api.put_service(plain("new", "10.96.0.2"));
    api.put_slice(slice("new", "new", 8080, &[of_pod("a", "10.244.1.5")]));
    api.delete_service("w00");
    api.compact();
    api.mood(Mood::Status(500));
    api.up().await;
    let count = || api.seen("services") + api.seen("watch services");
    let seen = count();
    eventually("it is asked again", || count() > seen + 1).await;
    for to in ["w00.default.svc:80", "10.96.1.60:80"] {
        let away = told(&stack, to).await;
        assert!(away.contains("503 node edge1"), "{to}: {away}");
    }
    api.mood(Mood::Well);
    is_told(&stack, "10.96.0.2:80", "503 node edge1").await;
    is_told(&stack, "w00.default.svc:80", UNKNOWN).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_as_large_as_they_may_be_keep_nothing_from_being_read() {
    let api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    let fat = || json!({"a": "x".repeat(250 << 10)});
    for i in 0..60 {
        let mut large = pod(&format!("p{i:02}"), "edge1", &format!("10.244.1.{}", i + 1));
        large["metadata"]["annotations"] = fat();
        api.put_pod(large);
        let mut large = plain(&format!("s{i:02}"), &format!("10.96.0.{}", i + 1));
        large["metadata"]["annotations"] = fat();
        api.put_service(large);
        let name = format!("s{i:02}");
        let behind = [of_pod(&format!("p{i:02}"), &format!("10.244.1.{}", i + 1))];
        let mut large = slice(&name, &name, 8080, &behind);
        large["metadata"]["annotations"] = fat();
        api.put_slice(large);
    }
    let stack = start(&api, ON);
    for to in ["10.244.1.60:80", "10.96.0.60:80", "s59.default.svc:80"] {
        is_told(&stack, to, "503 node edge1: no session").await;
    }
    // Many of them in one watch, too.
    for _ in 0..8 {
        for i in 0..60 {
            let mut large = plain(&format!("s{i:02}"), &format!("10.96.1.{}", i + 1));
            large["metadata"]["annotations"] = fat();
            api.put_service(large);
        }
    }
    is_told(&stack, "10.96.1.60:80", "503 node edge1: no session").await;
    assert_eq!(api.seen("services"), 2, "two pages, and one watch");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_service_or_a_slice_says_falsely_leads_nowhere() {
    let api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    // A kubelet that claims the address of a Service in the cloud.
    api.put(edge("edge2", &["192.168.1.11", "10.96.0.2"]));
    api.put(node("cloud1", &json!({}), &json!({}), &["10.0.0.2"]));
    api.put_pod(pod("a", "edge1", "10.244.1.5"));
    api.put_pod(pod("c", "cloud1", "10.244.0.5"));
    let mut other = pod("secret", "edge1", "10.244.1.9");
    other["metadata"]["namespace"] = json!("other");
    api.put_pod(other);
    for (name, ip) in [
        ("web", "10.96.0.1"),
        ("cloud", "10.96.0.2"),
        ("many", "10.96.0.3"),
        ("kubelet", "10.96.0.4"),
    ] {
        api.put_service(plain(name, ip));
    }
    api.put_slice(slice("cloud", "cloud", 8080, &[of_pod("c", "10.244.0.5")]));
    // As many as nobody can have, and one of them real.
    let many = (0..10_000_u32)
        .map(|i| json!({"addresses": [format!("100.64.{}.{}", i / 250, 1 + i % 250)]}));
    let many: Vec<_> = std::iter::once(of_pod("a", "10.244.1.5"))
        .chain(many)
        .collect();
    api.put_slice(slice("many", "many", 8080, &many));
    // A node's own port, by a Service's NodePort.
    let ports = json!([{"name": "http", "port": 80, "nodePort": 10_250}]);
    api.put_service(service(
        "kubelet",
        &json!({"clusterIP": "10.96.0.4", "ports": ports}),
    ));
    api.put_slice(slice(
        "kubelet",
        "kubelet",
        8080,
        &[of_pod("a", "10.244.1.5")],
    ));
    let stack = start(&api, ON);
    is_told(&stack, "10.96.0.3:80", "503 node edge1: no session").await;
    is_told(&stack, "10.96.0.4:80", "503 node edge1: no session").await;
    let cloud = "403 service default/cloud has no endpoint at the edge";
    is_told(&stack, "10.96.0.2:10250", cloud).await;
    is_told(&stack, "192.168.1.11:10250", "503 node edge2: no session").await;
    for (lie, said) in [
        (json!({"addresses": ["169.254.169.254"]}), NOT_AT_EDGE),
        (json!({"addresses": ["127.0.0.1"]}), NOT_AT_EDGE),
        (json!({"addresses": ["::1"]}), NOT_AT_EDGE),
        (json!({"addresses": ["localhost"]}), NOT_AT_EDGE),
        (json!({"addresses": []}), NOT_AT_EDGE),
        // A pod at the edge, at an address that is not its own.
        (of_pod("a", "10.244.0.5"), IDLE),
        (of_pod("a", "192.168.1.10"), IDLE),
        // One of another namespace, by its name and by its address.
        (
            json!({"addresses": ["10.244.1.9"], "targetRef": {"kind": "Pod", "namespace": "other", "name": "secret"}}),
            NOT_AT_EDGE,
        ),
        (
            json!({"addresses": ["10.244.1.9"], "nodeName": "edge1"}),
            NOT_AT_EDGE,
        ),
        // What a kubelet claims, and no slice says.
        (json!({"addresses": ["192.168.1.11"]}), NOT_AT_EDGE),
        (
            json!({"addresses": ["192.168.1.11"], "nodeName": "edge1"}),
            NOT_AT_EDGE,
        ),
    ] {
        api.put_slice(slice("web", "web", 80, std::slice::from_ref(&lie)));
        is_told(&stack, "10.96.0.1:80", said).await;
        // The next lie is seen to be one only if this one was put right in between.
        api.put_slice(slice("web", "web", 80, &[of_pod("a", "10.244.1.5")]));
        is_told(&stack, "10.96.0.1:80", "503 node edge1").await;
    }
    // Nobody's: as any address of which nothing is known.
    api.put_slice(slice("web", "web", 80, &[of_pod("nobody", "10.244.1.5")]));
    is_told(&stack, "10.96.0.1:80", NOT_AT_EDGE).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_are_about_the_node_and_port_that_are_dialled() {
    let api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    // An endpoint that is the node's kubelet, and a name for it.
    api.put_service(plain("sly", "10.96.0.1"));
    api.put_slice(slice(
        "sly",
        "sly",
        10_250,
        &[json!({"addresses": ["192.168.1.10"], "nodeName": "edge1"})],
    ));
    api.put_service(service(
        "name",
        &json!({"type": "ExternalName", "externalName": "edge1"}),
    ));
    let stack = start(&api, ON);
    is_told(&stack, "10.96.0.1:80", "503 node edge1: no session").await;
    is_told(
        &stack,
        "name.default.svc:10250",
        "503 node edge1: no session",
    )
    .await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_section_no_service_is_asked_for() {
    let api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    api.put_pod(pod("a", "edge1", "10.244.1.5"));
    api.put_service(plain("web", "10.96.0.1"));
    api.put_slice(slice("web", "web", 80, &[of_pod("a", "10.244.1.5")]));
    let stack = start(&api, "kubernetes: {kubeconfig: KUBECONFIG, pods: {}}");
    is_told(&stack, "10.244.1.5:80", "503 node edge1").await;
    for to in ["10.96.0.1:80", "web.default.svc:80"] {
        let line = told(&stack, to).await;
        assert!(line.contains(UNKNOWN), "{to}: {line}");
    }
    assert_eq!((api.seen("services"), api.seen("all slices")), (0, 0));
    stack.stop().await;
}
