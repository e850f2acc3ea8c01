//! A running proxy-server and agents, in this process; everything ends with [`Stack::stop`].

use std::fmt::Display;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use certs::{AgentFiles, Clock, EnrollRequest, Issuer, Name, NewToken, Own, Store, TrustDomain};
use daemon::{Exit, Listen, LogHandle, Reload, ReloadTrigger};
use proto::control::Control;
use proto::transport::Session;
use proto::transport::quic::{QuicRecv, QuicSend, QuicSession};
use proto::wire::{Limits, Offer};
use proxy_server::app::{App, Environment};
use proxy_server::config::{self, Overrides};
use proxy_server::peer::Peers;
use proxy_server::registry::Registry;
use proxy_server::reload::Source;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Larger than any wait that succeeds.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A server with what tests need to know of it.
pub(crate) struct Stack {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) backend: SocketAddr,
    pub(crate) frontends: Vec<Listen>,
    pub(crate) observe: Listen,
    pub(crate) admin: Listen,
    pub(crate) registry: Registry<QuicSession>,
    pub(crate) peers: Arc<Peers<QuicSession>>,
    pub(crate) peer_listeners: Vec<SocketAddr>,
    pub(crate) reload: ReloadTrigger,
    pub(crate) shutdown: CancellationToken,
    server: JoinSet<Exit>,
    pub(crate) agents: JoinSet<()>,
    pub(crate) agents_stop: CancellationToken,
}

/// `more` is added to the configuration, which has Unix sockets at `connect.sock` and `konnectivity.sock`, mTLS and a
/// forward proxy.
pub(crate) fn configuration(dir: &Path, more: &str) -> PathBuf {
    let frontends = format!(
        "- {{type: httpConnect, listen: 'unix:{d}/connect.sock'}}\n\
         - {{type: httpConnect, listen: 'tcp:127.0.0.1:0', allow: [{{clients: [kube-apiserver], nodes: ['*'], ports: ['1-65535']}}]}}\n\
         - {{type: forwardProxy, listen: 'tcp:127.0.0.1:0', bearerTokenFile: {d}/tokens, basicAuthFile: {d}/users, \
         allow: [{{clients: [prometheus], users: [prom], nodes: ['*'], ports: ['1-65535']}}]}}\n\
         - {{type: konnectivity, listen: 'unix:{d}/konnectivity.sock'}}\n",
        d = dir.display(),
    );
    configuration_of(dir, &frontends, more)
}

/// A configuration with these frontends. `prom` has a token in the file `tokens` and a password in `users`.
pub(crate) fn configuration_of(dir: &Path, frontends: &str, more: &str) -> PathBuf {
    let drain = if more.contains("drain:") {
        ""
    } else {
        "drain: {minDelay: 10ms, grace: 10s}"
    };
    for (file, secret) in [
        ("tokens", "token-of-prometheus"),
        ("users", "a-long-random-password"),
    ] {
        let line = proxy_server::frontend::credentials::line("prom", secret).unwrap();
        std::fs::write(dir.join(file), line).unwrap();
    }
    let text = format!(
        "stateDir: {d}/state\nname: proxy-1\ncertificate: {{dnsNames: [localhost], ipAddresses: [127.0.0.1]}}\n\
         backend: {{listen: ['127.0.0.1:0']}}\nfrontends:\n{frontends}\
         observe: {{listen: '127.0.0.1:0'}}\nadmin: {{listen: '127.0.0.1:0', socket: {d}/admin.sock}}\n{drain}\n{more}\n",
        d = dir.display(),
    );
    let file = dir.join("proxy-server.yaml");
    std::fs::write(&file, text).unwrap();
    file
}

/// What a process reads of its configuration file.
pub(crate) fn read(file: &Path) -> (proxy_server::Config, Environment, ReloadTrigger) {
    let config = config::load(file, &Overrides::default()).unwrap();
    let (trigger, reload) = Reload::manual();
    let source = Source {
        file: Some(file.to_owned()),
        overrides: Overrides::default(),
    };
    let environment = Environment {
        source,
        log: LogHandle::detached(),
        reload,
    };
    (config, environment, trigger)
}

impl Stack {
    pub(crate) fn start(more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = configuration(dir.path(), more);
        Self::start_with(dir, &file)
    }

