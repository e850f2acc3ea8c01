//! One suite over every transport: the rules of `proto::transport`, each as a test.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod line;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use proto::control::{Control, ControlError, GoAway, Heard, Liveness, Outbox, Quiet};
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::{Congestion, Endpoint, QuicError, QuicSession, Tuning};
use proto::transport::{RecvHalf, SendHalf, Session, SessionError, StreamError, memory};
use proto::wire::{AgentState, Announcement, Draft, Limits, Offer, ServerOffer, encode};
use proto::{AgentName, Reason};
use rustls_pki_types::PrivatePkcs8KeyDer;

/// Larger than any wait that succeeds, so that a hang is a failure.
const DEADLINE: Duration = Duration::from_secs(60);
const WINDOW: u32 = 64 << 10;
const STREAMS: u32 = 100;

/// Two ends of one session of some transport: the first opens streams, the second accepts them.
trait Transport {
    type Session: Session;
    /// Kept alive for as long as the session.
    type Keep;
    async fn pair(idle: Duration) -> (Self::Session, Self::Session, Self::Keep);
}

struct Memory;

impl Transport for Memory {
    type Session = memory::MemorySession;
    type Keep = ();

    async fn pair(_idle: Duration) -> (Self::Session, Self::Session, ()) {
        let (a, b) = memory::pair(WINDOW as usize, STREAMS as usize);
        (a, b, ())
    }
}

struct Quic;

impl Quic {
    /// A listener, and what dials it.
    fn ends(
        idle: Duration,
        stream_window: u32,
    ) -> (
        Endpoint,
        impl AsyncFnOnce(SocketAddr) -> Result<QuicSession, QuicError>,
    ) {
        let signed = rcgen::generate_simple_self_signed(["test".to_owned()]).unwrap();
        let key = PrivatePkcs8KeyDer::from(signed.signing_key.serialize_der()).into();
        let chain = vec![signed.cert.der().clone()];
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(signed.cert.der().clone()).unwrap();
        let tls13 = &[&rustls::version::TLS13];
        let server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(tls13)
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(tls13)
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let tuning = Tuning {
            stream_window,
            send_window: 4 << 20,
            max_streams: STREAMS,
            idle_timeout: idle,
            congestion: Congestion::Cubic,
        };
        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let server = quinn::crypto::rustls::QuicServerConfig::try_from(server).unwrap();
        let listener = Endpoint::listen(local, Arc::new(server), tuning, &[7; 32]).unwrap();
        let client = quinn::crypto::rustls::QuicClientConfig::try_from(client).unwrap();
        let dial =
            async move |address| Endpoint::dial(address, "test", Arc::new(client), tuning).await;
        (listener, dial)
    }
}

impl Transport for Quic {
    type Session = QuicSession;
    type Keep = Endpoint;

    async fn pair(idle: Duration) -> (QuicSession, QuicSession, Endpoint) {
        let (listener, dial) = Self::ends(idle, WINDOW);
        let address = listener.local_address().unwrap();
        let accept = async { listener.accept().await.unwrap().handshake().await.unwrap() };
        let (accepted, dialled) = tokio::join!(accept, dial(address));
        (accepted, dialled.unwrap(), listener)
    }
}

fn pattern(length: usize) -> Bytes {
    (0..length)
        .map(|i| u8::try_from(i * 7 % 251).unwrap())
        .collect()
}

async fn read_to_end<R: RecvHalf>(recv: &mut R) -> Result<Vec<u8>, StreamError> {
    let mut all = Vec::new();
    let mut chunks = [const { Bytes::new() }; 8];
    while let Some(count) = recv.read_chunks(&mut chunks).await? {
        for chunk in &mut chunks[..count] {
            all.extend_from_slice(&std::mem::take(chunk));
        }
    }
    Ok(all)
}

async fn read_exactly<R: RecvHalf>(recv: &mut R, length: usize) -> Vec<u8> {
    let mut all = Vec::new();
    let mut chunks = [Bytes::new()];
    while all.len() < length {
        recv.read_chunks(&mut chunks)
            .await
            .unwrap()
            .expect("not yet the end");
        all.extend_from_slice(&chunks[0]);
    }
    all
}

