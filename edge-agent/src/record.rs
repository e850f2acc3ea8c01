//! One access-log line and the counters of a stream, when its record is dropped: however the stream ends.

use std::net::SocketAddr;
use std::sync::Arc;

use proto::{Counters, Destination, Reason, RelayEnd};
use tokio::time::Instant;

use crate::metrics::{AgentMetrics, DirectionLabel, ReasonLabel};
use crate::session::Live;

/// What there is to say of one stream.
#[derive(Debug)]
pub(crate) struct Record {
    metrics: AgentMetrics,
    session: Option<Arc<Live>>,
    started: Instant,
    counters: Arc<Counters>,
    destination: Option<Destination>,
    dialled: Option<(SocketAddr, std::time::Duration)>,
    trace: String,
    end: Option<Result<(), (Reason, String)>>,
}

impl Record {
    pub(crate) fn new(metrics: AgentMetrics, session: Option<Arc<Live>>) -> Self {
        Self {
            metrics,
            session,
            started: Instant::now(),
            counters: Arc::default(),
            destination: None,
            dialled: None,
            trace: String::new(),
            end: None,
        }
    }

    pub(crate) fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    pub(crate) fn asked(&mut self, destination: &Destination, trace: &str) {
        self.destination = Some(destination.clone());
        trace.clone_into(&mut self.trace);
    }

    pub(crate) fn dialled(&mut self, address: SocketAddr, since: Instant) {
        let took = since.elapsed();
        self.metrics.dial_seconds.observe(took.as_secs_f64());
        self.dialled = Some((address, took));
    }

    pub(crate) fn failed(&mut self, reason: Reason, detail: &str) {
        self.end = Some(Err((reason, detail.to_owned())));
    }

    pub(crate) fn relayed(&mut self, end: RelayEnd) {
        self.end = Some(match end {
            RelayEnd::Finished => Ok(()),
            RelayEnd::Cut(reason) => Err((reason, String::new())),
        });
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let end = self.end.take().unwrap_or_else(|| {
            // Nobody said how it ended: the task broke, or was cut.
            let reason = if std::thread::panicking() {
                Reason::Internal
            } else {
                Reason::Cancelled
            };
            Err((reason, String::new()))
        });
        let (label, detail) = match &end {
            Ok(()) => (ReasonLabel::FINISHED, ""),
            Err((reason, detail)) => (ReasonLabel::from(*reason), detail.as_str()),
        };
        let reason = end
            .as_ref()
            .map_or_else(|(reason, _)| reason.label(), |()| "finished");
        self.metrics.streams.get_or_create(&label).inc();
        let (down, up) = (self.counters.sent(), self.counters.received());
        self.metrics
            .bytes
            .get_or_create(&DirectionLabel::DOWNSTREAM)
            .inc_by(down);
        self.metrics
            .bytes
            .get_or_create(&DirectionLabel::UPSTREAM)
            .inc_by(up);
        let session = self.session.as_ref().map(|live| live.id());
        let server = self.session.as_ref().map(|live| live.server().as_str());
        let line = self.session.as_ref().and_then(|live| live.line());
        let destination = self.destination.as_ref().map(tracing::field::display);
        let dialled = self
            .dialled
            .as_ref()
            .map(|(address, _)| tracing::field::display(address));
        let dial_ms = self.dialled.map(|(_, took)| millis(took));
        let duration_ms = millis(self.started.elapsed());
        let detail = Some(detail).filter(|detail| !detail.is_empty());
        let trace = Some(self.trace.as_str()).filter(|trace| !trace.is_empty());
        tracing::info!(
            target: "access",
            server, session, line, destination, dialled, dial_ms, reason, detail,
            bytes_up = up, bytes_down = down, duration_ms, trace,
            "stream ended"
        );
    }
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
