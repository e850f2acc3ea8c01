//! What is kept of a Node, and what its labels and annotations mean. Pure.
//!
//! A Node as Kubernetes has it is some 10 to 50 KB (images, conditions, managed fields); what is kept is a few hundred
//! bytes. It is trimmed on arrival, so that no more than a page of whole ones is in memory.
//!
//! | question | answer, the first that there is |
//! | --- | --- |
//! | which agent serves the node | annotation `corvid.io/agent` · `kubernetes.pools` of its pool · the agent of its name |
//! | is it at the edge | its labels fit `kubernetes.edgeSelector` · annotation or pool name an agent · its agent is known (asked when a request comes) |
//!
//! Names and addresses are what the node's kubelet wrote: a kubelet may claim those of others. So addresses that lead to
//! ourselves or to nobody and names of Services are left out, and what two nodes claim is refused (`table.rs`).

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use proto::{AgentName, Host, is_loopback, is_never_dialled};
use serde::Deserialize;

use crate::config::{Kubernetes, PathMode};

/// The annotation by which a node names the agent that serves it.
pub const AGENT: &str = "corvid.io/agent";
/// The annotation by which a node says how it is reached: `tunnel`, `direct` or `auto`.
pub const PATH: &str = "corvid.io/path";
/// ACK's label of nodes that are reached by a dedicated line, and its value.
pub const INTERCONNECTION: (&str, &str) = ("alibabacloud.com/interconnection-mode", "private");
/// Where a kubelet listens that does not say where, or nowhere that is a port.
pub const KUBELET_PORT: u16 = 10250;
/// Addresses, names, and characters of what is no name, that are kept of a node; real ones have a handful. A kubelet writes
/// them itself.
const MOST: usize = 32;

/// What is read of a Node; the rest is skipped while it is parsed.
#[derive(Debug, Clone, Deserialize)]
pub struct Watched {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Status {
    addresses: Vec<Address>,
    conditions: Vec<Condition>,
    daemon_endpoints: Endpoints,
}

#[derive(Debug, Clone, Deserialize)]
struct Address {
    #[serde(rename = "type")]
    kind: String,
    address: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Endpoints {
    kubelet_endpoint: Endpoint,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Endpoint {
    // Kubernetes spells it so, and takes any number: one that is no port must not make the whole list unreadable.
    #[serde(rename = "Port")]
    port: i64,
}

impl Endpoint {
    fn port(&self) -> u16 {
        u16::try_from(self.port)
            .ok()
            .filter(|port| *port != 0)
            .unwrap_or(KUBELET_PORT)
    }
}

impl Resource for Watched {
    type DynamicType = ();
    type Scope = k8s_openapi::ClusterResourceScope;

    fn kind((): &()) -> std::borrow::Cow<'_, str> {
        "Node".into()
    }

    fn group((): &()) -> std::borrow::Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> std::borrow::Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> std::borrow::Cow<'_, str> {
        "nodes".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// What is kept of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its uid: another one under the same name is another node.
    pub uid: String,
    /// Internal addresses first, in the kubelet's order.
    pub addresses: Vec<IpAddr>,
    /// How many of them are internal.
    pub internal: usize,
    /// What else it is called.
    pub aliases: Vec<String>,
    /// Addresses of its pods.
    pub pod_cidrs: Vec<IpNet>,
    /// Its pool.
    pub pool: Option<String>,
    /// Its region.
    pub region: Option<String>,
    /// Whether Kubernetes calls it ready.
    pub ready: bool,
    /// Where its kubelet listens.
    pub kubelet_port: u16,
    /// Who serves it.
    pub agent: AgentName,
    /// At the edge by label, annotation or pool.
    pub edge: bool,
    /// The beginning of an annotation that has no agent's name and is not used.
    pub misnamed: Option<String>,
    /// How it says that it is reached.
    pub path: Option<Wish>,
    /// ACK's label says that it is reached by a dedicated line.
    pub is_private: bool,
}

/// What a node says of how it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// So.
    Path(PathMode),
    /// The beginning of what is none of the words for it.
    Unknown(String),
}

impl Node {
    /// Keeps what is needed of a node; `None` if it has no name that an agent could have.
    #[must_use]
    pub fn trim(watched: Watched, settings: &Kubernetes) -> Option<Self> {
        let Watched {
            metadata,
            spec,
            status,
        } = watched;
        let (name, labels) = (metadata.name?, metadata.labels.unwrap_or_default());
        let pool = settings.pool_labels.iter().find_map(|key| labels.get(key));
        let annotations = metadata.annotations.unwrap_or_default();
        let annotation = annotations.get(AGENT);
        let annotated = annotation.and_then(|agent| agent.parse().ok());
        let misnamed = annotation.filter(|_| annotated.is_none());
        let (label, private) = INTERCONNECTION;
        let is_private = labels.get(label).is_some_and(|mode| mode == private);
        let of_pool = || settings.pools.get(pool?)?.agent();
        let named: Option<AgentName> = annotated.or_else(of_pool);
        let edge = named.is_some() || settings.edge_selector.matches(&labels);
        let agent = named.or_else(|| name.parse().ok())?;
        let cidrs = spec.pod_cidrs.iter().chain(&spec.pod_cidr);
        let mut pod_cidrs: Vec<IpNet> = cidrs.filter_map(|cidr| cidr.parse().ok()).collect();
        pod_cidrs.dedup();
        let ready = |c: &Condition| c.kind == "Ready" && c.status == "True";
        let (addresses, internal) = addresses(&status.addresses);
        Some(Self {
            uid: metadata.uid.unwrap_or_default(),
            addresses,
            internal,
            aliases: aliases(&name, &status.addresses),
            pod_cidrs,
            region: labels.get(&settings.region_label).cloned(),
            pool: pool.cloned(),
            ready: status.conditions.iter().any(ready),
            kubelet_port: status.daemon_endpoints.kubelet_endpoint.port(),
            misnamed: misnamed.map(|agent| agent.chars().take(MOST).collect()),
            path: annotations.get(PATH).map(|said| wish(said)),
            is_private,
            agent,
            edge,
            name,
        })
    }

