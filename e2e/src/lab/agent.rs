//! An edge-agent of a lab.

use std::fs;
use std::path::{Path, PathBuf};

use super::{
    Host, Lab, Process, Result, SERVER, START, Server, Spawn, Value, binary, ensure, json,
};
use crate::cgroup::MemoryGroup;

/// A running edge-agent.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    name: String,
    config: PathBuf,
    dir: PathBuf,
    host: Host,
}

impl Agent {
    pub(super) fn start(
        lab: &Lab,
        server: &Server,
        name: &str,
        within: Option<&MemoryGroup>,
        edit: impl FnOnce(&mut Value),
    ) -> Result<Self> {
        let dir = lab.dir().to_owned();
        let token = dir.join(format!("{name}.token"));
        fs::write(&token, server.token(name)?)?;
        let mut config = json!({
            "name": name,
            "stateDir": dir.join(name),
            "servers": [SERVER],
            "join": {"tokenFile": token, "caPin": server.pin()?},
            "drain": {"grace": "3s"},
            "observe": {"listen": "0.0.0.0:9441"},
            "admin": {"listen": "127.0.0.1:9443"},
            "log": {"level": "debug"},
        });
        edit(&mut config);
        let config = lab.config(name, &config)?;
        let host = lab.host(name)?;
        let process = run(&host, name, within, &config, &dir)?;
        server.wait_session(name, START)?;
        Ok(Self {
            process,
            name: name.into(),
            config,
            dir,
            host,
        })
    }

    /// The process, to look at and to signal.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Starts it again after it has ended, with the same configuration and state.
    ///
    /// # Errors
    /// When it still runs.
    pub fn start_again(&mut self) -> Result<()> {
        ensure!(self.process.exited()?.is_some(), "the agent still runs");
        self.process = run(&self.host, &self.name, None, &self.config, &self.dir)?;
        Ok(())
    }
}

fn run(
    host: &Host,
    name: &str,
    within: Option<&MemoryGroup>,
    config: &Path,
    logs: &Path,
) -> Result<Process> {
    let (log, program) = (format!("agent-{name}"), binary("edge-agent")?);
    let agent = match within {
        Some(group) => group.spawn(&log, &program),
        None => Spawn::new(&log, program),
    };
    agent
        .args(["run", "--config"])
        .arg(config)
        .host(host)
        .start(logs)
}
