//! The names of the nodes as a ConfigMap that CoreDNS serves by its `hosts` plugin: names of nodes at the edge point to us,
//! all others to their nodes, among them those that we would always dial past the tunnel as any machine's routes lead, at the
//! one address that we would dial. Format and default name are those of OpenYurt's Raven, so that its CoreDNS can go on.
//!
//! Of several servers the one that leads writes ([`lease`](super::lease)). Each second it looks whether nodes, routes or agents
//! have changed, and each five `retryPeriod`s what the cluster has; it writes what differs and nothing else.
//!
//! | state | what is written |
//! | --- | --- |
//! | another server leads | nothing; where there are lines, it is looked where names point all the same |
//! | leads, nodes not read yet | nothing: an empty or partial map would take names away |
//! | leads | the map is created, changed, or repaired if somebody else changed it |
//! | leadership was lost or ran out | nothing, at once; what was under way is refused by its version once the next leader has written |
//!
//! | failure (metric label) | what happens |
//! | --- | --- |
//! | `conflict`: somebody else wrote in between | all is read again at the next look |
//! | `missing`: the namespace of the map does not exist | said; tried again with back-off up to five `retryPeriod`s, as in all rows below |
//! | `refused`: 401, 403, an immutable map, the key in `binaryData` | said, with kube-apiserver's words |
//! | `unavailable`: no answer in time, 429, 5xx, can't be reached | said; the map stays as it is, and is caught up with later |
//! | `no_service`, `headless_service`: `service` does not exist or has no ClusterIP | said; the map stays as it is |
//! | `too_large`: more than 1 MiB together with the map's other keys | said; the map stays as it is |
//!
//! Whether requests are served does not depend on any of it. `/readyz` does not either: kube-apiserver may need this server
//! to get up.

mod hosts;

use std::collections::{BTreeSet, HashSet};
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hosts::{Hosts, Led, hosts};
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use parking_lot::Mutex;
use proto::{AgentName, Destination, Host};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::ClusterTable;
use super::ask::{AskError, Asker, within};
use super::client::Source;
use super::lease::{Candidate, FIELD_MANAGER, Leadership};
use super::nodes::KUBELET_PORT;
use super::plan::{MOST, Plan, TooLarge, WRITTEN_BY, Wanted, plan};
use crate::config::{Dns, Elsewhere, Kubernetes, LeaseTimes, ObjectName};
use crate::metrics::{DnsMetrics, WriteLabels};
use crate::path::{Known, Meant};
use crate::route::{Route, RouteTable};
use crate::serve::Forwarder;

/// Changes are gathered so long.
const GATHER: Duration = Duration::from_secs(1);
/// So many `retryPeriod`s after it was last seen, the map is looked at again.
const RECHECK: u32 = 5;

/// The map as this server knows it.
#[derive(Debug)]
pub struct Published {
    /// Which ConfigMap.
    pub map: ObjectName,
    /// Whether this server writes it.
    pub leadership: Arc<Leadership>,
    state: Mutex<MapState>,
    /// Where names at the edge point.
    here: Mutex<BTreeSet<IpAddr>>,
    metrics: DnsMetrics,
}

/// How the map is, as the leader knows it.
#[derive(Debug, Clone, Default)]
pub struct MapState {
    /// When it was last seen to say what it should.
    pub good: Option<Instant>,
    /// Names in it then.
    pub names: usize,
    /// Why it is not as it should be.
    pub failure: Option<String>,
}

impl Published {
    pub(super) fn new(dns: &Dns, metrics: DnsMetrics) -> Self {
        let here = dns.addresses.iter().map(IpAddr::to_canonical).collect();
        Self {
            map: dns.config_map.clone(),
            leadership: Arc::new(Leadership::new(metrics.leader.clone())),
            state: Mutex::default(),
            here: Mutex::new(here),
            metrics,
        }
    }

