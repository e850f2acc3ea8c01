//! Pods as destinations, from an emulated Kubernetes API: by name, by address, and while it is away.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::api::{Api, Mood};
use crate::cluster::{UNKNOWN, edge, is_told, node, start, told};
use crate::stack::{allow, eventually, shouter, within};

const ON: &str = "kubernetes: {kubeconfig: KUBECONFIG, pods: {}}";

/// A pod as Kubernetes has it.
pub(crate) fn pod(name: &str, node: &str, ip: &str) -> Value {
    json!({
        "metadata": {"namespace": "default", "name": name, "uid": format!("uid-of-{name}")},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 80}]}]},
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]},
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_reached_by_its_name_and_its_address() {
    let api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    api.put_pod(pod("web", "edge1", "10.244.1.5"));
    api.put_pod(pod("api", "edge1", "10.244.1.6"));
    let behind = json!({"corvid.io/agent": "edge1"});
    api.put(node("lathe", &json!({}), &behind, &["192.168.1.12"]));
    api.put_pod(pod("mill", "lathe", "10.244.9.6"));
    let mut stack = start(&api, ON);
    let mut tasks = JoinSet::new();
    let port = shouter(&mut tasks).await;
    // The agent takes the pod's address for one of its machine, and finds the pod at 127.0.0.1.
    let own = format!(
        "nodeAddresses: [10.244.1.5]\nlocalhostPorts: [{port}]\n{}",
        allow(&[port])
    );
    stack.agent("edge1", &own);
    stack.sessions("edge1", 1).await;
    for host in [
        "web.default.pod",
        "10.244.1.5",
        "10-244-1-5.default.pod.cluster.local",
    ] {
        let to = format!("{host}:{port}");
        is_told(&stack, &to, "200").await;
        let mut stream = stack.connect(&to).await.unwrap();
        stream.write_all(host.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        within(stream.read_to_string(&mut answer)).await.unwrap();
        assert_eq!(answer, host.to_uppercase());
    }
    // What the agent does not allow is not reached: ports that no container declares, and pods of another node.
    for (to, wanted) in [
        (
            "web.default.pod:81",
            "10.244.1.5:81 is not in the agent's allow-list",
        ),
        (
            "api.default.pod:81",
            "and pod default/api declares no such port",
        ),
        ("10.244.1.6:81", "and pod default/api declares no such port"),
        (
            "mill.default.pod:80",
            "and pod default/mill is on lathe, which `pods.nodes` does not have",
        ),
    ] {
        let denied = told(&stack, to).await;
        assert!(denied.contains("403 node "), "{denied}");
        assert!(denied.contains(wanted), "{denied}");
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_come_move_and_go_and_two_with_one_address_are_told_apart_by_name() {
    let api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    api.put(edge("edge2", &["192.168.1.11"]));
    api.put_pod(pod("one", "edge1", "10.244.1.5"));
    let ranges = "pools: {underlay: {agent: edge2, podNetworks: [10.250.0.0/16]}}";
    let stack = start(
        &api,
        &ON.replace("pods: {}", &format!("pods: {{}}, {ranges}")),
    );
    is_told(&stack, "10.244.1.5:80", "503 node edge1: no session").await;
    // Nobody's that is known, in the network of a pool.
    is_told(&stack, "10.250.7.7:80", "503 node edge2: no session").await;
    api.put_pod(pod("two", "edge2", "10.244.1.5"));
    let shared = "409 address 10.244.1.5 is that of pod default/one on edge1 and pod default/two on edge2: ask by name";
    is_told(&stack, "10.244.1.5:80", shared).await;
    is_told(&stack, "one.default.pod:80", "503 node edge1: no session").await;
    is_told(&stack, "two.default.pod:80", "503 node edge2: no session").await;
    let missing = "no pod three with an address in namespace default";
    is_told(&stack, "three.default.pod:80", missing).await;

    // It moves, ends, goes.
    api.put_pod(pod("two", "edge1", "10.244.1.6"));
    is_told(&stack, "10.244.1.6:80", "503 node edge1").await;
    is_told(&stack, "10.244.1.5:80", "503 node edge1").await;
    let mut ended = pod("one", "edge1", "10.244.1.5");
    ended["status"]["phase"] = json!("Succeeded");
    api.put_pod(ended);
    is_told(&stack, "10.244.1.5:80", UNKNOWN).await;
    api.delete_pod("two");
    is_told(&stack, "two.default.pod:80", "no pod two").await;
    // One whose network is its node's, as `edge` has it.
    is_told(
        &stack,
        "10.42.1.9:80",
        "10.42.1.9 is that of nodes edge1 and edge2",
    )
    .await;
    assert_eq!(api.seen("pods"), 1, "all of it came by the watch");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_stay_while_the_apiserver_is_away_and_are_read_anew_after_it() {
    let mut api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    api.put_pod(pod("web", "edge1", "10.244.1.5"));
    let stack = start(&api, ON);
    is_told(&stack, "10.244.1.5:80", "503 node edge1").await;
    api.down().await;
    let before = told(&stack, "web.default.pod:80").await;
    assert!(before.contains("503 node edge1"), "{before}");
    // What happens meanwhile, and a history that is forgotten.
    api.put_pod(pod("new", "edge1", "10.244.1.6"));
    api.delete_pod("web");
    api.compact();
    api.mood(Mood::Status(500));
    api.up().await;
    let seen = api.seen("pods") + api.seen("watch pods");
    eventually("it is asked again", || {
        api.seen("pods") + api.seen("watch pods") > seen + 1
    })
    .await;
    let away = told(&stack, "web.default.pod:80").await;
    assert!(away.contains("503 node edge1"), "{away}");
    api.mood(Mood::Well);
    is_told(&stack, "10.244.1.6:80", "503 node edge1").await;
    is_told(&stack, "web.default.pod:80", "no pod web").await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_section_no_pod_is_asked_for() {
    let api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    api.put_pod(pod("web", "edge1", "10.244.1.5"));
    let stack = start(&api, "");
    is_told(&stack, "192.168.1.10:10250", "503 node edge1").await;
    for to in ["10.244.1.5:80", "web.default.pod:80", "10.42.1.9:80"] {
        let line = told(&stack, to).await;
        assert!(line.contains(UNKNOWN), "{to}: {line}");
    }
    assert_eq!(api.seen("pods"), 0);
    stack.stop().await;
}
