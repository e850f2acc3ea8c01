//! A whole Kubernetes onto which Corvid is deployed as its users do it: by `kubectl apply -k`, from images that the Dockerfile
//! made. No daemon of ours runs beside it.
//!
//! Unlike the cluster of the other steps it has controllers, a scheduler, a kube-proxy, and a node in the cloud on the very host of
//! the control plane, and each node at the edge has an address of its own.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::control_plane::{ControlPlane, Egress, PUBLIC};
use super::node::{EDGE, Kind, Node};
use super::pki::Pki;
use super::steps::until;
use super::{Cluster, Kubectl, NODES, image, pods, tails, tools};
use crate::net::{Host, Net};
use crate::process::{self, Process, Spawn};

mod line;
mod prober;

pub use line::LINES;
pub use prober::{Prober, Probes};

/// The host of the control plane, which is a node too.
pub(super) const CLOUD: &str = "cloud";
/// The node that is not there at first.
pub const LATE: &str = "edge3";
/// Its address.
const LATE_ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 168, 3, 10));
/// What the DaemonSet of the control plane selects. A kubelet may not say this of itself.
const CONTROL_PLANE: &str = "node-role.kubernetes.io/control-plane=";
/// Where the base publishes the agents' way in without a load balancer.
const NODE_PORT: u16 = 30843;
/// Images are unpacked, pods are scheduled and have to get their authority and sessions, beside a build perhaps.
const ROLLED_OUT: Duration = Duration::from_secs(240);

/// The cloud's node.
const CLOUD_KIND: Kind = Kind {
    labels: "corvid.test/cloud=true",
    pods: "10.244.0.0/24",
};

/// What runs beside kubelets and kube-apiserver, and what is applied.
#[derive(Debug)]
pub struct Deployed {
    _programs: Vec<Process>,
    /// A copy of `deploy/`, and beside it what a user keeps of their own.
    folder: PathBuf,
}

/// The workloads of an overlay.
pub const WORKLOADS: [&str; 3] = [
    "deployment/proxy-server",
    "daemonset/proxy-server-control-plane",
    "daemonset/edge-agent",
];

impl Cluster<Deployed> {
    /// Starts the cluster, with the tests' pods at the edge and nothing of ours.
    ///
    /// # Errors
    /// When a part is missing or does not come up, with the ends of all logs; what was started is ended.
    pub fn whole() -> Result<Self> {
        super::sweep()?;
        let state = tempfile::Builder::new()
            .prefix(&format!("{}{}-", super::STATE, std::process::id()))
            .tempdir_in("/tmp")?;
        let state = Arc::new(state);
        let logs = state.path().join("log");
        fs::create_dir(&logs)?;
        Self::whole_in(&state, &logs).with_context(|| tails(&logs))
    }

    fn whole_in(dir: &Arc<tempfile::TempDir>, logs: &Path) -> Result<Self> {
        let (tools, state) = (tools()?, dir.path());
        let net = Net::sites()?;
        let cloud = net.host(CLOUD)?;
        let pki = Pki::new(&state.join("pki"))?;
        let apiserver = tools.join("kube-apiserver");
        let mut control_plane = ControlPlane::start(&cloud, &apiserver, &pki, state, logs, true)?;
        control_plane.apiserver(&pki, &Egress::Addresses)?;
        let archive = image::make(state)?;
        let mut nodes = vec![Node::start(&cloud, &CLOUD_KIND, state, logs)?];
        for name in NODES {
            nodes.push(Node::start(&net.host(name)?, &EDGE, state, logs)?);
        }
        for node in &nodes {
            node.import(&archive)?;
            import(node)?;
        }
        let kubeconfig = pki.kubeconfig("admin", "https://127.0.0.1:6443")?;
        let kubectl = Kubectl::new(&cloud, &tools.join("kubectl"), kubeconfig.clone(), state);
        control_plane.wait_ready(&kubectl)?;
        let programs = controllers(&cloud, &tools, &pki, &kubeconfig, state, logs)?;
        let folder = state.join("user");
        fs::create_dir(&folder)?;
        let mut copy = Command::new("cp");
        copy.arg("-a").arg(crate::manifests::folder()).arg(&folder);
        ensure!(
            process::output(copy, ROLLED_OUT)?.status.success(),
            "copy deploy/"
        );
        let mut cluster = Self {
            kubectl,
            tunnel: Deployed {
                _programs: programs,
                folder,
            },
            nodes,
            control_plane,
            pki,
            net,
            state: Arc::clone(dir),
        };
        cluster.populate()?;
        Ok(cluster)
    }

