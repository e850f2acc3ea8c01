//! Every metric of a proxy-server, with its unit and help. Labels come from closed sets; node names are none.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use proto::Reason;

use crate::path::health::Switch;
use crate::record::{Outcome, Path};

/// A reason, or "ok".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OutcomeLabel(pub Outcome);

impl EncodeLabelValue for OutcomeLabel {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.0.label(), encoder)
    }
}

/// Labels of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StreamLabels {
    /// Which frontend.
    pub frontend: &'static str,
    /// tunnel, direct or none.
    pub path: &'static str,
    /// ok, or why not.
    pub reason: OutcomeLabel,
}

/// Labels of a session's end.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabels {
    /// Why.
    pub reason: &'static str,
}

impl From<Reason> for ReasonLabels {
    fn from(reason: Reason) -> Self {
        let reason = reason.label();
        Self { reason }
    }
}

/// Labels of bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DirectionLabels {
    /// `to_edge` or `from_edge`.
    pub direction: &'static str,
}

/// Labels of a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CertificateLabels {
    /// `ca` or `server`.
    pub certificate: &'static str,
}

/// Labels of what may work or not.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ResultLabels {
    /// `ok` or `error`.
    pub result: &'static str,
}

/// Labels of a count of nodes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct NodeLabels {
    /// `all`, `ready` or `edge`.
    pub kind: &'static str,
}

/// What is known of the cluster; registered only where Kubernetes is asked.
#[derive(Debug, Clone, Default)]
pub struct ClusterMetrics {
    /// 1 once all nodes were read.
    pub synced: Gauge,
    /// Seconds since kube-apiserver last answered, -1 if it never did.
    pub age: Gauge,
    /// Nodes.
    pub nodes: Family<NodeLabels, Gauge>,
    /// Lists and watches that failed.
    pub failures: Counter,
}

impl ClusterMetrics {
    /// Registers them.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "cluster_synced",
            "Whether all nodes of the cluster were read once",
            self.synced.clone(),
        );
        registry.register_with_unit(
            "cluster_age",
            "Since kube-apiserver last answered, -1 if it never did",
            Unit::Seconds,
            self.age.clone(),
        );
        registry.register(
            "cluster_nodes",
            "Nodes of the cluster: all, ready, and those at the edge by label, annotation or pool",
            self.nodes.clone(),
        );
        registry.register(
            "cluster_failures",
            "Lists and watches of nodes that failed",
            self.failures.clone(),
        );
    }
}

/// Labels of a write to the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct WriteLabels {
    /// `ok`, `conflict`, `missing`, `refused`, `unavailable`; of the DNS map also `no_service`, `headless_service` or `too_large`.
    pub result: &'static str,
}

/// What is written to the cluster; registered only where something is.
#[derive(Debug, Clone, Default)]
pub struct DnsMetrics {
    /// 1 on the server that leads.
    pub leader: Gauge,
    /// Writes, and what failed before it came to one.
    pub writes: Family<WriteLabels, Counter>,
    /// Seconds since the map was last seen to be as it should, -1 where that is not known.
    pub age: Gauge,
}

impl DnsMetrics {
    /// Registers them.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "leader",
            "Whether this server leads, and so writes to the cluster",
            self.leader.clone(),
        );
        registry.register(
            "dns_writes",
            "Writes of the DNS map, by result; failures before it came to one among them",
            self.writes.clone(),
        );
        registry.register_with_unit(
            "dns_age",
            "Since the leader last saw the DNS map as it should be, -1 if it has not and on servers that do not lead",
            Unit::Seconds,
            self.age.clone(),
        );
    }
}

/// Events on Nodes; registered only where any are told.
#[derive(Debug, Clone, Default)]
pub struct EventMetrics {
    /// Events, told or not.
    pub told: Family<WriteLabels, Counter>,
}

impl EventMetrics {
    /// Registers them.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "node_events",
            "Events on Nodes whose path has changed: ok, or why kube-apiserver did not take them",
            self.told.clone(),
        );
    }
}

