//! Whether lines work, and nodes on them. Pure: evidence and the time in, verdicts out.
//!
//! | verdict | from it by | what requests do |
//! | --- | --- | --- |
//! | up, also before anything is known | a node: `fall` bad ones in a row, or one more than that within a minute; a line: at least two nodes that were well, and half of those that were up, lost within a minute | the line, the tunnel beside it after a while |
//! | down | nothing but good ones over `stable`: of a node at least `rise`; of a line, of at least as many of its nodes as are still lost | the tunnel, the line beside it when that is slow or fails |
//!
//! A line whose dials come back to this server, as rules of this machine don't exempt them, looks well to whoever dials: it is
//! left alone for ten minutes from the last that came.
//!
//! What bounces is waited for ever longer: see [`gate`](super::gate).
//!
//! A node that was down before says nothing of its line, nor one that was never well, nor any longer one that has been down
//! for a minute and `stable`: nodes are switched off for the weekend. The routes of this machine (line `route`) lead to all
//! sites, and what becomes of some of these says nothing of the others: that line is never judged.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::gate::Gate;
use crate::config::{PathSettings, ROUTE};

/// What is lost within this was lost at once.
const AT_ONCE: Duration = Duration::from_secs(60);
/// A line whose dials came back here is left alone for so long: only a dial shows whether they still do.
const LED_BACK: Duration = Duration::from_mins(10);
/// So many bad ones are remembered at most, whatever `fall` is.
const MOST_LAPSES: usize = 60;
/// A new round trip counts for one part in so many.
const SMOOTH: u32 = 8;

/// What was seen of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Evidence {
    /// It answered after so long, if only to refuse.
    Good(Duration),
    /// It did not.
    Bad,
}

/// What is known of a node on a line.
#[derive(Debug, Clone)]
struct Node {
    gate: Gate,
    /// In a row.
    good: u32,
    bad: u32,
    /// When the last bad ones were, the oldest first; no more than it takes to fall.
    lapses: VecDeque<Instant>,
    /// It has been well at all.
    was_well: bool,
    rtt: Option<Duration>,
    /// What was last seen, a bit each, the newest lowest: 1 is bad.
    recent: u32,
    seen: u32,
}

impl Node {
    fn new(now: Instant) -> Self {
        Self {
            gate: Gate::new(now),
            good: 0,
            bad: 0,
            lapses: VecDeque::new(),
            was_well: false,
            rtt: None,
            recent: 0,
            seen: 0,
        }
    }

    /// Whether its verdict has changed.
    fn heard(&mut self, now: Instant, rules: &PathSettings, evidence: Evidence) -> bool {
        self.recent = self.recent << 1 | u32::from(evidence == Evidence::Bad);
        self.seen = (self.seen + 1).min(u32::BITS);
        match evidence {
            Evidence::Good(rtt) => {
                (self.good, self.bad) = (self.good.saturating_add(1), 0);
                self.was_well = true;
                self.rtt = Some(match self.rtt {
                    Some(before) => (before * (SMOOTH - 1) + rtt) / SMOOTH,
                    None => rtt,
                });
                // The time counts from the first good one, whether it is enough of them or not.
                self.gate.well.get_or_insert(now);
                let is_enough = self.good >= rules.probes.rise;
                !self.gate.is_up && is_enough && self.gate.rise(now, rules.stable)
            }
            Evidence::Bad => {
                (self.good, self.bad) = (0, self.bad.saturating_add(1));
                self.gate.well = None;
                let falls = self.gate.is_up && self.is_too_bad(now, rules.probes.fall);
                if falls {
                    self.gate.fall(now, rules.stable);
                    self.lapses.clear();
                }
                falls
            }
        }
    }

