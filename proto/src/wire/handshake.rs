//! `Hello` and `HelloAck` as decisions over values (docs/protocol.md section 3).

use std::fmt::Display;
use std::ops::RangeInclusive;

use crate::wire::pb;
use crate::{AgentName, IdError, LineName, Reason, ServerName, SessionId};

/// Versions this build speaks.
pub const VERSIONS: RangeInclusive<u32> = 1..=1;
/// More capabilities than there could be in this major version; the rest is not looked at.
const MAX_CAPABILITIES: usize = 32;

/// A handshake that can't be accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The first frame is not the expected one.
    #[error("the other end did not begin with its hello")]
    Unexpected,
    /// No version in common.
    #[error("no protocol version in common: ours is {}, theirs is {theirs}", VERSIONS.end())]
    Version {
        /// The highest that the other end speaks.
        theirs: u32,
    },
    /// The hello has another name than the certificate of whoever sent it.
    #[error("the other end calls itself {claimed:?} but its certificate says {certified:?}")]
    Identity {
        /// What the hello says.
        claimed: String,
        /// What the certificate says.
        certified: String,
    },
    /// A name in the message is no name.
    #[error("read a name")]
    Name(#[source] IdError),
    /// The other end sent `GoAway` in place of its hello.
    #[error("refused: {detail}")]
    Refused {
        /// Why.
        reason: Reason,
        /// The other end's words.
        detail: String,
        /// Milliseconds to stay away.
        retry_after_ms: u32,
    },
}

impl HandshakeError {
    /// The reason to report, and to tell the other end.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Unexpected | Self::Name(_) => Reason::Protocol,
            Self::Version { .. } => Reason::Version,
            Self::Identity { .. } => Reason::IdentityMismatch,
            Self::Refused { reason, .. } => *reason,
        }
    }
}

/// What an end accepts from the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Streams open at once.
    pub max_streams: u32,
    /// Receive window of each stream, bytes.
    pub stream_window: u64,
}

/// Optional abilities that both ends named.
pub type Capabilities = Vec<String>;

/// What whoever dials says of itself: an agent, or between servers a server.
#[derive(Debug, Clone)]
pub struct Offer<Name = AgentName> {
    /// The name in its certificate.
    pub agent: Name,
    /// Name and version of the software.
    pub software: String,
    /// What it can do beyond version 1.
    pub capabilities: Capabilities,
    /// What it accepts.
    pub limits: Limits,
    /// Random, new with each start.
    pub instance: String,
    /// The dedicated line that this session goes over.
    pub line: Option<LineName>,
}

impl<Name: Display> Offer<Name> {
    /// The message.
    #[must_use]
    pub fn to_pb(&self) -> pb::Hello {
        pb::Hello {
            min_version: *VERSIONS.start(),
            max_version: *VERSIONS.end(),
            agent: self.agent.to_string(),
            software: self.software.clone(),
            capabilities: self.capabilities.clone(),
            limits: Some(limits_to_pb(self.limits)),
            instance: self.instance.clone(),
            line: self
                .line
                .as_ref()
                .map(LineName::to_string)
                .unwrap_or_default(),
        }
    }
}

/// What a server answers with.
#[derive(Debug, Clone)]
pub struct ServerOffer {
    /// Its name.
    pub server: ServerName,
    /// Name and version of the software.
    pub software: String,
    /// What it can do beyond version 1.
    pub capabilities: Capabilities,
    /// What it accepts.
    pub limits: Limits,
    /// Servers where agents may go, this one included; 0 if that is not known.
    pub servers: u32,
}

/// What both ends agreed on. At the server `peer` is the dialler's name, at the dialler the server's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted<Peer> {
    /// Who is at the other end.
    pub peer: Peer,
    /// The version spoken.
    pub version: u32,
    /// Its software.
    pub software: String,
    /// What both can do.
    pub capabilities: Capabilities,
    /// What the other end accepts.
    pub limits: Limits,
    /// The session's id, as text.
    pub session: String,
    /// Unix milliseconds at the server; 0 at the server's own side.
    pub server_time_ms: i64,
    /// Servers where agents may go; 0 if not known, and at the server's own side.
    pub servers: u32,
    /// At the server's side: the dedicated line that the dialler came over, by its own word.
    pub line: Option<LineName>,
    /// At the server's side: differs with each start of the dialler.
    pub instance: String,
}

const fn limits_to_pb(limits: Limits) -> pb::Limits {
    pb::Limits {
        max_streams: limits.max_streams,
        stream_window: limits.stream_window,
    }
}

