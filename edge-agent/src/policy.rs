//! Which destinations may be dialled. Pure: a policy, the node's own addresses and an address in, a decision out.
//!
//! Invariants: what is decided about is the address that is then dialled, never a name, so that a resolver can't turn
//! a permitted name into another address; of pods, which the agent can't see, the server's word is taken as far as
//! [`Pods`] says, and no further; link-local addresses and those of cloud metadata services are refused
//! whatever is listed; an IPv4 address wrapped into IPv6 is judged as the IPv4 address.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;

use ipnet::IpNet;
use proto::wire::PodPort;
use proto::{Host, Reason, is_never_dialled};
use serde::Deserialize;

use crate::Config;

/// kubelet, its read-only port, node exporter: at the node itself these need no rule.
const NODE_PORTS: [u16; 3] = [10250, 10255, 9100];

/// Destinations that are allowed beside the default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The network.
    pub cidr: IpNet,
    /// Its ports.
    pub ports: Vec<RangeInclusive<u16>>,
}

/// Pods that are dialled beside what rules allow, at addresses that are not the node's own.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pods {
    /// At which ports.
    pub ports: PodPorts,
    /// On which nodes, beside this one.
    pub nodes: Vec<String>,
}

/// Ports of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodPorts {
    /// Those that the pod declares, or a Service for it.
    #[default]
    Declared,
    /// All.
    Any,
    /// None: rules alone decide, and nothing that a server says widens them.
    None,
}

/// Why an address is not dialled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Never, whatever is listed.
    #[error("{0} is never dialled: link-local, metadata, multicast or no address of a host")]
    Forbidden(SocketAddr),
    /// Not on the list.
    #[error("{0} is not in the agent's allow-list")]
    Unlisted(SocketAddr),
    /// Nor does the pod that has it declare the port.
    #[error("{target} is not in the agent's allow-list, and pod {pod} declares no such port")]
    Undeclared {
        /// What is not dialled.
        target: SocketAddr,
        /// `NAMESPACE/NAME`.
        pod: String,
    },
    /// Nor is the pod that has it on a node whose pods are dialled.
    #[error(
        "{target} is not in the agent's allow-list, and pod {pod} is on {node}, which `pods.nodes` does not have"
    )]
    Foreign {
        /// What is not dialled.
        target: SocketAddr,
        /// `NAMESPACE/NAME`.
        pod: String,
        /// Its node.
        node: String,
    },
}

impl Denied {
    /// The reason to report.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Forbidden(_) => Reason::ForbiddenDestination,
            Self::Unlisted(_) | Self::Undeclared { .. } | Self::Foreign { .. } => {
                Reason::DestinationDenied
            }
        }
    }
}

/// What an agent may dial.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The node's name.
    pub node: String,
    /// Ports of the node that are dialled at 127.0.0.1 whatever own address was asked for.
    pub localhost_ports: BTreeSet<u16>,
    /// Own addresses beside those of the interfaces.
    pub node_addresses: Vec<IpAddr>,
    /// What is allowed beside the default.
    pub allow: Vec<Rule>,
    /// Pods that are dialled without a rule.
    pub pods: Pods,
}

impl From<&Config> for Policy {
    fn from(config: &Config) -> Self {
        Self {
            node: config.name.to_string(),
            localhost_ports: config.localhost_ports.iter().copied().collect(),
            node_addresses: config.node_addresses.clone(),
            allow: config.allow.clone(),
            pods: config.pods.clone(),
        }
    }
}

impl Policy {
    /// Whether the host is this node, by name.
    #[must_use]
    pub fn is_node(&self, host: &Host) -> bool {
        matches!(host, Host::Name(name) if *name == self.node)
    }

    /// Where this node is to be dialled on `port`: 127.0.0.1 first, then its other addresses in the order given,
    /// as far as they may be dialled.
    ///
    /// # Errors
    /// When none may be.
    pub fn node_targets(&self, own: &[IpAddr], port: u16) -> Result<Vec<SocketAddr>, Denied> {
        let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let others = if self.localhost_ports.contains(&port) {
            &[]
        } else {
            own
        };
        let all = std::iter::once(&localhost).chain(others);
        let mut first = None;
        let mut targets = Vec::new();
        for ip in all {
            match self.target(own, *ip, port, None) {
                Ok(target) if !targets.contains(&target) => targets.push(target),
                Ok(_again) => {}
                Err(denied) => first = first.or(Some(denied)),
            }
        }
        match first {
            Some(denied) if targets.is_empty() => Err(denied),
            Some(_) | None => Ok(targets),
        }
    }

    /// What is dialled when `ip` is asked for; `pod` has it, in the server's words.
    ///
    /// # Errors
    /// When it may not be dialled.
    pub fn target(
        &self,
        own: &[IpAddr],
        ip: IpAddr,
        port: u16,
        pod: Option<&PodPort>,
    ) -> Result<SocketAddr, Denied> {
        let asked = ip.to_canonical();
        if is_never_dialled(asked) {
            return Err(Denied::Forbidden(SocketAddr::new(asked, port)));
        }
        let is_node = asked.is_loopback() || own.contains(&asked);
        let ip = if is_node && self.localhost_ports.contains(&port) {
            Ipv4Addr::LOCALHOST.into()
        } else {
            asked
        };
        let target = SocketAddr::new(ip, port);
        let default = is_node && NODE_PORTS.contains(&port);
        let listed = || self.allow.iter().any(|rule| rule.permits(ip, port));
        if default || listed() {
            return Ok(target);
        }
        match (pod, self.pods.ports) {
            // What listens on the node itself is nobody's pod.
            _ if is_node => Err(Denied::Unlisted(target)),
            (None, _) | (Some(_), PodPorts::None) => Err(Denied::Unlisted(target)),
            (Some(PodPort { pod, node, .. }), PodPorts::Declared | PodPorts::Any)
                if *node != self.node && !self.pods.nodes.contains(node) =>
            {
                let (pod, node) = (pod.clone(), node.clone());
                Err(Denied::Foreign { target, pod, node })
            }
            (Some(pod), PodPorts::Declared) if !pod.declared => {
                let pod = pod.pod.clone();
                Err(Denied::Undeclared { target, pod })
            }
            (Some(_), PodPorts::Declared | PodPorts::Any) => Ok(target),
        }
    }
}

impl Rule {
    fn permits(&self, ip: IpAddr, port: u16) -> bool {
        self.cidr.contains(&ip) && self.ports.iter().any(|range| range.contains(&port))
    }
}

#[cfg(test)]
mod tests;
