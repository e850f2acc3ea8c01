//! The tunnel as an operator sets it up: a proxy-server in the cloud, a join token for each edge, an edge-agent there.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::Deserialize;
use serde_json::json;

use super::control_plane::{Egress, PUBLIC};
use super::scrapers::{PASSWORD, PROXY, USER};
use super::steps::until;
use crate::net::Host;
use crate::process::{Process, Spawn};

/// A session whose agent was killed says nothing, and ends after this long. The default is minutes, for edges whose line
/// is cut now and then; here it is as short as keepalives of 10 s ± 2 s allow, so that the end can be waited for.
const IDLE_TIMEOUT: &str = "15s";
/// konnectivity's socket, in the tunnel's folder.
const KONNECTIVITY: &str = "konnectivity.sock";
/// For one step of starting: nothing here takes more than a second on an idle machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// The running daemons.
#[derive(Debug)]
pub struct Tunnel {
    dir: PathBuf,
    logs: PathBuf,
    cloud: Host,
    programs: Programs,
    server: Process,
    agents: BTreeMap<String, Process>,
}

/// What the tests look at of a session.
#[derive(Debug, Deserialize)]
pub struct Session {
    /// Whose.
    pub agent: String,
    /// Where the proxy-server sees it.
    pub remote: SocketAddr,
    /// `quic`
    pub transport: String,
    /// Open streams.
    pub streams: usize,
    /// Bytes that came from the agent.
    pub bytes_in: u64,
    /// Nothing was heard of it for a while.
    pub suspect: bool,
}

/// The two daemons' binaries.
#[derive(Clone, Debug)]
pub struct Programs {
    /// proxy-server.
    pub server: PathBuf,
    /// edge-agent.
    pub agent: PathBuf,
}

impl Tunnel {
    /// The Unix socket at which kube-apiserver finds the tunnel.
    pub(super) fn socket(state: &Path) -> PathBuf {
        state.join("tunnel/connect.sock")
    }

    /// Starts the proxy-server on the cloud host and waits until it listens.
    pub(super) fn start(
        cloud: &Host,
        programs: Programs,
        state: &Path,
        logs: &Path,
    ) -> Result<Self> {
        let dir = state.join("tunnel");
        fs::create_dir_all(&dir)?;
        let config = json!({
            "stateDir": dir.join("server"),
            "name": "proxy-1",
            // kube-apiserver names the server by its address, and checks it.
            "certificate": {"ipAddresses": [PUBLIC]},
            "backend": {"listen": [format!("{PUBLIC}:8443")], "idleTimeout": IDLE_TIMEOUT},
            "frontends": [
                {
                    "type": "httpConnect",
                    "listen": format!("unix:{}", Self::socket(state).display()),
                    "default": "refuse",
                },
                {
                    "type": "httpConnect",
                    "listen": format!("tcp:{PUBLIC}:8444"),
                    "default": "refuse",
                    "allow": [{"clients": ["kube-apiserver"], "nodes": ["*"], "ports": [10250]}],
                },
                // For aggregated APIs, which are in the cloud.
                {
                    "type": "httpConnect",
                    "listen": format!("unix:{}", dir.join("direct.sock").display()),
                    "default": "direct",
                },
                {
                    "type": "forwardProxy",
                    "listen": format!("tcp:{PUBLIC}:{PROXY}"),
                    "basicAuthFile": dir.join("scrapers"),
                    "allow": [{"users": [USER], "nodes": ["*"], "ports": [10250, 9100]}],
                },
                {
                    "type": "konnectivity",
                    "listen": format!("unix:{}", dir.join(KONNECTIVITY).display()),
                    "default": "refuse",
                },
            ],
            "observe": {"listen": "127.0.0.1:9440"},
            "admin": {"listen": "127.0.0.1:9442", "socket": dir.join("admin.sock")},
        });
        fs::write(dir.join("proxy-server.yaml"), config.to_string())?;
        let line = proxy_server::frontend::credentials::line(USER, PASSWORD)?;
        fs::write(dir.join("scrapers"), line)?;
        let server = Spawn::new("proxy-server", &programs.server)
            .args(["run", "--config"])
            .arg(dir.join("proxy-server.yaml"))
            .host(cloud)
            .start(logs)?;
        server.wait_for_line("ready", DEADLINE)?;
        Ok(Self {
            dir,
            logs: logs.to_owned(),
            cloud: cloud.clone(),
            programs,
            server,
            agents: BTreeMap::new(),
        })
    }

