//! How nodes are read and followed, and that nothing is lost while that fails.

use std::time::Duration;

use tokio::task::JoinSet;

use super::{UNKNOWN, edge, is_told, start, told, until_metric};
use crate::api::{Api, Mood};
use crate::stack::{allow, eventually, shouter};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_route_is_lost_while_the_apiserver_is_away() {
    let mut api = Api::start().await;
    api.put(edge("edge1", &["192.168.1.1"]));
    api.put(edge("edge2", &["192.168.1.2"]));
    let stack = start(&api, "");
    is_told(&stack, "edge1:1", "503 node edge1").await;
    let all_are_there = async || {
        for to in ["edge1:1", "192.168.1.1:1", "edge2:1", "192.168.1.2:1"] {
            let line = told(&stack, to).await;
            assert!(line.contains("503 node edge"), "{to}: {line}");
        }
    };
    // Refused connections, then errors of each kind, until several were seen; routes are there throughout.
    api.down().await;
    while stack.metric("corvid_cluster_failures_total").await < 3.0 {
        all_are_there().await;
    }
    api.mood(Mood::Status(500));
    api.up().await;
    for code in [500, 503, 429, 403, 401] {
        api.mood(Mood::Status(code));
        let before = stack.metric("corvid_cluster_failures_total").await;
        while stack.metric("corvid_cluster_failures_total").await < before + 1.0 {
            all_are_there().await;
        }
    }
    assert_eq!(
        stack.metric("corvid_cluster_synced").await,
        1.0,
        "it was, once"
    );
    // What happened meanwhile is caught up with.
    api.delete("edge2");
    api.put(edge("edge3", &["192.168.1.3"]));
    api.mood(Mood::Well);
    is_told(&stack, "edge3:1", "503 node edge3").await;
    is_told(&stack, "edge2:1", UNKNOWN).await;
    assert!(told(&stack, "edge1:1").await.contains("503 node edge1"));
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_410_all_is_read_anew_without_a_gap() {
    let mut api = Api::start().await;
    let names: Vec<_> = (0..1200).map(|i| format!("edge{i:04}")).collect();
    api.put_all(names.iter().map(|name| edge(name, &[])));
    let stack = start(&api, "");
    is_told(&stack, "edge1199:1", "503 node edge1199").await;
    assert_eq!(
        (api.seen("list"), api.seen("list+")),
        (1, 2),
        "pages of 500"
    );

    // In the watch: it is behind, and history is gone. One node goes and one comes unseen.
    api.down().await;
    api.delete("edge0000");
    api.put(edge("new", &[]));
    api.compact();
    api.mood(Mood::PagesGone);
    api.up().await;
    // The new list fails at its second page, again and again; nothing is lost by its half.
    while api.seen("list+") < 5 {
        for to in ["edge0000:1", "edge1199:1"] {
            let line = told(&stack, to).await;
            assert!(line.contains("503 node edge"), "{to}: {line}");
        }
    }
    api.mood(Mood::Well);
    is_told(&stack, "new:1", "503 node new").await;
    assert!(told(&stack, "edge0000:1").await.contains(UNKNOWN));

    // At the watch's start, as a plain status: resuming would fail for ever.
    let lists = api.seen("list");
    api.down().await;
    api.mood(Mood::Status(410));
    api.up().await;
    let failures = stack.metric("corvid_cluster_failures_total").await;
    while stack.metric("corvid_cluster_failures_total").await < failures + 1.0 {
        assert!(told(&stack, "new:1").await.contains("503 node new"));
    }
    api.put(edge("newer", &[]));
    api.mood(Mood::Well);
    is_told(&stack, "newer:1", "503 node newer").await;
    assert!(api.seen("list") > lists);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_watch_resumes_at_its_bookmark() {
    let mut api = Api::start().await;
    api.put(edge("edge1", &[]));
    let stack = start(&api, "");
    is_told(&stack, "edge1:1", "503 node edge1").await;
    // A change behind the bookmark shows that the bookmark has arrived.
    api.bookmark();
    api.put(edge("edge2", &[]));
    is_told(&stack, "edge2:1", "503 node edge2").await;
    api.compact();
    api.bookmark();
    let watches = api.seen("watch");
    api.down().await;
    api.up().await;
    api.put(edge("edge3", &[]));
    is_told(&stack, "edge3:1", "503 node edge3").await;
    assert!(api.seen("watch") > watches);
    assert_eq!(api.seen("list"), 1, "nothing was read anew");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_ends_each_watch_at_once_is_asked_ever_slower_and_followed_all_the_same() {
    const WATCHES: usize = 5;
    let api = Api::start().await;
    api.put(edge("edge1", &[]));
    api.mood(Mood::EndsWatches);
    let began = tokio::time::Instant::now();
    let stack = start(&api, "");
    eventually("watches", || api.seen("watch") >= WATCHES).await;
    // Pauses of at least 0.2, 0.4, 0.8 and 1.6 s are between them.
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(3), "{WATCHES} in {took:?}");
    api.put(edge("edge2", &[]));
    is_told(&stack, "edge2:1", "503 node edge2").await;
    assert_eq!(stack.metric("corvid_cluster_failures_total").await, 0.0);
    api.mood(Mood::Well);
    api.put(edge("edge3", &[]));
    is_told(&stack, "edge3:1", "503 node edge3").await;
    assert_eq!(api.seen("list"), 1, "nothing was read anew");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_is_ready_and_serves_before_the_first_sync() {
    let mut api = Api::start().await;
    api.down().await;
    api.put(edge("labelled", &[]));
    let mut stack = start(&api, "routes: [{node: configured}]");
    let mut tasks = JoinSet::new();
    let port = shouter(&mut tasks).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    until_metric(&stack, "corvid_cluster_synced", 0.0).await;
    let ready = daemon::admin::client::get(&stack.observe, "/readyz").await;
    assert!(
        ready.is_ok(),
        "kube-apiserver may wait for this server: {ready:?}"
    );
    is_told(&stack, &format!("edge1:{port}"), "200").await;
    assert!(
        told(&stack, "configured:1")
            .await
            .contains("503 node configured")
    );
    let line = told(&stack, "labelled:1").await;
    assert!(
        line.contains("the cluster's nodes are not known yet"),
        "{line}"
    );
    api.up().await;
    is_told(&stack, "labelled:1", "503 node labelled").await;
    until_metric(&stack, "corvid_cluster_synced", 1.0).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_nodes_are_read_and_all_are_found() {
    const NODES: usize = 10_000;
    let name = |i: usize| format!("edge{i:05}");
    let address = |i: usize| format!("10.{}.{}.{}", i >> 16, (i >> 8) & 255, i & 255);
    let api = Api::start().await;
    api.put_all((0..NODES).map(|i| edge(&name(i), &[&address(i)])));
    // The rest of this process, the API among it, is in these numbers too: the difference is the server's.
    let before = resident();
    let began = tokio::time::Instant::now();
    let stack = start(&api, "");
    is_told(
        &stack,
        &format!("{}:1", name(NODES - 1)),
        "503 node edge09999",
    )
    .await;
    let (took, after) = (began.elapsed(), resident());
    assert_eq!(
        stack.metric("corvid_cluster_nodes{kind=\"edge\"}").await,
        10_000.0
    );
    for i in (0..NODES).step_by(97) {
        let wanted = format!("503 node {}: no session", name(i));
        for to in [name(i), address(i)] {
            let line = told(&stack, &format!("{to}:10250")).await;
            assert!(line.contains(&wanted), "{to}: {line}");
        }
    }
    let began = tokio::time::Instant::now();
    api.put(edge("late", &["10.200.0.1"]));
    is_told(&stack, "10.200.0.1:1", "503 node late").await;
    println!(
        "{NODES} nodes: read after {took:?}, {} MiB more resident; one more is routed after {:?}",
        after.saturating_sub(before) >> 20,
        began.elapsed()
    );
    stack.stop().await;
}

/// Bytes of this process in memory.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<usize>()
        .unwrap()
        << 10
}
