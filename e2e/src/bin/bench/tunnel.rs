//! The three ways to the target, each as two child processes.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::lab::binary;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};

/// A process that ends with its handle.
pub(crate) struct Hop(Child);

impl Drop for Hop {
    fn drop(&mut self) {
        self.0.kill().ok(); // already gone is as good
        self.0.wait().ok();
    }
}

impl Hop {
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        Ok(Self(
            command
                .stdin(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .context("start a process")?,
        ))
    }

    /// Starts one that talks.
    pub(crate) fn talking(command: &mut Command) -> Result<(Self, Lines)> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a process")?;
        let out = child.stdout.take();
        let hop = Self(child);
        Ok((hop, Lines(BufReader::new(out.context("no output")?))))
    }

    /// User and system time so far; also of one that has ended.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        // proc(5): utime and stime are fields 14 and 15, the 12th and 13th behind the name; 100 ticks a second.
        let ticks = |i: usize| {
            fields
                .get(i)
                .and_then(|f| f.parse::<u64>().ok())
                .unwrap_or(0)
        };
        Ok(Duration::from_millis(10 * (ticks(11) + ticks(12))))
    }

    /// Resident memory, bytes.
    pub(crate) fn rss(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .context("no VmRSS")?;
        let kib: u64 = line.split_whitespace().nth(1).unwrap_or_default().parse()?;
        Ok(kib << 10)
    }
}

/// What a process says.
pub(crate) struct Lines(BufReader<ChildStdout>);

impl Lines {
    /// Waits for the next line.
    pub(crate) fn next(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "a process ended before its time");
        Ok(line.trim_end().to_owned())
    }
}

enum Entry {
    Direct(SocketAddr),
    Connect(PathBuf, String),
}

/// A way to the target.
pub(crate) struct Way {
    pub(crate) name: &'static str,
    entry: Entry,
    /// Nearest to the requester first.
    pub(crate) hops: [Hop; 2],
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
            hops: [front, back],
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
            hops: [front, back],
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
            hops: [server, agent],
            _dir: dir,
        }
        .tried()
        .await
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
        let [near, far] = &self.hops;
        Ok(near.cpu()? + far.cpu()?)
    }
}

/// What differs from server to server.
#[derive(Default)]
pub(crate) struct Server<'a> {
    /// Frontends beside the one at the Unix socket, as YAML.
    pub(crate) frontends: &'a [&'a str],
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
        let text = format!(
            "stateDir: {d}/server\nname: bench\nbackend: {{listen: ['127.0.0.1:0']}}\n\
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
        Ok(Hop(child))
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
