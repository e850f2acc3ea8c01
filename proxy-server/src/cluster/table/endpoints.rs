//! What is behind a Service, and where that is. A slice is believed as far as pods and nodes bear it out.
//!
//! | endpoint | where |
//! | --- | --- |
//! | said to be a pod, which is known and has that address | its node |
//! | said to be a pod, which is not known, or has another address | nowhere |
//! | only an address: of the node that it is said to be on, and of no other node and no pod | that node |
//! | only an address: in the configured networks of a pool's pods | its agent |
//! | only an address | elsewhere. What a kubelet claims alone draws no Service to it |

use std::net::IpAddr;
use std::sync::Arc;

use proto::wire::PodPort;
use proto::{AgentName, Destination, Host};

use super::{Ask, ClusterTable, towards};
use crate::cluster::nodes::Node;
use crate::cluster::pods::{Pod, dashed};
use crate::cluster::services::{Endpoint, Service, Slice};
use crate::route::{Presence, Route};

/// Endpoints of a Service that are looked at for a request, more than anybody has.
const MOST: usize = 10_000;

/// By what a Service was asked for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Door<'a> {
    /// Its name, or an address of its own.
    Service,
    /// The name of one of its endpoints.
    Endpoint(&'a str),
    /// A port of that node.
    Node(&'a Node),
}

/// What there is behind a Service.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Ready ones at the edge, and others.
    near: Vec<Candidate>,
    far: Vec<Candidate>,
    /// One of them, ready or not, is at the edge.
    pub(super) is_at_edge: bool,
    /// The Service has the port that was asked for.
    pub(super) has_port: bool,
    /// The one that was asked for is there, ready or not.
    pub(super) is_called: bool,
}

/// A ready endpoint that can be dialled.
#[derive(Debug)]
struct Candidate {
    address: IpAddr,
    port: Port,
    way: Way,
}

#[derive(Debug, Clone, Copy)]
struct Port {
    number: u16,
    /// By the Service.
    is_declared: bool,
}

/// How an endpoint is reached.
#[derive(Debug)]
enum Way {
    Pod(Arc<Pod>, Arc<Node>),
    Address(Route),
}

/// Where an endpoint is.
#[derive(Debug)]
enum Place {
    At(Way),
    /// What is said of it is not so; it would be at the edge.
    Nowhere(bool),
}

impl Door<'_> {
    /// What is dialled of that slice's endpoints.
    fn port(self, service: &Service, slice: &Slice, asked: u16) -> Option<Port> {
        let declared = |number| Port {
            number,
            is_declared: true,
        };
        let by_address = self.is_by_address(service);
        if by_address && slice.ports.iter().any(|(_, port)| *port == asked) {
            return Some(declared(asked));
        }
        if by_address && slice.ports.is_empty() && service.is_portless {
            return Some(Port {
                number: asked,
                is_declared: false,
            });
        }
        let mut ports = service.ports.iter();
        let name = &ports
            .find(|port| match self {
                Door::Service | Door::Endpoint(_) => port.port == asked,
                Door::Node(_) => port.node_port == Some(asked),
            })?
            .name;
        let mut ports = slice.ports.iter();
        ports
            .find(|(it, _)| it == name)
            .map(|(_, port)| declared(*port))
    }

    /// Whether DNS would have given the endpoint's own address, so that its own ports are asked for.
    fn is_by_address(self, service: &Service) -> bool {
        match self {
            Door::Service => service.is_headless(),
            Door::Endpoint(_) => true,
            Door::Node(_) => false,
        }
    }

    /// Whether that endpoint is meant.
    fn calls(self, endpoint: &Endpoint) -> bool {
        let Door::Endpoint(host) = self else {
            return true;
        };
        endpoint.hostname.as_deref() == Some(host) || dashed(host) == Some(endpoint.address)
    }

    /// Whether it leads there.
    fn opens_to(self, service: &Service, endpoint: &Endpoint, place: &Place) -> bool {
        match self {
            Door::Node(node) if service.stays_local => {
                place.node().or(endpoint.node.as_deref()) == Some(&node.name)
            }
            Door::Service | Door::Endpoint(_) | Door::Node(_) => true,
        }
    }
}

impl ClusterTable {
    /// Looks at everything that is behind a Service.
    pub(super) fn survey(
        &self,
        service: &Service,
        door: Door<'_>,
        asked: &Destination,
        ask: Ask<'_>,
    ) -> Survey {
        let slices = self.services().map(|all| all.behind(service));
        let slices = slices.unwrap_or_default();
        let mut survey = Survey {
            has_port: service.ports.iter().any(|port| port.port == asked.port),
            ..Survey::default()
        };
        let endpoints = slices.iter().flat_map(|slice| {
            let port = door.port(service, slice, asked.port);
            let each = slice.endpoints.iter();
            each.map(move |endpoint| (endpoint, port))
        });
        for (endpoint, port) in endpoints.take(MOST) {
            let number = port.map_or(asked.port, |port| port.number);
            let place = self.place(endpoint, number, ask);
            let is_near = place.is_edge(ask);
            let is_meant = door.calls(endpoint) && door.opens_to(service, endpoint, &place);
            survey.is_at_edge |= is_near;
            survey.is_called |= door.calls(endpoint);
            survey.has_port |= port.is_some();
            let (true, true, Some(port)) = (is_meant, endpoint.is_ready, port) else {
                continue;
            };
            let Place::At(way) = place else { continue };
            let address = endpoint.address;
            let of = if is_near {
                &mut survey.near
            } else {
                &mut survey.far
            };
            of.push(Candidate { address, port, way });
        }
        survey
    }

