//! What `GET /sessions` of the admin endpoint answers, and how `edge-agent status` prints it.

use std::fmt::Write as _;

use certs::UnixTime;
use serde::{Deserialize, Serialize};

use crate::session::Live;

/// One session, as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// The agent's name.
    pub agent: String,
    /// The server's name.
    pub server: String,
    /// The session's id.
    pub session: String,
    /// The server's address.
    pub remote: String,
    /// The dedicated line that it goes over.
    #[serde(default)]
    pub line: Option<String>,
    /// What carries it.
    pub transport: String,
    /// Round trip, milliseconds.
    pub rtt_ms: f64,
    /// Open streams.
    pub streams: usize,
    /// Received on the wire.
    pub bytes_in: u64,
    /// Sent on the wire.
    pub bytes_out: u64,
    /// When it came up, RFC 3339.
    pub since: String,
    /// The server's software.
    pub version: String,
    /// Nothing was heard for too long.
    pub suspect: bool,
}

impl SessionStatus {
    pub(crate) fn of(live: &Live, agent: &str) -> Self {
        let stats = live.stats();
        Self {
            agent: agent.to_owned(),
            server: live.server().to_string(),
            session: live.id().to_owned(),
            remote: live.remote().to_string(),
            line: live.line().map(str::to_owned),
            transport: "quic".to_owned(),
            rtt_ms: (stats.rtt.as_secs_f64() * 1e5).round() / 100.0,
            streams: live.streams(),
            bytes_in: stats.received,
            bytes_out: stats.sent,
            since: timestamp(live.since()),
            version: live.software().to_owned(),
            suspect: live.is_suspect(),
        }
    }
}

/// RFC 3339, in UTC.
pub(crate) fn timestamp(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds)
        .unwrap_or(jiff::Timestamp::MAX)
        .to_string()
}

/// The sessions as a table for people.
#[must_use]
pub fn table(sessions: &[SessionStatus]) -> String {
    if sessions.is_empty() {
        return "no session\n".to_owned();
    }
    let head = [
        "SERVER", "REMOTE", "LINE", "SESSION", "RTT", "STREAMS", "IN", "OUT", "SINCE", "VERSION",
        "",
    ];
    let rows = sessions.iter().map(|s| {
        let suspect = if s.suspect { "silent" } else { "" };
        [
            s.server.clone(),
            s.remote.clone(),
            s.line.clone().unwrap_or_else(|| "-".to_owned()),
            s.session.clone(),
            format!("{} ms", s.rtt_ms),
            s.streams.to_string(),
            s.bytes_in.to_string(),
            s.bytes_out.to_string(),
            s.since.clone(),
            s.version.clone(),
            suspect.to_owned(),
        ]
    });
    let rows: Vec<_> = std::iter::once(head.map(str::to_owned))
        .chain(rows)
        .collect();
    let mut widths = [0; 11];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            write!(line, "{cell:width$}  ").ok(); // a String takes everything
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_shown_as_a_table() {
        assert_eq!(table(&[]), "no session\n");
        let session = SessionStatus {
            agent: "edge1".into(),
            server: "proxy-1".into(),
            session: "00000000000000ff".into(),
            remote: "203.0.113.10:8443".into(),
            line: Some("express".into()),
            transport: "quic".into(),
            rtt_ms: 12.5,
            streams: 3,
            bytes_in: 1,
            bytes_out: 2,
            since: timestamp(UnixTime::since_unix_epoch(std::time::Duration::from_secs(
                1_800_000_000,
            ))),
            version: "proxy-server 0.1.0".into(),
            suspect: true,
        };
        let shown = table(std::slice::from_ref(&session));
        let lines: Vec<_> = shown.lines().collect();
        assert!(lines[0].starts_with("SERVER   REMOTE "), "{shown}");
        assert!(
            lines[1].contains("203.0.113.10:8443") && lines[1].ends_with("silent"),
            "{shown}"
        );
        assert!(lines[1].contains("2027-01-15T08:00:00Z"), "{shown}");
        assert!(
            lines[0].contains(" LINE ") && lines[1].contains(" express "),
            "{shown}"
        );
        let over_none = SessionStatus {
            line: None,
            ..session.clone()
        };
        assert!(table(&[over_none]).contains(":8443  -     0"));
        let json = serde_json::to_string(&session).unwrap();
        assert_eq!(
            serde_json::from_str::<SessionStatus>(&json).unwrap(),
            session
        );
    }
}
