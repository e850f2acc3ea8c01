//! Tests of what is known, over the in-memory transport.

use proto::Reason;
use proto::transport::memory::MemorySession;
use proto::wire::{AgentState, Announcement};

use super::testing::{address, session};
use super::*;

const SUSPECT: Duration = Duration::from_secs(6);

fn several(backend: bool) -> Arc<Peers<MemorySession>> {
    Arc::new(Peers::configured(backend, &daemon::Metrics::new("test")))
}

fn says(agents: &[(&str, AgentState)]) -> Announcement {
    let agent = |(name, state): &(&str, AgentState)| (name.parse().unwrap(), *state);
    Announcement {
        agents: agents.iter().map(agent).collect(),
        complete: true,
    }
}

fn name(agent: &str) -> AgentName {
    agent.parse().unwrap()
}

/// Who is asked for that agent, best first.
fn order(peers: &Peers<MemorySession>, agent: &str) -> Vec<String> {
    let mut found = peers.with_session_of(&name(agent));
    found.sort_by_key(|(rank, number, _)| std::cmp::Reverse((*rank, *number)));
    found
        .into_iter()
        .map(|(.., session)| session.server.to_string())
        .collect()
}

#[tokio::test(start_paused = true)]
async fn healthy_ones_with_the_newest_announcement_are_asked_first() {
    let peers = several(true);
    let ((one, _a), (two, _b), (three, _c)) =
        (session(1).await, session(2).await, session(3).await);
    let _entered = [&one, &two, &three].map(|s| peers.enter(Arc::clone(s)));
    let open = says(&[("edge1", AgentState::Session)]);
    for session in [&two, &one] {
        peers.hear(session, open.clone()).unwrap();
    }
    peers
        .hear(&three, says(&[("edge1", AgentState::Known(None))]))
        .unwrap();
    assert_eq!(order(&peers, "edge1"), ["proxy-1", "proxy-2"]);
    peers.hear(&two, open.clone()).unwrap();
    assert_eq!(order(&peers, "edge1"), ["proxy-2", "proxy-1"]);
    two.going.store(true, Ordering::Relaxed);
    assert_eq!(order(&peers, "edge1"), ["proxy-1", "proxy-2"]);
    one.doubt.raise(Instant::now());
    assert_eq!(order(&peers, "edge1"), ["proxy-2", "proxy-1"]);
    tokio::time::advance(SUSPECT).await;
    let ranks: Vec<_> = peers.with_session_of(&name("edge1"));
    assert!(ranks.iter().all(|(rank, ..)| *rank <= Rank::Silent));
    assert!(order(&peers, "edge2").is_empty() && !peers.knows(&name("edge2")));
}

#[tokio::test(start_paused = true)]
async fn what_a_session_has_announced_goes_with_it_and_its_names_an_hour_later() {
    let peers = several(false);
    let (one, _far) = session(1).await;
    let entered = peers.enter(Arc::clone(&one));
    let departure = Departure {
        at_ms: 1000,
        reason: Reason::SessionLost,
    };
    let told = says(&[
        ("edge1", AgentState::Session),
        ("edge2", AgentState::Known(Some(departure))),
    ]);
    peers.hear(&one, told).unwrap();
    assert_eq!(*peers.servers().borrow(), 1);
    drop(entered);
    assert_eq!(*peers.servers().borrow(), 0);
    assert!(order(&peers, "edge1").is_empty() && peers.all().is_empty());
    assert!(peers.knows(&name("edge1")));
    let (server, last) = peers.departure(&name("edge2")).unwrap();
    assert_eq!((server.as_str(), last), ("proxy-1", departure));
    // Again there, and it knows nothing: its word counts.
    let (again, _far) = session(1).await;
    let entered = peers.enter(Arc::clone(&again));
    assert!(peers.knows(&name("edge1")));
    peers
        .hear(&again, says(&[("edge3", AgentState::Session)]))
        .unwrap();
    assert!(!peers.knows(&name("edge1")) && peers.departure(&name("edge2")).is_none());
    drop(entered);
    assert!(peers.knows(&name("edge3")));
    tokio::time::advance(REMEMBERED).await;
    assert!(!peers.knows(&name("edge3")));
}

#[tokio::test(start_paused = true)]
async fn the_last_of_all_departures_is_told() {
    let peers = several(true);
    let ((one, _a), (two, _b)) = (session(1).await, session(2).await);
    let _entered = [&one, &two].map(|s| peers.enter(Arc::clone(s)));
    for (session, at_ms) in [(&one, 2000), (&two, 1000)] {
        let departure = Departure {
            at_ms,
            reason: Reason::Draining,
        };
        let departed = AgentState::Known(Some(departure));
        peers.hear(session, says(&[("edge1", departed)])).unwrap();
    }
    let (server, departure) = peers.departure(&name("edge1")).unwrap();
    assert_eq!((server.as_str(), departure.at_ms), ("proxy-1", 2000));
}

#[tokio::test(start_paused = true)]
async fn a_start_has_settled_once_every_member_was_heard_of() {
    let peers = several(true);
    let settled = async |peers: &Peers<MemorySession>| {
        let begin = Instant::now();
        peers.settled(Duration::from_secs(2)).await;
        begin.elapsed().is_zero()
    };
    assert!(!settled(&peers).await, "nobody knows yet who there is");
    peers.expect(&[address(1), address(2), address(3), address(4)].into());
    peers.stands(address(1), Standing::Ourselves);
    peers.stands(address(2), Standing::Failed("no answer".to_owned()));
    peers.stands(address(9), Standing::Up);
    assert!(!settled(&peers).await);
    assert_eq!(peers.asked().silent, 3);
    // One is none any more, the other tells everything.
    peers.expect(&[address(1), address(2), address(3)].into());
    let (three, _far) = session(3).await;
    let _entered = peers.enter(Arc::clone(&three));
    let mut announcement = says(&[]);
    announcement.complete = false;
    peers.hear(&three, announcement).unwrap();
    assert!(!settled(&peers).await);
    peers.hear(&three, says(&[])).unwrap();
    assert!(settled(&peers).await);
    let asked = Asked {
        servers: 2,
        silent: 1,
    };
    assert_eq!(peers.asked(), asked);
    // Once and for all.
    peers.expect(&[address(7)].into());
    assert!(settled(&peers).await);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_alone_waits_for_nobody_and_knows_of_no_number() {
    let alone: Peers<MemorySession> = Peers::default();
    let begin = Instant::now();
    alone.settled(Duration::from_secs(2)).await;
    assert!(begin.elapsed().is_zero());
    alone.export();
    assert_eq!(*alone.servers().borrow(), 0);
    assert!(!alone.is_configured() && !alone.knows(&name("edge1")));
}

#[tokio::test(start_paused = true)]
async fn two_sessions_with_one_server_are_one_server() {
    let peers = several(true);
    let ((old, _a), (new, _b)) = (session(1).await, session(1).await);
    let was = peers.enter(Arc::clone(&old));
    let told = says(&[("edge1", AgentState::Session)]);
    peers.hear(&old, told.clone()).unwrap();
    let _is = peers.enter(Arc::clone(&new));
    peers.hear(&new, told).unwrap();
    assert_eq!((*peers.servers().borrow(), peers.asked().servers), (2, 2));
    assert_eq!(order(&peers, "edge1"), ["proxy-1", "proxy-1"]);
    drop(was);
    assert_eq!(order(&peers, "edge1"), ["proxy-1"]);
    assert_eq!((*peers.servers().borrow(), peers.asked().servers), (2, 2));
}
