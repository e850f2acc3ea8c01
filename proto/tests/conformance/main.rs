//! One suite over every transport: the rules of `proto::transport`, each as a test.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod control;
mod line;
mod streams;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use control::*;
use proto::transport::quic::{Congestion, Endpoint, QuicError, QuicSession, Tuning};
use proto::transport::{RecvHalf, SendHalf, Session, SessionError, StreamError, memory};
use rustls_pki_types::PrivatePkcs8KeyDer;
use streams::*;

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
