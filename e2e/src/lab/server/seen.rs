//! What a running proxy-server says of itself: its admin socket, its metrics.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use anyhow::anyhow;
use serde::Deserialize;

use super::{Context, Host, Result, Server, TOOL, Value, binary, ensure, succeeded};
use crate::wait;

/// Another session of a server, as `peers` shows it; what scenarios do not look at is left out.
#[derive(Debug, Clone, Deserialize)]
pub struct Peer {
    /// The other server; empty while it was never reached.
    pub server: String,
    /// `dialled` or `accepted`.
    pub side: String,
    /// How it is.
    pub state: String,
    /// Agents that it has announced a session of.
    pub agents: usize,
}

/// A session as `status` shows it; what scenarios do not look at is left out.
#[derive(Debug, Clone, Deserialize)]
pub struct Session {
    /// Name from the agent's certificate.
    pub agent: String,
    /// Its id.
    pub session: Value,
    /// Where the agent's packets come from.
    pub remote: String,
    /// Open streams.
    pub streams: u64,
}

impl Server {
    /// All sessions.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn sessions(&self) -> Result<Vec<Session>> {
        Ok(serde_json::from_str(&self.ask(&["status"])?)?)
    }

    /// Waits until sessions with so many other servers that it asks are up, which have announced so many sessions of
    /// agents in all.
    ///
    /// # Errors
    /// When they are not at the deadline.
    pub fn wait_peers(&self, servers: usize, agents: usize, deadline: Duration) -> Result<()> {
        let what = format!("{}: {servers} peers with {agents} agents", self.name);
        wait::poll(deadline, &what, || {
            let all: Vec<Peer> = serde_json::from_str(&self.ask(&["peers"])?)?;
            let asked = all
                .iter()
                .filter(|peer| peer.side == "dialled" && peer.state == "ok");
            let found = (asked.clone().count(), asked.map(|peer| peer.agents).sum());
            ensure!(found == (servers, agents), "{all:?}");
            Ok(())
        })
    }

    /// Waits for a session of that agent and returns the newest, which stands last.
    ///
    /// # Errors
    /// When there is none at the deadline.
    pub fn wait_session(&self, agent: &str, deadline: Duration) -> Result<Session> {
        wait::poll(deadline, &format!("a session of {agent}"), || {
            let sessions = self.sessions()?;
            let found = sessions
                .iter()
                .rfind(|session| session.agent == agent)
                .cloned();
            found.ok_or_else(|| anyhow!("the sessions are {sessions:?}"))
        })
    }

    /// Where that destination leads now, as `explain` tells.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn explain(&self, destination: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.ask(&["explain", destination])?)?)
    }

    /// The sum of all samples whose line in `/metrics` begins so, 0 if there is none.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn metric(&self, begin: &str) -> Result<f64> {
        metric(&self.host, begin)
    }

    fn ask(&self, what: &[&str]) -> Result<String> {
        let mut command = Command::new(binary("proxy-server")?);
        command.args(what).args(["--json", "--socket"]);
        command.arg(self.dir.join("admin.sock"));
        succeeded(command)
    }
}

/// The sum of all samples whose line in `/metrics` of the server on that host begins so, 0 if there is none.
///
/// # Errors
/// When the server does not answer.
pub fn metric(host: &Host, begin: &str) -> Result<f64> {
    let ask = || -> Result<String> {
        let mut stream = TcpStream::connect("127.0.0.1:9440")?;
        stream.set_read_timeout(Some(TOOL))?;
        write!(
            stream,
            "GET /metrics HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = host.enter(ask)??;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let mut sum = 0.0;
    for line in answer.lines().filter(|line| line.starts_with(begin)) {
        let value = line.rsplit(' ').next().context("no value")?;
        sum += value.parse::<f64>().with_context(|| line.to_owned())?;
    }
    Ok(sum)
}
