//! A live session for tests, over the in-memory transport.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use proto::SessionId;
use proto::control::{Control, Liveness};
use proto::transport::keepalive::Keepalive;
use proto::transport::memory::{self, MemorySession};
use proto::wire::{Limits, Offer};
use tokio::time::Instant;

use super::{Doubt, LiveSession, Loss, OverLine};

/// A session of that agent, and its far end.
pub(crate) async fn live(agent: &str) -> (Arc<LiveSession<MemorySession>>, MemorySession) {
    live_over(agent, None).await
}

/// A line's name, and for how long it must be well.
pub(crate) type Line<'a> = (&'a str, Duration);

/// As [`live`], over a line.
pub(crate) async fn live_over(
    agent: &str,
    line: Option<Line<'_>>,
) -> (Arc<LiveSession<MemorySession>>, MemorySession) {
    let (server, client) = memory::pair(1 << 16, 8);
    let offer: Offer = Offer {
        agent: agent.parse().unwrap(),
        software: String::new(),
        capabilities: vec![],
        limits: Limits {
            max_streams: 8,
            stream_window: 1 << 16,
        },
        instance: String::new(),
        line: None,
    };
    let dial = Control::dial(client.clone(), &offer);
    let accept = Control::accept(server.clone());
    // Only the server's handle is wanted, so nobody answers the hello.
    let (control, _hello) = tokio::select! {
        accepted = accept => accepted.unwrap(),
        _ = dial => unreachable!("the dial waits for an answer"),
    };
    let session = LiveSession {
        id: SessionId::random(),
        agent: agent.parse().unwrap(),
        node_uid: None,
        transport: server,
        line: line.map(|(name, stable)| OverLine::new(name.parse().unwrap(), stable)),
        instance: String::new(),
        kind: "memory",
        liveness: Liveness::new(Keepalive::default()),
        control: control.handle(),
        since: SystemTime::UNIX_EPOCH,
        software: String::new(),
        going: AtomicBool::new(false),
        probed: AtomicBool::new(false),
        doubt: Doubt::default(),
        streams: AtomicUsize::new(0),
        loss: Mutex::new(Loss::new(Instant::now())),
    };
    (Arc::new(session), client)
}
