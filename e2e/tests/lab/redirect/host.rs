//! The control plane's host: its table, `redirect --run` on it, a kube-apiserver beside it.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use e2e::lab::{self, Lab, Server};
use e2e::net::Host;
use e2e::process::{Process, Spawn};
use e2e::wait;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::api::Api;
use crate::intercept::{NAME, SOON};

/// The table is looked at every 5 s.
pub(super) const CHECKED: Duration = Duration::from_secs(30);
/// Somebody else's rules, as kube-proxy has them.
pub(super) const NOT_OURS: &str = "table inet not_ours {
    chain out {
        type nat hook output priority -100;
        ip daddr 10.96.0.1 tcp dport 443 dnat ip to 10.1.0.6:6443
    }
}";
pub(super) const EDGES: [&str; 4] = ["10.1.0.1", "10.1.0.2", "fd00::1", "fd00::2"];

/// What the table has in its sets; `None` if there is no table.
pub(super) fn table(host: &Host) -> Result<Option<BTreeSet<String>>> {
    // Without its chain a table does nothing.
    if ours(host, "chain")?.is_empty() {
        return Ok(None);
    }
    let sets = ours(host, "set")?;
    let elements = sets.iter().filter_map(|set| set.get("elem")?.as_array());
    Ok(Some(elements.flatten().filter_map(element).collect()))
}

fn element(element: &Value) -> Option<String> {
    let Some(prefix) = element.get("prefix") else {
        return element.as_str().map(str::to_owned);
    };
    let address = prefix.get("addr")?.as_str()?;
    Some(format!("{address}/{}", prefix.get("len")?))
}

/// The objects of a kind in our table, as `nft` lists them.
pub(super) fn ours(host: &Host, kind: &str) -> Result<Vec<Value>> {
    let mut listing: Value = serde_json::from_str(&host.run("nft", &["-j", "list", "ruleset"])?)?;
    let objects = listing.get_mut("nftables").and_then(Value::as_array_mut);
    let mut objects = std::mem::take(objects.context("no list")?);
    let of_kind = objects
        .iter_mut()
        .filter_map(|object| object.get_mut(kind))
        .map(Value::take);
    let table = |object: &Value| object.get("table") == Some(&json!("corvid_redirect"));
    Ok(of_kind.filter(table).collect())
}

pub(super) fn until(host: &Host, wanted: &[&str]) -> Result<()> {
    let wanted = wanted.iter().map(|address| (*address).to_owned()).collect();
    wait::poll(CHECKED, &format!("the table has {wanted:?}"), || {
        let now = table(host).map_err(|error| format!("{error:#}"))?;
        if now.as_ref() == Some(&wanted) {
            Ok(())
        } else {
            Err(format!("{now:?}"))
        }
    })
}

/// `redirect --run` with the server's configuration.
pub(super) fn run(lab: &Lab, server: &Server) -> Result<Process> {
    run_with(lab, server.config())
}

pub(super) fn run_with(lab: &Lab, config: &Path) -> Result<Process> {
    Spawn::new("redirect", lab::binary("proxy-server")?)
        .args(["redirect", "--run", "--config"])
        .arg(config)
        .host(&lab.host("cloud")?)
        .start(lab.dir())
}

/// A connection that is open for a while before it says anything.
pub(super) struct Held(TcpStream);

impl Held {
    pub(super) fn open(host: &Host, to: SocketAddr) -> Result<Self> {
        let stream = host.enter(|| TcpStream::connect_timeout(&to, SOON))??;
        stream.set_read_timeout(Some(SOON))?;
        Ok(Self(stream))
    }

    pub(super) fn says(mut self) -> Result<String> {
        self.0.write_all(NAME.as_bytes())?;
        let mut said = String::new();
        self.0.read_to_string(&mut said)?;
        Ok(said)
    }
}

/// A node at the edge, as a kubelet writes it.
pub(crate) fn edge(name: &str, addresses: &[&str]) -> Value {
    node(
        name,
        &json!({"openyurt.io/is-edge-worker": "true"}),
        addresses,
    )
}

pub(crate) fn node(name: &str, labels: &Value, addresses: &[&str]) -> Value {
    let addresses: Vec<_> = addresses
        .iter()
        .map(|address| json!({"type": "InternalIP", "address": address}))
        .collect();
    json!({
        "metadata": {"name": name, "uid": format!("uid-of-{name}"), "labels": labels},
        "status": {
            "addresses": addresses,
            "conditions": [{"type": "Ready", "status": "True"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
        },
    })
}

/// Runs a scenario on the control plane's host, with a kube-apiserver there.
pub(crate) fn beside_an_apiserver(
    scenario: impl FnOnce(&Lab, &Runtime, &mut Api) -> Result<()> + Send,
) {
    lab::scenario(|lab| {
        lab.host("cloud")?.enter(|| {
            // Its threads are born in the namespace.
            let runtime = Runtime::new()?;
            let mut api = runtime.block_on(Api::start());
            let ended = scenario(lab, &runtime, &mut api);
            runtime.block_on(api.down());
            ended
        })?
    });
}

pub(crate) fn kubernetes(config: &mut Value, api: &Api, lab: &Lab) {
    config["kubernetes"] = json!({"kubeconfig": api.kubeconfig(lab.dir())});
}
