//! Dials that lead to no connection: refused, given up, not answered.

use std::sync::atomic::Ordering;
use std::time::Duration;

use proto::Reason;
use proto::transport::{RecvHalf, Session};
use proxy_server::frontend::konnectivity::pb::packet::Payload;
use proxy_server::frontend::konnectivity::pb::{DialRequest, PacketType};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::idle;
use super::requester::{Call, channel, close, dial, give_up, packet};
use crate::stack::{Stack, allow, bare_session, eventually, half_agent, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_dial_has_the_sentence_and_nothing_else() {
    let mut stack = Stack::start("routes: [{node: silent}]");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = listener.local_addr().unwrap().port();
    drop(listener);
    stack.agent("edge1", &allow(&[closed]));
    stack.sessions("edge1", 1).await;
    let mut call = Call::alone(&stack).await;
    let dials = [
        (
            "silent:10250".to_owned(),
            "node silent: no session since this server started".to_owned(),
        ),
        (
            format!("edge1:{closed}"),
            format!("node edge1: connection refused: edge1:{closed}"),
        ),
        (
            "edge1:22".to_owned(),
            "node edge1: the agent's allow-list does not have the destination".to_owned(),
        ),
        (
            "webhook.svc:443".to_owned(),
            "webhook.svc:443: the destination is no node at the edge".to_owned(),
        ),
        ("edge1".to_owned(), "dial edge1: ".to_owned()),
        ("x".repeat(400), "dial: the address is too long".to_owned()),
    ];
    for (random, (to, wanted)) in (0..).zip(dials) {
        let said = call.dial(&to, random).await.unwrap_err();
        assert!(said.starts_with(&wanted), "{to}: {said}");
    }
    let udp = DialRequest {
        protocol: "udp".into(),
        address: "edge1:53".into(),
        random: 9,
    };
    call.say(packet(PacketType::DialReq, Payload::DialRequest(udp)))
        .await;
    let said = call.dialled(9).await.unwrap_err();
    assert_eq!(said, "dial edge1:53: only tcp is served here, not \"udp\"");
    idle(&stack).await;
    stack.stop().await;
}

/// An agent that takes streams and never answers; it tells how each of them ends.
async fn silent_agent(stack: &Stack) -> (JoinSet<()>, mpsc::Receiver<Result<(), Reason>>) {
    let (told, seen) = mpsc::channel(4);
    let agent = half_agent(stack, "edge1", move |send, mut recv| {
        let told = told.clone();
        async move {
            let _held = send;
            let mut chunks = [bytes::Bytes::new()];
            let end = loop {
                match recv.read_chunks(&mut chunks).await {
                    Ok(Some(_)) => {}
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error.reason()),
                }
            };
            told.send(end).await.unwrap();
        }
    })
    .await;
    stack.sessions("edge1", 1).await;
    (agent, seen)
}

async fn under_way(stack: &Stack) {
    eventually("the stream is open", || {
        let all = stack.registry.all();
        all.iter().any(|s| s.streams.load(Ordering::Relaxed) == 1)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dials_are_cancelled_as_far_as_the_edge() {
    let stack = Stack::start("");
    let (_agent, mut seen) = silent_agent(&stack).await;
    // By DIAL_CLS, after which nothing is said.
    let mut call = Call::alone(&stack).await;
    call.say(dial("edge1:10250", 3)).await;
    under_way(&stack).await;
    call.say(dial("edge1:10250", 3)).await;
    let twice = call.dialled(3).await.unwrap_err();
    assert_eq!(
        twice,
        "dial edge1:10250: a dial of that number is under way"
    );
    call.say(give_up(3)).await;
    assert_eq!(within(seen.recv()).await.unwrap(), Err(Reason::Cancelled));
    call.say(close(0)).await;
    assert_eq!(call.closed(0).await, "unknown connectID");
    // By the end of the call's packets, by a reset of the call, by the end of the connection.
    for by in 0..3 {
        idle(&stack).await;
        let channel = channel(&stack, 65_535).await;
        let call = Call::on(channel.clone()).await;
        call.say(dial("edge1:10250", 4)).await;
        under_way(&stack).await;
        let mut kept = None;
        match by {
            0 => kept = Some(call.answers), // and its packets end
            1 => drop(call),                // and the connection stays
            _ => drop((call, channel)),
        }
        assert_eq!(within(seen.recv()).await.unwrap(), Err(Reason::Cancelled));
        drop(kept);
    }
    idle(&stack).await;
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dial_that_is_not_answered_ends_in_time() {
    let stack = Stack::start("timeouts: {dial: 500ms}");
    let (_agent, _seen) = silent_agent(&stack).await;
    let said = Call::alone(&stack).await.dial("edge1:1", 1).await;
    let said = said.unwrap_err();
    assert!(
        said.starts_with("node edge1: no answer in time: the agent was last heard"),
        "{said}"
    );
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_lost_during_a_dial_fails_it_at_once() {
    let stack = Stack::start("");
    let own = stack.enrolled("edge1").await;
    let session = bare_session(&stack, &own).await.unwrap();
    let offer: proto::wire::Offer = proto::wire::Offer {
        agent: "edge1".parse().unwrap(),
        software: "test".into(),
        capabilities: vec![],
        limits: proto::wire::Limits {
            max_streams: 16,
            stream_window: 1 << 16,
        },
        instance: String::new(),
        line: None,
    };
    let _control = proto::control::Control::dial(session.clone(), &offer)
        .await
        .unwrap();
    stack.sessions("edge1", 1).await;
    let mut call = Call::alone(&stack).await;
    call.say(dial("edge1:10250", 8)).await;
    let _stream = within(session.accept()).await.unwrap();
    let start = Instant::now();
    session.close(Reason::Draining);
    let said = call.dialled(8).await.unwrap_err();
    assert!(said.starts_with("node edge1: "), "{said}");
    assert!(start.elapsed() < Duration::from_secs(5), "{said}");
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_of_several_lines_is_refused_in_one() {
    let stack = Stack::start("");
    let mut call = Call::alone(&stack).await;
    for (random, address) in (0..).zip([
        "edge1:1\n2026 INFO audit: forged",
        "\u{1b}[2Jedge1:1",
        "edge1\u{9b}31m:1",
    ]) {
        let said = call.dial(address, random).await.unwrap_err();
        assert!(
            said.starts_with("dial ") && !said.contains(char::is_control),
            "{said:?}"
        );
    }
    stack.stop().await;
}
