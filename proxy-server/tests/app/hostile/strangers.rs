//! Who is let in at the door of servers and who is believed there, and that others keep no server out.

use proto::control::Control;
use proto::wire::Offer;
use proto::{Reason, ServerName};
use proxy_server::peer::Standing;

use super::{
    Impostor, LIMITS, announces, dial, metric_reaches, nothing, server_own, tell_of, visit,
};
use crate::fleet::{Kind, fleet, server};
use crate::stack::{bare_session, end, eventually};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_but_a_server_of_the_same_authority_comes_in() {
    let a = server(None, "proxy-a", Kind::Full, "");
    let foreign = certs::test_ca::TestCa::new();
    let mut stranger = foreign.own(foreign.server("proxy-b"));
    stranger.bundle = certs::LiveBundle::new(a.issuer().bundle().clone());
    for own in [
        a.enrolled("edge1").await,
        a.client("kube-apiserver"),
        stranger,
    ] {
        // TLS 1.3 lets the dialler finish before the server has looked at its certificate.
        if let Ok(session) = dial(&a, &own).await {
            assert_eq!(end(&session).await, Reason::Tls);
        }
    }
    metric_reaches(
        &a,
        "corvid_peer_sessions_refused_total{reason=\"tls\"}",
        3.0,
    )
    .await;
    // The other doors don't take a server.
    let visitor = server_own(&a, "proxy-b");
    if let Ok(session) = bare_session(&a, &visitor).await {
        assert_eq!(end(&session).await, Reason::Tls);
    }
    // One of another name than its certificate's.
    let session = dial(&a, &visitor).await.unwrap();
    let offer = Offer {
        agent: "proxy-c".parse::<ServerName>().unwrap(),
        software: String::new(),
        capabilities: vec![],
        limits: LIMITS,
        instance: String::new(),
        line: None,
    };
    let refused = Control::dial(session, &offer).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::IdentityMismatch);
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_but_a_server_of_the_same_authority_is_believed() {
    let [a, b] = fleet([(Kind::Full, ""), (Kind::Full, "")]).await;
    let foreign = certs::test_ca::TestCa::new();
    let claims = || vec![announces(&["edge1"])];
    let mut stranger = foreign.own(foreign.server("proxy-x"));
    stranger.bundle = certs::LiveBundle::new(a.issuer().bundle().clone());
    let impostors = [
        Impostor::listen(&a.enrolled("edge9").await, "proxy-x", claims(), nothing),
        Impostor::listen(&a.client("kube-apiserver"), "proxy-x", claims(), nothing),
        Impostor::listen(&stranger, "proxy-x", claims(), nothing),
        // A good one that calls itself another.
        Impostor::listen(&server_own(&a, "proxy-x"), "proxy-y", claims(), nothing),
    ];
    tell_of(&a, &impostors.each_ref().map(|impostor| impostor.address));
    eventually("each was tried and refused", || {
        let members = a.peers.members();
        impostors
            .iter()
            .all(|impostor| matches!(members.get(&impostor.address), Some(Standing::Failed(_))))
    })
    .await;
    assert!(
        a.peers
            .with_session_of(&"edge1".parse().unwrap())
            .is_empty()
    );
    assert!(!a.peers.knows(&"edge1".parse().unwrap()));
    assert_eq!(*a.peers.servers().borrow(), 2);
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_that_crowd_their_door_keep_no_server_out() {
    let a = server(None, "proxy-a", Kind::Full, "limits: {handshakes: 4}");
    let own = a.enrolled("edge1").await;
    // Each is let in and never says its hello.
    let mut crowd = Vec::new();
    for _ in 0..4 {
        crowd.push(bare_session(&a, &own).await.unwrap());
    }
    assert!(bare_session(&a, &own).await.is_err(), "there is room left");
    let (session, _tasks) = visit(&a, "proxy-b").await;
    drop(session);
    drop(crowd);
    a.stop().await;
}
