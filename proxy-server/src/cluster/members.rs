//! Where the other proxy-servers are: the endpoints of our own headless Service, followed by a watch of its
//! EndpointSlices.
//!
//! A member is an endpoint that is ready and not on its way out, at the UDP port that is called `peers`, or at the only
//! UDP port there is. While kube-apiserver is away, and until a list is complete, those of before stay.
//!
//! What goes wrong with the watch: [`follow`]. A slice that can't be read, or without such a port, has no members.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::SocketAddr;

use k8s_openapi::api::discovery::v1::{EndpointPort, EndpointSlice};
use kube::Api;
use kube::runtime::watcher::Event;
use tokio::sync::watch;

use super::client::Source;
use super::follow::{self, Follower};
use crate::config::ObjectName;

/// The label by which slices belong to a Service.
const OF_SERVICE: &str = "kubernetes.io/service-name";
/// The port's name in the Service.
const PORT: &str = "peers";

/// Follows the endpoints of a Service.
#[derive(Debug)]
pub(crate) struct Endpoints {
    follower: Follower,
    service: ObjectName,
    found: watch::Sender<Option<BTreeSet<SocketAddr>>>,
}

impl Endpoints {
    pub(crate) fn new(source: &Source, service: &ObjectName) -> Self {
        let what = format!("the other proxy-servers, endpoints of Service {service}");
        Self {
            follower: Follower::new(source, what),
            service: service.clone(),
            found: watch::Sender::new(None),
        }
    }

    /// The addresses; `None` until they are known.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<BTreeSet<SocketAddr>>> {
        self.found.subscribe()
    }

    /// For ever.
    pub(crate) async fn run(self) -> Infallible {
        let Self {
            follower,
            service,
            found,
        } = self;
        let settings = follow::settings().labels(&format!("{OF_SERVICE}={}", service.name));
        let slices = |client| Api::<EndpointSlice>::namespaced(client, &service.namespace);
        let mut view = View::default();
        let take = |event| {
            let Some(members) = view.take(event) else {
                return;
            };
            found.send_if_modified(|found| {
                let differs = found.as_ref() != Some(&members);
                *found = Some(members);
                differs
            });
        };
        follower.run(slices, settings, take).await
    }
}

/// The slices as the watch has them.
#[derive(Debug, Default)]
struct View {
    slices: BTreeMap<String, BTreeSet<SocketAddr>>,
    /// A list is not complete yet.
    listing: bool,
}

impl View {
    /// All members, once they are known.
    fn take(&mut self, event: Event<EndpointSlice>) -> Option<BTreeSet<SocketAddr>> {
        let name = |slice: &EndpointSlice| slice.metadata.name.clone().unwrap_or_default();
        match event {
            Event::Init => {
                self.slices.clear();
                self.listing = true;
            }
            Event::InitDone => self.listing = false,
            Event::InitApply(slice) | Event::Apply(slice) => {
                self.slices.insert(name(&slice), members(&slice));
            }
            Event::Delete(slice) => {
                self.slices.remove(&name(&slice));
            }
        }
        (!self.listing).then(|| self.slices.values().flatten().copied().collect())
    }
}

fn members(slice: &EndpointSlice) -> BTreeSet<SocketAddr> {
    let Some(port) = port(slice.ports.as_deref().unwrap_or_default()) else {
        return BTreeSet::new();
    };
    let serves = |endpoint: &&k8s_openapi::api::discovery::v1::Endpoint| {
        let conditions = endpoint.conditions.as_ref();
        let is = |of: fn(&k8s_openapi::api::discovery::v1::EndpointConditions) -> Option<bool>| {
            conditions.and_then(of)
        };
        // Nothing said is ready, as Kubernetes has it.
        is(|c| c.ready) != Some(false) && is(|c| c.terminating) != Some(true)
    };
    let endpoints = slice.endpoints.iter().filter(serves);
    let addresses = endpoints.flat_map(|endpoint| &endpoint.addresses);
    // Those of an `FQDN` slice are none.
    let parsed = addresses.filter_map(|address| address.parse().ok());
    parsed.map(|ip| SocketAddr::new(ip, port)).collect()
}