/// Labels of sessions with other servers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PeerLabels {
    /// `dialled`, to forward to, or `accepted`, to be asked.
    pub side: &'static str,
}

/// What happens between servers; registered only where there are several.
#[derive(Debug, Clone, Default)]
pub struct PeerMetrics {
    /// Addresses of other servers.
    pub members: Gauge,
    /// Sessions now.
    pub sessions: Family<PeerLabels, Gauge>,
    /// Ended sessions.
    pub ended: Family<ReasonLabels, Counter>,
    /// Dials and visitors that did not become a session.
    pub refused: Family<ReasonLabels, Counter>,
    /// Agents with a session at another server.
    pub agents: Gauge,
    /// Announcements written.
    pub announced: Counter,
    /// Announcements read.
    pub heard: Counter,
    /// Headers of other servers that were refused.
    pub bad_headers: Counter,
    /// Attempts that led to another one.
    pub retries: Family<ReasonLabels, Counter>,
}

impl PeerMetrics {
    /// Registers them.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "peer_members",
            "Addresses of other servers, as configured or known from Kubernetes",
            self.members.clone(),
        );
        registry.register(
            "peer_sessions",
            "Sessions with other servers now, by side",
            self.sessions.clone(),
        );
        registry.register(
            "peer_sessions_ended",
            "Ended sessions with other servers, by why",
            self.ended.clone(),
        );
        registry.register(
            "peer_sessions_refused",
            "Dials of other servers and visits by them that did not become a session, by why",
            self.refused.clone(),
        );
        registry.register(
            "peer_agents",
            "Agents that other servers have announced a session of, each server's counted",
            self.agents.clone(),
        );
        registry.register(
            "peer_announcements_sent",
            "Announcements sent to other servers",
            self.announced.clone(),
        );
        registry.register(
            "peer_announcements_received",
            "Announcements received from other servers",
            self.heard.clone(),
        );
        registry.register(
            "peer_headers_refused",
            "Streams of other servers whose header was garbage, or of another hop count than one",
            self.bad_headers.clone(),
        );
        registry.register(
            "tunnel_retries",
            "Attempts to open a stream that made another way be tried, by why",
            self.retries.clone(),
        );
    }
}

/// Labels of what a line did.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct LineLabels {
    /// Its name: one of the configuration, or `route`.
    pub line: String,
    /// What became of it.
    pub result: &'static str,
}

/// Labels of a line.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OfLineLabels {
    /// Its name.
    pub line: String,
}

/// Labels of a verdict that has changed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SwitchLabels {
    /// The line.
    pub line: String,
    /// `node` or `line`.
    pub of: &'static str,
    /// `up` or `down`.
    pub to: &'static str,
}

/// Labels of a count of nodes on a line.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OnLineLabels {
    /// The line.
    pub line: String,
    /// `up` or `down`.
    pub state: &'static str,
}

/// Labels of a way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct WayLabels {
    /// tunnel, peer or direct.
    pub path: &'static str,
    /// The line, where it is dialled by one.
    pub line: String,
}

/// What happens past the tunnel; registered only where a node may be reached so.
#[derive(Debug, Clone)]
pub struct LineMetrics {
    /// Dials of requests.
    pub dials: Family<LineLabels, Counter>,
    /// How long those took that connected.
    pub took: Family<OfLineLabels, Histogram, fn() -> Histogram>,
    /// Probes.
    pub probes: Family<LineLabels, Counter>,
    /// Whether a line as a whole is up.
    pub up: Family<OfLineLabels, Gauge>,
    /// Nodes that are probed.
    pub nodes: Family<OnLineLabels, Gauge>,
    /// Verdicts that have changed.
    pub switches: Family<SwitchLabels, Counter>,
}

impl Default for LineMetrics {
    fn default() -> Self {
        Self {
            dials: Family::default(),
            took: Family::new_with_constructor(dial_seconds),
            probes: Family::default(),
            up: Family::default(),
            nodes: Family::default(),
            switches: Family::default(),
        }
    }
}

