//! An agent with two ways to its server: the internet, and a dedicated line that can be cut.

use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use proto::control::{Control, Liveness};
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::QuicSession;
use proto::transport::{RecvHalf, SendHalf, Session};
use proto::wire::{Offer, StreamReply, encode, pb};
use proto::{FrameReader, Reason};
use proxy_server::registry::{LiveSession, Rank};
use proxy_server::status::{Explained, SessionStatus};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::agents::offer;
use crate::allow::{LINES, line as logged};
use crate::fleet::{Kind, Line, announced, fleet};
use crate::stack::{DEADLINE, Stack, allow, bare_session, echo, end, eventually, within};

const EXPRESS: Option<&str> = Some("express");

/// For how long the line must be well, after it was not: so short that a hiccup of this machine is soon forgotten.
const STABLE: Duration = Duration::from_secs(1);

/// A server, and an agent with a session over the internet and one over a line.
async fn two_ways(ports: &[u16]) -> (Stack, Line) {
    let mut stack = Stack::start("path: {stable: 1s}");
    let line = Line::lay(stack.backend).await;
    let servers = [
        stack.backend.to_string(),
        format!("express={}", line.address),
    ];
    stack.agent_of("edge1", &servers, &allow(ports));
    stack.sessions("edge1", 2).await;
    (stack, line)
}

fn sessions(stack: &Stack) -> Vec<Arc<LiveSession<QuicSession>>> {
    stack.registry.of(&"edge1".parse().unwrap())
}

fn over(stack: &Stack, line: Option<&str>) -> Arc<LiveSession<QuicSession>> {
    let mut all = sessions(stack).into_iter();
    all.find(|session| session.line() == line).unwrap()
}

async fn echoed(stream: &mut UnixStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = vec![0; text.len()];
    within(stream.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer, text.as_bytes());
}

/// A stream that carries bytes, and the line that it goes over. So many others are open, and none comes or goes meanwhile.
async fn open(stack: &Stack, port: u16, others: usize) -> (UnixStream, Option<String>) {
    let count = || {
        let all = sessions(stack).into_iter();
        all.map(|session| {
            let line = session.line().map(str::to_owned);
            (session.id, line, session.streams.load(Ordering::Relaxed))
        })
        .collect::<Vec<_>>()
    };
    eventually("what was closed is counted no more", || {
        count().iter().map(|(.., streams)| streams).sum::<usize>() == others
    })
    .await;
    let before = count();
    let mut stream = within(stack.connect(&format!("edge1:{port}")))
        .await
        .unwrap();
    echoed(&mut stream, "hello").await;
    // What was tried first and gave way counts no more.
    let mut line = None;
    eventually("one session has one stream more", || {
        let more = |(id, _, now): &&(_, Option<String>, usize)| {
            let then = before.iter().find(|(other, ..)| other == id);
            then.map_or(0, |(.., count)| *count) + 1 == *now
        };
        let all = count();
        let mut all = all.iter().filter(more);
        let found = all.next();
        line = found.and_then(|(_, line, _)| line.clone());
        found.is_some() && all.next().is_none()
    })
    .await;
    (stream, line)
}

