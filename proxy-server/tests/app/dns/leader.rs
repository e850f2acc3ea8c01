//! Of several servers one writes: handing over, taking over, and what an old leader has under way.

use serde_json::json;

use super::{
    ADDRESSES, BRISK, LEASE, MAP, PATIENT, dns, holder, is_shown, is_text, of_maps, text, writer,
};
use crate::api::Api;
use crate::cluster::{edge, start, until_metric};
use crate::stack::eventually;

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