fn limits_from_pb(limits: Option<&pb::Limits>) -> Limits {
    // A peer that states none accepts one stream at a time, the least that works.
    limits.map_or(
        Limits {
            max_streams: 1,
            stream_window: 0,
        },
        |l| Limits {
            max_streams: l.max_streams.max(1),
            stream_window: l.stream_window,
        },
    )
}

fn common(ours: &[String], theirs: &[String]) -> Capabilities {
    ours.iter()
        .filter(|c| theirs.iter().take(MAX_CAPABILITIES).any(|t| t == *c))
        .cloned()
        .collect()
}

/// Shortens a peer's free text and keeps it printable, so that it can be logged.
pub(crate) fn printable(text: &str, most: usize) -> String {
    text.chars()
        .filter(|c| !c.is_control())
        .take(most)
        .collect()
}

/// The server's side: `certified` is the name in the dialler's certificate.
///
/// # Errors
/// [`HandshakeError`]; its reason goes back in a `GoAway`.
pub fn answer_hello<Name: Display + Clone>(
    hello: &pb::Hello,
    certified: &Name,
    ours: &ServerOffer,
    session: SessionId,
    server_time_ms: i64,
) -> Result<(pb::HelloAck, Accepted<Name>), HandshakeError> {
    if hello.agent != certified.to_string() {
        return Err(HandshakeError::Identity {
            claimed: printable(&hello.agent, 80),
            certified: certified.to_string(),
        });
    }
    let version = hello.max_version.min(*VERSIONS.end());
    if version < hello.min_version || !VERSIONS.contains(&version) {
        return Err(HandshakeError::Version {
            theirs: hello.max_version,
        });
    }
    let line = match hello.line.as_str() {
        "" => None,
        name => Some(name.parse().map_err(HandshakeError::Name)?),
    };
    let capabilities = common(&ours.capabilities, &hello.capabilities);
    let ack = pb::HelloAck {
        version,
        session: session.to_string(),
        server: ours.server.to_string(),
        software: ours.software.clone(),
        capabilities: capabilities.clone(),
        limits: Some(limits_to_pb(ours.limits)),
        server_time_ms,
        servers: ours.servers,
    };
    let accepted = Accepted {
        peer: certified.clone(),
        version,
        software: printable(&hello.software, 80),
        capabilities,
        limits: limits_from_pb(hello.limits.as_ref()),
        session: session.to_string(),
        server_time_ms: 0,
        servers: 0,
        line,
        instance: printable(&hello.instance, 40),
    };
    Ok((ack, accepted))
}

