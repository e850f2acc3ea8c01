//! Programs of the cloud that ask kubelets themselves, past kube-apiserver: Prometheus and metrics-server. Both reach the
//! edge through the proxy-server's forward proxy, with the user and password that stand in the proxy's URL.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::control_plane::PUBLIC;
use super::{Cluster, Deployed, NODES, tools};
use crate::net::Host;
use crate::process::{Process, Spawn, output};

/// Where the forward proxy listens.
pub(super) const PROXY: u16 = 8445;
/// The scrapers' user and password there.
pub(super) const USER: &str = "prometheus";
pub(super) const PASSWORD: &str = "only-for-this-test";

/// Where Prometheus and metrics-server listen.
const PROMETHEUS: u16 = 9090;
const METRICS_SERVER: u16 = 4443;

/// A running Prometheus and the node exporters of both edges.
#[derive(Debug)]
pub struct Prometheus {
    cloud: Host,
    /// Prometheus is the last.
    programs: Vec<Process>,
}

impl Cluster {
    /// Starts Debian's Prometheus with the configuration of `deploy/prometheus`, changed in nothing but names and paths.
    ///
    /// # Errors
    /// When promtool does not accept the configuration, or a program does not start.
    pub fn prometheus(&self) -> Result<Prometheus> {
        let dir = self.dir().join("prometheus");
        fs::create_dir_all(&dir)?;
        fs::copy(self.scrapers_trust()?, dir.join("ca.crt"))?;
        fs::write(dir.join("password"), PASSWORD)?;
        let role = ["--verb=get", "--resource=nodes/metrics"];
        self.once(&[&["clusterrole", "scraper"][..], &role].concat())?;
        fs::write(dir.join("token"), self.token_of("prometheus", "scraper")?)?;
        let shown = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/prometheus");
        let text = fs::read_to_string(shown.join("edge-nodes.yaml"))?
            .replace("/etc/prometheus/corvid", &dir.display().to_string())
            .replace(
                "proxy-server-scrape.corvid.svc:8445",
                &format!("{PUBLIC}:{PROXY}"),
            )
            .replace("CHANGE-ME", PASSWORD)
            .replace("scrape_interval: 15s", "scrape_interval: 1s");
        let config = dir.join("prometheus.yaml");
        fs::write(&config, text)?;
        let tsdb = dir.join("tsdb");
        if tsdb.exists() {
            // What an earlier one has seen would count as seen now, for five minutes.
            fs::remove_dir_all(&tsdb)?;
        }
        let cloud = self.host("cloud")?;
        let mut check = cloud.command("promtool");
        check.args(["check", "config"]).arg(&config);
        let checked = output(check, Duration::from_secs(60))?;
        let said = String::from_utf8_lossy(&checked.stderr);
        ensure!(checked.status.success(), "promtool: {said}");
        let mut programs = Vec::new();
        for name in NODES {
            let exporter = Spawn::new(&format!("node-exporter-{name}"), "prometheus-node-exporter")
                .arg("--web.listen-address=:9100")
                .host(&self.host(name)?);
            programs.push(exporter.start(&self.logs())?);
        }
        let prometheus = Spawn::new("prometheus", "prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", tsdb.display()))
            .arg(format!("--web.listen-address=127.0.0.1:{PROMETHEUS}"))
            .host(&cloud);
        programs.push(prometheus.start(&self.logs())?);
        Ok(Prometheus { cloud, programs })
    }

    /// Starts metrics-server, which asks through the forward proxy, by the nodes' names: they have one address.
    ///
    /// # Errors
    /// When it does not start, or kube-apiserver refuses an object.
    pub fn metrics_server(&self) -> Result<Process> {
        let proxy = format!("https://{USER}:{PASSWORD}@{PUBLIC}:{PROXY}");
        self.start_metrics_server(&self.scrapers_trust()?, "Hostname", &proxy)
    }

    /// The CA of the kubelets' certificates and that of the proxy's, in one file.
    fn scrapers_trust(&self) -> Result<PathBuf> {
        let kubelets = fs::read_to_string(self.pki.path("ca.crt"))?;
        let proxy = fs::read_to_string(self.dir().join("tunnel/server/ca/ca.crt"))?;
        let file = self.dir().join("scrapers-ca.crt");
        fs::write(&file, kubelets + &proxy)?;
        Ok(file)
    }
}

impl Cluster<Deployed> {
    /// Starts metrics-server, which dials the nodes' addresses.
    ///
    /// # Errors
    /// When it does not start, or kube-apiserver refuses an object.
    pub fn metrics_server(&self) -> Result<Process> {
        self.start_metrics_server(Path::new(&self.pki.path("ca.crt")), "InternalIP", "")
    }
}

