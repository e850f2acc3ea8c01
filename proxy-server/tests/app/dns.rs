//! Node names as a ConfigMap for CoreDNS, written to an emulated Kubernetes API by the one server that leads.

use proxy_server::status::{ClusterStatus, DnsStatus};
use serde_json::{Value, json};

use crate::api::objects::Write;
use crate::api::{Api, Mood};
use crate::cluster::{edge, node, start, until_metric};
use crate::stack::{DEADLINE, Stack, eventually};

const MAP: &str = "kube-system/edge-tunnel-nodes";
const LEASE: &str = "corvid/corvid-proxy-server";
/// Nobody takes over by waiting, whatever is slow here.
const PATIENT: &str = "lease: {duration: 1h, renewDeadline: 10m, retryPeriod: 100ms}";
/// Taking over takes 6 s.
const BRISK: &str = "lease: {duration: 6s, renewDeadline: 4s, retryPeriod: 100ms}";
const ADDRESSES: &str = "dns: {addresses: [10.96.0.50, 'fd00::50']}";

fn dns(lease: &str, dns: &str) -> String {
    format!("kubernetes: {{kubeconfig: KUBECONFIG, {lease}, {dns}}}")
}

fn cloud(name: &str, address: &str) -> Value {
    node(name, &json!({}), &json!({}), &[address])
}

fn text(api: &Api) -> Option<String> {
    let map = api.object("configmaps", MAP)?;
    map["data"]["tunnel-nodes"].as_str().map(ToOwned::to_owned)
}

/// Which server wrote the map last.
fn writer(api: &Api) -> Option<String> {
    let map = api.object("configmaps", MAP)?;
    let annotation = &map["metadata"]["annotations"]["corvid.io/written-by"];
    annotation.as_str().map(ToOwned::to_owned)
}

fn holder(api: &Api) -> Option<String> {
    let lease = api.object("leases", LEASE)?;
    lease["spec"]["holderIdentity"]
        .as_str()
        .map(ToOwned::to_owned)
}

