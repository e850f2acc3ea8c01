//! The registry of metrics, and those that every service has: build, process, panics, accept pauses.
//!
//! Each service defines its own metrics once, in its `metrics.rs`, and registers them here. It must not define any
//! metric of the tunnel.

use std::fmt;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit};
use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::telemetry;

/// In front of the name of every metric.
pub const PREFIX: &str = "corvid";

/// The content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All metrics of one service. Clones are the same registry.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    accept_pauses: Counter,
}

impl Metrics {
    /// A registry with what every service has; `version` is the label of `corvid_build_info`.
    pub fn new(version: &str) -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        registry.register(
            "build",
            "Version of the program that runs",
            Info::new(vec![("version".to_owned(), version.to_owned())]),
        );
        let accept_pauses = Counter::default();
        registry.register(
            "accept_pauses",
            "Pauses of an accept loop because descriptors or memory ran out",
            accept_pauses.clone(),
        );
        registry.register_collector(Box::new(Process));
        Self {
            registry: Arc::new(Mutex::new(registry)),
            accept_pauses,
        }
    }

    /// Gives access to the registry, to register metrics. Names get the prefix `corvid_`.
    pub fn register<R>(&self, register: impl FnOnce(&mut Registry) -> R) -> R {
        register(&mut self.registry.lock())
    }

    /// The counter that listeners share, for [`crate::BindOptions::pauses`].
    pub fn accept_pauses(&self) -> Counter {
        self.accept_pauses.clone()
    }

    /// All metrics in the OpenMetrics text format.
    ///
    /// # Errors
    /// A collector failed to write its metrics.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut encoded = String::new();
        text::encode(&mut encoded, &self.registry.lock())?;
        Ok(encoded)
    }
}

/// Metrics of the process, read from `/proc/self` when asked for. One that cannot be read is left out.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let panics = ConstCounter::new(telemetry::panics());
        let metric = encoder.encode_descriptor(
            "panics",
            "Panics of any thread or task since the start",
            None,
            prometheus_client::metrics::MetricType::Counter,
        )?;
        panics.encode(metric)?;
        let gauges = [
            (
                "process_open_fds",
                "Open file descriptors",
                None,
                open_fds(),
            ),
            (
                "process_max_fds",
                "Most file descriptors that may be open",
                None,
                max_fds(),
            ),
            (
                "process_resident_memory",
                "Resident memory",
                Some(Unit::Bytes),
                resident_bytes(),
            ),
        ];
        for (name, help, unit, value) in gauges {
            let Some(value) = value.and_then(|value| i64::try_from(value).ok()) else {
                continue;
            };
            let gauge = ConstGauge::new(value);
            let metric = encoder.encode_descriptor(
                name,
                help,
                unit.as_ref(),
                prometheus_client::metrics::MetricType::Gauge,
            )?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}

fn open_fds() -> Option<u64> {
    // The directory's own descriptor is among those that are counted.
    let open = std::fs::read_dir("/proc/self/fd")
        .ok()?
        .count()
        .checked_sub(1)?;
    u64::try_from(open).ok()
}

fn max_fds() -> Option<u64> {
    getrlimit(Resource::RLIMIT_NOFILE)
        .ok()
        .map(|(soft, _)| soft)
}

fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value of the metric `name`, which has no labels.
    fn value(encoded: &str, name: &str) -> u64 {
        let found = encoded
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found
            .unwrap_or_else(|| panic!("{name} is missing:\n{encoded}"))
            .parse()
            .unwrap()
    }

    #[test]
    fn every_service_has_the_metrics_of_its_process() {
        let encoded = Metrics::new("1.2.3").encode().unwrap();
        assert!(
            encoded.contains("corvid_build_info{version=\"1.2.3\"} 1\n"),
            "{encoded}"
        );
        assert!(encoded.ends_with("# EOF\n"), "{encoded}");
        assert_eq!(value(&encoded, "corvid_accept_pauses_total"), 0);
        value(&encoded, "corvid_panics_total");
        assert!(value(&encoded, "corvid_process_resident_memory_bytes") > 1 << 20);
        let open = value(&encoded, "corvid_process_open_fds");
        assert!(
            open >= 3 && open <= value(&encoded, "corvid_process_max_fds"),
            "{encoded}"
        );
    }

    #[test]
    fn metrics_of_the_service_are_registered_under_the_prefix() {
        let metrics = Metrics::new("0");
        let streams = Counter::<u64>::default();
        metrics
            .register(|registry| registry.register("streams", "Streams opened", streams.clone()));
        streams.inc_by(3);
        metrics.accept_pauses().inc();
        let encoded = metrics.encode().unwrap();
        assert_eq!(value(&encoded, "corvid_streams_total"), 3);
        assert_eq!(value(&encoded, "corvid_accept_pauses_total"), 1);
    }
}
