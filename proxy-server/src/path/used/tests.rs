use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::config::Line;
use crate::path::policy::Bypass;

fn bypass() -> Bypass {
    let line = Line {
        name: "express".to_owned(),
        ..Line::route()
    };
    Bypass {
        line: Arc::new(line),
        address: "10.0.0.7".parse().unwrap(),
    }
}

#[test]
fn what_is_in_use_is_one_word_for_each_decision_verdict_and_session() {
    let (direct, auto) = (Decision::Direct(bypass()), Decision::Auto(bypass()));
    let (line, node) = (Some(Down::Line), Some(Down::Node));
    for (decision, down, with, without) in [
        (
            &Decision::Tunnel,
            None,
            ("tunnel", "tunnel"),
            ("none", "none (no session)"),
        ),
        (
            &Decision::Refused,
            None,
            ("none", "none (refused)"),
            ("none", "none (refused)"),
        ),
        (
            &auto,
            None,
            ("direct", "direct by express"),
            ("direct", "direct by express"),
        ),
        (
            &auto,
            line,
            ("tunnel", "tunnel (line express down)"),
            ("direct", "direct by express (down, no session)"),
        ),
        (
            &auto,
            node,
            ("tunnel", "tunnel (down on express)"),
            ("direct", "direct by express (down, no session)"),
        ),
        (
            &auto,
            Some(Down::LedBack),
            ("tunnel", "tunnel (express leads back here)"),
            ("none", "none (no session, express leads back here)"),
        ),
        (
            &direct,
            Some(Down::LedBack),
            ("direct", "direct by express (led back here)"),
            ("direct", "direct by express (led back here)"),
        ),
        (
            &direct,
            None,
            ("direct", "direct by express"),
            ("direct", "direct by express"),
        ),
        (
            &direct,
            line,
            ("direct", "direct by express (line down)"),
            ("direct", "direct by express (line down)"),
        ),
        (
            &direct,
            node,
            ("direct", "direct by express (down)"),
            ("direct", "direct by express (down)"),
        ),
    ] {
        let way = Use::of(decision, |name| {
            assert_eq!(name, "express");
            down
        });
        for (has_session, (label, words)) in [(true, with), (false, without)] {
            let case = format!("{decision:?} {down:?} {has_session}");
            assert_eq!(way.label(has_session), label, "{case}");
            assert_eq!(way.words(has_session), words, "{case}");
        }
    }
}

fn kept(used: &mut Used, at: Instant, decision: &Decision, down: Option<Down>) -> Vec<Change> {
    let all = ["edge1", "edge2"].map(|name| (name.to_owned(), decision.clone(), "why".into()));
    used.keep(at, all.into_iter(), |_, node| {
        down.filter(|_| node == "edge1")
    })
}

#[tokio::test(start_paused = true)]
async fn a_change_is_told_once_and_what_has_turned_back_is_not() {
    let auto = Decision::Auto(bypass());
    let (start, mut used) = (Instant::now(), Used::default());
    let on_line = Use::Line("express".to_owned());
    let instead = |down| Use::Instead("express".to_owned(), down);
    // What is new has not changed.
    assert_eq!(kept(&mut used, start, &auto, None), []);
    assert_eq!(used.next(), None);
    assert_eq!(used.since("edge1", &on_line), Some(start));

    let later = start + Duration::from_secs(5);
    let fallen = used.judge(later, Some("edge1"), |_, _| Some(Down::Node));
    let [change] = fallen.as_slice() else {
        panic!("{fallen:?}");
    };
    assert_eq!(
        (change.node.as_str(), change.kind()),
        ("edge1", Kind::LineDown)
    );
    assert_eq!(used.since("edge1", &on_line), None);
    // The line as well: the same way, for another cause.
    let at_last = later + Duration::from_secs(5);
    let all = used.judge(at_last, None, |_, _| Some(Down::Line));
    assert_eq!(all.len(), 1, "{all:?}");
    assert_eq!(used.since("edge1", &instead(Down::Line)), Some(later));
    assert_eq!(used.since("edge2", &instead(Down::Line)), Some(at_last));
    // edge2 is back before its turn.
    assert_eq!(used.judge(at_last, Some("edge2"), |_, _| None).len(), 1);
    let told = used.next().unwrap();
    assert_eq!(
        (told.node.as_str(), &told.to),
        ("edge1", &instead(Down::Line))
    );
    assert_eq!(used.next(), None);

    // Nobody has heard it: it is told again, with what is so by then.
    used.untold(told.clone());
    assert_eq!(used.next(), Some(told.clone()));
    used.untold(told);
    used.judge(at_last, None, |_, _| None);
    assert_eq!(used.next(), None);
    used.judge(at_last, Some("edge1"), |_, _| Some(Down::Line));
    assert!(used.next().is_some());

    let back = used.judge(at_last, None, |_, _| None);
    assert_eq!(back.first().map(Change::kind), Some(Kind::LineUp));
    let changes = kept(&mut used, at_last, &Decision::Tunnel, None);
    assert!(changes.iter().all(|it| it.kind() == Kind::Decided));
    assert_eq!(changes.len(), 2);
    // Each is told once, with what was told before and is now.
    let told: Vec<_> = std::iter::from_fn(|| used.next()).collect();
    let edge1 = told.iter().find(|it| it.node == "edge1").unwrap();
    assert_eq!(
        (&edge1.from, &edge1.to),
        (&instead(Down::Line), &Use::Tunnel)
    );
    assert_eq!((told.len(), edge1.why.as_str()), (2, "why"));
}

#[tokio::test(start_paused = true)]
async fn of_a_node_that_is_gone_nothing_is_told_or_kept() {
    let (start, mut used) = (Instant::now(), Used::default());
    kept(&mut used, start, &Decision::Auto(bypass()), None);
    for round in 0..10 {
        let decision = match round % 2 {
            0 => Decision::Tunnel,
            _ => Decision::Refused,
        };
        kept(&mut used, start, &decision, None);
    }
    assert_eq!(used.waiting.len(), 2, "each waits once");
    used.keep(start, std::iter::empty(), |_, _| None);
    assert_eq!((used.waiting.len(), used.next()), (0, None));
    assert_eq!(used.since("edge1", &Use::Tunnel), None);
    assert_eq!(used.judge(start, Some("edge1"), |_, _| None), []);
}
