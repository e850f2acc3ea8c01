//! Who else has an address.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{ClusterTable, Node};
use crate::cluster::services::Service;
use crate::path::policy::Claimant;

impl ClusterTable {
    /// Every node and pod that has that address, or may have it, but the node and the pod that are meant. An address that
    /// nobody has is that of all those in whose networks it lies. Of Services those that have it at that port, if it is
    /// their load balancer's: some of these have the addresses of nodes.
    pub(crate) fn others_at(
        &self,
        (ip, port): (IpAddr, u16),
        node: &str,
        pod: Option<&str>,
    ) -> Vec<Claimant> {
        let claim = |name: String, of: Option<&Node>| Claimant {
            name,
            pool: of.and_then(|node| node.pool.clone()),
            leads_back: false,
        };
        let nodes = self.addresses.get(&ip).into_iter().flatten();
        let reach = self.reach.as_ref();
        let pods = reach.map(|reach| reach.pods.at(ip)).unwrap_or_default();
        let is_somebodys = !pods.is_empty() || self.addresses.contains_key(&ip);
        let mut others: Vec<_> = nodes
            .filter(|other| pod.is_some() || other.name != node)
            .map(|other| claim(format!("node {}", other.name), Some(other)))
            .collect();
        for other in pods.iter().filter(|other| Some(other.key.as_str()) != pod) {
            let name = format!("pod {} on {}", other.key, other.node);
            others.push(claim(name, self.nodes.get(&other.node).map(AsRef::as_ref)));
        }
        if !is_somebodys {
            let nets = self.lengths.iter();
            let nets = nets.filter_map(|length| Some(IpNet::new(ip, *length).ok()?.trunc()));
            for other in nets.filter_map(|net| self.cidrs.get(&net)).flatten() {
                if other.name != node && other.agent.as_str() != node {
                    let name = format!("pods of node {}", other.name);
                    others.push(claim(name, Some(other)));
                }
            }
        }
        if let Some(services) = reach.and_then(|reach| reach.services.as_ref()) {
            let has = |service: &Arc<Service>| service.ports.iter().any(|it| it.port == port);
            let balanced = services.balanced(ip).into_iter().filter(has);
            let all = services.at(ip).into_iter().chain(balanced);
            others.extend(all.map(|service| Claimant {
                leads_back: true,
                ..claim(format!("service {}", service.key), None)
            }));
        }
        others
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::reaching;

    #[test]
    fn whoever_else_has_an_address_is_named() {
        let table = reaching();
        let others = |ip: &str, node: &str, pod| {
            let others = table.others_at((ip.parse().unwrap(), 80), node, pod);
            let mut names: Vec<_> = others.into_iter().map(|other| other.name).collect();
            names.sort();
            names.join(", ")
        };
        for (ip, node, pod, wanted) in [
            ("192.168.1.10", "edge1", None, "node edge2"),
            ("10.0.0.1", "edge1", None, "node accomplice"),
            ("10.0.0.2", "edge1", None, "node cloud1, node thief"),
            ("10.244.1.5", "edge1", Some("default/web"), ""),
            (
                "10.244.1.6",
                "edge1",
                Some("default/twin"),
                "pod other/twin on edge2",
            ),
            (
                "10.244.1.7",
                "edge1",
                Some("default/half"),
                "pod other/half on unknown",
            ),
            // A pod at the address of a node, its own among them.
            ("10.8.0.1", "joined", None, "pod default/posing on edge1"),
            ("10.8.0.1", "edge1", Some("default/posing"), "node joined"),
            // Nobody's: in one network, in two of which the second is too wide to count elsewhere.
            ("10.244.1.77", "edge1", None, ""),
            ("10.245.7.1", "edge2", None, "pods of node thief"),
            ("10.246.0.9", "press", None, "pods of node lathe"),
            ("203.0.113.1", "edge1", None, ""),
        ] {
            assert_eq!(others(ip, node, pod), wanted, "{ip} {node} {pod:?}");
        }
    }
}