impl LineMetrics {
    /// Registers them.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "line_dials",
            "Dials of requests by lines: ok, lost where the tunnel answered first, or why there was no connection",
            self.dials.clone(),
        );
        registry.register_with_unit(
            "line_dial",
            "Dials of requests by lines that connected",
            Unit::Seconds,
            self.took.clone(),
        );
        registry.register(
            "line_probes",
            "Probes of nodes on lines: ok, or why there was no connection",
            self.probes.clone(),
        );
        registry.register(
            "line_up",
            "Whether the line as a whole is taken",
            self.up.clone(),
        );
        registry.register(
            "line_nodes",
            "Nodes on the line that are probed, by whether they are taken to work",
            self.nodes.clone(),
        );
        registry.register(
            "line_switches",
            "Verdicts on nodes and lines that have changed",
            self.switches.clone(),
        );
    }

    /// Counts a dial of a request.
    pub fn dialled(&self, line: &str, result: &'static str) {
        let line = line.to_owned();
        self.dials.get_or_create(&LineLabels { line, result }).inc();
    }

    /// Counts a dial that connected.
    pub(crate) fn connected(&self, line: &str, took: Duration) {
        self.dialled(line, "ok");
        let line = line.to_owned();
        let took_so_far = self.took.get_or_create(&OfLineLabels { line });
        took_so_far.observe(took.as_secs_f64());
    }

    /// Counts a probe.
    pub(crate) fn probed(&self, line: &str, result: &'static str) {
        let line = line.to_owned();
        let labels = LineLabels { line, result };
        self.probes.get_or_create(&labels).inc();
    }

    /// Counts a verdict that has changed.
    pub(crate) fn switched(&self, line: &str, switch: &Switch) {
        let labels = SwitchLabels {
            line: line.to_owned(),
            of: if switch.node.is_some() {
                "node"
            } else {
                "line"
            },
            to: if switch.is_up { "up" } else { "down" },
        };
        self.switches.get_or_create(&labels).inc();
    }

    /// Sets what a line is like now.
    pub(crate) fn stands(&self, line: &str, is_up: bool, (up, down): (usize, usize)) {
        let of_line = OfLineLabels {
            line: line.to_owned(),
        };
        self.up.get_or_create(&of_line).set(is_up.into());
        for (state, count) in [("up", up), ("down", down)] {
            let line = line.to_owned();
            let gauge = self.nodes.get_or_create(&OnLineLabels { line, state });
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
}

/// 1 ms to 15 s, where the dial gives up.
fn dial_seconds() -> Histogram {
    Histogram::new([
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0,
    ])
}

/// The metrics. Clones are handles to the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Ended streams.
    pub streams: Family<StreamLabels, Counter>,
    /// Streams now.
    pub streams_open: Gauge,
    /// Bytes relayed.
    pub bytes: Family<DirectionLabels, Counter>,
    /// From the request to the destination's answer: until its stream is open.
    pub dial: Family<WayLabels, Histogram, fn() -> Histogram>,
    /// Sessions now.
    pub sessions: Gauge,
    /// Those of them over a dedicated line. Agents name their lines, so the names are no labels.
    pub sessions_over_lines: Gauge,
    /// Ended sessions.
    pub sessions_ended: Family<ReasonLabels, Counter>,
    /// Peers that did not become a session.
    pub sessions_refused: Family<ReasonLabels, Counter>,
    /// Requesters that never came to ask.
    pub requesters_refused: Family<ReasonLabels, Counter>,
    /// When certificates expire.
    pub expiry: Family<CertificateLabels, Gauge>,
    /// Roots that are trusted.
    pub roots: Gauge,
    /// Attempts to follow the authority where it is kept that failed.
    pub authority_failures: Counter,
    /// Configuration reloads.
    pub reloads: Family<ResultLabels, Counter>,
    /// Bytes that stopped readers may hold.
    pub held: Gauge,
}

