//! A session with another server for tests, over the in-memory transport.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::SystemTime;

use parking_lot::Mutex;
use proto::control::{Control, Liveness};
use proto::transport::keepalive::Keepalive;
use proto::transport::memory::{self, MemorySession};
use proto::wire::{Limits, Offer};
use proto::{ServerName, SessionId};

use crate::peer::{PeerSession, keepalive};
use crate::registry::Doubt;

pub(crate) fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, number], 8446))
}

/// A session with `proxy-NUMBER` at `10.0.0.NUMBER`, and its far end.
pub(crate) async fn session(number: u8) -> (Arc<PeerSession<MemorySession>>, MemorySession) {
    let (near, far) = memory::pair(1 << 16, 8);
    let server: ServerName = format!("proxy-{number}").parse().unwrap();
    let offer = Offer {
        agent: server.clone(),
        software: String::new(),
        capabilities: vec![],
        limits: Limits {
            max_streams: 8,
            stream_window: 1 << 16,
        },
        instance: String::new(),
        line: None,
    };
    // Only the handle is wanted, so nobody answers the hello.
    let control = tokio::select! {
        accepted = Control::accept(near.clone()) => accepted.unwrap().0,
        _ = Control::dial(far.clone(), &offer) => unreachable!("the dial waits for an answer"),
    };
    let session = PeerSession {
        id: SessionId::random().to_string(),
        server,
        address: address(number),
        transport: near,
        liveness: Liveness::new(keepalive(Keepalive::default().idle_timeout)),
        control: control.handle(),
        since: SystemTime::UNIX_EPOCH,
        software: String::new(),
        going: AtomicBool::new(false),
        doubt: Doubt::default(),
        streams: AtomicUsize::new(0),
        table: Mutex::default(),
    };
    (Arc::new(session), far)
}
