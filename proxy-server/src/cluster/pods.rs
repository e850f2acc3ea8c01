//! The pods of the cluster: which node each is on, at which addresses. A pod is a destination by its name and by its address.
//!
//! | destination | route |
//! | --- | --- |
//! | `NAME.NAMESPACE.pod`, also with the cluster's domain | the agent of its node, which dials the pod's first address |
//! | `10-244-1-5.NAMESPACE.pod`, as cluster DNS has it | as the pod of that address in that namespace |
//! | address of one pod | the agent of its node |
//! | address that several pods have, or a pod and a node | refused, all named; unless none is at the edge |
//! | a pod of a node that is not known | refused |
//! | a name of that form that no pod has | refused: no such pod |
//! | anything else | not known here |
//!
//! Pods on their hosts' network have a name and no address: theirs is the node's. Those that have ended or have no address yet
//! are not kept; one that should have ended by now, on a node that says nothing, counts for nothing. Until all pods were read
//! once there are none, and no address in a network of pods is routed. While kube-apiserver is away, and until a list is complete, those of before stay; what goes wrong with the watch is in
//! [`follow`]. What is kept of a pod is some 300 bytes.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ContainerPort, Pod as Watched, PodSpec};
use kube::Api;
use kube::runtime::watcher::Event;
use parking_lot::RwLock;
use proto::wire::PodPort;
use proto::{Reason, is_loopback, is_never_dialled};

use super::client::Source;
use super::follow::{self, Follower};
use crate::error::Refusal;

/// Declared ports that are kept of a pod.
const MOST_PORTS: usize = 256;
/// What ends the names of pods.
const DOMAIN: &str = "pod";

/// What is kept of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pod {
    /// `NAMESPACE/NAME`.
    pub(crate) key: String,
    /// The node it is on.
    pub(crate) node: String,
    /// Its addresses, the first is the one that Kubernetes calls its own. None on its node's network.
    pub(crate) addresses: Vec<IpAddr>,
    /// The TCP ports that its containers declare.
    ports: Vec<u16>,
    /// When it should have ended, Unix time.
    ends: Option<i64>,
}

impl Pod {
    /// `None` for one that can't be dialled at an address of its own.
    fn trim(watched: &Watched) -> Option<Self> {
        let (spec, status) = (watched.spec.as_ref()?, watched.status.as_ref()?);
        let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        if ended {
            return None;
        }
        let on_host = spec.host_network == Some(true);
        let more = status.pod_ips.iter().flatten().map(|ip| &ip.ip);
        let mut addresses = Vec::new();
        for ip in status.pod_ip.iter().chain(more) {
            let Ok(ip) = ip.parse::<IpAddr>() else {
                continue;
            };
            let ip = ip.to_canonical();
            if !is_loopback(ip) && !is_never_dialled(ip) && !addresses.contains(&ip) {
                addresses.push(ip);
            }
        }
        if on_host {
            addresses.clear();
        } else if addresses.is_empty() {
            return None;
        }
        let ends = watched.metadata.deletion_timestamp.as_ref();
        Some(Self {
            key: follow::key(watched),
            node: spec.node_name.clone()?,
            addresses,
            ports: declared(spec),
            ends: ends.map(|time| time.0.as_second()),
        })
    }

    /// What its node's agent is told when a port of it is to be dialled.
    pub(crate) fn port(&self, port: u16) -> PodPort {
        PodPort {
            pod: self.key.clone(),
            node: self.node.clone(),
            declared: self.ports.contains(&port),
        }
    }

    fn is_there(&self) -> bool {
        let now = certs::Clock::system().now().as_secs();
        self.ends
            .is_none_or(|ends| ends.try_into().is_ok_and(|ends: u64| ends > now))
    }
}

