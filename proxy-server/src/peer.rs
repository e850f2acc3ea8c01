//! Other proxy-servers: who they are, what they have announced, and a session to each (docs/adr/0007).
//!
//! A server dials every other one that has agents (`dial`, over the addresses of `members`) and is told which agents
//! those are (`table`). A server that has agents is dialled (`accept`), tells (`announce`), and serves what it is asked
//! for from its own registry alone (`ask`). Here is what the dialling side knows.
//!
//! | failure | what happens |
//! | --- | --- |
//! | a member can't be reached, or refuses | dialled again, after 0.2 to 10 s; minutes where that would change nothing (TLS, version, too much announced) |
//! | it is ourselves (our own certificate) | not dialled again for 5 min |
//! | another one has our name | said as an error; used all the same |
//! | it announces garbage, or more than is kept | its session is closed with `protocol` or `overloaded`, and it is left for minutes |
//! | it announces what it has not | it answers `no_session`, and the next one is asked |
//! | it says nothing | doubted by the first request that waits for it, suspect after 6 s (then dialled anew beside), lost after the idle time-out |
//! | it says GoAway, or is no member any more | used for what is nowhere else; the session ends once its streams have |
//! | it asks with another hop count, or garbage | that stream is refused with `protocol` |
//!
//! What a session had announced goes with it, but for the names: that there is such an agent stays known for an hour, so
//! that a request for it is refused and not taken for one that is not meant for the edge.

mod accept;
mod announce;
mod ask;
mod dial;
mod known;
mod members;
mod supervisor;
pub mod table;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

pub(crate) use accept::Acceptor;
pub(crate) use dial::Dialler;
pub use known::{Asked, Peers, Standing};
pub(crate) use members::Members;
use parking_lot::Mutex;
use proto::control::{ControlHandle, GoAway, Liveness};
use proto::transport::Session;
use proto::transport::keepalive::{Keepalive, Verdict};
use proto::{Reason, ServerName, SessionId};
use table::Table;

use crate::registry::{Doubt, Rank};

/// After so long a start has settled, whatever members do not answer.
pub(crate) const SETTLE: Duration = Duration::from_secs(5);

/// Liveness between servers: their line is short and carries many, so silence is noticed early; they are patient with
/// cuts all the same, as streams survive those.
pub(crate) fn keepalive(idle_timeout: Duration) -> Keepalive {
    Keepalive {
        interval: Duration::from_secs(2).min(idle_timeout / 4),
        suspect_after: Duration::from_secs(6).min(idle_timeout / 2),
        idle_timeout,
        nudge_every: Duration::from_secs(2),
    }
}

/// A session with another server that this one has dialled.
#[derive(Debug)]
pub struct PeerSession<S> {
    /// Its id, given by the other server.
    pub id: String,
    /// Whose.
    pub server: ServerName,
    /// Where it was dialled.
    pub address: SocketAddr,
    /// The transport.
    pub transport: S,
    /// When the other server was last heard.
    pub liveness: Arc<Liveness>,
    /// For GoAways.
    pub control: ControlHandle,
    /// Since when.
    pub since: SystemTime,
    /// The other server's software.
    pub software: String,
    /// It is to go: used only where there is no other.
    pub going: AtomicBool,
    /// Whether a request has found it silent.
    pub doubt: Doubt,
    /// Streams that this server has opened.
    pub streams: AtomicUsize,
    /// What it has announced.
    pub table: Mutex<Table>,
}

impl<S: Session> PeerSession<S> {
    /// Whether nothing was heard of it for a while.
    pub fn is_suspect(&self) -> bool {
        self.liveness.verdict() != Verdict::Healthy
    }

    /// How good it is for the next stream.
    pub fn rank(&self) -> Rank {
        let doubted = self.doubt.is_there(|| self.transport.answered());
        let silent = self.is_suspect() || doubted;
        Rank::of(silent, self.going.load(Ordering::Relaxed))
    }
}

/// A session with another server that that one has dialled.
#[derive(Debug)]
pub struct Accepted<S> {
    /// Its id.
    pub id: SessionId,
    /// Whose.
    pub server: ServerName,
    /// The transport.
    pub transport: S,
    /// When the other server was last heard.
    pub liveness: Arc<Liveness>,
    /// For GoAways.
    pub control: ControlHandle,
    /// Since when.
    pub since: SystemTime,
    /// The other server's software.
    pub software: String,
    /// Streams that the other server has opened.
    pub streams: AtomicUsize,
}

impl<S: Session> Accepted<S> {
    fn remote(&self) -> SocketAddr {
        self.transport.remote_address()
    }

    fn go_away(&self, reason: Reason, deadline: Duration, retry_after: Duration) {
        self.control.go_away(GoAway {
            reason,
            deadline,
            retry_after,
            detail: String::new(),
        });
    }
}
