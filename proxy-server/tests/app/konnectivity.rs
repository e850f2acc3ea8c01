//! konnectivity's gRPC over the Unix socket: every row of the frontend's state and failure tables.

mod dials;
mod drain;
mod edge;
mod odd;
mod requester;
mod rules;
mod stopped;
mod transfers;
mod wire;

use std::sync::atomic::Ordering;

use crate::stack::{Stack, eventually, within};

/// No call of any kind is left.
async fn idle(stack: &Stack) {
    within(async {
        while stack.metric("corvid_streams_open").await > 0.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    eventually("no stream is counted", || {
        let all = stack.registry.all();
        all.iter().all(|s| s.streams.load(Ordering::Relaxed) == 0)
    })
    .await;
}
