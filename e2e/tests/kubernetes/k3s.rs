//! What docs/control-plane.md says for k3s, given to the real one: k3s's own server, which has kube-apiserver within.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Kubectl, tools, until};
use e2e::lab::binary;
use e2e::net::{Host, Net};
use e2e::process::{Process, Spawn, tails};
use serde_json::json;

use crate::ALONE;
use crate::documented::block;

/// All of Kubernetes starts in one process.
const START: Duration = Duration::from_secs(180);
const ADDRESS: &str = "10.9.0.1";
/// What k3s would run on nodes, of which there is none.
const WITHOUT: [&str; 5] = [
    "coredns",
    "local-storage",
    "metrics-server",
    "servicelb",
    "traefik",
];

#[test]
fn k3s_asks_for_nodes_where_the_documented_configuration_leads_it() {
    if !e2e::net::may_run() {
        return;
    }
    let _alone = ALONE.lock();
    let dir = tempfile::Builder::new()
        .prefix("corvid-k3s-")
        .tempdir()
        .unwrap();
    if let Err(error) = asks(dir.path()) {
        panic!("{}\n{error:#}", tails(dir.path()));
    }
}

fn asks(dir: &Path) -> Result<()> {
    let net = Net::new()?;
    let host = net.add("k3s")?;
    // It wants to know an address of its own, and a way to everybody else.
    let other = net.add("other")?;
    let (near, far) = (format!("{ADDRESS}/24"), "10.9.0.2/24");
    net.link((&host, "eth0", &near), (&other, "eth0", far))?;
    host.ip("route add default via 10.9.0.2")?;
    let _server = server(&host, dir)?;
    let _etcd = Spawn::new("etcd", "etcd")
        .arg("--data-dir")
        .arg(dir.join("etcd"))
        .arg("--unsafe-no-fsync")
        .host(&host)
        .start(dir)?;
    let k3s = k3s(&host, dir)?;
    k3s.wait_for_line("Running kube-apiserver ", START)?;
    let kubeconfig = dir.join("k3s.kubeconfig");
    until(START, "k3s has written its kubeconfig", || {
        Ok(fs::metadata(&kubeconfig)?)
    })?;
    let kubectl = Kubectl::new(&host, &tools()?.join("kubectl"), kubeconfig, dir);
    until(START, "the default ServiceAccount is there", || {
        kubectl.ok(&["get", "serviceaccount", "default"])
    })?;
    let told = flags(&k3s.log())?;
    let selector = dir.join("egress.yaml");
    for (flag, wanted) in [
        (
            "egress-selector-config-file",
            selector.display().to_string(),
        ),
        (
            "kubelet-preferred-address-types",
            "Hostname,InternalIP".to_owned(),
        ),
    ] {
        let flag = format!("--{flag}=");
        let values: Vec<_> = told
            .split(' ')
            .filter_map(|told| told.strip_prefix(&flag))
            .collect();
        ensure!(values == [wanted.as_str()], "{flag}: {values:?}");
    }
    // Asked for by its name, as documented, though its address comes first.
    apply(
        &kubectl,
        dir,
        &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "edge1"}}),
    )?;
    let addresses = json!([{"type": "InternalIP", "address": "192.168.1.10"}, {"type": "Hostname", "address": "edge1"}]);
    let status = json!({"status": {"addresses": addresses}}).to_string();
    kubectl.ok(&[
        "patch",
        "node",
        "edge1",
        "--subresource=status",
        "--type=merge",
        "--patch",
        &status,
    ])?;
    let container = json!({"name": "c", "image": "none"});
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"nodeName": "edge1", "containers": [container]}});
    apply(&kubectl, dir, &pod)?;
    let said = kubectl.fails(&["logs", "p"])?;
    let wanted = "code 503: 503 node edge1: no session";
    ensure!(said.contains(wanted), "{said}");
    Ok(())
}

/// A proxy-server with the documented frontend, and a node at the edge.
fn server(host: &Host, dir: &Path) -> Result<Process> {
    let config = json!({
        "stateDir": dir.join("state"),
        "routes": [{"node": "edge1"}],
        "admin": {"socket": dir.join("admin.sock")},
        "frontends": [{"type": "httpConnect", "listen": format!("unix:{}", dir.join("connect.sock").display()), "default": "direct"}],
    });
    let file = dir.join("proxy-server.yaml");
    fs::write(&file, config.to_string())?;
    let server = Spawn::new("proxy-server", binary("proxy-server")?)
        .args(["run", "--config"])
        .arg(&file)
        .host(host)
        .start(dir)?;
    server.wait_for_line("ready", Duration::from_secs(60))?;
    Ok(server)
}

/// k3s's server as documented; only what says where files are is another.
fn k3s(host: &Host, dir: &Path) -> Result<Process> {
    let selector = block(
        "kind: EgressSelectorConfiguration\n",
        "/run/corvid/connect.sock",
    )?;
    let socket = dir.join("connect.sock").display().to_string();
    let file = dir.join("egress.yaml");
    fs::write(&file, selector.replace("/run/corvid/connect.sock", &socket))?;
    let config = block("egress-selector-mode:", "kube-apiserver-arg:")?;
    let documented = "/etc/corvid/egress.yaml";
    ensure!(config.contains(documented), "{config}");
    let config = config.replace(documented, &file.display().to_string());
    let file = dir.join("k3s.yaml");
    fs::write(&file, config)?;
    // It writes to /etc/rancher, whatever it is told.
    let layers = ["upper", "work"].map(|name| dir.join(name));
    for layer in &layers {
        fs::create_dir(layer)?;
    }
    let [upper, work] = layers.map(|layer| layer.display().to_string());
    let apart = format!(
        "mount -t overlay etc -o lowerdir=/etc,upperdir={upper},workdir={work} /etc && exec \"$0\" \"$@\""
    );
    let mut k3s = Spawn::new("k3s", "unshare")
        .args(["--mount", "sh", "-c", &apart])
        .arg(tools()?.join("k3s"))
        .args(["server", "--disable-agent", "--config"])
        .arg(&file)
        .arg("--data-dir")
        .arg(dir.join("k3s"))
        .arg("--write-kubeconfig")
        .arg(dir.join("k3s.kubeconfig"))
        .args(["--datastore-endpoint", "http://127.0.0.1:2379"])
        .args(["--node-ip", ADDRESS, "--advertise-address", ADDRESS])
        .args(["--disable-cloud-controller", "--disable-helm-controller"]);
    for addon in WITHOUT {
        k3s = k3s.args(["--disable", addon]);
    }
    k3s.host(host).start(dir)
}

/// What k3s gives to kube-apiserver.
fn flags(log: &str) -> Result<String> {
    let line = log
        .lines()
        .find(|line| line.contains("Running kube-apiserver "));
    let line = line.context("kube-apiserver was not started")?;
    Ok(line.trim_end_matches('"').to_owned())
}

fn apply(kubectl: &Kubectl, dir: &Path, object: &serde_json::Value) -> Result<()> {
    let file = dir.join("object.json");
    fs::write(&file, object.to_string())?;
    kubectl.ok(&["apply", "-f", &file.display().to_string()])?;
    Ok(())
}
