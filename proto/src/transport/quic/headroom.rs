//! Lets out what must not wait for the congestion window: the probe of a line that may be back, and a close.
//!
//! quinn counts both against the window like any data. A sender that had data in flight when its line was cut has a full
//! window for as long as nothing is acknowledged, so it could neither probe before its doubled time-outs are over nor
//! say that it closes. [`Headroom`] widens the window by what these need; the first acknowledgement takes it back.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

/// What a probe gets. More than the probes that quinn sends by itself within an idle time-out, which count too.
const PROBE: u64 = 64 << 10;
/// No window at all: this connection sends nothing but its close any more.
const UNBOUNDED: u64 = 1 << 40;

/// A congestion controller whose window can be exceeded on purpose. Clones share the permission.
struct Headroom {
    inner: Box<dyn Controller>,
    extra: Arc<AtomicU64>,
}

/// Wraps each controller that the inner factory makes.
pub(super) struct HeadroomFactory<F>(pub(super) Arc<F>);

impl<F: ControllerFactory + Send + Sync + 'static> ControllerFactory for HeadroomFactory<F> {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Headroom {
            inner: Arc::clone(&self.0).build(now, current_mtu),
            extra: Arc::new(AtomicU64::new(0)),
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
        })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

fn extra(connection: &quinn::Connection) -> Option<Arc<AtomicU64>> {
    let state = connection.congestion_state().into_any();
    state.downcast::<Headroom>().ok().map(|state| state.extra)
}

/// Lets one more probe out.
pub(super) fn for_probe(connection: &quinn::Connection) {
    if let Some(extra) = extra(connection) {
        extra.fetch_add(PROBE, Ordering::Relaxed);
    }
}

/// Lets the close out that comes next.
pub(super) fn for_close(connection: &quinn::Connection) {
    if let Some(extra) = extra(connection) {
        extra.fetch_or(UNBOUNDED, Ordering::Relaxed);
    }
}
