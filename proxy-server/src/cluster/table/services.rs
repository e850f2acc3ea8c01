//! Where a Service leads. What is behind it is believed as far as pods and nodes bear it out.
//!
//! | Service | route |
//! | --- | --- |
//! | none of its endpoints is at the edge, as far as is known | as without Services: what was asked for is dialled; where nothing is dialled, refused |
//! | it has no such TCP port | refused, with those that it has |
//! | endpoints that are ready | any of those at the edge whose agent can be reached, and of those elsewhere if they are dialled; else one at the edge |
//! | one is at the edge, and none is ready | refused |
//! | `ExternalName` | that name is routed in its place, once ([`RouteTable`](crate::route::RouteTable)) |
//!
//! Rules are about the node and the port that are dialled in the end, not about the Service.

use std::net::IpAddr;
use std::sync::Arc;

use proto::{AgentName, Destination, Host, Reason};

use super::endpoints::Door;
use super::{Ask, ClusterTable, Reach};
use crate::cluster::nodes::{KUBELET_PORT, Node};
use crate::cluster::services::{Kind, Named, Service, Services};
use crate::error::Refusal;
use crate::route::Route;

/// Ports of nodes that are no NodePorts, whatever a Service says: kubelets' and exporters'.
const OF_NODES: [u16; 3] = [KUBELET_PORT, 10_255, 9_100];

impl ClusterTable {
    /// Routes by a Service's name; `None` if it is none's.
    pub(super) fn by_service_name(
        &self,
        name: &str,
        asked: &Destination,
        ask: Ask<'_>,
    ) -> Option<Result<Route, Refusal>> {
        let Reach {
            pods,
            services,
            domain,
            ..
        } = self.reach.as_ref()?;
        let mut named = services.as_ref()?.named(name, domain);
        if matches!(named, Named::Service(..)) && !pods.are_known() {
            // What is behind it is not known yet.
            named = Named::Unread;
        }
        match named {
            Named::Service(service, None) if matches!(service.kind, Kind::External(_)) => {
                let sentence = format!(
                    "service {} is another name, and was led to by one",
                    service.key
                );
                Some(Err(unknown(sentence)))
            }
            Named::Service(service, Some(_)) if matches!(service.kind, Kind::External(_)) => None,
            Named::Service(service, host) => {
                let door = host.as_deref().map_or(Door::Service, Door::Endpoint);
                Some(self.of_service(&service, door, asked, ask))
            }
            // Else it would lead to an agent that is called like a Service.
            Named::Unread => {
                let agent = name.parse::<AgentName>().ok()?;
                let sentence = || format!("name {name}: the cluster's services are not read yet");
                ask.knows(&agent).then(|| Err(unknown(sentence())))
            }
            Named::Nothing => None,
        }
    }

    /// What a Service of that name is another name for.
    pub(crate) fn external_name(&self, host: &Host) -> Option<Result<Host, Refusal>> {
        let Host::Name(name) = host else { return None };
        if self.nodes.contains_key(name) || self.aliases.contains_key(name) {
            return None;
        }
        let Reach {
            services, domain, ..
        } = self.reach.as_ref()?;
        let Named::Service(service, None) = services.as_ref()?.named(name, domain) else {
            return None;
        };
        let Kind::External(other) = &service.kind else {
            return None;
        };
        match other.parse() {
            Ok(Host::Name(other)) => Some(Ok(Host::Name(other))),
            // No DNS server would make an address of it.
            Ok(Host::Ip(_)) | Err(_) => {
                let sentence = format!("service {}: its externalName is no name", service.key);
                Some(Err(unknown(sentence)))
            }
        }
    }

    /// Routes to a Service by an address of its own, before whatever kubelets claim.
    pub(super) fn by_cluster_ip(
        &self,
        ip: IpAddr,
        asked: &Destination,
        ask: Ask<'_>,
    ) -> Option<Result<Route, Refusal>> {
        let found = self.services()?.at(ip);
        self.one_service(&found, asked, ask)
    }

