//! Several candidates against a model of kube-apiserver, with clocks that run apart, answers that are late or lost, writes
//! that arrive long after their sender gave them up, crashes and restarts: never do two lead at once, and nothing that an
//! earlier leader has under way succeeds once a later one has written.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use proptest::prelude::*;
use tokio::time::Instant;

use super::election::{Action, Election};
use crate::config::LeaseTimes;

const CANDIDATES: usize = 3;

/// What kube-apiserver has, and which leadership wrote it.
#[derive(Default)]
struct Server {
    lease: Option<Lease>,
    version: u64,
    /// One more each time the Lease names another holder.
    term: u64,
    map_version: u64,
    map_term: u64,
}

impl Server {
    /// A create or replace: refused unless it is for the version that there is.
    fn write(&mut self, claim: &Lease) -> Option<(Lease, u64)> {
        let version = |lease: &Lease| lease.metadata.resource_version.clone();
        if self.lease.as_ref().and_then(version) != version(claim) {
            return None;
        }
        let holder = |lease: &Lease| lease.spec.as_ref()?.holder_identity.clone();
        let before = self.lease.as_ref();
        // As kube-apiserver: a write that changes nothing makes no version.
        if before.is_none_or(|before| before.spec != claim.spec) {
            self.version += 1;
        }
        if before.and_then(holder) != holder(claim) {
            self.term += 1;
        }
        let mut lease = claim.clone();
        lease.metadata.resource_version = Some(self.version.to_string());
        self.lease = Some(lease.clone());
        Some((lease, self.term))
    }
}

struct Candidate {
    election: Election,
    /// Per mille of the true time.
    rate: u64,
    offset: u64,
    read: Option<Option<Lease>>,
    claim: Option<Claim>,
    term: u64,
}

struct Claim {
    lease: Lease,
    sent: Instant,
    /// What the server made of it.
    answer: Option<Option<(Lease, u64)>>,
}

/// A change of the map that is under way.
struct Change {
    term: u64,
    version: u64,
}

struct World {
    base: Instant,
    millis: u64,
    server: Server,
    candidates: Vec<Candidate>,
    started: usize,
    /// Claims whose sender has given them up.
    stray: Vec<Lease>,
    changes: Vec<Change>,
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Pass(u64),
    Read(usize),
    Hear(usize),
    Arrive(usize),
    Answer(usize),
    GiveUp(usize),
    StrayArrives(usize),
    ChangeMap(usize),
    ChangeArrives(usize),
    Resign(usize),
    Crash(usize),
    /// A whole undisturbed round, so that leaders come about.
    Round(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let who = 0..CANDIDATES;
    prop_oneof![
        6 => (0_u64..4_000).prop_map(Op::Pass),
        1 => (8_000_u64..20_000).prop_map(Op::Pass),
        4 => who.clone().prop_map(Op::Read),
        4 => who.clone().prop_map(Op::Hear),
        4 => who.clone().prop_map(Op::Arrive),
        4 => who.clone().prop_map(Op::Answer),
        2 => who.clone().prop_map(Op::GiveUp),
        2 => (0_usize..4).prop_map(Op::StrayArrives),
        3 => who.clone().prop_map(Op::ChangeMap),
        3 => (0_usize..4).prop_map(Op::ChangeArrives),
        1 => who.clone().prop_map(Op::Resign),
        1 => who.clone().prop_map(Op::Crash),
        4 => who.prop_map(Op::Round),
    ]
}

impl World {
    fn new(clocks: &[(u64, u64)]) -> Self {
        let mut world = Self {
            base: Instant::now(),
            millis: 0,
            server: Server::default(),
            candidates: Vec::new(),
            started: 0,
            stray: Vec::new(),
            changes: Vec::new(),
        };
        for (rate, offset) in clocks {
            let election = world.start();
            world.candidates.push(Candidate {
                election,
                rate: *rate,
                offset: *offset,
                read: None,
                claim: None,
                term: 0,
            });
        }
        world
    }

    /// A process that knows nothing yet.
    fn start(&mut self) -> Election {
        self.started += 1;
        Election::new("l", format!("c{}", self.started), LeaseTimes::default())
    }

    /// The time as that candidate has it.
    fn now(&self, i: usize) -> Instant {
        let candidate = &self.candidates[i];
        let millis = candidate.offset + self.millis * candidate.rate / 1000;
        self.base + Duration::from_millis(millis)
    }

    fn leads(&self, i: usize) -> bool {
        let until = self.candidates[i].election.leads_until();
        until.is_some_and(|until| self.now(i) < until)
    }

    fn leaders(&self) -> usize {
        (0..CANDIDATES).filter(|i| self.leads(*i)).count()
    }

