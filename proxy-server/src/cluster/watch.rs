//! Follows the nodes for ever: list, watch, resume, and begin anew where nothing else helps. Changes are gathered for a
//! moment before a table is made of them; heartbeats change nothing that is kept and make none.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::Api;
use kube::client::Client;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::time::{Instant, sleep, sleep_until};

use super::client::Source;
use super::nodes::{AGENT, Node, Nodes, Watched};
use super::pace::Pace;
use super::{Cluster, ClusterTable};
use crate::config::Kubernetes;

/// Nodes a page: some 10 MB of JSON at most, and 20 requests for 10,000 nodes.
const PAGE: u32 = 500;
/// A watch is asked to last so long: its renewal is the sign of life of a cluster in which nothing happens.
pub(super) const WATCH_SECONDS: u32 = 60;
/// Silence after which a connection is dead: two renewals did not come about.
pub(super) const SILENCE: Duration = Duration::from_secs(150);
/// Changes are gathered so long: a table of 10,000 nodes takes milliseconds, and nodes often change together.
const GATHER: Duration = Duration::from_millis(100);
/// Pauses after failures: random below a ceiling that doubles.
pub(super) const LEAST_PAUSE: Duration = Duration::from_millis(200);
pub(super) const MOST_PAUSE: Duration = Duration::from_secs(10);
/// Failures in a row after which the credential is read and all nodes are listed anew.
const MOST_FAILURES: u32 = 8;

/// What follows the nodes.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) source: Source,
    pub(crate) settings: Kubernetes,
}

/// Failures since a watch was last opened.
#[derive(Debug, Default)]
pub(super) struct Failures {
    row: u32,
    last: Option<Instant>,
}

impl Failures {
    pub(super) fn add(&mut self, followed: Option<Instant>) {
        if followed > self.last {
            self.row = 0;
        }
        self.row = self.row.saturating_add(1);
        self.last = Some(Instant::now());
    }

    /// So many in a row that resuming has no prospect.
    pub(super) const fn is_many(&self) -> bool {
        self.row >= MOST_FAILURES
    }

    pub(super) fn pause(&self) -> Duration {
        let ceiling = LEAST_PAUSE
            .saturating_mul(1 << self.row.min(10))
            .min(MOST_PAUSE);
        LEAST_PAUSE + (ceiling - LEAST_PAUSE).mul_f64(rand::random())
    }
}

impl Watch {
    /// For ever.
    #[expect(clippy::infinite_loop, reason = "ended by being dropped")]
    pub(crate) async fn run(self) -> Infallible {
        let (mut failures, pace) = (Failures::default(), Pace::default());
        loop {
            match self.source.connect(&self.cluster).await {
                Ok(client) => {
                    let cluster = Arc::clone(&self.cluster);
                    let client = pace.of(client, move || cluster.followed());
                    self.follow(client, &mut failures).await;
                }
                Err(error) => self.fail(&mut failures, daemon::chain(&error).to_string()),
            }
            sleep(failures.pause()).await;
        }
    }

    fn fail(&self, failures: &mut Failures, why: String) {
        failures.add(self.cluster.freshness().followed);
        self.cluster.failed(why);
    }

    /// Lists and watches until that must begin anew.
    pub(super) async fn follow(&self, client: Client, failures: &mut Failures) {
        let settings = watcher::Config::default()
            .page_size(PAGE)
            .timeout(WATCH_SECONDS);
        let mut events = pin!(watcher(Api::<Watched>::all(client), settings));
        let mut view = View::new(&self.cluster.table(), &self.settings);
        let began = Instant::now();
        let mut publish_at = None;
        loop {
            let heard = self
                .cluster
                .freshness()
                .answered
                .map_or(began, |at| at.max(began));
            let event = tokio::select! {
                event = events.next() => event,
                () = sleep_until(publish_at.unwrap_or(began)), if publish_at.is_some() => {
                    publish_at = None;
                    self.cluster.publish(view.nodes.clone());
                    continue;
                }
                () = sleep_until(heard + SILENCE) => {
                    if self.cluster.freshness().answered.is_some_and(|at| at > heard) {
                        continue;
                    }
                    self.fail(failures, "kube-apiserver says nothing".to_owned());
                    return;
                }
            };
            match event {
                Some(Ok(event)) => match view.take(event) {
                    Change::None => {}
                    Change::Some => {
                        publish_at.get_or_insert_with(|| Instant::now() + GATHER);
                    }
                    Change::All => {
                        publish_at = None;
                        self.cluster.publish(view.nodes.clone());
                        self.cluster.synced();
                        tracing::info!(
                            nodes = view.nodes.len(),
                            "all nodes of the cluster were read"
                        );
                    }
                },
                Some(Err(error)) => {
                    if publish_at.take().is_some() {
                        self.cluster.publish(view.nodes.clone());
                    }
                    self.fail(failures, error.to_string());
                    if failures.is_many() || begins_anew(&error) {
                        return;
                    }
                    sleep(failures.pause()).await;
                }
                None => return,
            }
        }
    }
}

/// Whether resuming would fail for ever, or needs another credential.
pub(super) fn begins_anew(error: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(kube::Error::Api(status))
    | watcher::Error::WatchStartFailed(kube::Error::Api(status))) = error
    else {
        return false;
    };
    // Gone: the version is too old. 504: it is "too large", which is what a restored etcd makes of it.
    matches!(status.code, 401 | 403 | 410 | 504)
}

/// What an event means for the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    None,
    Some,
    All,
}