/// TCP ports of the containers that run as long as the pod: sidecars are among those that start it.
fn declared(spec: &PodSpec) -> Vec<u16> {
    let starts = spec.init_containers.iter().flatten();
    let sidecars = starts.filter(|it| it.restart_policy.as_deref() == Some("Always"));
    let containers = spec.containers.iter().chain(sidecars);
    let ports = containers.filter_map(|it| it.ports.as_ref()).flatten();
    let tcp = ports.filter(|port| port.protocol.as_deref().is_none_or(|it| it == "TCP"));
    let number = |port: &ContainerPort| u16::try_from(port.container_port).ok();
    let mut all: Vec<u16> = tcp.filter_map(number).take(MOST_PORTS).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// The pods, shared by who follows them and who asks. Without `kubernetes.pods` there are none.
#[derive(Debug, Default)]
pub(crate) struct Pods(RwLock<Index>);

/// By name and by address, in step.
#[derive(Debug, Default)]
struct Index {
    pods: HashMap<String, Arc<Pod>>,
    addresses: HashMap<IpAddr, Vec<Arc<Pod>>>,
    /// All were read once.
    known: bool,
}

impl Index {
    fn put(&mut self, pod: Pod) {
        if self.pods.get(&pod.key).is_some_and(|known| **known == pod) {
            return;
        }
        self.remove(&pod.key);
        let pod = Arc::new(pod);
        for ip in &pod.addresses {
            self.addresses
                .entry(*ip)
                .or_default()
                .push(Arc::clone(&pod));
        }
        self.pods.insert(pod.key.clone(), pod);
    }

    fn at(&self, ip: IpAddr) -> Vec<Arc<Pod>> {
        let all = self.addresses.get(&ip).into_iter().flatten();
        all.filter(|pod| pod.is_there()).cloned().collect()
    }

    fn remove(&mut self, key: &str) {
        let Some(gone) = self.pods.remove(key) else {
            return;
        };
        for ip in &gone.addresses {
            if let Some(theirs) = self.addresses.get_mut(ip) {
                theirs.retain(|pod| pod.key != key);
                if theirs.is_empty() {
                    self.addresses.remove(ip);
                }
            }
        }
    }
}

/// What a destination is to the pods.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// These have it: one by name, one or several by that address.
    Pods(Vec<Arc<Pod>>, Option<IpAddr>),
    /// It is the name of a pod that is not there.
    Missing(Refusal),
    /// It has nothing to do with pods, as far as is known.
    Nothing,
}

impl Pods {
    /// The pod of that key, `NAMESPACE/NAME`.
    pub(crate) fn called(&self, key: &str) -> Option<Arc<Pod>> {
        let found = self.0.read().pods.get(key).cloned();
        found.filter(|pod| pod.is_there())
    }

    /// Whose address that is.
    pub(crate) fn at(&self, ip: IpAddr) -> Vec<Arc<Pod>> {
        self.0.read().at(ip)
    }

    /// Whether all were read once.
    pub(crate) fn are_known(&self) -> bool {
        self.0.read().known
    }

    /// Whose name that is; `domain` is the cluster's.
    pub(crate) fn named(&self, name: &str, domain: &str) -> Found {
        let Some((pod, namespace)) = parts(name, domain) else {
            return Found::Nothing;
        };
        let index = self.0.read();
        if !index.known {
            return Found::Nothing;
        }
        let found = index.pods.get(&format!("{namespace}/{pod}"));
        if let Some(pod) = found.filter(|pod| pod.is_there()) {
            return Found::Pods(vec![Arc::clone(pod)], None);
        }
        let at = dashed(pod);
        let mut theirs = at.map(|ip| index.at(ip)).unwrap_or_default();
        theirs.retain(|pod| pod.key.split('/').next() == Some(namespace));
        if theirs.is_empty() {
            return Found::Missing(Refusal {
                reason: Reason::UnknownDestination,
                sentence: format!("no pod {pod} with an address in namespace {namespace}"),
            });
        }
        Found::Pods(theirs, at)
    }

    /// Takes over what a watch tells; `listed` is a list that is not complete yet.
    fn take(&self, listed: &mut Option<Index>, event: Event<Watched>) {
        match event {
            Event::Init => *listed = Some(Index::default()),
            Event::InitApply(watched) => {
                if let Some(pod) = Pod::trim(&watched) {
                    listed.get_or_insert_default().put(pod);
                }
            }
            Event::InitDone => {
                let mut all = listed.take().unwrap_or_default();
                all.known = true;
                let count = all.pods.len();
                *self.0.write() = all;
                tracing::info!(pods = count, "all pods of the cluster were read");
            }
            Event::Apply(watched) => match Pod::trim(&watched) {
                Some(pod) => self.0.write().put(pod),
                None => self.0.write().remove(&follow::key(&watched)),
            },
            Event::Delete(watched) => self.0.write().remove(&follow::key(&watched)),
        }
    }

