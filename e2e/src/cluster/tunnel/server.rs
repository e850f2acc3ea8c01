//! The proxy-server of a cluster: its configuration, with every way in, and its process.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::DEADLINE;
use crate::cluster::account::{Account, NAMESPACE, SERVICE};
use crate::cluster::control_plane::PUBLIC;
use crate::cluster::pods::{ECHO_PORT, WEB_PORT};
use crate::cluster::scrapers::{PASSWORD, PROXY, USER};
use crate::net::Host;
use crate::process::{Process, Spawn};

/// A session whose agent was killed says nothing, and ends after this long. The default is minutes, for edges whose line
/// is cut now and then; here it is as short as keepalives of 10 s ± 2 s allow, so that the end can be waited for.
const IDLE_TIMEOUT: &str = "15s";
/// The socket for HTTP CONNECT, in the tunnel's folder.
pub(super) const SOCKET: &str = "connect.sock";
/// The one from which what is not at the edge is dialled, there.
pub(super) const DIRECT: &str = "direct.sock";
/// konnectivity's socket, there.
pub(super) const KONNECTIVITY: &str = "konnectivity.sock";
/// The configuration, there.
pub(super) const CONFIG: &str = "proxy-server.yaml";

/// A pool whose nodes are to be reached by a line alone; no node is in it until a test puts it there.
pub const BY_LINE: &str = "by-line";
/// Where kubelets listen, and connections meant for them are intercepted.
const KUBELET: u16 = 10250;

/// What it takes to start one.
#[derive(Debug)]
pub(super) struct Server {
    cloud: Host,
    program: PathBuf,
    account: Account,
    dir: PathBuf,
    logs: PathBuf,
    pub(super) process: Process,
}

impl Server {
    /// Writes the configuration, starts it and waits until it listens.
    pub(super) fn new(
        cloud: &Host,
        program: &Path,
        account: Account,
        dir: &Path,
        logs: &Path,
    ) -> Result<Self> {
        fs::write(dir.join(CONFIG), config(dir).to_string())?;
        let line = proxy_server::frontend::credentials::line(USER, PASSWORD)?;
        fs::write(dir.join("scrapers"), line)?;
        let process = spawn(&account, program, dir).host(cloud).start(logs)?;
        process.wait_for_line("ready", DEADLINE)?;
        Ok(Self {
            cloud: cloud.clone(),
            program: program.to_owned(),
            account,
            dir: dir.to_owned(),
            logs: logs.to_owned(),
            process,
        })
    }

    /// Starts it again after it was killed, with the same configuration and state, and waits until it listens.
    pub(super) fn start_again(&mut self) -> Result<()> {
        ensure!(
            self.process.exited()?.is_some(),
            "the proxy-server still runs"
        );
        let mark = self.process.mark();
        self.process = spawn(&self.account, &self.program, &self.dir)
            .host(&self.cloud)
            .start(&self.logs)?;
        self.process.wait_for_line_since(mark, "ready", DEADLINE)?;
        Ok(())
    }

    /// Starts another command of the program on the same host, as the same account.
    pub(super) fn command(&self, name: &str, args: &[&str]) -> Result<Process> {
        self.account
            .spawn(name, &self.program)
            .args(args)
            .arg("--config")
            .arg(self.dir.join(CONFIG))
            .host(&self.cloud)
            .start(&self.logs)
    }
}

fn spawn(account: &Account, program: &Path, dir: &Path) -> Spawn {
    account
        .spawn("proxy-server", program)
        .args(["run", "--config"])
        .arg(dir.join(CONFIG))
}

fn config(dir: &Path) -> Value {
    json!({
        "stateDir": dir.join("server"),
        "name": "proxy-1",
        // kube-apiserver names the server by its address, and checks it.
        "certificate": {"ipAddresses": [PUBLIC]},
        "backend": {"listen": [format!("{PUBLIC}:8443")], "idleTimeout": IDLE_TIMEOUT},
        "frontends": [
            {
                "type": "httpConnect",
                "listen": format!("unix:{}", dir.join(SOCKET).display()),
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
                "listen": format!("unix:{}", dir.join(DIRECT).display()),
                "default": "direct",
            },
            {
                "type": "forwardProxy",
                "listen": format!("tcp:{PUBLIC}:{PROXY}"),
                "basicAuthFile": dir.join("scrapers"),
                "allow": [{"users": [USER], "clients": [USER], "nodes": ["*"], "ports": [10250, 9100, WEB_PORT, ECHO_PORT]}],
            },
            {
                "type": "konnectivity",
                "listen": format!("unix:{}", dir.join(KONNECTIVITY).display()),
                "default": "refuse",
            },
            {
                "type": "intercept",
                "listen": format!("0.0.0.0:{KUBELET}"),
                "allow": [{"from": [format!("{PUBLIC}/32")], "nodes": ["*"], "ports": [KUBELET]}],
            },
        ],
        "peers": {"listen": [format!("{PUBLIC}:8446")], "service": format!("{NAMESPACE}/proxy-server-peers")},
        "kubernetes": {
            "inCluster": true,
            "dns": {"service": format!("{NAMESPACE}/{SERVICE}")},
            "enrol": {},
            "authority": {"refresh": "2s"},
            "pods": {},
            "services": {},
            "pools": {BY_LINE: {"path": "direct"}},
        },
        "observe": {"listen": "127.0.0.1:9440"},
        "admin": {"listen": "127.0.0.1:9442", "socket": dir.join("admin.sock")},
    })
}