    /// Starts kubelets, and the tests' pods.
    fn populate(&mut self) -> Result<()> {
        self.start_kubelet(CLOUD, PUBLIC.into())?;
        for (name, last) in NODES.iter().zip(21..) {
            let address = IpAddr::from([192, 168, 1, last]);
            self.host(name)?
                .ip(&format!("addr add {address}/24 dev eth0"))?;
            self.start_kubelet(name, address)?;
        }
        self.wait_for("create", "serviceaccount/default")?;
        for name in NODES.iter().chain(&[CLOUD]) {
            self.wait_for("create", &format!("node/{name}"))?;
        }
        self.kubectl.ok(&["label", "node", CLOUD, CONTROL_PLANE])?;
        for name in NODES {
            self.wait_for("condition=Ready", &format!("node/{name}"))?;
            self.create(&pods::pod(name))?;
        }
        self.wait_for("condition=Ready", &format!("node/{CLOUD}"))?;
        for name in NODES {
            self.wait_ready(&pods::name(name))?;
        }
        Ok(())
    }

    fn start_kubelet(&mut self, name: &str, address: IpAddr) -> Result<()> {
        let node = self.nodes.iter_mut().find(|node| node.name() == name);
        let node = node.with_context(|| format!("no node {name}"))?;
        let (kubelet, server) = (tools()?.join("kubelet"), format!("https://{PUBLIC}:6443"));
        node.kubelet(&kubelet, &self.pki, address, &server)
    }

    fn node(&self, name: &str) -> Result<&Node> {
        let node = self.nodes.iter().find(|node| node.name() == name);
        node.with_context(|| format!("no node {name}"))
    }

