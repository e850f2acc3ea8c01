//! What an operator sees of sessions, nodes, other servers and ways: the admin endpoint's JSON, and `proxy-server status`,
//! `nodes`, `peers` and `explain` that show it.

mod explain;
mod nodes;
mod paths;
mod peers;

use std::fmt::Write as _;
use std::sync::atomic::Ordering;
use std::time::Duration;

pub use explain::{Explained, HealthStatus, LineStatus, RuleStatus, explain, lines as explained};
pub use nodes::{ClusterStatus, DnsStatus, NodeStatus, cluster, nodes, table as node_table};
pub use paths::{LinePath, PathStatus, TunnelPath, table as path_table};
pub use peers::{PeerStatus, peers, table as peer_table};
use proto::transport::Session;
use serde::{Deserialize, Serialize};

use crate::registry::{LiveSession, Registry};

/// One session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Whose.
    pub agent: String,
    /// This server.
    pub server: String,
    /// Its id.
    pub session: String,
    /// The agent's address, as seen from here.
    pub remote: String,
    /// The dedicated line that it goes over, by the agent's word.
    #[serde(default)]
    pub line: Option<String>,
    /// quic.
    pub transport: String,
    /// Round trip, milliseconds.
    pub rtt_ms: f64,
    /// The part of the packets sent of late that was lost, 0 to 1; none as long as too few were sent.
    pub loss: Option<f64>,
    /// Open streams.
    pub streams: usize,
    /// Bytes received on the wire.
    pub bytes_in: u64,
    /// Bytes sent on the wire.
    pub bytes_out: u64,
    /// RFC 3339.
    pub since: String,
    /// The agent's software.
    pub version: String,
    /// Nothing was heard of it for 30 s.
    pub suspect: bool,
    /// It was told to go, or goes by itself.
    pub going: bool,
}

impl SessionStatus {
    fn new<S: Session>(server: &str, session: &LiveSession<S>) -> Self {
        let stats = session.transport.stats();
        Self {
            agent: session.agent.to_string(),
            server: server.to_owned(),
            session: session.id.to_string(),
            remote: session.transport.remote_address().to_string(),
            line: session.line().map(str::to_owned),
            transport: session.kind.to_owned(),
            rtt_ms: ms(stats.rtt),
            loss: session.loss.lock().part(&stats),
            streams: session.streams.load(Ordering::Relaxed),
            bytes_in: stats.received,
            bytes_out: stats.sent,
            since: jiff::Timestamp::try_from(session.since)
                .map(|t| t.to_string())
                .unwrap_or_default(),
            version: session.software.clone(),
            suspect: session.is_suspect(),
            going: session.going.load(Ordering::Relaxed),
        }
    }
}

/// Every session, by agent and age.
#[must_use]
pub fn sessions<S: Session>(server: &str, registry: &Registry<S>) -> Vec<SessionStatus> {
    registry
        .all()
        .iter()
        .map(|session| SessionStatus::new(server, session))
        .collect()
}

/// The sessions as a table for people.
#[must_use]
pub fn table(sessions: &[SessionStatus]) -> String {
    let header = [
        "AGENT",
        "SESSION",
        "REMOTE",
        "LINE",
        "TRANSPORT",
        "RTT",
        "STREAMS",
        "IN",
        "OUT",
        "SINCE",
        "VERSION",
        "STATE",
    ];
    let row = |s: &SessionStatus| {
        let state = match (s.suspect, s.going) {
            (true, _) => "suspect",
            (false, true) => "going",
            (false, false) => "ok",
        };
        [
            s.agent.clone(),
            s.session.clone(),
            s.remote.clone(),
            s.line.clone().unwrap_or_else(|| "-".to_owned()),
            s.transport.clone(),
            format!("{:.1}ms", s.rtt_ms),
            s.streams.to_string(),
            bytes(s.bytes_in),
            bytes(s.bytes_out),
            s.since.clone(),
            s.version.clone(),
            state.to_owned(),
        ]
    };
    rows(header, sessions.iter().map(row))
}

/// Rows under a header, in columns.
fn rows<const N: usize>(header: [&str; N], rest: impl Iterator<Item = [String; N]>) -> String {
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(rest);
    let mut widths = [0_usize; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.len());
        }
    }
    let mut out = String::new();
    for row in &rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            write!(line, "{cell:<width$}  ").ok(); // writing to a string can't fail
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Milliseconds, to the hundredth.
fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e5).round() / 100.0
}

const fn yes(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}

/// Bytes in the largest binary unit that leaves a number of at least 1.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut rest = count;
    while rest >= 1024 && unit + 1 < UNITS.len() {
        rest /= 1024;
        unit += 1;
    }
    format!("{rest}{}", UNITS.get(unit).unwrap_or(&"B"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lines_up() {
        let session = SessionStatus {
            agent: "edge1".into(),
            server: "proxy".into(),
            session: "00".into(),
            remote: "198.51.100.2:4000".into(),
            line: None,
            transport: "quic".into(),
            rtt_ms: 1.25,
            loss: None,
            streams: 3,
            bytes_in: 5 << 20,
            bytes_out: 12,
            since: "2026-01-01T00:00:00Z".into(),
            version: "edge-agent 0.1.0".into(),
            suspect: false,
            going: false,
        };
        let table = table(&[session]);
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].find("REMOTE"), lines[1].find("198.51"));
        assert!(lines[1].contains("5MiB") && lines[1].ends_with("ok"));
    }
}
