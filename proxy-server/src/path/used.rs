//! Which way each node is reached now, since when, and which changes nobody has been told of yet. Pure.
//!
//! [`Use`] is the one word for it: `explain`, `nodes`, service discovery, the log and Events have it from here.
//!
//! | the policy says | the line | in use |
//! | --- | --- | --- |
//! | `tunnel` | – | the tunnel |
//! | `auto` | works, as far as is known | the line |
//! | `auto` | it, or the node on it, is down | the tunnel in its place; without a session the line all the same |
//! | `auto` | what is dialled by it comes back here | the tunnel in its place |
//! | `direct` | works, or is down | the line |
//! | `direct`, and no line may be taken | – | nothing |
//!
//! Sessions come and go by themselves and are no change of the way. What is told is the way a node has when its turn comes:
//! who was led away and back before that, is not told of.

use std::collections::{HashMap, VecDeque};

use tokio::time::Instant;

use super::health::Down;
use super::policy::Decision;

/// Which way is taken now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Use {
    /// The tunnel, and no line is thought of.
    Tunnel,
    /// This line.
    Line(String),
    /// This line although it is down, as there is to be nothing else.
    Alone(String, Down),
    /// The tunnel in place of this line.
    Instead(String, Down),
    /// Only a line would do, and none may be taken.
    Nothing,
}

impl Use {
    /// What follows from a decision; `down` knows why a line is not to be taken.
    pub(crate) fn of(decision: &Decision, down: impl FnOnce(&str) -> Option<Down>) -> Self {
        let (bypass, is_only) = match decision {
            Decision::Tunnel => return Self::Tunnel,
            Decision::Refused => return Self::Nothing,
            Decision::Direct(bypass) => (bypass, true),
            Decision::Auto(bypass) => (bypass, false),
        };
        let line = bypass.line.name.clone();
        match (down(&line), is_only) {
            (None, _) => Self::Line(line),
            (Some(down), true) => Self::Alone(line, down),
            (Some(down), false) => Self::Instead(line, down),
        }
    }

    /// `tunnel`, `direct` or `none`: what carries the next request.
    pub(crate) const fn label(&self, has_session: bool) -> &'static str {
        match (self, has_session) {
            (Self::Tunnel | Self::Instead(..), true) => "tunnel",
            (Self::Tunnel | Self::Instead(_, Down::LedBack), false) | (Self::Nothing, _) => "none",
            (Self::Line(_) | Self::Alone(..), _) | (Self::Instead(..), false) => "direct",
        }
    }

    /// For people, in a few words.
    pub(crate) fn words(&self, has_session: bool) -> String {
        match (self, has_session) {
            (Self::Tunnel, true) => "tunnel".to_owned(),
            (Self::Tunnel, false) => "none (no session)".to_owned(),
            (Self::Line(line), _) => format!("direct by {line}"),
            (Self::Alone(line, Down::Line), _) => format!("direct by {line} (line down)"),
            (Self::Alone(line, Down::Node), _) => format!("direct by {line} (down)"),
            (Self::Instead(line, Down::Line), true) => format!("tunnel (line {line} down)"),
            (Self::Instead(line, Down::Node), true) => format!("tunnel (down on {line})"),
            (Self::Alone(line, Down::LedBack), _) => {
                format!("direct by {line} (led back here)")
            }
            (Self::Instead(line, Down::LedBack), true) => {
                format!("tunnel ({line} leads back here)")
            }
            (Self::Instead(line, Down::LedBack), false) => {
                format!("none (no session, {line} leads back here)")
            }
            (Self::Instead(line, _), false) => format!("direct by {line} (down, no session)"),
            (Self::Nothing, _) => "none (refused)".to_owned(),
        }
    }

    /// Whether it is the same way, whatever is the matter with the line.
    fn is_same_way(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Alone(one, _), Self::Alone(other, _))
            | (Self::Instead(one, _), Self::Instead(other, _)) => one == other,
            (one, other) => one == other,
        }
    }
}

/// What a change is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The line is not there any more.
    LineDown,
    /// It is there again.
    LineUp,
    /// Something else is decided.
    Decided,
}

/// A node whose way is another one now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) node: String,
    pub(crate) from: Use,
    pub(crate) to: Use,
    /// What decides.
    pub(crate) why: String,
}

