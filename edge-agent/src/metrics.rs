//! Every metric of the agent, once. Names get the prefix `corvid_`; labels come from closed enums only.

use std::fmt;
use std::sync::Arc;

use certs::Clock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry as Metrics, Unit};
use proto::{Budget, Reason};

use crate::enroll::Expiry;
use crate::files::Files;
use crate::registry::Registry;

/// How something ended: a reason's label, or `finished`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ReasonLabel {
    reason: &'static str,
}

impl ReasonLabel {
    /// An end that is no failure.
    pub(crate) const FINISHED: Self = Self { reason: "finished" };
}

impl From<Reason> for ReasonLabel {
    fn from(reason: Reason) -> Self {
        Self {
            reason: reason.label(),
        }
    }
}

/// Which way bytes went.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct DirectionLabel {
    direction: &'static str,
}

impl DirectionLabel {
    /// Towards the destination.
    pub(crate) const UPSTREAM: Self = Self {
        direction: "upstream",
    };
    /// Towards the requester.
    pub(crate) const DOWNSTREAM: Self = Self {
        direction: "downstream",
    };
}

/// Whether something was done.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ResultLabel {
    result: &'static str,
}

impl ResultLabel {
    pub(crate) const OK: Self = Self { result: "ok" };
    pub(crate) const ERROR: Self = Self { result: "error" };
}

/// What is counted as it happens. Clones share the counts.
#[derive(Debug, Clone)]
pub(crate) struct AgentMetrics {
    pub(crate) sessions_opened: Counter,
    pub(crate) session_ends: Family<ReasonLabel, Counter>,
    pub(crate) reconnects: Family<ReasonLabel, Counter>,
    pub(crate) streams: Family<ReasonLabel, Counter>,
    pub(crate) bytes: Family<DirectionLabel, Counter>,
    pub(crate) dial_seconds: Histogram,
    pub(crate) reloads: Family<ResultLabel, Counter>,
    pub(crate) renewals: Family<ResultLabel, Counter>,
}

impl AgentMetrics {
    pub(crate) fn new() -> Self {
        Self {
            sessions_opened: Counter::default(),
            session_ends: Family::default(),
            reconnects: Family::default(),
            streams: Family::default(),
            bytes: Family::default(),
            // 0.5 ms (loopback) to 16 s (above the longest dial).
            dial_seconds: Histogram::new(exponential_buckets(0.0005, 2.0, 16)),
            reloads: Family::default(),
            renewals: Family::default(),
        }
    }

    pub(crate) fn register(&self, registry: &mut Metrics, gauges: Gauges) {
        registry.register(
            "sessions_opened",
            "Sessions opened",
            self.sessions_opened.clone(),
        );
        registry.register(
            "session_ends",
            "Sessions ended, by reason",
            self.session_ends.clone(),
        );
        registry.register(
            "reconnects",
            "Attempts to reach a server after a failure or an end, by its reason",
            self.reconnects.clone(),
        );
        registry.register("streams", "Streams ended, by reason", self.streams.clone());
        registry.register_with_unit(
            "stream",
            "Bytes of streams, by direction",
            Unit::Bytes,
            self.bytes.clone(),
        );
        registry.register_with_unit(
            "dial",
            "Time to connect to a destination",
            Unit::Seconds,
            self.dial_seconds.clone(),
        );
        registry.register(
            "config_reloads",
            "Reloads of configuration or certificates, by result",
            self.reloads.clone(),
        );
        registry.register(
            "renewals",
            "Certificate renewals, by result",
            self.renewals.clone(),
        );
        registry.register_collector(Box::new(gauges));
    }
}

/// What is looked up when somebody asks.
#[derive(Debug)]
pub(crate) struct Gauges {
    pub(crate) registry: Arc<Registry>,
    pub(crate) budget: Budget,
    pub(crate) files: Files,
    pub(crate) clock: Clock,
    pub(crate) expiry: Expiry,
}

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let sessions = self.registry.all();
        let suspect = sessions.iter().filter(|live| live.is_suspect()).count();
        let over_lines = sessions.iter().filter(|live| live.line().is_some());
        let streams: usize = sessions.iter().map(|live| live.streams()).sum();
        let stats: Vec<_> = sessions.iter().map(|live| live.stats()).collect();
        let lost: u64 = stats.iter().map(|s| s.lost_packets).sum();
        let rtt = stats
            .iter()
            .map(|s| s.rtt.as_secs_f64())
            .fold(0.0, f64::max);
        let mtu = stats.iter().map(|s| s.mtu).min().unwrap_or(0);
        let whole: [(&str, &str, Option<Unit>, i64); 10] = [
            (
                "sessions",
                "Sessions that are up",
                None,
                signed(sessions.len()),
            ),
            (
                "sessions_over_lines",
                "Sessions that are up over dedicated lines",
                None,
                signed(over_lines.count()),
            ),
            (
                "sessions_suspect",
                "Sessions that are silent",
                None,
                signed(suspect),
            ),
            (
                "streams_open",
                "Streams that are open",
                None,
                signed(streams),
            ),
            (
                "sessions_lost_packets",
                "Packets lost in the sessions that are up",
                None,
                signed(lost),
            ),
            (
                "session_mtu",
                "Smallest path MTU of a session",
                Some(Unit::Bytes),
                i64::from(mtu),
            ),
            (
                "budget_held",
                "Most that stopped readers may hold now",
                Some(Unit::Bytes),
                signed(self.budget.held()),
            ),
            (
                "stream_descriptors",
                "Descriptors taken by streams",
                None,
                signed(self.files.taken()),
            ),
            (
                "clock_skew",
                "Server's time minus this host's",
                Some(Unit::Seconds),
                self.clock.skew_seconds(),
            ),
            (
                "certificate_expiry_timestamp",
                "When the agent's certificate ends, Unix time; 0 without one",
                Some(Unit::Seconds),
                signed(self.expiry.seconds()),
            ),
        ];
        for (name, help, unit, value) in whole {
            let metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            ConstGauge::new(value).encode(metric)?;
        }
        let help = "Longest round trip of a session";
        let unit = Some(&Unit::Seconds);
        let metric = encoder.encode_descriptor("session_rtt", help, unit, MetricType::Gauge)?;
        ConstGauge::new(rtt).encode(metric)
    }
}

fn signed(value: impl TryInto<i64>) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}
