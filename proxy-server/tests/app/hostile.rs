//! Servers that misbehave, with certificates that are good and with ones that are not.

mod control;
mod readers;
mod strangers;
mod streams;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use certs::{Clock, Name, Own, ServerSans, TrustDomain};
use proto::control::{Control, Liveness, Outbox};
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::{
    Congestion, Endpoint, QuicError, QuicRecv, QuicSend, QuicSession, Tuning,
};
use proto::transport::{SendHalf, Session};
use proto::wire::{
    AgentState, Draft, ForwardHeader, Limits, Offer, ServerOffer, StreamHeader, StreamReply,
    encode, pb,
};
use proto::{FrameReader, Reason, ServerName, SessionId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::stack::{DEADLINE, Stack, rewrite, text, within};

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
