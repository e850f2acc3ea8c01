//! Tests of the registry, over the in-memory transport.

use proto::transport::memory::MemorySession;

use super::testing::{live, live_over};
use super::*;

#[tokio::test(start_paused = true)]
async fn the_newest_healthy_session_is_picked_and_older_ones_are_kept() {
    let registry = Registry::default();
    let name = "edge1".parse().unwrap();
    assert_eq!(registry.pick(&name).unwrap_err(), Absent::Never);
    let (old, _a) = live("edge1").await;
    let old_guard = registry.register(Arc::clone(&old));
    tokio::time::advance(Duration::from_secs(31)).await;
    assert_eq!(
        registry.pick(&name).unwrap().id,
        old.id,
        "suspect, but the only one"
    );
    let (new, _b) = live("edge1").await;
    let new_guard = registry.register(Arc::clone(&new));
    assert_eq!(registry.pick(&name).unwrap().id, new.id);
    let (newest, _c) = live("edge1").await;
    let newest_guard = registry.register(Arc::clone(&newest));
    assert_eq!(registry.pick(&name).unwrap().id, newest.id);
    newest.going.store(true, Ordering::Relaxed);
    assert_eq!(
        registry.pick(&name).unwrap().id,
        new.id,
        "not the one that goes"
    );
    drop(new_guard);
    assert_eq!(
        registry.pick(&name).unwrap().id,
        newest.id,
        "going before suspect"
    );
    drop(newest_guard);
    let lost = Lost {
        at: SystemTime::UNIX_EPOCH,
        reason: Reason::SessionLost,
    };
    old_guard.lost(lost);
    assert_eq!(registry.pick(&name).unwrap_err(), Absent::Since(lost));
    assert!(registry.knows(&name) && registry.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_session_over_a_line_goes_before_newer_ones_while_the_line_is_well() {
    let registry = Registry::default();
    let name = "edge1".parse().unwrap();
    let picked = || registry.pick(&name).unwrap().id;
    // So that keepalives are not missed meanwhile.
    let stable = Duration::from_secs(10);
    let (line, _a) = live_over("edge1", Some(("express", stable))).await;
    let _line = registry.register(Arc::clone(&line));
    let (internet, _b) = live("edge1").await;
    let guard = registry.register(Arc::clone(&internet));
    assert_eq!(picked(), line.id, "though the other is newer");
    let (newer, _c) = live_over("edge1", Some(("vpn", stable))).await;
    let newer_guard = registry.register(Arc::clone(&newer));
    assert_eq!(picked(), newer.id, "of two over lines the newest");
    drop(newer_guard);

    line.going.store(true, Ordering::Relaxed);
    assert_eq!(picked(), internet.id, "staying before going");
    line.going.store(false, Ordering::Relaxed);
    assert_eq!(picked(), line.id);

    // A request finds it silent: the other goes first at once, and for a while after it is heard again.
    let found = Instant::now();
    line.doubt.raise(found);
    assert_eq!(picked(), internet.id);
    tokio::time::advance(stable).await;
    assert_eq!(picked(), internet.id, "it is silent still");
    assert!(!line.doubt.is_there(|| Some(found)), "it answers");
    assert_eq!(picked(), internet.id, "not stable");
    tokio::time::advance(stable - Duration::from_millis(1)).await;
    assert_eq!(picked(), internet.id, "not quite");
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(picked(), line.id);

    tokio::time::advance(Duration::from_secs(31)).await;
    assert_eq!(picked(), internet.id, "both are suspect");
    drop(guard);
    assert_eq!(picked(), line.id, "shaky, and the only one");
}

#[tokio::test(start_paused = true)]
async fn a_session_over_a_line_begins_as_the_last_one_over_it_has_ended() {
    let registry = Registry::<MemorySession>::default();
    let name: AgentName = "edge1".parse().unwrap();
    let stable = Duration::from_secs(10);
    let begins = |line: &str| {
        let over = registry.over_line(&name, line.parse().unwrap(), stable);
        over.look(false)
    };
    for (silence, wanted) in [(40, Over::ShakyLine), (1, Over::Line)] {
        let (session, _end) = live_over("edge1", Some(("express", stable))).await;
        let registered = registry.register(session);
        tokio::time::advance(Duration::from_secs(silence)).await;
        drop(registered);
        assert_eq!(begins("express"), wanted);
        assert_eq!(begins("vpn"), Over::Line, "another line");
    }
    // Lines of one agent are no way to fill this server.
    for i in 0..100 {
        let name = format!("line-{i}").leak();
        let (session, _end) = live_over("edge1", Some((name, stable))).await;
        drop(registry.register(session));
    }
    let agents = registry.0.agents.lock();
    assert_eq!(agents.seen[&name].lines.len(), MOST_LINES);
}

#[tokio::test]
async fn a_newer_session_tells_of_older_ones_on_its_way_and_of_an_earlier_process() {
    let over = |line: Option<&'static str>, instance: &'static str| async move {
        let line = line.map(|name| (name, Duration::from_secs(30)));
        let (live, _end) = live_over("edge1", line).await;
        let mut live = Arc::into_inner(live).unwrap();
        instance.clone_into(&mut live.instance);
        live
    };
    let ways = [None, Some("express"), Some("vpn")];
    for older in ways {
        for newer in ways {
            let (old, same) = (over(older, "a").await, over(newer, "a").await);
            assert_eq!(same.tells_of(&old), older == newer, "{older:?} {newer:?}");
            assert!(over(newer, "b").await.tells_of(&old));
        }
    }
}

/// What someone who is told everything believes.
fn told(registry: &Registry<MemorySession>) -> BTreeMap<AgentName, AgentState> {
    let (mut place, mut believed) = (0, BTreeMap::new());
    loop {
        let mut draft = Draft::default();
        let (reached, complete) = registry.tell(place, &mut draft);
        let frame = draft.finish(complete);
        let Some(proto::wire::pb::control_frame::Body::Announce(message)) = frame.body else {
            panic!("{frame:?}")
        };
        let message = proto::wire::Announcement::from_pb(&message).unwrap();
        believed.extend(message.agents);
        place = reached;
        if complete {
            return believed;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn other_servers_are_told_of_sessions_departures_and_enrolments() {
    let registry = Registry::default();
    let mut changed = registry.watch();
    let name = |name: &str| name.parse::<AgentName>().unwrap();
    let (edge1, edge2) = (name("edge1"), name("edge2"));
    assert!(told(&registry).is_empty());

    registry.enrolled(&HashSet::from([edge1.clone(), edge2.clone()]));
    assert!(changed.has_changed().unwrap());
    let known = AgentState::Known(None);
    let believed = [(edge1.clone(), known), (edge2.clone(), known)];
    assert_eq!(told(&registry), believed.into());

    let (first, _a) = live("edge1").await;
    let (second, _b) = live("edge1").await;
    let first = registry.register(first);
    let second = registry.register(second);
    assert_eq!(told(&registry)[&edge1], AgentState::Session);
    changed.mark_unchanged();
    drop(second);
    assert!(!changed.has_changed().unwrap(), "it still has one");
    first.lost(Lost {
        at: UNIX_EPOCH + Duration::from_millis(1500),
        reason: Reason::SessionLost,
    });
    assert!(changed.has_changed().unwrap());
    let departure = Departure {
        at_ms: 1500,
        reason: Reason::SessionLost,
    };
    let departed = AgentState::Known(Some(departure));
    assert_eq!(told(&registry)[&edge1], departed);

    // Who was seen stays known; who was not is forgotten.
    registry.enrolled(&HashSet::new());
    let believed = [(edge1, departed), (edge2, AgentState::Forgotten)];
    assert_eq!(told(&registry), believed.into());
}
