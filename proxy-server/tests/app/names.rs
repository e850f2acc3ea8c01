//! The map of node names for CoreDNS: written by the one server that leads, and by no other.

use serde_json::{Value, json};

use crate::api::{Api, Mood};
use crate::cluster::{edge, node, start};
use crate::stack::{Stack, eventually};

const MAP: &str = "/api/v1/namespaces/kube-system/configmaps/edge-tunnel-nodes";
const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/corvid/leases/corvid-proxy-server";
const SERVICE: &str = "/api/v1/namespaces/corvid/services/proxy-server";

/// Fast enough for a test; the times' order is that of the defaults.
const LEASE_TIMES: &str = "lease: {duration: 2s, renewDeadline: 1s, retryPeriod: 100ms}";

fn writer(api: &Api, dns: &str) -> Stack {
    start(
        api,
        &format!("kubernetes: {{kubeconfig: KUBECONFIG, {LEASE_TIMES}, dns: {dns}}}"),
    )
}

const BY_ADDRESS: &str = "{addresses: [10.96.0.50]}";

/// What the map says.
fn said(api: &Api) -> String {
    let map = api.object(MAP).unwrap_or_default();
    map["data"]["tunnel-nodes"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

async fn says(api: &Api, wanted: &str) {
    eventually(&format!("the map says {wanted:?}"), || said(api) == wanted).await;
}

fn holder(api: &Api) -> String {
    let lease = api.object(LEASE).unwrap_or_default();
    lease["spec"]["holderIdentity"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

async fn until_metric(stack: &Stack, name: &str, value: f64) {
    crate::cluster::until_metric(stack, name, value).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_map_follows_the_nodes_and_is_repaired() {
    let api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    api.put(node("cloud1", &json!({}), &json!({}), &["10.0.0.2"]));
    // As Raven left it: other keys and labels are not ours.
    api.put_object(
        MAP,
        json!({"metadata": {"name": "edge-tunnel-nodes", "labels": {"of": "raven"}}, "data": {"tunnel-nodes": "old", "other": "kept"}}),
    );
    let stack = writer(&api, BY_ADDRESS);
    says(&api, "10.0.0.2\tcloud1\n10.96.0.50\tedge1\n").await;
    let map = api.object(MAP).unwrap();
    assert_eq!(map["data"]["other"], "kept");
    assert_eq!(map["metadata"]["labels"], json!({"of": "raven"}));
    assert_eq!(stack.metric("corvid_leader").await, 1.0);

    api.put(edge("edge2", &["192.168.1.10"]));
    says(
        &api,
        "10.0.0.2\tcloud1\n10.96.0.50\tedge1\n10.96.0.50\tedge2\n",
    )
    .await;
    api.delete("edge1");
    let wanted = "10.0.0.2\tcloud1\n10.96.0.50\tedge2\n";
    says(&api, wanted).await;

    api.put_object(
        MAP,
        json!({"metadata": {"name": "edge-tunnel-nodes"}, "data": {"tunnel-nodes": "nonsense"}}),
    );
    says(&api, wanted).await;
    api.delete_object(MAP);
    says(&api, wanted).await;

    // Away and back: what changed meanwhile is caught up with, and nothing was emptied.
    api.mood(Mood::Status(503));
    api.put(edge("edge3", &["192.168.3.10"]));
    until_metric(&stack, "corvid_leader", 0.0).await;
    assert_eq!(said(&api), wanted);
    api.mood(Mood::Well);
    says(
        &api,
        "10.0.0.2\tcloud1\n10.96.0.50\tedge2\n10.96.0.50\tedge3\n",
    )
    .await;
    let status = daemon::admin::client::get(&stack.admin, "/cluster")
        .await
        .unwrap();
    let status: proxy_server::status::ClusterStatus = serde_json::from_slice(&status).unwrap();
    let dns = status.dns.clone().unwrap();
    assert!(dns.leads && dns.names == Some(3), "{dns:?}");
    assert!(
        status
            .lines()
            .contains("dns: this server writes kube-system/edge-tunnel-nodes; 3 names"),
        "{}",
        status.lines()
    );
    stack.stop().await;
    assert_eq!(holder(&api), "", "the Lease is given away");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_servers_one_writes_and_the_next_one_leads_at_once_when_it_stops() {
    let api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    let first = writer(&api, BY_ADDRESS);
    until_metric(&first, "corvid_leader", 1.0).await;
    says(&api, "10.96.0.50\tedge1\n").await;
    let second = writer(&api, "{addresses: [10.96.0.51]}");
    let led_by = holder(&api);
    // It has looked at the Lease, and it is not its own.
    let seen = api.seen("get");
    eventually("both look at the Lease", || api.seen("get") > seen + 20).await;
    assert_eq!(second.metric("corvid_leader").await, 0.0);
    assert_eq!(holder(&api), led_by);
    assert_eq!(said(&api), "10.96.0.50\tedge1\n");
    first.stop().await;
    until_metric(&second, "corvid_leader", 1.0).await;
    says(&api, "10.96.0.51\tedge1\n").await;
    assert_ne!(holder(&api), led_by);
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_does_not_renew_is_followed_by_another_and_writes_no_more() {
    let api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    // A leader that was killed: its Lease is there, and nobody renews it.
    let lease = |holder: &str| json!({"metadata": {"name": "corvid-proxy-server"}, "spec": {"holderIdentity": holder, "leaseDurationSeconds": 2, "renewTime": "2099-01-01T00:00:00.000000Z"}});
    api.put_object(LEASE, lease("killed"));
    let stack = writer(&api, BY_ADDRESS);
    until_metric(&stack, "corvid_leader", 1.0).await;
    says(&api, "10.96.0.50\tedge1\n").await;
    // Somebody else takes it, whatever its reasons: this server leads no more, and leaves the map alone.
    api.put_object(LEASE, lease("usurper"));
    until_metric(&stack, "corvid_leader", 0.0).await;
    assert_eq!(holder(&api), "usurper");
    stack.stop().await;
    assert_eq!(
        holder(&api),
        "usurper",
        "only one's own Lease is given away"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_point_to_the_addresses_of_the_service_and_what_is_wrong_with_it_is_said() {
    let api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.10"]));
    let stack = writer(&api, "{service: corvid/proxy-server}");
    let failed = |result: &str| format!("corvid_dns_writes_total{{result=\"{result}\"}}");
    let at_least_one = async |name: &str| {
        let name = failed(name);
        let read = async {
            while stack.metric(&name).await < 1.0 {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        assert!(
            tokio::time::timeout(crate::stack::DEADLINE, read)
                .await
                .is_ok(),
            "{name}"
        );
    };
    at_least_one("no_service").await;
    let service = |ips: Value| json!({"metadata": {"name": "proxy-server"}, "spec": {"clusterIP": ips[0], "clusterIPs": ips}});
    api.put_object(SERVICE, service(json!(["None"])));
    at_least_one("headless_service").await;
    assert_eq!(api.object(MAP), None, "nothing is written meanwhile");
    api.put_object(SERVICE, service(json!(["10.96.0.7", "fd96::7"])));
    says(&api, "10.96.0.7\tedge1\nfd96::7\tedge1\n").await;
    api.put_object(SERVICE, service(json!(["10.96.0.8"])));
    says(&api, "10.96.0.8\tedge1\n").await;
    // Too much beside what others keep there.
    let others = "x".repeat((1 << 20) - 10);
    api.put_object(
        MAP,
        json!({"metadata": {"name": "edge-tunnel-nodes"}, "data": {"other": others}}),
    );
    at_least_one("too_large").await;
    assert_eq!(said(&api), "");
    stack.stop().await;
}