impl Metrics {
    /// Registers all of them.
    #[must_use]
    pub fn new(daemon: &daemon::Metrics) -> Arc<Self> {
        let metrics = Self {
            streams: Family::default(),
            streams_open: Gauge::default(),
            bytes: Family::default(),
            dial: Family::new_with_constructor(dial_seconds),
            sessions: Gauge::default(),
            sessions_over_lines: Gauge::default(),
            sessions_ended: Family::default(),
            sessions_refused: Family::default(),
            requesters_refused: Family::default(),
            expiry: Family::default(),
            roots: Gauge::default(),
            authority_failures: Counter::default(),
            reloads: Family::default(),
            held: Gauge::default(),
        };
        // There before anybody asks for anything, as what counts nothing yet is.
        let tunnel = WayLabels {
            path: Path::Tunnel.label(),
            line: String::new(),
        };
        drop(metrics.dial.get_or_create(&tunnel));
        daemon.register(|registry| metrics.register(registry));
        Arc::new(metrics)
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            "streams",
            "Ended streams, by how they ended",
            self.streams.clone(),
        );
        registry.register(
            "streams_open",
            "Streams open now",
            self.streams_open.clone(),
        );
        registry.register_with_unit(
            "stream",
            "Bytes relayed, by direction",
            Unit::Bytes,
            self.bytes.clone(),
        );
        registry.register_with_unit(
            "dial",
            "From a request to the destination's answer, by the way that it took and the line, where it was dialled by one",
            Unit::Seconds,
            self.dial.clone(),
        );
        registry.register("sessions", "Sessions of agents now", self.sessions.clone());
        registry.register(
            "sessions_over_lines",
            "Sessions of agents now that go over a dedicated line, by the agents' word",
            self.sessions_over_lines.clone(),
        );
        registry.register(
            "sessions_ended",
            "Ended sessions, by why",
            self.sessions_ended.clone(),
        );
        registry.register(
            "sessions_refused",
            "Peers that did not become a session, by why",
            self.sessions_refused.clone(),
        );
        registry.register(
            "requesters_refused",
            "Requesters whose TLS handshake failed, by why",
            self.requesters_refused.clone(),
        );
        registry.register(
            "certificate_expiry_timestamp_seconds",
            "When the certificate expires, Unix time",
            self.expiry.clone(),
        );
        registry.register(
            "authority_roots",
            "Roots that are trusted: more than one while the authority is rotated",
            self.roots.clone(),
        );
        registry.register(
            "authority_failures",
            "Attempts to follow the authority where it is kept that failed",
            self.authority_failures.clone(),
        );
        registry.register(
            "config_reloads",
            "Reloads of configuration or certificates, by result",
            self.reloads.clone(),
        );
        registry.register_with_unit(
            "stopped_readers_held",
            "Bytes that stopped readers may hold, of the memory budget",
            Unit::Bytes,
            self.held.clone(),
        );
    }

    /// Counts a peer that did not become a session.
    pub fn refused(&self, reason: Reason) {
        self.sessions_refused.get_or_create(&reason.into()).inc();
    }

    /// Counts a requester whose TLS handshake failed.
    pub fn requester_refused(&self, reason: Reason) {
        self.requesters_refused.get_or_create(&reason.into()).inc();
    }

    /// Counts an ended stream.
    pub fn stream(&self, frontend: &'static str, path: Path, outcome: Outcome) {
        let labels = StreamLabels {
            frontend,
            path: path.label(),
            reason: OutcomeLabel(outcome),
        };
        self.streams.get_or_create(&labels).inc();
    }

    /// A stream is open.
    pub(crate) fn opened(&self, path: Path, line: Option<&str>, took: Duration) {
        let labels = WayLabels {
            path: path.label(),
            line: line.unwrap_or_default().to_owned(),
        };
        self.dial.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Counts bytes.
    pub fn moved(&self, to_edge: u64, from_edge: u64) {
        self.bytes
            .get_or_create(&DirectionLabels {
                direction: "to_edge",
            })
            .inc_by(to_edge);
        self.bytes
            .get_or_create(&DirectionLabels {
                direction: "from_edge",
            })
            .inc_by(from_edge);
    }

    /// Counts a reload.
    pub fn reloaded(&self, worked: bool) {
        let result = if worked { "ok" } else { "error" };
        self.reloads.get_or_create(&ResultLabels { result }).inc();
    }
}
