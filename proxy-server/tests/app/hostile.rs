//! Servers that misbehave, with certificates that are good and with ones that are not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use certs::{Clock, Name, Own, ServerSans, TrustDomain};
use proto::control::{Control, GoAway, Liveness, Outbox, Quiet};
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::{
    Congestion, Endpoint, QuicError, QuicRecv, QuicSend, QuicSession, Tuning,
};
use proto::transport::{RecvHalf, SendHalf, Session, StreamError};
use proto::wire::{
    AgentState, Draft, ForwardHeader, Limits, Offer, ServerOffer, StreamHeader, StreamReply,
    encode, pb,
};
use proto::{FrameReader, Reason, ServerName, SessionId};
use proxy_server::peer::Standing;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::fleet::{Kind, announced, fleet, server};
use crate::stack::{
    DEADLINE, Stack, allow, bare_session, end, eventually, rewrite, shouter, text, within,
};

/// What a server of that name has, signed by the authority of `of`.
fn server_own(of: &Stack, name: &str) -> Own {
    let issuer = of.issuer();
    let now = Clock::system().now();
    let name = Name::parse(name).unwrap();
    let credential = issuer.issue_server(&name, &ServerSans::default(), now);
    Own {
        credential: certs::LiveCredential::new(credential.unwrap()),
        bundle: certs::LiveBundle::new(issuer.bundle().clone()),
        clock: Clock::system(),
        trust_domain: TrustDomain::default(),
    }
}

fn tuning() -> Tuning {
    Tuning {
        stream_window: 1 << 16,
        send_window: 4 << 20,
        max_streams: 256,
        idle_timeout: DEADLINE,
        congestion: Congestion::Cubic,
    }
}

const LIMITS: Limits = Limits {
    max_streams: 256,
    stream_window: 1 << 16,
};

async fn dial(to: &Stack, own: &Own) -> Result<QuicSession, QuicError> {
    let tls = certs::peer_client_quic(own).unwrap();
    Endpoint::dial(to.peer_listeners[0], certs::SERVER_SNI, tls, tuning()).await
}

/// A session that is agreed on, as a server of that name has it; what its control stream says is not looked at.
async fn visit(to: &Stack, name: &str) -> (QuicSession, JoinSet<()>) {
    let session = dial(to, &server_own(to, name)).await.unwrap();
    let offer = Offer {
        agent: name.parse::<ServerName>().unwrap(),
        software: "test".into(),
        capabilities: vec![],
        limits: LIMITS,
        instance: String::new(),
        line: None,
    };
    let (control, _) = Control::dial(session.clone(), &offer).await.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let live = Liveness::new(Keepalive::default());
        control.run(&live, |_| ()).await;
    });
    (session, tasks)
}

fn header(agent: &str, port: u16) -> pb::StreamHeader {
    let header = ForwardHeader {
        agent: agent.parse().unwrap(),
        node: agent.to_owned(),
        requester: "client/kube-apiserver from 10.0.0.1:1".to_owned(),
        header: StreamHeader {
            destination: format!("{agent}:{port}").parse().unwrap(),
            deadline: Duration::from_secs(10),
            trace: String::new(),
            pod: None,
        },
    };
    header.to_pb()
}

/// Asks for a stream, in these bytes, and says what is answered.
async fn ask(
    session: &QuicSession,
    header: Bytes,
) -> Result<(StreamReply, QuicSend, FrameReader<QuicRecv>), Reason> {
    let (mut send, recv) = session.open().await.unwrap();
    send.write_chunk(header).await.unwrap();
    let mut reader = FrameReader::new(recv);
    let reply = within(reader.read::<pb::StreamReply>()).await;
    let reply = reply.map_err(|error| error.reason())?.unwrap();
    Ok((StreamReply::from(&reply), send, reader))
}

/// Has those frames to say, one after the other.
struct Says(std::vec::IntoIter<Bytes>);

impl Outbox for Says {
    async fn next(&mut self) -> Bytes {
        match self.0.next() {
            Some(frame) => frame,
            None => std::future::pending().await,
        }
    }
}

fn announces(agents: &[&str]) -> Bytes {
    let mut draft = Draft::default();
    for agent in agents {
        assert!(draft.push(&agent.parse().unwrap(), AgentState::Session));
    }
    encode(&draft.finish(true))
}

