//! Ways to a destination beside the tunnel: what is not at the edge, and nodes by a dedicated line.
//!
//! For each request that is routed to the edge [`Paths`] says how its node is reached: what is said of it, who else has
//! its address, and what the operator says go into [`policy`]. `dial.rs` then dials, and `serve/line.rs` has the tunnel
//! beside it. Whether lines work is what probes (`probe.rs`) and requests have shown (`health.rs`); which way that makes each
//! node take is told to people (`used.rs`).

pub(crate) mod answer;
pub(crate) mod dial;
pub mod direct;
pub(crate) mod gate;
pub(crate) mod health;
pub mod policy;
pub(crate) mod probe;
pub(crate) mod schedule;
pub(crate) mod silence;
pub(crate) mod used;

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use dial::Failed;
use health::{Down, Evidence, Health, Switch};
use parking_lot::Mutex;
use policy::{Bypass, Claimant, Decided, Decision, Policy, Subject};
use probe::{Found, Target};
use proto::wire::PodPort;
use proto::{Destination, Host};
use schedule::Key;
use tokio::sync::Notify;
use tokio::time::Instant;
use used::{Change, Use, Used};

use crate::cluster::ClusterTable;
use crate::config::{Config, Line, PathSettings};
use crate::metrics::LineMetrics;
use crate::route::RouteTable;

/// How nodes are reached. The default knows the tunnel alone.
#[derive(Debug, Default)]
pub struct Paths {
    policy: Policy,
    pub(crate) settings: PathSettings,
    pub(crate) metrics: LineMetrics,
    pub(crate) health: Mutex<Health>,
    /// Whom probes dial.
    targets: ArcSwap<HashMap<Key, Target>>,
    /// Who is to be looked at at once; targets only.
    suspects: Mutex<BTreeSet<Key>>,
    suspected: Notify,
    /// Which way each node is reached; locked after `health`.
    used: Mutex<Used>,
    /// There may be a change to be told of.
    turned: Notify,
    /// The connections of ours by lines.
    dialled: Arc<Mutex<HashMap<Ends, Ours>>>,
}

/// What is meant by a request that is routed to the edge.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Meant<'a> {
    /// The node, as it is called.
    pub(crate) node: &'a str,
    /// What its agent would dial.
    pub(crate) to: &'a Destination,
    /// The pod, if it is a known one's address.
    pub(crate) pod: Option<&'a PodPort>,
}

/// Who has addresses.
#[derive(Clone, Copy)]
pub(crate) struct Known<'a> {
    /// By the configuration.
    pub(crate) routes: &'a RouteTable,
    /// In the cluster.
    pub(crate) cluster: &'a ClusterTable,
    /// Whose an address is by which requests come to servers like this one.
    pub(crate) servers: &'a dyn Fn(IpAddr) -> Option<String>,
}

impl Paths {
    /// Of a server with that configuration.
    #[must_use]
    pub fn new(config: &Config, metrics: &daemon::Metrics) -> Self {
        let paths = Self::unwatched(config);
        if !paths.policy.is_idle() {
            metrics.register(|registry| paths.metrics.register(registry));
        }
        paths
    }

    /// Of somebody who dials nobody.
    pub(crate) fn unwatched(config: &Config) -> Self {
        Self {
            policy: Policy::new(config),
            settings: config.path,
            health: Mutex::new(Health::new(config.path)),
            ..Self::default()
        }
    }

    /// Whether everything goes through the tunnel, whatever is said of a node.
    pub(crate) const fn is_idle(&self) -> bool {
        self.policy.is_idle()
    }

    /// How that is reached now.
    pub(crate) fn decide(&self, known: Known<'_>, meant: Meant<'_>) -> Decided {
        let node = known.cluster.nodes().get(meant.node);
        let addresses: &[IpAddr] = match &meant.to.host {
            Host::Ip(ip) => &[*ip],
            Host::Name(_) => match known.routes.addresses_of(meant.node) {
                [] => node.map_or(&[], |node| &node.addresses),
                configured => configured,
            },
        };
        let subject = Subject {
            wish: node.and_then(|node| node.path.as_ref()),
            pool: node.and_then(|node| node.pool.as_deref()),
            is_private: node.is_some_and(|node| node.is_private),
            addresses,
        };
        self.policy
            .decide(subject, |address| others(known, meant, address))
    }

