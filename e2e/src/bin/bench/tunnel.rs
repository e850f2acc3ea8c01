//! The ways to the target, each as its child processes: two hops, three with another server between, one past the tunnel.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::lab::binary;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};

use crate::hop::Hop;

enum Entry {
    Direct(SocketAddr),
    Unix(PathBuf),
    Connect(PathBuf, String),
}

/// A way to the target.
pub(crate) struct Way {
    pub(crate) name: &'static str,
    entry: Entry,
    /// Nearest to the requester first.
    pub(crate) hops: Vec<Hop>,
    _dir: tempfile::TempDir,
}

/// A connection to the target.
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

fn splice(to: SocketAddr, more: &[&str]) -> Result<(Hop, SocketAddr)> {
    let (hop, mut lines) = Hop::talking(
        Command::new(std::env::current_exe()?)
            .arg("splice")
            .arg(to.to_string())
            .args(more),
    )?;
    let address = lines.next()?.parse();
    Ok((hop, address.context("where does the splice listen?")?))
}

impl Way {
    pub(crate) async fn plain(target: SocketAddr) -> Result<Self> {
        let (back, address) = splice(target, &[])?;
        let (front, address) = splice(address, &[])?;
        Self {
            name: "plain splice",
            entry: Entry::Direct(address),
            hops: vec![front, back],
            _dir: tempfile::tempdir()?,
        }
        .tried()
        .await
    }

    pub(crate) async fn tls(target: SocketAddr) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let pem = dir.path().join("splice.pem");
        let signed = rcgen::generate_simple_self_signed(["splice".to_owned()])?;
        std::fs::write(
            &pem,
            signed.cert.pem() + &signed.signing_key.serialize_pem(),
        )?;
        let pem = pem.to_str().context("a path in UTF-8")?;
        let (back, address) = splice(target, &["--tls-from", pem])?;
        let (front, address) = splice(address, &["--tls-to", pem])?;
        Self {
            name: "TLS splice",
            entry: Entry::Direct(address),
            hops: vec![front, back],
            _dir: dir,
        }
        .tried()
        .await
    }

    /// Nobody between.
    pub(crate) async fn straight(target: SocketAddr) -> Result<Self> {
        Self {
            name: "directly",
            entry: Entry::Direct(target),
            hops: Vec::new(),
            _dir: tempfile::tempdir()?,
        }
        .tried()
        .await
    }

    /// One hop, that is entered as Corvid is.
    pub(crate) async fn one_splice(target: SocketAddr) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("splice.sock");
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("splice").arg(target.to_string());
        let (hop, mut lines) = Hop::talking(command.arg("--unix").arg(&socket))?;
        lines.next()?;
        Self {
            name: "plain splice of one hop",
            entry: Entry::Unix(socket),
            hops: vec![hop],
            _dir: dir,
        }
        .tried()
        .await
    }

    /// By a line, with the tunnel beside it that nobody has dialled.
    pub(crate) async fn by_a_line(target: SocketAddr) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let server = Server {
            more: "routes: [{node: edge1, addresses: ['127.0.0.1']}]\n\
                   lines: [{name: express, networks: ['127.0.0.0/8']}]",
            ..Server::default()
        };
        let server = server.start(dir.path())?;
        wait_for_backend(dir.path())?;
        let destination = format!("edge1:{}", target.port());
        Self {
            name: "corvid, by a line",
            entry: Entry::Connect(dir.path().join("connect.sock"), destination),
            hops: vec![server],
            _dir: dir,
        }
        .tried()
        .await
    }

    pub(crate) async fn corvid(target: SocketAddr) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let server = Server::default().start(dir.path())?;
        let backend = wait_for_backend(dir.path())?;
        let agent = agent(dir.path(), &backend, target.port())?;
        wait_for_sessions(dir.path(), 1)?;
        let destination = format!("edge1:{}", target.port());
        let entry = Entry::Connect(dir.path().join("connect.sock"), destination);
        Self {
            name: "corvid",
            entry,
            hops: vec![server, agent],
            _dir: dir,
        }
        .tried()
        .await
    }

    /// In at a server with frontends only, and by another one that has the agent's session.
    pub(crate) async fn by_a_peer(target: SocketAddr) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (entry, asked) = (dir.path().join("entry"), dir.path().join("asked"));
        let authority = entry.join("server/ca");
        std::fs::create_dir_all(&authority)?;
        std::fs::create_dir_all(&asked)?;
        // The one that is asked forwards nothing itself.
        let server = Server {
            more: "peers: {listen: ['127.0.0.1:0'], servers: ['127.0.0.1:9']}",
            ..Server::default()
        };
        let server = server.start(&asked)?;
        let backend = wait_for_backend(&asked)?;
        let peer = address(&asked, "peers: QUIC on udp", "address=")?;
        for file in ["ca.crt", "ca.key"] {
            std::fs::copy(asked.join("server/ca").join(file), authority.join(file))?;
        }
        let more = format!("peers: {{servers: ['{peer}']}}");
        let front = Server {
            frontends_only: true,
            more: &more,
            ..Server::default()
        };
        let front = front.start(&entry)?;
        let agent = agent(&asked, &backend, target.port())?;
        wait_for_sessions(&asked, 1)?;
        let destination = format!("edge1:{}", target.port());
        let way = Self {
            name: "corvid, by a peer",
            entry: Entry::Connect(entry.join("connect.sock"), destination),
            hops: vec![front, server, agent],
            _dir: dir,
        };
        // Until the session is announced.
        for _ in 0..100 {
            if way.connect().await.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        way.tried().await
    }

    async fn tried(self) -> Result<Self> {
        self.connect()
            .await
            .with_context(|| format!("try {}", self.name))?;
        Ok(self)
    }

    /// Connects through it.
    pub(crate) async fn connect(&self) -> Result<Stream> {
        match &self.entry {
            Entry::Direct(address) => {
                #[expect(clippy::disallowed_methods, reason = "the load")]
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Entry::Unix(socket) => Ok(Stream::Unix(UnixStream::connect(socket).await?)),
            Entry::Connect(socket, destination) => {
                let mut stream = UnixStream::connect(socket).await?;
                let request = format!("CONNECT {destination} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
                stream.write_all(request.as_bytes()).await?;
                let mut head = [0; 19];
                stream.read_exact(&mut head).await?;
                ensure!(
                    &head == b"HTTP/1.1 200 OK\r\n\r\n",
                    "{}",
                    String::from_utf8_lossy(&head)
                );
                Ok(Stream::Unix(stream))
            }
        }
    }

    pub(crate) fn cpu(&self) -> Result<Duration> {
        self.hops.iter().map(Hop::cpu).sum()
    }
}

/// What differs from server to server.
#[derive(Default)]
pub(crate) struct Server<'a> {
    /// Frontends beside the one at the Unix socket, as YAML.
    pub(crate) frontends: &'a [&'a str],
    /// No agents come to it.
    pub(crate) frontends_only: bool,
    /// Other keys, as YAML.
    pub(crate) more: &'a str,
    /// Also the access log, as in a configuration that says nothing of it.
    pub(crate) access_log: bool,
}