    /// Takes in a bad one. A line that bounces may be there again whenever it is looked at a second time: so it also
    /// counts how often it was not within a minute.
    fn is_too_bad(&mut self, now: Instant, fall: u32) -> bool {
        let most = usize::try_from(fall).unwrap_or(usize::MAX).min(MOST_LAPSES) + 1;
        self.lapses.push_back(now);
        while self.lapses.len() > most
            || self
                .lapses
                .front()
                .is_some_and(|at| now.duration_since(*at) > AT_ONCE)
        {
            self.lapses.pop_front();
        }
        self.bad >= fall || self.lapses.len() == most
    }

    /// Lost with others: not before that, and not for so long that it speaks for itself only.
    fn is_lost(&self, since: Instant) -> bool {
        self.was_well && self.bad > 0 && (self.gate.is_up || self.gate.since >= since)
    }
}

#[derive(Debug)]
struct OfLine {
    gate: Gate,
    /// When a dial by it last came back to this server.
    led_back: Option<Instant>,
    nodes: HashMap<String, Node>,
}

impl OfLine {
    /// Whether its verdict has changed.
    fn judge(&mut self, now: Instant, stable: Duration) -> bool {
        let window = if self.gate.is_up {
            AT_ONCE
        } else {
            AT_ONCE + stable
        };
        let begin = now.checked_sub(window).unwrap_or(now);
        let nodes = || self.nodes.values();
        let lost = nodes().filter(|node| node.is_lost(begin)).count();
        if self.gate.is_up {
            // Those of which nothing is known yet are among them.
            let were_up = nodes().filter(|node| node.gate.is_up || node.is_lost(begin));
            let falls = lost >= 2 && lost * 2 >= were_up.count();
            if falls {
                self.gate.fall(now, stable);
            }
            return falls;
        }
        let well = nodes().filter(|node| node.good > 0).count();
        if well == 0 || well < lost {
            self.gate.well = None;
            return false;
        }
        self.gate.rise(now, stable)
    }
}

/// A verdict that has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Switch {
    /// Of this node; of the whole line without one.
    pub(crate) node: Option<String>,
    pub(crate) is_up: bool,
}

/// Why a line is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Down {
    /// All of it is down.
    Line,
    /// The node is.
    Node,
    /// What is dialled by it comes back to this server.
    LedBack,
}

/// What is known of a line.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LineFigures {
    pub(crate) is_up: bool,
    /// Since when.
    pub(crate) since: Instant,
    pub(crate) nodes_up: usize,
    pub(crate) nodes_down: usize,
}

/// What is known of a node on a line.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Figures {
    pub(crate) is_up: bool,
    /// Since when.
    pub(crate) since: Instant,
    /// A round trip, of late.
    pub(crate) rtt: Option<Duration>,
    /// Of the last 32 dials at most, what part brought nothing; `None` before the first.
    pub(crate) loss: Option<f64>,
}

/// The health of all lines.
#[derive(Debug)]
pub(crate) struct Health {
    rules: PathSettings,
    lines: BTreeMap<String, OfLine>,
}

impl Default for Health {
    fn default() -> Self {
        Self::new(PathSettings::default())
    }
}

impl Health {
    pub(crate) const fn new(rules: PathSettings) -> Self {
        Self {
            rules,
            lines: BTreeMap::new(),
        }
    }

