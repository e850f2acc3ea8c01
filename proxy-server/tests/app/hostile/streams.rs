//! Streams that a server opens: of two hops, with headers that can not be read, and where it may open none.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use proto::control::{Control, Liveness, Quiet};
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::{Endpoint, QuicRecv, QuicSend};
use proto::transport::{RecvHalf, SendHalf, Session};
use proto::wire::{ServerOffer, encode, pb};
use proto::{FrameReader, Reason, ServerName, SessionId};
use tokio::task::JoinSet;

use super::{
    Impostor, LIMITS, announces, ask, header, metric_reaches, server_own, tell_of, tuning, visit,
};
use crate::fleet::{Kind, announced, fleet, server};
use crate::stack::{allow, shouter, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_goes_two_hops() {
    let [a, mut b] = fleet([(Kind::Full, ""), (Kind::Full, "")]).await;
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    b.agent("edge1", &allow(&[port]));
    announced(&a, "edge1", 1).await;
    let (session, _tasks) = visit(&a, "proxy-x").await;
    // A knows who has it, and is asked by a server: it says no.
    let (reply, ..) = ask(&session, encode(&header("edge1", port))).await.unwrap();
    assert_eq!(reply.unwrap_err().0, Reason::NoSession);
    for hops in [0, 2, 5] {
        let header = pb::StreamHeader {
            hops,
            ..header("edge1", port)
        };
        let (reply, ..) = ask(&session, encode(&header)).await.unwrap();
        assert_eq!(reply.unwrap_err().0, Reason::Protocol, "{hops}");
    }
    assert_eq!(
        b.metric("corvid_streams_total{frontend=\"peer\"").await,
        0.0
    );
    // One that sends back what it is asked for: A asks it once, and answers it no.
    let asked = Arc::new(AtomicUsize::new(0));
    let (back, counted) = (session.clone(), Arc::clone(&asked));
    let mirror = move |mut send: QuicSend, recv: QuicRecv| {
        let (back, counted) = (back.clone(), Arc::clone(&counted));
        async move {
            let mut reader = FrameReader::new(recv);
            let Ok(Some(header)) = reader.read::<pb::StreamHeader>().await else {
                return;
            };
            counted.fetch_add(1, Ordering::Relaxed);
            let (reply, ..) = ask(&back, encode(&header)).await.unwrap();
            let reply = pb::StreamReply::from(&reply);
            send.write_chunk(encode(&reply)).await.ok();
            send.finish().ok();
            reader.read::<pb::StreamReply>().await.ok();
        }
    };
    let own = server_own(&a, "proxy-y");
    let mirror = Impostor::listen(&own, "proxy-y", vec![announces(&["edge5"])], mirror);
    tell_of(&a, &[mirror.address]);
    announced(&a, "edge5", 1).await;
    let line = within(a.connect("edge5:1")).await.unwrap_err();
    assert!(
        line.contains("503 node edge5: no session at any of 3 proxy-servers"),
        "{line}"
    );
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    b.stop().await;
    a.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_read_is_refused_and_the_session_goes_on() {
    let mut a = server(None, "proxy-a", Kind::Full, "");
    let mut edge = JoinSet::new();
    let port = shouter(&mut edge).await;
    a.agent("edge1", &allow(&[port]));
    a.sessions("edge1", 1).await;
    let (session, _tasks) = visit(&a, "proxy-x").await;
    let garbage = [
        Bytes::from_static(b"\xff\xff\xff"),
        Bytes::from_static(b"\x05\xff\xff\xff\xff\xff"),
    ];
    for garbage in garbage {
        assert_eq!(ask(&session, garbage).await.err(), Some(Reason::Protocol));
    }
    let good = || header("edge1", port);
    let wrong = [
        pb::StreamHeader {
            agent: String::new(),
            ..good()
        },
        pb::StreamHeader {
            agent: "Edge One".into(),
            ..good()
        },
        pb::StreamHeader { port: 0, ..good() },
        pb::StreamHeader {
            host: "a b".into(),
            ..good()
        },
    ];
    for header in wrong {
        let (reply, ..) = ask(&session, encode(&header)).await.unwrap();
        assert_eq!(reply.unwrap_err().0, Reason::Protocol, "{header:?}");
    }
    for agent in ["edge2", "webhook.default.svc"] {
        let (reply, ..) = ask(&session, encode(&header(agent, 1))).await.unwrap();
        assert_eq!(reply.unwrap_err().0, Reason::NoSession, "{agent}");
    }
    metric_reaches(&a, "corvid_peer_headers_refused_total", 6.0).await;
    // What it says of agents is not listened to.
    let (reply, mut send, reader) = ask(&session, encode(&good())).await.unwrap();
    reply.unwrap();
    send.write_chunk(Bytes::from_static(b"hello"))
        .await
        .unwrap();
    send.finish().unwrap();
    let (mut recv, early) = reader.into_parts();
    let mut answer = early.to_vec();
    let mut chunk = [Bytes::new()];
    while within(recv.read_chunks(&mut chunk))
        .await
        .unwrap()
        .is_some()
    {
        answer.extend_from_slice(&chunk[0]);
    }
    assert_eq!(answer, b"HELLO");
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_may_not_open_streams_on_a_session_that_was_dialled_to_it() {
    let a = server(None, "proxy-a", Kind::FrontendsOnly, "");
    let own = server_own(&a, "proxy-x");
    let tls = certs::peer_server_quic(&own).unwrap();
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    let endpoint = Endpoint::listen(loopback, tls, tuning(), &[7; 32]).unwrap();
    tell_of(&a, &[endpoint.local_address().unwrap()]);
    let session = within(endpoint.accept())
        .await
        .unwrap()
        .handshake()
        .await
        .unwrap();
    let (control, hello) = Control::accept(session.clone()).await.unwrap();
    let offer = ServerOffer {
        server: "proxy-x".parse().unwrap(),
        software: String::new(),
        capabilities: vec![],
        limits: LIMITS,
        servers: 0,
    };
    let dialler: ServerName = "proxy-a".parse().unwrap();
    let id = SessionId::random();
    let (control, _) = control
        .answer(&hello, &dialler, &offer, id, 0)
        .await
        .unwrap();
    let mut stream = session.open().await.unwrap();
    stream
        .0
        .write_chunk(encode(&header("edge1", 1)))
        .await
        .unwrap();
    let live = Liveness::new(Keepalive::default());
    let ended = within(control.run_with(&live, |_| (), Quiet)).await;
    assert_eq!(ended.reason(), Reason::Protocol);
    a.stop().await;
}