/// The nodes as the watch has them.
#[derive(Debug)]
struct View<'a> {
    nodes: Nodes,
    /// Those of a list that is not complete yet.
    listed: Option<Nodes>,
    settings: &'a Kubernetes,
}

impl<'a> View<'a> {
    fn new(table: &ClusterTable, settings: &'a Kubernetes) -> Self {
        Self {
            nodes: table.nodes().clone(),
            listed: None,
            settings,
        }
    }

    fn take(&mut self, event: Event<Watched>) -> Change {
        match event {
            Event::Init => {
                self.listed = Some(Nodes::new());
                Change::None
            }
            Event::InitApply(watched) => {
                let listed = self.listed.get_or_insert_default();
                if let Some(node) = Node::trim(watched, self.settings) {
                    say_misnamed(&self.nodes, &node);
                    listed.insert(node.name.clone(), Arc::new(node));
                }
                Change::None
            }
            Event::InitDone => {
                self.nodes = self.listed.take().unwrap_or_default();
                Change::All
            }
            Event::Apply(watched) => {
                let Some(node) = Node::trim(watched, self.settings) else {
                    return Change::None;
                };
                if self
                    .nodes
                    .get(&node.name)
                    .is_some_and(|known| **known == node)
                {
                    return Change::None;
                }
                say_misnamed(&self.nodes, &node);
                self.nodes.insert(node.name.clone(), Arc::new(node));
                Change::Some
            }
            Event::Delete(watched) => {
                let name = kube::Resource::meta(&watched).name.as_ref();
                match name.and_then(|name| self.nodes.remove(name)) {
                    Some(_gone) => Change::Some,
                    None => Change::None,
                }
            }
        }
    }
}

/// Once until it changes: a node is heard of with each of its heartbeats.
fn say_misnamed(known: &Nodes, node: &Node) {
    let Some(agent) = &node.misnamed else { return };
    let before = known.get(&node.name);
    if before.is_none_or(|before| before.misnamed != node.misnamed) {
        let node = &node.name;
        tracing::warn!(
            node,
            agent,
            "annotation {AGENT} has no agent's name and is not used"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use parking_lot::Mutex;
    use serde_json::json;

    use super::*;

    fn watched(name: &str, ready: &str) -> Watched {
        let status =
            json!({"conditions": [{"type": "Ready", "status": ready, "lastHeartbeatTime": "x"}]});
        serde_json::from_value(json!({"metadata": {"name": name}, "status": status})).unwrap()
    }

    #[test]
    fn a_list_counts_once_it_is_complete_and_heartbeats_change_nothing() {
        let settings = Kubernetes::default();
        let mut view = View::new(&ClusterTable::default(), &settings);
        let names = |view: &View<'_>| view.nodes.keys().cloned().collect::<Vec<_>>();
        assert_eq!(view.take(Event::Init), Change::None);
        view.take(Event::InitApply(watched("a", "True")));
        assert_eq!(view.take(Event::InitDone), Change::All);
        assert_eq!(view.take(Event::Apply(watched("a", "True"))), Change::None);
        assert_eq!(
            view.take(Event::Apply(watched("a", "Unknown"))),
            Change::Some
        );
        assert_eq!(view.take(Event::Apply(watched("b", "True"))), Change::Some);
        // A list that fails half-way and begins again.
        view.take(Event::Init);
        view.take(Event::InitApply(watched("c", "True")));
        assert_eq!(names(&view), ["a", "b"]);
        view.take(Event::Init);
        view.take(Event::InitApply(watched("b", "True")));
        assert_eq!(names(&view), ["a", "b"]);
        assert_eq!(view.take(Event::InitDone), Change::All);
        assert_eq!(names(&view), ["b"]);
        assert_eq!(view.take(Event::Delete(watched("a", "True"))), Change::None);
        assert_eq!(view.take(Event::Delete(watched("b", "True"))), Change::Some);
        assert!(names(&view).is_empty());
    }

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_kubelet_writes_as_its_agent_fills_no_log() {
        let log = Log::default();
        let sink = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || sink.clone())
            .finish();
        let claiming = |ready: &str| {
            let mut node = watched("a", ready);
            let annotations = [(AGENT.to_owned(), "no name\n".repeat(10_000))];
            kube::Resource::meta_mut(&mut node).annotations = Some(annotations.into());
            node
        };
        tracing::subscriber::with_default(subscriber, || {
            let settings = Kubernetes::default();
            let mut view = View::new(&ClusterTable::default(), &settings);
            for _ in 0..10 {
                view.take(Event::Init);
                view.take(Event::InitApply(claiming("True")));
                view.take(Event::InitDone);
                view.take(Event::Apply(claiming("True")));
                view.take(Event::Apply(claiming("False")));
            }
        });
        let said = String::from_utf8(log.0.lock().clone()).unwrap();
        assert_eq!(said.lines().count(), 1, "{} bytes", said.len());
        assert!(said.contains(AGENT) && said.len() < 1000, "{said}");
    }

    #[test]
    fn pauses_grow_and_a_watch_ends_the_row() {
        let mut failures = Failures::default();
        for _ in 0..20 {
            failures.add(None);
            assert!(failures.pause() >= LEAST_PAUSE && failures.pause() <= MOST_PAUSE);
        }
        assert_eq!(failures.row, 20);
        let followed = Instant::now() + Duration::from_secs(1);
        failures.add(Some(followed));
        assert_eq!(failures.row, 1);
    }
}
