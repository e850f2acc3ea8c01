//! What the cluster knows of its nodes, and how fresh that is. The only place that asks Kubernetes anything.
//!
//! The nodes are read in pages, then watched; each change makes a new [`ClusterTable`], which routing reads. So are pods and Services,
//! where they are destinations (`pods.rs`, `services.rs`). Without the `kubernetes:` section nothing here runs and the table is empty.
//!
//! | state | from it by | routes |
//! | --- | --- | --- |
//! | never synced (start) | the last page of the first list | configured ones, and agents by name |
//! | synced | – | the snapshot's, kept current by the watch |
//! | apiserver away | the watch resumes, or a new list is complete | those of the last snapshot, all of them, however long |
//! | list begun anew | its last page | those of the last snapshot until then, at once the new ones |
//!
//! | failure | what happens |
//! | --- | --- |
//! | kube-apiserver can't be reached, 5xx, 429 | the watch is resumed where it was, with back-off up to 10 s; after 8 in a row all is read anew |
//! | 410 Gone (in the watch, at its start, within the pages) | all is read anew; nothing is dropped meanwhile |
//! | 401, 403, an unreadable kubeconfig | said in log, `status` and gauges; credentials and all nodes are read anew, with back-off |
//! | it ends each watch at once, and well | the next is opened after a pause that doubles up to 10 s; what has changed comes with it |
//! | it says nothing, not even the end of a watch that was asked to last a minute | the connection is given up after 150 s |
//! | a Node that can't be read | that answer counts as a failure; the last snapshot stays |
//!
//! Nothing waits for the first sync: kube-apiserver may need this server to get up itself (docs/adr/0006). Connections
//! to kube-apiserver are dialled straight to the address that it has been given, past every proxy setting, so they never
//! come back to our own frontends. Nothing about nodes is written to the disk; to the cluster one ConfigMap ([`dns`]) by one
//! server at a time ([`lease`]), where `kubernetes.dns` says so, and, where nodes may be reached by lines, Events (`events.rs`).

mod ask;
mod client;
pub mod dns;
mod events;
mod follow;
pub mod lease;
mod members;
pub mod nodes;
mod pace;
mod plan;
mod pods;
mod questions;
mod services;
mod standing;
mod table;
mod tokens;
mod trust;
mod vault;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
pub(crate) use client::{ClientError, Source};
use dns::Published;
pub(crate) use dns::Publisher;
pub(crate) use events::Events;
pub(crate) use members::Endpoints;
use nodes::Nodes;
use parking_lot::Mutex;
use pods::Pods;
pub(crate) use questions::Questions;
use services::Services;
pub(crate) use standing::{Standing, Verdict};
pub use table::ClusterTable;
use table::Reach;
pub(crate) use tokens::Tokens;
use tokio::sync::watch::{Receiver, Sender};
use tokio::time::Instant;
pub(crate) use vault::Vault;
pub(crate) use watch::Watch;

use crate::config::Kubernetes;
use crate::metrics::{ClusterMetrics, DnsMetrics, NodeLabels};

/// What is known of the cluster. The default is that of a server without the `kubernetes:` section.
#[derive(Debug, Default)]
pub struct Cluster {
    table: ArcSwap<ClusterTable>,
    freshness: Mutex<Freshness>,
    published: Option<Arc<Published>>,
    /// Pods are destinations.
    reach: Option<Reach>,
    changed: Sender<()>,
    metrics: ClusterMetrics,
}

/// How current the table is.
#[derive(Debug, Clone, Default)]
pub struct Freshness {
    /// Kubernetes is asked at all.
    pub configured: bool,
    /// All nodes were read once.
    pub synced: bool,
    /// When kube-apiserver last answered well.
    pub answered: Option<Instant>,
    /// When a watch was last opened.
    followed: Option<Instant>,
    /// Why none is, since then.
    pub failure: Option<String>,
}

impl Freshness {
    /// Since when kube-apiserver has not answered. A healthy watch is renewed every minute.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        self.answered.map(|at| at.elapsed())
    }
}