    pub(crate) fn start_with(dir: tempfile::TempDir, file: &Path) -> Self {
        let (config, environment, trigger) = read(file);
        Self::run(App::bind(config, environment).unwrap(), dir, trigger)
    }

    /// One that waits for its authority.
    pub(crate) async fn launch(dir: tempfile::TempDir, file: &Path) -> Self {
        let (config, environment, trigger) = read(file);
        let never = CancellationToken::new();
        let started = within(App::start(config, environment, &never));
        let bound = Box::pin(started).await.unwrap().unwrap();
        Self::run(bound, dir, trigger)
    }

    fn run(bound: proxy_server::Bound, dir: tempfile::TempDir, trigger: ReloadTrigger) -> Self {
        let shutdown = CancellationToken::new();
        // None: a server with frontends only.
        let backend = bound.backend.first().copied();
        let backend = backend.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)));
        let frontends = bound.frontends.clone();
        let (peers, peer_listeners) = (Arc::clone(&bound.peers), bound.peer_listeners.clone());
        let (observe, admin) = (bound.observe.clone(), bound.admin[0].clone());
        let registry = bound.registry.clone();
        let mut server = JoinSet::new();
        server.spawn(bound.run(shutdown.clone(), CancellationToken::new()));
        Self {
            dir,
            backend,
            frontends,
            observe,
            admin,
            registry,
            peers,
            peer_listeners,
            reload: trigger,
            shutdown,
            server,
            agents: JoinSet::new(),
            agents_stop: CancellationToken::new(),
        }
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub(crate) fn issuer(&self) -> Issuer {
        Issuer::load_or_create(
            &self.state().join("ca"),
            &TrustDomain::default(),
            Clock::system().now(),
        )
        .unwrap()
    }

    pub(crate) fn store(&self) -> Store {
        Store::open(&self.state()).unwrap()
    }

    pub(crate) fn token(&self, uses: u32) -> certs::JoinToken {
        let new = NewToken {
            ttl: Duration::from_secs(600),
            uses,
            agents: certs::AgentPattern::any(),
        };
        self.store()
            .create_token(&new, Clock::system().now())
            .unwrap()
    }

    /// What enrols so many agents.
    pub(crate) fn join(&self, uses: u32) -> (certs::Trust, certs::Proof) {
        let trust = certs::Trust::Pin(self.issuer().pin());
        (trust, certs::Proof::Join(self.token(uses)))
    }

    /// A real agent that enrols and connects; `more` is added to its configuration.
    pub(crate) fn agent(&mut self, name: &str, more: &str) {
        self.agent_of(name, &[self.backend], more);
    }

    /// As [`Stack::agent`], with sessions to several servers. It enrols where its token is from, so this one is first.
    pub(crate) fn agent_of(&mut self, name: &str, servers: &[impl Display], more: &str) {
        use secrecy::ExposeSecret as _;
        let token = self.token(1).expose();
        let (token, pin) = (token.expose_secret(), self.issuer().pin());
        let join = format!("{{token: {token}, caPin: '{pin}'}}");
        self.agent_with(name, servers, &join, more);
    }

    /// A real agent whose `join` is given.
    pub(crate) fn agent_joining(&mut self, name: &str, join: &str, more: &str) {
        self.agent_with(name, &[self.backend], join, more);
    }

    fn agent_with(&mut self, name: &str, servers: &[impl Display], join: &str, more: &str) {
        let servers: Vec<_> = servers.iter().map(|server| format!("'{server}'")).collect();
        let servers = servers.join(", ");
        let text = format!(
            "name: {name}\nstateDir: {}\nservers: [{servers}]\njoin: {join}\n\
             observe: {{listen: '127.0.0.1:0'}}\nadmin: {{listen: '127.0.0.1:0'}}\ndrain: {{grace: 1s}}\n{more}\n",
            self.dir.path().join(format!("agent-{name}")).display(),
        );
        let overrides = edge_agent::config::Overrides::default();
        let config = edge_agent::config::parse(Path::new("agent.yaml"), &text, &overrides).unwrap();
        let stop = edge_agent::Stop {
            shutdown: self.agents_stop.clone(),
            ..Default::default()
        };
        self.agents.spawn(async move {
            edge_agent::App::bind(config)
                .unwrap()
                .run(stop)
                .await
                .unwrap();
        });
    }

    /// Waits for so many sessions of the agent.
    pub(crate) async fn sessions(&self, agent: &str, count: usize) {
        let name = agent.parse().unwrap();
        eventually(&format!("{count} sessions of {agent}"), || {
            self.registry.of(&name).len() == count
        })
        .await;
    }

    /// A credential as an enrolled agent of that name has it, without an agent.
    pub(crate) async fn enrolled(&self, name: &str) -> Own {
        let files = AgentFiles::new(self.dir.path().join(format!("own-{name}")));
        let clock = Clock::system();
        let (trust, proof) = self.join(1);
        let (name, trust_domain) = (Name::parse(name).unwrap(), TrustDomain::default());
        let request = EnrollRequest {
            server: self.backend,
            trust: &trust,
            proof: &proof,
            name: &name,
            trust_domain: &trust_domain,
            files: &files,
            clock: &clock,
        };
        let enrolled = certs::enroll(&request).await.unwrap();
        Own {
            credential: certs::LiveCredential::new(enrolled.credential),
            bundle: certs::LiveBundle::new(enrolled.bundle),
            clock,
            trust_domain,
        }
    }

    /// A credential of that node, as one that enrolled in the cluster has it.
    pub(crate) fn of_node(&self, name: &str, uid: &str) -> Own {
        let issuer = self.issuer();
        let (name, uid) = (Name::parse(name).unwrap(), uid.parse().unwrap());
        let now = Clock::system().now();
        let credential = issuer.issue_agent(&name, Some(&uid), now).unwrap();
        Self::own(credential, &issuer)
    }

    fn own(credential: certs::Credential, issuer: &Issuer) -> Own {
        Own {
            credential: certs::LiveCredential::new(credential),
            bundle: certs::LiveBundle::new(issuer.bundle().clone()),
            clock: Clock::system(),
            trust_domain: TrustDomain::default(),
        }
    }

    /// A client's own for the TLS doors.
    pub(crate) fn client(&self, name: &str) -> Own {
        let issuer = self.issuer();
        let now = Clock::system().now();
        let credential = issuer
            .issue_client(&Name::parse(name).unwrap(), 1, now)
            .unwrap();
        Self::own(credential, &issuer)
    }

    pub(crate) fn tcp(&self, frontend: usize) -> SocketAddr {
        self.frontends[frontend].tcp().unwrap()
    }

    pub(crate) async fn unix(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("connect.sock"))
            .await
            .unwrap()
    }

    /// CONNECT over the Unix socket: the stream, or the status line.
    pub(crate) async fn connect(&self, to: &str) -> Result<UnixStream, String> {
        let mut stream = self.unix().await;
        stream
            .write_all(format!("CONNECT {to} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").as_bytes())
            .await
            .unwrap();
        match status_line(&mut stream).await {
            line if line.starts_with("HTTP/1.1 200 ") => Ok(stream),
            line => Err(line),
        }
    }

    /// What a metric says, all its samples added up.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let body = daemon::admin::client::get(&self.observe, "/metrics")
            .await
            .unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        let fits = |line: &&str| line.starts_with(name) && !line.starts_with('#');
        text.lines()
            .filter(fits)
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// Ends everything, checks that it ended well, and leaves the directory for another start.
    pub(crate) async fn stop(mut self) -> tempfile::TempDir {
        self.agents_stop.cancel();
        while let Some(agent) = within(self.agents.join_next()).await {
            agent.unwrap();
        }
        self.shutdown.cancel();
        assert_eq!(self.exit().await, Exit::Drained);
        assert!(
            self.registry.is_empty(),
            "a session is left in the registry"
        );
        self.dir
    }

    pub(crate) async fn exit(&mut self) -> Exit {
        within(self.server.join_next()).await.unwrap().unwrap()
    }
}

