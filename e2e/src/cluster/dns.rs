//! A real CoreDNS on the cloud host, which serves the map of node names as docs/control-plane.md says.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::account::{NAMESPACE, SERVICE};
use super::control_plane::PUBLIC;
use super::{Cluster, tools};
use crate::net::Host;
use crate::process::{Process, Spawn};

const DOCUMENT: &str = include_str!("../../../docs/control-plane.md");
/// Where the documented Corefile has the map.
const MOUNTED: &str = "/etc/edge/tunnel-nodes";
const DEADLINE: Duration = Duration::from_secs(60);

/// CoreDNS, its map, and a `resolv.conf` that leads to it.
#[derive(Debug)]
pub struct CoreDns {
    host: Host,
    map: PathBuf,
    resolver: PathBuf,
    _process: Process,
}

impl Cluster {
    /// Starts CoreDNS, and what makes of the Service's ClusterIP the address of the proxy-server, which kube-proxy would.
    ///
    /// # Errors
    /// When it does not start.
    pub fn coredns(&self) -> Result<CoreDns> {
        let host = self.net.host("cloud")?;
        let address = self.service_address()?;
        host.nft(&format!(
            "table ip services {{
                chain output {{
                    type nat hook output priority -100;
                    ip daddr {address} tcp dport 10250 dnat to {PUBLIC};
                }}
            }}"
        ))?;
        let dir = self.dir().join("coredns");
        fs::create_dir_all(&dir)?;
        let (map, resolver) = (dir.join("tunnel-nodes"), dir.join("resolv.conf"));
        fs::write(&resolver, "nameserver 127.0.0.1\n")?;
        let corefile = dir.join("Corefile");
        fs::write(&corefile, self::corefile(&map)?)?;
        self.mount_map(&map)?;
        let process = Spawn::new("coredns", tools()?.join("coredns"))
            .arg("-conf")
            .arg(&corefile)
            .host(&host)
            .start(&self.logs())?;
        process.wait_for_line("CoreDNS-", DEADLINE)?;
        Ok(CoreDns {
            host,
            map,
            resolver,
            _process: process,
        })
    }

    /// Writes the map as it is now to a file, atomically: what a kubelet does where a ConfigMap is mounted. CoreDNS can't run
    /// in a pod here, since the nodes' pods are behind NAT.
    fn mount_map(&self, file: &Path) -> Result<()> {
        let data = "jsonpath={.data.tunnel-nodes}";
        let get = [
            "get",
            "configmap",
            "edge-tunnel-nodes",
            "-n",
            "kube-system",
            "-o",
            data,
        ];
        let new = file.with_extension("new");
        fs::write(&new, self.kubectl().ok(&get)?)?;
        fs::rename(&new, file)?;
        Ok(())
    }

    /// The ClusterIP that names of nodes at the edge point to.
    ///
    /// # Errors
    /// When there is none.
    pub fn service_address(&self) -> Result<String> {
        let get = [
            "get",
            "service",
            SERVICE,
            "-n",
            NAMESPACE,
            "-o",
            "jsonpath={.spec.clusterIP}",
        ];
        Ok(String::from_utf8(self.kubectl().ok(&get)?)?)
    }
}

impl CoreDns {
    /// What kube-apiserver's `resolv.conf` has to be.
    #[must_use]
    pub fn resolver(&self) -> PathBuf {
        self.resolver.clone()
    }

    /// Mounts the map as it is now, and asks for a name.
    ///
    /// # Errors
    /// When the name is not there.
    pub fn resolve(&self, cluster: &Cluster, name: &str) -> Result<String> {
        cluster.mount_map(&self.map)?;
        self.host
            .run("busybox", &["nslookup", "-type=a", name, "127.0.0.1"])
    }
}

/// The documented Corefile, with our file, and without the rest of the world.
fn corefile(map: &Path) -> Result<String> {
    let block = DOCUMENT
        .split("```")
        .find(|block| block.contains(MOUNTED) && block.trim_start().starts_with(".:53"));
    let block = block.context("docs/control-plane.md has no Corefile")?;
    let lines = block.lines().filter(|line| !line.contains("forward . "));
    let file = lines.collect::<Vec<_>>().join("\n");
    ensure!(file.contains("hosts "), "no hosts in {file}");
    Ok(file.replace(MOUNTED, &map.display().to_string()))
}
