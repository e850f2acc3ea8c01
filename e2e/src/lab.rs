//! The lab: both daemons, stand-in kubelets and clients on the standard sites, each scenario in a lab of its own.
//!
//! Configuration files are written as an operator would write them (JSON is YAML); tokens come from the command line tool,
//! sessions are seen through `status`. The lab looks into no process and links no daemon.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use parking_lot::{Mutex, MutexGuard};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cgroup::MemoryGroup;
use crate::net::{self, Host, Net};
use crate::process::{self, Process, Spawn};

mod agent;
mod server;

pub use agent::Agent;
pub use server::{Another, Peer, Server, Session, metric};

/// Where agents dial.
pub const SERVER: &str = "203.0.113.10:8443";
/// How long a daemon may take to be up on a machine that is busy building.
pub const START: Duration = Duration::from_secs(30);
/// How long a daemon may take to stop, beyond the grace that it was given.
pub const STOP: Duration = Duration::from_secs(15);

/// One lab at a time: scenarios measure times, and the machine has few cores.
static ONE: Mutex<()> = Mutex::new(());

/// Sites, a folder, and what was started on them. Declare daemons after the lab, so that they end before it.
#[derive(Debug)]
pub struct Lab {
    net: Net,
    dir: TempDir,
    _one: MutexGuard<'static, ()>,
}

impl Lab {
    /// Waits for its turn and lays the sites.
    fn new() -> Result<Self> {
        let one = ONE.lock();
        let net = Net::sites()?;
        // Short: the path of a Unix socket has 107 bytes.
        let dir = tempfile::Builder::new().prefix("corvid-").tempdir()?;
        Ok(Self {
            net,
            dir,
            _one: one,
        })
    }

    /// The namespaces.
    #[must_use]
    pub fn net(&self) -> &Net {
        &self.net
    }

    /// A host of the sites.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn host(&self, name: &str) -> Result<Host> {
        self.net.host(name)
    }

    /// Where configurations, states and logs are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts a proxy-server in the cloud, its configuration changed by `edit`, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn server(&self, edit: impl FnOnce(&mut Value)) -> Result<Server> {
        Server::start(self, edit)
    }

    /// Starts another server of the first one's authority, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn another_server(&self, another: Another<'_>) -> Result<Server> {
        self.another_server_with(another, |_| {})
    }

    /// The same, with its configuration changed by `edit`.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn another_server_with(
        &self,
        another: Another<'_>,
        edit: impl FnOnce(&mut Value),
    ) -> Result<Server> {
        Server::another(self, another, edit)
    }

    /// Enrols and starts the agent of an edge host of the same name, its configuration changed by `edit`, and waits for its
    /// session.
    ///
    /// # Errors
    /// When no session comes.
    pub fn agent(
        &self,
        server: &Server,
        name: &str,
        edit: impl FnOnce(&mut Value),
    ) -> Result<Agent> {
        Agent::start(self, server, name, None, edit)
    }

    /// Starts the stand-in kubelet of a host, on 10250 and with metrics on 9100; it calls itself as the host is called.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn kubelet(&self, name: &str) -> Result<Process> {
        let process = Spawn::new(&format!("kubelet-{name}"), binary("kubelet")?)
            .args(["--name", name])
            .host(&self.host(name)?)
            .start(self.dir())?;
        process.wait_for_line("ready", START)?;
        Ok(process)
    }

    /// Writes a configuration file.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn config(&self, name: &str, config: &Value) -> Result<PathBuf> {
        let path = self.dir().join(format!("{name}.yaml"));
        fs::write(&path, serde_json::to_vec_pretty(config)?)?;
        Ok(path)
    }
}

/// Runs one scenario in a lab of its own; each test of the lab is one call of this.
///
/// # Panics
/// When the scenario fails, after the ends of all logs; and without root, when `CI=true` allows no skipped test.
#[expect(
    clippy::panic,
    clippy::print_stderr,
    reason = "this is an assertion of a test"
)]
pub fn scenario(run: impl FnOnce(&Lab) -> Result<()>) {
    if !net::may_run() {
        return;
    }
    let ended = Lab::new().and_then(|lab| {
        let ended = run(&lab).and_then(|()| no_panic(lab.dir()));
        ended.inspect_err(|_| eprintln!("{}", process::tails(lab.dir())))
    });
    if let Err(error) = ended {
        panic!("{error:#}");
    }
}

/// No process of a scenario has panicked: one that lives on may have left a test none the wiser.
fn no_panic(logs: &Path) -> Result<()> {
    for file in fs::read_dir(logs)?.flatten() {
        if file
            .path()
            .extension()
            .is_some_and(|extension| extension == "log")
        {
            let log = String::from_utf8_lossy(&fs::read(file.path())?).into_owned();
            let line = log.lines().find(|line| line.contains("panicked at"));
            ensure!(line.is_none(), "{}: {line:?}", file.path().display());
        }
    }
    Ok(())
}

/// Shows what a scenario measured, also when it passes: libtest captures the macros only.
pub fn measured(line: &str) {
    // A run whose output nobody takes has nobody to show it to.
    writeln!(std::io::stdout(), "\nmeasured: {line}").ok();
}

/// The smallest whole setting: server, agent and stand-in kubelet of `edge1`.
#[derive(Debug)]
pub struct Small {
    /// The agent of `edge1`.
    pub agent: Agent,
    /// The stand-in kubelet of `edge1`.
    pub kubelet: Process,
    /// The proxy-server.
    pub server: Server,
}

impl Lab {
    /// Starts it with the lab's own configurations.
    ///
    /// # Errors
    /// When one of them does not come up.
    pub fn small(&self) -> Result<Small> {
        self.small_with(|_| {}, |_| {})
    }

    /// Starts it with an agent that has so much memory, and its configuration changed.
    ///
    /// # Errors
    /// When one of them does not come up.
    pub fn small_within(
        &self,
        group: &MemoryGroup,
        agent: impl FnOnce(&mut Value),
    ) -> Result<Small> {
        let kubelet = self.kubelet("edge1")?;
        let server = self.server(|_| {})?;
        let agent = Agent::start(self, &server, "edge1", Some(group), agent)?;
        Ok(Small {
            agent,
            kubelet,
            server,
        })
    }

    /// Starts it with the configurations of server and agent changed.
    ///
    /// # Errors
    /// When one of them does not come up.
    pub fn small_with(
        &self,
        server: impl FnOnce(&mut Value),
        agent: impl FnOnce(&mut Value),
    ) -> Result<Small> {
        let kubelet = self.kubelet("edge1")?;
        let server = self.server(server)?;
        let agent = self.agent(&server, "edge1", agent)?;
        Ok(Small {
            agent,
            kubelet,
            server,
        })
    }
}

/// One of the workspace's binaries: in `CORVID_BIN_DIR`, by default `target/quick`, whatever profile the test has.
///
/// # Errors
/// When it is not there.
pub fn binary(name: &str) -> Result<PathBuf> {
    let folder = std::env::var_os("CORVID_BIN_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/quick"),
        PathBuf::from,
    );
    let path = folder.join(name);
    ensure!(
        path.exists(),
        "no {name} in {}: cargo build --profile quick, or set CORVID_BIN_DIR",
        folder.display()
    );
    Ok(path)
}
