//! What scenarios are made of: a child process for each, an agent, a server, destinations.

mod agent;
mod peer;
mod server;

use std::fmt::Debug;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

pub(crate) use agent::{Agent, Settings, metric};
pub(crate) use peer::{Peer, read_to_end};
pub(crate) use server::Server;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};

/// Longer than anything that works takes, so that a hang is a failure.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
const CHILD: &str = "CORVID_TEST_CHILD";

/// Runs `body` in a process of its own and asserts that it leaves neither tasks nor descriptors. `name` is the test's
/// full path.
pub(crate) fn scenario(name: &str, body: impl Future<Output = ()>) {
    if std::env::var_os(CHILD).is_none() {
        return in_child(name);
    }
    daemon::telemetry::init(daemon::LogFormat::Text, "info,edge_agent=debug").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let before = open_files();
        timeout(DEADLINE, body).await.expect("the scenario hangs");
        let metrics = tokio::runtime::Handle::current().metrics();
        eventually("no task is left", async || {
            match metrics.num_alive_tasks() {
                0 => Ok(()),
                left => Err(left),
            }
        })
        .await;
        eventually("no descriptor is left", async || {
            let now = open_files();
            if now.len() <= before.len() {
                Ok(())
            } else {
                Err(now)
            }
        })
        .await;
    });
}

fn in_child(name: &str) {
    // What the shell ignores stays ignored: a file that may not grow is then an error and no signal.
    let output = Command::new("sh")
        .args(["-c", "trap '' XFSZ; exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{name} failed:\n{stdout}\n{stderr}"
    );
    assert!(
        stdout.contains("1 passed"),
        "no test is called {name}:\n{stdout}"
    );
}

fn open_files() -> Vec<String> {
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    let target = |entry: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_link(entry.unwrap().path())
            .map(|path| path.display().to_string())
            .ok()
    };
    all.filter_map(target).collect()
}

/// The only polling loop: until `probe` says Ok.
pub(crate) async fn eventually<T, E: Debug>(
    what: &str,
    mut probe: impl AsyncFnMut() -> Result<T, E>,
) -> T {
    let end = Instant::now() + DEADLINE / 2;
    loop {
        match probe().await {
            Ok(value) => return value,
            Err(last) => assert!(Instant::now() < end, "{what}: {last:?}"),
        }
        sleep(Duration::from_millis(10)).await;
    }
}

/// Something to dial: it accepts when told to.
pub(crate) struct Destination {
    listener: TcpListener,
    pub(crate) address: SocketAddr,
}

impl Destination {
    pub(crate) async fn at(address: &str) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        Self { listener, address }
    }

    pub(crate) async fn new() -> Self {
        Self::at("127.0.0.1:0").await
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    pub(crate) async fn accept(&self) -> TcpStream {
        timeout(DEADLINE, self.listener.accept())
            .await
            .expect("nobody dials")
            .unwrap()
            .0
    }
}

/// A port that nobody listens on.
pub(crate) async fn closed_port() -> u16 {
    Destination::new().await.port()
}

/// An address where a dial gets no answer: the queue of its listener is full.
pub(crate) struct Hanging {
    pub(crate) address: SocketAddr,
    _listener: socket2::Socket,
    _queued: Vec<std::net::TcpStream>,
}

impl Hanging {
    pub(crate) fn new() -> Self {
        let listener =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        listener
            .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
            .unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let dial = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(300));
        let queued = std::iter::from_fn(|| dial().ok()).collect();
        Self {
            address,
            _listener: listener,
            _queued: queued,
        }
    }
}