/// A server that says `frames` to whoever dials it, and then does `serve` with each stream.
struct Impostor {
    address: SocketAddr,
    /// Sessions that were agreed on.
    sessions: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Impostor {
    fn listen<F, W>(own: &Own, name: &str, frames: Vec<Bytes>, serve: F) -> Self
    where
        F: Fn(QuicSend, QuicRecv) -> W + Send + Sync + Clone + 'static,
        W: Future<Output = ()> + Send + 'static,
    {
        let tls = certs::peer_server_quic(own).unwrap();
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let endpoint = Endpoint::listen(loopback, tls, tuning(), &[7; 32]).unwrap();
        let address = endpoint.local_address().unwrap();
        let name: ServerName = name.parse().unwrap();
        let sessions = Arc::new(AtomicUsize::new(0));
        let agreed = Arc::clone(&sessions);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut running = JoinSet::new();
            while let Some(incoming) = endpoint.accept().await {
                let (name, frames, serve) = (name.clone(), frames.clone(), serve.clone());
                let agreed = Arc::clone(&agreed);
                running.spawn(async move {
                    let Ok(session) = incoming.handshake().await else {
                        return;
                    };
                    let Ok((control, hello)) = Control::accept(session.clone()).await else {
                        return;
                    };
                    let offer = ServerOffer {
                        server: name,
                        software: "impostor".into(),
                        capabilities: vec![],
                        limits: LIMITS,
                        servers: 0,
                    };
                    let dialler: ServerName = hello.agent.parse().unwrap();
                    let id = SessionId::random();
                    let Ok((control, _)) = control.answer(&hello, &dialler, &offer, id, 0).await
                    else {
                        return;
                    };
                    agreed.fetch_add(1, Ordering::Relaxed);
                    let streams = async {
                        let mut streams = JoinSet::new();
                        while let Ok((send, recv)) = session.accept().await {
                            streams.spawn(serve.clone()(send, recv));
                        }
                    };
                    let live = Liveness::new(Keepalive::default());
                    let says = Says(frames.into_iter());
                    tokio::select! {
                        _ = control.run_with(&live, |_| (), says) => {}
                        () = async { streams.await; std::future::pending().await } => {}
                    }
                });
            }
        });
        Self {
            address,
            sessions,
            _tasks: tasks,
        }
    }
}

async fn nothing(_send: QuicSend, _recv: QuicRecv) {}

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

/// Adds these to the servers that `to` is told of.
fn tell_of(to: &Stack, addresses: &[SocketAddr]) {
    let file = to.dir.path().join("proxy-server.yaml");
    let more: String = addresses
        .iter()
        .map(|address| format!("'{address}', "))
        .collect();
    let changed = text(&file).replace("servers: [", &format!("servers: [{more}"));
    rewrite(&file, &changed);
    to.reload.reload();
}

async fn metric_reaches(at: &Stack, metric: &str, least: f64) {
    let reached = async {
        while at.metric(metric).await < least {
            tokio::task::yield_now().await;
        }
    };
    assert!(
        tokio::time::timeout(DEADLINE, reached).await.is_ok(),
        "never: {metric}"
    );
}

/// One request to its end.
async fn shouts(at: &Stack, to: &str) {
    let mut stream = within(at.connect(to)).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "HELLO");
}

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
async fn a_peer_that_reads_nothing_stalls_nobody_and_costs_no_more_than_the_budget() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = {
        // 4 MiB: 64 stopped readers.
        let mut small = server(None, "proxy-a", Kind::Full, "");
        let file = small.dir.path().join("proxy-server.yaml");
        let config = text(&file).replace("backend: {", "backend: {memory: 4MiB, ");
        small.shutdown.cancel();
        small.exit().await;
        let file = dir.path().join("proxy-server.yaml");
        std::fs::write(
            &file,
            config.replace(
                &small.dir.path().display().to_string(),
                &dir.path().display().to_string(),
            ),
        )
        .unwrap();
        Stack::start_with(dir, &file)
    };
    let mut edge = JoinSet::new();
    let (port, flood) = (shouter(&mut edge).await, floods(&mut edge).await);
    a.agent("edge1", &allow(&[port, flood]));
    a.sessions("edge1", 1).await;
    let (hostile, _tasks) = visit(&a, "proxy-x").await;
    let mut stopped = Vec::new();
    for _ in 0..100 {
        let (reply, send, reader) = ask(&hostile, encode(&header("edge1", flood)))
            .await
            .unwrap();
        reply.unwrap();
        stopped.push((send, reader));
    }
    let (honest, _others) = visit(&a, "proxy-y").await;
    for session in [&honest, &hostile] {
        let (reply, mut send, reader) = ask(session, encode(&header("edge1", port))).await.unwrap();
        reply.unwrap();
        send.write_chunk(Bytes::from_static(b"hello"))
            .await
            .unwrap();
        send.finish().unwrap();
        let (mut recv, _) = reader.into_parts();
        let mut chunk = [Bytes::new()];
        assert_eq!(within(recv.read_chunks(&mut chunk)).await.unwrap(), Some(1));
    }
    shouts(&a, &format!("edge1:{port}")).await;
    // Those that stopped longest are reset, until the others fit.
    metric_reaches(
        &a,
        "corvid_streams_total{frontend=\"peer\",path=\"tunnel\",reason=\"slow_reader\"}",
        36.0,
    )
    .await;
    let mut reset = 0;
    for (_send, reader) in stopped {
        let (mut recv, _) = reader.into_parts();
        let read = async {
            let mut chunks = [const { Bytes::new() }; 8];
            loop {
                match recv.read_chunks(&mut chunks).await {
                    Ok(_) => {}
                    Err(error) => return error,
                }
            }
        };
        if let Ok(error) = tokio::time::timeout(Duration::from_millis(100), read).await {
            assert_eq!(error, StreamError::Reset(Reason::SlowReader));
            reset += 1;
        }
    }
    assert!(reset >= 36, "{reset}");
    a.shutdown.cancel();
}

/// A stand-in that writes for ever to whoever connects.
async fn floods(tasks: &mut JoinSet<()>) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let block = vec![0; 16 << 10];
                while stream.write_all(&block).await.is_ok() {}
            });
        }
    });
    port
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