    /// Applies an overlay of `deploy/` with the one value that a user sets: where the edge reaches the servers.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn apply(&self, overlay: &str) -> Result<()> {
        let own = self.tunnel.folder.join("mine");
        fs::create_dir_all(&own)?;
        let base = self
            .tunnel
            .folder
            .join("deploy/base/edge-agent/edge-agent.yaml");
        let agent = fs::read_to_string(base)?;
        let set = agent.replace(
            "proxy-server.example.com:8443",
            &format!("{PUBLIC}:{NODE_PORT}"),
        );
        ensure!(set != agent, "the base has no servers to set: {agent}");
        fs::write(own.join("edge-agent.yaml"), set)?;
        let kustomization = json!({
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [format!("../deploy/overlays/{overlay}")],
            "generatorOptions": {"disableNameSuffixHash": true},
            "configMapGenerator": [{
                "name": "edge-agent", "namespace": "corvid", "behavior": "merge", "files": ["edge-agent.yaml"],
            }],
        });
        fs::write(own.join("kustomization.yaml"), kustomization.to_string())?;
        self.kubectl
            .ok(&["apply", "-k", &own.display().to_string()])?;
        Ok(())
    }

    /// Waits until all pods of a workload are of its last revision and ready.
    ///
    /// # Errors
    /// When they do not get so, with what is known of them.
    pub fn rolled_out(&self, workload: &str) -> Result<()> {
        let timeout = format!("--timeout={}s", ROLLED_OUT.as_secs());
        let args = ["-n", "corvid", "rollout", "status", workload, &timeout];
        let command = self.kubectl.command(&args);
        let output = process::output(command, ROLLED_OUT + Duration::from_secs(10))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.success(),
            "{workload}: {said}\n{}",
            self.told()
        );
        Ok(())
    }

    /// What Kubernetes and our pods say, for people.
    #[must_use]
    pub fn told(&self) -> String {
        let mut told = String::new();
        for args in [
            &["-n", "corvid", "get", "pods", "-o", "wide"][..],
            &["-n", "corvid", "get", "events", "--sort-by=.lastTimestamp"],
            &[
                "-n",
                "corvid",
                "logs",
                "-l",
                "app.kubernetes.io/part-of=corvid",
                "--all-containers",
                "--prefix",
                "--tail=25",
            ],
        ] {
            if let Ok(output) = self.kubectl.output(args) {
                told += &String::from_utf8_lossy(&output.stdout);
                told += &String::from_utf8_lossy(&output.stderr);
            }
        }
        told
    }

    /// What `proxy-server ARGS` says in a pod of the Deployment.
    ///
    /// # Errors
    /// When it fails.
    pub fn server(&self, args: &[&str]) -> Result<String> {
        let exec = [
            "-n",
            "corvid",
            "exec",
            "deployment/proxy-server",
            "--",
            "/bin/proxy-server",
        ];
        Ok(String::from_utf8(
            self.kubectl.ok(&[&exec[..], args].concat())?,
        )?)
    }

    /// The names of the pods of a workload that are not about to go, with a field of each.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn pods_of(&self, app: &str, field: &str) -> Result<Vec<(String, String)>> {
        let selector = format!("app.kubernetes.io/name={app}");
        let fields = format!(
            "go-template={{{{range .items}}}}{{{{if not .metadata.deletionTimestamp}}}}{{{{.metadata.name}}}} {{{{{field}}}}}\n{{{{end}}}}{{{{end}}}}"
        );
        let args = [
            "-n", "corvid", "get", "pods", "-l", &selector, "-o", &fields,
        ];
        let text = String::from_utf8(self.kubectl.ok(&args)?)?;
        let row = |line: &str| {
            let (name, value) = line.split_once(' ').unwrap_or((line, ""));
            (name.to_owned(), value.trim().to_owned())
        };
        Ok(text.lines().map(row).collect())
    }

    /// Kills the program of a pod in the cloud, as the kernel does for want of memory.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn kill(&self, pod: &str) -> Result<()> {
        let id = "jsonpath={.status.containerStatuses[0].containerID}";
        let id = self
            .kubectl
            .ok(&["-n", "corvid", "get", "pod", pod, "-o", id])?;
        let id = String::from_utf8(id)?;
        let id = id.strip_prefix("containerd://").context("no container")?;
        self.node(CLOUD)?.signal(id, "SIGKILL")
    }

    /// One more machine at the edge joins the cluster.
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn add_node(&mut self) -> Result<()> {
        let node = Node::start(&self.host(LATE)?, &EDGE, self.state.path(), &self.logs())?;
        node.import(&self.state.path().join("images.tar"))?;
        import(&node)?;
        self.nodes.push(node);
        self.start_kubelet(LATE, LATE_ADDRESS)?;
        self.wait_for("create", &format!("node/{LATE}"))?;
        self.wait_for("condition=Ready", &format!("node/{LATE}"))?;
        self.create(&pods::pod(LATE))?;
        self.wait_ready(&pods::name(LATE))
    }

    /// That machine is switched off, and its Node deleted.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn delete_node(&mut self) -> Result<()> {
        for node in &mut self.nodes {
            if node.name() == LATE {
                node.stop_kubelet()?;
            }
        }
        self.kubectl.ok(&["delete", "node", LATE])?;
        Ok(())
    }

    /// A gauge of each pod of a workload, from its own metrics; `port` is where they are.
    ///
    /// # Errors
    /// When a pod can't be asked.
    pub fn gauges(&self, app: &str, port: u16, gauge: &str) -> Result<Vec<f64>> {
        let mut values = Vec::new();
        for (pod, place) in self.pods_of(app, ".spec.nodeName}} {{.status.podIP")? {
            let (node, ip) = place
                .split_once(' ')
                .with_context(|| format!("{pod}: {place}"))?;
            let address = SocketAddr::new(ip.parse()?, port);
            let text = self.host(node)?.enter(|| get(address))??;
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(gauge)?.strip_prefix(' '));
            values.push(
                line.with_context(|| format!("no {gauge} of {pod}"))?
                    .parse()?,
            );
        }
        Ok(values)
    }

    /// The egress selector that finds the sockets of the `egress` overlay: they are in the node's own file-system.
    ///
    /// # Errors
    /// When there is no node in the cloud.
    pub fn sockets(&self) -> Result<Egress> {
        let socket = self.node(CLOUD)?.outside("/run/corvid/connect.sock");
        until(ROLLED_OUT, "the socket is there", || {
            ensure!(socket.exists(), "{}", socket.display());
            Ok(())
        })?;
        Ok(Egress::Unix(socket))
    }

    /// Asks the kubelets of both edges past kube-apiserver, as a scraper on the host of the control plane does.
    ///
    /// # Errors
    /// When the certificates can't be read.
    pub fn prober(&self) -> Result<Prober> {
        let file = |name: &str| PathBuf::from(self.pki.path(name));
        let files = [
            file("ca.crt"),
            file("kubelet-client.crt"),
            file("kubelet-client.key"),
        ];
        let targets = NODES.iter().zip(21..);
        let targets =
            targets.map(|(name, last)| (*name, SocketAddr::from(([192, 168, 1, last], 10250))));
        Prober::start(&self.host(CLOUD)?, &files, targets.collect())
    }
}

