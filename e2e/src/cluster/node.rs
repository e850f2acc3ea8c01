//! A node: containerd with runc, and a real kubelet, in a sandbox on an edge host.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::pki::{Leaf, Pki};
use super::sandbox::Sandbox;
use super::{image, sandbox};
use crate::net::Host;
use crate::process::Process;

/// What differs between nodes.
#[derive(Debug)]
pub(super) struct Kind {
    /// What the kubelet labels its node with.
    pub(super) labels: &'static str,
    /// Where its pods' addresses are from.
    pub(super) pods: &'static str,
}

/// All nodes at the edge give their pods addresses of one range, as sites that know nothing of each other do. The proxy-server
/// takes nodes with this label for edges, whether or not their agent was ever seen.
pub(super) const EDGE: Kind = Kind {
    labels: "openyurt.io/is-edge-worker=true",
    pods: "10.244.1.0/24",
};

/// A node that was started.
#[derive(Debug)]
pub(super) struct Node {
    name: String,
    dir: PathBuf,
    logs: PathBuf,
    labels: &'static str,
    kubelet: Option<Process>,
    containerd: Process,
    // Ends whatever the two have started, so it goes last.
    sandbox: Sandbox,
}

impl Node {
    /// Starts containerd; the node has the name of its host.
    pub(super) fn start(host: &Host, kind: &Kind, state: &Path, logs: &Path) -> Result<Self> {
        let name = host.name().to_owned();
        let dir = state.join(&name);
        fs::create_dir_all(dir.join("cni"))?;
        let sandbox = Sandbox::new(host, tasks(&dir), logs)?;
        fs::write(dir.join("containerd.toml"), containerd_toml(&dir))?;
        fs::write(
            dir.join("cni/10-pods.conflist"),
            cni(&dir, kind.pods).to_string(),
        )?;
        let containerd = sandbox
            .spawn(&format!("containerd-{name}"), "containerd")
            .arg("-c")
            .arg(dir.join("containerd.toml"))
            .start(logs)?;
        Ok(Self {
            name,
            dir,
            logs: logs.to_owned(),
            labels: kind.labels,
            kubelet: None,
            containerd,
            sandbox,
        })
    }

    /// Its name, which is its host's.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Gives containerd the images of an archive.
    pub(super) fn import(&self, archive: &Path) -> Result<()> {
        let booted = "containerd successfully booted";
        self.containerd
            .wait_for_line(booted, Duration::from_secs(60))?;
        let (socket, archive) = (
            self.socket().display().to_string(),
            archive.display().to_string(),
        );
        let args = ["-a", &socket, "-n", "k8s.io", "images", "import", &archive];
        self.sandbox
            .run("ctr", &args, Duration::from_secs(60))
            .context("import images")
    }

    /// Starts the kubelet, which registers itself at the kube-apiserver `server`.
    pub(super) fn kubelet(
        &mut self,
        program: &Path,
        pki: &Pki,
        address: IpAddr,
        server: &str,
    ) -> Result<()> {
        let leaf = format!("kubelet-{}", self.name);
        pki.issue(&Leaf {
            file: &leaf,
            user: &format!("system:node:{}", self.name),
            group: Some("system:nodes"),
            dns: &[&self.name],
            ips: &[address],
        })?;
        let kubeconfig = pki.kubeconfig(&leaf, server)?;
        let config = self.dir.join("kubelet.json");
        fs::write(&config, self.kubelet_config(pki, &leaf).to_string())?;
        let kubelet = self
            .sandbox
            .spawn(&leaf, &program.display().to_string())
            .arg("--config")
            .arg(&config)
            .arg("--kubeconfig")
            .arg(&kubeconfig)
            .arg("--root-dir")
            .arg(self.dir.join("kubelet"))
            .arg("--cert-dir")
            .arg(self.dir.join("cert"))
            .args([
                format!("--hostname-override={}", self.name),
                format!("--node-ip={address}"),
                format!("--node-labels={}", self.labels),
            ])
            .start(&self.logs)?;
        self.kubelet = Some(kubelet);
        Ok(())
    }

    /// Ends the kubelet, as a machine that is switched off; what it runs goes on.
    pub(super) fn stop_kubelet(&mut self) -> Result<()> {
        self.kubelet.take().map_or(Ok(()), |kubelet| kubelet.kill())
    }

    /// Where a file of the node's own file-system is, for programs outside.
    pub(super) fn outside(&self, path: &str) -> PathBuf {
        self.sandbox.outside(path)
    }

    /// Sends a signal to the first process of a container.
    pub(super) fn signal(&self, container: &str, signal: &str) -> Result<()> {
        let socket = self.socket().display().to_string();
        let args = [
            "-a", &socket, "-n", "k8s.io", "tasks", "kill", "--signal", signal, container,
        ];
        self.sandbox.run("ctr", &args, Duration::from_secs(60))
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// The settings that differ from a usual node say why.
    fn kubelet_config(&self, pki: &Pki, leaf: &str) -> serde_json::Value {
        json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": false},
                "webhook": {"enabled": true},
                "x509": {"clientCAFile": pki.path("ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": pki.path(&format!("{leaf}.crt")),
            "tlsPrivateKeyFile": pki.path(&format!("{leaf}.key")),
            "containerRuntimeEndpoint": format!("unix://{}", self.socket().display()),
            // No systemd here, and perhaps cgroups v1.
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": false,
            "cgroupsPerQOS": false,
            "enforceNodeAllocatable": [],
            // Several nodes on one machine.
            "podLogsDir": self.dir.join("pod-logs"),
            "volumePluginDir": self.dir.join("volume-plugins"),
            "healthzBindAddress": "127.0.0.1",
            // A developer's machine: swap, any file-system, a disk that may be nearly full.
            "failSwapOn": false,
            "localStorageCapacityIsolation": false,
            "evictionHard": {"memory.available": "1Mi", "nodefs.available": "0%", "imagefs.available": "0%"},
            "imageGCHighThresholdPercent": 100,
            // A log of 50 MB is compared from its first byte: no rotation.
            "containerLogMaxSize": "2Gi",
            "resolvConf": "/dev/null",
            // The tests' pods come and go quickly.
            "registryPullQPS": 0,
            "eventRecordQPS": 0,
        })
    }
}

/// Removes what the kernel keeps of a node whose run was killed, and whose folder was `dir`.
pub(super) fn sweep(dir: &Path) -> Result<()> {
    sandbox::remove_cgroups(&tasks(dir))
}

/// Where containerd has a folder for each container that it runs.
fn tasks(dir: &Path) -> PathBuf {
    dir.join("containerd/state/io.containerd.runtime.v2.task/k8s.io")
}

fn containerd_toml(dir: &Path) -> String {
    let dir = dir.display();
    let pause = image::PAUSE;
    // restrict_oom_score_adj: without CAP_SYS_RESOURCE runc may not lower it, and dies.
    format!(
        r#"version = 2
root = "{dir}/containerd/root"
state = "{dir}/containerd/state"
[grpc]
  address = "{dir}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{dir}/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{dir}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"#
    )
}

fn cni(dir: &Path, pods: &str) -> serde_json::Value {
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "ipMasq": true,
            "ipam": {
                "type": "host-local",
                "dataDir": dir.join("ipam"),
                "ranges": [[{"subnet": pods}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }],
    })
}
