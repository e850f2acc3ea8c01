//! Where a destination leads now, by what way and why: every rule that was looked at, and the figures behind it.

use std::fmt::Write as _;

use proto::Destination;
use serde::{Deserialize, Serialize};

use super::{SessionStatus, ms};
use crate::config::Elsewhere;
use crate::path::Meant;
use crate::path::health::{Down, Figures};
use crate::path::policy::{Bypass, Decision, Finding, Rule, Unfit};
use crate::path::used::Use;
use crate::route::Route;
use crate::serve::Forwarder;

/// Where a destination leads.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Explained {
    /// As asked for.
    pub destination: String,
    /// Why it leads nowhere.
    pub refusal: Option<String>,
    /// The node that it leads to; none if it is not at the edge.
    pub node: Option<String>,
    /// Who serves that.
    pub agent: Option<String>,
    /// What is dialled in the end.
    pub dialled: Option<String>,
    /// `tunnel`, `direct`, `auto` or `refused`; none if it is not at the edge.
    pub path: Option<String>,
    /// Each rule for it, in order.
    pub rules: Vec<RuleStatus>,
    /// Why no line is taken where one would be.
    pub unfit: Option<String>,
    /// The line.
    pub line: Option<LineStatus>,
    /// The agent's sessions here.
    pub sessions: Vec<SessionStatus>,
    /// Other servers with a session of the agent.
    pub servers: Vec<String>,
    /// What the next request does.
    pub next: String,
}

/// A rule and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RuleStatus {
    /// In words.
    pub rule: String,
    /// In words.
    pub finding: String,
}

/// A line, and the node on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LineStatus {
    /// Its name.
    pub name: String,
    /// Where the node is dialled.
    pub address: String,
    /// Whether it is taken to work; as long as nothing is known, it is.
    pub up: bool,
    /// Seconds since that changed; none before its first probe.
    pub since_s: Option<u64>,
    /// Its nodes that work.
    pub nodes_up: usize,
    /// Those that don't.
    pub nodes_down: usize,
    /// Of the node; none if it is not probed on this line.
    pub node: Option<HealthStatus>,
}

/// How a node on a line does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HealthStatus {
    /// Whether it is taken to work.
    pub up: bool,
    /// Seconds since that changed.
    pub since_s: u64,
    /// A round trip of late, milliseconds.
    pub rtt_ms: Option<f64>,
    /// The part of the last dials, 32 at most, that brought nothing, 0 to 1.
    pub loss: Option<f64>,
}

/// Where that leads now. Whoever asks is not asked for his rights.
#[must_use]
pub fn explain(forwarder: &Forwarder, server: &str, destination: &Destination) -> Explained {
    let mut told = Explained {
        destination: destination.to_string(),
        ..Explained::default()
    };
    match forwarder.route(destination, Elsewhere::Refuse) {
        Err(refusal) => {
            told.next = format!("is refused: {refusal}");
            told.refusal = Some(refusal.to_string());
        }
        Ok(Route::Elsewhere(to)) => {
            "is not for the edge: refused, or dialled from here where the frontend says `default: direct`"
                .clone_into(&mut told.next);
            told.dialled = Some(to.to_string());
        }
        Ok(Route::Edge {
            agent,
            node,
            to,
            pod,
        }) => {
            let meant = Meant {
                node: &node,
                to: &to,
                pod: pod.as_ref(),
            };
            let decided = forwarder.path_of(meant);
            let sessions = forwarder.registry.of(&agent);
            let sessions = sessions.iter().map(|it| SessionStatus::new(server, it));
            told.sessions = sessions.collect();
            let servers = forwarder.peers.agents().remove(&agent);
            let servers = servers.into_iter().flatten();
            told.servers = servers.map(|server| server.to_string()).collect();
            told.rules = decided.rules.iter().map(RuleStatus::new).collect();
            told.unfit = decided.unfit.as_ref().map(Unfit::to_string);
            told.path = Some(decided.decision.label().to_owned());
            told.next = next(forwarder, &decided.decision, &node);
            if let Some(bypass) = decided.decision.bypass() {
                told.line = Some(LineStatus::new(forwarder, bypass, &node));
            }
            told.dialled = Some(to.to_string());
            (told.node, told.agent) = (Some(node), Some(agent.to_string()));
        }
    }
    told
}