/// The dialler's side: what came back after `ours`.
///
/// # Errors
/// [`HandshakeError`]; a `GoAway` is [`HandshakeError::Refused`].
pub fn check_hello_ack<Name>(
    frame: pb::ControlFrame,
    ours: &Offer<Name>,
) -> Result<Accepted<ServerName>, HandshakeError> {
    use pb::control_frame::Body;
    let ack = match frame.body {
        Some(Body::HelloAck(ack)) => ack,
        Some(Body::GoAway(away)) => {
            return Err(HandshakeError::Refused {
                reason: Reason::from_code(away.reason.into()),
                detail: printable(&away.detail, 300),
                retry_after_ms: away.retry_after_ms,
            });
        }
        Some(
            Body::Hello(_)
            | Body::Keepalive(_)
            | Body::KeepaliveAck(_)
            | Body::Announce(_)
            | Body::Servers(_),
        )
        | None => {
            return Err(HandshakeError::Unexpected);
        }
    };
    if !VERSIONS.contains(&ack.version) {
        return Err(HandshakeError::Version {
            theirs: ack.version,
        });
    }
    Ok(Accepted {
        peer: ack.server.parse().map_err(HandshakeError::Name)?,
        version: ack.version,
        software: printable(&ack.software, 80),
        capabilities: common(&ours.capabilities, &ack.capabilities),
        limits: limits_from_pb(ack.limits.as_ref()),
        session: printable(&ack.session, 40),
        server_time_ms: ack.server_time_ms,
        servers: ack.servers,
        line: None,
        instance: String::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer() -> Offer {
        Offer {
            agent: "edge1".parse().unwrap(),
            software: "edge-agent 0.1.0".into(),
            capabilities: vec!["a".into(), "b".into()],
            limits: Limits {
                max_streams: 4096,
                stream_window: 1 << 20,
            },
            instance: "x".into(),
            line: None,
        }
    }

    fn server() -> ServerOffer {
        ServerOffer {
            server: "proxy-1".parse().unwrap(),
            software: "proxy-server 0.1.0".into(),
            capabilities: vec!["b".into(), "c".into()],
            limits: Limits {
                max_streams: 16,
                stream_window: 1 << 20,
            },
            servers: 2,
        }
    }

    fn ack_frame(ack: pb::HelloAck) -> pb::ControlFrame {
        pb::ControlFrame {
            body: Some(pb::control_frame::Body::HelloAck(ack)),
        }
    }

    #[test]
    fn both_ends_come_to_the_same_terms() {
        let name: AgentName = "edge1".parse().unwrap();
        let (ack, at_server) =
            answer_hello(&offer().to_pb(), &name, &server(), SessionId::random(), 7).unwrap();
        let at_agent = check_hello_ack(ack_frame(ack), &offer()).unwrap();
        assert_eq!((at_server.version, at_agent.version), (1, 1));
        assert_eq!(
            (&at_server.capabilities, &at_agent.capabilities),
            (&vec!["b".into()], &vec!["b".into()])
        );
        assert_eq!((at_agent.server_time_ms, at_agent.servers), (7, 2));
        assert_eq!(at_server.limits.max_streams, 4096);
        assert_eq!(at_server.session, at_agent.session);
    }

    #[test]
    fn a_server_is_greeted_by_the_same_rules_under_its_own_name() {
        let certified: ServerName = "proxy-2".parse().unwrap();
        let hello = |name: &str| {
            let offer = Offer {
                agent: name.parse::<ServerName>().unwrap(),
                software: String::new(),
                capabilities: vec![],
                limits: offer().limits,
                instance: String::new(),
                line: None,
            };
            answer_hello(
                &offer.to_pb(),
                &certified,
                &server(),
                SessionId::random(),
                0,
            )
        };
        assert_eq!(hello("proxy-2").unwrap().1.peer, certified);
        let refused = hello("proxy-3").unwrap_err();
        assert_eq!(refused.reason(), Reason::IdentityMismatch);
    }

    #[test]
    fn an_agent_that_claims_another_name_is_refused() {
        let other: AgentName = "edge2".parse().unwrap();
        let refused = answer_hello(&offer().to_pb(), &other, &server(), SessionId::random(), 0);
        assert_eq!(refused.unwrap_err().reason(), Reason::IdentityMismatch);
    }

    #[test]
    fn the_line_is_the_dialler_s_word_and_a_name() {
        let name: AgentName = "edge1".parse().unwrap();
        let answer = |line: &str| {
            let hello = pb::Hello {
                line: line.into(),
                ..offer().to_pb()
            };
            let answered = answer_hello(&hello, &name, &server(), SessionId::random(), 0);
            answered.map(|(_ack, accepted)| accepted)
        };
        let told = answer("express-1").unwrap();
        assert_eq!(
            (told.line, &*told.instance),
            ("express-1".parse().ok(), "x")
        );
        // As older agents say nothing of it.
        assert_eq!(answer("").unwrap().line, None);
        for garbage in ["Express", "a b", "a\u{1b}[2J", "é", &"a".repeat(64)] {
            let refused = answer(garbage).unwrap_err();
            assert_eq!(refused.reason(), Reason::Protocol, "{garbage}");
        }
        let offer = Offer {
            line: "express".parse().ok(),
            ..offer()
        };
        assert_eq!(offer.to_pb().line, "express");
    }

    #[test]
    fn a_newer_agent_is_answered_with_the_highest_common_version() {
        let name: AgentName = "edge1".parse().unwrap();
        for (min, max, fits) in [
            (1, 9, true),
            (2, 9, false),
            (0, 0, false),
            (0, 1, true),
            (5, 1, false),
        ] {
            let hello = pb::Hello {
                min_version: min,
                max_version: max,
                ..offer().to_pb()
            };
            let result = answer_hello(&hello, &name, &server(), SessionId::random(), 0);
            assert_eq!(result.is_ok(), fits, "{min}..={max}");
        }
    }

    #[test]
    fn a_refusal_carries_its_reason_and_retry_after() {
        let away = pb::GoAway {
            reason: Reason::Revoked.code(),
            retry_after_ms: 5000,
            detail: "agent edge1 is\r\n revoked".into(),
            deadline_ms: 0,
        };
        let frame = pb::ControlFrame {
            body: Some(pb::control_frame::Body::GoAway(away)),
        };
        assert_eq!(
            check_hello_ack(frame, &offer()).unwrap_err(),
            HandshakeError::Refused {
                reason: Reason::Revoked,
                detail: "agent edge1 is revoked".into(),
                retry_after_ms: 5000
            }
        );
    }
}