/// As [`open`], until one goes over the line.
async fn open_over_line(stack: &Stack, port: u16, others: usize) -> UnixStream {
    let opened = async {
        loop {
            let (stream, way) = open(stack, port, others).await;
            if way.as_deref() == EXPRESS {
                return stream;
            }
            drop(stream);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(opened).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_go_over_the_line_while_it_works_and_over_the_internet_while_it_does_not() {
    let mut edge = JoinSet::new();
    let port = echo(&mut edge).await;
    let (stack, line) = two_ways(&[port]).await;
    let ids = [over(&stack, None).id, over(&stack, EXPRESS).id];
    let mut held = open_over_line(&stack, port, 0).await;

    line.cut();
    let begin = Instant::now();
    for _ in 0..10 {
        let (_stream, way) = open(&stack, port, 1).await;
        assert_eq!(way, None);
    }
    // One alone would take 15 s to be given up, and the session 30 s to be suspect: the first waits for a few round trips,
    // and the others know.
    assert!(
        begin.elapsed() < Duration::from_secs(10),
        "{:?}",
        begin.elapsed()
    );
    let (mut beside, _) = open(&stack, port, 1).await;

    line.heal();
    let healed = Instant::now();
    let back = open_over_line(&stack, port, 2).await;
    assert!(healed.elapsed() >= STABLE, "{:?}", healed.elapsed());
    // Nothing that ran was touched, and neither session had to come up again.
    echoed(&mut held, "after").await;
    echoed(&mut beside, "after").await;
    assert_eq!([over(&stack, None).id, over(&stack, EXPRESS).id], ids);
    assert_eq!(sessions(&stack).len(), 2);
    drop((held, beside, back));
    stack.stop().await;
}

/// Something that says a word each moment to whoever has connected.
async fn ticker(tasks: &mut JoinSet<()>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tasks.spawn(async move {
        let mut running = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            running.spawn(async move {
                while stream.write_all(b"tick\n").await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_loses_what_the_server_sends_is_left_though_the_agent_is_heard() {
    let mut edge = JoinSet::new();
    let (port, ticks) = (echo(&mut edge).await, ticker(&mut edge).await);
    let (stack, line) = two_ways(&[port, ticks]).await;
    // It goes on saying things over the line all the while.
    let mut ticking = None;
    let over_line = async {
        while over(&stack, EXPRESS).streams.load(Ordering::Relaxed) == 0 {
            ticking = stack.connect(&format!("edge1:{ticks}")).await.ok();
        }
    };
    within(over_line).await;
    line.deafen();
    for _ in 0..10 {
        let (_stream, way) = open(&stack, port, 1).await;
        assert_eq!(way, None);
    }
    drop(ticking);
    stack.shutdown.cancel();
}

/// An agent's session that dials nothing, and says so in these words.
async fn denies(
    running: &mut JoinSet<()>,
    at: &Stack,
    own: &certs::Own,
    line: Option<&str>,
    words: &'static str,
) {
    let session = bare_session(at, own).await.unwrap();
    let offer = Offer {
        line: line.map(|line| line.parse().unwrap()),
        ..offer("edge1")
    };
    let (control, _) = Control::dial(session.clone(), &offer).await.unwrap();
    run(running, control);
    running.spawn(async move {
        while let Ok((mut send, recv)) = session.accept().await {
            let mut reader = FrameReader::new(recv);
            reader.read::<pb::StreamHeader>().await.ok();
            let denied: StreamReply = Err((Reason::DestinationDenied, words.to_owned()));
            let denied = encode(&pb::StreamReply::from(&denied));
            send.write_chunk(denied).await.ok();
            send.finish().ok();
            // Dropped unread it would be reset before that is read.
            let (mut recv, _) = reader.into_parts();
            while let Ok(Some(_)) = recv.read_chunks(&mut [Bytes::new()]).await {}
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_was_silent_is_left_for_another_servers_session_until_it_is_stable() {
    let stable = "path: {stable: 1h}";
    let [a, b] = fleet([(Kind::Full, stable), (Kind::Full, stable)]).await;
    let mut running = JoinSet::new();
    let own = a.enrolled("edge1").await;
    denies(&mut running, &a, &own, EXPRESS, "over the line").await;
    denies(&mut running, &b, &own, None, "over the internet").await;
    a.sessions("edge1", 1).await;
    announced(&a, "edge1", 1).await;
    let said = async || within(a.connect("edge1:1")).await.unwrap_err();
    let line = said().await;
    assert!(line.contains("over the line"), "{line}");
    // A request has found it silent, and it answers again.
    let session = over(&a, EXPRESS);
    session.doubt.raise(Instant::now());
    let internet = said().await;
    assert!(internet.contains("over the internet"), "{internet}");
    eventually("the line is there again", || {
        session.rank() == Rank::Healthy
    })
    .await;
    for _ in 0..5 {
        let said = said().await;
        assert!(said.contains("over the internet"), "{said}");
    }
    a.shutdown.cancel();
    b.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_way_alone_will_do() {
    let mut edge = JoinSet::new();
    let port = echo(&mut edge).await;
    let (stack, _line) = two_ways(&[port]).await;
    // The agent loses one after the other, and has it again.
    for lost in [EXPRESS, None] {
        let session = over(&stack, lost);
        session.transport.close(Reason::Internal);
        eventually("it is gone, or there again", || {
            sessions(&stack).iter().all(|other| other.id != session.id)
        })
        .await;
        let mut stream = within(stack.connect(&format!("edge1:{port}")))
            .await
            .unwrap();
        echoed(&mut stream, "hello").await;
        stack.sessions("edge1", 2).await;
        assert!(over(&stack, lost).id != session.id);
    }
    open_over_line(&stack, port, 0).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_whose_line_never_answers_enrols_and_serves_over_the_internet() {
    let mut edge = JoinSet::new();
    let port = echo(&mut edge).await;
    let mut stack = Stack::start("");
    // Addresses are dialled in order, and this one comes first of all: nothing answers there, by TCP neither.
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let dead = silent.local_addr().unwrap();
    let servers = [format!("express={dead}"), stack.backend.to_string()];
    stack.agent_of("edge1", &servers, &allow(&[port]));
    stack.sessions("edge1", 1).await;
    assert_eq!(open(&stack, port, 0).await.1, None);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn which_line_a_session_goes_over_is_seen_by_people() {
    LazyLock::force(&LINES);
    let mut edge = JoinSet::new();
    let port = echo(&mut edge).await;
    let (stack, _line) = two_ways(&[port]).await;
    drop(open_over_line(&stack, port, 0).await);
    let to = format!("edge1:{port}");
    let session = over(&stack, EXPRESS).id.to_string();
    let line = logged(&to, |line| line["session"] == session).await;
    assert_eq!(line["path"], "tunnel", "{line}");
    assert_eq!(line["line"], "express", "{line}");
    assert!((stack.metric("corvid_sessions_over_lines").await - 1.0).abs() < f64::EPSILON);

    let body = daemon::admin::client::get(&stack.admin, "/sessions").await;
    let told: Vec<SessionStatus> = serde_json::from_slice(&body.unwrap()).unwrap();
    let mut lines: Vec<_> = told.iter().map(|it| it.line.as_deref()).collect();
    lines.sort_unstable();
    assert_eq!(lines, [None, EXPRESS]);
    assert!(proxy_server::status::table(&told).contains(" express "));

    let path = format!("/explain?to={to}");
    let body = daemon::admin::client::get(&stack.admin, &path).await;
    let told: Explained = serde_json::from_slice(&body.unwrap()).unwrap();
    let words = proxy_server::status::explained(&told);
    assert!(words.contains("here over line express ("), "{words}");
    stack.stop().await;
}

/// Runs a session's control stream until it ends.
fn run(tasks: &mut JoinSet<()>, control: Control<QuicSession>) {
    tasks.spawn(async move {
        let live = Liveness::new(Keepalive::default());
        control.run(&live, |_| ()).await;
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_over_another_way_does_not_end_one_whose_line_is_cut() {
    let stack = Stack::start("");
    let own = stack.enrolled("edge1").await;
    let mut running = JoinSet::new();
    let dial = async |line: Option<&str>, instance: &str| {
        let session = bare_session(&stack, &own).await.unwrap();
        let offer = Offer {
            line: line.map(|line| line.parse().unwrap()),
            instance: instance.to_owned(),
            ..offer("edge1")
        };
        let (control, _) = Control::dial(session.clone(), &offer).await.unwrap();
        (session, control)
    };
    // Nobody runs its control stream: the line is cut.
    let (cut, _silent) = dial(EXPRESS, "a").await;
    stack.sessions("edge1", 1).await;
    let first = over(&stack, EXPRESS);
    for count in [2, 3] {
        let (_session, control) = dial(None, "a").await;
        run(&mut running, control);
        stack.sessions("edge1", count).await;
    }
    // The third asked the second, and would have asked the first before.
    let second = Arc::clone(&sessions(&stack)[1]);
    eventually("the second is asked", || {
        second.probed.load(Ordering::Relaxed)
    })
    .await;
    assert!(
        !first.probed.load(Ordering::Relaxed),
        "the way tells nothing"
    );
    eventually("it has answered", || !second.probed.load(Ordering::Relaxed)).await;
    assert!(timeout(Duration::ZERO, cut.closed()).await.is_err());

    // The agent was killed and has started again: what was over the line is dead, too.
    let (_session, control) = dial(None, "b").await;
    run(&mut running, control);
    assert_eq!(end(&cut).await, Reason::Replaced);
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_servers_session_does_not_end_one_whose_line_is_cut() {
    let [a, b] = fleet([(Kind::Full, ""), (Kind::Full, "")]).await;
    let mut running = JoinSet::new();
    let own = a.enrolled("edge1").await;
    let dial = async |at: &Stack, line: Option<&str>| {
        let session = bare_session(at, &own).await.unwrap();
        let offer = Offer {
            line: line.map(|line| line.parse().unwrap()),
            ..offer("edge1")
        };
        let (control, _) = Control::dial(session.clone(), &offer).await.unwrap();
        (session, control)
    };
    // Neither answers any more.
    let (over_line, _silent) = dial(&a, EXPRESS).await;
    let (over_none, _also) = dial(&a, None).await;
    a.sessions("edge1", 2).await;
    announced(&b, "edge1", 1).await;
    let (_session, control) = dial(&b, None).await;
    run(&mut running, control);
    announced(&a, "edge1", 1).await;
    assert_eq!(end(&over_none).await, Reason::Replaced);
    assert!(timeout(Duration::ZERO, over_line.closed()).await.is_err());
    a.sessions("edge1", 1).await;
    a.shutdown.cancel();
    b.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_has_no_name_for_one_is_refused_and_leaves_the_others() {
    let mut edge = JoinSet::new();
    let port = echo(&mut edge).await;
    let (stack, _line) = two_ways(&[port]).await;
    let own = stack.enrolled("edge2").await;
    for (count, line) in (1_u8..).zip(["Express", "a\nb", "\u{1b}[2J", &"a".repeat(3000)]) {
        let session = bare_session(&stack, &own).await.unwrap();
        let hello = pb::Hello {
            line: line.to_owned(),
            ..offer("edge2").to_pb()
        };
        let frame = pb::ControlFrame {
            body: Some(pb::control_frame::Body::Hello(hello)),
        };
        let (mut send, recv) = session.open().await.unwrap();
        send.write_chunk(encode(&frame)).await.unwrap();
        assert_eq!(refusal(recv).await, Reason::Protocol, "{line:?}");
        session.close(Reason::Protocol);
        let counted = async {
            let name = "corvid_sessions_refused_total{reason=\"protocol\"}";
            while stack.metric(name).await < f64::from(count) {
                tokio::task::yield_now().await;
            }
        };
        within(counted).await;
    }
    assert!(stack.registry.of(&"edge2".parse().unwrap()).is_empty());
    open_over_line(&stack, port, 0).await;
    stack.stop().await;
}

/// What the server's GoAway says.
async fn refusal(recv: proto::transport::quic::QuicRecv) -> Reason {
    let mut reader = FrameReader::new(recv);
    let frame: pb::ControlFrame = proto::read_frame_within(&mut reader, DEADLINE)
        .await
        .unwrap();
    match frame.body {
        Some(pb::control_frame::Body::GoAway(away)) => Reason::from_code(away.reason.into()),
        other => panic!("{other:?}"),
    }
}
