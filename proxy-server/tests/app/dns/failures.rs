//! What can not be asked, read or written is told, and the map stays as it is.

use serde_json::json;

use super::{
    ADDRESSES, MAP, PATIENT, dns, is_shown, is_text, of_maps, status, text, until_counted,
};
use crate::api::{Api, Mood};
use crate::cluster::{edge, start, until_metric};
use crate::stack::eventually;

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