    /// Where who asks for that may as well dial it himself: it is always dialled past the tunnel, and as any machine's
    /// routes lead. Of the node's addresses that one alone was looked at.
    pub(crate) fn leaves_to_itself(&self, known: Known<'_>, meant: Meant<'_>) -> Option<IpAddr> {
        if self.is_idle() {
            return None;
        }
        match self.decide(known, meant).decision {
            Decision::Direct(Bypass { line, address }) => {
                let node = known.cluster.nodes().get(meant.node)?;
                (line.is_plain() && node.addresses.contains(&address)).then_some(address)
            }
            Decision::Auto(_) | Decision::Tunnel | Decision::Refused => None,
        }
    }

    /// Whether, and why, that node is not to be dialled by that line.
    pub(crate) fn is_down(&self, line: &str, node: &str) -> Option<Down> {
        self.health.lock().is_down(line, node)
    }

    /// What the dial of a request shows. Of another address or port than the probes' it shows that something is wrong,
    /// and not what: that is looked at.
    pub(crate) fn saw(
        &self,
        node: &str,
        bypass: &Bypass,
        port: u16,
        failed: Option<&Failed>,
        took: Duration,
    ) {
        let key = Key::new(bypass, node);
        let Some(target) = self.target(&key) else {
            return;
        };
        let is_same = target.bypass.address == bypass.address;
        match probe::evidence(failed, took) {
            Some(Evidence::Bad) if is_same && target.port == port => {
                self.heard(&key, Evidence::Bad);
                self.suspect(key);
            }
            Some(Evidence::Bad) => self.suspect(key),
            Some(good) if is_same => {
                self.heard(&key, good);
            }
            Some(_) | None => {}
        }
    }

    /// Has a node looked at at once.
    pub(crate) fn suspect(&self, key: Key) {
        if self.targets.load().contains_key(&key) {
            self.suspects.lock().insert(key);
            self.suspected.notify_one();
        }
    }

    /// Waits for somebody to be looked at. Cancel-safe.
    async fn suspects(&self) -> BTreeSet<Key> {
        loop {
            let suspects = std::mem::take(&mut *self.suspects.lock());
            if !suspects.is_empty() {
                return suspects;
            }
            self.suspected.notified().await;
        }
    }

    fn target(&self, key: &Key) -> Option<Target> {
        self.targets.load().get(key).cloned()
    }

    fn pause(&self, key: &Key) -> Duration {
        self.health.lock().pause(&key.line, &key.node)
    }

    /// These are probed from now on.
    fn keep(&self, now: Instant, targets: HashMap<Key, Target>) {
        let old = self.targets.load();
        let stays = |(key, target): &(&Key, &Target)| {
            let before = old.get(*key);
            before.is_none_or(|before| before.bypass.address == target.bypass.address)
        };
        let mut health = self.health.lock();
        // What is known of a node is not true of another at the same name.
        for (key, _) in targets.iter().filter(|it| !stays(it)) {
            health.forget(&key.line, &key.node);
        }
        let all = targets.keys();
        let all = all.map(|key| (key.line.as_str(), key.node.as_str()));
        health.keep(now, all);
        drop(health);
        self.targets.store(Arc::new(targets));
    }

    /// Nodes at the edge, as they are reached from now on.
    fn uses(&self, now: Instant, found: Vec<Found>) {
        let health = self.health.lock();
        let all = found.into_iter().map(|Found { name, decided, .. }| {
            let why = decided.why();
            (name, decided.decision, why)
        });
        let down = |line: &_, node: &_| health.is_down(line, node);
        let changes = self.used.lock().keep(now, all, down);
        drop(health);
        if !changes.is_empty() {
            self.turned.notify_one();
        }
        for Change {
            node,
            from,
            to,
            why,
        } in changes
        {
            let (from, to) = (from.words(true), to.words(true));
            tracing::info!(node, from, to, why, "path changed");
        }
    }