impl<T> Cluster<T> {
    /// Starts metrics-server, and tells kube-apiserver that it serves `metrics.k8s.io`.
    fn start_metrics_server(&self, trust: &Path, addresses: &str, proxy: &str) -> Result<Process> {
        let dir = self.dir().join("metrics-server");
        fs::create_dir_all(&dir)?;
        // A token and no certificate: Kubernetes' clients show theirs to whoever asks, and the proxy asks.
        let token = self.token_of("metrics-server", "cluster-admin")?;
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{"name": "it", "cluster": {
                "server": "https://127.0.0.1:6443", "certificate-authority": self.pki.path("ca.crt"),
            }}],
            "users": [{"name": "it", "user": {"token": token}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        });
        let kubeconfig = dir.join("kubeconfig");
        fs::write(&kubeconfig, config.to_string())?;
        let kubeconfig = kubeconfig.display();
        let program = tools()?.join("metrics-server");
        let started = Spawn::new("metrics-server", program)
            .args([
                format!("--kubeconfig={kubeconfig}"),
                format!("--authentication-kubeconfig={kubeconfig}"),
                format!("--authorization-kubeconfig={kubeconfig}"),
                format!("--cert-dir={}", dir.display()),
                format!("--secure-port={METRICS_SERVER}"),
                format!("--kubelet-certificate-authority={}", trust.display()),
                format!("--kubelet-preferred-address-types={addresses}"),
                "--metric-resolution=10s".to_owned(),
                "--kubelet-request-timeout=5s".to_owned(),
            ])
            .env("HTTPS_PROXY", proxy)
            .env("NO_PROXY", "127.0.0.1")
            .host(&self.host("cloud")?)
            .start(&self.logs())?;
        let endpoint = SocketAddrV4::new(PUBLIC, METRICS_SERVER);
        for object in aggregated_api("metrics-server", "v1beta1.metrics.k8s.io", endpoint) {
            self.create(&object)?;
        }
        Ok(started)
    }

    /// Creates an object, unless it is there.
    fn once(&self, args: &[&str]) -> Result<()> {
        let created = self.kubectl().output(&[&["create"], args].concat())?;
        let errors = String::from_utf8_lossy(&created.stderr);
        let there = created.status.success() || errors.contains("already exists");
        ensure!(there, "create {args:?}: {errors}");
        Ok(())
    }

    /// A token of a ServiceAccount with that role, as a pod would have.
    fn token_of(&self, account: &str, role: &str) -> Result<String> {
        let subject = format!("--serviceaccount=default:{account}");
        let role = format!("--clusterrole={role}");
        let token = ["create", "token", account];
        self.once(&["serviceaccount", account])?;
        self.once(&["clusterrolebinding", account, &role, &subject])?;
        let token = self.kubectl().ok(&token)?;
        Ok(String::from_utf8(token)?.trim().to_owned())
    }
}

impl Prometheus {
    /// What Prometheus itself says.
    #[must_use]
    pub fn log(&self) -> String {
        self.programs.last().map(Process::log).unwrap_or_default()
    }

    /// What a query gives now.
    ///
    /// # Errors
    /// When Prometheus does not answer, or not as documented.
    pub fn query(&self, query: &str) -> Result<Vec<Value>> {
        let address = (Ipv4Addr::LOCALHOST, PROMETHEUS);
        let text = self.cloud.enter(|| -> Result<String> {
            let mut stream = TcpStream::connect(address)?;
            write!(stream, "GET /api/v1/query?query={query} HTTP/1.0\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })??;
        let (_, body) = text.split_once("\r\n\r\n").context("no answer")?;
        let answer: Value = serde_json::from_str(body).with_context(|| body.to_owned())?;
        let result = answer.pointer("/data/result").and_then(Value::as_array);
        result.cloned().with_context(|| answer.to_string())
    }
}

/// What makes kube-apiserver ask `service` for an API, `VERSION.GROUP`: at its own address, as no proxy of Services runs here.
#[must_use]
pub fn aggregated_api(service: &str, api: &str, endpoint: SocketAddrV4) -> [Value; 3] {
    let (version, group) = api.split_once('.').unwrap_or_default();
    let metadata = json!({"name": service, "namespace": "kube-system"});
    [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata,
            "spec": {"ports": [{"name": "https", "port": 443, "targetPort": endpoint.port()}]},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": service, "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": service},
            },
            "ports": [{"name": "https", "port": endpoint.port()}],
            "endpoints": [{"addresses": [endpoint.ip()], "conditions": {"ready": true}}],
        }),
        json!({
            "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
            "metadata": {"name": api},
            "spec": {
                "group": group, "version": version, "insecureSkipTLSVerify": true,
                "groupPriorityMinimum": 100, "versionPriority": 100,
                "service": {"name": service, "namespace": "kube-system"},
            },
        }),
    ]
}
