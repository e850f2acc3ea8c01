//! Lets out what must not wait for the congestion window: the probe of a line that may be back, and a close.
//!
//! quinn counts both against the window like any data. A sender that had data in flight when its line was cut has a full
//! window for as long as nothing is acknowledged, so it could neither probe before its doubled time-outs are over nor
//! say that it closes. As it hears of acknowledgements, it also knows what they say of the line. [`Headroom`] widens the window by what these need; the first acknowledgement takes it back.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

/// What a probe gets. More than the probes that quinn sends by itself within an idle time-out, which count too.
const PROBE: u64 = 64 << 10;
/// No window at all: this connection sends nothing but its close any more.
const UNBOUNDED: u64 = 1 << 40;

/// What instants are counted from, as an atomic has none.
static EPOCH: LazyLock<Instant> = LazyLock::new(|| tokio::time::Instant::now().into_std());

/// A congestion controller whose window can be exceeded on purpose. Clones share the permission.
struct Headroom {
    inner: Box<dyn Controller>,
    extra: Arc<AtomicU64>,
    /// When the newest packet was sent that is acknowledged, nanoseconds since the epoch; 0 before the first.
    answered: Arc<AtomicU64>,
}

/// Wraps each controller that the inner factory makes.
pub(super) struct HeadroomFactory<F>(pub(super) Arc<F>);

impl<F: ControllerFactory + Send + Sync + 'static> ControllerFactory for HeadroomFactory<F> {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Headroom {
            inner: Arc::clone(&self.0).build(now, current_mtu),
            extra: Arc::default(),
            answered: Arc::default(),
        })
    }
}

impl fmt::Debug for Headroom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Headroom")
            .field("window", &self.inner.window())
            .field("extra", &self.extra)
            .finish()
    }
}

impl Controller for Headroom {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        if self.extra.load(Ordering::Relaxed) != 0 {
            self.extra.fetch_and(UNBOUNDED, Ordering::Relaxed);
        }
        let sent_at = sent.saturating_duration_since(*EPOCH).as_nanos();
        let sent_at = u64::try_from(sent_at).unwrap_or(u64::MAX);
        self.answered.fetch_max(sent_at, Ordering::Relaxed);
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.inner
            .on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.inner
            .on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.inner.window() + self.extra.load(Ordering::Relaxed)
    }

    fn metrics(&self) -> ControllerMetrics {
        self.inner.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            inner: self.inner.clone_box(),
            extra: Arc::clone(&self.extra),
            answered: Arc::clone(&self.answered),
        })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

fn of(connection: &quinn::Connection) -> Option<Box<Headroom>> {
    connection.congestion_state().into_any().downcast().ok()
}

/// When the newest packet was sent that is acknowledged.
pub(super) fn answered(connection: &quinn::Connection) -> Option<tokio::time::Instant> {
    let nanos = of(connection)?.answered.load(Ordering::Relaxed);
    let sent = *EPOCH + Duration::from_nanos(nanos);
    (nanos != 0).then(|| sent.into())
}

/// Lets one more probe out.
pub(super) fn for_probe(connection: &quinn::Connection) {
    if let Some(state) = of(connection) {
        state.extra.fetch_add(PROBE, Ordering::Relaxed);
    }
}

/// Lets the close out that comes next.
pub(super) fn for_close(connection: &quinn::Connection) {
    if let Some(state) = of(connection) {
        state.extra.fetch_or(UNBOUNDED, Ordering::Relaxed);
    }
}