/// Fails in place of hanging.
pub(crate) async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work)
        .await
        .expect("it hangs")
}

pub(crate) async fn eventually(what: &str, mut probe: impl FnMut() -> bool) {
    let done = async {
        while !probe() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(
        tokio::time::timeout(DEADLINE, done).await.is_ok(),
        "never: {what}"
    );
}

/// The status line of an answer; reads to the end of its head and no further.
pub(crate) async fn status_line(stream: &mut (impl AsyncReadExt + Unpin)) -> String {
    let mut head = Vec::new();
    let read = async {
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => break,
            }
        }
    };
    within(read).await;
    String::from_utf8(head)
        .unwrap()
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// A stand-in for a kubelet: reads to the end of file, then answers with what it read in upper case.
pub(crate) async fn shouter(tasks: &mut JoinSet<()>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let mut text = Vec::new();
                if stream.read_to_end(&mut text).await.is_ok() {
                    text.make_ascii_uppercase();
                    stream.write_all(&text).await.ok();
                }
            });
        }
    });
    port
}

/// A stand-in that echoes and never closes by itself.
pub(crate) async fn echo(tasks: &mut JoinSet<()>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let (mut from, mut to) = stream.into_split();
                tokio::io::copy(&mut from, &mut to).await.ok();
            });
        }
    });
    port
}

