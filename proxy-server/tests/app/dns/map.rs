//! What is in the map: names, where they point to, and what of it is others'.

use proxy_server::status::ClusterStatus;
use serde_json::json;

use super::{
    ADDRESSES, MAP, PATIENT, cloud, dns, holder, is_shown, is_text, of_maps, status, text,
    until_counted, writer,
};
use crate::api::Api;
use crate::api::objects::Write;
use crate::cluster::{edge, start, until_metric};
use crate::stack::eventually;

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