fn next(forwarder: &Forwarder, decision: &Decision, node: &str) -> String {
    let paths = &forwarder.paths;
    match paths.in_use(node, decision) {
        Use::Tunnel => "goes through the tunnel".to_owned(),
        Use::Nothing => "is refused: only a line would do, and none may be taken".to_owned(),
        Use::Line(line) if matches!(decision, Decision::Auto(_)) => format!(
            "goes by line {line}, with the tunnel beside it after {}",
            humantime::format_duration(paths.settings.race_after)
        ),
        Use::Line(line) | Use::Alone(line, _) => format!("goes by line {line}, and nothing else"),
        Use::Instead(line, Down::Line) => format!(
            "goes through the tunnel, as line {line} is down; by the line if the tunnel is slow or fails"
        ),
        Use::Instead(line, Down::Node) => format!(
            "goes through the tunnel, as the node is down on line {line}; by the line if the tunnel is slow or fails"
        ),
        Use::Instead(line, Down::LedBack) => format!(
            "goes through the tunnel, as what is dialled by line {line} comes back to this server: rules of this machine don't exempt its mark"
        ),
    }
}

impl RuleStatus {
    fn new((rule, finding): &(Rule, Finding)) -> Self {
        Self {
            rule: rule.label().to_owned(),
            finding: finding.to_string(),
        }
    }
}

impl LineStatus {
    fn new(forwarder: &Forwarder, bypass: &Bypass, node: &str) -> Self {
        let (name, health) = (&bypass.line.name, forwarder.paths.health.lock());
        let known = health.of_line(name);
        Self {
            name: name.clone(),
            address: bypass.address.to_string(),
            up: known.is_none_or(|known| known.is_up),
            since_s: known.map(|known| known.since.elapsed().as_secs()),
            nodes_up: known.map_or(0, |known| known.nodes_up),
            nodes_down: known.map_or(0, |known| known.nodes_down),
            node: health.of_node(name, node).map(HealthStatus::new),
        }
    }
}

impl HealthStatus {
    pub(super) fn new(figures: Figures) -> Self {
        Self {
            up: figures.is_up,
            since_s: figures.since.elapsed().as_secs(),
            rtt_ms: figures.rtt.map(ms),
            loss: figures.loss,
        }
    }
}

fn lost(loss: Option<f64>) -> String {
    let part = loss.map(|loss| format!(", {:.0} % lost", loss * 100.0));
    part.unwrap_or_default()
}

const fn state(is_up: bool) -> &'static str {
    if is_up { "up" } else { "down" }
}

/// Some lines for people.
#[must_use]
pub fn lines(told: &Explained) -> String {
    let mut rows = vec![("destination", told.destination.clone())];
    if let (Some(node), Some(agent), Some(dialled)) = (&told.node, &told.agent, &told.dialled) {
        let to = format!("node {node}, agent {agent}, dialled as {dialled}");
        rows.push(("route", to));
    }
    if let Some(path) = &told.path {
        let by = told.line.as_ref();
        let by = by.map(|line| format!(", by line {} to {}", line.name, line.address));
        let unfit = told.unfit.as_ref().map(|why| format!(": {why}"));
        let more = by.or(unfit).unwrap_or_default();
        rows.push(("path", format!("{path}{more}")));
    }
    let rules = told.rules.iter();
    rows.extend(rules.map(|it| ("", format!("{}: {}", it.rule, it.finding))));
    if let Some(line) = &told.line {
        rows.push(("line", line.words()));
        if let Some(node) = &line.node {
            rows.push(("node", node.words()));
        }
    }
    if told.node.is_some() {
        rows.push(("sessions", sessions(told)));
    }
    rows.push(("next request", told.next.clone()));
    let mut out = String::new();
    for (what, words) in rows {
        let what = if what.is_empty() {
            String::new()
        } else {
            format!("{what}:")
        };
        writeln!(out, "{what:<14}{words}").ok(); // writing to a string can't fail
    }
    out
}

fn sessions(told: &Explained) -> String {
    let here = told.sessions.iter().map(|it| {
        let over = it.line.as_ref();
        let over = over.map_or_else(String::new, |line| format!("over line {line} "));
        format!("here {over}({} ms{})", it.rtt_ms, lost(it.loss))
    });
    let there = told.servers.iter().map(|server| format!("at {server}"));
    let all: Vec<_> = here.chain(there).collect();
    if all.is_empty() {
        return "none".to_owned();
    }
    all.join(", ")
}

impl LineStatus {
    fn words(&self) -> String {
        let Self {
            name,
            nodes_up,
            nodes_down,
            ..
        } = self;
        match self.since_s {
            Some(since) => format!(
                "{name} is {} for {since} s; {nodes_up} of its nodes up, {nodes_down} down",
                state(self.up)
            ),
            None => format!("{name}, of which nothing is known yet"),
        }
    }
}

impl HealthStatus {
    fn words(&self) -> String {
        let rtt = self.rtt_ms.map(|rtt| format!(", {rtt} ms"));
        let (state, since, rtt) = (state(self.up), self.since_s, rtt.unwrap_or_default());
        format!("{state} on it for {since} s{rtt}{}", lost(self.loss))
    }
}
