//! The control stream: hello, what is said on it, and who says nothing or nothing sensible.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use proto::control::{Control, ControlError, GoAway, Heard, Liveness, Outbox, Quiet};
use proto::transport::keepalive::Keepalive;
use proto::transport::{SendHalf, Session, SessionError};
use proto::wire::{AgentState, Announcement, Draft, Limits, Offer, ServerOffer, encode};
use proto::{AgentName, Reason};

use super::{DEADLINE, STREAMS, Transport, WINDOW, read_to_end, stream};

fn offer() -> Offer {
    Offer {
        agent: "edge1".parse().unwrap(),
        software: "test".into(),
        capabilities: vec![],
        limits: Limits {
            max_streams: STREAMS,
            stream_window: WINDOW.into(),
        },
        instance: "i".into(),
        line: None,
    }
}

fn server_offer() -> ServerOffer {
    ServerOffer {
        server: "proxy".parse().unwrap(),
        software: "test".into(),
        capabilities: vec![],
        limits: Limits {
            max_streams: 16,
            stream_window: WINDOW.into(),
        },
        servers: 3,
    }
}

async fn serve_hello<S: Session>(server: S, certified: &str) -> Result<Control<S>, ControlError> {
    let (control, hello) = Control::accept(server).await?;
    let id = proto::SessionId::random();
    let name: AgentName = certified.parse().unwrap();
    Ok(control
        .answer(&hello, &name, &server_offer(), id, 42)
        .await?
        .0)
}

pub(super) async fn a_go_away_arrives_and_streams_go_on<T: Transport>() {
    let (server, agent, _keep) = T::pair(DEADLINE).await;
    let ours = offer();
    let (accepted, dialled) = tokio::join!(
        serve_hello(server.clone(), "edge1"),
        Control::dial(agent.clone(), &ours)
    );
    let (at_server, (at_agent, terms)) = (accepted.unwrap(), dialled.unwrap());
    assert_eq!((terms.peer.as_str(), terms.server_time_ms), ("proxy", 42));
    assert_eq!(terms.servers, 3);
    let away = GoAway {
        reason: Reason::Draining,
        deadline: Duration::from_secs(30),
        retry_after: Duration::from_secs(1),
        detail: "upgrade".into(),
    };
    let (seen, mut told) = tokio::sync::mpsc::channel(1);
    let (live_a, live_b) = (
        Liveness::new(Keepalive::default()),
        Liveness::new(Keepalive::default()),
    );
    assert!(at_server.handle().go_away(away.clone()));
    let work = async {
        assert_eq!(told.recv().await.unwrap(), away);
        let ((mut send, _r), (_s, mut recv)) = stream(&server, &agent).await;
        send.finish().unwrap();
        assert_eq!(read_to_end(&mut recv).await.unwrap(), b"");
        server.close(Reason::Draining);
    };
    let (_, end, ()) = tokio::join!(
        at_server.run(&live_a, |_| ()),
        at_agent.run(&live_b, |away| seen.try_send(away).unwrap()),
        work
    );
    assert_eq!(end, SessionError::Peer(Reason::Draining));
}

/// Says of one agent after the other that it has a session, up to a limit, and counts how often it was asked.
struct Announcer {
    asked: Arc<AtomicU32>,
    most: u32,
}

impl Outbox for Announcer {
    async fn next(&mut self) -> Bytes {
        let count = self.asked.load(Ordering::Relaxed);
        if count >= self.most {
            return std::future::pending().await;
        }
        self.asked.store(count + 1, Ordering::Relaxed);
        let mut draft = Draft::default();
        let mut filler = 0;
        while draft.push(
            &format!("agent-{count}-{filler}").parse().unwrap(),
            AgentState::Session,
        ) {
            filler += 1;
        }
        encode(&draft.finish(count + 1 == self.most))
    }
}

pub(super) async fn what_a_server_has_to_say_arrives<T: Transport>() {
    let (server, dialler, _keep) = T::pair(DEADLINE).await;
    let ours = offer();
    let (accepted, dialled) = tokio::join!(
        serve_hello(server.clone(), "edge1"),
        Control::dial(dialler.clone(), &ours)
    );
    let (at_server, (at_dialler, _terms)) = (accepted.unwrap(), dialled.unwrap());
    let live = || Liveness::new(Keepalive::default());
    let announcer = Announcer {
        asked: Arc::default(),
        most: 20,
    };
    assert!(at_server.handle().servers(7));
    let (mut names, mut counts) = (Vec::new(), Vec::new());
    let closing = server.clone();
    let (live_a, live_b) = (live(), live());
    let (_, end) = tokio::join!(
        at_server.run_with(&live_a, |_| (), announcer),
        at_dialler.run_with(
            &live_b,
            |heard| match heard {
                Heard::Announcement(Announcement { agents, complete }) => {
                    names.extend(agents);
                    if complete {
                        closing.close(Reason::Draining);
                    }
                }
                Heard::Servers(servers) => counts.push(servers),
                Heard::GoAway(away) => panic!("{away:?}"),
            },
            Quiet
        ),
    );
    assert_eq!(end, SessionError::Peer(Reason::Draining));
    assert_eq!(counts, [7]);
    let told = names.iter().filter(|(name, state)| {
        name.as_str().starts_with("agent-") && *state == AgentState::Session
    });
    assert!(told.count() == names.len() && names.len() > 1000);
}

