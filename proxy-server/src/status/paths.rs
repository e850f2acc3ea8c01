//! How nodes are reached, as operators see it: the way in use, why, since when, and how both ways do.

use serde::{Deserialize, Serialize};

use super::explain::HealthStatus;
use super::{NodeStatus, ms, rows};
use crate::path::Meant;
use crate::serve::Forwarder;

/// How a node is reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PathStatus {
    /// What is decided: `tunnel`, `direct`, `auto` or `refused`.
    pub mode: String,
    /// What carries the next request: `tunnel`, `direct` or `none`.
    pub in_use: String,
    /// The same in words: `direct by express`, `tunnel (line express down)`.
    pub words: String,
    /// What decides, or why no line is taken where one would be.
    pub why: String,
    /// Seconds since that way is taken, or since this server looks; none before it does.
    pub since_s: Option<u64>,
    /// The line that has the node.
    pub line: Option<LinePath>,
    /// The session for the next stream; none if there is none here.
    pub tunnel: Option<TunnelPath>,
}

/// A line to a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinePath {
    /// Its name.
    pub name: String,
    /// Where the node is dialled.
    pub address: String,
    /// As it was seen; none before.
    pub health: Option<HealthStatus>,
}

/// The tunnel to a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TunnelPath {
    /// Round trip, milliseconds.
    pub rtt_ms: f64,
    /// The part of the packets sent of late that was lost, 0 to 1; none as long as too few were sent.
    pub loss: Option<f64>,
}

impl PathStatus {
    /// Of a node at the edge.
    pub(super) fn new(forwarder: &Forwarder, of: &NodeStatus) -> Self {
        let (paths, node) = (&forwarder.paths, of.node.as_str());
        let to = proto::Destination {
            host: proto::Host::Name(node.to_owned()),
            port: of.kubelet_port,
        };
        let decided = forwarder.path_of(Meant {
            node,
            to: &to,
            pod: None,
        });
        let way = paths.in_use(node, &decided.decision);
        let since = paths.since(node, &way);
        let line = decided.decision.bypass().map(|bypass| LinePath {
            name: bypass.line.name.clone(),
            address: bypass.address.to_string(),
            health: {
                let health = paths.health.lock();
                let figures = health.of_node(&bypass.line.name, node);
                figures.map(HealthStatus::new)
            },
        });
        let agent = of.agent.parse().ok();
        let session = agent.and_then(|agent| forwarder.registry.pick(&agent).ok());
        let tunnel = session.map(|session| {
            use proto::transport::Session;
            let stats = session.transport.stats();
            TunnelPath {
                rtt_ms: ms(stats.rtt),
                loss: session.loss.lock().part(&stats),
            }
        });
        Self {
            mode: decided.decision.label().to_owned(),
            in_use: way.label(of.session).to_owned(),
            words: way.words(of.session),
            why: decided.why(),
            since_s: since.map(|since| since.elapsed().as_secs()),
            line,
            tunnel,
        }
    }
}

/// The ways as a table for people; `None` where no node has another one than the tunnel to think of.
#[must_use]
pub fn table(nodes: &[NodeStatus]) -> Option<String> {
    let header = ["NODE", "PATH", "SINCE", "LINE", "TUNNEL", "WHY"];
    let shown = nodes
        .iter()
        .filter_map(|node| Some((&node.node, node.path.as_ref()?)));
    shown.clone().next()?;
    let row = |(node, path): (&String, &PathStatus)| {
        let health = path.line.as_ref().and_then(|line| line.health.as_ref());
        let line = health.map(|health| figures(health.rtt_ms, health.loss));
        let tunnel = path.tunnel.as_ref();
        let tunnel = tunnel.map(|tunnel| figures(Some(tunnel.rtt_ms), tunnel.loss));
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        [
            node.clone(),
            path.words.clone(),
            or_dash(path.since_s.map(ago)),
            or_dash(line),
            or_dash(tunnel),
            path.why.clone(),
        ]
    };
    Some(rows(header, shown.map(row)))
}

/// A round trip and what is lost, as `1.2ms 0%`.
fn figures(rtt_ms: Option<f64>, loss: Option<f64>) -> String {
    let rtt = rtt_ms.map_or_else(|| "-".to_owned(), |rtt| format!("{rtt:.1}ms"));
    match loss.map(|loss| loss * 100.0) {
        Some(loss) if loss > 0.0 && loss < 1.0 => format!("{rtt} {loss:.1}%"),
        Some(loss) => format!("{rtt} {loss:.0}%"),
        None => rtt,
    }
}

/// A time in its largest unit.
fn ago(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_figures_are_short_and_a_little_loss_is_not_none() {
        for (seconds, wanted) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (7_199, "119m"),
            (7_200, "2h"),
            (172_800, "2d"),
        ] {
            assert_eq!(ago(seconds), wanted);
        }
        for (rtt, loss, wanted) in [
            (Some(1.234), Some(0.0), "1.2ms 0%"),
            (Some(1.0), Some(0.004), "1.0ms 0.4%"),
            (None, Some(1.0), "- 100%"),
            (Some(24.06), None, "24.1ms"),
        ] {
            assert_eq!(figures(rtt, loss), wanted);
        }
    }
}
