//! Whether the service is ready for requests: a guard for each thing that must be up first.
//!
//! Invariants: a name is ready when its guard is dropped, except by a panic; once the drain has begun the service is
//! never ready again.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

/// What the list of missing things says while draining.
const DRAINING: &str = "draining";

/// The service's readiness. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    state: Arc<watch::Sender<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// Names and how many guards each has.
    missing: BTreeMap<String, usize>,
    draining: bool,
}

impl State {
    fn is_ready(&self) -> bool {
        self.missing.is_empty() && !self.draining
    }
}

/// Holds the service unready; dropping it says that the thing is up.
#[derive(Debug)]
#[must_use = "dropping the guard at once says that the thing is ready"]
pub struct ReadinessGuard {
    name: String,
    state: Arc<watch::Sender<State>>,
}

impl Readiness {
    /// Ready, as nothing is registered yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a thing that must be up first. Register everything before the observe endpoint listens.
    pub fn register(&self, name: impl Into<String>) -> ReadinessGuard {
        let name = name.into();
        self.state.send_modify(|state| {
            *state.missing.entry(name.clone()).or_default() += 1;
        });
        ReadinessGuard {
            name,
            state: Arc::clone(&self.state),
        }
    }

    /// Makes the service not ready, for good.
    pub fn begin_drain(&self) {
        self.state.send_modify(|state| state.draining = true);
    }

    /// Whether requests should be sent here.
    pub fn is_ready(&self) -> bool {
        self.state.borrow().is_ready()
    }

    /// What is not ready yet, sorted by name.
    pub fn missing(&self) -> Vec<String> {
        let state = self.state.borrow();
        let draining = state.draining.then(|| DRAINING.to_owned());
        draining
            .into_iter()
            .chain(state.missing.keys().cloned())
            .collect()
    }

    /// Waits until the service is ready; for ever if it drains before.
    pub async fn ready(&self) {
        let mut state = self.state.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        state.wait_for(State::is_ready).await.ok();
    }
}

impl Drop for ReadinessGuard {
    fn drop(&mut self) {
        // A task that broke before its thing was up has not made it ready.
        if std::thread::panicking() {
            return;
        }
        self.state.send_modify(|state| {
            if let Some(count) = state.missing.get_mut(&self.name) {
                *count -= 1;
                if *count == 0 {
                    state.missing.remove(&self.name);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_once_every_guard_is_dropped() {
        let readiness = Readiness::new();
        let routes = readiness.register("routes");
        let backend = readiness.register("backend");
        let second = readiness.register("backend");
        assert_eq!(readiness.missing(), ["backend", "routes"]);
        drop((routes, backend));
        assert_eq!(readiness.missing(), ["backend"]);
        assert!(!readiness.is_ready());
        drop(second);
        readiness.ready().await;
        assert!(readiness.is_ready());
    }

    #[test]
    fn never_ready_again_once_the_drain_has_begun() {
        let readiness = Readiness::new();
        readiness.begin_drain();
        assert!(!readiness.is_ready());
        assert_eq!(readiness.missing(), ["draining"]);
    }

    #[test]
    fn a_panic_does_not_make_ready() {
        let readiness = Readiness::new();
        let guard = readiness.register("session");
        let panicked = std::thread::spawn(move || {
            let _guard = guard;
            panic!("expected by the test");
        });
        assert!(panicked.join().is_err());
        assert_eq!(readiness.missing(), ["session"]);
    }
}
