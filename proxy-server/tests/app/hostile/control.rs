//! What a server says on its control stream: garbage, too much, what is not so, and that it wants to be left for weeks.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use proto::control::GoAway;
use proto::transport::quic::{QuicRecv, QuicSend};
use proto::transport::{RecvHalf, SendHalf};
use proto::wire::{AgentState, Draft, StreamReply, encode, pb};
use proto::{FrameReader, Reason};
use proxy_server::peer::Standing;
use tokio::task::JoinSet;

use super::{Impostor, announces, metric_reaches, nothing, server_own, shouts, tell_of};
use crate::fleet::{Kind, announced, fleet, server};
use crate::stack::{allow, eventually, shouter, within};

/// Reads the header and answers so.
fn answers(
    reply: StreamReply,
) -> impl Fn(QuicSend, QuicRecv) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>>
+ Send
+ Sync
+ Clone {
    move |mut send, recv| {
        let reply = pb::StreamReply::from(&reply);
        Box::pin(async move {
            let mut reader = FrameReader::new(recv);
            reader.read::<pb::StreamHeader>().await.ok();
            send.write_chunk(encode(&reply)).await.ok();
            send.finish().ok();
            let (mut recv, _) = reader.into_parts();
            while let Ok(Some(_)) = recv.read_chunks(&mut [Bytes::new()]).await {}
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_in_place_of_announcements_ends_that_session_and_no_other() {
    let [a, mut b] = fleet([(Kind::Full, ""), (Kind::Full, "")]).await;
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    b.agent("edge1", &allow(&[port]));
    announced(&a, "edge1", 1).await;
    let bad_name = pb::Announce {
        agents: vec![pb::AnnouncedAgent {
            agent: "Not A Name".into(),
            state: 1,
            ..Default::default()
        }],
        complete: true,
    };
    let bad_name = pb::ControlFrame {
        body: Some(pb::control_frame::Body::Announce(bad_name)),
    };
    let frames = [
        encode(&bad_name),
        Bytes::from_static(b"\xff\xff\xff\xff"),
        Bytes::from_static(b"\x05\xff\xff\xff\xff\xff"),
    ];
    let mut impostors = Vec::new();
    for (frame, letter) in frames.into_iter().zip('x'..) {
        let name = format!("proxy-{letter}");
        impostors.push(Impostor::listen(
            &server_own(&a, &name),
            &name,
            vec![frame],
            nothing,
        ));
    }
    let addresses: Vec<_> = impostors.iter().map(|impostor| impostor.address).collect();
    tell_of(&a, &addresses);
    let broke = "the other end broke the tunnel protocol";
    eventually("each is left", || {
        let members = a.peers.members();
        let left = |address| members.get(address) == Some(&Standing::Failed(broke.to_owned()));
        addresses.iter().all(left)
    })
    .await;
    shouts(&a, &format!("edge1:{port}")).await;
    assert_eq!(a.peers.all().len(), 1);
    // They are not stormed.
    let tries: usize = impostors
        .iter()
        .map(|i| i.sessions.load(Ordering::Relaxed))
        .sum();
    assert_eq!(tries, 3);
    b.stop().await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_announces_millions_is_left_and_nothing_of_it_is_kept() {
    let [a, b] = fleet([(Kind::Full, ""), (Kind::Full, "")]).await;
    let mut frames = Vec::new();
    let mut number = 0;
    while number < 200_000 {
        let mut draft = Draft::default();
        while draft.push(
            &format!("edge{number}").parse().unwrap(),
            AgentState::Session,
        ) {
            number += 1;
        }
        frames.push(encode(&draft.finish(false)));
    }
    let own = server_own(&a, "proxy-x");
    let impostor = Impostor::listen(&own, "proxy-x", frames, nothing);
    tell_of(&a, &[impostor.address]);
    let over = Standing::Failed(Reason::Overloaded.sentence().to_owned());
    eventually("it is left", || {
        a.peers.members().get(&impostor.address) == Some(&over)
    })
    .await;
    eventually("its session is gone", || a.peers.all().len() == 1).await;
    assert!(!a.peers.knows(&"edge1".parse().unwrap()));
    assert!(a.peers.agents().is_empty());
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_false_announcement_costs_a_retry_and_nothing_else() {
    let [a, mut b] = fleet([(Kind::Full, ""), (Kind::Full, "")]).await;
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    b.agent("edge1", &allow(&[port]));
    announced(&a, "edge1", 1).await;
    let claims = || vec![announces(&["edge1"])];
    let refuses = |reason| answers(Err((reason, "at x".to_owned())));
    let garbage = |mut send: QuicSend, recv: QuicRecv| async move {
        send.write_chunk(Bytes::from_static(b"\xff\xff\xff"))
            .await
            .ok();
        std::future::pending::<()>().await;
        drop(recv);
    };
    let silence = |send: QuicSend, recv: QuicRecv| async move {
        std::future::pending::<()>().await;
        drop((send, recv));
    };
    let own = |letter| server_own(&a, &format!("proxy-{letter}"));
    let liars = [
        Impostor::listen(&own('u'), "proxy-u", claims(), refuses(Reason::NoSession)),
        Impostor::listen(&own('v'), "proxy-v", claims(), garbage),
        Impostor::listen(&own('w'), "proxy-w", claims(), nothing),
        Impostor::listen(&own('x'), "proxy-x", claims(), silence),
    ];
    for (count, liar) in liars.iter().enumerate() {
        tell_of(&a, &[liar.address]);
        announced(&a, "edge1", count + 2).await;
        // Its announcement is the newest, so it is asked first.
        shouts(&a, &format!("edge1:{port}")).await;
    }
    metric_reaches(&a, "corvid_tunnel_retries_total", 6.0).await;
    // It is asked for what nobody has, and refuses in words that are not its to say.
    let own = server_own(&a, "proxy-z");
    let rude = refuses(Reason::Unauthenticated);
    let rude = Impostor::listen(&own, "proxy-z", vec![announces(&["edge7"])], rude);
    tell_of(&a, &[rude.address]);
    announced(&a, "edge7", 1).await;
    let line = within(a.connect("edge7:1")).await.unwrap_err();
    assert!(
        line.contains("502 node edge7: the other end broke the tunnel protocol"),
        "{line}"
    );
    b.stop().await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_asks_to_be_left_for_weeks_is_dialled_again_in_seconds() {
    let a = server(None, "proxy-a", Kind::FrontendsOnly, "");
    let away = GoAway {
        reason: Reason::Draining,
        deadline: Duration::ZERO,
        retry_after: Duration::from_secs(30 * 86_400),
        detail: String::new(),
    };
    let frames = vec![encode(&pb::ControlFrame::from(away))];
    let own = server_own(&a, "proxy-x");
    let impostor = Impostor::listen(&own, "proxy-x", frames, nothing);
    tell_of(&a, &[impostor.address]);
    eventually("it is dialled again", || {
        impostor.sessions.load(Ordering::Relaxed) > 1
    })
    .await;
    a.stop().await;
}
