//! Tests of the registry, over the in-memory transport.

use std::time::Duration;

use proto::transport::memory::MemorySession;

use super::testing::live;
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
