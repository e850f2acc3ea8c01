//! What became of each agent, in the order of the last change: what other servers are told. Pure.
//!
//! A name has one place, that of its last change. Whoever was told everything up to a place is told what stands behind
//! it, so there is no queue that could overflow, whoever reads slowly is told less, and the first telling is a walk from
//! the very beginning. Memory: one entry for each name that this process has ever known.

use std::collections::{BTreeMap, HashMap};

use proto::AgentName;
use proto::wire::{AgentState, Draft};

/// Where someone who is told has come to. 0 is before everything.
pub type Place = u64;

/// The agents in the order of their last change.
#[derive(Debug, Default)]
pub(super) struct Changes {
    order: BTreeMap<Place, AgentName>,
    agents: HashMap<AgentName, (Place, AgentState)>,
    last: Place,
}

impl Changes {
    /// Notes what has become of an agent; says the place of that.
    pub(super) fn note(&mut self, agent: &AgentName, state: AgentState) -> Place {
        self.last += 1;
        let entry = (self.last, state);
        if let Some((before, _)) = self.agents.insert(agent.clone(), entry) {
            self.order.remove(&before);
        }
        self.order.insert(self.last, agent.clone());
        self.last
    }

    /// What was noted last; nothing is [`AgentState::Forgotten`].
    pub(super) fn state(&self, agent: &AgentName) -> AgentState {
        let noted = self.agents.get(agent);
        noted.map_or(AgentState::Forgotten, |(_, state)| *state)
    }

    /// Fills the draft with what stands behind `told`; says how far it came, and whether that is all there is.
    pub(super) fn tell(&self, told: Place, draft: &mut Draft) -> (Place, bool) {
        let mut reached = told;
        for (place, agent) in self.order.range(told + 1..) {
            if !draft.push(agent, self.state(agent)) {
                return (reached, false);
            }
            reached = *place;
        }
        (self.last, true)
    }

    /// How many names there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        assert_eq!(self.order.len(), self.agents.len());
        self.agents.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: u32) -> AgentName {
        format!("edge{number}").parse().unwrap()
    }

    #[test]
    fn a_name_that_changes_often_has_one_place() {
        let mut changes = Changes::default();
        for i in 0..100_000 {
            let state = if i % 2 == 0 {
                AgentState::Session
            } else {
                AgentState::Known(None)
            };
            changes.note(&name(i % 10), state);
        }
        assert_eq!(changes.len(), 10);
        let mut draft = Draft::default();
        assert_eq!(changes.tell(0, &mut draft), (100_000, true));
        assert!(draft.is_empty() == changes.agents.is_empty());
        let mut more = Draft::default();
        assert_eq!(changes.tell(100_000, &mut more), (100_000, true));
        assert!(more.is_empty());
    }

    #[test]
    fn what_does_not_fit_comes_next_and_what_changes_meanwhile_comes_last() {
        let mut changes = Changes::default();
        for i in 0..1000 {
            changes.note(&name(i), AgentState::Session);
        }
        let mut first = Draft::default();
        let (reached, complete) = changes.tell(0, &mut first);
        assert!(!complete && reached > 100 && reached < 1000);
        changes.note(&name(0), AgentState::Known(None));
        changes.note(&name(999), AgentState::Known(None));
        let mut reached = reached;
        let mut frames = 0;
        loop {
            let mut draft = Draft::default();
            let (next, complete) = changes.tell(reached, &mut draft);
            reached = next;
            frames += 1;
            if complete {
                break;
            }
        }
        assert!(frames > 1);
        assert_eq!(reached, 1002);
    }
}
