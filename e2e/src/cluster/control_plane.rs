//! etcd and kube-apiserver on the cloud host, and the egress selector that makes kube-apiserver use the tunnel.

use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::kubectl::Kubectl;
use super::pki::{Leaf, Pki};
use super::steps::until;
use crate::net::Host;
use crate::process::{Process, Spawn};

/// The cloud's public address: edges know kube-apiserver by it.
pub(super) const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// Seven seconds on an idle machine of two cores; much more on one that is building something.
const READY: Duration = Duration::from_secs(120);

/// kube-apiserver's own `/etc/hosts`, where it asks DNS for nodes.
const LOCALHOST: &str = "127.0.0.1 localhost\n";

/// kube-apiserver's own `/etc/hosts`, where it does not. For `nodes/NAME/proxy` it looks the name up, before it asks the egress selector for a
/// connection to the name, and refuses loopback addresses and names that it does not find. What it finds is not used.
const HOSTS: &str = "127.0.0.1 localhost\n192.168.1.10 edge1 edge2 ghost\n";

/// Which of a node's addresses kube-apiserver dials. Two nodes have one address: only their names tell them apart.
pub const ADDRESS_TYPES: &str = "Hostname,InternalIP";

/// How kube-apiserver reaches what it calls `cluster`, kubelets above all: by an egress selector, or without one.
#[derive(Clone, Debug)]
pub enum Egress {
    /// HTTP CONNECT over TCP, with a client certificate.
    Tls {
        /// `https://host:port`; the host must be on the server's certificate.
        url: String,
        /// CA bundle, client certificate and key.
        files: [PathBuf; 3],
    },
    /// konnectivity's gRPC over a Unix socket.
    Grpc(PathBuf),
    /// HTTP CONNECT over a Unix socket.
    Unix(PathBuf),
    /// None: it dials nodes by their names, for which it asks the DNS server that this `resolv.conf` has.
    Names(PathBuf),
    /// None: it dials the nodes' addresses.
    Addresses,
}

impl Egress {
    /// The EgressSelectorConfiguration, where it takes one.
    #[must_use]
    pub fn config(&self) -> Option<Value> {
        let (protocol, transport) = match self {
            Self::Tls {
                url,
                files: [ca, certificate, key],
            } => (
                "HTTPConnect",
                json!({"tcp": {
                    "url": url,
                    "tlsConfig": {"caBundle": ca, "clientCert": certificate, "clientKey": key},
                }}),
            ),
            Self::Grpc(path) => ("GRPC", json!({"uds": {"udsName": path}})),
            Self::Unix(path) => ("HTTPConnect", json!({"uds": {"udsName": path}})),
            Self::Names(_) | Self::Addresses => return None,
        };
        Some(json!({
            "apiVersion": "apiserver.k8s.io/v1beta1",
            "kind": "EgressSelectorConfiguration",
            "egressSelections": [{
                "name": "cluster",
                "connection": {"proxyProtocol": protocol, "transport": transport},
            }],
        }))
    }

    /// The flags for it, whose file is in a folder.
    fn flags(&self, dir: &Path) -> Result<Vec<String>> {
        let types = match self {
            Self::Addresses => "InternalIP",
            Self::Tls { .. } | Self::Grpc(_) | Self::Unix(_) | Self::Names(_) => ADDRESS_TYPES,
        };
        let mut flags = vec![format!("--kubelet-preferred-address-types={types}")];
        if let Some(config) = self.config() {
            let file = dir.join("egress.json");
            fs::write(&file, config.to_string())?;
            flags.push(format!("--egress-selector-config-file={}", file.display()));
        }
        Ok(flags)
    }

    /// kube-apiserver's own `/etc/hosts` and `/etc/resolv.conf`.
    fn resolution(&self, dir: &Path) -> Result<[PathBuf; 2]> {
        let (hosts, resolver) = (dir.join("hosts"), dir.join("resolv.conf"));
        fs::write(&resolver, "")?;
        // What looks names up by DNS is to find them nowhere else.
        let (names, resolver) = match self {
            Self::Names(dns) => (LOCALHOST, dns.clone()),
            Self::Tls { .. } | Self::Grpc(_) | Self::Unix(_) | Self::Addresses => (HOSTS, resolver),
        };
        fs::write(&hosts, names)?;
        Ok([hosts, resolver])
    }
}

/// Running etcd and kube-apiserver.
#[derive(Debug)]
pub(super) struct ControlPlane {
    host: Host,
    program: PathBuf,
    state: PathBuf,
    logs: PathBuf,
    apiserver: Option<Process>,
    /// Controllers run, which make service accounts.
    controllers: bool,
    _etcd: Process,
}

