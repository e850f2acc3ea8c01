//! What one other server has announced in one session. Pure.
//!
//! Bounded by [`MAX_NAMES`] and [`MAX_BYTES`], whatever is announced: a server that exceeds one is at fault, or the
//! fleet is larger than this version is meant for.

use std::collections::HashMap;

use certs::Name;
use proto::AgentName;
use proto::wire::{AgentState, Announcement, Departure};

/// Names of one server: several times the agents of the largest fleet that one server can hold.
pub const MAX_NAMES: usize = 65_536;
/// Bytes of all names of one server: 64 a name.
pub const MAX_BYTES: usize = 4 << 20;

/// More was announced than is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "more than {MAX_NAMES} agents, or {} MiB of names, were announced",
    MAX_BYTES >> 20
)]
pub struct Excess;

/// What is believed of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Believed {
    /// It has a session there. Later announcements have a greater number, over all servers.
    Session(u64),
    /// It has none there; how its last one ended, if it had one.
    Known(Option<Departure>),
}

/// What was announced.
#[derive(Debug, Default)]
pub struct Table {
    agents: HashMap<AgentName, Believed>,
    bytes: usize,
    sessions: usize,
    complete: bool,
}

impl Table {
    /// Takes an announcement in. `number` gives each announced session its number. Says whether other names are known
    /// than before.
    ///
    /// # Errors
    /// [`Excess`]; what was believed before is still there.
    pub fn hear(
        &mut self,
        announcement: Announcement,
        mut number: impl FnMut() -> u64,
    ) -> Result<bool, Excess> {
        let mut other_names = false;
        for (agent, state) in announcement.agents {
            // It would be given what is meant for a Service, and no such agent could have enrolled.
            if Name::parse(agent.as_str()).is_ok_and(|name| name.is_of_service()) {
                continue;
            }
            let known = self.forget(&agent);
            other_names |= known == (state == AgentState::Forgotten);
            let believed = match state {
                AgentState::Forgotten => continue,
                AgentState::Session => Believed::Session(number()),
                AgentState::Known(departure) => Believed::Known(departure),
            };
            let bytes = self.bytes + agent.as_str().len();
            if self.agents.len() >= MAX_NAMES || bytes > MAX_BYTES {
                return Err(Excess);
            }
            self.bytes = bytes;
            self.sessions += usize::from(matches!(believed, Believed::Session(_)));
            self.agents.insert(agent, believed);
        }
        self.complete |= announcement.complete;
        Ok(other_names)
    }

    /// Says whether it was known.
    fn forget(&mut self, agent: &AgentName) -> bool {
        let Some(before) = self.agents.remove(agent) else {
            return false;
        };
        self.bytes -= agent.as_str().len();
        self.sessions -= usize::from(matches!(before, Believed::Session(_)));
        true
    }

    /// What is believed of that agent.
    #[must_use]
    pub fn of(&self, agent: &AgentName) -> Option<Believed> {
        self.agents.get(agent).copied()
    }

    /// Agents that are known there, and whether they have a session there.
    pub fn names(&self) -> impl Iterator<Item = (&AgentName, bool)> {
        let open = |believed: &Believed| matches!(believed, Believed::Session(_));
        self.agents
            .iter()
            .map(move |(agent, believed)| (agent, open(believed)))
    }

    /// How many agents have a session there.
    #[must_use]
    pub const fn sessions(&self) -> usize {
        self.sessions
    }

    /// Whether everything was told once.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(agent: &str, state: AgentState) -> Announcement {
        Announcement {
            agents: vec![(agent.parse().unwrap(), state)],
            complete: false,
        }
    }

    #[test]
    fn the_last_word_of_a_name_counts() {
        let mut table = Table::default();
        let mut next = 0;
        let mut hear = |agent: &str, state| {
            let number = || {
                next += 1;
                next
            };
            table.hear(one(agent, state), number).unwrap();
            (
                table.of(&agent.parse().unwrap()),
                table.sessions(),
                table.bytes,
            )
        };
        let departure = Departure {
            at_ms: 5,
            reason: proto::Reason::SessionLost,
        };
        let session = AgentState::Session;
        assert_eq!(hear("a", session), (Some(Believed::Session(1)), 1, 1));
        assert_eq!(hear("bb", session), (Some(Believed::Session(2)), 2, 3));
        assert_eq!(hear("a", session), (Some(Believed::Session(3)), 2, 3));
        let gone = AgentState::Known(Some(departure));
        let believed = Believed::Known(Some(departure));
        assert_eq!(hear("a", gone), (Some(believed), 1, 3));
        assert_eq!(hear("a", AgentState::Forgotten), (None, 1, 2));
        assert_eq!(hear("a", AgentState::Forgotten), (None, 1, 2));
    }

    #[test]
    fn it_says_when_other_names_are_known() {
        let mut table = Table::default();
        for (state, other) in [
            (AgentState::Forgotten, false),
            (AgentState::Session, true),
            (AgentState::Known(None), false),
            (AgentState::Session, false),
            (AgentState::Forgotten, true),
            (AgentState::Forgotten, false),
        ] {
            assert_eq!(table.hear(one("a", state), || 1), Ok(other), "{state:?}");
        }
    }

    #[test]
    fn a_name_of_a_service_is_not_believed() {
        let mut table = Table::default();
        let announced = one("webhook.default.svc", AgentState::Session);
        table.hear(announced, || 1).unwrap();
        assert_eq!(table.names().count(), 0);
    }

    #[test]
    fn it_is_complete_from_when_that_was_said() {
        let mut table = Table::default();
        table.hear(one("a", AgentState::Session), || 1).unwrap();
        assert!(!table.is_complete());
        let complete = Announcement {
            agents: vec![],
            complete: true,
        };
        table.hear(complete, || 2).unwrap();
        table.hear(one("b", AgentState::Session), || 3).unwrap();
        assert!(table.is_complete());
    }

    #[test]
    fn millions_of_names_are_refused_and_cost_no_more_than_the_limit() {
        let mut table = Table::default();
        let mut refused = 0;
        for i in 0..2_000_000 {
            let heard = table.hear(one(&format!("edge{i}"), AgentState::Session), || 1);
            refused += u32::from(heard.is_err());
            // A session is closed at the first; that it is not must do no harm either.
        }
        assert_eq!(refused, 2_000_000 - 65_536);
        assert_eq!(table.names().count(), MAX_NAMES);
        assert!(table.agents.capacity() <= 2 * MAX_NAMES);
    }

    #[test]
    fn long_names_are_refused_by_their_bytes() {
        let mut table = Table::default();
        let label = "a".repeat(63);
        let name = |i| format!("{i:05}.{label}.{label}.{label}");
        let mut i = 0;
        while table
            .hear(one(&name(i), AgentState::Known(None)), || 1)
            .is_ok()
        {
            i += 1;
        }
        assert!(table.bytes <= MAX_BYTES && i < MAX_NAMES, "{i}");
    }
}
