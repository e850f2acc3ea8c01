//! A real Kubernetes in network namespaces, with the tunnel between its two parts.
//!
//! etcd, kube-apiserver and the proxy-server run in the cloud; two nodes with containerd, runc and a real kubelet, and an
//! edge-agent each, sit behind NAT boxes and **share one private address**. kube-apiserver has no way to a kubelet but the
//! egress selector, so whatever the tests see from a node came through the tunnel. [`Cluster<Deployed>`] has no daemon
//! of ours of its own: it is a whole Kubernetes, controllers and a node in the cloud included, onto which they are deployed.
//!
//! Needs root, Debian's etcd, containerd, runc and CNI plug-ins, and what `e2e/kubernetes/build.sh` builds. Everything ends
//! with the [`Cluster`], also when the test panics or is killed (`cluster/sandbox.rs` has the how). It must not touch the
//! machine beyond its own namespaces, cgroups and state folder.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::lab::binary;
use crate::net::{Host, Net};

mod account;
pub mod content;
mod control_plane;
mod deployed;
mod dns;
mod image;
mod kubectl;
mod node;
mod pki;
pub mod pods;
mod rbac;
mod running;
mod sandbox;
mod scrapers;
mod steps;
mod tunnel;

use account::Account;
pub use control_plane::{ADDRESS_TYPES, Egress};
use control_plane::{ControlPlane, PUBLIC};
use deployed::CLOUD;
pub use deployed::{Deployed, LATE, LINES, Prober, Probes, WORKLOADS};
pub use dns::CoreDns;
pub use kubectl::Kubectl;
use node::{EDGE, Node};
use pki::Pki;
pub use rbac::Grant;
pub use running::Running;
pub use scrapers::{Prometheus, aggregated_api};
pub use steps::{Steps, report, until};
pub use tunnel::{BY_LINE, Programs, Session, Tunnel};

/// The nodes.
pub const NODES: [&str; 2] = ["edge1", "edge2"];
/// The one address of both.
pub const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 1, 10));

/// A kubelet tells of its node each few seconds.
const READDRESSED: Duration = Duration::from_secs(60);
/// State folders of ours start so; the pid of the run follows.
const STATE: &str = "corvid-k8s-";

/// A running cluster, and how the tunnel runs in it. Its parts are dropped from the first to the last.
#[derive(Debug)]
pub struct Cluster<T = Tunnel> {
    kubectl: Kubectl,
    tunnel: T,
    nodes: Vec<Node>,
    control_plane: ControlPlane,
    pki: Pki,
    net: Net,
    state: Arc<TempDir>,
}

impl Cluster {
    /// Starts all of it: on return both agents are connected, both nodes are ready, and the tests' pods run.
    ///
    /// # Errors
    /// When a part is missing or does not come up, with the ends of all logs; what was started is ended.
    pub fn start() -> Result<Self> {
        sweep()?;
        let state = tempfile::Builder::new()
            .prefix(&format!("{STATE}{}-", std::process::id()))
            // Unix sockets are in there, and their paths may not be long.
            .tempdir_in("/tmp")?;
        let state = Arc::new(state);
        let logs = state.path().join("log");
        fs::create_dir(&logs)?;
        Self::start_in(&state, &logs).with_context(|| tails(&logs))
    }

    fn start_in(dir: &Arc<TempDir>, logs: &Path) -> Result<Self> {
        let programs = Programs {
            server: binary("proxy-server")?,
            agent: binary("edge-agent")?,
        };
        let tools = tools()?;
        let state = dir.path();
        let net = Net::sites()?;
        let cloud = net.host("cloud")?;
        let pki = Pki::new(&state.join("pki"))?;

        let apiserver = tools.join("kube-apiserver");
        let mut control_plane = ControlPlane::start(&cloud, &apiserver, &pki, state, logs, false)?;
        control_plane.apiserver(&pki, &Egress::Unix(Tunnel::socket(state)))?;
        // kube-apiserver takes seconds: whatever can be done meanwhile is done now.
        let archive = image::make(state)?;
        let mut nodes = Vec::new();
        for name in NODES {
            nodes.push(Node::start(&net.host(name)?, &EDGE, state, logs)?);
        }
        for node in &nodes {
            node.import(&archive)?;
        }
        let kubeconfig = pki.kubeconfig("admin", "https://127.0.0.1:6443")?;
        let kubectl = Kubectl::new(&cloud, &tools.join("kubectl"), kubeconfig, state);
        control_plane.wait_ready(&kubectl)?;
        let server = format!("https://{PUBLIC}:6443");
        for node in &mut nodes {
            node.kubelet(&tools.join("kubelet"), &pki, ADDRESS, &server)?;
        }
        let account = Account::new(&kubectl, &pki, state.join("account"))?;
        let mut tunnel = Tunnel::start(&cloud, programs, account, state, logs)?;
        for name in NODES {
            tunnel.join(&net.host(name)?)?;
        }
        let cluster = Self {
            kubectl,
            tunnel,
            nodes,
            control_plane,
            pki,
            net,
            state: Arc::clone(dir),
        };
        cluster.settle()?;
        Ok(cluster)
    }

    /// Waits for nodes, pods and sessions.
    fn settle(&self) -> Result<()> {
        for name in NODES {
            self.wait_for("create", &format!("node/{name}"))?;
            self.create(&pods::pod(name))?;
        }
        for name in NODES {
            self.wait_for("condition=Ready", &format!("node/{name}"))?;
            self.wait_ready(&pods::name(name))?;
            self.tunnel.wait_session(name)?;
        }
        Ok(())
    }