    /// These nodes are on these lines now. What is known of those that stay is kept.
    pub(crate) fn keep<'a>(&mut self, now: Instant, all: impl Iterator<Item = (&'a str, &'a str)>) {
        let mut old = std::mem::take(&mut self.lines);
        for (line, node) in all {
            let before = old.get_mut(line);
            let known = before.and_then(|before| before.nodes.remove(node));
            let before = old.get(line);
            let of_line = self.lines.entry(line.to_owned());
            let of_line = of_line.or_insert_with(|| OfLine {
                gate: before.map_or_else(|| Gate::new(now), |before| before.gate),
                led_back: before
                    .and_then(|before| before.led_back)
                    .filter(|at| now.duration_since(*at) < LED_BACK),
                nodes: HashMap::new(),
            });
            let known = known.unwrap_or_else(|| Node::new(now));
            of_line.nodes.insert(node.to_owned(), known);
        }
    }

    /// What is known of that node is known no longer.
    pub(crate) fn forget(&mut self, line: &str, node: &str) {
        if let Some(of_line) = self.lines.get_mut(line) {
            of_line.nodes.remove(node);
        }
    }

    /// Something was seen of a node; of one that is not on that line nothing is kept.
    pub(crate) fn heard(
        &mut self,
        now: Instant,
        line: &str,
        node: &str,
        evidence: Evidence,
    ) -> Vec<Switch> {
        let Some(of_line) = self.lines.get_mut(line) else {
            return Vec::new();
        };
        let Some(of_node) = of_line.nodes.get_mut(node) else {
            return Vec::new();
        };
        let mut switches = Vec::new();
        if of_node.heard(now, &self.rules, evidence) {
            let (node, is_up) = (Some(node.to_owned()), of_node.gate.is_up);
            switches.push(Switch { node, is_up });
        }
        let matters = evidence == Evidence::Bad || !of_line.gate.is_up;
        if matters && line != ROUTE && of_line.judge(now, self.rules.stable) {
            let is_up = of_line.gate.is_up;
            switches.push(Switch { node: None, is_up });
        }
        switches
    }

    /// A dial by that line has come back to this server. Tells whether that is new.
    pub(crate) fn led_back(&mut self, now: Instant, line: &str) -> bool {
        let of_line = self.lines.get_mut(line);
        of_line.is_some_and(|of_line| of_line.led_back.replace(now).is_none())
    }

    /// Whether, and why, that node is not reached by that line.
    pub(crate) fn is_down(&self, line: &str, node: &str) -> Option<Down> {
        let of_line = self.lines.get(line)?;
        if of_line.led_back.is_some() {
            return Some(Down::LedBack);
        }
        if !of_line.gate.is_up {
            return Some(Down::Line);
        }
        let of_node = of_line.nodes.get(node)?;
        (!of_node.gate.is_up).then_some(Down::Node)
    }

    /// Whether nothing bad was seen of it last.
    pub(crate) fn is_well(&self, line: &str, node: &str) -> bool {
        let known = self.lines.get(line).and_then(|it| it.nodes.get(node));
        known.is_none_or(|node| node.bad == 0)
    }

    /// How long until that node should be looked at again: sooner where a verdict is under way.
    pub(crate) fn pause(&self, line: &str, node: &str) -> Duration {
        let interval = self.rules.probes.interval;
        let of_line = self.lines.get(line);
        let known = of_line.and_then(|it| it.nodes.get(node));
        let is_up = |node: &Node| node.gate.is_up && of_line.is_none_or(|it| it.gate.is_up);
        match known {
            Some(node) if node.gate.is_up && node.bad > 0 => interval.min(Duration::from_secs(1)),
            // A line that bounces must not be seen in its good moments only.
            Some(node) if !is_up(node) && node.good > 0 => interval.min(self.rules.stable / 30),
            Some(_) | None => interval,
        }
    }

    pub(crate) fn of_node(&self, line: &str, node: &str) -> Option<Figures> {
        let node = self.lines.get(line)?.nodes.get(node)?;
        let bad = node.recent.count_ones();
        Some(Figures {
            is_up: node.gate.is_up,
            since: node.gate.since,
            rtt: node.rtt,
            loss: (node.seen > 0).then(|| f64::from(bad) / f64::from(node.seen)),
        })
    }

    pub(crate) fn of_line(&self, line: &str) -> Option<LineFigures> {
        let of_line = self.lines.get(line)?;
        let up = of_line.nodes.values().filter(|node| node.gate.is_up);
        let (nodes_up, all) = (up.count(), of_line.nodes.len());
        Some(LineFigures {
            is_up: of_line.gate.is_up,
            since: of_line.gate.since,
            nodes_up,
            nodes_down: all - nodes_up,
        })
    }
}

#[cfg(test)]
mod tests;