async fn is_text(api: &Api, wanted: &str) {
    let mut last = None;
    let read = async {
        loop {
            last = text(api);
            if last.as_deref() == Some(wanted) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    let in_time = tokio::time::timeout(DEADLINE, read).await;
    assert!(in_time.is_ok(), "never {wanted:?}, but {last:?}");
}

/// What `proxy-server status` is told, and shows.
async fn status(stack: &Stack) -> (DnsStatus, String) {
    let body = daemon::admin::client::get(&stack.admin, "/cluster")
        .await
        .unwrap();
    let cluster: ClusterStatus = serde_json::from_slice(&body).unwrap();
    let lines = cluster.lines();
    (cluster.dns.unwrap(), lines)
}

async fn is_shown(stack: &Stack, wanted: &str) {
    let mut last = String::new();
    let read = async {
        while !last.contains(wanted) {
            last = status(stack).await.1;
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    let in_time = tokio::time::timeout(DEADLINE, read).await;
    assert!(in_time.is_ok(), "never {wanted:?}, but {last:?}");
}

fn of_maps(write: &&Write) -> bool {
    write.what.ends_with(" configmaps")
}

async fn until_counted(stack: &Stack, result: &str) {
    let name = format!("corvid_dns_writes_total{{result=\"{result}\"}}");
    let read = async {
        while stack.metric(&name).await < 1.0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    assert!(
        tokio::time::timeout(DEADLINE, read).await.is_ok(),
        "never {result}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_always_dialled_as_routes_lead_is_left_to_itself() {
    let api = Api::start().await;
    let said = |name: &str, addresses: &[&str], path: &str| {
        let mut node = edge(name, addresses);
        node["metadata"]["annotations"] = json!({"corvid.io/path": path});
        node
    };
    // Only one of them is on a line, and whose the others are nobody has looked.
    let several = ["172.16.0.1", "192.168.1.11", "fd00::11"];
    api.put(said("auto", &["192.168.1.10"], "auto"));
    api.put(said("direct", &several, "direct"));
    api.put(said("interface", &["10.9.0.1"], "direct"));
    // Its word leads to no address that no line has.
    api.put(said("liar", &["203.0.113.1"], "direct"));
    let lines = "lines: [{name: plain, networks: [192.168.0.0/16]}, {name: other, networks: [10.0.0.0/8], interface: lo}]";
    let one = "dns: {addresses: [10.96.0.50]}";
    let stack = start(&api, &format!("{}\n{lines}", dns(PATIENT, one)));
    let before =
        "10.96.0.50\tauto\n192.168.1.11\tdirect\n10.96.0.50\tinterface\n10.96.0.50\tliar\n";
    is_text(&api, before).await;
    api.put(said("direct", &several, "tunnel"));
    is_text(&api, &before.replace("192.168.1.11", "10.96.0.50")).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_map_follows_nodes_and_agents_and_nothing_else_of_it_is_touched() {
    let api = Api::start().await;
    // As Raven leaves it, with what somebody else keeps in it.
    let before = json!({
        "metadata": {"labels": {"l": "1"}, "annotations": {"a": "b"}},
        "data": {"tunnel-nodes": "10.96.0.1\tcloud1\n10.96.0.1\tedge1", "other": "stays"},
        "binaryData": {"more": "AAAA"},
    });
    api.set("configmaps", MAP, before);
    api.put(edge("edge1", &["192.168.1.10"]));
    api.put(cloud("cloud1", "10.0.0.2"));
    api.put(cloud("joiner", "10.0.0.3"));
    let mut stack = start(&api, &dns(PATIENT, ADDRESSES));
    is_text(
        &api,
        "10.0.0.2\tcloud1\n10.96.0.50\tedge1\nfd00::50\tedge1\n10.0.0.3\tjoiner\n",
    )
    .await;
    until_metric(&stack, "corvid_leader", 1.0).await;

    // Nodes come, change and go.
    api.put(edge("edge2", &["192.168.1.10"]));
    is_text(
        &api,
        "10.0.0.2\tcloud1\n10.96.0.50\tedge1\nfd00::50\tedge1\n10.96.0.50\tedge2\nfd00::50\tedge2\n10.0.0.3\tjoiner\n",
    )
    .await;
    api.put(cloud("cloud1", "10.0.0.4"));
    api.delete("edge1");
    is_text(
        &api,
        "10.0.0.4\tcloud1\n10.96.0.50\tedge2\nfd00::50\tedge2\n10.0.0.3\tjoiner\n",
    )
    .await;
    // A node whose agent is known is at the edge, labels or not; so is one in `routes`.
    stack.agent("joiner", "");
    stack.sessions("joiner", 1).await;
    let edges = "10.96.0.50\tedge2\nfd00::50\tedge2\n10.96.0.50\tjoiner\nfd00::50\tjoiner\n";
    is_text(&api, &format!("10.0.0.4\tcloud1\n{edges}")).await;
    let file = stack.dir.path().join("proxy-server.yaml");
    let with_route = crate::stack::text(&file) + "routes: [{node: cloud1}]\n";
    std::fs::write(&file, with_route).unwrap();
    stack.reload.reload();
    is_text(
        &api,
        &format!("10.96.0.50\tcloud1\nfd00::50\tcloud1\n{edges}"),
    )
    .await;

    let map = api.object("configmaps", MAP).unwrap();
    assert_eq!(map["data"]["other"], "stays");
    assert_eq!(map["binaryData"], json!({"more": "AAAA"}));
    assert_eq!(map["metadata"]["labels"], json!({"l": "1"}));
    assert_eq!(map["metadata"]["annotations"]["a"], "b");
    let leader = holder(&api).unwrap();
    assert_eq!(writer(&api).unwrap(), leader);
    assert!(leader.starts_with("proxy-1_"), "{leader}");

    // What is as it should be is looked at and not written.
    let (looks, writes) = (api.asked("GET configmaps"), api.writes());
    eventually("it is looked at again", || {
        api.asked("GET configmaps") >= looks + 3
    })
    .await;
    let maps = |writes: &[Write]| writes.iter().filter(of_maps).count();
    assert_eq!(maps(&api.writes()), maps(&writes));
    assert!(stack.metric("corvid_dns_age_seconds").await >= 0.0);
    let (told, shown) = status(&stack).await;
    assert!(told.leads && told.failure.is_none() && told.lease_failure.is_none());
    let wanted = "dns: this server writes kube-system/edge-tunnel-nodes; 3 names, as it should be ";
    assert!(shown.contains(wanted), "{shown}");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_servers_one_writes_and_when_it_stops_the_other_leads_at_once() {
    let api = Api::start().await;
    let door = api.another_door().await;
    api.put(edge("edge1", &[]));
    let settings = dns(PATIENT, ADDRESSES);
    let (one, two) = (start(&api, &settings), start(&door, &settings));
    is_text(&api, "10.96.0.50\tedge1\nfd00::50\tedge1\n").await;
    let (first, second, left, right) = match one.metric("corvid_leader").await {
        1.0 => (one, two, &api, &door),
        _ => (two, one, &door, &api),
    };
    let leader = holder(&api).unwrap();
    is_shown(&second, &format!("dns: {leader} writes {MAP}")).await;
    assert_eq!(second.metric("corvid_leader").await, 0.0);
    assert_eq!(second.metric("corvid_dns_age_seconds").await, -1.0);
    assert_eq!(right.asked("GET configmaps"), 0);

    api.put(edge("edge2", &[]));
    let both = "10.96.0.50\tedge1\nfd00::50\tedge1\n10.96.0.50\tedge2\nfd00::50\tedge2\n";
    is_text(&api, both).await;
    // The Lease holds for an hour: only what is given away can be had now.
    first.stop().await;
    until_metric(&second, "corvid_leader", 1.0).await;
    eventually("the new leader's name is in the map", || {
        writer(&api) == holder(&api)
    })
    .await;
    assert_ne!(writer(&api).unwrap(), leader);
    api.delete("edge1");
    is_text(&api, "10.96.0.50\tedge2\nfd00::50\tedge2\n").await;
    let lease = api.object("leases", LEASE).unwrap();
    assert_eq!(lease["spec"]["leaseTransitions"], 1, "{lease}");
    let writes = api.writes();
    let doors = writes.iter().filter(of_maps).map(|write| write.door);
    let after: Vec<_> = doors.skip_while(|by| *by == left.number()).collect();
    let alone = !after.is_empty() && after.iter().all(|by| *by == right.number());
    assert!(alone, "the old leader wrote after the new one had begun");

    // The last one goes, and another comes.
    second.stop().await;
    assert_eq!(holder(&api), None);
    let third = start(&api, &settings);
    until_metric(&third, "corvid_leader", 1.0).await;
    third.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_can_not_renew_writes_no_more_although_it_could() {
    let (api, door) = {
        let api = Api::start().await;
        let door = api.another_door().await;
        (api, door)
    };
    api.put(edge("edge1", &[]));
    let settings = dns(BRISK, ADDRESSES);
    let old = start(&api, &settings);
    is_text(&api, "10.96.0.50\tedge1\nfd00::50\tedge1\n").await;
    let first = holder(&api).unwrap();
    let new = start(&door, &settings);
    is_shown(&new, &format!("dns: {first} writes {MAP}")).await;

    // Its requests for the map would still be served.
    api.refuse("leases", 500);
    until_metric(&old, "corvid_leader", 0.0).await;
    is_shown(&old, "lease: kube-apiserver: refused by the test (500)").await;
    api.put(edge("edge2", &[]));
    until_metric(&new, "corvid_leader", 1.0).await;
    let both = "10.96.0.50\tedge1\nfd00::50\tedge1\n10.96.0.50\tedge2\nfd00::50\tedge2\n";
    is_text(&api, both).await;
    let second = holder(&api).unwrap();
    assert_ne!(first, second);

    // It comes back, and follows.
    api.refuse_nothing();
    is_shown(&old, &format!("dns: {second} writes {MAP}")).await;
    api.delete("edge1");
    is_text(&api, "10.96.0.50\tedge2\nfd00::50\tedge2\n").await;
    assert_eq!(old.metric("corvid_leader").await, 0.0);
    assert_eq!(holder(&api).unwrap(), second);
    let writes = api.writes();
    let mut maps = writes.iter().filter(of_maps).map(|write| write.door);
    assert_eq!(
        maps.by_ref().find(|by| *by == door.number()),
        Some(door.number())
    );
    assert!(
        maps.all(|by| by == door.number()),
        "the old leader has written"
    );
    old.stop().await;
    new.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_cut_off_leader_has_under_way_is_refused_when_it_arrives() {
    let mut api = Api::start().await;
    let door = api.another_door().await;
    api.put(edge("edge1", &[]));
    let settings = dns(BRISK, ADDRESSES);
    let old = start(&api, &settings);
    is_text(&api, "10.96.0.50\tedge1\nfd00::50\tedge1\n").await;
    let new = start(&door, &settings);
    let first = holder(&api).unwrap();

    // The old leader's next write is on its way for very long, and then nothing of it comes through at all. What it was
    // for is over before the new one leads, so that the map is as it should be but for who wrote it.
    api.hold("PATCH configmaps");
    api.put(edge("edge2", &[]));
    eventually("a write is under way", || api.waiting() == 1).await;
    api.down().await;
    api.delete("edge2");
    until_metric(&new, "corvid_leader", 1.0).await;
    until_metric(&old, "corvid_leader", 0.0).await;
    let second = holder(&api).unwrap();
    assert_ne!(first, second);
    eventually("the new leader has written", || {
        writer(&api).as_ref() == Some(&second)
    })
    .await;
    api.release();
    eventually("it arrives", || api.waiting() == 0).await;
    let writes = api.writes();
    let late = writes
        .iter()
        .rfind(|write| write.what == "PATCH configmaps" && write.door == 0);
    let late = late.unwrap();
    assert!(
        late.body["data"]["tunnel-nodes"]
            .as_str()
            .unwrap()
            .contains("edge2")
    );
    assert_eq!(late.code, 409);
    assert_eq!(
        text(&api).as_deref(),
        Some("10.96.0.50\tedge1\nfd00::50\tedge1\n")
    );
    assert_eq!(writer(&api), Some(second.clone()));

    // Back again, it follows.
    api.up().await;
    is_shown(&old, &format!("dns: {second} writes {MAP}")).await;
    old.stop().await;
    new.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_others_change_is_repaired_and_what_is_theirs_is_kept() {
    let api = Api::start().await;
    api.put(edge("edge1", &[]));
    let stack = start(&api, &dns(PATIENT, ADDRESSES));
    let wanted = "10.96.0.50\tedge1\nfd00::50\tedge1\n";
    is_text(&api, wanted).await;
    let made = api
        .writes()
        .into_iter()
        .find(|write| write.what == "POST configmaps")
        .unwrap();
    assert_eq!(made.code, 200);

    api.set(
        "configmaps",
        MAP,
        json!({"data": {"tunnel-nodes": "10.0.0.9\tedge1\n", "other": "new"}}),
    );
    is_text(&api, wanted).await;
    assert_eq!(
        api.object("configmaps", MAP).unwrap()["data"]["other"],
        "new"
    );
    api.set("configmaps", MAP, json!({"data": {"other": "new"}}));
    is_text(&api, wanted).await;
    api.remove("configmaps", MAP);
    is_text(&api, wanted).await;

    // Somebody else writes just when we do.
    api.hold("PATCH configmaps");
    api.put(edge("edge2", &[]));
    eventually("a write is under way", || api.waiting() == 1).await;
    api.set(
        "configmaps",
        MAP,
        json!({"data": {"tunnel-nodes": wanted, "other": "newer"}}),
    );
    api.release();
    is_text(
        &api,
        "10.96.0.50\tedge1\nfd00::50\tedge1\n10.96.0.50\tedge2\nfd00::50\tedge2\n",
    )
    .await;
    assert_eq!(
        api.object("configmaps", MAP).unwrap()["data"]["other"],
        "newer"
    );
    until_counted(&stack, "conflict").await;
    assert_eq!(stack.metric("corvid_leader").await, 1.0);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_while_the_apiserver_is_away() {
    let mut api = Api::start().await;
    api.put(edge("edge1", &[]));
    let stack = start(&api, &dns(PATIENT, ADDRESSES));
    is_text(&api, "10.96.0.50\tedge1\nfd00::50\tedge1\n").await;
    api.down().await;
    until_counted(&stack, "unavailable").await;
    is_shown(&stack, "dns: ask kube-apiserver: ").await;
    let ready = daemon::admin::client::get(&stack.observe, "/readyz").await;
    assert!(ready.is_ok(), "{ready:?}");
    api.put(edge("edge2", &[]));
    api.delete("edge1");
    api.up().await;
    is_text(&api, "10.96.0.50\tedge2\nfd00::50\tedge2\n").await;
    is_shown(&stack, "1 names, as it should be 0 s ago").await;
    let (told, _) = status(&stack).await;
    assert_eq!((told.failure, told.lease_failure), (None, None));
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_written_before_all_nodes_were_read_nor_from_a_list_that_failed() {
    let mut api = Api::start().await;
    let old = json!({"data": {"tunnel-nodes": "10.96.0.1\tedge1\n"}});
    api.set("configmaps", MAP, old);
    api.put_all((0..600).map(|i| edge(&format!("edge{i:03}"), &[])));
    api.mood(Mood::PagesGone);
    let stack = start(&api, &dns(PATIENT, ADDRESSES));
    until_metric(&stack, "corvid_leader", 1.0).await;
    let looks = api.asked("GET leases");
    eventually("the leader has had time", || {
        api.asked("GET leases") > looks + 25
    })
    .await;
    assert!(api.seen("list+") > 0, "a part of the nodes was read");
    assert_eq!(api.asked("GET configmaps"), 0);
    assert_eq!(text(&api).as_deref(), Some("10.96.0.1\tedge1\n"));
    is_shown(
        &stack,
        "dns: this server writes kube-system/edge-tunnel-nodes; not done yet",
    )
    .await;

    api.mood(Mood::Well);
    let names = |api: &Api| text(api).unwrap().lines().count();
    eventually("all nodes are there", || names(&api) == 1200).await;
    // All is read anew, and again a part of it only.
    let (writes, lists) = (
        api.writes().iter().filter(of_maps).count(),
        api.seen("list+"),
    );
    api.down().await;
    api.compact();
    api.mood(Mood::PagesGone);
    api.up().await;
    eventually("lists have failed", || api.seen("list+") > lists + 3).await;
    let looks = api.asked("GET configmaps");
    eventually("the map was compared", || {
        api.asked("GET configmaps") > looks + 2
    })
    .await;
    assert_eq!(names(&api), 1200);
    assert_eq!(api.writes().iter().filter(of_maps).count(), writes);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_point_to_the_service_as_long_as_it_has_an_address() {
    let api = Api::start().await;
    let old = "10.96.0.1\tedge1\n";
    api.set("configmaps", MAP, json!({"data": {"tunnel-nodes": old}}));
    api.put(edge("edge1", &[]));
    let stack = start(&api, &dns(PATIENT, "dns: {service: corvid/tunnel}"));
    is_shown(&stack, "dns: Service corvid/tunnel does not exist").await;
    until_counted(&stack, "no_service").await;
    let headless = json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}});
    api.set("services", "corvid/tunnel", headless);
    is_shown(
        &stack,
        "dns: Service corvid/tunnel has no ClusterIP, so node names can't point to it",
    )
    .await;
    until_counted(&stack, "headless_service").await;
    assert_eq!(text(&api).as_deref(), Some(old));
    assert!(
        daemon::admin::client::get(&stack.observe, "/readyz")
            .await
            .is_ok()
    );

    let both = json!({"spec": {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00::7"]}});
    api.set("services", "corvid/tunnel", both);
    is_text(&api, "10.96.0.7\tedge1\nfd00::7\tedge1\n").await;
    is_shown(&stack, "1 names, as it should be ").await;
    // Made anew, it has another address.
    api.remove("services", "corvid/tunnel");
    is_shown(&stack, "dns: Service corvid/tunnel does not exist").await;
    assert_eq!(
        text(&api).as_deref(),
        Some("10.96.0.7\tedge1\nfd00::7\tedge1\n")
    );
    api.set(
        "services",
        "corvid/tunnel",
        json!({"spec": {"clusterIP": "10.96.0.8"}}),
    );
    is_text(&api, "10.96.0.8\tedge1\n").await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_written_is_named_and_the_map_stays() {
    let api = Api::start().await;
    let old = "10.96.0.1\tedge1\n";
    let full = json!({"data": {"tunnel-nodes": old, "other": "x".repeat((1 << 20) - 20)}});
    api.set("configmaps", MAP, full);
    api.put(edge("edge1", &[]));
    let stack = start(&api, &dns(PATIENT, ADDRESSES));
    is_shown(&stack, "are more than the 1048576 that a ConfigMap holds").await;
    until_counted(&stack, "too_large").await;
    let writes = |api: &Api| api.writes().iter().filter(of_maps).count();
    assert_eq!((text(&api).as_deref(), writes(&api)), (Some(old), 0));

    api.refuse("PATCH configmaps", 403);
    api.set("configmaps", MAP, json!({"data": {"tunnel-nodes": old}}));
    is_shown(&stack, "dns: refused by the test (403)").await;
    until_counted(&stack, "refused").await;
    assert_eq!(text(&api).as_deref(), Some(old));
    assert_eq!(stack.metric("corvid_leader").await, 1.0);

    api.set(
        "configmaps",
        MAP,
        json!({"immutable": true, "data": {"tunnel-nodes": old}}),
    );
    api.refuse_nothing();
    is_shown(
        &stack,
        "dns: field is immutable when `immutable` is set (422)",
    )
    .await;
    api.set("configmaps", MAP, json!({"data": {"tunnel-nodes": old}}));
    is_text(&api, "10.96.0.50\tedge1\nfd00::50\tedge1\n").await;
    stack.stop().await;

    // Where nothing can be made at all.
    let nowhere = "dns: {addresses: [10.96.0.50], configMap: nowhere/map, key: nodes}";
    let stack = start(&api, &dns(PATIENT, nowhere));
    is_shown(&stack, "dns: namespaces \"nowhere\" not found").await;
    until_counted(&stack, "missing").await;
    stack.stop().await;
    let stack = start(
        &api,
        &dns(&format!("namespace: nowhere, {PATIENT}"), ADDRESSES),
    );
    is_shown(&stack, "lease: namespaces \"nowhere\" not found").await;
    is_shown(
        &stack,
        "dns: nobody is known to write kube-system/edge-tunnel-nodes",
    )
    .await;
    assert_eq!(stack.metric("corvid_leader").await, 0.0);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_is_followed_and_a_lease_that_another_takes_is_left_to_it() {
    let api = Api::start().await;
    api.put(edge("edge1", &[]));
    // Nobody renews it, whatever the time in it says.
    let lease = |holder: &str| json!({"spec": {"holderIdentity": holder, "leaseDurationSeconds": 2, "renewTime": "2099-01-01T00:00:00.000000Z"}});
    api.set("leases", LEASE, lease("killed"));
    let stack = start(&api, &dns(PATIENT, ADDRESSES));
    is_shown(&stack, "dns: killed writes kube-system/edge-tunnel-nodes").await;
    assert_eq!(api.object("configmaps", MAP), None);
    until_metric(&stack, "corvid_leader", 1.0).await;
    is_text(&api, "10.96.0.50\tedge1\nfd00::50\tedge1\n").await;
    let mut taken = lease("usurper");
    taken["spec"]["leaseDurationSeconds"] = json!(3600);
    api.set("leases", LEASE, taken);
    until_metric(&stack, "corvid_leader", 0.0).await;
    let writes = api.writes().len();
    api.put(edge("edge2", &[]));
    let looks = api.asked("GET leases");
    eventually("it has had time", || api.asked("GET leases") > looks + 20).await;
    assert_eq!(api.writes().len(), writes);
    stack.stop().await;
    assert_eq!(
        holder(&api).as_deref(),
        Some("usurper"),
        "only one's own is given away"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_nodes_are_one_map() {
    const NODES: usize = 10_000;
    let api = Api::start().await;
    api.put_all((0..NODES).map(|i| match i % 2 {
        0 => edge(&format!("edge{i:05}"), &[]),
        _ => cloud(
            &format!("cloud{i:05}"),
            &format!("10.{}.{}.{}", i >> 16, (i >> 8) & 255, i & 255),
        ),
    }));
    let stack = start(&api, &dns(PATIENT, "dns: {addresses: [10.96.0.50]}"));
    eventually("all are in it", || {
        text(&api).is_some_and(|text| text.lines().count() == NODES)
    })
    .await;
    let began = tokio::time::Instant::now();
    api.put(edge("late", &[]));
    eventually("one more is", || {
        text(&api).is_some_and(|text| text.ends_with("\n10.96.0.50\tlate\n"))
    })
    .await;
    println!(
        "{NODES} nodes are {} KiB; one more is written after {:?}",
        text(&api).unwrap().len() >> 10,
        began.elapsed()
    );
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_section_nothing_is_asked_or_written() {
    let api = Api::start().await;
    api.put(edge("edge1", &[]));
    let stack = start(&api, "");
    until_metric(&stack, "corvid_cluster_synced", 1.0).await;
    let body = daemon::admin::client::get(&stack.admin, "/cluster")
        .await
        .unwrap();
    let cluster: ClusterStatus = serde_json::from_slice(&body).unwrap();
    assert_eq!(cluster.dns, None);
    stack.stop().await;
    assert!(api.writes().is_empty());
    assert_eq!(
        (api.asked("GET leases"), api.asked("GET configmaps")),
        (0, 0)
    );
}