impl ControlPlane {
    /// Starts etcd, and issues what kube-apiserver needs.
    pub(super) fn start(
        host: &Host,
        program: &Path,
        pki: &Pki,
        state: &Path,
        logs: &Path,
        controllers: bool,
    ) -> Result<Self> {
        let etcd = Spawn::new("etcd", "etcd")
            .arg("--data-dir")
            .arg(state.join("etcd"))
            .args(["--listen-client-urls", "http://127.0.0.1:2379"])
            .args(["--advertise-client-urls", "http://127.0.0.1:2379"])
            .arg("--unsafe-no-fsync")
            .host(host)
            .start(logs)?;
        pki.issue(&Leaf {
            file: "apiserver",
            user: "kube-apiserver",
            dns: &["localhost", "kubernetes", "kubernetes.default.svc"],
            ips: &[
                Ipv4Addr::LOCALHOST.into(),
                PUBLIC.into(),
                Ipv4Addr::new(10, 96, 0, 1).into(),
            ],
            ..Leaf::default()
        })?;
        for (file, user) in [
            ("kubelet-client", "kube-apiserver-kubelet-client"),
            ("admin", "admin"),
        ] {
            pki.issue(&Leaf {
                file,
                user,
                group: Some("system:masters"),
                ..Leaf::default()
            })?;
        }
        Ok(Self {
            host: host.clone(),
            program: program.to_owned(),
            state: state.to_owned(),
            logs: logs.to_owned(),
            apiserver: None,
            controllers,
            _etcd: etcd,
        })
    }

    /// Ends kube-apiserver at once: asked to stop, it would wait a minute for requests that never end. All it knows is in etcd.
    pub(super) fn stop_apiserver(&mut self) -> Result<()> {
        self.apiserver
            .take()
            .map_or(Ok(()), |running| running.kill())
    }

    /// Starts kube-apiserver. It is ready once [`Self::wait_ready`] says so.
    pub(super) fn apiserver(&mut self, pki: &Pki, egress: &Egress) -> Result<()> {
        self.stop_apiserver()?;
        let path = |name: &str| pki.path(name);
        let flags = [
            ("etcd-servers", "http://127.0.0.1:2379".to_owned()),
            ("secure-port", "6443".to_owned()),
            ("bind-address", "0.0.0.0".to_owned()),
            ("advertise-address", PUBLIC.to_string()),
            ("service-cluster-ip-range", "10.96.0.0/16".to_owned()),
            (
                "service-account-issuer",
                "https://kubernetes.default.svc".to_owned(),
            ),
            ("service-account-key-file", path("sa.pub")),
            ("service-account-signing-key-file", path("sa.key")),
            ("client-ca-file", path("ca.crt")),
            ("tls-cert-file", path("apiserver.crt")),
            ("tls-private-key-file", path("apiserver.key")),
            ("kubelet-client-certificate", path("kubelet-client.crt")),
            ("kubelet-client-key", path("kubelet-client.key")),
            ("kubelet-certificate-authority", path("ca.crt")),
            // Aggregated APIs: whom they believe, and no proxy of Services between.
            ("requestheader-client-ca-file", path("ca.crt")),
            (
                "requestheader-allowed-names",
                "kube-apiserver-kubelet-client".to_owned(),
            ),
            ("requestheader-username-headers", "X-Remote-User".to_owned()),
            ("requestheader-group-headers", "X-Remote-Group".to_owned()),
            ("proxy-client-cert-file", path("kubelet-client.crt")),
            ("proxy-client-key-file", path("kubelet-client.key")),
            ("enable-aggregator-routing", "true".to_owned()),
            ("authorization-mode", "Node,RBAC".to_owned()),
        ];
        // Without controllers nobody makes service accounts.
        let admission = "--disable-admission-plugins=ServiceAccount";
        let admission = (!self.controllers).then_some(admission);
        let [hosts, resolver] = egress.resolution(&self.state)?;
        let apiserver = Spawn::new("kube-apiserver", "unshare")
            .args([
                "--mount",
                "sh",
                "-c",
                "mount --bind \"$0\" /etc/hosts && mount --bind \"$1\" /etc/resolv.conf && shift && exec \"$@\"",
            ])
            .arg(&hosts)
            .arg(&resolver)
            .arg(&self.program)
            .args(flags.map(|(flag, value)| format!("--{flag}={value}")))
            .args(admission)
            .args(egress.flags(&self.state)?)
            .host(&self.host)
            .start(&self.logs)?;
        self.apiserver = Some(apiserver);
        Ok(())
    }

    /// Waits until kube-apiserver says that it is ready.
    pub(super) fn wait_ready(&self, kubectl: &Kubectl) -> Result<()> {
        let Some(apiserver) = &self.apiserver else {
            anyhow::bail!("kube-apiserver was not started")
        };
        // A connection costs nothing, a kubectl does: the two are looked for one after the other.
        let address = (Ipv4Addr::LOCALHOST, 6443);
        until(READY, "kube-apiserver listens", || {
            ensure!(
                apiserver.exited()?.is_none(),
                "it has ended: {}",
                apiserver.log()
            );
            self.host.enter(|| TcpStream::connect(address))??;
            Ok(())
        })?;
        until(READY, "kube-apiserver is ready", || {
            ensure!(kubectl.ok(&["get", "--raw", "/readyz"])? == b"ok");
            // Made by a start-up hook of kube-apiserver.
            kubectl.ok(&["get", "namespace", "default"])
        })?;
        Ok(())
    }
}
