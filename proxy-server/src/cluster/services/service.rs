//! What is kept of a Service: its TCP ports, and the addresses that are its own.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{LoadBalancerIngress, Service as Watched, ServicePort};
use proto::{Host, is_loopback, is_never_dialled};

use crate::cluster::follow;

/// Ports and addresses that are kept of a Service, more than anybody has.
const MOST: usize = 1_000;
/// How Kubernetes says that a Service has no address of its own.
const HEADLESS: &str = "None";

/// What is kept of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Service {
    /// `NAMESPACE/NAME`.
    pub(crate) key: String,
    pub(crate) kind: Kind,
    /// Those of TCP.
    pub(crate) ports: Vec<Port>,
    /// It has no port at all, of no protocol.
    pub(crate) is_portless: bool,
    /// What its load balancer has, if it leads to this Service alone.
    pub(crate) balanced: Vec<IpAddr>,
    /// `externalTrafficPolicy: Local`: a NodePort leads to endpoints of its node.
    pub(crate) stays_local: bool,
}

/// How a Service leads to what is behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// By addresses of its own.
    Cluster(Vec<IpAddr>),
    /// By those of its endpoints.
    Headless,
    /// It is another name for that.
    External(String),
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Port {
    /// By which slices call what is behind it; empty for the only one.
    pub(crate) name: Box<str>,
    pub(crate) port: u16,
    /// On every node.
    pub(crate) node_port: Option<u16>,
}

impl Service {
    /// What is kept; nothing of it is believed to be well formed.
    pub(super) fn trim(watched: &Watched) -> Self {
        let spec = watched.spec.clone().unwrap_or_default();
        let ips = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
        let kind = if spec.type_.as_deref() == Some("ExternalName") {
            Kind::External(spec.external_name.unwrap_or_default())
        } else if spec.cluster_ip.as_deref() == Some(HEADLESS) {
            Kind::Headless
        } else {
            Kind::Cluster(addresses(ips.map(String::as_str)))
        };
        // Who asks is not known by its address here, so nobody would be kept out.
        let is_for_some = spec
            .load_balancer_source_ranges
            .is_some_and(|ranges| !ranges.is_empty());
        let status = watched.status.as_ref();
        let ingress = status.and_then(|status| status.load_balancer.as_ref()?.ingress.as_ref());
        // `Proxy`: the balancer does more than to lead there.
        let leads = |ingress: &&LoadBalancerIngress| {
            !is_for_some && ingress.ip_mode.as_deref() != Some("Proxy")
        };
        let ingress = ingress.into_iter().flatten().filter(leads);
        let ports = spec.ports.unwrap_or_default();
        Self {
            key: follow::key(watched),
            kind,
            is_portless: ports.is_empty(),
            ports: ports.iter().filter_map(Port::trim).take(MOST).collect(),
            balanced: addresses(ingress.filter_map(|ingress| ingress.ip.as_deref())),
            stays_local: spec.external_traffic_policy.as_deref() == Some("Local"),
        }
    }

    /// Its own addresses.
    pub(super) fn addresses(&self) -> &[IpAddr] {
        match &self.kind {
            Kind::Cluster(addresses) => addresses,
            Kind::Headless | Kind::External(_) => &[],
        }
    }

    pub(crate) const fn is_headless(&self) -> bool {
        matches!(self.kind, Kind::Headless)
    }

    /// Its ports in words.
    pub(crate) fn listed(&self) -> String {
        let mut ports: Vec<_> = self.ports.iter().map(|port| port.port).collect();
        ports.sort_unstable();
        ports.dedup();
        let ports: Vec<_> = ports.iter().take(20).map(ToString::to_string).collect();
        if ports.is_empty() {
            return "none".to_owned();
        }
        ports.join(", ")
    }
}

impl Port {
    fn trim(watched: &ServicePort) -> Option<Self> {
        let is_tcp = watched.protocol.as_deref().is_none_or(|it| it == "TCP");
        Some(Self {
            name: watched.name.clone().unwrap_or_default().into(),
            port: port(Some(watched.port)).filter(|_| is_tcp)?,
            node_port: port(watched.node_port),
        })
    }
}

/// A port that can be dialled.
pub(super) fn port(number: Option<i32>) -> Option<u16> {
    u16::try_from(number?).ok().filter(|port| *port != 0)
}

/// Addresses that may be dialled, each once.
fn addresses<'a>(all: impl Iterator<Item = &'a str>) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for ip in all.take(MOST).filter_map(address) {
        if !found.contains(&ip) {
            found.push(ip);
        }
    }
    found
}

/// An address that may be dialled.
pub(super) fn address(text: &str) -> Option<IpAddr> {
    match text.parse::<Host>() {
        Ok(Host::Ip(ip)) if !is_loopback(ip) && !is_never_dialled(ip) => Some(ip),
        Ok(_) | Err(_) => None,
    }
}
