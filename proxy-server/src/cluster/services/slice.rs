//! What is kept of an EndpointSlice: what is behind a Service.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::discovery::v1::{Endpoint as WatchedEndpoint, EndpointSlice as Watched};

use super::service::{address, port};
use crate::cluster::follow;

/// The label by which slices belong to a Service.
const OF_SERVICE: &str = "kubernetes.io/service-name";
/// Endpoints and ports that are kept of a slice. kube-apiserver takes no more endpoints.
const MOST: usize = 1_000;

/// What is kept of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slice {
    /// `NAMESPACE/NAME`.
    pub(super) key: String,
    /// Key of its Service.
    pub(super) service: String,
    /// What its Service calls them, and what is dialled; those of TCP.
    pub(crate) ports: Vec<(Box<str>, u16)>,
    pub(crate) endpoints: Vec<Endpoint>,
}

/// One of those that do a Service's work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) address: IpAddr,
    pub(crate) is_ready: bool,
    /// `NAMESPACE/NAME` of the pod that it is said to be.
    pub(crate) pod: Option<Box<str>>,
    /// The node that it is said to be on.
    pub(crate) node: Option<Box<str>>,
    /// What it is called within its Service.
    pub(crate) hostname: Option<Box<str>>,
}

impl Slice {
    /// `None` for one that belongs to no Service.
    pub(super) fn trim(watched: &Watched) -> Option<Self> {
        let metadata = &watched.metadata;
        let namespace = metadata.namespace.as_deref().unwrap_or_default();
        let service = metadata.labels.as_ref()?.get(OF_SERVICE)?;
        let is_tcp = |of: Option<&str>| of.is_none_or(|it| it == "TCP");
        let ports = watched.ports.iter().flatten();
        let ports = ports.filter(|port| is_tcp(port.protocol.as_deref()));
        let ports = ports.filter_map(|it| {
            let name = it.name.clone().unwrap_or_default();
            Some((name.into(), port(it.port)?))
        });
        let endpoints = watched.endpoints.iter().take(MOST);
        Some(Self {
            key: follow::key(watched),
            service: format!("{namespace}/{service}"),
            ports: ports.take(MOST).collect(),
            endpoints: endpoints
                .filter_map(|endpoint| Endpoint::trim(endpoint, namespace))
                .collect(),
        })
    }
}

impl Endpoint {
    /// `None` for one that can't be dialled, or says to be a pod of another namespace: whoever may write slices in one
    /// would reach what others don't offer.
    fn trim(watched: &WatchedEndpoint, namespace: &str) -> Option<Self> {
        let pod = watched.target_ref.as_ref();
        let pod = pod.filter(|target| target.kind.as_deref() == Some("Pod"));
        let is_here = |pod: &ObjectReference| {
            let said = pod.namespace.as_deref();
            said.is_none_or(|it| it == namespace)
        };
        if pod.is_some_and(|pod| !is_here(pod)) {
            return None;
        }
        let pod = pod.map(|pod| {
            let name = pod.name.as_deref().unwrap_or_default();
            format!("{namespace}/{name}").into()
        });
        let said = watched.conditions.as_ref().and_then(|it| it.ready);
        let kept = |text: &Option<String>| text.as_deref().map(Into::into);
        Some(Self {
            // Further addresses are the same endpoint's: by the API's definition the first is to be used.
            address: address(watched.addresses.first()?)?,
            // Nothing said is ready, as Kubernetes has it.
            is_ready: said != Some(false),
            pod,
            node: kept(&watched.node_name),
            hostname: kept(&watched.hostname),
        })
    }
}
