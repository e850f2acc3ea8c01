//! When the other end was last heard.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::transport::keepalive::{Keepalive, Verdict};

/// When the other end was last heard.
#[derive(Debug)]
pub struct Liveness {
    origin: Instant,
    heard_ms: AtomicU64,
    frames: AtomicU64,
    pub(super) keepalive: Keepalive,
}

impl Liveness {
    /// Heard now.
    #[must_use]
    pub fn new(keepalive: Keepalive) -> Arc<Self> {
        Arc::new(Self {
            origin: Instant::now(),
            heard_ms: AtomicU64::new(0),
            frames: AtomicU64::new(0),
            keepalive,
        })
    }

    pub(super) fn heard(&self) {
        let now = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard_ms.store(now, Ordering::Relaxed);
        self.frames.fetch_add(1, Ordering::Relaxed);
    }

    /// For how long nothing was heard.
    #[must_use]
    pub fn silence(&self) -> Duration {
        let heard = Duration::from_millis(self.heard_ms.load(Ordering::Relaxed));
        self.origin.elapsed().saturating_sub(heard)
    }

    /// How many signs of life there were.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// What that means.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.keepalive.verdict(self.silence())
    }
}
