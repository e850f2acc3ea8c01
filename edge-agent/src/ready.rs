//! Whether the agent is ready: while it has a session. The service manager hears of the first.

use std::sync::Arc;

use daemon::{Readiness, ReadinessGuard, sd};

use crate::registry::Registry;

/// Holds the readiness to that, for ever. `first` is held until the first session.
pub(crate) async fn keep(registry: Arc<Registry>, readiness: Readiness, first: ReadinessGuard) {
    let mut count = registry.watch();
    let mut missing = Some(first);
    let mut told = false;
    loop {
        let up = count.borrow_and_update().ne(&0);
        if up && missing.take().is_some() && !told {
            told = true;
            tracing::info!("ready");
            sd::ready();
        } else if !up && missing.is_none() {
            missing = Some(readiness.register("session"));
        }
        if count.changed().await.is_err() {
            return;
        }
    }
}