    /// Starts the agent of an edge host, with a join token made for it. It is connected once [`Self::wait_session`] says so.
    pub(super) fn join(&mut self, edge: &Host) -> Result<()> {
        let name = edge.name();
        let token = self.admin(&[
            "token",
            "create",
            "--agents",
            name,
            "--config",
            "proxy-server.yaml",
        ])?;
        let token = token.lines().next().context("no token was printed")?;
        let shown = self.admin(&["cert", "show", "--config", "proxy-server.yaml"])?;
        let pin = shown.split(|c: char| c.is_whitespace() || c == '"');
        let pin = pin.into_iter().find(|word| word.starts_with("sha256:"));
        let config = json!({
            "name": name,
            "stateDir": self.dir.join(name),
            "servers": [format!("{PUBLIC}:8443")],
            "join": {"token": token, "caPin": pin.context("no pin was printed")?},
        });
        fs::write(self.dir.join(format!("{name}.yaml")), config.to_string())?;
        self.start_agent(edge)
    }

    /// Starts the agent of an edge host that has joined before.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_agent(&mut self, edge: &Host) -> Result<()> {
        let name = edge.name();
        let agent = Spawn::new(&format!("edge-agent-{name}"), &self.programs.agent)
            .args(["run", "--config"])
            .arg(self.dir.join(format!("{name}.yaml")))
            .host(edge)
            .start(&self.logs)?;
        self.agents.insert(name.to_owned(), agent);
        Ok(())
    }

    /// Waits until the proxy-server lists a session of this agent that is not suspect.
    ///
    /// # Errors
    /// At the deadline, with the sessions that are there.
    pub fn wait_session(&self, agent: &str) -> Result<()> {
        until(DEADLINE, &format!("a session of {agent}"), || {
            let sessions = self.sessions()?;
            let good = |session: &Session| session.agent == agent && !session.suspect;
            ensure!(sessions.iter().any(good), "{sessions:?}");
            Ok(())
        })
    }

    /// Waits until no stream is open.
    ///
    /// # Errors
    /// At the deadline, with the sessions that have some.
    pub fn wait_idle(&self) -> Result<()> {
        until(DEADLINE, "no stream is open", || {
            let sessions = self.sessions()?;
            ensure!(
                sessions.iter().all(|session| session.streams == 0),
                "{sessions:?}"
            );
            Ok(())
        })
    }

    /// The sessions, as `proxy-server status --json` tells them.
    ///
    /// # Errors
    /// When it does not.
    pub fn sessions(&self) -> Result<Vec<Session>> {
        let socket = self.dir.join("admin.sock").display().to_string();
        let status = self.admin(&["status", "--json", "--socket", &socket])?;
        serde_json::from_str(&status).with_context(|| format!("status is {status:?}"))
    }

    /// All daemons that run.
    pub fn daemons(&self) -> impl Iterator<Item = &Process> {
        std::iter::once(&self.server).chain(self.agents.values())
    }

    /// The agent of an edge.
    ///
    /// # Errors
    /// When there is none.
    pub fn agent(&self, name: &str) -> Result<&Process> {
        self.agents
            .get(name)
            .ok_or_else(|| anyhow!("no agent {name}"))
    }

    /// The egress whose destinations in the cloud are dialled by the proxy-server.
    #[must_use]
    pub fn with_direct(&self) -> Egress {
        Egress::Unix(self.dir.join("direct.sock"))
    }

    /// Issues a client certificate for kube-apiserver and returns the egress that uses it.
    ///
    /// # Errors
    /// When `proxy-server cert issue` fails.
    pub fn mutual_tls(&self) -> Result<Egress> {
        let out = self.dir.join("kube-apiserver");
        let folder = out.display().to_string();
        let config = "proxy-server.yaml";
        self.admin(&[
            "cert",
            "issue",
            "--client",
            "kube-apiserver",
            "--out",
            &folder,
            "--config",
            config,
        ])?;
        let files =
            ["ca.crt", "kube-apiserver.crt", "kube-apiserver.key"].map(|file| out.join(file));
        for file in &files {
            ensure!(file.exists(), "{} was not written", file.display());
        }
        Ok(Egress::Tls {
            url: format!("https://{PUBLIC}:8444"),
            files,
        })
    }

    /// The egress that speaks konnectivity's gRPC, at an absolute path.
    #[must_use]
    pub fn konnectivity(&self) -> Egress {
        Egress::Grpc(self.dir.join(KONNECTIVITY))
    }

    /// Runs a command of the proxy-server on its host, in the folder of its configuration.
    fn admin(&self, args: &[&str]) -> Result<String> {
        let mut command = self.cloud.command(&self.programs.server);
        command.args(args).current_dir(&self.dir);
        let output = crate::process::output(command, DEADLINE)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "proxy-server {}: {}",
            args.join(" "),
            errors.trim()
        );
        Ok(String::from_utf8(output.stdout)?)
    }
}