    /// The daemons.
    #[must_use]
    pub const fn tunnel(&self) -> &Tunnel {
        &self.tunnel
    }

    /// The daemons, to start one of them again.
    pub const fn tunnel_mut(&mut self) -> &mut Tunnel {
        &mut self.tunnel
    }
}

impl<T> Cluster<T> {
    /// Waits until a pod is ready.
    ///
    /// # Errors
    /// When it does not get so.
    pub fn wait_ready(&self, pod: &str) -> Result<()> {
        self.wait_for("condition=Ready", &format!("pod/{pod}"))
    }

    fn wait_for(&self, what: &str, object: &str) -> Result<()> {
        let command = self
            .kubectl
            .command(&["wait", "--timeout=120s", "--for", what, object]);
        let output = crate::process::output(command, Duration::from_secs(130))?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "waiting for {what} of {object}: {errors}"
        );
        Ok(())
    }

    /// Gives each node an address of its own, beside the one that both have, and has its kubelet take it.
    ///
    /// # Errors
    /// When a kubelet does not start again, or Kubernetes does not learn of it.
    pub fn readdress(&mut self) -> Result<Vec<IpAddr>> {
        let mut addresses = Vec::new();
        for (last, name) in (21..).zip(NODES) {
            let address = IpAddr::from([192, 168, 1, last]);
            self.host(name)?
                .ip(&format!("addr add {address}/24 dev eth0"))?;
            self.move_node(name, address)?;
            addresses.push(address);
        }
        Ok(addresses)
    }

    /// Has a node's kubelet take another address of its host.
    ///
    /// # Errors
    /// When the kubelet does not start again, or Kubernetes does not learn of it.
    pub fn move_node(&mut self, name: &str, address: IpAddr) -> Result<()> {
        let (kubelet, server) = (tools()?.join("kubelet"), format!("https://{PUBLIC}:6443"));
        let node = self.nodes.iter_mut().find(|node| node.name() == name);
        let node = node.with_context(|| format!("no node {name}"))?;
        node.kubelet(&kubelet, &self.pki, address, &server)?;
        let internal = "jsonpath={.status.addresses[?(@.type=='InternalIP')].address}";
        let get = ["get", "node", name, "-o", internal];
        until(READDRESSED, &format!("{name} has {address}"), || {
            let now = String::from_utf8(self.kubectl.ok(&get)?)?;
            ensure!(now == address.to_string(), "{now}");
            Ok(())
        })
    }

    /// Creates an object.
    ///
    /// # Errors
    /// When kube-apiserver refuses it.
    pub fn create(&self, object: &serde_json::Value) -> Result<()> {
        let file = self.state.path().join("object.json");
        fs::write(&file, object.to_string())?;
        self.kubectl
            .ok(&["create", "-f", &file.display().to_string()])?;
        Ok(())
    }

    /// Ends kube-apiserver, and with it all that it has open to nodes.
    ///
    /// # Errors
    /// When it does not go.
    pub fn stop_apiserver(&mut self) -> Result<()> {
        self.control_plane.stop_apiserver()
    }

    /// Starts kube-apiserver again, with another way to the nodes.
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn start_apiserver(&mut self, egress: &Egress) -> Result<()> {
        self.control_plane.apiserver(&self.pki, egress)?;
        self.control_plane.wait_ready(&self.kubectl)
    }

    /// kubectl, as the admin.
    #[must_use]
    pub const fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// A host of the net: `cloud`, `edge1`, …
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn host(&self, name: &str) -> Result<Host> {
        self.net.host(name)
    }

    /// Where programs' output goes.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.state.path().join("log")
    }

    /// A folder for files of the tests; it goes with the cluster.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.state.path()
    }
}

/// Removes what runs that were killed have left: empty cgroups and state folders.
fn sweep() -> Result<()> {
    for entry in fs::read_dir("/tmp")?.flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let pid = name
            .strip_prefix(STATE)
            .and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let path = entry.path();
            for node in NODES.iter().chain(&[CLOUD, LATE]) {
                node::sweep(&path.join(node))?;
            }
            fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Where `e2e/kubernetes/build.sh` puts the Kubernetes programs.
///
/// # Errors
/// When one of them is missing.
pub fn tools() -> Result<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/bin");
    for name in [
        "coredns",
        "kube-apiserver",
        "kube-controller-manager",
        "kube-proxy",
        "kube-scheduler",
        "k3s",
        "kubeadm",
        "kubectl",
        "kubelet",
        "metrics-server",
    ] {
        ensure!(
            dir.join(name).exists(),
            "no {name} in {}: run e2e/kubernetes/build.sh",
            dir.display()
        );
    }
    Ok(dir)
}

/// The last lines of each log.
fn tails(logs: &Path) -> String {
    let mut text = "the cluster does not start".to_owned();
    for entry in fs::read_dir(logs).into_iter().flatten().flatten() {
        let log = fs::read(entry.path()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines = log.lines().collect::<Vec<_>>();
        let tail = lines
            .get(lines.len().saturating_sub(20)..)
            .unwrap_or_default();
        text += &format!("\n--- {} ---\n{}", entry.path().display(), tail.join("\n"));
    }
    text + "\n---"
}
