//! What systemd wants to know, if it asked (`NOTIFY_SOCKET`): ready, stopping, still alive.
//!
//! Without systemd everything here does nothing. A failure is logged and harmless.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::task::AbortOnDropHandle;

use crate::tasks;

/// Says that the start is over: `READY=1`.
pub fn ready() {
    notify(&NotifyState::Ready);
}

/// Says that the service stops: `STOPPING=1`.
pub fn stopping() {
    notify(&NotifyState::Stopping);
}

/// Tells systemd that the service is alive, until it is dropped.
#[derive(Debug)]
pub struct Watchdog {
    _pinging: AbortOnDropHandle<()>,
}

impl Watchdog {
    /// Starts if systemd expects it (`WATCHDOG_USEC`). While `is_alive` says no, nothing is sent, and systemd
    /// restarts the service after its time-out.
    pub fn start(is_alive: impl Fn() -> bool + Send + 'static) -> Option<Self> {
        let timeout = sd_notify::watchdog_enabled().filter(|timeout| !timeout.is_zero())?;
        // Half of the time-out, as sd_watchdog_enabled(3) recommends.
        let mut ticks = interval((timeout / 2).max(Duration::from_millis(1)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let pinging = tasks::owned(async move {
            loop {
                ticks.tick().await;
                if is_alive() {
                    notify(&NotifyState::Watchdog);
                }
            }
        });
        Some(Self { _pinging: pinging })
    }
}

fn notify(state: &NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(std::slice::from_ref(state)) {
        tracing::warn!(%error, "the service manager cannot be told the state");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::net::UnixDatagram;

    use super::*;
    use crate::testing::{block_on, in_child_process};

    #[test]
    fn nothing_happens_without_a_service_manager() {
        in_child_process(
            "sd::tests::nothing_happens_without_a_service_manager",
            &[],
            || {
                ready();
                stopping();
                assert!(Watchdog::start(|| true).is_none());
            },
        );
    }

    #[test]
    fn the_service_manager_is_told_the_states() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let env = [
            ("NOTIFY_SOCKET", path.to_str().unwrap()),
            ("WATCHDOG_USEC", "20000"),
        ];
        in_child_process(
            "sd::tests::the_service_manager_is_told_the_states",
            &env,
            || {
                let path = std::env::var_os("NOTIFY_SOCKET").unwrap();
                block_on(async {
                    let manager = UnixDatagram::bind(path).unwrap();
                    let told = async |expected: &str| {
                        let mut buffer = [0; 64];
                        let len = manager.recv(&mut buffer).await.unwrap();
                        assert_eq!(
                            std::str::from_utf8(&buffer[..len]).unwrap().trim(),
                            expected
                        );
                    };
                    ready();
                    told("READY=1").await;
                    stopping();
                    told("STOPPING=1").await;
                    let alive = Arc::new(AtomicBool::new(true));
                    let seen = Arc::clone(&alive);
                    let watchdog = Watchdog::start(move || seen.load(Ordering::Relaxed)).unwrap();
                    told("WATCHDOG=1").await;
                    told("WATCHDOG=1").await;
                    drop(watchdog);
                });
            },
        );
    }
}
