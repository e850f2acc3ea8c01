//! How the agent stops serving: GoAway → the servers know → no new streams → open ones may end → the rest is cut.

use std::time::Duration;

use daemon::{Drained, Tasks};
use proto::Reason;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::registry::Registry;
use crate::serve::Serving;

/// For cut tasks to go away.
pub(crate) const CUT: Duration = Duration::from_secs(2);

/// Ends a running agent.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Drain.
    pub shutdown: CancellationToken,
    /// Skip what is left of the drain.
    pub immediate: CancellationToken,
}

/// Says how many streams were cut.
pub(crate) async fn drain(
    registry: &Registry,
    serving: &Serving,
    streams: &Tasks,
    grace: Duration,
    stop: &Stop,
) -> usize {
    let all = registry.all();
    let settled = all
        .iter()
        .map(|live| live.settled())
        .max()
        .unwrap_or_default();
    all.iter()
        .for_each(|live| live.go_away(Reason::Draining, grace));
    let orderly = async {
        sleep(settled).await;
        serving.refusing.cancel();
        timeout(grace, all_closed(registry)).await.ok(); // over time they are cut
    };
    tokio::select! {
        () = orderly => {}
        () = stop.immediate.cancelled() => serving.refusing.cancel(),
    }
    let cut = streams.len();
    serving.cut.cancel();
    match streams.drain(CUT).await {
        Drained::Clean => cut,
        Drained::Aborted(stuck) => cut.max(stuck),
    }
}

/// Waits until no session has a stream.
async fn all_closed(registry: &Registry) {
    for live in registry.all() {
        live.idle().await;
    }
}