impl Server<'_> {
    pub(crate) fn start(&self, dir: &Path) -> Result<Hop> {
        let d = dir.display();
        let config = dir.join("proxy-server.yaml");
        let connect = format!("{{type: httpConnect, listen: 'unix:{d}/connect.sock'}}");
        let frontends = [&[connect.as_str()], self.frontends].concat().join(", ");
        let level = match self.access_log {
            true => "info",
            false => "warn,proxy_server=info",
        };
        let (name, backend) = match self.frontends_only {
            true => ("entry", ""),
            false => ("bench", "'127.0.0.1:0'"),
        };
        let text = format!(
            "stateDir: {d}/server\nname: {name}\nbackend: {{listen: [{backend}]}}\n\
             frontends: [{frontends}]\nobserve: {{listen: '127.0.0.1:0'}}\n\
             admin: {{listen: '127.0.0.1:0', socket: {d}/admin.sock}}\nlog: {{level: '{level}'}}\n{}\n",
            self.more
        );
        std::fs::write(&config, text)?;
        let log = std::fs::File::create(dir.join("server.log"))?;
        let child = Command::new(binary("proxy-server")?)
            .arg("run")
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()?;
        Ok(Hop::of(child))
    }
}

fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    e2e::wait::poll(Duration::from_secs(30), what, || probe().ok_or("not yet"))
}

/// Where agents come in.
pub(crate) fn wait_for_backend(dir: &Path) -> Result<String> {
    address(dir, "agents: QUIC on udp", "address=")
}

/// An address from the line of the server's log that says so, once the server is up.
pub(crate) fn address(dir: &Path, line: &str, field: &str) -> Result<String> {
    let log = dir.join("server.log");
    until("the server is up", || {
        let text = std::fs::read_to_string(&log).ok()?;
        text.lines().find(|line| line.ends_with(" ready"))?;
        let said = text.lines().find(|logged| logged.contains(line))?;
        let at = said.split(field).nth(1)?.split_whitespace().next()?;
        Some(at.trim_start_matches("tcp:").to_owned())
    })
}

pub(crate) fn tool(args: &[&str]) -> Result<String> {
    let output = Command::new(binary("proxy-server")?).args(args).output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

pub(crate) fn wait_for_sessions(dir: &Path, count: usize) -> Result<()> {
    let socket = dir.join("admin.sock");
    let socket = socket.to_str().context("a path in UTF-8")?;
    until("sessions", || {
        let shown = tool(&["status", "--json", "--socket", socket]).ok()?;
        (shown.matches("\"session\"").count() >= count).then_some(())
    })
}

fn agent(dir: &Path, backend: &str, port: u16) -> Result<Hop> {
    let d = dir.display();
    let state = dir.join("server");
    let state = state.to_str().context("a path in UTF-8")?;
    let token = tool(&["token", "create", "--state-dir", state])?;
    let shown: serde_json::Value =
        serde_json::from_str(&tool(&["cert", "show", "--json", "--state-dir", state])?)?;
    let pin = shown
        .get("pin")
        .and_then(|pin| pin.as_str())
        .context("no pin")?;
    let config = dir.join("edge-agent.yaml");
    let text = format!(
        "name: edge1\nstateDir: {d}/agent\nservers: ['{backend}']\njoin: {{token: {token}, caPin: '{pin}'}}\n\
         allow: [{{cidr: 127.0.0.1/32, ports: [{port}]}}]\nobserve: {{listen: '127.0.0.1:0'}}\nadmin: {{listen: '127.0.0.1:0'}}\nlog: {{level: warn}}\n"
    );
    std::fs::write(&config, text)?;
    Hop::start(
        Command::new(binary("edge-agent")?)
            .arg("run")
            .arg("--config")
            .arg(config),
    )
}
