//! The Services of the cluster and what is behind them: names, addresses and ports that lead to pods.
//!
//! | destination | Service |
//! | --- | --- |
//! | `NAME.NAMESPACE.svc`, also with the cluster's domain | that one |
//! | `HOST.NAME.NAMESPACE.svc` | that one, and of its endpoints the one of that hostname, or address with dashes |
//! | one of its ClusterIPs | that one |
//! | an address of its load balancer | that one; not with `loadBalancerSourceRanges` or `ipMode: Proxy` |
//! | one of its NodePorts, on a node | that one |
//! | one of its `externalIPs` | none: whoever may write a Service writes there what he likes (CVE-2020-8554) |
//!
//! | state | what is said |
//! | --- | --- |
//! | Services or slices were not all read yet | nothing is any Service's; of a name, that it may be |
//! | both were | what is known, kept current by two watches |
//! | kube-apiserver away, or a list not complete | what was known before; what goes wrong with a watch is in [`follow`] |
//!
//! What is not TCP counts for nothing. Where that leads is decided in [`table`](super::table). What is kept of a Service is
//! some 600 bytes, of an endpoint some 200, and no more of a slice than kube-apiserver lets it have.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;

use index::{ByService, BySlice, Told};
use k8s_openapi::api::core::v1::Service as WatchedService;
use k8s_openapi::api::discovery::v1::EndpointSlice as WatchedSlice;
use kube::runtime::watcher::Event;
use kube::{Api, ResourceExt};
use parking_lot::RwLock;

use super::client::Source;
use super::follow::{self, Follower};

mod index;
mod service;
mod slice;

pub(crate) use service::{Kind, Service};
pub(crate) use slice::{Endpoint, Slice};

/// What ends the names of Services.
const DOMAIN: &str = "svc";

/// The Services and their slices, shared by who follows them and who asks.
#[derive(Debug, Default)]
pub(crate) struct Services {
    services: RwLock<Known<ByService>>,
    slices: RwLock<Known<BySlice>>,
}

/// What is known, and whether all of it was read once.
#[derive(Debug, Default)]
struct Known<T> {
    all: T,
    is_whole: bool,
}

/// What a name is to the Services.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Named {
    /// That Service's, and of its endpoints the one that is called so.
    Service(Arc<Service>, Option<String>),
    /// It may be one's: not all were read yet.
    Unread,
    /// None's.
    Nothing,
}

impl Services {
    /// Whose name that is; `domain` is the cluster's.
    pub(crate) fn named(&self, name: &str, domain: &str) -> Named {
        let Some((host, service, namespace)) = parts(name, domain) else {
            return Named::Nothing;
        };
        if !self.are_known() {
            return Named::Unread;
        }
        let found = self
            .services
            .read()
            .all
            .called(&format!("{namespace}/{service}"));
        found.map_or(Named::Nothing, |found| {
            Named::Service(found, host.map(str::to_owned))
        })
    }

    /// Whose own address that is.
    pub(crate) fn at(&self, ip: IpAddr) -> Vec<Arc<Service>> {
        self.known(|services| services.at(ip))
    }

    /// Whose load balancer has that address.
    pub(crate) fn balanced(&self, ip: IpAddr) -> Vec<Arc<Service>> {
        self.known(|services| services.balanced(ip))
    }

    /// Whose port that is on every node.
    pub(crate) fn on_nodes(&self, port: u16) -> Vec<Arc<Service>> {
        self.known(|services| services.on_nodes(port))
    }

    /// What is behind a Service.
    pub(crate) fn behind(&self, service: &Service) -> Vec<Arc<Slice>> {
        self.slices.read().all.of(&service.key)
    }

    fn are_known(&self) -> bool {
        self.services.read().is_whole && self.slices.read().is_whole
    }

    fn known(&self, of: impl Fn(&ByService) -> Vec<Arc<Service>>) -> Vec<Arc<Service>> {
        if !self.are_known() {
            return Vec::new();
        }
        of(&self.services.read().all)
    }

    fn take_service(&self, listed: &mut Option<ByService>, event: Event<WatchedService>) {
        let keep = |watched: &_| Some(Service::trim(watched));
        if take(&self.services, listed, event, keep) {
            let services = self.services.read().all.len();
            tracing::info!(services, "all Services of the cluster were read");
        }
    }

    fn take_slice(&self, listed: &mut Option<BySlice>, event: Event<WatchedSlice>) {
        if take(&self.slices, listed, event, Slice::trim) {
            let slices = self.slices.read().all.len();
            tracing::info!(slices, "all EndpointSlices of the cluster were read");
        }
    }

    /// Follows the Services, for ever.
    pub(crate) async fn follow(self: Arc<Self>, source: Source) -> Infallible {
        let follower = Follower::new(&source, "the cluster's Services");
        let mut listed = None;
        let take = |event| self.take_service(&mut listed, event);
        let all = Api::<WatchedService>::all;
        follower.run(all, follow::settings(), take).await
    }

    /// Follows what is behind them, for ever.
    pub(crate) async fn follow_slices(self: Arc<Self>, source: Source) -> Infallible {
        let follower = Follower::new(&source, "the cluster's EndpointSlices");
        let mut listed = None;
        let take = |event| self.take_slice(&mut listed, event);
        let all = Api::<WatchedSlice>::all;
        follower.run(all, follow::settings(), take).await
    }
}

/// Takes over what a watch tells; `listed` is a list that is not complete yet. Says whether one is now.
fn take<I: Told + Default, W: ResourceExt>(
    known: &RwLock<Known<I>>,
    listed: &mut Option<I>,
    event: Event<W>,
    keep: impl Fn(&W) -> Option<I::Object>,
) -> bool {
    match event {
        Event::Init => *listed = Some(I::default()),
        Event::InitApply(watched) => {
            if let Some(object) = keep(&watched) {
                listed.get_or_insert_default().put(object);
            }
        }
        Event::InitDone => {
            let all = listed.take().unwrap_or_default();
            *known.write() = Known {
                all,
                is_whole: true,
            };
            return true;
        }
        Event::Apply(watched) => match keep(&watched) {
            Some(object) => known.write().all.put(object),
            None => known.write().all.remove(&follow::key(&watched)),
        },
        Event::Delete(watched) => known.write().all.remove(&follow::key(&watched)),
    }
    false
}

/// Endpoint, Service and namespace of `[HOST.]NAME.NAMESPACE.svc[.DOMAIN]`: none of them has dots.
fn parts<'a>(name: &'a str, domain: &str) -> Option<(Option<&'a str>, &'a str, &'a str)> {
    let inner = name
        .strip_suffix(domain)
        .and_then(|name| name.strip_suffix('.'))
        .unwrap_or(name);
    let (rest, last) = inner.rsplit_once('.')?;
    if last != DOMAIN {
        return None;
    }
    let (rest, namespace) = rest.rsplit_once('.')?;
    match rest.rsplit_once('.') {
        None => Some((None, rest, namespace)),
        Some((host, service)) => (!host.contains('.')).then_some((Some(host), service, namespace)),
    }
}

#[cfg(test)]
pub(super) mod tests;
