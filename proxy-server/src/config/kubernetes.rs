//! The `kubernetes:` section: how the cluster is asked, and what of its nodes means what.

use std::collections::BTreeMap;
use std::path::PathBuf;

use daemon::Problems;
use proto::AgentName;
use serde::Deserialize;

use super::authority::Authority;
use super::dns::{self, Dns, LeaseTimes};
use super::enrol::Enrol;
use super::{Cidr, PathMode, RouteEntry};
use crate::route::RouteTable;

/// What is known of nodes comes from a cluster. Without this section nothing of Kubernetes is asked.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Kubernetes {
    /// The file that says where kube-apiserver is and who we are.
    pub kubeconfig: Option<PathBuf>,
    /// We run in a pod, whose service account says so.
    pub in_cluster: bool,
    /// Nodes with these labels are at the edge, whether or not their agent was ever seen.
    pub edge_selector: Selector,
    /// The label that has a node's pool: the first of these that a node has.
    pub pool_labels: Vec<String>,
    /// The label that has a node's region.
    pub region_label: String,
    /// What goes for all nodes of a pool.
    pub pools: BTreeMap<String, Pool>,
    /// Where our own objects are; else the namespace of the kubeconfig's context or the pod, else [`NAMESPACE`].
    pub namespace: Option<String>,
    /// The election of the one server that writes.
    pub lease: LeaseTimes,
    /// What is written; nothing, if left out.
    pub dns: Option<Dns>,
    /// Agents enrol with their pods' ServiceAccount tokens; without this section with join tokens alone.
    pub enrol: Option<Enrol>,
    /// Where the authority is kept that all servers have; without this section it is that of the state directory.
    pub authority: Option<Authority>,
    /// Pods are destinations, by address and by name; without this section they are not.
    pub pods: Option<Pods>,
    /// Services are destinations, too; without this section they are not.
    pub services: Option<Services>,
}

/// Services as destinations.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Services {}

/// Pods as destinations.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Pods {
    /// What ends names within the cluster.
    pub cluster_domain: String,
}

impl Default for Pods {
    fn default() -> Self {
        Self {
            cluster_domain: "cluster.local".to_owned(),
        }
    }
}

/// Where our own objects are, where nobody says anything else.
pub const NAMESPACE: &str = "corvid";

impl Default for Kubernetes {
    fn default() -> Self {
        let edge = Requirement {
            key: "openyurt.io/is-edge-worker".to_owned(),
            wanted: Wanted::Equal("true".to_owned()),
        };
        Self {
            kubeconfig: None,
            in_cluster: false,
            edge_selector: Selector(vec![edge]),
            pool_labels: vec![
                "apps.openyurt.io/nodepool".to_owned(),
                "alibabacloud.com/nodepool-id".to_owned(),
            ],
            region_label: "topology.kubernetes.io/region".to_owned(),
            pools: BTreeMap::new(),
            namespace: None,
            lease: LeaseTimes::default(),
            dns: None,
            enrol: None,
            authority: None,
            pods: None,
            services: None,
        }
    }
}

/// What goes for all nodes of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pool {
    /// The one agent that serves them: a site with one way out.
    #[serde(default)]
    pub agent: Option<String>,
    /// How they are reached, unless a node's annotation says otherwise.
    #[serde(default)]
    pub path: Option<PathMode>,
    /// Where its pods have their addresses, if that is no network of one node: what is no known pod's is this agent's.
    #[serde(default)]
    pub pod_networks: Vec<Cidr>,
}

impl Pool {
    /// The agent; `None` if there is none, or it is no name (refused by [`super::load`]).
    #[must_use]
    pub fn agent(&self) -> Option<AgentName> {
        self.agent.as_deref()?.parse().ok()
    }
}

/// A label selector, of the equality-based kind: `a=b`, `a!=b`, `a` and `!a`, joined by commas, which mean "and". The
/// empty one selects nothing.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Selector(Vec<Requirement>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    wanted: Wanted,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Wanted {
    Present,
    Absent,
    Equal(String),
    /// Also met by a missing label, as Kubernetes has it.
    Other(String),
}

impl Kubernetes {
    /// Which agent serves what is in the networks of a pool's pods.
    pub(crate) fn pod_networks(&self) -> RouteTable {
        let pools = self.pools.values();
        let entry = |pool: &Pool| {
            let agent = pool.agent.clone()?;
            Some(RouteEntry {
                node: agent.clone(),
                agent: Some(agent),
                addresses: pool.pod_networks.clone(),
            })
        };
        let entries: Vec<_> = pools.filter_map(entry).collect();
        RouteTable::new(&entries)
    }
}

impl Selector {
    /// Whether these labels meet all requirements.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let met = |requirement: &Requirement| {
            let value = labels.get(&requirement.key);
            match &requirement.wanted {
                Wanted::Present => value.is_some(),
                Wanted::Absent => value.is_none(),
                Wanted::Equal(wanted) => value == Some(wanted),
                Wanted::Other(other) => value != Some(other),
            }
        };
        !self.0.is_empty() && self.0.iter().all(met)
    }
}

