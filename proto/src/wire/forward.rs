//! What opens a data stream between two servers (docs/protocol.md section 10): the header that an agent would get, and
//! whose session is asked for. It goes one hop and no further.

use crate::wire::handshake::printable;
use crate::wire::header::HeaderError;
use crate::wire::{StreamHeader, pb};
use crate::{AgentName, IdError};

/// Hops of a header that one server sends another.
const ONE_HOP: u32 = 1;
/// Longest name of a node, and longest words about a requester, in characters; both are for logs.
const MAX_WORDS: usize = 300;

/// A header that can't be served. Always the other server's mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ForwardError {
    /// It is none that comes straight from the server where the request entered.
    #[error("a forwarded header has {ONE_HOP} hop, this one {0}")]
    Hops(u32),
    /// The agent is none.
    #[error("read the agent's name")]
    Agent(#[source] IdError),
    /// What it would say to the agent is wrong.
    #[error("read the header")]
    Header(#[source] HeaderError),
}

/// What one server asks of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardHeader {
    /// Whose session is asked for.
    pub agent: AgentName,
    /// What the requester calls the node.
    pub node: String,
    /// Who asks, in the words of the server that let it in.
    pub requester: String,
    /// What the agent is to be told.
    pub header: StreamHeader,
}

impl ForwardHeader {
    /// The message.
    #[must_use]
    pub fn to_pb(&self) -> pb::StreamHeader {
        pb::StreamHeader {
            hops: ONE_HOP,
            agent: self.agent.to_string(),
            node: printable(&self.node, MAX_WORDS),
            requester: printable(&self.requester, MAX_WORDS),
            ..self.header.to_pb()
        }
    }

    /// Reads the message.
    ///
    /// # Errors
    /// [`ForwardError`].
    pub fn from_pb(header: &pb::StreamHeader) -> Result<Self, ForwardError> {
        if header.hops != ONE_HOP {
            return Err(ForwardError::Hops(header.hops));
        }
        Ok(Self {
            agent: header.agent.parse().map_err(ForwardError::Agent)?,
            node: printable(&header.node, MAX_WORDS),
            requester: printable(&header.requester, MAX_WORDS),
            header: StreamHeader::from_pb(header).map_err(ForwardError::Header)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::wire::{MAX_FRAME, PodPort, encode};

    fn forward(node: &str, requester: &str) -> ForwardHeader {
        ForwardHeader {
            agent: "edge1".parse().unwrap(),
            node: node.to_owned(),
            requester: requester.to_owned(),
            header: StreamHeader {
                destination: "edge1:10250".parse().unwrap(),
                deadline: Duration::from_secs(10),
                trace: String::new(),
                pod: Some(PodPort {
                    pod: format!("{}/{}", "n".repeat(63), "p".repeat(253)),
                    node: "n".repeat(253),
                    declared: true,
                }),
            },
        }
    }

    #[test]
    fn only_a_header_of_exactly_one_hop_is_served() {
        for hops in [0, 2, 5, u32::MAX] {
            let header = pb::StreamHeader {
                hops,
                ..forward("edge1", "uid/0").to_pb()
            };
            assert_eq!(
                ForwardHeader::from_pb(&header),
                Err(ForwardError::Hops(hops))
            );
        }
    }

    #[test]
    fn it_names_an_agent_and_a_destination() {
        let good = forward("edge1", "uid/0").to_pb();
        for agent in ["", "Edge1", "a b"] {
            let header = pb::StreamHeader {
                agent: agent.into(),
                ..good.clone()
            };
            let error = ForwardHeader::from_pb(&header).unwrap_err();
            assert!(matches!(error, ForwardError::Agent(_)), "{agent}");
        }
        let header = pb::StreamHeader { port: 0, ..good };
        let error = ForwardHeader::from_pb(&header).unwrap_err();
        assert!(matches!(error, ForwardError::Header(_)));
    }

    proptest! {
        #[test]
        fn words_of_any_length_fit_into_a_frame_and_are_printable(node in "\\PC{0,500}", requester in ".{0,500}") {
            let message = forward(&node, &requester).to_pb();
            prop_assert!(encode(&message).len() <= MAX_FRAME);
            let read = ForwardHeader::from_pb(&message).unwrap();
            prop_assert!(!read.requester.chars().any(char::is_control));
            prop_assert_eq!(ForwardHeader::from_pb(&read.to_pb()).unwrap(), read);
        }
    }
}
