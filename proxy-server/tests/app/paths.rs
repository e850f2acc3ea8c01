//! Which way nodes are reached, as people see it: `nodes`, service discovery, metrics, and Events on the Nodes.

use std::sync::LazyLock;
use std::time::Duration;

use proxy_server::status::{NodeStatus, PathStatus, node_table, path_table};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::allow::LINES;
use crate::api::Api;
use crate::cluster::{edge, start};
use crate::line::{
    LINE, QUICK, Site, carries, kubelet_at, probed, route, sites, switched, until_at_least,
    until_word, who,
};
use crate::scrape::{BASIC, ask};
use crate::stack::{DEADLINE, Stack, allow, eventually};

async fn nodes(stack: &Stack) -> Vec<NodeStatus> {
    let body = daemon::admin::client::get(&stack.admin, "/nodes").await;
    serde_json::from_slice(&body.unwrap()).unwrap()
}

/// Waits until that node is reached as `fits` wants it.
async fn until_path(stack: &Stack, node: &str, fits: impl Fn(&PathStatus) -> bool) -> PathStatus {
    let mut last = None;
    let seen = async {
        loop {
            let nodes = nodes(stack).await;
            let found = nodes.into_iter().find(|it| it.node == node);
            last = found.and_then(|found| found.path);
            if last.as_ref().is_some_and(&fits) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let in_time = tokio::time::timeout(DEADLINE, seen).await;
    assert!(in_time.is_ok(), "{node}: {last:#?}");
    last.unwrap()
}

/// The labels of that node's target.
async fn discovered(stack: &Stack, node: &str) -> Value {
    let request =
        format!("GET /sd/kubelet HTTP/1.1\r\nHost: x\r\n{BASIC}\r\nConnection: close\r\n\r\n");
    let (line, body) = ask(stack, &request).await;
    assert!(line.starts_with("HTTP/1.1 200"), "{line}");
    let groups: Vec<Value> = serde_json::from_str(&body).unwrap();
    let found = groups
        .into_iter()
        .find(|group| group["labels"]["node"] == node);
    found.unwrap()["labels"].clone()
}

fn is_labelled(labels: &Value, path: &str, in_use: &str, line: Option<&str>) {
    assert_eq!(labels["__meta_corvid_path"], path, "{labels}");
    assert_eq!(labels["__meta_corvid_path_in_use"], in_use, "{labels}");
    assert_eq!(
        labels.get("__meta_corvid_line").and_then(Value::as_str),
        line,
        "{labels}"
    );
}

async fn printed(
    stack: &Stack,
    command: fn(&std::path::Path, bool) -> anyhow::Result<String>,
) -> String {
    let socket = stack.dir.path().join("admin.sock");
    let asked = move || command(&socket, false).unwrap();
    tokio::task::spawn_blocking(asked).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_node_is_shown_with_the_way_in_use_and_how_both_ways_do() {
    let api = Api::start().await;
    let (_agents, [mut site]) = sites(["127.0.0.9"]);
    let port = site.port();
    let to = format!("edge1:{port}");
    api.put(edge("edge2", &["192.168.1.11"]));
    let mut stack = probed(&api, port);
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    until_word(&stack, &to, "line 127.0.0.9").await;
    let path = until_path(&stack, "edge1", |path| {
        let health = path.line.as_ref().and_then(|line| line.health.as_ref());
        path.since_s.is_some() && health.is_some_and(|health| health.rtt_ms.is_some())
    })
    .await;
    assert_eq!(
        (
            path.mode.as_str(),
            path.in_use.as_str(),
            path.words.as_str()
        ),
        ("auto", "direct", "direct by express")
    );
    assert_eq!(path.why, "configured lines: auto");
    let line = path.line.unwrap();
    assert_eq!(
        (line.name.as_str(), line.address.as_str()),
        ("express", "127.0.0.9")
    );
    is_labelled(
        &discovered(&stack, "edge1").await,
        "auto",
        "direct",
        Some("express"),
    );
    is_labelled(&discovered(&stack, "edge2").await, "tunnel", "none", None);

    // So many packets that what is lost of them says something.
    site.fall_silent().await;
    until_at_least(&stack, &switched("down"), 1.0).await;
    let path = until_path(&stack, "edge1", |path| path.in_use == "tunnel").await;
    assert_eq!(path.words, "tunnel (down on express)");
    for _ in 0..50 {
        assert_eq!(who(&stack, &to).await, "tunnel");
    }
    let path = until_path(&stack, "edge1", |path| {
        path.tunnel.as_ref().is_some_and(|it| it.loss.is_some())
    })
    .await;
    let tunnel = path.tunnel.unwrap();
    assert!(
        tunnel.rtt_ms > 0.0 && tunnel.rtt_ms < 10_000.0,
        "{tunnel:?}"
    );
    assert!((0.0..=0.5).contains(&tunnel.loss.unwrap()), "{tunnel:?}");
    let health = path.line.unwrap().health.unwrap();
    assert!(!health.up && health.loss.unwrap() > 0.0, "{health:?}");
    is_labelled(
        &discovered(&stack, "edge1").await,
        "auto",
        "tunnel",
        Some("express"),
    );

    let shown = printed(&stack, proxy_server::commands::nodes).await;
    let (first, second) = shown.split_once("\n\n").unwrap();
    assert!(
        first.starts_with("NODE ") && first.contains("SOURCE"),
        "{shown}"
    );
    let header = second.lines().next().unwrap();
    for column in ["NODE", "PATH", "SINCE", "LINE", "TUNNEL", "WHY"] {
        assert!(header.contains(column), "{shown}");
    }
    assert!(
        second.contains("edge1  tunnel (down on express)")
            && second.contains("configured lines: auto"),
        "{shown}"
    );
    assert!(
        second.contains("edge2  none (no session)") && second.contains("path.default: tunnel"),
        "{shown}"
    );
    assert!(second.lines().all(|line| line.len() <= 120), "{shown}");
    let status = printed(&stack, proxy_server::commands::status).await;
    assert!(
        status.contains("edge1  tunnel (down on express)"),
        "{status}"
    );
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_lines_nothing_is_said_of_ways() {
    let api = Api::start().await;
    let mut node = edge("edge1", &["192.168.1.10"]);
    node["metadata"]["annotations"] = json!({"corvid.io/path": "direct"});
    api.put(node);
    let stack = start(&api, "");
    crate::cluster::is_told(&stack, "edge1:1", "503 node edge1").await;
    let nodes = nodes(&stack).await;
    assert!(nodes.iter().all(|node| node.path.is_none()), "{nodes:?}");
    assert_eq!(path_table(&nodes), None);
    let shown = printed(&stack, proxy_server::commands::nodes).await;
    assert_eq!(shown, node_table(&nodes));
    let labels = discovered(&stack, "edge1").await;
    assert_eq!(labels["__meta_corvid_path"], "tunnel", "{labels}");
    assert!(api.events().is_empty());
    stack.stop().await;
}

fn annotated(port: u16, path: &str) -> Value {
    let mut node = kubelet_at(port);
    node["metadata"]["annotations"] = json!({"corvid.io/path": path});
    node
}

/// Waits for an Event with that reason on that node, whose note has that, and which was told so often.
async fn until_event(api: &Api, reason: &str, note: &str, times: u64) -> Value {
    let fits = |event: &Value| {
        let count = event["series"]["count"].as_u64().unwrap_or(1);
        let said = event["note"].as_str().unwrap();
        event["reason"] == reason && said.contains(note) && count == times
    };
    let seen = async {
        loop {
            if let Some(event) = api.events().into_iter().find(fits) {
                return event;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let in_time = tokio::time::timeout(DEADLINE, seen).await;
    in_time.unwrap_or_else(|_| panic!("{reason} {note:?} {times} times: {:#?}", api.events()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_annotation_acts_on_the_next_request_and_cuts_nothing_that_runs() {
    let api = Api::start().await;
    let (_agents, [site]) = sites(["127.0.0.9"]);
    let port = site.port();
    let to = format!("edge1:{port}");
    let mut stack = probed(&api, port);
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    until_path(&stack, "edge1", |path| path.since_s.is_some()).await;
    let mut by_line = until_word(&stack, &to, "line 127.0.0.9").await;
    carries(&mut by_line).await;

    // `kubectl annotate node edge1 corvid.io/path=tunnel`
    let asked = Instant::now();
    api.put(annotated(port, "tunnel"));
    let mut by_tunnel = until_word(&stack, &to, "tunnel").await;
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(who(&stack, &to).await, "tunnel");
    carries(&mut by_line).await;
    let path = until_path(&stack, "edge1", |path| path.mode == "tunnel").await;
    assert_eq!(path.why, "annotation corvid.io/path: tunnel");
    assert_eq!((path.words.as_str(), path.line), ("tunnel", None));
    is_labelled(&discovered(&stack, "edge1").await, "tunnel", "tunnel", None);
    let wanted = "go through the tunnel; annotation corvid.io/path: tunnel";
    until_event(&api, "PathChanged", wanted, 1).await;

    // `kubectl annotate node edge1 corvid.io/path-`
    api.put(kubelet_at(port));
    until_word(&stack, &to, "line 127.0.0.9").await;
    carries(&mut by_line).await;
    carries(&mut by_tunnel).await;
    let wanted = "go by line express; configured lines: auto";
    until_event(&api, "PathChanged", wanted, 1).await;
    stack.stop().await;
}

/// The line goes down, or comes back.
async fn turns(stack: &Stack, site: &mut Site, to: &str, times: f64) {
    match to {
        "down" => site.fall_silent().await,
        _ => site.answer(),
    }
    until_at_least(stack, &switched(to), times).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_has_an_event_each_time_its_line_fails_and_returns() {
    let api = Api::start().await;
    let (_agents, [mut site]) = sites(["127.0.0.9"]);
    let mut stack = probed(&api, site.port());
    stack.agent("edge1", &allow(&[site.port()]));
    stack.sessions("edge1", 1).await;
    until_at_least(&stack, "corvid_line_nodes", 1.0).await;
    until_at_least(&stack, "corvid_line_probes_total", 1.0).await;
    turns(&stack, &mut site, "down", 1.0).await;
    let by = "requests to this node by proxy-server proxy-1 ";
    let down = format!("{by}go through the tunnel, as the node is down on line express");
    let event = until_event(&api, "LineDown", &down, 1).await;
    assert_eq!(event["type"], "Warning");
    assert_eq!(
        event["regarding"],
        json!({"apiVersion": "v1", "kind": "Node", "name": "edge1", "uid": "uid-of-edge1"})
    );
    assert_eq!(event["metadata"]["namespace"], "default");
    assert_eq!(event["reportingController"], "corvid.io/proxy-server");
    assert_eq!(event["reportingInstance"], "proxy-1");
    assert!(event["action"].as_str().unwrap().starts_with("UseTunnel-"));

    turns(&stack, &mut site, "up", 1.0).await;
    let up = until_event(&api, "LineUp", &format!("{by}go by line express"), 1).await;
    assert_eq!(up["type"], "Normal");
    // Within minutes the same is one Event that counts,
    turns(&stack, &mut site, "down", 2.0).await;
    until_event(&api, "LineDown", &down, 2).await;
    assert_eq!(api.events().len(), 2, "{:#?}", api.events());
    // and another one, if somebody has deleted that.
    let name = event["metadata"]["name"].as_str().unwrap();
    api.remove("events", &format!("default/{name}"));
    turns(&stack, &mut site, "up", 2.0).await;
    until_event(&api, "LineUp", by, 2).await;
    turns(&stack, &mut site, "down", 3.0).await;
    until_event(&api, "LineDown", &down, 1).await;
    until_at_least(&stack, "corvid_node_events_total{result=\"ok\"}", 5.0).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_a_whole_line_fails_each_of_its_nodes_has_an_event() {
    let api = Api::start().await;
    let (_agents, mut all) = sites(["127.0.0.9", "127.0.0.10", "127.0.0.11"]);
    let names = ["edge1", "edge2", "edge3"];
    let addresses = ["127.0.0.9", "127.0.0.10", "127.0.0.11"];
    for name in names {
        let mut node = kubelet_at(all[0].port());
        node["metadata"]["name"] = json!(name);
        node["metadata"]["uid"] = json!(format!("uid-of-{name}"));
        api.put(node);
    }
    let routes: Vec<_> = names
        .iter()
        .zip(addresses)
        .map(|(name, address)| route(name, address))
        .collect();
    let more = format!(
        "kubernetes: {{kubeconfig: KUBECONFIG}}\n{LINE}{QUICK}routes: [{}]",
        routes.join(", ")
    );
    let stack = start(&api, &more);
    // Each has been well: a line is judged by those.
    for name in names {
        let well = |path: &PathStatus| {
            let health = path.line.as_ref().and_then(|line| line.health.as_ref());
            path.since_s.is_some() && health.is_some_and(|health| health.rtt_ms.is_some())
        };
        until_path(&stack, name, well).await;
    }
    for site in &mut all {
        site.fall_silent().await;
    }
    let of_line =
        |to| format!("corvid_line_switches_total{{line=\"express\",of=\"line\",to=\"{to}\"}}");
    until_at_least(&stack, &of_line("down"), 1.0).await;
    for site in &mut all {
        site.answer();
    }
    until_at_least(&stack, &of_line("up"), 1.0).await;
    for name in names {
        until_path(&stack, name, |path| {
            path.in_use == "direct" && path.words == "direct by express"
        })
        .await;
        for reason in ["LineDown", "LineUp"] {
            eventually(&format!("{reason} of {name}"), || {
                let told = |event: &Value| {
                    event["reason"] == reason
                        && event["regarding"]["uid"] == format!("uid-of-{name}")
                };
                api.events().iter().any(told)
            })
            .await;
        }
    }
    stack.stop().await;
}

/// Lines of the log about Events on that node.
fn said(node: &str, what: &str) -> usize {
    let text = String::from_utf8(LINES.lock().clone()).unwrap();
    let lines = text.lines().filter_map(|it| serde_json::from_str(it).ok());
    let fits = |line: &Value| {
        let message = line["message"].as_str().unwrap_or_default();
        line["node"] == node && message.contains(what)
    };
    lines.filter(fits).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_are_not_taken_are_told_once_and_hold_up_nothing() {
    LazyLock::force(&LINES);
    let api = Api::start().await;
    let (_agents, [site]) = sites(["127.0.0.9"]);
    let port = site.port();
    let of = |path: &str| {
        let mut node = annotated(port, path);
        node["metadata"]["name"] = json!("untold");
        node
    };
    api.put(of("auto"));
    let more = format!(
        "kubernetes: {{kubeconfig: KUBECONFIG}}\n{LINE}{QUICK}routes: [{}]",
        route("untold", "127.0.0.9")
    );
    let mut stack = start(&api, &more);
    stack.agent("untold", &allow(&[port]));
    stack.sessions("untold", 1).await;
    let to = format!("untold:{port}");
    until_path(&stack, "untold", |path| path.since_s.is_some()).await;

    let failed = |result: &str| format!("corvid_node_events_total{{result=\"{result}\"}}");
    // Not granted, then no answer at all: the ways are changed all the same.
    api.refuse("events", 403);
    let mut words = ["tunnel", "auto"].iter().cycle();
    let mut turn = async || {
        let path = *words.next().unwrap();
        let wanted = match path {
            "tunnel" => "tunnel",
            _ => "line 127.0.0.9",
        };
        api.put(of(path));
        until_word(&stack, &to, wanted).await;
        let seen = |it: &PathStatus| it.mode == path && it.since_s.is_some();
        until_path(&stack, "untold", seen).await;
    };
    for count in 1_u8..=3 {
        turn().await;
        until_at_least(&stack, &failed("refused"), count.into()).await;
    }
    api.refuse_nothing();
    api.refuse("events", 500);
    turn().await;
    until_at_least(&stack, &failed("unavailable"), 1.0).await;
    assert_eq!(said("untold", "are not taken"), 1);
    api.refuse_nothing();
    api.hold("events");
    // What could not be told is told if it is still so: it is not after one turn, and is after two.
    turn().await;
    turn().await;
    eventually("one is held", || api.waiting() == 1).await;
    // As long as one waits, the next ones wait with their nodes.
    turn().await;
    turn().await;
    api.release();
    until_at_least(&stack, &failed("ok"), 1.0).await;
    eventually("it is told that they are taken", || {
        said("untold", "are taken again") == 1
    })
    .await;
    assert_eq!(said("untold", "are not taken"), 1);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_long_it_takes_to_reach_a_node_is_counted_by_way_and_line() {
    let (agents, [site]) = sites(["127.0.0.9"]);
    let port = site.port();
    let routes = format!(
        "routes: [{}, {}]",
        route("edge1", "127.0.0.9"),
        route("edge2", "10.9.9.9"),
    );
    let mut stack = Stack::start(&(LINE.to_owned() + &routes));
    stack.agent("edge2", &allow(&[port]));
    stack.sessions("edge2", 1).await;
    let count = async |labels: &str| {
        let name = format!("corvid_dial_seconds_count{{{labels}}}");
        stack.metric(&name).await
    };
    let (tunnel, line) = (
        "path=\"tunnel\",line=\"\"",
        "path=\"direct\",line=\"express\"",
    );
    assert!(count(tunnel).await.abs() < f64::EPSILON);
    for _ in 0..3 {
        assert_eq!(
            who(&stack, &format!("edge1:{port}")).await,
            "line 127.0.0.9"
        );
    }
    assert_eq!(who(&stack, &format!("edge2:{port}")).await, "tunnel");
    let counted = (count(tunnel).await, count(line).await);
    assert_eq!(counted, (1.0, 3.0));
    // What comes to nothing is no time until a stream is open.
    agents.close().await;
    let refused = who(&stack, &format!("edge2:{port}")).await;
    assert!(refused.contains("502 node edge2"), "{refused}");
    assert!((count(tunnel).await - 1.0).abs() < f64::EPSILON);
    stack.stop().await;
}