    fn hear(&mut self, i: usize) {
        let now = self.now(i);
        let candidate = &mut self.candidates[i];
        let Some(found) = candidate.read.take() else {
            return;
        };
        candidate.election.lapse(now);
        candidate.election.observe(found, now);
        match candidate.election.decide(now) {
            Action::Wait => {}
            Action::StepDown => candidate.election.lost(),
            action @ (Action::Create | Action::Renew | Action::TakeOver) => {
                // All wall clocks stand still, the worst that they can do.
                let lease = candidate.election.claim(action, Timestamp::UNIX_EPOCH);
                candidate.claim = Some(Claim {
                    lease,
                    sent: now,
                    answer: None,
                });
            }
        }
    }

    fn answer(&mut self, i: usize) {
        let now = self.now(i);
        let candidate = &mut self.candidates[i];
        let Some(Claim {
            sent,
            answer: Some(answer),
            ..
        }) = candidate.claim.take_if(|claim| claim.answer.is_some())
        else {
            return;
        };
        match answer {
            Some((lease, term)) => {
                candidate.election.won(lease, sent, now);
                candidate.term = term;
            }
            None => candidate.election.lost(),
        }
    }

    fn give_up(&mut self, i: usize) {
        let candidate = &mut self.candidates[i];
        candidate.read = None;
        if let Some(claim) = candidate.claim.take()
            && claim.answer.is_none()
        {
            self.stray.push(claim.lease);
        }
    }

    fn crash(&mut self, i: usize) {
        self.give_up(i);
        self.candidates[i].election = self.start();
    }

    fn apply(&mut self, op: Op) -> Result<(), TestCaseError> {
        match op {
            Op::Pass(millis) => self.millis += millis,
            Op::Read(i) => {
                if self.candidates[i].claim.is_none() {
                    self.candidates[i].read = Some(self.server.lease.clone());
                }
            }
            Op::Hear(i) => self.hear(i),
            Op::Arrive(i) => {
                if let Some(claim) = &mut self.candidates[i].claim
                    && claim.answer.is_none()
                {
                    claim.answer = Some(self.server.write(&claim.lease));
                }
            }
            Op::Answer(i) => self.answer(i),
            Op::GiveUp(i) => self.give_up(i),
            Op::StrayArrives(n) => {
                if n < self.stray.len() {
                    let stray = self.stray.swap_remove(n);
                    self.server.write(&stray);
                }
            }
            Op::ChangeMap(i) => {
                if self.leads(i) {
                    self.changes.push(Change {
                        term: self.candidates[i].term,
                        version: self.server.map_version,
                    });
                }
            }
            Op::ChangeArrives(n) => {
                if n < self.changes.len() {
                    let change = self.changes.swap_remove(n);
                    if change.version == self.server.map_version {
                        prop_assert!(
                            change.term >= self.server.map_term,
                            "an earlier leader has overwritten a later one"
                        );
                        self.server.map_version += 1;
                        self.server.map_term = change.term;
                    }
                }
            }
            Op::Resign(i) => {
                self.give_up(i);
                let now = self.now(i);
                let election = &mut self.candidates[i].election;
                election.lost();
                election.observe(self.server.lease.clone(), now);
                if let Some(away) = election.resign(Timestamp::UNIX_EPOCH) {
                    prop_assert!(self.server.write(&away).is_some());
                }
                self.crash(i);
            }
            Op::Crash(i) => self.crash(i),
            Op::Round(i) => {
                self.give_up(i);
                for op in [Op::Read(i), Op::Hear(i), Op::Arrive(i), Op::Answer(i)] {
                    self.apply(op)?;
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn never_two_lead_and_no_earlier_leader_writes_after_a_later_one(
        clocks in proptest::collection::vec((900_u64..1_100, 0_u64..3_600_000), CANDIDATES),
        ops in proptest::collection::vec(op(), 1..120),
    ) {
        let mut world = World::new(&clocks);
        for op in ops {
            world.apply(op)?;
            prop_assert!(world.leaders() <= 1, "{} lead after {op:?}", world.leaders());
        }
        // Once all goes well again, one leads before long and stays.
        let mut terms = Vec::new();
        for round in 0..20 {
            for i in 0..CANDIDATES {
                world.apply(Op::Round(i))?;
            }
            prop_assert!(world.leaders() <= 1);
            if round >= 12 {
                prop_assert_eq!(world.leaders(), 1);
                terms.push(world.server.term);
            }
            world.apply(Op::Pass(2_000))?;
        }
        terms.dedup();
        prop_assert_eq!(terms.len(), 1, "the leader stays");
    }
}
