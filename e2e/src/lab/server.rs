//! The proxy-server of a lab.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use super::{
    Context, Host, Lab, Process, Result, SERVER, START, Spawn, Value, binary, ensure, json,
};
use crate::client::Door;
use crate::process;

mod seen;

pub use seen::{Peer, Session, metric};

/// The command line tool works on files, or asks a socket: both answer at once.
const TOOL: Duration = Duration::from_secs(20);

/// A running proxy-server.
#[derive(Debug)]
pub struct Server {
    process: Process,
    config: PathBuf,
    /// Where its sockets are, and what is made for its clients.
    dir: PathBuf,
    /// Where the logs of the lab are.
    logs: PathBuf,
    host: Host,
    name: String,
}

/// Another server beside the first one, of the same authority.
#[derive(Debug, Clone, Copy)]
pub struct Another<'a> {
    /// Its host, which is its name as well.
    pub host: &'a str,
    /// Its address there; `None` for a server with frontends only.
    pub address: Option<&'a str>,
    /// Where its peers come in.
    pub peers: &'a [&'a str],
}

impl Server {
    pub(super) fn start(lab: &Lab, edit: impl FnOnce(&mut Value)) -> Result<Self> {
        let dir = lab.dir().to_owned();
        let mut config = json!({
            "stateDir": dir.join("server"),
            "name": "proxy-1",
            "certificate": {"ipAddresses": ["203.0.113.10"]},
            "backend": {"listen": [SERVER]},
            "frontends": [
                {"type": "httpConnect", "listen": format!("unix:{}", dir.join("connect.sock").display()),
                 "default": "refuse"},
                {"type": "httpConnect", "listen": "tcp:203.0.113.10:8444", "default": "refuse",
                 "allow": [{"clients": ["*"], "nodes": ["*"], "ports": ["1-65535"]}]},
            ],
            "drain": {"minDelay": "500ms", "grace": "10s"},
            "observe": {"listen": "0.0.0.0:9440"},
            "admin": {"listen": "127.0.0.1:9442", "socket": dir.join("admin.sock")},
            "log": {"level": "debug"},
        });
        edit(&mut config);
        let config = lab.config("proxy-server", &config)?;
        let host = lab.host("cloud")?;
        let process = run("proxy-server", &host, &config, &dir)?;
        Ok(Self {
            process,
            config,
            logs: dir.clone(),
            dir,
            host,
            name: "proxy-server".into(),
        })
    }

    pub(super) fn another(
        lab: &Lab,
        another: Another<'_>,
        edit: impl FnOnce(&mut Value),
    ) -> Result<Self> {
        let Another {
            host: name,
            address,
            peers,
        } = another;
        let dir = lab.dir().join(name);
        let authority = dir.join("state/ca");
        fs::create_dir_all(&authority)?;
        for file in ["ca.crt", "ca.key"] {
            fs::copy(lab.dir().join("server/ca").join(file), authority.join(file))?;
        }
        let listen = |port: u16| address.map(|address| format!("{address}:{port}"));
        let mut config = json!({
            "stateDir": dir.join("state"),
            "name": name,
            "backend": {"listen": Vec::from_iter(listen(8443))},
            "frontends": [
                {"type": "httpConnect", "listen": format!("unix:{}", dir.join("connect.sock").display()),
                 "default": "refuse"},
            ],
            "peers": {"servers": peers},
            "drain": {"minDelay": "500ms", "grace": "10s"},
            "observe": {"listen": "0.0.0.0:9440"},
            "admin": {"listen": "127.0.0.1:9442", "socket": dir.join("admin.sock")},
            "log": {"level": "debug"},
        });
        if let (Some(peers), Some(listen)) = (config.get_mut("peers"), listen(8446)) {
            peers["listen"] = json!([listen]);
        }
        edit(&mut config);
        let config = lab.config(name, &config)?;
        let host = lab.host(name)?;
        let process = run(name, &host, &config, lab.dir())?;
        Ok(Self {
            process,
            config,
            dir,
            logs: lab.dir().to_owned(),
            host,
            name: name.into(),
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
    /// When it still runs, or does not come up.
    pub fn start_again(&mut self) -> Result<()> {
        ensure!(self.process.exited()?.is_some(), "the server still runs");
        self.process = run(&self.name, &self.host, &self.config, &self.logs)?;
        Ok(())
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// When it is still there at the deadline.
    pub fn stop(&self, deadline: Duration) -> Result<ExitStatus> {
        self.process.terminate(deadline)
    }

    /// The frontend at the Unix socket.
    #[must_use]
    pub fn door(&self) -> Door {
        Door::Unix(self.dir.join("connect.sock"))
    }

    /// The frontend over TCP with mutual TLS, with a fresh client certificate for `client`.
    ///
    /// # Errors
    /// When none is issued.
    pub fn tls_door(&self, client: &str) -> Result<Door> {
        self.door_at("203.0.113.10:8444", client)
    }

    /// A frontend over TLS at that address, with a fresh client certificate for `client`.
    ///
    /// # Errors
    /// When none is issued.
    pub fn door_at(&self, address: &str, client: &str) -> Result<Door> {
        let folder = self.dir.join(format!("client-{client}"));
        fs::create_dir_all(&folder)?;
        let folder_name = folder.to_str().context("a folder with a strange name")?;
        self.tool(&["cert", "issue", "--client", client, "--out", folder_name])?;
        Door::tls(&self.host, address.parse()?, &folder, client)
    }

    /// A join token for agents of that name.
    ///
    /// # Errors
    /// When none is made.
    pub fn token(&self, agent: &str) -> Result<String> {
        let made = self.tool(&["token", "create", "--agents", agent])?;
        Ok(made.lines().next().context("no token")?.trim().to_owned())
    }

    /// The pin of the certificate authority.
    ///
    /// # Errors
    /// When `cert show` prints none.
    pub fn pin(&self) -> Result<String> {
        let shown = self.tool(&["cert", "show"])?;
        let pin = shown
            .split_whitespace()
            .find(|word| word.starts_with("sha256:"));
        Ok(pin
            .with_context(|| format!("no pin in {shown:?}"))?
            .to_owned())
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Runs `proxy-server redirect` on this server's host, with this server's configuration or another.
    ///
    /// # Errors
    /// When it fails.
    pub fn redirect(&self, what: &str, config: Option<&Path>) -> Result<String> {
        let mut command = self.host.command(binary("proxy-server")?);
        command.args(["redirect", what, "--config"]);
        command.arg(config.unwrap_or(&self.config));
        succeeded(command)
    }

    /// Runs `proxy-server` as a tool on this server's configuration.
    ///
    /// # Errors
    /// When it fails.
    pub fn tool(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(binary("proxy-server")?);
        command.args(args).arg("--config").arg(&self.config);
        succeeded(command)
    }
}

fn run(name: &str, host: &Host, config: &Path, logs: &Path) -> Result<Process> {
    let process = Spawn::new(name, binary("proxy-server")?)
        .args(["run", "--config"])
        .arg(config)
        .host(host);
    let log = logs.join(format!("{name}.log"));
    let mark = fs::metadata(log).map_or(0, |log| log.len());
    let process = process.start(logs)?;
    process.wait_for_line_since(mark, "ready", START)?;
    Ok(process)
}

fn succeeded(command: Command) -> Result<String> {
    let what = format!("{command:?}");
    let output = process::output(command, TOOL)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{what}: {}: {errors}",
        output.status
    );
    Ok(String::from_utf8(output.stdout)?)
}
