//! A server that does the real handshakes and leaves the rest to the test.

use std::net::SocketAddr;
use std::time::Duration;

use certs::test_ca::TestCa;
use certs::{Clock, Credential, EnrollLimits, EnrollService, Own, Revocations, Store};
use daemon::Tasks;
use proto::control::{Control, Liveness};
use proto::transport::Session;
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::{Endpoint, Tuning};
use proto::wire::{Limits, ServerOffer};
use proto::{Reason, SessionId};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{DEADLINE, Peer};

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) revoked: Revocations,
    pub(crate) store: Option<Store>,
    endpoint: Endpoint,
    sessions: mpsc::Receiver<Peer>,
    tasks: Tasks,
    _state: tempfile::TempDir,
}

/// What a server answers hellos with.
#[derive(Clone)]
enum Answer {
    /// Under that name, one of so many.
    Accept(String, u32),
    Refuse(Reason, Duration),
}

impl Server {
    /// A server of that name at any port of loopback.
    pub(crate) async fn new(ca: &TestCa, name: &str) -> Self {
        Self::at(ca, name, "127.0.0.1:0".parse().unwrap()).await
    }

    pub(crate) async fn at(ca: &TestCa, name: &str, address: SocketAddr) -> Self {
        Self::start(
            ca,
            ca.server(name),
            address,
            Answer::Accept(name.to_owned(), 0),
            false,
        )
        .await
    }

    /// One that says that there are so many.
    pub(crate) async fn one_of(ca: &TestCa, name: &str, servers: u32) -> Self {
        let answer = Answer::Accept(name.to_owned(), servers);
        let address = "127.0.0.1:0".parse().unwrap();
        Self::start(ca, ca.server(name), address, answer, false).await
    }

    /// One that also enrols and renews.
    pub(crate) async fn enrolling(ca: &TestCa, name: &str) -> Self {
        let answer = Answer::Accept(name.to_owned(), 0);
        Self::start(
            ca,
            ca.server(name),
            "127.0.0.1:0".parse().unwrap(),
            answer,
            true,
        )
        .await
    }

    /// One that says no to every hello.
    pub(crate) async fn refusing(ca: &TestCa, reason: Reason, retry_after: Duration) -> Self {
        let answer = Answer::Refuse(reason, retry_after);
        Self::start(
            ca,
            ca.server("s"),
            "127.0.0.1:0".parse().unwrap(),
            answer,
            false,
        )
        .await
    }

    /// One with a certificate of another authority than the one whose agents it takes, as during a rotation.
    pub(crate) async fn certified_by(ca: &TestCa, other: &TestCa, name: &str) -> Self {
        Self::start(
            ca,
            other.server(name),
            "127.0.0.1:0".parse().unwrap(),
            Answer::Accept(name.to_owned(), 0),
            false,
        )
        .await
    }

    /// One whose certificate has another name than its hello.
    pub(crate) async fn lying(ca: &TestCa) -> Self {
        let answer = Answer::Accept("claimed".to_owned(), 0);
        Self::start(
            ca,
            ca.server("certified"),
            "127.0.0.1:0".parse().unwrap(),
            answer,
            false,
        )
        .await
    }

