use std::future::pending;

use certs::Clock;
use daemon::{Metrics, Tasks};
use proto::transport::memory::{self, MemoryRecv, MemorySession};
use proto::transport::{Session as _, StreamError};
use proto::wire::encode;
use tokio::net::TcpListener;
use tokio::time::timeout;

use super::*;
use crate::enroll::Expiry;
use crate::metrics::Gauges;
use crate::registry::Registry;

/// A receiving half with a defect.
#[derive(Debug)]
struct Broken(MemoryRecv);

impl RecvHalf for Broken {
    async fn read_chunks(&mut self, _chunks: &mut [Bytes]) -> Result<Option<usize>, StreamError> {
        panic!("expected by the test")
    }

    fn reset(&mut self, reason: Reason) {
        self.0.reset(reason);
    }
}

fn serving() -> Arc<Serving> {
    let policy = Policy {
        node: "edge1".into(),
        localhost_ports: [].into(),
        node_addresses: Vec::new(),
        allow: vec![crate::policy::Rule {
            cidr: "127.0.0.0/8".parse().unwrap(),
            ports: vec![1..=65535],
        }],
        pods: crate::policy::Pods::default(),
    };
    Arc::new(Serving {
        policy: ArcSwap::from_pointee(policy),
        own: OwnAddresses::new(),
        resolver: Resolver::new(),
        files: Files::of_process(),
        budget: Budget::new(1 << 20),
        timeouts: Timeouts::default(),
        metrics: AgentMetrics::new(),
        refusing: CancellationToken::new(),
        cut: CancellationToken::new(),
    })
}

fn encoded(serving: &Serving) -> String {
    let metrics = Metrics::new("0");
    let gauges = Gauges {
        registry: Registry::new(),
        budget: serving.budget.clone(),
        files: serving.files.clone(),
        clock: Clock::system(),
        expiry: Expiry::default(),
    };
    metrics.register(|registry| serving.metrics.register(registry, gauges));
    metrics.encode().unwrap()
}

async fn halves(server: &MemorySession, agent: &MemorySession) -> (Halves, Halves) {
    let (opened, accepted) = tokio::join!(server.open(), agent.accept());
    (opened.unwrap(), accepted.unwrap())
}

type Halves = (memory::MemorySend, MemoryRecv);

#[tokio::test]
async fn a_panic_in_one_stream_resets_it_and_leaves_the_others_alone() {
    let serving = serving();
    let (server, agent) = memory::pair(64 << 10, 8);
    let destination = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let tasks = Tasks::new();

    let ((mut send, mut recv), other) = halves(&server, &agent).await;
    tasks.spawn(
        "stream",
        serve(Arc::clone(&serving), None, other, pending()),
    );
    let header = StreamHeader {
        destination: destination.local_addr().unwrap().into(),
        deadline: Duration::from_secs(10),
        trace: String::new(),
        pod: None,
    };
    send.write_chunk(encode(&header.to_pb())).await.unwrap();
    let (mut dialled, _) = destination.accept().await.unwrap();

    let ((_send, mut broken), (agent_send, agent_recv)) = halves(&server, &agent).await;
    tasks.spawn(
        "stream",
        serve(
            Arc::clone(&serving),
            None,
            (agent_send, Broken(agent_recv)),
            pending(),
        ),
    );
    let ended = broken.read_chunks(&mut [Bytes::new()]).await.unwrap_err();
    assert_eq!(ended, StreamError::Reset(Reason::Cancelled));
    assert_eq!(tasks.panics(), 1);

    send.write_chunk(Bytes::from_static(b"untouched"))
        .await
        .unwrap();
    send.finish().unwrap();
    let mut got = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut dialled, &mut got)
        .await
        .unwrap();
    assert_eq!(got, b"untouched");
    drop(dialled);
    let mut chunk = [Bytes::new()];
    while let Some(_reply) = recv.read_chunks(&mut chunk).await.unwrap() {}
    assert_eq!(
        tasks.drain(Duration::from_secs(30)).await,
        daemon::Drained::Clean
    );
    let text = encoded(&serving);
    for line in [
        "corvid_streams_total{reason=\"internal\"} 1",
        "corvid_streams_total{reason=\"finished\"} 1",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[tokio::test]
async fn what_is_cut_is_cut_on_both_sides_with_its_reason() {
    let serving = serving();
    let (server, agent) = memory::pair(64 << 10, 8);
    let destination = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let tasks = Tasks::new();
    let ((mut send, mut recv), accepted) = halves(&server, &agent).await;
    tasks.spawn(
        "stream",
        serve(Arc::clone(&serving), None, accepted, pending()),
    );
    let header = StreamHeader {
        destination: destination.local_addr().unwrap().into(),
        deadline: Duration::ZERO,
        trace: String::new(),
        pod: None,
    };
    send.write_chunk(encode(&header.to_pb())).await.unwrap();
    let (mut dialled, _) = destination.accept().await.unwrap();
    let mut chunk = [Bytes::new()];
    assert_eq!(
        recv.read_chunks(&mut chunk).await.unwrap(),
        Some(1),
        "the reply"
    );
    serving.cut.cancel();
    let ended = recv.read_chunks(&mut chunk).await.unwrap_err();
    assert_eq!(ended, StreamError::Reset(Reason::Draining));
    let error = tokio::io::AsyncReadExt::read(&mut dialled, &mut [0; 1])
        .await
        .unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(
        tasks.drain(Duration::from_secs(30)).await,
        daemon::Drained::Clean
    );
}

#[tokio::test]
async fn a_stream_whose_destination_reads_nothing_ends_with_its_session() {
    let serving = serving();
    let (server, agent) = memory::pair(64 << 10, 8);
    let destination = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let tasks = Tasks::new();
    let ((mut send, mut recv), accepted) = halves(&server, &agent).await;
    let lost = async move { proto::session_over(&agent).await };
    tasks.spawn("stream", serve(Arc::clone(&serving), None, accepted, lost));
    let header = StreamHeader {
        destination: destination.local_addr().unwrap().into(),
        deadline: Duration::ZERO,
        trace: String::new(),
        pod: None,
    };
    send.write_chunk(encode(&header.to_pb())).await.unwrap();
    let (dialled, _) = destination.accept().await.unwrap();
    let mut chunk = [Bytes::new()];
    assert_eq!(
        recv.read_chunks(&mut chunk).await.unwrap(),
        Some(1),
        "the reply"
    );
    // Until nothing moves any more: the sockets, the relay and the stream's window are full.
    let block = Bytes::from(vec![0; 64 << 10]);
    let full = Duration::from_secs(2);
    while let Ok(wrote) = timeout(full, send.write_chunk(block.clone())).await {
        wrote.unwrap();
    }
    server.close(Reason::SessionLost);
    assert_eq!(
        tasks.drain(Duration::from_secs(30)).await,
        daemon::Drained::Clean
    );
    drop(dialled);
    let text = encoded(&serving);
    let line = "corvid_streams_total{reason=\"session_lost\"} 1";
    assert!(text.contains(line), "{line}: {text}");
}
