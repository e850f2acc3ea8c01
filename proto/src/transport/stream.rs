//! What the two halves of a stream share, so that a reset of one is a reset of both.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::Notify;

use crate::Reason;

/// Which half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    Send,
    Recv,
}

/// The reason of the first reset, if any. Dropped with the last half.
#[derive(Debug)]
pub(crate) struct Shared {
    /// 0 while the stream is whole, else the reason's code.
    code: AtomicU32,
    /// One for each half, so that each has exactly one waiter and a stored permit is never taken by the other.
    wake_send: Notify,
    wake_recv: Notify,
    /// Gives the stream's window back to the session.
    _open: Option<Box<dyn Release>>,
}

/// Whatever has to happen when both halves are gone.
pub(crate) trait Release: std::fmt::Debug + Send + Sync + 'static {}

impl Shared {
    pub(crate) fn new(open: Option<Box<dyn Release>>) -> Arc<Self> {
        Arc::new(Self {
            code: AtomicU32::new(0),
            wake_send: Notify::new(),
            wake_recv: Notify::new(),
            _open: open,
        })
    }

    /// The reason, once the stream was reset.
    pub(crate) fn reason(&self) -> Option<Reason> {
        match self.code.load(Ordering::Acquire) {
            0 => None,
            code => Some(Reason::from_code(code.into())),
        }
    }

    /// Marks the stream as reset and wakes both halves; the first reason stays. Says which one that is.
    pub(crate) fn reset(&self, reason: Reason) -> Reason {
        let first =
            self.code
                .compare_exchange(0, reason.code(), Ordering::AcqRel, Ordering::Acquire);
        self.wake_send.notify_one();
        self.wake_recv.notify_one();
        first.map_or_else(|code| Reason::from_code(code.into()), |_| reason)
    }

    /// Waits for the reset. One waiter a half.
    pub(crate) async fn until_reset(&self, half: Half) -> Reason {
        let wake = match half {
            Half::Send => &self.wake_send,
            Half::Recv => &self.wake_recv,
        };
        loop {
            if let Some(reason) = self.reason() {
                return reason;
            }
            wake.notified().await;
        }
    }
}