    async fn start(
        ca: &TestCa,
        credential: Credential,
        address: SocketAddr,
        answer: Answer,
        enrols: bool,
    ) -> Self {
        let (own, revoked) = (ca.own(credential), Revocations::new());
        let state = tempfile::tempdir().unwrap();
        let tasks = Tasks::new();
        let mut address = address;
        let mut store = None;
        if enrols {
            let listener = TcpListener::bind(address).await.unwrap();
            address = listener.local_addr().unwrap();
            let opened = Store::open(state.path()).unwrap();
            store = Some(opened.clone());
            let limits = EnrollLimits {
                per_address_per_minute: 1000.try_into().unwrap(),
                per_second: 100.try_into().unwrap(),
            };
            let service = EnrollService::new(ca.issuer(), opened, Clock::system(), limits, None);
            tasks.spawn(
                "enrol",
                enrol(
                    listener,
                    service,
                    own.clone(),
                    revoked.clone(),
                    tasks.clone(),
                ),
            );
        }
        let tls = certs::tunnel_server_quic(&own, &revoked).unwrap();
        let tuning = Tuning::server(1 << 20, Duration::from_secs(120));
        let endpoint = Endpoint::listen(address, tls, tuning, &[7; 32]).unwrap();
        let address = endpoint.local_address().unwrap();
        let (send, sessions) = mpsc::channel(64);
        tasks.spawn(
            "accept",
            accept(endpoint.clone(), answer, send, tasks.clone()),
        );
        Self {
            address,
            revoked,
            store,
            endpoint,
            sessions,
            tasks,
            _state: state,
        }
    }

    /// The next session that comes up.
    pub(crate) async fn session(&mut self) -> Peer {
        timeout(DEADLINE, self.sessions.recv())
            .await
            .expect("no session comes")
            .unwrap()
    }

    /// Whether a session waits to be taken.
    pub(crate) fn has_session(&self) -> bool {
        !self.sessions.is_empty()
    }

    /// Ends it; its port is free afterwards.
    pub(crate) async fn stop(mut self) {
        self.sessions.close();
        while let Some(peer) = self.sessions.recv().await {
            peer.session.close(Reason::Draining);
        }
        self.tasks.drain(Duration::ZERO).await;
        self.endpoint.flush(Duration::from_secs(5)).await;
    }
}

async fn accept(endpoint: Endpoint, answer: Answer, sessions: mpsc::Sender<Peer>, tasks: Tasks) {
    while let Some(incoming) = endpoint.accept().await {
        let (answer, sessions) = (answer.clone(), sessions.clone());
        tasks.spawn("session", async move {
            let Ok(session) = incoming.handshake().await else {
                return;
            };
            let Ok((control, hello)) = Control::accept(session.clone()).await else {
                return;
            };
            let (server, servers) = match answer {
                Answer::Refuse(reason, retry_after) => {
                    return control
                        .refuse(reason, "the test says no".to_owned(), retry_after)
                        .await;
                }
                Answer::Accept(name, servers) => (name, servers),
            };
            let offer = ServerOffer {
                server: server.parse().unwrap(),
                software: "test 1".to_owned(),
                capabilities: Vec::new(),
                limits: Limits {
                    max_streams: 16,
                    stream_window: 1 << 20,
                },
                servers,
            };
            let certified = certs::peer(&session.peer_certificates())
                .unwrap()
                .identity
                .name;
            let certified: proto::AgentName = certified.as_str().parse().unwrap();
            let now = i64::try_from(Clock::system().now().as_secs() * 1000).unwrap();
            let answered = control
                .answer(&hello, &certified, &offer, SessionId::random(), now)
                .await;
            let Ok((control, _terms)) = answered else {
                return;
            };
            let (told, away) = mpsc::channel(8);
            let peer = Peer {
                session,
                control: control.handle(),
                hello,
                away,
            };
            sessions.send(peer).await.ok();
            let liveness = Liveness::new(Keepalive::default());
            control
                .run(&liveness, |away| drop(told.try_send(away)))
                .await;
        });
    }
}

async fn enrol(
    listener: TcpListener,
    service: EnrollService,
    own: Own,
    revoked: Revocations,
    tasks: Tasks,
) {
    let tls = certs::enroll_server(&own, &revoked, Duration::from_secs(30 * 86_400)).unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(tls);
    while let Ok((stream, remote)) = listener.accept().await {
        let (acceptor, service) = (acceptor.clone(), service.clone());
        tasks.spawn("enrolment", async move {
            let Ok(stream) = acceptor.accept(stream).await else {
                return;
            };
            service
                .serve_connection(stream, remote, std::future::pending())
                .await
                .ok();
        });
    }
}
