//! Signals: SIGTERM and SIGINT stop the service, a second one stops it at once, SIGHUP reloads.
//!
//! It must not stop anything itself: the service's `app.rs` waits for the tokens and does it in order.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::tasks;

/// The signals of this process, watched until it is dropped.
#[derive(Debug)]
pub struct Signals {
    shutdown: CancellationToken,
    immediate: CancellationToken,
    reload: Reload,
    _watching: AbortOnDropHandle<()>,
}

impl Signals {
    /// Starts to watch. From here on SIGTERM, SIGINT and SIGHUP no longer end the process by themselves.
    ///
    /// # Errors
    /// The operating system refuses a handler.
    pub fn install() -> io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let (trigger, reload) = Reload::manual();
        let shutdown = CancellationToken::new();
        let immediate = CancellationToken::new();
        let tokens = (shutdown.clone(), immediate.clone());
        let watching = tasks::owned(async move {
            let (shutdown, immediate) = tokens;
            loop {
                let name = tokio::select! {
                    Some(()) = terminate.recv() => "SIGTERM",
                    Some(()) = interrupt.recv() => "SIGINT",
                    Some(()) = hangup.recv() => {
                        tracing::info!(signal = "SIGHUP", "reload asked for");
                        trigger.reload();
                        continue;
                    }
                    else => return,
                };
                if shutdown.is_cancelled() {
                    tracing::warn!(signal = name, "second signal, stopping at once");
                    immediate.cancel();
                } else {
                    tracing::info!(signal = name, "stopping");
                    shutdown.cancel();
                }
            }
        });
        Ok(Self {
            shutdown,
            immediate,
            reload,
            _watching: watching,
        })
    }

    /// Cancelled by the first SIGTERM or SIGINT: drain.
    pub fn shutdown(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Cancelled by the second one: skip what is left of the drain.
    pub fn immediate(&self) -> CancellationToken {
        self.immediate.clone()
    }

    /// Fires at each SIGHUP.
    pub fn reload(&self) -> Reload {
        self.reload.clone()
    }
}

/// Waits for requests to reload. Each clone sees every request made after it was cloned; several at once are one.
#[derive(Clone, Debug)]
pub struct Reload {
    requests: watch::Receiver<()>,
}

/// The other side of a [`Reload`] that is not driven by a signal.
#[derive(Clone, Debug)]
pub struct ReloadTrigger {
    requests: watch::Sender<()>,
}

impl Reload {
    /// A pair: the trigger fires the [`Reload`].
    pub fn manual() -> (ReloadTrigger, Self) {
        let (sender, receiver) = watch::channel(());
        (
            ReloadTrigger { requests: sender },
            Self { requests: receiver },
        )
    }

    /// Never fires.
    pub fn never() -> Self {
        Self::manual().1
    }

    /// Waits for the next request; for ever if nobody can make one any more. Cancel-safe.
    pub async fn requested(&mut self) {
        if self.requests.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl ReloadTrigger {
    /// Asks for a reload.
    pub fn reload(&self) {
        self.requests.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal, raise};

    use super::*;
    use crate::testing::{block_on, in_child_process};

    #[test]
    fn the_first_signal_drains_the_second_stops_at_once_and_sighup_reloads() {
        const NAME: &str =
            "signal::tests::the_first_signal_drains_the_second_stops_at_once_and_sighup_reloads";
        in_child_process(NAME, &[], || {
            block_on(async {
                let signals = Signals::install().unwrap();
                let mut reload = signals.reload();
                raise(Signal::SIGHUP).unwrap();
                reload.requested().await;
                assert!(!signals.shutdown().is_cancelled());
                raise(Signal::SIGTERM).unwrap();
                signals.shutdown().cancelled().await;
                assert!(!signals.immediate().is_cancelled());
                raise(Signal::SIGINT).unwrap();
                signals.immediate().cancelled().await;
            });
        });
    }

    #[tokio::test]
    async fn every_clone_sees_a_request_once() {
        let (trigger, mut first) = Reload::manual();
        let mut second = first.clone();
        trigger.reload();
        trigger.reload();
        first.requested().await;
        second.requested().await;
        let again = std::pin::pin!(first.requested());
        assert!(
            futures_util::poll!(again).is_pending(),
            "two requests at once are one"
        );
    }
}
