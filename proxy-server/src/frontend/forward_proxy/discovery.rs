//! `GET /sd/{kubelet,cadvisor,node-exporter,edge-agent}`: Prometheus HTTP service discovery of the nodes at the edge.
//!
//! Targets are node names, which the same listener serves as a proxy, so two nodes with one address are told apart.
//! `node`, `pool` and `region` become labels of the series. Whether a node is ready or has a session changes all the time
//! and would begin a new series each time, as does the way it is reached: these are `__meta_corvid_*`, there for
//! relabelling.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use serde::Serialize;

use super::Body;
use crate::serve::Forwarder;
use crate::status::{self, NodeStatus};

/// Where all of it is.
pub(super) const PREFIX: &str = "/sd/";
/// Where a node-exporter listens that nobody has moved.
const NODE_EXPORTER_PORT: u16 = 9100;
/// Where an agent has its own metrics; its `allow` must list the port.
const AGENT_PORT: u16 = 9441;

/// One target with its labels.
#[derive(Debug, Serialize, PartialEq)]
struct Group {
    targets: [String; 1],
    labels: BTreeMap<&'static str, String>,
}

/// The answer to a GET of a path below [`PREFIX`].
pub(super) fn answer(forwarder: &Forwarder, path: &str) -> Response<Body> {
    let nodes = status::nodes(forwarder);
    let body = groups(&nodes, path.trim_start_matches(PREFIX)).map(|g| serde_json::to_vec(&g));
    let (code, kind, body) = match body {
        Some(Ok(body)) => (StatusCode::OK, "application/json", Bytes::from(body)),
        Some(Err(error)) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            "text/plain",
            Bytes::from(format!("{error}\n")),
        ),
        None => (
            StatusCode::NOT_FOUND,
            "text/plain",
            Bytes::from_static(
                b"there are /sd/kubelet, /sd/cadvisor, /sd/node-exporter and /sd/edge-agent\n",
            ),
        ),
    };
    let mut response = Response::new(Full::new(body).map_err(|never| match never {}).boxed());
    *response.status_mut() = code;
    let kind = header::HeaderValue::from_static(kind);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// `None` if there is no such job.
fn groups(nodes: &[NodeStatus], job: &str) -> Option<Vec<Group>> {
    let (scheme, path) = match job {
        "kubelet" => ("https", "/metrics"),
        "cadvisor" => ("https", "/metrics/cadvisor"),
        "node-exporter" | "edge-agent" => ("http", "/metrics"),
        _ => return None,
    };
    let group = |node: &NodeStatus| {
        let port = match job {
            "node-exporter" => NODE_EXPORTER_PORT,
            "edge-agent" => AGENT_PORT,
            _ => node.kubelet_port,
        };
        let mut labels = BTreeMap::from([
            ("__metrics_path__", path.to_owned()),
            ("__scheme__", scheme.to_owned()),
            ("__meta_corvid_agent", node.agent.clone()),
            ("__meta_corvid_session", node.session.to_string()),
            ("node", node.node.clone()),
        ]);
        let path = node.path.as_ref();
        let tunnel = || "tunnel".to_owned();
        let mode = path.map_or_else(tunnel, |path| path.mode.clone());
        labels.insert("__meta_corvid_path", mode);
        let in_use = path.map(|path| path.in_use.clone());
        let line = path.and_then(|path| Some(path.line.as_ref()?.name.clone()));
        // An empty label is as none to Prometheus.
        let ready = node.ready.map(|ready| ready.to_string());
        for (label, value) in [
            ("__meta_corvid_path_in_use", &in_use),
            ("__meta_corvid_line", &line),
            ("__meta_corvid_ready", &ready),
            ("pool", &node.pool),
            ("region", &node.region),
        ] {
            if let Some(value) = value {
                labels.insert(label, value.clone());
            }
        }
        let targets = [format!("{}:{port}", node.node)];
        Group { targets, labels }
    };
    // In a cluster an agent that is no node serves others: a target of its own it is not.
    let in_cluster = nodes.iter().any(|node| node.source == "cluster");
    let wanted = |node: &&NodeStatus| {
        let stranger = in_cluster && node.source == "agent";
        // An agent that serves several nodes has its metrics on one of them, or on none.
        let its_own = job != "edge-agent" || node.agent == node.node;
        node.edge && !stranger && its_own
    };
    Some(nodes.iter().filter(wanted).map(group).collect())
}