impl Change {
    pub(crate) fn kind(&self) -> Kind {
        match (&self.from, &self.to) {
            (Use::Line(one), Use::Alone(other, _) | Use::Instead(other, _)) if one == other => {
                Kind::LineDown
            }
            (Use::Alone(one, _) | Use::Instead(one, _), Use::Line(other)) if one == other => {
                Kind::LineUp
            }
            _ => Kind::Decided,
        }
    }
}

#[derive(Debug)]
struct Node {
    decision: Decision,
    why: String,
    now: Use,
    since: Instant,
    /// What was last told of it.
    told: Use,
    is_waiting: bool,
}

/// Each node at the edge.
#[derive(Debug, Default)]
pub(crate) struct Used {
    nodes: HashMap<String, Node>,
    /// Those that may have to be told of, each once.
    waiting: VecDeque<String>,
}

impl Used {
    /// These nodes there are now, with what is decided for each and by what. Says which are reached another way than
    /// before; of one that is new nothing is said.
    pub(crate) fn keep(
        &mut self,
        now: Instant,
        all: impl Iterator<Item = (String, Decision, String)>,
        down: impl Fn(&str, &str) -> Option<Down>,
    ) -> Vec<Change> {
        let mut old = std::mem::take(&mut self.nodes);
        let mut changes = Vec::new();
        for (name, decision, why) in all {
            let to = Use::of(&decision, |line| down(line, &name));
            let node = match old.remove(&name) {
                Some(mut node) => {
                    (node.decision, node.why) = (decision, why);
                    changes.extend(node.turn(now, &name, to, &mut self.waiting));
                    node
                }
                None => Node {
                    decision,
                    why,
                    now: to.clone(),
                    since: now,
                    told: to,
                    is_waiting: false,
                },
            };
            self.nodes.insert(name, node);
        }
        self.waiting.retain(|name| self.nodes.contains_key(name));
        changes
    }

    /// Verdicts have changed: of that node, or of a whole line.
    pub(crate) fn judge(
        &mut self,
        now: Instant,
        only: Option<&str>,
        down: impl Fn(&str, &str) -> Option<Down>,
    ) -> Vec<Change> {
        let waiting = &mut self.waiting;
        let mut judge = |(name, node): (&String, &mut Node)| {
            let to = Use::of(&node.decision, |line| down(line, name));
            node.turn(now, name, to, waiting)
        };
        match only {
            Some(name) => {
                let node = self.nodes.get_mut(name);
                let change = node.and_then(|node| judge((&name.to_owned(), node)));
                change.into_iter().collect()
            }
            None => self.nodes.iter_mut().filter_map(judge).collect(),
        }
    }

    /// Since when that way is taken; `None` if that is not known, or it is another one.
    pub(crate) fn since(&self, node: &str, way: &Use) -> Option<Instant> {
        let node = self.nodes.get(node)?;
        node.now.is_same_way(way).then_some(node.since)
    }

    /// Nobody could be told of that change: it waits again, behind the others, for what is so by then.
    pub(crate) fn untold(&mut self, change: Change) {
        if let Some(node) = self.nodes.get_mut(&change.node) {
            node.told = change.from;
            if !std::mem::replace(&mut node.is_waiting, true) {
                self.waiting.push_back(change.node);
            }
        }
    }

    /// The next that is to be told of.
    pub(crate) fn next(&mut self) -> Option<Change> {
        while let Some(name) = self.waiting.pop_front() {
            let Some(node) = self.nodes.get_mut(&name) else {
                continue;
            };
            node.is_waiting = false;
            let from = std::mem::replace(&mut node.told, node.now.clone());
            if !from.is_same_way(&node.now) {
                return Some(Change {
                    node: name,
                    from,
                    to: node.now.clone(),
                    why: node.why.clone(),
                });
            }
        }
        None
    }
}

impl Node {
    fn turn(
        &mut self,
        now: Instant,
        name: &str,
        to: Use,
        waiting: &mut VecDeque<String>,
    ) -> Option<Change> {
        let from = std::mem::replace(&mut self.now, to);
        if from.is_same_way(&self.now) {
            return None;
        }
        self.since = now;
        if !std::mem::replace(&mut self.is_waiting, true) {
            waiting.push_back(name.to_owned());
        }
        Some(Change {
            node: name.to_owned(),
            from,
            to: self.now.clone(),
            why: self.why.clone(),
        })
    }
}

#[cfg(test)]
mod tests;
