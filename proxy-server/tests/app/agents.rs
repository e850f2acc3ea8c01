//! Who becomes a session and who does not.

use std::time::Duration;

use certs::{AgentFiles, Clock, EnrollError, EnrollRequest, Name, TrustDomain};
use proto::Reason;
use proto::control::Control;
use proto::transport::{SendHalf, Session};
use proto::wire::{Limits, Offer};

use crate::stack::{Stack, bare_session, end, within};

pub(crate) fn offer(name: &str) -> Offer {
    Offer {
        agent: name.parse().unwrap(),
        software: "test".into(),
        capabilities: vec![],
        limits: Limits {
            max_streams: 16,
            stream_window: 1 << 16,
        },
        instance: String::new(),
        line: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_claims_another_name_is_told_and_refused() {
    let stack = Stack::start("");
    let own = stack.enrolled("edge1").await;
    let session = bare_session(&stack, &own).await.unwrap();
    let refused = Control::dial(session.clone(), &offer("edge2"))
        .await
        .unwrap_err();
    assert_eq!(refused.reason(), Reason::IdentityMismatch);
    while stack
        .metric("corvid_sessions_refused_total{reason=\"identity_mismatch\"}")
        .await
        < 1.0
    {
        tokio::task::yield_now().await;
    }
    assert!(stack.registry.is_empty());
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_of_another_role_or_authority_open_no_session() {
    let stack = Stack::start("");
    let foreign = certs::test_ca::TestCa::new();
    let mut stranger = foreign.own(foreign.agent("edge1"));
    stranger.bundle = certs::LiveBundle::new(stack.issuer().bundle().clone());
    for own in [stack.client("kube-apiserver"), stranger] {
        // TLS 1.3 lets the dialler finish before the server has looked at its certificate.
        if let Ok(session) = bare_session(&stack, &own).await {
            assert_eq!(end(&session).await, Reason::Tls);
        }
    }
    assert!(stack.registry.is_empty());
    while stack
        .metric("corvid_sessions_refused_total{reason=\"tls\"}")
        .await
        < 2.0
    {
        tokio::task::yield_now().await;
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_the_control_stream_is_refused_once_and_leaves_the_others() {
    let mut stack = Stack::start("");
    stack.agent("edge1", "");
    stack.sessions("edge1", 1).await;
    let own = stack.enrolled("edge2").await;
    let session = bare_session(&stack, &own).await.unwrap();
    let (mut send, _recv) = session.open().await.unwrap();
    send.write_chunk(bytes::Bytes::from_static(b"\xff\xff\xff\xff"))
        .await
        .unwrap();
    assert_eq!(end(&session).await, Reason::Protocol);
    while stack
        .metric("corvid_sessions_refused_total{reason=\"protocol\"}")
        .await
        < 1.0
    {
        tokio::task::yield_now().await;
    }
    stack.sessions("edge1", 1).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_good_for_its_uses_and_no_more() {
    let stack = Stack::start("");
    let (trust, proof) = stack.join(1);
    let clock = Clock::system();
    let trust_domain = TrustDomain::default();
    let mut outcomes = Vec::new();
    for name in ["edge1", "edge2"] {
        let files = AgentFiles::new(stack.dir.path().join(name));
        let name = Name::parse(name).unwrap();
        let request = EnrollRequest {
            server: stack.backend,
            trust: &trust,
            proof: &proof,
            name: &name,
            trust_domain: &trust_domain,
            files: &files,
            clock: &clock,
        };
        outcomes.push(certs::enroll(&request).await);
    }
    outcomes[0].as_ref().unwrap();
    let refused = outcomes[1].as_ref().unwrap_err();
    assert!(matches!(refused, EnrollError::TokenUsedUp), "{refused}");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_agents_sessions_end_and_it_gets_no_other() {
    let stack = Stack::start("");
    let own = stack.enrolled("edge1").await;
    let session = bare_session(&stack, &own).await.unwrap();
    let (control, _) = Control::dial(session.clone(), &offer("edge1"))
        .await
        .unwrap();
    stack.sessions("edge1", 1).await;
    let live = proto::control::Liveness::new(proto::transport::keepalive::Keepalive::default());
    stack
        .store()
        .revoke_agent(&Name::parse("edge1").unwrap(), Clock::system().now())
        .unwrap();
    let ended = within(control.run(&live, |_| ())).await;
    assert_eq!(ended.reason(), Reason::Revoked);
    if let Ok(again) = bare_session(&stack, &own).await {
        assert_eq!(end(&again).await, Reason::Tls);
    }
    stack.sessions("edge1", 0).await;
    stack
        .store()
        .allow_agent(&Name::parse("edge1").unwrap())
        .unwrap();
    // The store is watched; until it is read again the handshake is refused.
    let allowed = async {
        loop {
            let Ok(session) = bare_session(&stack, &own).await else {
                continue;
            };
            if Control::dial(session, &offer("edge1")).await.is_ok() {
                return;
            }
        }
    };
    within(allowed).await;
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_session_takes_over_and_a_dead_older_one_is_found_out() {
    let stack = Stack::start("");
    let own = stack.enrolled("edge1").await;
    let first = bare_session(&stack, &own).await.unwrap();
    // Agreed, and then silent: nobody runs its control stream, as if the process were stopped.
    let _stopped = Control::dial(first.clone(), &offer("edge1")).await.unwrap();
    stack.sessions("edge1", 1).await;
    let old = stack.registry.all()[0].id;
    let second = bare_session(&stack, &own).await.unwrap();
    let (control, _) = Control::dial(second, &offer("edge1")).await.unwrap();
    let live = proto::control::Liveness::new(proto::transport::keepalive::Keepalive::default());
    let checks = async {
        stack.sessions("edge1", 2).await;
        assert_ne!(
            stack.registry.pick(&"edge1".parse().unwrap()).unwrap().id,
            old
        );
        assert_eq!(end(&first).await, Reason::Replaced);
        stack.sessions("edge1", 1).await;
    };
    tokio::select! {
        () = checks => {}
        _ = control.run(&live, |_| ()) => panic!("the live session ended"),
    }
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_can_not_fill_the_server_with_sessions() {
    let stack = Stack::start("limits: {sessionsPerAgent: 2}");
    let own = stack.enrolled("edge1").await;
    let mut sessions = Vec::new();
    for i in 1..=8 {
        let session = bare_session(&stack, &own).await.unwrap();
        sessions.push(Control::dial(session, &offer("edge1")).await.unwrap());
        stack.sessions("edge1", i.min(4)).await;
    }
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_over_the_rate_are_told_when_to_come_again() {
    let stack = Stack::start("limits: {sessionsPerSecond: 1}");
    let own = stack.enrolled("edge1").await;
    let mut told = None;
    for _ in 0..5 {
        let session = bare_session(&stack, &own).await.unwrap();
        match Control::dial(session, &offer("edge1")).await {
            Ok(_) => {}
            Err(proto::control::ControlError::Handshake(
                proto::wire::HandshakeError::Refused {
                    reason,
                    retry_after_ms,
                    ..
                },
            )) => told = Some((reason, Duration::from_millis(retry_after_ms.into()))),
            Err(error) => panic!("{error}"),
        }
    }
    let (reason, after) = told.expect("one of five is refused");
    assert!(
        reason == Reason::Overloaded && after > Duration::ZERO,
        "{reason} {after:?}"
    );
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_healthy_older_session_stays_beside_a_newer_one() {
    let stack = Stack::start("");
    let own = stack.enrolled("edge1").await;
    let mut running = tokio::task::JoinSet::new();
    for i in 1..=2 {
        let session = bare_session(&stack, &own).await.unwrap();
        let (control, _) = Control::dial(session, &offer("edge1")).await.unwrap();
        running.spawn(async move {
            let live =
                proto::control::Liveness::new(proto::transport::keepalive::Keepalive::default());
            control.run(&live, |_| ()).await
        });
        stack.sessions("edge1", i).await;
    }
    let older = std::sync::Arc::clone(&stack.registry.all()[0]);
    let probing = std::sync::atomic::Ordering::Relaxed;
    crate::stack::eventually("the older one is asked", || older.probed.load(probing)).await;
    crate::stack::eventually("it has answered", || !older.probed.load(probing)).await;
    stack.sessions("edge1", 2).await;
    assert!(running.try_join_next().is_none(), "a session was closed");
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_begun_before_the_revocation_does_not_slip_through() {
    let stack = Stack::start("");
    let own = stack.enrolled("edge1").await;
    let session = bare_session(&stack, &own).await.unwrap();
    let name = Name::parse("edge1").unwrap();
    stack
        .store()
        .revoke_agent(&name, Clock::system().now())
        .unwrap();
    // Until the server has read the store again, which refuses new handshakes.
    let known = async {
        while let Ok(other) = bare_session(&stack, &own).await {
            if end_within(&other).await == Some(Reason::Tls) {
                return;
            }
        }
    };
    within(known).await;
    if let Ok((control, _)) = Control::dial(session, &offer("edge1")).await {
        let live = proto::control::Liveness::new(proto::transport::keepalive::Keepalive::default());
        let ended = within(control.run(&live, |_| ())).await;
        assert_eq!(ended.reason(), Reason::Revoked);
    }
    stack.sessions("edge1", 0).await;
    let line = stack.connect("edge1:10250").await.unwrap_err();
    assert!(line.contains("the agent is revoked"), "{line}");
    stack.shutdown.cancel();
}

/// Why the session ended, if it did so soon.
async fn end_within(session: &proto::transport::quic::QuicSession) -> Option<Reason> {
    let ended = tokio::time::timeout(Duration::from_millis(300), session.closed()).await;
    ended.ok().map(|error| error.reason())
}