pub(super) async fn a_peer_that_reads_nothing_is_told_no_more_than_it_takes<T: Transport>() {
    let (server, dialler, _keep) = T::pair(DEADLINE).await;
    let ours = offer();
    let (accepted, dialled) = tokio::join!(
        serve_hello(server.clone(), "edge1"),
        Control::dial(dialler.clone(), &ours)
    );
    let (at_server, _never_read) = (accepted.unwrap(), dialled.unwrap());
    let asked = Arc::new(AtomicU32::new(0));
    let announcer = Announcer {
        asked: Arc::clone(&asked),
        most: u32::MAX,
    };
    let live = Liveness::new(Keepalive::default());
    let settled = async {
        // Until nothing more was asked for in a while.
        let mut before = u32::MAX;
        while asked.load(Ordering::Relaxed) != before {
            before = asked.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        before
    };
    let run = at_server.run_with(&live, |_| (), announcer);
    let asked = tokio::select! {
        asked = settled => asked,
        end = run => panic!("{end}"),
    };
    // What the window and the line take, and one that waits.
    assert!((1..=2 * WINDOW / 4000).contains(&asked), "{asked} frames");
    // Nothing else is held back by it.
    let ((mut send, _r), (_s, mut recv)) = stream(&server, &dialler).await;
    send.finish().unwrap();
    assert_eq!(read_to_end(&mut recv).await.unwrap(), b"");
}

pub(super) async fn an_agent_of_another_name_is_told_and_refused<T: Transport>() {
    let (server, agent, _keep) = T::pair(DEADLINE).await;
    let ours = offer();
    let (accepted, dialled) =
        tokio::join!(serve_hello(server, "edge2"), Control::dial(agent, &ours));
    assert_eq!(accepted.unwrap_err().reason(), Reason::IdentityMismatch);
    assert_eq!(dialled.unwrap_err().reason(), Reason::IdentityMismatch);
}

pub(super) async fn garbage_on_the_control_stream_ends_the_session<T: Transport>() {
    for garbage in [
        &b"\xff\xff\xff\xff"[..],
        b"\x05\xff\xff\xff\xff\xff",
        b"\x00",
    ] {
        let (server, agent, _keep) = T::pair(DEADLINE).await;
        let mut control = agent.open().await.unwrap();
        control
            .0
            .write_chunk(Bytes::copy_from_slice(garbage))
            .await
            .unwrap();
        let refused = Control::accept(server).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::Protocol, "{garbage:?}");
        assert_eq!(agent.closed().await, SessionError::Peer(Reason::Protocol));
    }
}

pub(super) async fn a_truncated_hello_ends_the_session<T: Transport>() {
    let (server, agent, _keep) = T::pair(DEADLINE).await;
    let mut control = agent.open().await.unwrap();
    control
        .0
        .write_chunk(Bytes::from_static(b"\x20\x0a"))
        .await
        .unwrap();
    control.0.finish().unwrap();
    assert_eq!(
        Control::accept(server).await.unwrap_err().reason(),
        Reason::Protocol
    );
    assert_eq!(agent.closed().await, SessionError::Peer(Reason::Protocol));
}

pub(super) async fn a_silent_peer_is_dead<T: Transport>() {
    let (server, agent, _keep) = T::pair(DEADLINE).await;
    let ours = offer();
    let (accepted, dialled) = tokio::join!(
        serve_hello(server, "edge1"),
        Control::dial(agent.clone(), &ours)
    );
    let _never_run = dialled.unwrap();
    let fast = Keepalive {
        interval: Duration::from_millis(50),
        suspect_after: Duration::from_millis(150),
        idle_timeout: Duration::from_millis(400),
        nudge_every: Duration::from_millis(50),
    };
    let live = Liveness::new(fast);
    let end = tokio::time::timeout(DEADLINE, accepted.unwrap().run(&live, |_| ()))
        .await
        .unwrap();
    assert_eq!(end, SessionError::Local(Reason::SessionLost));
    assert_eq!(
        agent.closed().await,
        SessionError::Peer(Reason::SessionLost)
    );
}