/// Two listeners with one port, at two addresses.
pub(crate) async fn pair() -> (TcpListener, TcpListener, u16) {
    loop {
        let one = TcpListener::bind("127.0.0.2:0").await.unwrap();
        let port = one.local_addr().unwrap().port();
        if let Ok(two) = TcpListener::bind(("127.0.0.3", port)).await {
            return (one, two, port);
        }
    }
}

/// Waits for so many reloads that were taken.
pub(crate) async fn reloaded(stack: &Stack, times: f64) {
    let counted = async {
        while stack
            .metric("corvid_config_reloads_total{result=\"ok\"}")
            .await
            < times
        {
            tokio::task::yield_now().await;
        }
    };
    within(counted).await;
}

/// What allows an agent to reach those ports here.
pub(crate) fn allow(ports: &[u16]) -> String {
    format!("allow: [{{cidr: 127.0.0.0/8, ports: {ports:?}}}]")
}

/// TLS to a frontend with what `own` has.
pub(crate) async fn tls(
    address: SocketAddr,
    own: &Own,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let config = certs::frontend_client(own).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a requester")]
    let stream = TcpStream::connect(address).await?;
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    tokio_rustls::TlsConnector::from(config)
        .connect(name, stream)
        .await
}

/// A hostile or half agent: the QUIC session and nothing more.
pub(crate) async fn bare_session(
    stack: &Stack,
    own: &Own,
) -> Result<QuicSession, proto::transport::quic::QuicError> {
    use proto::transport::quic::{Congestion, Endpoint, Tuning};
    let tls = certs::tunnel_client_quic(own).unwrap();
    let tuning = Tuning {
        stream_window: 1 << 16,
        send_window: 4 << 20,
        max_streams: 16,
        idle_timeout: DEADLINE,
        congestion: Congestion::Cubic,
    };
    Endpoint::dial(stack.backend, certs::SERVER_SNI, tls, tuning).await
}

/// Waits for the end of a session and says why it ended.
pub(crate) async fn end(session: &QuicSession) -> proto::Reason {
    within(session.closed()).await.reason()
}

/// Open descriptors of this process.
pub(crate) fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Reads a file that a daemon wrote.
pub(crate) fn text(file: &Path) -> String {
    let mut text = String::new();
    std::fs::File::open(file)
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    text
}

/// Replaces a file as an editor does.
pub(crate) fn rewrite(file: &Path, text: &str) {
    let mut new = tempfile::NamedTempFile::new_in(file.parent().unwrap()).unwrap();
    new.write_all(text.as_bytes()).unwrap();
    new.persist(file).unwrap();
}

/// An agent of the right name that agrees to a session and then does `serve` with each stream.
pub(crate) async fn half_agent<F, W>(stack: &Stack, name: &str, serve: F) -> JoinSet<()>
where
    F: Fn(QuicSend, QuicRecv) -> W + Send + Sync + 'static,
    W: Future<Output = ()> + Send,
{
    let own = stack.enrolled(name).await;
    let session = bare_session(stack, &own).await.unwrap();
    let offer: Offer = Offer {
        agent: name.parse().unwrap(),
        software: "test".into(),
        capabilities: vec![],
        limits: Limits {
            max_streams: 16,
            stream_window: 1 << 16,
        },
        instance: String::new(),
        line: None,
    };
    let (control, _) = Control::dial(session.clone(), &offer).await.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let live = proto::control::Liveness::new(proto::transport::keepalive::Keepalive::default());
        let serve = async {
            while let Ok((send, recv)) = session.accept().await {
                serve(send, recv).await;
            }
        };
        tokio::join!(control.run(&live, |_| ()), serve);
    });
    tasks
}
