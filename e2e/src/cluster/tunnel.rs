//! The tunnel as an operator sets it up: a proxy-server in the cloud, a join token for each edge, an edge-agent there.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::Deserialize;
use serde_json::json;
pub use server::BY_LINE;
use server::{CONFIG, DIRECT, KONNECTIVITY, SOCKET, Server};

use super::account::Account;
use super::control_plane::{Egress, PUBLIC};
use super::steps::until;
use crate::net::Host;
use crate::process::{Process, Spawn};

mod seen;
mod server;

/// For one step of starting: nothing here takes more than a second on an idle machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// The running daemons.
#[derive(Debug)]
pub struct Tunnel {
    dir: PathBuf,
    logs: PathBuf,
    cloud: Host,
    programs: Programs,
    server: Server,
    agents: BTreeMap<String, Process>,
    redirect: Option<Process>,
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
        state.join("tunnel").join(SOCKET)
    }

    /// Starts the proxy-server on the cloud host and waits until it listens.
    pub(super) fn start(
        cloud: &Host,
        programs: Programs,
        account: Account,
        state: &Path,
        logs: &Path,
    ) -> Result<Self> {
        let dir = state.join("tunnel");
        fs::create_dir_all(&dir)?;
        let server = Server::new(cloud, &programs.server, account, &dir, logs)?;
        Ok(Self {
            dir,
            logs: logs.to_owned(),
            cloud: cloud.clone(),
            programs,
            server,
            agents: BTreeMap::new(),
            redirect: None,
        })
    }

    /// The proxy-server.
    #[must_use]
    pub const fn server(&self) -> &Process {
        &self.server.process
    }

    /// Starts the proxy-server again after it was killed, and waits until it listens.
    ///
    /// # Errors
    /// When it still runs, or does not come up.
    pub fn start_server(&mut self) -> Result<()> {
        self.server.start_again()
    }

    /// Starts the agent of an edge host, with a join token made for it. It is connected once [`Self::wait_session`] says so.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn join(&mut self, edge: &Host) -> Result<()> {
        let name = edge.name();
        let token = ["token", "create", "--agents", name, "--config", CONFIG];
        let token = self.admin(&token)?;
        let token = token.lines().next().context("no token was printed")?;
        let config = json!({
            "name": name,
            "stateDir": self.dir.join(name),
            "servers": [format!("{PUBLIC}:8443")],
            "join": {"token": token, "caPin": self.pin()?},
        });
        fs::write(self.dir.join(format!("{name}.yaml")), config.to_string())?;
        self.start_agent(edge)
    }

    /// Asks for a certificate of an edge host's own with a ServiceAccount token, once, and returns what the agent said.
    ///
    /// # Errors
    /// What the agent said in place of it.
    pub fn enroll(&self, edge: &Host, token: &str) -> Result<String> {
        let dir = tempfile::tempdir_in(&self.dir)?;
        let token_file = dir.path().join("token");
        fs::write(&token_file, token)?;
        let config = json!({
            "name": edge.name(),
            "stateDir": dir.path().join("state"),
            "servers": [format!("{PUBLIC}:8443")],
            "join": {
                "serviceAccountTokenFile": token_file,
                "caFile": self.dir.join("server/ca/ca.crt"),
            },
        });
        let file = dir.path().join(CONFIG);
        fs::write(&file, config.to_string())?;
        let mut command = edge.command(&self.programs.agent);
        command.args(["enroll", "--config"]).arg(&file);
        told(crate::process::output(command, DEADLINE)?)
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
        let status = self.admin(&["status", "--json", "--socket", &self.admin_socket()])?;
        serde_json::from_str(&status).with_context(|| format!("status is {status:?}"))
    }

    /// The pin of the authority at work, as an operator finds it out.
    ///
    /// # Errors
    /// When none is printed.
    pub fn pin(&self) -> Result<String> {
        let shown = self.admin(&["cert", "show", "--config", CONFIG])?;
        let mut words = shown.split(|c: char| c.is_whitespace() || c == '"');
        let pin = words.find(|word| word.starts_with("sha256:"));
        Ok(pin.context("no pin was printed")?.to_owned())
    }

    /// Runs a command of the proxy-server as its account, to its end, and returns what it said.
    ///
    /// # Errors
    /// What it said, if it does not end well.
    pub fn as_account(&self, name: &str, args: &[&str]) -> Result<String> {
        let command = self.server.command(name, args)?;
        let status = command.wait(DEADLINE)?;
        ensure!(status.success(), "{status}: {}", command.log());
        Ok(command.log())
    }

    /// The rules that `proxy-server redirect` would apply.
    ///
    /// # Errors
    /// When it shows none.
    pub fn redirect_rules(&self) -> Result<String> {
        self.as_account("redirect-shown", &["redirect", "--dry-run"])
    }

    /// Starts `proxy-server redirect --run`, which keeps the rules.
    ///
    /// # Errors
    /// When it does not start.
    pub fn redirect(&mut self) -> Result<()> {
        self.redirect = Some(self.server.command("redirect", &["redirect", "--run"])?);
        Ok(())
    }

    /// Ends it, and the rules with it.
    ///
    /// # Errors
    /// When it does not end well.
    pub fn end_redirect(&mut self, deadline: Duration) -> Result<()> {
        let rules = self.redirect.take().context("no rules are kept")?;
        let status = rules.terminate(deadline)?;
        ensure!(status.success(), "{status}: {}", rules.log());
        Ok(())
    }

    /// All daemons that run.
    pub fn daemons(&self) -> impl Iterator<Item = &Process> {
        std::iter::once(self.server()).chain(self.agents.values())
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
        Egress::Unix(self.dir.join(DIRECT))
    }

    /// Issues a client certificate for kube-apiserver and returns the egress that uses it.
    ///
    /// # Errors
    /// When `proxy-server cert issue` fails.
    pub fn mutual_tls(&self) -> Result<Egress> {
        let files = self.certificate("kube-apiserver")?;
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

    /// Issues a client certificate; the files of CA, certificate and key are in the folder of that name.
    fn certificate(&self, client: &str) -> Result<[PathBuf; 3]> {
        let out = self.dir.join(client);
        let folder = out.display().to_string();
        let issue = ["cert", "issue", "--client", client, "--out", &folder];
        self.as_account(&format!("cert-issue-{client}"), &issue)?;
        let key = |end: &str| format!("{client}.{end}");
        let files = ["ca.crt".to_owned(), key("crt"), key("key")].map(|file| out.join(file));
        for file in &files {
            ensure!(file.exists(), "{} was not written", file.display());
        }
        Ok(files)
    }

    /// Runs a command of the proxy-server on its host, in the folder of its configuration.
    fn admin(&self, args: &[&str]) -> Result<String> {
        let mut command = self.cloud.command(&self.programs.server);
        command.args(args).current_dir(&self.dir);
        let told = told(crate::process::output(command, DEADLINE)?);
        told.with_context(|| format!("proxy-server {}", args.join(" ")))
    }
}

/// Standard output of a program that ended well, else an error with what it said.
fn told(output: Output) -> Result<String> {
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", errors.trim());
    Ok(String::from_utf8(output.stdout)?)
}
