//! Several servers: a request enters at one, and the session is at another.

use std::time::Duration;

use proxy_server::peer::Standing;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::api::{Api, Mood};
use crate::fleet::{Kind, Line, agent, announced, fleet, introduce, server, server_of_service};
use crate::stack::{Stack, allow, echo, eventually, half_agent, shouter, within};

/// Sends and has it come back.
async fn echoed(stream: &mut UnixStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = vec![0; text.len()];
    within(stream.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer, text.as_bytes());
}

/// One request to its end, through `at`.
async fn shouts(at: &Stack, to: &str) -> Result<(), String> {
    let mut stream = within(at.connect(to)).await?;
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "HELLO");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_enters_at_one_server_goes_by_the_session_at_another() {
    let [a, mut b] = fleet([(Kind::Full, ""), (Kind::Full, "")]).await;
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    b.agent("edge1", &allow(&[port]));
    b.sessions("edge1", 1).await;
    announced(&a, "edge1", 1).await;
    for _ in 0..3 {
        shouts(&a, &format!("edge1:{port}")).await.unwrap();
    }
    shouts(&b, &format!("edge1:{port}")).await.unwrap();
    let peer = "corvid_streams_total{frontend=\"http_connect\",path=\"peer\",reason=\"ok\"}";
    let asked = "corvid_streams_total{frontend=\"peer\",path=\"tunnel\",reason=\"ok\"}";
    for (at, metric, count) in [(&a, peer, 3.0), (&b, asked, 3.0), (&b, peer, 0.0)] {
        let begin = Instant::now();
        while at.metric(metric).await < count {
            assert!(begin.elapsed() < crate::stack::DEADLINE, "{metric}");
            tokio::task::yield_now().await;
        }
    }
    // What the agent says comes back unchanged, as if it had been asked here.
    let line = a.connect("edge1:1").await.unwrap_err();
    assert!(
        line.contains("403") && line.contains("node edge1: the agent's allow-list"),
        "{line}"
    );
    b.stop().await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_frontends_only_reaches_the_agents_of_all_others() {
    let kinds = [
        (Kind::Full, ""),
        (Kind::Full, ""),
        (Kind::FrontendsOnly, ""),
    ];
    let [mut a, mut b, f] = fleet(kinds).await;
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    a.agent("edge1", &allow(&[port]));
    b.agent("edge2", &allow(&[port]));
    for node in ["edge1", "edge2"] {
        announced(&f, node, 1).await;
        shouts(&f, &format!("{node}:{port}")).await.unwrap();
    }
    assert!(f.peer_listeners.is_empty() && f.registry.is_empty());
    // Known to one of the others, and without a session.
    a.agents_stop.cancel();
    announced(&f, "edge1", 0).await;
    let line = f.connect(&format!("edge1:{port}")).await.unwrap_err();
    assert!(
        line.contains("node edge1: no session at any of 2 proxy-servers since 20"),
        "{line}"
    );
    assert!(line.contains("stopping at proxy-a"), "{line}");
    let line = f.connect("edge9:1").await.unwrap_err();
    assert!(
        line.contains("the destination is no node at the edge"),
        "{line}"
    );
    f.stop().await;
    b.stop().await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_moves_is_followed_without_a_failed_request() {
    let [a, b, c] = fleet([(Kind::Full, ""), (Kind::Full, ""), (Kind::Full, "")]).await;
    let accepts = async |server: &Stack| {
        half_agent(server, "edge1", |mut send, recv| async move {
            use proto::transport::{RecvHalf as _, SendHalf as _};
            let mut reader = proto::FrameReader::new(recv);
            let read = reader.read::<proto::wire::pb::StreamHeader>().await;
            let Ok(Some(header)) = read else { return };
            // Nothing that is for servers ever reaches an agent.
            assert!(header.hops == 0 && header.agent.is_empty() && header.requester.is_empty());
            let reply = proto::wire::pb::StreamReply::from(&Ok(()));
            send.write_chunk(proto::wire::encode(&reply)).await.ok();
            send.finish().ok();
            let (mut recv, _) = reader.into_parts();
            while let Ok(Some(_)) = recv.read_chunks(&mut [bytes::Bytes::new()]).await {}
        })
        .await
    };
    let mut at = accepts(&b).await;
    announced(&a, "edge1", 1).await;
    let ends = async |at: &Stack| {
        let mut stream = within(at.connect("edge1:10250")).await.unwrap();
        within(stream.read_to_end(&mut Vec::new())).await.unwrap();
    };
    for to in [&c, &b, &c] {
        ends(&a).await;
        let next = accepts(to).await;
        announced(&a, "edge1", 2).await;
        ends(&a).await;
        // The old one ends while requests go on, with what is announced of it still on its way.
        at.abort_all();
        let from = if std::ptr::eq(to, &c) { &b } else { &c };
        let begin = Instant::now();
        while !from.registry.is_empty() || begin.elapsed() < Duration::from_millis(50) {
            assert!(begin.elapsed() < crate::stack::DEADLINE);
            ends(&a).await;
        }
        announced(&a, "edge1", 1).await;
        at = next;
    }
    drop(at);
    for server in [a, b, c] {
        server.shutdown.cancel();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_dies_is_not_waited_for() {
    let kinds = [(Kind::Full, ""), (Kind::Full, "")];
    let [mut b, c] = fleet(kinds).await;
    let f = server(Some(&b), "proxy-f", Kind::FrontendsOnly, "");
    let lines = [
        Line::lay(b.peer_listeners[0]).await,
        Line::lay(c.peer_listeners[0]).await,
    ];
    introduce(&f, &lines.each_ref().map(|line| line.address)).await;
    let mut edge = JoinSet::new();
    let (port, kept) = (shouter(&mut edge).await, echo(&mut edge).await);
    let servers = [b.backend, c.backend];
    agent(&mut b, "edge1", &servers, &[port, kept]);
    announced(&f, "edge1", 2).await;
    for dead in [0, 1] {
        let mut open = f.connect(&format!("edge1:{kept}")).await.unwrap();
        echoed(&mut open, "before").await;
        // Nothing says that it is dead: no packet comes from there any more.
        lines[dead].cut();
        let begin = Instant::now();
        for _ in 0..10 {
            shouts(&f, &format!("edge1:{port}")).await.unwrap();
        }
        // Far below the 15 s after which a request is given up, and the 6 s after which a session is suspect.
        assert!(
            begin.elapsed() < Duration::from_secs(5),
            "{:?}",
            begin.elapsed()
        );
        lines[dead].heal();
        eventually("both are heard again", || {
            let all = f.peers.all();
            all.iter()
                .filter(|peer| peer.rank() == proxy_server::registry::Rank::Healthy)
                .count()
                >= 2
        })
        .await;
        // A cut of this length is survived by what runs.
        echoed(&mut open, "after").await;
    }
    f.stop().await;
    b.stop().await;
    c.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_drains_is_left_and_what_runs_through_it_may_end() {
    let slow = "drain: {minDelay: 2s, grace: 4s}";
    let [a, mut b, c] = fleet([(Kind::Full, ""), (Kind::Full, slow), (Kind::Full, "")]).await;
    let mut edge = JoinSet::new();
    let (port, kept) = (shouter(&mut edge).await, echo(&mut edge).await);
    let servers = [b.backend];
    agent(&mut b, "edge1", &servers, &[port, kept]);
    announced(&a, "edge1", 1).await;
    let mut running = a.connect(&format!("edge1:{kept}")).await.unwrap();
    echoed(&mut running, "before").await;
    b.shutdown.cancel();
    let going = std::sync::atomic::Ordering::Relaxed;
    eventually("a is told", || {
        a.peers.all().iter().any(|peer| peer.going.load(going))
    })
    .await;
    // Nowhere else yet: it is still asked.
    shouts(&a, &format!("edge1:{port}")).await.unwrap();
    echoed(&mut running, "while it drains").await;
    running.shutdown().await.unwrap();
    let mut rest = Vec::new();
    within(running.read_to_end(&mut rest)).await.unwrap();
    assert!(rest.is_empty());
    assert_eq!(b.exit().await, daemon::Exit::Drained);
    announced(&a, "edge1", 0).await;
    let line = a.connect(&format!("edge1:{port}")).await.unwrap_err();
    assert!(
        line.contains(
            "no session at any of 2 proxy-servers since they started; 1 more can't be asked"
        ),
        "{line}"
    );
    a.stop().await;
    c.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_drains_keeps_an_agent_until_it_has_come_to_another() {
    let kinds = [
        (Kind::Full, ""),
        (Kind::Full, "drain: {minDelay: 10ms, grace: 120s}"),
        (Kind::Full, ""),
    ];
    let [mut a, mut b, c] = fleet(kinds).await;
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    let servers = [b.backend];
    agent(&mut b, "edge1", &servers, &[port]);
    announced(&a, "edge1", 1).await;
    b.shutdown.cancel();
    let going = std::sync::atomic::Ordering::Relaxed;
    eventually("a is told", || {
        a.peers.all().iter().any(|peer| peer.going.load(going))
    })
    .await;
    // Long after `minDelay`, and no stream runs.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(1) {
        shouts(&a, &format!("edge1:{port}")).await.unwrap();
    }
    let servers = [a.backend];
    agent(&mut a, "edge1", &servers, &[port]);
    let begin = Instant::now();
    assert_eq!(b.exit().await, daemon::Exit::Drained);
    // Far below the 15 s that it waits for an agent that does not come.
    assert!(
        begin.elapsed() < Duration::from_secs(10),
        "{:?}",
        begin.elapsed()
    );
    shouts(&a, &format!("edge1:{port}")).await.unwrap();
    a.stop().await;
    c.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_through_another_server_that_is_cut_never_looks_finished() {
    let quick = "drain: {minDelay: 10ms, grace: 100ms}";
    let [a, mut b] = fleet([(Kind::Full, ""), (Kind::Full, quick)]).await;
    let mut edge = JoinSet::new();
    let kept = echo(&mut edge).await;
    b.agent("edge1", &allow(&[kept]));
    announced(&a, "edge1", 1).await;
    let mut running = a.connect(&format!("edge1:{kept}")).await.unwrap();
    echoed(&mut running, "before").await;
    b.shutdown.cancel();
    // A Unix socket has no reset; that it was cut is in the metrics.
    within(running.read_to_end(&mut Vec::new())).await.ok();
    let cut = "corvid_streams_total{frontend=\"http_connect\",path=\"peer\",reason=\"draining\"}";
    let begin = Instant::now();
    while a.metric(cut).await < 1.0 {
        assert!(begin.elapsed() < crate::stack::DEADLINE);
        tokio::task::yield_now().await;
    }
    assert_eq!(b.exit().await, daemon::Exit::Drained);
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ourselves_and_a_second_address_are_no_further_servers() {
    let a = server(None, "proxy-a", Kind::Full, "");
    let b = server(Some(&a), "proxy-b", Kind::Full, "");
    let line = Line::lay(b.peer_listeners[0]).await;
    introduce(&a, &[a.peer_listeners[0], b.peer_listeners[0]]).await;
    let members = a.peers.members();
    assert_eq!(members[&a.peer_listeners[0]], Standing::Ourselves);
    assert_eq!(members[&b.peer_listeners[0]], Standing::Up);
    assert_eq!(*a.peers.servers().borrow(), 2);
    assert_eq!(a.peers.all().len(), 1);
    // The same server by another way: known for what it is.
    let file = a.dir.path().join("proxy-server.yaml");
    let both = crate::stack::text(&file)
        .replace("servers: ['", &format!("servers: ['{}', '", line.address));
    crate::stack::rewrite(&file, &both);
    a.reload.reload();
    let twin = Standing::Twin("proxy-b".parse().unwrap());
    eventually("a twin", || {
        a.peers.members().get(&line.address) == Some(&twin)
    })
    .await;
    assert_eq!(*a.peers.servers().borrow(), 2);
    assert_eq!(a.peers.all().len(), 1);
    assert_eq!(a.peers.asked().silent, 0);
    b.stop().await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_taken_off_the_list_is_let_go_once_its_streams_have_ended() {
    let [a, mut b] = fleet([(Kind::Full, ""), (Kind::Full, "")]).await;
    let mut edge = JoinSet::new();
    let kept = echo(&mut edge).await;
    b.agent("edge1", &allow(&[kept]));
    announced(&a, "edge1", 1).await;
    let mut running = a.connect(&format!("edge1:{kept}")).await.unwrap();
    echoed(&mut running, "before").await;
    introduce(&a, &[a.peer_listeners[0]]).await;
    let going = std::sync::atomic::Ordering::Relaxed;
    eventually("it is to go", || {
        a.peers.all().iter().all(|peer| peer.going.load(going))
    })
    .await;
    echoed(&mut running, "after").await;
    drop(running);
    eventually("it is gone", || a.peers.all().is_empty()).await;
    assert_eq!(*a.peers.servers().borrow(), 1);
    // That there is such a node is remembered.
    let line = a.connect(&format!("edge1:{kept}")).await.unwrap_err();
    assert!(
        line.contains("node edge1: no session at the one proxy-server that answers"),
        "{line}"
    );
    b.stop().await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_and_scrapers_see_what_is_at_other_servers() {
    let [a, mut b] = fleet([(Kind::Full, ""), (Kind::Full, "")]).await;
    b.agent("edge1", "");
    announced(&a, "edge1", 1).await;
    let ask = async |at: &Stack, path: &str| -> serde_json::Value {
        let body = daemon::admin::client::get(&at.admin, path).await.unwrap();
        serde_json::from_slice(&body).unwrap()
    };
    let peers = ask(&a, "/peers").await;
    let of = |side: &str, state: &str| {
        let fits = |peer: &&serde_json::Value| peer["side"] == side && peer["state"] == state;
        peers
            .as_array()
            .unwrap()
            .iter()
            .filter(fits)
            .cloned()
            .collect::<Vec<_>>()
    };
    let asked = of("dialled", "ok");
    assert_eq!(
        (asked.len(), &asked[0]["server"], &asked[0]["agents"]),
        (1, &"proxy-b".into(), &1.into())
    );
    assert_eq!(of("dialled", "ourselves").len(), 1);
    assert_eq!(of("accepted", "ok")[0]["server"], "proxy-b");
    let node = &ask(&a, "/nodes").await[0];
    assert_eq!(
        (&node["node"], &node["session"]),
        (&"edge1".into(), &true.into())
    );
    assert_eq!(node["servers"], serde_json::json!(["proxy-b"]));
    assert_eq!(ask(&b, "/nodes").await[0]["servers"], serde_json::json!([]));
    let sessions = "corvid_peer_sessions{side=\"dialled\"}";
    assert_eq!(a.metric(sessions).await, 1.0);
    assert_eq!(a.metric("corvid_peer_members").await, 1.0);
    let begin = Instant::now();
    while a.metric("corvid_peer_agents").await < 1.0 {
        assert!(begin.elapsed() < crate::stack::DEADLINE);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    b.stop().await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_are_told_how_many_servers_there_are_and_of_every_change() {
    use proto::control::{Heard, Liveness, Quiet};
    use proto::transport::keepalive::Keepalive;
    let [a, b, f] = fleet([
        (Kind::Full, ""),
        (Kind::Full, ""),
        (Kind::FrontendsOnly, ""),
    ])
    .await;
    let own = a.enrolled("edge1").await;
    let session = crate::stack::bare_session(&a, &own).await.unwrap();
    let offer = crate::agents::offer("edge1");
    let (control, terms) = proto::control::Control::dial(session, &offer)
        .await
        .unwrap();
    // A server with frontends only takes no agents.
    assert_eq!(terms.servers, 2);
    let (say, mut heard) = tokio::sync::mpsc::channel(8);
    let mut agent = JoinSet::new();
    agent.spawn(async move {
        let on = |heard| {
            if let Heard::Servers(servers) = heard {
                say.try_send(servers).unwrap();
            }
        };
        let live = Liveness::new(Keepalive::default());
        control.run_with(&live, on, Quiet).await;
    });
    let again = b.peer_listeners[0];
    b.stop().await;
    let told = async |heard: &mut tokio::sync::mpsc::Receiver<u32>, wanted| {
        while within(heard.recv()).await.unwrap() != wanted {}
    };
    told(&mut heard, 1).await;
    let c = server(Some(&a), "proxy-c", Kind::Full, "");
    introduce(&a, &[a.peer_listeners[0], c.peer_listeners[0]]).await;
    told(&mut heard, 2).await;
    assert!(!a.peers.members().contains_key(&again));
    drop(agent);
    for server in [a, c, f] {
        server.shutdown.cancel();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_are_the_endpoints_of_the_service_and_stay_while_kube_apiserver_is_away() {
    let mut api = Api::start().await;
    let dir = tempfile::tempdir().unwrap();
    let kubeconfig = api.kubeconfig(dir.path());
    let a = server_of_service(None, "proxy-a", &kubeconfig);
    let mut b = server_of_service(Some(&a), "proxy-b", &kubeconfig);
    let slice = |of: &Stack, name: &str, ready: bool| {
        let address = of.peer_listeners[0];
        serde_json::json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": name, "namespace": "corvid"},
            "addressType": "IPv4",
            "ports": [{"name": "peers", "port": address.port(), "protocol": "UDP"}],
            "endpoints": [{"addresses": [address.ip().to_string()], "conditions": {"ready": ready}}],
        })
    };
    api.put_slice(slice(&a, "a", true));
    api.put_slice(slice(&b, "b", true));
    let up = |at: &Stack| {
        let members = at.peers.members();
        let standings: Vec<_> = members.into_values().collect();
        standings.len() == 2
            && standings.contains(&Standing::Up)
            && standings.contains(&Standing::Ourselves)
    };
    eventually("both know each other", || up(&a) && up(&b)).await;
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    b.agent("edge1", &allow(&[port]));
    announced(&a, "edge1", 1).await;

    // Away, then back and unwilling: nothing changes.
    api.down().await;
    shouts(&a, &format!("edge1:{port}")).await.unwrap();
    let before = api.seen("slices");
    api.mood(Mood::Status(403));
    api.up().await;
    eventually("it is asked again", || api.seen("slices") > before).await;
    assert!(up(&a));
    shouts(&a, &format!("edge1:{port}")).await.unwrap();
    api.mood(Mood::Well);

    // It gets unready while nobody can tell: known once all is listed anew.
    api.compact();
    api.put_slice(slice(&b, "b", false));
    let going = std::sync::atomic::Ordering::Relaxed;
    eventually("it is to go", || {
        a.peers.all().iter().all(|peer| peer.going.load(going))
    })
    .await;
    // And used while it is the only one that has the agent.
    shouts(&a, &format!("edge1:{port}")).await.unwrap();
    api.put_slice(slice(&b, "b", true));
    eventually("it is back", || up(&a)).await;
    api.delete_slice("b");
    eventually("it is none", || a.peers.members().len() == 1).await;
    b.stop().await;
    a.stop().await;
}
