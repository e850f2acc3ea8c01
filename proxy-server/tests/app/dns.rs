//! Node names as a ConfigMap for CoreDNS, written to an emulated Kubernetes API by the one server that leads.

mod failures;
mod leader;
mod map;

use proxy_server::status::{ClusterStatus, DnsStatus};
use serde_json::{Value, json};

use crate::api::Api;
use crate::api::objects::Write;
use crate::cluster::node;
use crate::stack::{DEADLINE, Stack};

const MAP: &str = "kube-system/edge-tunnel-nodes";
const LEASE: &str = "corvid/corvid-proxy-server";
/// Nobody takes over by waiting, whatever is slow here.
const PATIENT: &str = "lease: {duration: 1h, renewDeadline: 10m, retryPeriod: 100ms}";
/// Taking over takes 6 s.
const BRISK: &str = "lease: {duration: 6s, renewDeadline: 4s, retryPeriod: 100ms}";
const ADDRESSES: &str = "dns: {addresses: [10.96.0.50, 'fd00::50']}";

fn dns(lease: &str, dns: &str) -> String {
    format!("kubernetes: {{kubeconfig: KUBECONFIG, {lease}, {dns}}}")
}

fn cloud(name: &str, address: &str) -> Value {
    node(name, &json!({}), &json!({}), &[address])
}

fn text(api: &Api) -> Option<String> {
    let map = api.object("configmaps", MAP)?;
    map["data"]["tunnel-nodes"].as_str().map(ToOwned::to_owned)
}

/// Which server wrote the map last.
fn writer(api: &Api) -> Option<String> {
    let map = api.object("configmaps", MAP)?;
    let annotation = &map["metadata"]["annotations"]["corvid.io/written-by"];
    annotation.as_str().map(ToOwned::to_owned)
}

fn holder(api: &Api) -> Option<String> {
    let lease = api.object("leases", LEASE)?;
    lease["spec"]["holderIdentity"]
        .as_str()
        .map(ToOwned::to_owned)
}

async fn is_text(api: &Api, wanted: &str) {
    let mut last = None;
    let read = async {
        loop {
            last = text(api);
            if last.as_deref() == Some(wanted) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    let in_time = tokio::time::timeout(DEADLINE, read).await;
    assert!(in_time.is_ok(), "never {wanted:?}, but {last:?}");
}

/// What `proxy-server status` is told, and shows.
async fn status(stack: &Stack) -> (DnsStatus, String) {
    let body = daemon::admin::client::get(&stack.admin, "/cluster")
        .await
        .unwrap();
    let cluster: ClusterStatus = serde_json::from_slice(&body).unwrap();
    let lines = cluster.lines();
    (cluster.dns.unwrap(), lines)
}

async fn is_shown(stack: &Stack, wanted: &str) {
    let mut last = String::new();
    let read = async {
        while !last.contains(wanted) {
            last = status(stack).await.1;
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    let in_time = tokio::time::timeout(DEADLINE, read).await;
    assert!(in_time.is_ok(), "never {wanted:?}, but {last:?}");
}

fn of_maps(write: &&Write) -> bool {
    write.what.ends_with(" configmaps")
}

async fn until_counted(stack: &Stack, result: &str) {
    let name = format!("corvid_dns_writes_total{{result=\"{result}\"}}");
    let read = async {
        while stack.metric(&name).await < 1.0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    assert!(
        tokio::time::timeout(DEADLINE, read).await.is_ok(),
        "never {result}"
    );
}