/// Opens a stream and takes it at the other side; QUIC shows a stream only once it carries something.
async fn stream<S: Session>(a: &S, b: &S) -> ((S::Send, S::Recv), (S::Send, S::Recv)) {
    let mut near = a.open().await.unwrap();
    near.0.write_chunk(Bytes::from_static(b"!")).await.unwrap();
    let mut far = b.accept().await.unwrap();
    assert_eq!(read_exactly(&mut far.1, 1).await, b"!");
    (near, far)
}

async fn bytes_arrive_in_order<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let ((mut send, _r), (_s, mut recv)) = stream(&a, &b).await;
    let data = pattern(3 << 20);
    let write = async {
        for piece in data.chunks(10_007) {
            send.write_chunk(Bytes::copy_from_slice(piece))
                .await
                .unwrap();
        }
        send.finish().unwrap();
    };
    let (read, ()) = tokio::join!(read_to_end(&mut recv), write);
    assert!(read.unwrap() == data);
}

async fn each_half_closes_on_its_own<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let ((mut send, mut back), (mut answer, mut recv)) = stream(&a, &b).await;
    send.finish().unwrap();
    assert_eq!(read_to_end(&mut recv).await.unwrap(), b"");
    answer
        .write_chunk(Bytes::from_static(b"late"))
        .await
        .unwrap();
    answer.finish().unwrap();
    assert_eq!(read_to_end(&mut back).await.unwrap(), b"late");
}

async fn a_reset_ends_both_ways_with_its_reason<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let ((mut send, mut back), (mut answer, mut recv)) = stream(&a, &b).await;
    send.reset(Reason::SlowReader);
    let reset = StreamError::Reset(Reason::SlowReader);
    assert_eq!(
        read_to_end(&mut back).await.unwrap_err(),
        reset,
        "own receiving half"
    );
    assert_eq!(
        read_to_end(&mut recv).await.unwrap_err(),
        reset,
        "the peer's receiving half"
    );
    drop((send, back));
    let refused = loop {
        if let Err(error) = answer.write_chunk(pattern(1000)).await {
            break error;
        }
    };
    assert_eq!(refused, reset, "the peer's sending half");
}

async fn a_reset_by_the_reader_reaches_the_writer<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let ((mut send, _back), (_answer, mut recv)) = stream(&a, &b).await;
    recv.reset(Reason::DestinationReset);
    let error = loop {
        if let Err(error) = send.write_chunk(pattern(1000)).await {
            break error;
        }
    };
    assert_eq!(error, StreamError::Reset(Reason::DestinationReset));
}

async fn a_half_dropped_unfinished_is_a_reset<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let ((mut send, _back), (_answer, mut recv)) = stream(&a, &b).await;
    send.write_chunk(pattern(100)).await.unwrap();
    drop(send);
    assert_eq!(
        read_to_end(&mut recv).await.unwrap_err(),
        StreamError::Reset(Reason::Cancelled)
    );
}

async fn a_finished_half_may_be_dropped<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let ((mut send, _back), (_answer, mut recv)) = stream(&a, &b).await;
    send.write_chunk(pattern(100)).await.unwrap();
    send.finish().unwrap();
    drop(send);
    assert_eq!(read_to_end(&mut recv).await.unwrap(), pattern(100));
}

async fn stopped_readers_hold_back_no_other_stream_and_little_memory<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let mut stopped = Vec::new();
    for _ in 0..64 {
        let ((mut send, back), far) = stream(&a, &b).await;
        let mut taken = 0_usize;
        // Until credit is used up; nobody reads at the other side.
        while tokio::time::timeout(
            Duration::from_millis(20),
            send.write_chunk(pattern(8 << 10)),
        )
        .await
        .is_ok()
        {
            taken += 8 << 10;
            assert!(
                taken < 40 * WINDOW as usize,
                "an unread stream takes bytes without end"
            );
        }
        stopped.push((send, back, far));
    }
    let ((mut send, _r), (_s, mut recv)) = stream(&a, &b).await;
    let data = pattern(8 << 20);
    let write = async {
        for piece in data.chunks(64 << 10) {
            send.write_chunk(Bytes::copy_from_slice(piece))
                .await
                .unwrap();
        }
        send.finish().unwrap();
    };
    let both = async { tokio::join!(read_to_end(&mut recv), write) };
    let (read, ()) = tokio::time::timeout(DEADLINE, both)
        .await
        .expect("64 stopped readers stall another");
    assert!(read.unwrap() == data);
    drop(stopped);
}

