//! What a server says of its agents to another server (docs/protocol.md section 10).
//!
//! A name stands for itself: what is said of it later replaces what was said before, so that messages may be put
//! together from any order of changes, as long as the last change of each name is the last one told.

use prost::Message as _;

use crate::wire::frame::MAX_FRAME;
use crate::wire::pb;
use crate::wire::pb::control_frame::Body;
use crate::{AgentName, IdError, Reason};

/// Bytes of a frame that are not its entries: the frame's length, the body's key and length, and `complete`.
const AROUND: usize = 16;

const FORGOTTEN: u32 = 0;
const SESSION: u32 = 1;
const KNOWN: u32 = 2;

/// How an agent's last session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Departure {
    /// Unix time, milliseconds; never 0.
    pub at_ms: i64,
    /// Why.
    pub reason: Reason,
}

/// What a server has of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentState {
    /// Nothing, any more.
    Forgotten,
    /// A session.
    Session,
    /// No session; it enrolled there or had one.
    Known(Option<Departure>),
}

/// A message that can't be believed. Always the other end's mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AnnounceError {
    /// A name is none.
    #[error("read the name of an agent")]
    Name(#[source] IdError),
    /// A state is none.
    #[error("state {0} of an agent is none")]
    State(u32),
}

/// One message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Announcement {
    /// Names and what there is of them, each name once.
    pub agents: Vec<(AgentName, AgentState)>,
    /// All there is to say was said up to here.
    pub complete: bool,
}

impl Announcement {
    /// Reads the message.
    ///
    /// # Errors
    /// [`AnnounceError`] for any entry that is wrong.
    pub fn from_pb(announce: &pb::Announce) -> Result<Self, AnnounceError> {
        let entry = |entry: &pb::AnnouncedAgent| {
            let name = entry.agent.parse().map_err(AnnounceError::Name)?;
            let state = match entry.state {
                FORGOTTEN => AgentState::Forgotten,
                SESSION => AgentState::Session,
                KNOWN => AgentState::Known((entry.lost_ms != 0).then(|| Departure {
                    at_ms: entry.lost_ms,
                    reason: Reason::from_code(entry.reason.into()),
                })),
                other => return Err(AnnounceError::State(other)),
            };
            Ok((name, state))
        };
        Ok(Self {
            agents: announce
                .agents
                .iter()
                .map(entry)
                .collect::<Result<_, _>>()?,
            complete: announce.complete,
        })
    }
}

/// A message that is being written, never longer than a frame may be.
#[derive(Debug, Default)]
pub struct Draft {
    message: pb::Announce,
    length: usize,
}

impl Draft {
    /// Adds an entry, unless the frame is full: then it says `false` and the entry belongs into the next one.
    pub fn push(&mut self, agent: &AgentName, state: AgentState) -> bool {
        let (state, departure) = match state {
            AgentState::Forgotten => (FORGOTTEN, None),
            AgentState::Session => (SESSION, None),
            AgentState::Known(departure) => (KNOWN, departure),
        };
        let entry = pb::AnnouncedAgent {
            agent: agent.to_string(),
            state,
            lost_ms: departure.map_or(0, |departure| departure.at_ms),
            reason: departure.map_or(0, |departure| departure.reason.code()),
        };
        // Its key, and a length that is under 2^14.
        let length = entry.encoded_len() + 3;
        if self.length + length + AROUND > MAX_FRAME {
            return false;
        }
        self.length += length;
        self.message.agents.push(entry);
        true
    }

    /// Whether there is no entry in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.message.agents.is_empty()
    }

    /// The frame. `complete` says that all was said with it.
    #[must_use]
    pub fn finish(mut self, complete: bool) -> pb::ControlFrame {
        self.message.complete = complete;
        pb::ControlFrame {
            body: Some(Body::Announce(self.message)),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use proptest::prelude::*;

    use super::*;
    use crate::wire::{decode, encode};

    fn state() -> impl Strategy<Value = AgentState> {
        prop_oneof![
            Just(AgentState::Forgotten),
            Just(AgentState::Session),
            Just(AgentState::Known(None)),
            (1..i64::MAX, 0..Reason::ALL.len()).prop_map(|(at_ms, reason)| {
                let reason = Reason::ALL[reason];
                AgentState::Known(Some(Departure { at_ms, reason }))
            }),
        ]
    }

    fn read(frame: &pb::ControlFrame) -> Announcement {
        let wire = encode(frame);
        let mut buffer = BytesMut::from(&wire[..]);
        let frame: pb::ControlFrame = decode(&mut buffer).unwrap().unwrap();
        assert!(buffer.is_empty());
        let Some(Body::Announce(announce)) = frame.body else {
            panic!("{frame:?}")
        };
        Announcement::from_pb(&announce).unwrap()
    }

    #[test]
    fn what_is_none_is_refused() {
        let of = |agent: &str, state| {
            let entry = pb::AnnouncedAgent {
                agent: agent.into(),
                state,
                ..Default::default()
            };
            let agents = vec![entry];
            Announcement::from_pb(&pb::Announce {
                agents,
                complete: false,
            })
        };
        assert!(of("edge1", 1).is_ok());
        assert_eq!(of("edge1", 3), Err(AnnounceError::State(3)));
        for name in ["", "Edge1", "a b", &"a".repeat(300)] {
            assert!(matches!(of(name, 1), Err(AnnounceError::Name(_))), "{name}");
        }
    }

    #[test]
    fn a_frame_takes_as_many_of_the_longest_names_as_fit() {
        let label = "a".repeat(63);
        let name = format!("{label}.{label}.{label}.{}", &label[..61])
            .parse()
            .unwrap();
        let mut draft = Draft::default();
        let departure = Departure {
            at_ms: i64::MAX,
            reason: Reason::HalfOpenIdle,
        };
        let mut count = 0;
        while draft.push(&name, AgentState::Known(Some(departure))) {
            count += 1;
        }
        assert_eq!(count, 14);
        assert_eq!(read(&draft.finish(true)).agents.len(), count);
    }

    proptest! {
        #[test]
        fn drafts_read_back_in_frames_within_the_limit(
            entries in proptest::collection::vec(("[a-z0-9]{1,63}(\\.[a-z0-9]{1,63}){0,2}", state()), 0..300),
            complete in any::<bool>(),
        ) {
            let entries: Vec<(AgentName, AgentState)> =
                entries.into_iter().map(|(name, state)| (name.parse().unwrap(), state)).collect();
            let mut rest = &entries[..];
            let mut told = Vec::new();
            while let [_, ..] = rest {
                let mut draft = Draft::default();
                let fits = rest.iter().take_while(|(name, state)| draft.push(name, *state)).count();
                prop_assert!(fits > 0 && !draft.is_empty());
                rest = &rest[fits..];
                let message = read(&draft.finish(complete));
                prop_assert_eq!(message.complete, complete);
                told.extend(message.agents);
            }
            prop_assert_eq!(told, entries);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            if let Ok(announce) = <pb::Announce as prost::Message>::decode(&bytes[..]) {
                Announcement::from_pb(&announce).ok();
            }
        }
    }
}