    /// Routes to a Service by an address of its load balancer.
    pub(super) fn by_balancer(
        &self,
        ip: IpAddr,
        asked: &Destination,
        ask: Ask<'_>,
    ) -> Option<Result<Route, Refusal>> {
        let found = self.services()?.balanced(ip);
        let has = |service: &&Arc<Service>| service.ports.iter().any(|it| it.port == asked.port);
        let having: Vec<_> = found.iter().filter(has).cloned().collect();
        // A balancer may have more ports than those of a Service.
        self.one_service(&having, asked, ask)
    }

    /// Routes to a Service by a port of that node.
    pub(super) fn by_node_port(
        &self,
        node: &Node,
        asked: &Destination,
        ask: Ask<'_>,
    ) -> Option<Result<Route, Refusal>> {
        if OF_NODES.contains(&asked.port) || asked.port == node.kubelet_port {
            return None;
        }
        // kube-apiserver gives a port to one Service alone.
        let found = self.services()?.on_nodes(asked.port);
        let [service] = &found[..] else { return None };
        match self.of_service(service, Door::Node(node), asked, ask) {
            Ok(Route::Elsewhere(to)) if to == *asked => None,
            route => Some(route),
        }
    }

    /// The Services, once it is known which pods there are behind them.
    pub(super) fn services(&self) -> Option<&Services> {
        let reach = self.reach.as_ref()?;
        let services = reach.services.as_deref()?;
        reach.pods.are_known().then_some(services)
    }

    /// Routes to the one Service that has an address.
    fn one_service(
        &self,
        found: &[Arc<Service>],
        asked: &Destination,
        ask: Ask<'_>,
    ) -> Option<Result<Route, Refusal>> {
        match found {
            [] => None,
            [service] => Some(self.of_service(service, Door::Service, asked, ask)),
            several => Some(Err(Refusal {
                reason: Reason::AmbiguousDestination,
                sentence: format!(
                    "address {} is that of services {}: ask by name, as NAME.NAMESPACE.svc",
                    asked.host,
                    super::listed(several.iter().map(|service| service.key.clone()).collect())
                ),
            })),
        }
    }

    fn of_service(
        &self,
        service: &Service,
        door: Door<'_>,
        asked: &Destination,
        ask: Ask<'_>,
    ) -> Result<Route, Refusal> {
        let survey = self.survey(service, door, asked, ask);
        if !survey.is_at_edge {
            // Another frontend might dial it, and a port of a node may be the node's own.
            if ask.dials() || matches!(door, Door::Node(_)) {
                return Ok(Route::Elsewhere(asked.clone()));
            }
            let sentence = format!("service {} has no endpoint at the edge", service.key);
            return Err(unknown(sentence));
        }
        if let Door::Service | Door::Endpoint(_) = door
            && !survey.has_port
        {
            return Err(unknown(format!(
                "service {} has no TCP port {} (ports: {})",
                service.key,
                asked.port,
                service.listed()
            )));
        }
        if let Door::Endpoint(host) = door
            && !survey.is_called
        {
            let sentence = format!("service {} has no endpoint {host}", service.key);
            return Err(unknown(sentence));
        }
        let is_elsewhere = survey.is_ready_elsewhere();
        survey.choose(ask).ok_or_else(|| {
            let on = match door {
                Door::Endpoint(host) => format!(" {host}"),
                Door::Node(node) if service.stays_local => format!(" on node {}", node.name),
                Door::Service | Door::Node(_) if is_elsewhere => " at the edge".to_owned(),
                Door::Service | Door::Node(_) => String::new(),
            };
            Refusal {
                reason: Reason::DialUnreachable,
                sentence: format!("service {} has no ready endpoint{on}", service.key),
            }
        })
    }
}

fn unknown(sentence: String) -> Refusal {
    Refusal {
        reason: Reason::UnknownDestination,
        sentence,
    }
}

#[cfg(test)]
mod tests;