fn port(ports: &[EndpointPort]) -> Option<u16> {
    let udp = || {
        ports
            .iter()
            .filter(|port| port.protocol.as_deref() == Some("UDP"))
    };
    let named = udp().find(|port| port.name.as_deref() == Some(PORT));
    let port = named.or_else(|| udp().next().filter(|_| udp().count() == 1))?;
    u16::try_from(port.port?).ok().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn slice(name: &str, ports: &Value, endpoints: &Value) -> EndpointSlice {
        serde_json::from_value(json!({
            "metadata": {"name": name}, "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
        }))
        .unwrap()
    }

    fn one(name: &str, address: &str) -> EndpointSlice {
        slice(
            name,
            &json!([{"name": "peers", "port": 8446, "protocol": "UDP"}]),
            &json!([{"addresses": [address], "conditions": {"ready": true}}]),
        )
    }

    fn addresses(texts: &[&str]) -> BTreeSet<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn members_are_ready_and_stay() {
        let endpoints = json!([
            {"addresses": ["10.0.0.1"]},
            {"addresses": ["10.0.0.2"], "conditions": {"ready": true, "serving": true, "terminating": false}},
            {"addresses": ["10.0.0.3"], "conditions": {"ready": false}},
            {"addresses": ["10.0.0.4"], "conditions": {"ready": true, "terminating": true}},
            {"addresses": ["peer.example"], "conditions": {"ready": true}},
        ]);
        let ports = json!([{"name": "peers", "port": 8446, "protocol": "UDP"}]);
        let found = members(&slice("a", &ports, &endpoints));
        assert_eq!(found, addresses(&["10.0.0.1:8446", "10.0.0.2:8446"]));
    }

    #[test]
    fn the_port_is_the_one_called_peers_or_the_only_one_of_udp() {
        let udp = |name: &str, port: u32| json!({"name": name, "port": port, "protocol": "UDP"});
        let tcp = json!({"name": "peers", "port": 1, "protocol": "TCP"});
        for (ports, found) in [
            (
                json!([tcp, udp("agents", 8443), udp("peers", 8446)]),
                Some(8446),
            ),
            (json!([tcp, udp("quic", 9000)]), Some(9000)),
            (json!([udp("a", 1), udp("b", 2)]), None),
            (json!([tcp]), None),
            (json!([udp("peers", 0)]), None),
            (json!([udp("peers", 65_536)]), None),
            (json!([{"name": "peers", "protocol": "UDP"}]), None),
            (json!([]), None),
        ] {
            let ports: Vec<EndpointPort> = serde_json::from_value(ports.clone()).unwrap();
            assert_eq!(port(&ports), found, "{ports:?}");
        }
    }

    #[test]
    fn a_list_counts_once_it_is_complete() {
        let mut view = View::default();
        assert_eq!(view.take(Event::Init), None);
        assert_eq!(view.take(Event::InitApply(one("a", "10.0.0.1"))), None);
        assert_eq!(view.take(Event::InitApply(one("b", "10.0.0.2"))), None);
        let both = addresses(&["10.0.0.1:8446", "10.0.0.2:8446"]);
        assert_eq!(view.take(Event::InitDone), Some(both));
        let moved = view.take(Event::Apply(one("b", "10.0.0.3")));
        assert_eq!(moved, Some(addresses(&["10.0.0.1:8446", "10.0.0.3:8446"])));
        let left = view.take(Event::Delete(one("a", "10.0.0.1")));
        assert_eq!(left, Some(addresses(&["10.0.0.3:8446"])));
        assert_eq!(view.take(Event::Init), None);
        assert_eq!(view.take(Event::InitDone), Some(BTreeSet::new()));
    }
}