impl TryFrom<String> for Selector {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parts = text
            .split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty());
        let requirement = |part: &str| {
            let (key, wanted) = if let Some((key, value)) = part.split_once("!=") {
                (key, Wanted::Other(value.trim().to_owned()))
            } else if let Some((key, value)) =
                part.split_once("==").or_else(|| part.split_once('='))
            {
                (key, Wanted::Equal(value.trim().to_owned()))
            } else if let Some(key) = part.strip_prefix('!') {
                (key, Wanted::Absent)
            } else {
                (part, Wanted::Present)
            };
            let key = key.trim();
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
            if key.is_empty() || !key.chars().all(plain) {
                return Err(format!(
                    "{part:?} is none of KEY=VALUE, KEY!=VALUE, KEY, !KEY"
                ));
            }
            Ok(Requirement {
                key: key.to_owned(),
                wanted,
            })
        };
        parts.map(requirement).collect::<Result<_, _>>().map(Self)
    }
}

pub(super) fn check(kubernetes: &Kubernetes, problems: &mut Problems) {
    problems.check(
        kubernetes.kubeconfig.is_some() != kubernetes.in_cluster,
        "kubernetes",
        "say either kubeconfig: FILE or inCluster: true",
    );
    problems.check(
        kubernetes.services.is_none() || kubernetes.pods.is_some(),
        "kubernetes.services",
        "Services lead to pods: say pods: {}, too",
    );
    if let Some(enrol) = &kubernetes.enrol {
        enrol.check(problems);
    }
    if let Some(authority) = &kubernetes.authority {
        authority.check(problems);
    }
    for (name, pool) in &kubernetes.pools {
        if let Some(agent) = &pool.agent {
            problems.check(
                pool.agent().is_some(),
                format!("kubernetes.pools.{name}.agent"),
                format!("{agent:?} is no agent name"),
            );
        }
        problems.check(
            pool.agent.is_some() || pool.path.is_some(),
            format!("kubernetes.pools.{name}"),
            "say agent, path, or both",
        );
        problems.check(
            pool.pod_networks.is_empty() || kubernetes.pods.is_some(),
            format!("kubernetes.pools.{name}.podNetworks"),
            "needs kubernetes.pods, which says who has which address there",
        );
        problems.check(
            pool.pod_networks.is_empty() || pool.agent.is_some(),
            format!("kubernetes.pools.{name}.podNetworks"),
            "needs agent, which is whom they lead to",
        );
    }
    if let Some(namespace) = &kubernetes.namespace {
        problems.check(
            dns::is_label(namespace),
            "kubernetes.namespace",
            format!("{namespace:?} is no name of a namespace"),
        );
    }
    dns::check_times(&kubernetes.lease, problems);
    if let Some(dns) = &kubernetes.dns {
        dns::check(dns, problems);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What is wrong with a `kubernetes:` section.
    pub(in crate::config) fn problems(yaml: &str) -> String {
        let file = std::path::Path::new("f");
        let kubernetes: Kubernetes = match daemon::config::parse(file, yaml) {
            Ok(kubernetes) => kubernetes,
            Err(error) => return error.to_string(),
        };
        let mut problems = Problems::new();
        check(&kubernetes, &mut problems);
        match problems.into_result(file) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn services_lead_to_pods_so_both_are_wanted() {
        for (more, wanted) in [
            ("", ""),
            ("pods: {}", ""),
            ("pods: {}\nservices: {}", ""),
            ("services: {}", "Services lead to pods: say pods: {}, too"),
            ("pods: {}\nservices: {all: true}", "unknown field"),
        ] {
            let told = problems(&format!("inCluster: true\n{more}"));
            assert_eq!(told.is_empty(), wanted.is_empty(), "{more}: {told}");
            assert!(told.contains(wanted), "{more}: {told}");
        }
    }

    #[test]
    fn networks_of_pods_are_for_those_who_know_pods() {
        let with = |pods| {
            problems(&format!(
                "{{inCluster: true, {pods}pools: {{hz: {{agent: site-a, podNetworks: [10.9.0.0/16]}}}}}}"
            ))
        };
        assert_eq!(with("pods: {}, "), "");
        let wrong = with("");
        assert!(
            wrong.contains("kubernetes.pools.hz.podNetworks: needs kubernetes.pods"),
            "{wrong}"
        );
    }

    #[test]
    fn selectors_select_as_those_of_kubernetes() {
        let labels = [("a", "1"), ("x.io/b", "")];
        let labels = labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        for (selector, wanted) in [
            ("a=1", true),
            ("a==1", true),
            ("a=2", false),
            ("a!=2", true),
            ("a!=1", false),
            ("c!=1", true),
            ("a", true),
            ("c", false),
            ("!c", true),
            ("!a", false),
            ("x.io/b=", true),
            ("a=1, x.io/b", true),
            ("a=1,c", false),
            ("", false),
        ] {
            let parsed = Selector::try_from(selector.to_owned()).unwrap();
            assert_eq!(parsed.matches(&labels), wanted, "{selector}");
        }
        for bad in ["a in (b)", "=x", "!", "a b"] {
            assert!(Selector::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }
}