    /// Which way that node is reached, after such a decision.
    pub(crate) fn in_use(&self, node: &str, decision: &Decision) -> Use {
        Use::of(decision, |line| self.is_down(line, node))
    }

    /// Since when that way is taken to the node, as far as is known.
    pub(crate) fn since(&self, node: &str, way: &Use) -> Option<Instant> {
        self.used.lock().since(node, way)
    }

    /// Waits for a node whose way has changed since it was last told of. Cancel-safe.
    pub(crate) async fn turned(&self) -> Change {
        loop {
            let next = self.used.lock().next();
            if let Some(change) = next {
                return change;
            }
            self.turned.notified().await;
        }
    }

    /// Nobody could be told of that change: it is among those that [`Paths::turned`] waits for again.
    pub(crate) fn untold(&self, change: Change) {
        self.used.lock().untold(change);
        self.turned.notify_one();
    }

    /// Whether it is bad, and the first that is.
    fn heard(&self, key: &Key, evidence: Evidence) -> bool {
        let Key { line, node } = key;
        let mut health = self.health.lock();
        let was_well = health.is_well(line, node);
        let now = Instant::now();
        let switches = health.heard(now, line, node, evidence);
        for switch in &switches {
            let only = switch.node.as_deref();
            let down = |line: &_, node: &_| health.is_down(line, node);
            let changes = self.used.lock().judge(now, only, down);
            if !changes.is_empty() {
                self.turned.notify_one();
            }
        }
        drop(health);
        for switch in switches {
            self.metrics.switched(line, &switch);
            let Switch { node, is_up } = switch;
            let (node, to) = (node.unwrap_or_default(), if is_up { "up" } else { "down" });
            tracing::info!(line, node, to, "line switched");
        }
        was_well && evidence == Evidence::Bad
    }

    /// Sets the gauges of each line.
    pub(crate) fn export(&self) {
        let health = self.health.lock();
        for line in self.policy.lines() {
            let known = health.of_line(&line.name);
            let counts = known.map_or((0, 0), |known| (known.nodes_up, known.nodes_down));
            let is_up = known.is_none_or(|known| known.is_up);
            self.metrics.stands(&line.name, is_up, counts);
        }
    }

    /// Remembers a connection of ours by that line for as long as what is returned lives.
    pub(crate) fn remember(&self, ends: Ends, line: &Arc<Line>) -> Dialled {
        let mut dialled = self.dialled.lock();
        let ours = dialled.entry(ends).or_insert_with(|| Ours {
            count: 0,
            line: Arc::clone(line),
        });
        ours.count += 1;
        drop(dialled);
        let all = Arc::clone(&self.dialled);
        Dialled { ends, all }
    }

    /// Whether a connection with these ends is one that we have dialled ourselves: rules of this machine led it back. Its
    /// line is left alone from now on.
    pub(crate) fn is_led_back(&self, ends: Ends) -> bool {
        if self.is_idle() {
            return false;
        }
        let line = self
            .dialled
            .lock()
            .get(&ends)
            .map(|ours| Arc::clone(&ours.line));
        let Some(line) = line else {
            return false;
        };
        let now = Instant::now();
        let mut health = self.health.lock();
        if health.led_back(now, &line.name) {
            let down = |line: &_, node: &_| health.is_down(line, node);
            let changes = self.used.lock().judge(now, None, down);
            if !changes.is_empty() {
                self.turned.notify_one();
            }
            drop(health);
            let line = &line.name;
            tracing::warn!(
                line,
                "what is dialled by it comes back to this server: rules of this machine don't exempt its mark"
            );
        }
        true
    }
}

/// The ends of a connection: the kernel gives one port of ours to connections to several destinations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Ends {
    from: SocketAddr,
    to: SocketAddr,
}

