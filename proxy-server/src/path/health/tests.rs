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
fn a_node_falls_that_is_lost_three_times_within_a_minute_though_it_is_there_between() {
    let start = Instant::now();
    for (last, falls) in [(59, true), (62, false)] {
        let mut health = health(start, &nodes(1));
        for (second, evidence) in [
            (0, GOOD),
            (1, Evidence::Bad),
            (2, GOOD),
            (30, Evidence::Bad),
            (31, GOOD),
        ] {
            let switches = health.heard(start + secs(second), "l", "n0", evidence);
            assert_eq!(switches, [], "{second}");
        }
        health.heard(start + secs(last), "l", "n0", Evidence::Bad);
        assert_eq!(health.is_down("l", "n0").is_some(), falls, "{last}");
    }
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

/// A line that is there for three seconds and away for as long.
#[derive(Debug, Clone, Copy)]
struct Bouncing {
    offset: Duration,
}

impl Bouncing {
    fn is_cut(self, at: Duration) -> bool {
        !((at + self.offset).as_millis() / 3000).is_multiple_of(2)
    }

    /// What a dial finds that begins then, and when: its SYN is sent again after a second, and after two more.
    fn probed(self, at: Duration) -> (Evidence, Duration) {
        let timeout = PathSettings::default().probes.timeout;
        let sent = [0, 1, 3].map(secs).into_iter();
        let mut in_time = sent.filter(|again| *again < timeout);
        match in_time.find(|again| !self.is_cut(at + *again)) {
            Some(again) => (Evidence::Good(again), at + again + Duration::from_millis(2)),
            None => (Evidence::Bad, at + timeout),
        }
    }

    /// When the first request from then on has done without the line.
    fn lost(self, from: Duration) -> Duration {
        let mut at = from;
        while !self.is_cut(at) {
            at += Duration::from_millis(10);
        }
        at + PathSettings::default().race_after
    }

    /// When requests to each of these nodes are led another way, in ten minutes of probes as they are by default.
    fn changes(self, names: &[String], is_asked: bool) -> Vec<Vec<Duration>> {
        let start = Instant::now();
        let mut health = health(start, names);
        let mut random = self.offset.as_secs_f64().fract();
        let mut looks: Vec<(Duration, Option<Evidence>)> = (0..)
            .map(|i| (Duration::from_millis(i * 900), None))
            .take(names.len())
            .collect();
        let mut changes = vec![Vec::new(); names.len()];
        let mut is_down = vec![false; names.len()];
        let next = |looks: &[(Duration, _)]| {
            let all = looks.iter().map(|look| look.0).enumerate();
            all.min_by_key(|(_, at)| *at)
                .filter(|(_, at)| *at < secs(600))
        };
        while let Some((i, now)) = next(&looks) {
            if let Some(evidence) = looks[i].1.take() {
                let is_first = evidence == Evidence::Bad && health.is_well("l", &names[i]);
                health.heard(start + now, "l", &names[i], evidence);
                random = (random + 0.618).fract();
                looks[i].0 = now + health.pause("l", &names[i]).mul_f64(0.8 + 0.4 * random);
                for (node, name) in names.iter().enumerate() {
                    let down = health.is_down("l", name).is_some();
                    if std::mem::replace(&mut is_down[node], down) != down {
                        changes[node].push(now);
                    }
                }
                if is_first {
                    let others = looks.iter_mut().filter(|look| look.1.is_none());
                    others.for_each(|look| look.0 = look.0.min(now));
                }
            } else {
                let (evidence, at) = self.probed(now);
                looks[i] = (at, Some(evidence));
            }
            for (look, is_down) in looks.iter_mut().zip(&is_down) {
                if is_asked && look.1.is_none() && !is_down {
                    look.0 = look.0.min(self.lost(now));
                }
            }
        }
        changes
    }
}

#[test]
fn a_line_that_bounces_is_left_within_a_minute_by_who_asks_and_at_most_once_a_minute() {
    for count in [1, 2, 5] {
        let names = nodes(count);
        for offset in 0..60_u64 {
            let line = Bouncing {
                offset: Duration::from_millis(offset * 100),
            };
            for (node, at) in line.changes(&names, true).iter().enumerate() {
                assert!(at[0] < secs(60), "{line:?}: node {node} at {at:?}");
                let soon = at.windows(2).skip(1).any(|two| two[1] - two[0] < secs(60));
                assert!(!soon && at.len() <= 10, "{line:?}: node {node} at {at:?}");
            }
            for (node, at) in line.changes(&names, false).iter().enumerate() {
                assert!(
                    at.len() <= 10,
                    "{line:?}: node {node} at {at:?}, and nobody asks"
                );
            }
        }
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
fn a_line_is_back_though_some_of_what_was_lost_with_it_never_returns() {
    let start = Instant::now();
    let names = nodes(6);
    let mut health = health(start, &names);
    for name in &names {
        health.heard(start, "l", name, GOOD);
    }
    // Four are switched off within a minute, which looks as if it were the line.
    for name in &names[..4] {
        for _ in 0..2 {
            health.heard(start, "l", name, Evidence::Bad);
        }
    }
    assert_eq!(health.is_down("l", "n5"), Some(Down::Line));
    let mut back = None;
    for second in (0..600).step_by(5) {
        let now = start + secs(second);
        for (i, name) in names.iter().enumerate() {
            let evidence = if i < 4 { Evidence::Bad } else { GOOD };
            let switches = health.heard(now, "l", name, evidence);
            if switches.iter().any(|it| it.node.is_none() && it.is_up) {
                back = back.or(Some(second));
            }
        }
    }
    // A minute and `stable`, in which they may yet be the line's, and `stable` without any.
    assert_eq!(back, Some(125));
    assert_eq!(health.is_down("l", "n5"), None);
    assert_eq!(health.is_down("l", "n0"), Some(Down::Node));
}

#[test]
fn nodes_that_are_dead_at_the_start_do_not_take_the_line_with_them() {
    let start = Instant::now();
    let names = nodes(4);
    let mut health = health(start, &names);
    for name in &names[..3] {
        for _ in 0..3 {
            health.heard(start, "l", name, Evidence::Bad);
        }
        assert_eq!(health.is_down("l", name), Some(Down::Node));
    }
    assert_eq!(health.is_down("l", "n3"), None);
}

#[test]
fn of_many_nodes_two_that_are_lost_before_the_others_were_looked_at_are_not_the_line() {
    let start = Instant::now();
    let names = nodes(10);
    let mut health = health(start, &names);
    for (lost, name) in (1..).zip(&names) {
        health.heard(start, "l", name, GOOD);
        health.heard(start, "l", name, Evidence::Bad);
        let wanted = (lost >= 5).then_some(Down::Line);
        assert_eq!(health.is_down("l", "n9"), wanted, "{lost} are lost");
    }
}

#[test]
fn the_routes_of_this_machine_are_never_judged_as_one_line() {
    let start = Instant::now();
    let names = nodes(4);
    let mut health = Health::default();
    health.keep(start, names.iter().map(|name| (ROUTE, name.as_str())));
    for name in &names {
        health.heard(start, ROUTE, name, GOOD);
    }
    for name in &names[..3] {
        for _ in 0..3 {
            health.heard(start, ROUTE, name, Evidence::Bad);
        }
        assert_eq!(health.is_down(ROUTE, name), Some(Down::Node));
    }
    assert_eq!(health.is_down(ROUTE, "n3"), None);
    assert!(health.of_line(ROUTE).unwrap().is_up);
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
