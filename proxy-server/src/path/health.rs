//! Whether lines work, and nodes on them. Pure: evidence and the time in, verdicts out.
//!
//! | verdict | from it by | what requests do |
//! | --- | --- | --- |
//! | up, also before anything is known | a node: `fall` bad ones in a row; a line: at least two nodes, and half of those that were up, lost within a minute | the line, the tunnel beside it after a while |
//! | down | nothing but good ones over `stable`: of a node at least `rise`; of a line, of at least as many of its nodes as are still lost | the tunnel; the line if there is no session |
//!
//! What goes down again before it has held for ten times `stable` is waited for twice as long the next time, up to sixteen
//! times. So a line that bounces does not lead requests back and forth: the way out is quick, the way back is not.
//!
//! A node that was down before says nothing of its line: nodes are switched off for the weekend.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::PathSettings;

/// What is lost within this was lost at once.
const AT_ONCE: Duration = Duration::from_secs(60);
/// It has held after so many times `stable`.
const HELD: u32 = 10;
/// So often the wait is doubled.
const DOUBLED: u32 = 4;
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

/// Something that is up or down.
#[derive(Debug, Clone, Copy)]
struct Gate {
    is_up: bool,
    /// Since when.
    since: Instant,
    /// While it is down: since when all is well again.
    well: Option<Instant>,
    /// How often the wait is doubled.
    doubled: u32,
    /// It has been down before.
    has_returned: bool,
}

impl Gate {
    const fn new(now: Instant) -> Self {
        Self {
            is_up: true,
            since: now,
            well: None,
            doubled: 0,
            has_returned: false,
        }
    }

    fn fall(&mut self, now: Instant, stable: Duration) {
        let too_soon = now.duration_since(self.since) < stable * HELD;
        self.doubled = match self.has_returned && too_soon {
            true => (self.doubled + 1).min(DOUBLED),
            false => 0,
        };
        (self.is_up, self.since, self.well) = (false, now, None);
    }

    /// Whether it is up again, all being well.
    fn rise(&mut self, now: Instant, stable: Duration) -> bool {
        let well = *self.well.get_or_insert(now);
        if now.duration_since(well) < stable * (1 << self.doubled) {
            return false;
        }
        (self.is_up, self.since, self.has_returned) = (true, now, true);
        true
    }
}

/// What is known of a node on a line.
#[derive(Debug, Clone)]
struct Node {
    gate: Gate,
    /// In a row.
    good: u32,
    bad: u32,
    rtt: Option<Duration>,
    /// What was last seen, a bit each, the newest lowest: 1 is bad.
    recent: u32,
    seen: u32,
}

impl Node {
    const fn new(now: Instant) -> Self {
        Self {
            gate: Gate::new(now),
            good: 0,
            bad: 0,
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
                let falls = self.gate.is_up && self.bad >= rules.probes.fall;
                if falls {
                    self.gate.fall(now, rules.stable);
                }
                falls
            }
        }
    }

    /// Lost with others: not before that.
    fn is_lost(&self, since: Instant) -> bool {
        self.bad > 0 && (self.gate.is_up || self.gate.since >= since)
    }
}

#[derive(Debug)]
struct OfLine {
    gate: Gate,
    nodes: HashMap<String, Node>,
}

impl OfLine {
    /// Whether its verdict has changed.
    fn judge(&mut self, now: Instant, stable: Duration) -> bool {
        let begin = if self.gate.is_up {
            now
        } else {
            self.gate.since
        };
        let begin = begin.checked_sub(AT_ONCE).unwrap_or(begin);
        let lost = self.nodes.values().filter(|node| node.is_lost(begin));
        let well = self.nodes.values().filter(|node| node.good > 0);
        let (lost, well) = (lost.count(), well.count());
        if self.gate.is_up {
            let falls = lost >= 2 && lost >= well;
            if falls {
                self.gate.fall(now, stable);
            }
            return falls;
        }
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
            let gate = old
                .get(line)
                .map_or_else(|| Gate::new(now), |before| before.gate);
            let of_line = self.lines.entry(line.to_owned());
            let of_line = of_line.or_insert_with(|| OfLine {
                gate,
                nodes: HashMap::new(),
            });
            let known = known.unwrap_or_else(|| Node::new(now));
            of_line.nodes.insert(node.to_owned(), known);
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
        if matters && of_line.judge(now, self.rules.stable) {
            let is_up = of_line.gate.is_up;
            switches.push(Switch { node: None, is_up });
        }
        switches
    }