    fn place(&self, endpoint: &Endpoint, port: u16, ask: Ask<'_>) -> Place {
        let Endpoint { address, .. } = endpoint;
        let Some(key) = &endpoint.pod else {
            let to = Destination {
                host: Host::Ip(*address),
                port,
            };
            return Place::At(Way::Address(self.bare(endpoint, to, ask)));
        };
        let pod = self.reach.as_ref().and_then(|reach| reach.pods.called(key));
        let on = |name: &str| self.nodes.get(name);
        if let Some(pod) = &pod
            && let Some(node) = on(&pod.node)
        {
            // One on its node's network has the node's addresses and none of its own.
            let on_host = pod.addresses.is_empty() && node.addresses.contains(address);
            if on_host || pod.addresses.contains(address) {
                return Place::At(Way::Pod(Arc::clone(pod), Arc::clone(node)));
            }
        }
        let said = [endpoint.node.as_deref(), pod.as_ref().map(|pod| &*pod.node)];
        let mut said = said.into_iter().flatten().filter_map(on);
        Place::Nowhere(said.any(|node| node.is_edge(|agent| ask.knows(agent))))
    }

    /// The way to an endpoint that is only an address.
    fn bare(&self, endpoint: &Endpoint, to: Destination, ask: Ask<'_>) -> Route {
        let Endpoint { address, node, .. } = endpoint;
        let Some(reach) = &self.reach else {
            return Route::Elsewhere(to);
        };
        if !reach.pods.at(*address).is_empty() {
            return Route::Elsewhere(to);
        }
        let claims = self.addresses.get(address).map_or(&[][..], Vec::as_slice);
        match claims {
            [claimant] if node.as_deref() == Some(&claimant.name) => {
                towards(claimant, &to.clone(), to, None, |agent| ask.knows(agent))
            }
            [] => match reach.pools.by_address(*address, &to) {
                Some(Ok(route)) => route,
                Some(Err(_)) | None => Route::Elsewhere(to),
            },
            _ => Route::Elsewhere(to),
        }
    }
}

impl Way {
    /// The node at the edge that it leads to.
    fn edge(&self, ask: Ask<'_>) -> Option<(&AgentName, &str)> {
        match self {
            Self::Pod(_, node) => node
                .is_edge(|agent| ask.knows(agent))
                .then_some((&node.agent, &node.name)),
            Self::Address(Route::Edge { agent, node, .. }) => Some((agent, node)),
            Self::Address(Route::Elsewhere(_)) => None,
        }
    }
}

impl Place {
    fn is_edge(&self, ask: Ask<'_>) -> bool {
        match self {
            Self::At(way) => way.edge(ask).is_some(),
            Self::Nowhere(is_edge) => *is_edge,
        }
    }

    /// The node that it is on, for all that is known.
    fn node(&self) -> Option<&str> {
        match self {
            Self::At(Way::Pod(_, node)) => Some(&node.name),
            Self::At(Way::Address(Route::Edge { node, .. })) => Some(node),
            Self::At(Way::Address(Route::Elsewhere(_))) | Self::Nowhere(_) => None,
        }
    }
}

impl Survey {
    /// Whether any that is ready is not at the edge.
    pub(super) const fn is_ready_elsewhere(&self) -> bool {
        !self.far.is_empty()
    }

    /// Any of those that can be reached: at the edge with an agent that is there, and elsewhere if that is dialled at all.
    /// Else one whose agent is not there, so that who asked is told why not. `None` if none is ready.
    pub(super) fn choose(self, ask: Ask<'_>) -> Option<Route> {
        let is_present = |candidate: &Candidate| {
            let edge = candidate.way.edge(ask);
            edge.is_some_and(|(agent, _)| ask.presence(agent) == Presence::Present)
        };
        let (mut all, absent): (Vec<_>, Vec<_>) = self.near.into_iter().partition(is_present);
        if ask.dials() {
            all.extend(self.far);
        }
        if all.is_empty() {
            all = absent;
        }
        if all.is_empty() {
            return None;
        }
        let chosen = all.swap_remove(rand::random_range(0..all.len()));
        Some(chosen.route(ask))
    }
}

impl Candidate {
    fn route(self, ask: Ask<'_>) -> Route {
        let port = self.port.number;
        let is_near = self.way.edge(ask).is_some();
        let (pod, node) = match self.way {
            Way::Pod(pod, node) => (pod, node),
            Way::Address(route) => return route,
        };
        let at = |host| Destination { host, port };
        if !is_near {
            return Route::Elsewhere(at(Host::Ip(self.address)));
        }
        // Its agent knows itself by this name, whatever addresses it has.
        let is_itself = pod.addresses.is_empty() && node.agent.as_str() == node.name;
        let host = if is_itself {
            Host::Name(node.name.clone())
        } else {
            Host::Ip(self.address)
        };
        // On its node's network nothing tells its ports from the node's own.
        let meant = (!pod.addresses.is_empty()).then(|| pod.port(port));
        Route::Edge {
            agent: node.agent.clone(),
            node: node.name.clone(),
            to: at(host),
            pod: meant.map(|meant| PodPort {
                declared: meant.declared || self.port.is_declared,
                ..meant
            }),
        }
    }
}
