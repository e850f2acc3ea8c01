//! Candidates, a store that knows versions, answers that get lost, and clocks that run apart: whatever happens, two never
//! lead at once, and when all goes well again one leads.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use proptest::prelude::*;
use tokio::time::Instant;

use super::election::{Action, Election};
use crate::config::LeaseTimes;

const CANDIDATES: usize = 3;

#[derive(Debug, Clone)]
enum Op {
    /// Time passes.
    Pass(u64),
    /// A candidate looks at the Lease and acts.
    Round { who: usize, fate: Fate },
    /// It gives the Lease away.
    Resign(usize),
    /// It is started again, under another identity.
    Restart(usize),
}

/// What becomes of a candidate's write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Answered,
    /// Done, and the answer is lost.
    Unanswered,
    Lost,
    /// Read, then the candidate stands still for so many milliseconds before it writes.
    Late(u64),
}

#[derive(Default)]
struct Store {
    version: u64,
    lease: Option<Lease>,
}

impl Store {
    fn write(&mut self, mut lease: Lease) -> Option<Lease> {
        let held = self.lease.as_ref();
        let held = held.and_then(|lease| lease.metadata.resource_version.clone());
        if lease.metadata.resource_version != held {
            return None;
        }
        self.version += 1;
        lease.metadata.resource_version = Some(self.version.to_string());
        self.lease = Some(lease.clone());
        Some(lease)
    }
}

struct World {
    origin: Instant,
    elapsed: Duration,
    store: Store,
    candidates: Vec<Election>,
    started: usize,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            origin: Instant::now(),
            elapsed: Duration::ZERO,
            store: Store::default(),
            candidates: Vec::new(),
            started: 0,
        };
        for _ in 0..CANDIDATES {
            let candidate = world.candidate();
            world.candidates.push(candidate);
        }
        world
    }

    fn candidate(&mut self) -> Election {
        self.started += 1;
        Election::new("l", format!("c{}", self.started), LeaseTimes::default())
    }

    /// What a candidate's own clock shows: one is a tenth too fast, one a tenth too slow.
    fn clock(&self, who: usize) -> Instant {
        let rate = [10, 11, 9][who];
        self.origin + self.elapsed * rate / 10
    }

    fn leaders(&self) -> Vec<usize> {
        let leads = |who: &usize| {
            let until = self.candidates[*who].leads_until();
            until.is_some_and(|until| until > self.clock(*who))
        };
        (0..CANDIDATES).filter(leads).collect()
    }

    fn round(&mut self, who: usize, fate: Fate) {
        let now = self.clock(who);
        let found = self.store.lease.clone();
        self.candidates[who].lapse(now);
        self.candidates[who].observe(found, now);
        let action = self.candidates[who].decide(now);
        let claim = self.candidates[who].claim(action, Timestamp::UNIX_EPOCH);
        match action {
            Action::Wait => return,
            Action::StepDown => return self.candidates[who].lost(),
            Action::Create | Action::Renew | Action::TakeOver => {}
        }
        if let Fate::Late(millis) = fate {
            self.elapsed += Duration::from_millis(millis);
            // Others go on meanwhile.
            for other in (0..CANDIDATES).filter(|other| *other != who) {
                self.round(other, Fate::Answered);
            }
        }
        let sent = self.clock(who);
        if fate == Fate::Lost {
            return;
        }
        match self.store.write(claim) {
            Some(_) if fate == Fate::Unanswered => {}
            Some(written) => {
                let now = self.clock(who);
                self.candidates[who].won(written, sent, now);
            }
            None => self.candidates[who].lost(),
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    let fate = prop_oneof![
        6 => Just(Fate::Answered),
        1 => Just(Fate::Unanswered),
        1 => Just(Fate::Lost),
        1 => (0_u64..30_000).prop_map(Fate::Late),
    ];
    prop_oneof![
        4 => (0_u64..20_000).prop_map(Op::Pass),
        8 => (0..CANDIDATES, fate).prop_map(|(who, fate)| Op::Round { who, fate }),
        1 => (0..CANDIDATES).prop_map(Op::Resign),
        1 => (0..CANDIDATES).prop_map(Op::Restart),
    ]
}

proptest! {
    #[test]
    fn two_never_lead_and_one_does_in_the_end(ops in proptest::collection::vec(op(), 0..80)) {
        let mut world = World::new();
        for op in ops {
            match op {
                Op::Pass(millis) => world.elapsed += Duration::from_millis(millis),
                Op::Round { who, fate } => world.round(who, fate),
                Op::Resign(who) => {
                    world.candidates[who].lost();
                    if let Some(away) = world.candidates[who].resign(Timestamp::UNIX_EPOCH) {
                        world.store.write(away);
                    }
                }
                Op::Restart(who) => world.candidates[who] = world.candidate(),
            }
            prop_assert!(world.leaders().len() <= 1, "{:?} lead", world.leaders());
        }
        for _ in 0..20 {
            for who in 0..CANDIDATES {
                world.round(who, Fate::Answered);
                prop_assert!(world.leaders().len() <= 1, "{:?} lead", world.leaders());
            }
            world.elapsed += Duration::from_secs(2);
        }
        for who in 0..CANDIDATES {
            world.round(who, Fate::Answered);
        }
        prop_assert_eq!(world.leaders().len(), 1);
    }
}
