//! What this server says of its agents to another one, in a session that the other has dialled.
//!
//! A frame is made when the session takes one, of what has changed by then. So nothing waits, a server that reads slowly
//! is told the latest of each agent and not its history, and how many are told costs nothing.

use bytes::Bytes;
use proto::control::Outbox;
use proto::transport::Session;
use proto::wire::{Draft, encode};
use tokio::sync::watch;

use crate::metrics::PeerMetrics;
use crate::registry::{Place, Registry};

/// Tells one other server.
#[derive(Debug)]
pub(crate) struct Announcer<S> {
    registry: Registry<S>,
    changed: watch::Receiver<Place>,
    told: Place,
    /// Whether it was said that everything was told once.
    complete: bool,
    metrics: PeerMetrics,
}

impl<S: Session> Announcer<S> {
    pub(crate) fn new(registry: &Registry<S>, metrics: &PeerMetrics) -> Self {
        Self {
            registry: registry.clone(),
            changed: registry.watch(),
            told: 0,
            complete: false,
            metrics: metrics.clone(),
        }
    }

    /// What is to be told now.
    fn draft(&mut self) -> Option<Bytes> {
        let mut draft = Draft::default();
        let (told, all) = self.registry.tell(self.told, &mut draft);
        self.told = told;
        if draft.is_empty() && self.complete {
            return None;
        }
        self.complete |= all;
        self.metrics.announced.inc();
        Some(encode(&draft.finish(all)))
    }
}

impl<S: Session> Outbox for Announcer<S> {
    async fn next(&mut self) -> Bytes {
        loop {
            if let Some(frame) = self.draft() {
                return frame;
            }
            if self.changed.changed().await.is_err() {
                // The registry lives in `self`.
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests;
