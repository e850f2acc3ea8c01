//! After any order of changes, deliveries and reconnects the one that is told believes what the registry has.

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::BytesMut;
use proptest::prelude::*;
use proto::AgentName;
use proto::transport::memory::MemorySession;
use proto::wire::pb::control_frame::Body;
use proto::wire::{Announcement, decode, pb};

use super::*;
use crate::peer::table::{Believed, Table};
use crate::registry::Registration;
use crate::registry::testing::live;

#[derive(Debug, Clone)]
enum Op {
    /// A session of that agent comes up.
    Open(u8),
    /// Its oldest session ends.
    Close(u8),
    Enrol(u8),
    Forget(u8),
    /// So many frames arrive.
    Deliver(u8),
    /// The line is cut and dialled again: frames on their way are lost.
    Reconnect,
}

fn op() -> impl Strategy<Value = Op> {
    let agent = 0..40_u8;
    prop_oneof![
        4 => agent.clone().prop_map(Op::Open),
        4 => agent.clone().prop_map(Op::Close),
        1 => agent.clone().prop_map(Op::Enrol),
        1 => agent.prop_map(Op::Forget),
        4 => (1..4_u8).prop_map(Op::Deliver),
        1 => Just(Op::Reconnect),
    ]
}

/// Long, so that few fit into a frame.
fn name(agent: u8) -> String {
    let label = "a".repeat(60);
    format!("edge{agent}.{label}.{label}.{label}")
}

/// The line between the two, and what is believed at its far end.
struct Line {
    announcer: Announcer<MemorySession>,
    table: Table,
    number: u64,
}

impl Line {
    fn new(registry: &Registry<MemorySession>) -> Self {
        Self {
            announcer: Announcer::new(registry, &PeerMetrics::default()),
            table: Table::default(),
            number: 0,
        }
    }

    /// Whether there was something to deliver.
    fn deliver(&mut self) -> bool {
        let Some(frame) = self.announcer.draft() else {
            return false;
        };
        let frame: pb::ControlFrame = decode(&mut BytesMut::from(&frame[..])).unwrap().unwrap();
        let Some(Body::Announce(message)) = frame.body else {
            panic!("{frame:?}")
        };
        let message = Announcement::from_pb(&message).unwrap();
        let number = &mut self.number;
        let next = || {
            *number += 1;
            *number
        };
        self.table.hear(message, next).unwrap();
        true
    }
}

/// What is true, kept apart from the registry.
#[derive(Default)]
struct Truth {
    open: HashMap<u8, Vec<Registration<MemorySession>>>,
    seen: HashSet<u8>,
    enrolled: HashSet<u8>,
}

impl Truth {
    fn of(&self, agent: u8) -> Option<bool> {
        let open = self.open.get(&agent).is_some_and(|open| !open.is_empty());
        let known = self.seen.contains(&agent) || self.enrolled.contains(&agent);
        (open || known).then_some(open)
    }

    fn enrolled(&self) -> HashSet<AgentName> {
        let name = |agent: &u8| name(*agent).parse().unwrap();
        self.enrolled.iter().map(name).collect()
    }
}

async fn run(ops: Vec<Op>) -> Result<(), TestCaseError> {
    let registry = Registry::default();
    let mut truth = Truth::default();
    let mut line = Line::new(&registry);
    let mut far_ends = Vec::new();
    for op in ops {
        match op {
            Op::Open(agent) => {
                let (session, far_end) = live(&name(agent)).await;
                far_ends.push(far_end);
                truth.seen.insert(agent);
                let registration = registry.register(session);
                truth.open.entry(agent).or_default().push(registration);
            }
            Op::Close(agent) => {
                let open = truth.open.entry(agent).or_default();
                if !open.is_empty() {
                    drop(open.remove(0));
                }
            }
            Op::Enrol(agent) => {
                truth.enrolled.insert(agent);
                registry.enrolled(&truth.enrolled());
            }
            Op::Forget(agent) => {
                truth.enrolled.remove(&agent);
                registry.enrolled(&truth.enrolled());
            }
            Op::Deliver(frames) => {
                for _ in 0..frames {
                    line.deliver();
                }
            }
            Op::Reconnect => line = Line::new(&registry),
        }
    }
    let mut frames = 0;
    while line.deliver() {
        frames += 1;
    }
    // Each name once at the most, some 18 to a frame, and one that only says that this is all.
    prop_assert!(frames <= 40 / 15 + 2, "{frames} frames");
    prop_assert!(line.table.is_complete());
    let truly: BTreeMap<String, bool> = (0..40)
        .filter_map(|agent| Some((name(agent), truth.of(agent)?)))
        .collect();
    let names = line.table.names();
    let believed: BTreeMap<String, bool> = names
        .map(|(agent, open)| (agent.to_string(), open))
        .collect();
    prop_assert_eq!(&believed, &truly);
    let open = truly.values().filter(|open| **open).count();
    prop_assert_eq!(line.table.sessions(), open);
    Ok(())
}

proptest! {
    #[test]
    fn whoever_is_told_believes_what_is_there_in_the_end(ops in proptest::collection::vec(op(), 0..120)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(run(ops))?;
    }
}

#[tokio::test]
async fn the_first_frame_comes_at_once_and_the_next_with_the_next_change() {
    let registry = Registry::default();
    let mut announcer = Announcer::new(&registry, &PeerMetrics::default());
    let mut table = Table::default();
    let mut hear = |frame: Bytes| {
        let frame: pb::ControlFrame = decode(&mut BytesMut::from(&frame[..])).unwrap().unwrap();
        let Some(Body::Announce(message)) = frame.body else {
            panic!("{frame:?}")
        };
        let message = Announcement::from_pb(&message).unwrap();
        table.hear(message, || 7).unwrap();
        (table.is_complete(), table.of(&"edge1".parse().unwrap()))
    };
    assert_eq!(hear(announcer.next().await), (true, None));
    let waits = tokio::time::timeout(std::time::Duration::from_millis(20), announcer.next());
    waits.await.unwrap_err();
    let (session, _far_end) = live("edge1").await;
    let _registration = registry.register(session);
    let session = Some(Believed::Session(7));
    assert_eq!(hear(announcer.next().await), (true, session));
}