    /// Whether names at the edge point to that address, as far as is known.
    pub(crate) fn leads_here(&self, ip: IpAddr) -> bool {
        self.here.lock().contains(&ip)
    }

    /// How the map is.
    #[must_use]
    pub fn state(&self) -> MapState {
        self.state.lock().clone()
    }

    /// Sets the gauges that time changes.
    pub(super) fn export(&self) {
        self.leadership.export();
        let age = self.state.lock().good.map(|good| good.elapsed().as_secs());
        let age = age.map_or(-1, |age| i64::try_from(age).unwrap_or(i64::MAX));
        self.metrics.age.set(age);
    }

    fn wrote(&self, result: &'static str) {
        self.metrics
            .writes
            .get_or_create(&WriteLabels { result })
            .inc();
    }

    fn is_good(&self, names: usize) {
        let mut state = self.state.lock();
        if state.failure.is_some() {
            tracing::info!(map = %self.map, "the DNS map is as it should be again");
        }
        *state = MapState {
            good: Some(Instant::now()),
            names,
            failure: None,
        };
        drop(state);
        self.export();
    }

    /// Told once until it is good again.
    fn failed(&self, error: &WriteError) {
        self.wrote(error.label());
        let why = daemon::chain(error).to_string();
        let mut state = self.state.lock();
        if state.failure.as_ref() != Some(&why)
            && !matches!(error, WriteError::Asked(AskError::Conflict))
        {
            tracing::warn!(map = %self.map, error = why, "the DNS map can't be brought up to date and stays as it is");
        }
        state.failure = Some(why);
    }

    /// What becomes of the map is somebody else's to know.
    fn not_ours(&self) {
        *self.state.lock() = MapState::default();
        self.export();
    }
}

/// Why the map is not as it should be.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error("Service {0} does not exist")]
    NoService(ObjectName),
    #[error("Service {0} has no ClusterIP, so node names can't point to it")]
    Headless(ObjectName),
    #[error("{0} bytes are more than the {MOST} that a ConfigMap holds")]
    TooLarge(usize),
    #[error(transparent)]
    Asked(#[from] AskError),
}

impl WriteError {
    const fn label(&self) -> &'static str {
        match self {
            Self::NoService(_) => "no_service",
            Self::Headless(_) => "headless_service",
            Self::TooLarge(_) => "too_large",
            Self::Asked(error) => error.label(),
        }
    }
}

/// What the map is made of. Equal if nothing has changed.
struct Inputs {
    table: Arc<ClusterTable>,
    routes: Arc<RouteTable>,
    enrolled: Arc<HashSet<AgentName>>,
    /// Agents that have or had a session; only ever more.
    agents: usize,
    /// Changes of who is known to other servers.
    elsewhere: u64,
}

impl Inputs {
    fn of(forwarder: &Forwarder) -> Self {
        Self {
            table: forwarder.routing.cluster.table(),
            routes: forwarder.routing.table.load_full(),
            enrolled: forwarder.routing.enrolled.load_full(),
            agents: forwarder.registry.agents(),
            elsewhere: forwarder.peers.changes_of_names(),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.table, &other.table)
            && Arc::ptr_eq(&self.routes, &other.routes)
            && Arc::ptr_eq(&self.enrolled, &other.enrolled)
            && self.agents == other.agents
            && self.elsewhere == other.elsewhere
    }
}

/// Takes part in the election, and writes the map while it leads.
pub(crate) struct Publisher {
    candidate: Candidate,
    writer: Writer,
}

impl Publisher {
    pub(crate) fn new(
        server: &str,
        forwarder: &Arc<Forwarder>,
        source: &Source,
        settings: &Kubernetes,
    ) -> Option<Self> {
        let published = forwarder.routing.cluster.published()?;
        let identity = format!("{server}_{:08x}", rand::random::<u32>());
        Some(Self {
            candidate: Candidate::new(
                Arc::clone(&published.leadership),
                identity.clone(),
                settings.lease,
                source.namespace_for(settings),
                source.clone(),
            ),
            writer: Writer {
                forwarder: Arc::clone(forwarder),
                published: Arc::clone(published),
                asker: Asker::new(source.clone()),
                dns: settings.dns.clone()?,
                times: settings.lease,
                identity,
                said: None,
            },
        })
    }

