//! Which destinations may be dialled. Pure: a policy, the node's own addresses and an address in, a decision out.
//!
//! Invariants: what is decided about is the address that is then dialled, never a name, so that a resolver can't turn
//! a permitted name into another address; link-local addresses and those of cloud metadata services are refused
//! whatever is listed; an IPv4 address wrapped into IPv6 is judged as the IPv4 address.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

use ipnet::IpNet;
use proto::{Host, Reason};

use crate::Config;

/// kubelet, its read-only port, node exporter: at the node itself these need no rule.
const NODE_PORTS: [u16; 3] = [10250, 10255, 9100];

/// Addresses of metadata services that are not link-local: credentials of the machine are behind them.
const METADATA_V4: [Ipv4Addr; 3] = [
    Ipv4Addr::new(100, 100, 100, 200), // Alibaba Cloud
    Ipv4Addr::new(168, 63, 129, 16),   // Azure
    Ipv4Addr::new(192, 0, 0, 192),     // Oracle Cloud
];
const METADATA_V6: [Ipv6Addr; 3] = [
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), // AWS
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23),  // AWS, pods
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),  // Google Cloud
];

/// Destinations that are allowed beside the default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The network.
    pub cidr: IpNet,
    /// Its ports.
    pub ports: Vec<RangeInclusive<u16>>,
}

/// Why an address is not dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Never, whatever is listed.
    #[error("{0} is never dialled: link-local, metadata, multicast or no address of a host")]
    Forbidden(SocketAddr),
    /// Not on the list.
    #[error("{0} is not in the agent's allow-list")]
    Unlisted(SocketAddr),
}

impl Denied {
    /// The reason to report.
    #[must_use]
    pub const fn reason(self) -> Reason {
        match self {
            Self::Forbidden(_) => Reason::ForbiddenDestination,
            Self::Unlisted(_) => Reason::DestinationDenied,
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
}

impl From<&Config> for Policy {
    fn from(config: &Config) -> Self {
        Self {
            node: config.name.to_string(),
            localhost_ports: config.localhost_ports.iter().copied().collect(),
            node_addresses: config.node_addresses.clone(),
            allow: config.allow.clone(),
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
            match self.target(own, *ip, port) {
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

    /// What is dialled when `ip` is asked for.
    ///
    /// # Errors
    /// When it may not be dialled.
    pub fn target(&self, own: &[IpAddr], ip: IpAddr, port: u16) -> Result<SocketAddr, Denied> {
        let asked = ip.to_canonical();
        if is_forbidden(asked) {
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
            Ok(target)
        } else {
            Err(Denied::Unlisted(target))
        }
    }
}

impl Rule {
    fn permits(&self, ip: IpAddr, port: u16) -> bool {
        self.cidr.contains(&ip) && self.ports.iter().any(|range| range.contains(&port))
    }
}

/// Whether the address is refused whatever is listed.
fn is_forbidden(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => is_forbidden_v4(ip),
        IpAddr::V6(ip) => {
            ip.is_unspecified()
                || ip.is_multicast()
                || ip.is_unicast_link_local()
                || METADATA_V6.contains(&ip)
                || embedded(ip).is_some_and(is_forbidden_v4)
        }
    }
}

fn is_forbidden_v4(ip: Ipv4Addr) -> bool {
    // RFC 1122 section 3.2.1.3: 0/8 is "this network", no destination. Linux dials 0.0.0.0 as loopback.
    ip.octets().first() == Some(&0)
        || ip.is_multicast()
        || ip.is_broadcast()
        || ip.is_link_local()
        || METADATA_V4.contains(&ip)
}

/// The IPv4 address that a translator or tunnel would take out of that IPv6 address.
fn embedded(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let last = |high: u16, low: u16| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low));
    match ip.segments() {
        [0, 0, 0, 0, 0, 0, 0, 1] => None,
        // RFC 4291 section 2.5.5.1, IPv4-compatible.
        [0, 0, 0, 0, 0, 0, high, low] => Some(last(high, low)),
        // RFC 6052 section 2.1 and RFC 8215, NAT64.
        [0x64, 0xff9b, 0 | 1, .., high, low] => Some(last(high, low)),
        // RFC 3056 section 2, 6to4.
        [0x2002, high, low, ..] => Some(last(high, low)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