    /// Whether it is at the edge; `known` says whether there is an agent of that name.
    pub fn is_edge(&self, known: impl Fn(&AgentName) -> bool) -> bool {
        self.edge || known(&self.agent)
    }

    /// What its agent dials for one of the node's names: itself if it is the node, else the node's first address.
    /// `None` leaves the name as it was asked for to the agent's resolver.
    #[must_use]
    pub fn dialled(&self, asked: &str) -> Option<Host> {
        if self.agent.as_str() != self.name {
            return self.addresses.first().copied().map(Host::Ip);
        }
        // The agent knows itself by this name only.
        (asked != self.name).then(|| Host::Name(self.name.clone()))
    }
}

fn wish(said: &str) -> Wish {
    PathMode::named(said).map_or_else(
        || Wish::Unknown(said.chars().take(MOST).collect()),
        Wish::Path,
    )
}

/// The addresses, and how many of them are internal.
fn addresses(all: &[Address]) -> (Vec<IpAddr>, usize) {
    let of = |kind: &'static str| all.iter().filter(move |address| address.kind == kind);
    let (mut addresses, mut internal) = (Vec::new(), 0);
    for address in of("InternalIP").chain(of("ExternalIP")) {
        if addresses.len() == MOST {
            break;
        }
        let Ok(ip) = address.address.parse::<IpAddr>() else {
            continue;
        };
        let ip = ip.to_canonical();
        if !is_loopback(ip) && !is_never_dialled(ip) && !addresses.contains(&ip) {
            addresses.push(ip);
            internal += usize::from(address.kind == "InternalIP");
        }
    }
    (addresses, internal)
}

fn aliases(name: &str, all: &[Address]) -> Vec<String> {
    let mut aliases = Vec::new();
    for address in all {
        if aliases.len() == MOST {
            break;
        }
        if !matches!(
            address.kind.as_str(),
            "Hostname" | "InternalDNS" | "ExternalDNS"
        ) {
            continue;
        }
        // As destinations are: lower case, without a final dot. An address is no name.
        let Ok(Host::Name(alias)) = address.address.parse::<Host>() else {
            continue;
        };
        // `svc` and `pod` belong to Services and pods, whatever a kubelet writes: kube-apiserver calls webhooks by such names.
        let taken = |label| matches!(label, "svc" | "pod");
        let of_cluster = alias.split('.').any(taken);
        if alias != name && !of_cluster && alias != "localhost" && !aliases.contains(&alias) {
            aliases.push(alias);
        }
    }
    aliases
}

/// Nodes by name.
pub type Nodes = BTreeMap<String, std::sync::Arc<Node>>;

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::*;