impl Ends {
    pub(crate) fn new(from: SocketAddr, to: SocketAddr) -> Self {
        let plain = |at: SocketAddr| SocketAddr::new(at.ip().to_canonical(), at.port());
        let (from, to) = (plain(from), plain(to));
        Self { from, to }
    }
}

/// Connections of ours with the same ends.
#[derive(Debug)]
struct Ours {
    count: usize,
    line: Arc<Line>,
}

/// A connection of ours by a line.
#[derive(Debug)]
pub(crate) struct Dialled {
    ends: Ends,
    all: Arc<Mutex<HashMap<Ends, Ours>>>,
}

impl Drop for Dialled {
    fn drop(&mut self) {
        // By two interfaces two may have the same ends.
        if let Entry::Occupied(mut ours) = self.all.lock().entry(self.ends) {
            ours.get_mut().count -= 1;
            if ours.get().count == 0 {
                ours.remove();
            }
        }
    }
}

/// Everybody else who has that address, by the configuration or in the cluster, and servers like this one.
fn others(known: Known<'_>, meant: Meant<'_>, address: IpAddr) -> Vec<Claimant> {
    let pod = meant.pod.map(|pod| pod.pod.as_str());
    let at = (address, meant.to.port);
    let mut others = known.cluster.others_at(at, meant.node, pod);
    for claim in known.routes.claims(address) {
        if claim.node != meant.node {
            let of_cluster = known.cluster.nodes().get(&claim.node);
            others.push(Claimant {
                name: format!("node {}", claim.node),
                pool: of_cluster.and_then(|node| node.pool.clone()),
                leads_back: false,
            });
        }
    }
    others.extend((known.servers)(address).map(|name| Claimant {
        name,
        pool: None,
        leads_back: true,
    }));
    others
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proto::Reason;

    use super::*;
    use crate::path::policy::Unfit;
    use crate::route::tests::entry;

    fn paths(text: &str) -> Paths {
        let config: Config = daemon::config::parse(Path::new("x.yaml"), text).unwrap();
        Paths {
            policy: Policy::new(&config),
            ..Paths::default()
        }
    }

    #[test]
    fn configured_nodes_are_dialled_at_their_addresses_and_never_by_name() {
        let paths = paths(
            "path: {default: auto}\nlines: [{name: l, networks: [10.0.0.0/8, 192.168.0.0/16]}]",
        );
        let routes = RouteTable::new(&[
            entry("edge1", None, &["10.9.0.0/16", "10.0.0.7", "192.168.1.10"]),
            entry("edge2", None, &["192.168.1.10"]),
            entry("bare", None, &[]),
        ]);
        for (node, to, wanted) in [
            ("edge1", "edge1:1", Ok("10.0.0.7")),
            ("edge1", "10.9.0.1:1", Ok("10.9.0.1")),
            (
                "edge1",
                "10.9.0.50:1",
                Err("10.9.0.50 is that of this very server, "),
            ),
            (
                "edge1",
                "192.168.1.10:1",
                Err("192.168.1.10 is also that of node edge2, "),
            ),
            (
                "edge2",
                "edge2:1",
                Err("192.168.1.10 is also that of node edge1, "),
            ),
            ("bare", "bare:1", Err("no address of it is known")),
        ] {
            let to = to.parse().unwrap();
            let meant = Meant {
                node,
                to: &to,
                pod: None,
            };
            let known = Known {
                routes: &routes,
                cluster: &ClusterTable::default(),
                servers: &|ip| (ip.to_string() == "10.9.0.50").then(|| "this very server".into()),
            };
            let decided = paths.decide(known, meant);
            match (&decided.decision, wanted) {
                (Decision::Auto(bypass), Ok(address)) => {
                    assert_eq!(bypass.address.to_string(), address, "{node} {to}");
                }
                (Decision::Tunnel, Err(_) | Ok(_)) => {
                    let why = decided
                        .unfit
                        .as_ref()
                        .map(Unfit::to_string)
                        .unwrap_or_default();
                    assert!(
                        wanted.is_err_and(|wanted| why.starts_with(wanted)),
                        "{node} {to}: {why:?}"
                    );
                }
                (other, _) => panic!("{node} {to}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_connection_of_ours_is_known_by_both_its_ends_while_it_lives() {
        let paths = paths("path: {default: auto}");
        let ends = |from: &str, to: &str| Ends::new(from.parse().unwrap(), to.parse().unwrap());
        let line = Arc::new(Line::route());
        let ours = ends("10.0.0.1:4711", "10.20.0.7:10250");
        let first = paths.remember(ours, &line);
        assert!(paths.is_led_back(ours));
        let mapped = ends("[::ffff:10.0.0.1]:4711", "[::ffff:10.20.0.7]:10250");
        assert!(paths.is_led_back(mapped));
        // Somebody else on this machine has the same port towards another destination.
        for (from, to) in [
            ("10.0.0.1:4711", "10.20.0.8:10250"),
            ("10.0.0.1:4711", "10.20.0.7:9100"),
            ("10.0.0.1:4712", "10.20.0.7:10250"),
            ("10.20.0.7:10250", "10.0.0.1:4711"),
        ] {
            assert!(!paths.is_led_back(ends(from, to)), "{from} {to}");
        }
        // The end of one does not hide another.
        let beside = paths.remember(ends("10.0.0.1:4711", "10.20.0.8:10250"), &line);
        let again = paths.remember(ours, &line);
        drop(beside);
        drop(first);
        assert!(paths.is_led_back(ours));
        drop(again);
        assert!(!paths.is_led_back(ours));
        assert!(paths.dialled.lock().is_empty());
    }

    #[test]
    fn a_failed_request_counts_where_probes_would_fail_alike_and_has_all_others_looked_at() {
        let paths = Paths::default();
        let line = Arc::new(Line::route());
        let at = |address: &str| Bypass {
            line: Arc::clone(&line),
            address: address.parse().unwrap(),
        };
        let (node, pod) = (at("10.0.0.7"), at("10.244.0.7"));
        let key = Key::new(&node, "edge1");
        let target = Target {
            bypass: node.clone(),
            port: 10250,
        };
        paths.keep(Instant::now(), HashMap::from([(key.clone(), target)]));
        let took = Duration::from_millis(3);
        let fails = |bypass: &Bypass, port, reason| {
            let failed = Failed::new(bypass, port, reason, "");
            paths.saw("edge1", bypass, port, Some(&failed), took);
            let is_suspect = std::mem::take(&mut *paths.suspects.lock()).contains(&key);
            (paths.is_down("route", "edge1"), is_suspect)
        };
        for _ in 0..5 {
            assert_eq!(fails(&node, 9100, Reason::DialTimeout), (None, true));
            assert_eq!(fails(&pod, 10250, Reason::DialUnreachable), (None, true));
            // Who refuses was reached, and what this server lacks is not the line's.
            assert_eq!(fails(&node, 10250, Reason::DialRefused), (None, false));
            assert_eq!(fails(&node, 10250, Reason::FilesExhausted), (None, false));
        }
        assert_eq!(fails(&node, 10250, Reason::DialTimeout), (None, true));
        // What works is all that is needed.
        paths.saw("edge1", &node, 9100, None, took);
        assert_eq!(fails(&node, 10250, Reason::DialTimeout), (None, true));
        let down = fails(&node, 10250, Reason::DialTimeout);
        assert_eq!(down, (Some(Down::Node), true));
        // At another address it is another node, of which nothing is known.
        let moved = Target {
            bypass: pod,
            port: 10250,
        };
        paths.keep(Instant::now(), HashMap::from([(key.clone(), moved)]));
        assert_eq!(paths.is_down("route", "edge1"), None);
        // Nobody looks at nodes that are on no line.
        paths.suspect(Key::new(&node, "edge2"));
        assert!(paths.suspects.lock().is_empty());
    }
}