async fn the_stream_limit_makes_openers_wait<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let mut all = Vec::new();
    for _ in 0..STREAMS {
        all.push(stream(&a, &b).await);
    }
    let more = tokio::time::timeout(Duration::from_millis(200), a.open()).await;
    assert!(more.is_err(), "a stream beyond the limit");
    all.truncate(1);
    tokio::time::timeout(DEADLINE, stream(&a, &b))
        .await
        .expect("room again");
}

async fn closing_tells_the_peer_why_and_ends_its_streams<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let (_near, (_answer, mut recv)) = stream(&a, &b).await;
    a.close(Reason::Draining);
    assert_eq!(b.closed().await, SessionError::Peer(Reason::Draining));
    let lost = StreamError::Session(SessionError::Peer(Reason::Draining));
    assert_eq!(read_to_end(&mut recv).await.unwrap_err(), lost);
    assert!(b.open().await.is_err() && b.accept().await.is_err());
}

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

async fn a_go_away_arrives_and_streams_go_on<T: Transport>() {
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

async fn what_a_server_has_to_say_arrives<T: Transport>() {
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

async fn a_peer_that_reads_nothing_is_told_no_more_than_it_takes<T: Transport>() {
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

async fn an_agent_of_another_name_is_told_and_refused<T: Transport>() {
    let (server, agent, _keep) = T::pair(DEADLINE).await;
    let ours = offer();
    let (accepted, dialled) =
        tokio::join!(serve_hello(server, "edge2"), Control::dial(agent, &ours));
    assert_eq!(accepted.unwrap_err().reason(), Reason::IdentityMismatch);
    assert_eq!(dialled.unwrap_err().reason(), Reason::IdentityMismatch);
}

async fn garbage_on_the_control_stream_ends_the_session<T: Transport>() {
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

async fn a_truncated_hello_ends_the_session<T: Transport>() {
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

async fn a_silent_peer_is_dead<T: Transport>() {
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

macro_rules! suite {
    ($($test:ident),* $(,)?) => {
        mod over_quic {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                tokio::time::timeout(super::DEADLINE, super::$test::<super::Quic>()).await.expect("in time");
            })*
        }
        mod in_memory {
            $(#[tokio::test]
            async fn $test() {
                tokio::time::timeout(super::DEADLINE, super::$test::<super::Memory>()).await.expect("in time");
            })*
        }
    };
}

suite! {
    a_finished_half_may_be_dropped,
    a_go_away_arrives_and_streams_go_on,
    a_half_dropped_unfinished_is_a_reset,
    a_peer_that_reads_nothing_is_told_no_more_than_it_takes,
    a_reset_by_the_reader_reaches_the_writer,
    a_reset_ends_both_ways_with_its_reason,
    a_silent_peer_is_dead,
    a_truncated_hello_ends_the_session,
    an_agent_of_another_name_is_told_and_refused,
    bytes_arrive_in_order,
    closing_tells_the_peer_why_and_ends_its_streams,
    each_half_closes_on_its_own,
    garbage_on_the_control_stream_ends_the_session,
    stopped_readers_hold_back_no_other_stream_and_little_memory,
    the_stream_limit_makes_openers_wait,
    what_a_server_has_to_say_arrives,
}

#[tokio::test]
async fn a_cut_line_ends_every_stream() {
    let (a, b, ()) = Memory::pair(DEADLINE).await;
    let (_near, (_answer, mut recv)) = stream(&a, &b).await;
    a.cut();
    assert_eq!(
        read_to_end(&mut recv).await.unwrap_err(),
        StreamError::Session(SessionError::Silent)
    );
    assert_eq!(a.closed().await, SessionError::Silent);
}