    /// Follows them, for ever.
    pub(crate) async fn follow(self: Arc<Self>, source: Source) -> Infallible {
        let follower = Follower::new(&source, "the cluster's pods");
        let mut listed = None;
        let take = |event| self.take(&mut listed, event);
        follower
            .run(Api::<Watched>::all, follow::settings(), take)
            .await
    }
}

/// Pod and namespace of `NAME.NAMESPACE.pod[.DOMAIN]`.
fn parts<'a>(name: &'a str, domain: &str) -> Option<(&'a str, &'a str)> {
    let inner = name
        .strip_suffix(domain)
        .and_then(|name| name.strip_suffix('.'))
        .unwrap_or(name);
    let (rest, last) = inner.rsplit_once('.')?;
    if last != DOMAIN {
        return None;
    }
    // A pod's name may have dots, a namespace has none.
    rest.rsplit_once('.')
}

/// The address that cluster DNS writes with dashes.
pub(super) fn dashed(name: &str) -> Option<IpAddr> {
    let v4 = name.replace('-', ".").parse::<std::net::Ipv4Addr>();
    v4.map(IpAddr::V4)
        .or_else(|_no_v4| name.replace('-', ":").parse())
        .ok()
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    fn watched(key: &str, node: &str, ips: &[&str]) -> Watched {
        let (namespace, name) = key.split_once('/').unwrap();
        let ips: Vec<_> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        serde_json::from_value(json!({
            "metadata": {"namespace": namespace, "name": name},
            "spec": {
                "nodeName": node,
                "hostNetwork": ips.is_empty(),
                "containers": [{"name": "c", "ports": [{"containerPort": 80}]}],
            },
            "status": {"phase": "Running", "podIP": ips.first().map(|ip| ip["ip"].clone()), "podIPs": ips},
        }))
        .unwrap()
    }

    impl Pods {
        fn len(&self) -> usize {
            self.0.read().pods.len()
        }
    }

    /// Pods that are known: `NAMESPACE/NAME`, node, addresses.
    pub(in crate::cluster) fn pods(all: &[(&str, &str, &[&str])]) -> Arc<Pods> {
        let pods = Pods::default();
        let mut listed = None;
        pods.take(&mut listed, Event::Init);
        for (key, node, ips) in all {
            pods.take(&mut listed, Event::InitApply(watched(key, node, ips)));
        }
        pods.take(&mut listed, Event::InitDone);
        Arc::new(pods)
    }

    fn keys(found: Found) -> Vec<String> {
        match found {
            Found::Pods(pods, _) => pods.iter().map(|pod| pod.key.clone()).collect(),
            Found::Missing(refusal) => vec![refusal.sentence],
            Found::Nothing => Vec::new(),
        }
    }

    #[test]
    fn names_are_those_of_pods_with_or_without_the_domain() {
        let pods = pods(&[
            ("default/web-0", "edge1", &["10.244.1.5", "fd00::5"]),
            ("other/a.b", "edge2", &["10.244.2.5"]),
        ]);
        let missing = "no pod x with an address in namespace default";
        for (name, wanted) in [
            ("web-0.default.pod", vec!["default/web-0"]),
            ("web-0.default.pod.cluster.local", vec!["default/web-0"]),
            ("10-244-1-5.default.pod", vec!["default/web-0"]),
            ("fd00--5.default.pod", vec!["default/web-0"]),
            ("a.b.other.pod", vec!["other/a.b"]),
            ("x.default.pod", vec![missing]),
            ("web-0.default.svc", vec![]),
            ("web-0.default.pod.example.com", vec![]),
            ("default.pod", vec![]),
            ("pod", vec![]),
        ] {
            assert_eq!(keys(pods.named(name, "cluster.local")), wanted, "{name}");
        }
        assert_eq!(
            Pods::default().named("web-0.default.pod", "cluster.local"),
            Found::Nothing,
            "before all were read nobody says that there is none"
        );
    }

    #[test]
    fn what_ended_or_has_no_address_of_its_own_is_no_pod_to_dial() {
        let running =
            || serde_json::to_value(watched("default/a", "edge1", &["10.0.0.1"])).unwrap();
        let trim = |value| Pod::trim(&serde_json::from_value(value).unwrap());
        assert!(trim(running()).is_some());
        for (pointer, value) in [
            ("/status/phase", json!("Succeeded")),
            ("/status/phase", json!("Failed")),
            ("/spec/nodeName", json!(null)),
        ] {
            let mut pod = running();
            *pod.pointer_mut(pointer).unwrap() = value;
            assert_eq!(trim(pod), None, "{pointer}");
        }
        let mut pod = running();
        pod["spec"]["hostNetwork"] = json!(true);
        assert_eq!(trim(pod).unwrap().addresses, Vec::<IpAddr>::new());
        for (time, there) in [
            ("2020-01-01T00:00:00Z", false),
            ("2999-01-01T00:00:00Z", true),
        ] {
            let mut pod = running();
            pod["metadata"]["deletionTimestamp"] = json!(time);
            assert_eq!(trim(pod).unwrap().is_there(), there, "{time}");
        }
        for ip in ["127.0.0.1", "169.254.169.254", "224.0.0.1", "nonsense"] {
            let pod = watched("default/a", "edge1", &[ip]);
            assert_eq!(Pod::trim(&pod), None, "{ip}");
        }
    }

    #[test]
    fn ports_are_those_that_running_containers_declare_for_tcp() {
        let mut pod = serde_json::to_value(watched("d/a", "edge1", &["10.0.0.1"])).unwrap();
        let ports = |all: &[(u32, Option<&str>)]| {
            let all = all
                .iter()
                .map(|(port, protocol)| json!({"containerPort": port, "protocol": protocol}));
            all.collect::<Vec<_>>()
        };
        pod["spec"]["containers"] = json!([
            {"name": "a", "ports": ports(&[(443, Some("TCP")), (80, None), (53, Some("UDP"))])},
            {"name": "b", "ports": ports(&[(80, None), (70_000, None)])},
            {"name": "c"},
        ]);
        pod["spec"]["initContainers"] = json!([
            {"name": "sidecar", "restartPolicy": "Always", "ports": ports(&[(15_000, None)])},
            {"name": "init", "ports": ports(&[(9, None)])},
        ]);
        let pod = Pod::trim(&serde_json::from_value(pod).unwrap()).unwrap();
        assert_eq!(pod.ports, [80, 443, 15_000]);
        let told = |declared| PodPort {
            pod: "d/a".into(),
            node: "edge1".into(),
            declared,
        };
        assert_eq!((pod.port(80), pod.port(53)), (told(true), told(false)));
    }

    #[test]
    fn addresses_follow_their_pods_and_a_list_counts_once_it_is_complete() {
        let pods = pods(&[
            ("d/a", "edge1", &["10.0.0.1"]),
            ("d/b", "edge2", &["10.0.0.1"]),
        ]);
        let at = |ip: &str| {
            let mut keys: Vec<_> = pods
                .at(ip.parse().unwrap())
                .iter()
                .map(|p| p.key.clone())
                .collect();
            keys.sort();
            keys
        };
        let mut listed = None;
        assert_eq!(at("10.0.0.1"), ["d/a", "d/b"]);
        pods.take(
            &mut listed,
            Event::Apply(watched("d/a", "edge1", &["10.0.0.2"])),
        );
        assert_eq!(
            (at("10.0.0.1"), at("10.0.0.2")),
            (vec!["d/b".into()], vec!["d/a".into()])
        );
        pods.take(&mut listed, Event::Init);
        pods.take(
            &mut listed,
            Event::InitApply(watched("d/c", "edge1", &["10.0.0.3"])),
        );
        assert_eq!(at("10.0.0.1"), ["d/b"]);
        pods.take(&mut listed, Event::InitDone);
        assert_eq!(
            (at("10.0.0.1"), at("10.0.0.2"), at("10.0.0.3")),
            (vec![], vec![], vec!["d/c".into()])
        );
        // One that has ended while it is watched, and one that is deleted.
        let mut ended = watched("d/c", "edge1", &["10.0.0.3"]);
        ended.status.as_mut().unwrap().phase = Some("Succeeded".into());
        pods.take(&mut listed, Event::Apply(ended));
        assert_eq!(pods.len(), 0);
        pods.take(
            &mut listed,
            Event::Apply(watched("d/c", "edge1", &["10.0.0.3"])),
        );
        pods.take(
            &mut listed,
            Event::Delete(watched("d/c", "edge1", &["10.0.0.3"])),
        );
        assert_eq!((pods.len(), at("10.0.0.3")), (0, Vec::<String>::new()));
    }
}
