//! Looks whether nodes on lines can be reached: a TCP connect to the kubelet's port, closed at once, or with
//! `path.probes.tls` after a handshake (`answer.rs`).
//!
//! Which nodes those are is looked up anew when the cluster's nodes change, and each ten seconds. When, [`Schedule`] says;
//! what follows from it, [`health`](super::health). A request that had to do without the line, or a first bad probe, has
//! the node looked at at once, and some others on its line too.
//!
//! | what comes of a probe | means |
//! | --- | --- |
//! | connected, or refused; with `tls` an answer to it, too | good: the node answers |
//! | nothing within `path.probes.timeout`, no route, the line's interface or address is not there | bad |
//! | what this server lacks (descriptors), what is never dialled | nothing |

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use proto::{Destination, Host, Reason};
use tokio::time::{Instant, sleep_until};

use super::answer;
use super::dial::Failed;
use super::health::Evidence;
use super::policy::{Bypass, Decided};
use super::schedule::{Key, Schedule};
use crate::path::{Known, Meant};
use crate::serve::Forwarder;

/// Probes that wait for an answer; more wait for their turn.
const MOST: usize = 256;
/// Others on the line that are looked at when one is lost.
const WITNESSES: usize = 8;
/// How often the nodes are looked up where nothing says that they have changed.
const LOOK_UP: Duration = Duration::from_secs(10);
/// Changes within this are looked up at once.
const SETTLE: Duration = Duration::from_millis(200);

/// Whom to dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) bypass: Bypass,
    /// The kubelet's.
    pub(crate) port: u16,
}

/// A node at the edge, and how it is reached.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) name: String,
    /// The kubelet's.
    port: u16,
    pub(crate) decided: Decided,
}

impl Found {
    /// Whom to dial, if it is reached by a line, always or while that works.
    fn target(&self) -> Option<(Key, Target)> {
        let (bypass, port) = (self.decided.decision.bypass()?.clone(), self.port);
        Some((Key::new(&bypass, &self.name), Target { bypass, port }))
    }
}

/// Every node at the edge.
fn find(forwarder: &Forwarder) -> Vec<Found> {
    let (routes, cluster) = (
        forwarder.routing.table.load(),
        forwarder.routing.cluster.table(),
    );
    let configured = routes.nodes().map(|(node, _agent)| node);
    let known = |agent: &_| forwarder.knows(agent);
    let of_cluster = cluster.nodes().values().filter(|node| node.is_edge(known));
    // Those of the configuration may be in the cluster, too.
    let names: BTreeSet<_> = configured
        .chain(of_cluster.map(|node| node.name.as_str()))
        .collect();
    let find = |name: &str| {
        let node = cluster.nodes().get(name);
        let port = node.map_or(crate::cluster::nodes::KUBELET_PORT, |node| {
            node.kubelet_port
        });
        let to = Destination {
            host: Host::Name(name.to_owned()),
            port,
        };
        let meant = Meant {
            node: name,
            to: &to,
            pod: None,
        };
        let known = Known {
            routes: &routes,
            cluster: &cluster,
            servers: &|ip| forwarder.leads_here(ip),
        };
        Found {
            name: name.to_owned(),
            port,
            decided: forwarder.paths.decide(known, meant),
        }
    };
    names.into_iter().map(find).collect()
}

/// What a dial that took so long shows of the node, and so of the line.
pub(crate) fn evidence(failed: Option<&Failed>, took: Duration) -> Option<Evidence> {
    match failed {
        None => Some(Evidence::Good(took)),
        Some(failed) if failed.reason == Reason::DialRefused => Some(Evidence::Good(took)),
        Some(failed) => failed.is_of_line.then_some(Evidence::Bad),
    }
}

/// Probes for as long as it lives.
pub(crate) async fn run(forwarder: Arc<Forwarder>) -> Infallible {
    let paths = &forwarder.paths;
    let probes = paths.settings.probes;
    let mut schedule = Schedule::new(Instant::now(), probes.per_second);
    let mut changes = forwarder.routing.cluster.changes();
    let mut look_up = Instant::now();
    let mut running = FuturesUnordered::new();
    loop {
        let now = Instant::now();
        let wake = if running.len() < MOST {
            match schedule.next(now) {
                Ok(key) => {
                    running.push(probe(&forwarder, key));
                    continue;
                }
                Err(wake) => wake,
            }
        } else {
            None
        };
        let due = async {
            match wake {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            Some((key, was_first)) = running.next() => {
                let now = Instant::now();
                if was_first {
                    schedule.hasten_others(now, &key, WITNESSES);
                }
                let pause = paths.pause(&key);
                schedule.done(now, key, pause, pause < probes.interval, rand::random());
            }
            suspects = paths.suspects() => {
                for key in suspects {
                    schedule.hasten(Instant::now(), &key);
                }
            }
            Ok(()) = changes.changed() => look_up = look_up.min(Instant::now() + SETTLE),
            () = sleep_until(look_up) => {
                keep(&forwarder, &mut schedule);
                look_up = Instant::now() + LOOK_UP;
            }
        }
    }
}

fn keep(forwarder: &Forwarder, schedule: &mut Schedule) {
    let (now, interval) = (Instant::now(), forwarder.paths.settings.probes.interval);
    let found = find(forwarder);
    let targets: HashMap<_, _> = found.iter().filter_map(Found::target).collect();
    schedule.keep(now, targets.keys().cloned(), interval, rand::random);
    forwarder.paths.keep(now, targets);
    // What the cluster says is not all there yet: of a node of the configuration it may say more.
    if !forwarder.routing.cluster.is_waiting() {
        forwarder.paths.uses(now, found);
    }
}

/// One dial, and what follows. Tells whether it is the first bad one.
async fn probe(forwarder: &Forwarder, key: Key) -> (Key, bool) {
    let paths = &forwarder.paths;
    let Some(target) = paths.target(&key) else {
        return (key, false);
    };
    let Target { bypass, port } = &target;
    let begun = Instant::now();
    let deadline = begun + paths.settings.probes.timeout;
    let dialled = forwarder.dial_by(bypass, *port, deadline).await;
    let took = begun.elapsed();
    let answered = match dialled {
        Ok(stream) if paths.settings.probes.tls => {
            answer::ask(stream, bypass, *port, deadline).await
        }
        other => other.map(drop),
    };
    let result = match &answered {
        Ok(()) => "ok",
        Err(failed) => failed.reason.label(),
    };
    paths.metrics.probed(&key.line, result);
    if paths.target(&key).as_ref() != Some(&target) {
        return (key, false); // it has moved meanwhile
    }
    let shown = evidence(answered.as_ref().err(), took);
    let is_first = shown.is_some_and(|evidence| paths.heard(&key, evidence));
    (key, is_first)
}
