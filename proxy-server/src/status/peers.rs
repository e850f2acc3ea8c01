//! Other servers as operators see them: where each is, whether there is a session with it, and what it has announced.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use proto::transport::{Session, SessionStats};
use serde::{Deserialize, Serialize};

use super::{bytes, rows};
use crate::peer::{Accepted, PeerSession, Peers, Standing};

/// One session with another server, or the lack of one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// The other server; empty while it was never reached.
    pub server: String,
    /// Its address, as dialled from here or seen from here.
    pub address: String,
    /// `dialled`: this server asks it. `accepted`: it asks this server.
    pub side: String,
    /// `ok`, `telling` (it has not told all of its agents yet), `suspect`, `going`, `away`, `ourselves`, `twin`.
    pub state: String,
    /// Why there is no session.
    pub failure: Option<String>,
    /// The session's id.
    pub session: String,
    /// Agents that it has announced a session of.
    pub agents: usize,
    /// Open streams.
    pub streams: usize,
    /// Round trip, milliseconds.
    pub rtt_ms: f64,
    /// Bytes received on the wire.
    pub bytes_in: u64,
    /// Bytes sent on the wire.
    pub bytes_out: u64,
    /// RFC 3339; empty without a session.
    pub since: String,
    /// Its software.
    pub version: String,
}

/// Every session with another server, and members without one.
#[must_use]
pub fn peers<S: Session>(peers: &Peers<S>) -> Vec<PeerStatus> {
    let dialled = peers.all();
    let mut all: Vec<_> = dialled.iter().map(|session| of_dialled(session)).collect();
    let there = |address: &SocketAddr| dialled.iter().any(|session| session.address == *address);
    let members = peers.members().into_iter();
    let without = members.filter(|(address, _)| !there(address));
    all.extend(without.map(|(address, standing)| of_member(address, standing)));
    all.extend(peers.accepted().iter().map(|session| of_accepted(session)));
    all
}

fn of_dialled<S: Session>(session: &PeerSession<S>) -> PeerStatus {
    let (agents, complete) = {
        let table = session.table.lock();
        (table.sessions(), table.is_complete())
    };
    let going = session.going.load(Ordering::Relaxed);
    let state = match (session.is_suspect(), going, complete) {
        (true, _, _) => "suspect",
        (false, true, _) => "going",
        (false, false, false) => "telling",
        (false, false, true) => "ok",
    };
    PeerStatus {
        server: session.server.to_string(),
        address: session.address.to_string(),
        side: "dialled".to_owned(),
        state: state.to_owned(),
        session: session.id.clone(),
        agents,
        streams: session.streams.load(Ordering::Relaxed),
        since: time(session.since),
        version: session.software.clone(),
        ..figures(session.transport.stats())
    }
}

fn of_accepted<S: Session>(session: &Accepted<S>) -> PeerStatus {
    PeerStatus {
        server: session.server.to_string(),
        address: session.transport.remote_address().to_string(),
        side: "accepted".to_owned(),
        state: "ok".to_owned(),
        session: session.id.to_string(),
        streams: session.streams.load(Ordering::Relaxed),
        since: time(session.since),
        version: session.software.clone(),
        ..figures(session.transport.stats())
    }
}

fn of_member(address: SocketAddr, standing: Standing) -> PeerStatus {
    let (server, state, failure) = match standing {
        Standing::Awaited | Standing::Up => (String::new(), "away", None),
        Standing::Failed(why) => (String::new(), "away", Some(why)),
        Standing::Ourselves => (String::new(), "ourselves", None),
        Standing::Twin(server) => (server.to_string(), "twin", None),
    };
    PeerStatus {
        server,
        address: address.to_string(),
        side: "dialled".to_owned(),
        state: state.to_owned(),
        failure,
        ..figures(SessionStats::default())
    }
}

/// A status of nothing but these.
fn figures(stats: SessionStats) -> PeerStatus {
    PeerStatus {
        server: String::new(),
        address: String::new(),
        side: String::new(),
        state: String::new(),
        failure: None,
        session: String::new(),
        agents: 0,
        streams: 0,
        rtt_ms: (stats.rtt.as_secs_f64() * 1e5).round() / 100.0,
        bytes_in: stats.received,
        bytes_out: stats.sent,
        since: String::new(),
        version: String::new(),
    }
}

fn time(at: SystemTime) -> String {
    jiff::Timestamp::try_from(at)
        .map(|at| at.to_string())
        .unwrap_or_default()
}

/// The other servers as a table for people; nothing where there is none.
#[must_use]
pub fn table(peers: &[PeerStatus]) -> String {
    if peers.is_empty() {
        return String::new();
    }
    let header = [
        "SERVER", "ADDRESS", "SIDE", "STATE", "AGENTS", "STREAMS", "RTT", "IN", "OUT", "SINCE",
        "VERSION",
    ];
    let or_dash = |text: &str| {
        if text.is_empty() {
            "-".to_owned()
        } else {
            text.to_owned()
        }
    };
    let row = |p: &PeerStatus| {
        let state = match &p.failure {
            Some(failure) => format!("{}: {failure}", p.state),
            None => p.state.clone(),
        };
        [
            or_dash(&p.server),
            p.address.clone(),
            p.side.clone(),
            state,
            p.agents.to_string(),
            p.streams.to_string(),
            format!("{:.1}ms", p.rtt_ms),
            bytes(p.bytes_in),
            bytes(p.bytes_out),
            or_dash(&p.since),
            or_dash(&p.version),
        ]
    };
    rows(header, peers.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_sessions_and_why_there_is_none() {
        assert_eq!(table(&[]), "");
        let up = PeerStatus {
            server: "proxy-b".into(),
            address: "10.0.0.2:8446".into(),
            side: "dialled".into(),
            state: "ok".into(),
            agents: 7,
            ..figures(SessionStats::default())
        };
        let failed = Standing::Failed("no answer in time".into());
        let away = of_member("10.0.0.3:8446".parse().unwrap(), failed);
        let table = table(&[up, away]);
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(
            lines[1].contains("10.0.0.2:8446") && lines[1].contains("  7 "),
            "{table}"
        );
        assert!(lines[2].contains("away: no answer in time"), "{table}");
    }
}