impl Cluster {
    /// Of a server that asks Kubernetes: with gauges, and not synced yet.
    #[must_use]
    pub fn configured(settings: &Kubernetes, metrics: &daemon::Metrics) -> Self {
        let mut cluster = Self::default();
        cluster.freshness.lock().configured = true;
        cluster.reach = settings.pods.as_ref().map(|pods| Reach {
            pods: Arc::default(),
            services: settings.services.as_ref().map(|_on| Arc::default()),
            domain: pods.cluster_domain.clone(),
            pools: settings.pod_networks(),
        });
        metrics.register(|registry| cluster.metrics.register(registry));
        if let Some(dns) = &settings.dns {
            let of_dns = DnsMetrics::default();
            metrics.register(|registry| of_dns.register(registry));
            cluster.published = Some(Arc::new(Published::new(dns, of_dns)));
        }
        cluster.export();
        cluster
    }

    /// What is known of pods, to be followed; `None` where they are no destinations.
    pub(crate) fn pods(&self) -> Option<Arc<Pods>> {
        self.reach.as_ref().map(|reach| Arc::clone(&reach.pods))
    }

    /// What is known of Services, to be followed; `None` where they are no destinations.
    pub(crate) fn services(&self) -> Option<Arc<Services>> {
        self.reach.as_ref()?.services.clone()
    }

    /// The nodes now.
    pub fn table(&self) -> Arc<ClusterTable> {
        self.table.load_full()
    }

    /// Whether there is, as far as is known, a node of that name and uid.
    pub(crate) fn has(&self, name: &str, uid: &str) -> bool {
        self.table.load().has(name, uid)
    }

    /// Fires when there are other nodes, or all were read for the first time. Several changes at once are one.
    pub(crate) fn changes(&self) -> Receiver<()> {
        self.changed.subscribe()
    }

    /// How current they are.
    pub fn freshness(&self) -> Freshness {
        self.freshness.lock().clone()
    }

    /// What is written to the cluster; `None` where nothing is.
    pub const fn published(&self) -> Option<&Arc<Published>> {
        self.published.as_ref()
    }

    /// Whether nodes are still to be read for the first time.
    pub fn is_waiting(&self) -> bool {
        let freshness = self.freshness.lock();
        freshness.configured && !freshness.synced
    }

    /// Sets the gauges that time changes.
    pub fn export(&self) {
        let freshness = self.freshness();
        let seconds = |age: Duration| i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
        self.metrics.age.set(freshness.age().map_or(-1, seconds));
        self.metrics.synced.set(freshness.synced.into());
        if let Some(published) = &self.published {
            published.export();
        }
    }

    fn publish(&self, nodes: Nodes) {
        let count = |kind, number: usize| {
            let gauge = self
                .metrics
                .nodes
                .get_or_create(&NodeLabels { kind })
                .clone();
            gauge.set(i64::try_from(number).unwrap_or(i64::MAX));
        };
        count("all", nodes.len());
        count("ready", nodes.values().filter(|node| node.ready).count());
        count("edge", nodes.values().filter(|node| node.edge).count());
        let table = ClusterTable::reaching(nodes, self.reach.clone());
        self.table.store(Arc::new(table));
        self.changed.send_replace(());
    }

    /// All nodes were read.
    fn synced(&self) {
        self.freshness.lock().synced = true;
        self.export();
        self.changed.send_replace(());
    }

    /// kube-apiserver answered well.
    fn answered(&self) {
        self.freshness.lock().answered = Some(Instant::now());
    }

    /// A watch was opened, so nothing is wrong. A list alone does not tell: who may list may still not watch.
    fn followed(&self) {
        let mut freshness = self.freshness.lock();
        freshness.followed = Some(Instant::now());
        if freshness.failure.take().is_some() {
            tracing::info!("kube-apiserver answers again");
        }
    }

    /// It did not. Told once until it does.
    fn failed(&self, why: String) {
        self.metrics.failures.inc();
        let mut freshness = self.freshness.lock();
        if freshness.failure.is_none() {
            tracing::warn!(
                error = why,
                "the cluster's nodes can't be followed, the last known stay"
            );
        }
        freshness.failure = Some(why);
    }
}