    /// Until `stop`; then nothing is written any more, and the Lease is given away.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let Self {
            mut candidate,
            mut writer,
        } = self;
        tokio::select! {
            () = stop.cancelled() => {}
            never = candidate.run() => match never {},
            never = writer.run() => match never {},
        }
        candidate.resign().await;
    }
}

struct Writer {
    forwarder: Arc<Forwarder>,
    published: Arc<Published>,
    asker: Asker,
    dns: Dns,
    times: LeaseTimes,
    identity: String,
    /// The text that the map was last seen to have, in this leadership.
    said: Option<String>,
}

/// What became of a round.
enum Round {
    /// The map is as it should be, with so many names.
    Good(usize),
    /// Leadership ended meanwhile.
    NotOurs,
}

impl Writer {
    #[expect(clippy::infinite_loop, reason = "ended by being dropped")]
    async fn run(&mut self) -> Infallible {
        let recheck = self.times.retry_period * RECHECK;
        let (mut last, mut due, mut failures) = (None::<Inputs>, Instant::now(), 0_u32);
        let mut learn = due;
        loop {
            sleep(GATHER).await;
            if self.published.leadership.until().is_none() {
                if last.take().is_some() || failures > 0 {
                    self.published.not_ours();
                }
                (failures, self.said) = (0, None);
                self.learn(&mut learn).await;
                continue;
            }
            let now = Instant::now();
            let inputs = Inputs::of(&self.forwarder);
            let changed = !last.as_ref().is_some_and(|last| last.is_same(&inputs));
            let wanted = if failures == 0 {
                changed || now >= due
            } else {
                now >= due
            };
            if self.forwarder.routing.cluster.is_waiting() || !wanted {
                continue;
            }
            match self.round(&inputs).await {
                Ok(Round::Good(names)) => {
                    self.published.is_good(names);
                    (last, due, failures) = (Some(inputs), Instant::now() + recheck, 0);
                }
                Ok(Round::NotOurs) => {}
                Err(error) => {
                    self.published.failed(&error);
                    if let WriteError::Asked(error) = &error {
                        self.asker.failed(error);
                    }
                    failures = failures.saturating_add(1);
                    due = Instant::now() + pause(failures, recheck);
                }
            }
        }
    }

    /// Compares the map with what it should say, and writes what differs.
    async fn round(&mut self, inputs: &Inputs) -> Result<Round, WriteError> {
        let ours = self.addresses().await?;
        let Hosts { text, names } = self.hosts(inputs, &ours);
        let map = self.published.map.clone();
        let maps = Api::<ConfigMap>::namespaced(self.asker.client().await?, &map.namespace);
        let limit = self.limit();
        let found = within(limit, None, maps.get_opt(&map.name)).await?;
        let wanted = Wanted {
            map: &map,
            key: &self.dns.key,
            text: &text,
            annotation: (WRITTEN_BY, &self.identity),
        };
        let plan =
            plan(found.as_ref(), wanted).map_err(|TooLarge(bytes)| WriteError::TooLarge(bytes))?;
        // Last thing before a write, and a bound of it.
        let Some(until) = self.published.leadership.until() else {
            return Ok(Round::NotOurs);
        };
        match plan {
            Plan::Keep => {
                self.said = Some(text);
                return Ok(Round::Good(names));
            }
            Plan::Create(map) => {
                let params = PostParams {
                    field_manager: Some(FIELD_MANAGER.to_owned()),
                    ..PostParams::default()
                };
                within(limit, Some(until), maps.create(&params, &map)).await?;
            }
            Plan::Change(change) => {
                let params = PatchParams {
                    field_manager: Some(FIELD_MANAGER.to_owned()),
                    ..PatchParams::default()
                };
                let change = Patch::Merge(change);
                within(limit, Some(until), maps.patch(&map.name, &params, &change)).await?;
            }
        }
        self.published.wrote("ok");
        if self.said.as_ref() == Some(&text) {
            tracing::warn!(%map, names, "somebody else had changed the DNS map; it was written again");
        } else {
            tracing::info!(%map, names, "the DNS map was written");
        }
        self.said = Some(text);
        Ok(Round::Good(names))
    }