    pub(crate) fn trim(node: Value, settings: &Kubernetes) -> Option<Node> {
        Node::trim(serde_json::from_value(node).unwrap(), settings)
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "the tables of the tests read better so"
    )]
    pub(crate) fn node(
        name: &str,
        labels: Value,
        annotations: Value,
        addresses: &[(&str, &str)],
    ) -> Value {
        let addresses: Vec<_> = addresses
            .iter()
            .map(|(kind, address)| json!({"type": kind, "address": address}))
            .collect();
        json!({
            "metadata": {"name": name, "uid": format!("uid-{name}"), "labels": labels, "annotations": annotations},
            "spec": {"podCIDR": "10.42.1.0/24", "podCIDRs": ["10.42.1.0/24"], "taints": [{"key": "k", "effect": "NoSchedule"}]},
            "status": {
                "addresses": addresses,
                "conditions": [{"type": "Ready", "status": "True"}],
                "daemonEndpoints": {"kubeletEndpoint": {"Port": 10350}},
                "images": [{"names": ["a"], "sizeBytes": 5}],
            },
        })
    }

    #[test]
    fn what_is_needed_is_kept() {
        let labels = json!({"alibabacloud.com/nodepool-id": "np1", "topology.kubernetes.io/region": "r1", "openyurt.io/is-edge-worker": "true"});
        let addresses = [
            ("ExternalIP", "203.0.113.7"),
            ("InternalIP", "::ffff:192.168.1.10"),
            ("InternalIP", "fd00::1"),
            ("InternalIP", "127.0.0.1"),
            ("InternalIP", "169.254.169.254"),
            ("InternalIP", "nonsense"),
            ("Hostname", "edge1"),
            ("InternalDNS", "Edge1.Site."),
            ("ExternalDNS", "webhook.default.svc"),
            ("ExternalDNS", "10.1.1.1"),
        ];
        let node = trim(
            node("edge1", labels, json!({}), &addresses),
            &Kubernetes::default(),
        )
        .unwrap();
        let wanted = Node {
            name: "edge1".into(),
            uid: "uid-edge1".into(),
            addresses: ["192.168.1.10", "fd00::1", "203.0.113.7"]
                .map(|a| a.parse().unwrap())
                .into(),
            internal: 2,
            aliases: vec!["edge1.site".into()],
            pod_cidrs: vec!["10.42.1.0/24".parse().unwrap()],
            pool: Some("np1".into()),
            region: Some("r1".into()),
            ready: true,
            kubelet_port: 10350,
            agent: "edge1".parse().unwrap(),
            edge: true,
            misnamed: None,
            path: None,
            is_private: false,
        };
        assert_eq!(node, wanted);
    }

    #[test]
    fn a_node_with_nothing_but_a_name_is_one() {
        let bare = json!({"metadata": {"name": "n1"}});
        let bare = trim(bare, &Kubernetes::default()).unwrap();
        assert_eq!((bare.agent.as_str(), bare.kubelet_port), ("n1", 10250));
        assert!(!bare.edge && !bare.ready && bare.addresses.is_empty());
    }

    #[test]
    fn a_kubelet_that_claims_everything_is_heard_so_far() {
        let claims: Vec<_> = (0..500)
            .map(|i| format!("10.0.{}.{}", i / 250, i % 250))
            .collect();
        let names: Vec<_> = (0..500).map(|i| format!("n{i}.site")).collect();
        let claims = claims.iter().map(|a| ("InternalIP", a.as_str()));
        let names = names.iter().map(|n| ("InternalDNS", n.as_str()));
        let all: Vec<_> = claims.chain(names).collect();
        let greedy = trim(
            node("n1", json!({}), json!({}), &all),
            &Kubernetes::default(),
        )
        .unwrap();
        assert_eq!((greedy.addresses.len(), greedy.aliases.len()), (MOST, MOST));
    }

    #[test]
    fn how_it_is_reached_is_kept_of_what_is_said() {
        let label = INTERCONNECTION.0;
        let long = "x".repeat(500);
        for (labels, annotations, path, is_private) in [
            (json!({}), json!({}), None, false),
            (
                json!({label: "private"}),
                json!({PATH: "auto"}),
                Some(Wish::Path(PathMode::Auto)),
                true,
            ),
            (
                json!({label: "basic"}),
                json!({PATH: "tunnel"}),
                Some(Wish::Path(PathMode::Tunnel)),
                false,
            ),
            (
                json!({}),
                json!({PATH: "Direct"}),
                Some(Wish::Unknown("Direct".into())),
                false,
            ),
            (
                json!({}),
                json!({PATH: long}),
                Some(Wish::Unknown("x".repeat(MOST))),
                false,
            ),
        ] {
            let case = format!("{labels} {annotations}");
            let node = trim(node("n1", labels, annotations, &[]), &Kubernetes::default());
            let node = node.unwrap();
            assert_eq!((node.path, node.is_private), (path, is_private), "{case}");
        }
    }

    #[test]
    fn annotation_before_pool_before_name() {
        let settings: Kubernetes =
            serde_json::from_value(json!({"pools": {"p": {"agent": "of-pool"}}})).unwrap();
        let pool = json!({"apps.openyurt.io/nodepool": "p"});
        for (labels, annotations, agent, edge) in [
            (json!({}), json!({}), "n1", false),
            (pool.clone(), json!({}), "of-pool", true),
            (pool.clone(), json!({AGENT: "annotated"}), "annotated", true),
            (pool, json!({AGENT: "No Name"}), "of-pool", true),
            (json!({}), json!({AGENT: "annotated"}), "annotated", true),
            (json!({}), json!({AGENT: ""}), "n1", false),
            (
                json!({"apps.openyurt.io/nodepool": "q"}),
                json!({}),
                "n1",
                false,
            ),
            (
                json!({"openyurt.io/is-edge-worker": "true"}),
                json!({}),
                "n1",
                true,
            ),
            (
                json!({"openyurt.io/is-edge-worker": "false"}),
                json!({}),
                "n1",
                false,
            ),
        ] {
            let case = format!("{labels} {annotations}");
            let node = trim(node("n1", labels, annotations, &[]), &settings).unwrap();
            assert_eq!((node.agent.as_str(), node.edge), (agent, edge), "{case}");
        }
    }
}