/// `GET /metrics`, the whole answer.
fn get(address: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(
        stream,
        "GET /metrics HTTP/1.1\r\nHost: it\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Gives a node the images that run on it.
fn import(node: &Node) -> Result<()> {
    let names = if node.name() == CLOUD {
        &["proxy-server", "proxy-server-redirect"][..]
    } else {
        &["edge-agent"]
    };
    for name in names {
        let file = format!("../target/images/{name}-amd64.tar");
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        ensure!(file.exists(), "no {}: run `make images`", file.display());
        node.import(&file)?;
    }
    Ok(())
}

/// kube-controller-manager, kube-scheduler and the cloud's kube-proxy.
fn controllers(
    cloud: &Host,
    tools: &Path,
    pki: &Pki,
    kubeconfig: &Path,
    state: &Path,
    logs: &Path,
) -> Result<Vec<Process>> {
    let proxy = state.join("kube-proxy.json");
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "hostnameOverride": CLOUD,
        "clientConnection": {"kubeconfig": kubeconfig},
        "clusterCIDR": "10.244.0.0/16",
        // What belongs to the whole machine stays as it is.
        "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    });
    fs::write(&proxy, config.to_string())?;
    let kubeconfig = format!("--kubeconfig={}", kubeconfig.display());
    let elected = "--leader-elect=false";
    [
        Spawn::new(
            "kube-controller-manager",
            tools.join("kube-controller-manager"),
        )
        .args([kubeconfig.as_str(), elected])
        .arg(format!(
            "--service-account-private-key-file={}",
            pki.path("sa.key")
        ))
        .arg(format!("--root-ca-file={}", pki.path("ca.crt"))),
        Spawn::new("kube-scheduler", tools.join("kube-scheduler"))
            .args([kubeconfig.as_str(), elected]),
        Spawn::new("kube-proxy", tools.join("kube-proxy"))
            .arg("--config")
            .arg(proxy),
    ]
    .into_iter()
    .map(|program| program.host(cloud).start(logs))
    .collect()
}