    /// Whether, and why, that node is not reached by that line.
    pub(crate) fn is_down(&self, line: &str, node: &str) -> Option<Down> {
        let of_line = self.lines.get(line)?;
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
        let known = self.lines.get(line).and_then(|it| it.nodes.get(node));
        match known {
            Some(node) if node.gate.is_up && node.bad > 0 => interval.min(Duration::from_secs(1)),
            // A line that bounces must not be seen in its good moments only.
            Some(node) if !node.gate.is_up && node.good > 0 => interval.min(self.rules.stable / 30),
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: Evidence = Evidence::Good(Duration::from_millis(2));

    fn nodes(count: usize) -> Vec<String> {
        (0..count).map(|i| format!("n{i}")).collect()
    }

    fn health(now: Instant, names: &[String]) -> Health {
        let mut health = Health::default();
        health.keep(now, names.iter().map(|name| ("l", name.as_str())));
        health
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn of_node(node: &str, is_up: bool) -> Vec<Switch> {
        let node = Some(node.to_owned());
        vec![Switch { node, is_up }]
    }

    #[test]
    fn a_node_falls_after_two_bad_ones_in_a_row_and_returns_after_half_a_minute_of_good_ones() {
        let start = Instant::now();
        let mut health = health(start, &nodes(1));
        let mut at = |second: u64, evidence| {
            let switches = health.heard(start + secs(second), "l", "n0", evidence);
            (switches, health.is_down("l", "n0"))
        };
        assert_eq!(at(0, GOOD), (vec![], None));
        assert_eq!(at(1, Evidence::Bad), (vec![], None));
        assert_eq!(at(2, GOOD), (vec![], None));
        assert_eq!(at(3, Evidence::Bad), (vec![], None));
        assert_eq!(
            at(4, Evidence::Bad),
            (of_node("n0", false), Some(Down::Node))
        );
        assert_eq!(at(5, Evidence::Bad), (vec![], Some(Down::Node)));
        assert_eq!(at(6, GOOD), (vec![], Some(Down::Node)));
        assert_eq!(at(30, GOOD), (vec![], Some(Down::Node)));
        // All over again.
        assert_eq!(at(31, Evidence::Bad), (vec![], Some(Down::Node)));
        assert_eq!(at(32, GOOD), (vec![], Some(Down::Node)));
        // Long enough, and not often enough.
        assert_eq!(at(63, GOOD), (vec![], Some(Down::Node)));
        assert_eq!(at(64, GOOD), (of_node("n0", true), None));
    }

    #[test]
    fn what_does_not_last_is_waited_for_twice_as_long() {
        let start = Instant::now();
        let mut health = health(start, &nodes(1));
        let mut now = start;
        let mut waits = Vec::new();
        for _ in 0..7 {
            while health.is_down("l", "n0").is_none() {
                health.heard(now, "l", "n0", Evidence::Bad);
            }
            let fell = now;
            while health.is_down("l", "n0").is_some() {
                health.heard(now, "l", "n0", GOOD);
                now += secs(1);
            }
            waits.push(now.duration_since(fell).as_secs() - 1);
        }
        assert_eq!(waits, [30, 60, 120, 240, 480, 480, 480]);
        // It has held.
        now += secs(301);
        health.heard(now, "l", "n0", Evidence::Bad);
        health.heard(now, "l", "n0", Evidence::Bad);
        for second in 0..=30 {
            health.heard(now + secs(second), "l", "n0", GOOD);
        }
        assert_eq!(health.is_down("l", "n0"), None);
    }

    /// As it is probed, with its pauses, for ten minutes.
    fn switches_of_a_line_that_bounces(period: Duration, offset: Duration) -> usize {
        let start = Instant::now();
        let mut health = health(start, &nodes(1));
        let (mut passed, mut switches) = (Duration::ZERO, 0);
        while passed < secs(600) {
            let phase = (passed + offset).as_millis() / period.as_millis();
            let evidence = if phase.is_multiple_of(2) {
                GOOD
            } else {
                Evidence::Bad
            };
            switches += health.heard(start + passed, "l", "n0", evidence).len();
            passed += health.pause("l", "n0");
        }
        switches
    }

    #[test]
    fn a_line_that_bounces_each_three_seconds_is_switched_at_most_once_a_minute() {
        for offset in 0..60 {
            let offset = Duration::from_millis(offset * 100);
            let switches = switches_of_a_line_that_bounces(secs(3), offset);
            assert!((1..=10).contains(&switches), "{switches} at {offset:?}");
        }
    }

    #[test]
    fn a_line_that_loses_half_of_its_nodes_at_once_is_down_for_all_of_them() {
        let start = Instant::now();
        let names = nodes(6);
        let mut health = health(start, &names);
        let all = |health: &mut Health, now, evidence| {
            let heard = names
                .iter()
                .flat_map(|name| health.heard(now, "l", name, evidence));
            heard
                .filter(|switch| switch.node.is_none())
                .collect::<Vec<_>>()
        };
        assert_eq!(all(&mut health, start, GOOD), []);
        let cut = start + secs(10);
        for name in &names[..2] {
            assert_eq!(health.heard(cut, "l", name, Evidence::Bad), []);
        }
        let line = |is_up| Switch { node: None, is_up };
        assert_eq!(health.heard(cut, "l", "n2", Evidence::Bad), [line(false)]);
        assert_eq!(health.is_down("l", "n5"), Some(Down::Line));
        let figures = health.of_line("l").unwrap();
        let counts = (figures.nodes_up, figures.nodes_down);
        assert_eq!((figures.is_up, counts), (false, (6, 0)));
        // Back for as long as it takes, most of them at once.
        for second in 0..30 {
            assert_eq!(all(&mut health, cut + secs(20 + second), GOOD), []);
        }
        assert_eq!(all(&mut health, cut + secs(50), GOOD), [line(true)]);
        assert_eq!(health.is_down("l", "n5"), None);
    }

    #[test]
    fn nodes_that_were_down_before_say_nothing_of_their_line() {
        let start = Instant::now();
        let names = nodes(10);
        let mut health = health(start, &names);
        // Switched off, one an hour.
        for (hour, name) in (0..).zip(&names[..8]) {
            let now = start + secs(hour * 3600);
            for other in &names[8..] {
                health.heard(now, "l", other, GOOD);
            }
            for _ in 0..2 {
                health.heard(now, "l", name, Evidence::Bad);
            }
            assert_eq!(health.is_down("l", name), Some(Down::Node), "{name}");
        }
        assert_eq!(health.is_down("l", "n9"), None);
        let later = start + secs(9 * 3600);
        health.heard(later, "l", "n8", Evidence::Bad);
        assert_eq!(health.is_down("l", "n9"), None, "one of two is not many");
        health.heard(later, "l", "n9", Evidence::Bad);
        assert_eq!(health.is_down("l", "n9"), Some(Down::Line));
        for second in 0..=30 {
            for name in &names[8..] {
                health.heard(later + secs(second), "l", name, GOOD);
            }
        }
        assert_eq!(health.is_down("l", "n9"), None);
    }

    #[test]
    fn what_is_known_stays_with_those_that_stay() {
        let start = Instant::now();
        let mut health = health(start, &nodes(2));
        for _ in 0..2 {
            health.heard(start, "l", "n1", Evidence::Bad);
        }
        assert_eq!(health.is_down("l", "n1"), Some(Down::Node));
        health.keep(start, [("l", "n1"), ("m", "n0")].into_iter());
        assert_eq!(health.is_down("l", "n1"), Some(Down::Node));
        assert_eq!(health.is_down("m", "n0"), None);
        assert_eq!(health.of_node("l", "n0"), None);
        health.keep(start, [("m", "n1")].into_iter());
        assert_eq!(health.is_down("m", "n1"), None);
        assert_eq!(health.heard(start, "l", "n1", Evidence::Bad), []);
    }

    #[test]
    fn figures_tell_the_round_trip_and_the_loss() {
        let start = Instant::now();
        let mut health = health(start, &nodes(1));
        assert_eq!(health.of_node("l", "n0").unwrap().loss, None);
        for evidence in [GOOD, GOOD, Evidence::Bad, GOOD] {
            health.heard(start, "l", "n0", evidence);
        }
        let figures = health.of_node("l", "n0").unwrap();
        assert_eq!(figures.loss, Some(0.25));
        assert_eq!(figures.rtt, Some(Duration::from_millis(2)));
        for _ in 0..100 {
            health.heard(start, "l", "n0", Evidence::Bad);
        }
        assert_eq!(health.of_node("l", "n0").unwrap().loss, Some(1.0));
    }

    proptest! {
        /// Whatever is seen, and when: nothing is up again before it was well for `stable`, and at most three times in a
        /// minute anything changes: out, back after thirty seconds, out again.
        #[test]
        fn nothing_flaps(seen in prop::collection::vec((any::<bool>(), 0_u64..4000), 1..400)) {
            let start = Instant::now();
            let mut health = health(start, &nodes(1));
            let mut now = start;
            let mut switches: Vec<Instant> = Vec::new();
            let mut bad = start;
            for (is_good, pause) in seen {
                now += Duration::from_millis(pause);
                if !is_good { bad = now; }
                for switch in health.heard(now, "l", "n0", if is_good { GOOD } else { Evidence::Bad }) {
                    if switch.is_up {
                        prop_assert!(now.duration_since(bad) >= secs(30));
                    }
                    switches.push(now);
                }
            }
            for (i, first) in switches.iter().enumerate() {
                let soon = switches[i..].iter().filter(|at| at.duration_since(*first) < secs(60));
                prop_assert!(soon.count() <= 3);
            }
        }
    }
}
