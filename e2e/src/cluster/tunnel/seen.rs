//! What an operator and a scraper see of the proxy-server.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_server::status::NodeStatus;

use super::Tunnel;
use crate::client::Door;
use crate::cluster::control_plane::PUBLIC;
use crate::cluster::scrapers::{PROXY, USER};
use crate::cluster::steps::until;

/// For what takes seconds at most: the longest pause between two tries to reach kube-apiserver is 10 s.
const DEADLINE: Duration = Duration::from_secs(60);

impl Tunnel {
    /// What `proxy-server status` prints for people.
    ///
    /// # Errors
    /// When no server answers.
    pub fn status(&self) -> Result<String> {
        self.admin(&["status", "--socket", &self.admin_socket()])
    }

    /// What `proxy-server nodes --json` prints.
    ///
    /// # Errors
    /// When no server answers.
    pub fn nodes(&self) -> Result<Vec<NodeStatus>> {
        let nodes = self.admin(&["nodes", "--json", "--socket", &self.admin_socket()])?;
        serde_json::from_str(&nodes).with_context(|| format!("nodes are {nodes:?}"))
    }

    /// What `proxy-server peers` prints for people.
    ///
    /// # Errors
    /// When no server answers.
    pub fn peers(&self) -> Result<String> {
        self.admin(&["peers", "--socket", &self.admin_socket()])
    }

    /// Waits until `status` has a text in it, and returns it.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_status(&self, text: &str) -> Result<String> {
        until(DEADLINE, &format!("status says {text:?}"), || {
            let status = self.status()?;
            ensure!(status.contains(text), "{status}");
            Ok(status)
        })
    }

    /// Waits until the proxy-server knows a node from the cluster, and returns it.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_node(&self, name: &str) -> Result<NodeStatus> {
        until(DEADLINE, &format!("{name} is known"), || {
            let nodes = self.nodes()?;
            let found = nodes
                .iter()
                .find(|node| node.node == name && node.source == "cluster");
            found.cloned().with_context(|| format!("{nodes:?}"))
        })
    }

    /// The value of a metric without labels.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let text = self.cloud.enter(|| -> Result<String> {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, 9440))?;
            write!(stream, "GET /metrics HTTP/1.0\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })??;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line
            .with_context(|| format!("no {name} in {text}"))?
            .parse()?)
    }

    /// The forward proxy, for a client that shows a certificate.
    ///
    /// # Errors
    /// When none is issued.
    pub fn forward_proxy(&self) -> Result<Door> {
        let [ca, ..] = self.certificate(USER)?;
        let folder = ca.parent().context("a file without a folder")?;
        Door::tls(
            &self.cloud,
            SocketAddr::new(PUBLIC.into(), PROXY),
            folder,
            USER,
        )
    }

    /// The CONNECT frontend that kube-apiserver has.
    #[must_use]
    pub fn connect_door(&self) -> Door {
        Door::Unix(self.dir.join(super::server::SOCKET))
    }

    pub(super) fn admin_socket(&self) -> String {
        self.dir.join("admin.sock").display().to_string()
    }
}