    /// What is under way when a leadership ends is answered, or given up, before another can begin.
    fn limit(&self) -> Duration {
        self.times.duration - self.times.renew_deadline
    }

    /// Who does not write the map must know as well where its names point: no line leads there.
    async fn learn(&mut self, due: &mut Instant) {
        let is_needed = self.dns.service.is_some() && !self.forwarder.paths.is_idle();
        if !is_needed || Instant::now() < *due {
            return;
        }
        if let Err(WriteError::Asked(error)) = self.addresses().await {
            // Whoever leads says so.
            self.asker.failed(&error);
        }
        *due = Instant::now() + self.times.retry_period * RECHECK;
    }

    /// Where names of nodes at the edge point.
    async fn addresses(&mut self) -> Result<BTreeSet<IpAddr>, WriteError> {
        let Some(name) = self.dns.service.clone() else {
            return Ok(self.published.here.lock().clone());
        };
        let services = Api::<Service>::namespaced(self.asker.client().await?, &name.namespace);
        let found = within(self.limit(), None, services.get_opt(&name.name)).await?;
        let Some(service) = found else {
            return Err(WriteError::NoService(name));
        };
        let spec = service.spec.unwrap_or_default();
        let all = spec
            .cluster_ips
            .unwrap_or_default()
            .into_iter()
            .chain(spec.cluster_ip);
        // A headless Service has the text "None" there.
        let addresses: BTreeSet<IpAddr> = all.filter_map(|ip| ip.parse().ok()).collect();
        if addresses.is_empty() {
            return Err(WriteError::Headless(name));
        }
        self.published.here.lock().clone_from(&addresses);
        Ok(addresses)
    }

    fn hosts(&self, inputs: &Inputs, ours: &BTreeSet<IpAddr>) -> Hosts {
        let known = |agent: &AgentName| self.forwarder.knows(agent);
        let route = |name: &str| {
            let destination = Destination {
                host: Host::Name(name.to_owned()),
                port: KUBELET_PORT,
            };
            let (routes, table) = (&inputs.routes, &inputs.table);
            let route = routes.route(&destination, table, Elsewhere::Refuse, known)?;
            Ok(self.led(inputs, &route))
        };
        hosts(&inputs.table, ours, &self.dns.domains, route)
    }
}

impl Writer {
    /// A node that we would always dial past the tunnel is left to whoever asks.
    fn led(&self, inputs: &Inputs, route: &Route) -> Led {
        let Route::Edge { node, to, pod, .. } = route else {
            return Led::Elsewhere;
        };
        let pod = pod.as_ref();
        let (paths, meant) = (&self.forwarder.paths, Meant { node, to, pod });
        let known = Known {
            routes: &inputs.routes,
            cluster: &inputs.table,
            servers: &|ip| self.forwarder.leads_here(ip),
        };
        let past_us = paths.leaves_to_itself(known, meant);
        past_us.map_or(Led::Us, Led::At)
    }
}

/// The pause after so many failures in a row: random below a ceiling that doubles up to `most`.
fn pause(failures: u32, most: Duration) -> Duration {
    let doubled = 1 << failures.saturating_sub(1).min(10);
    let ceiling = GATHER.saturating_mul(doubled).min(most);
    ceiling.mul_f64(f64::midpoint(rand::random(), 1.0))
}
