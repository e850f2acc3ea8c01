//! What opens a data stream and what is answered (docs/protocol.md section 5).

use std::time::Duration;

use crate::wire::handshake::printable;
use crate::wire::pb;
use crate::{Destination, Host, IdError, Reason};

/// Longest W3C traceparent that is passed on; version 00 has 55 bytes.
const MAX_TRACE: usize = 64;
/// Longest name of a pod with its namespace, and of a node: DNS names.
const MAX_POD: usize = 63 + 1 + 253;
/// Longest detail of a reply, characters; it ends in an HTTP reason phrase.
const MAX_DETAIL: usize = 300;

/// A header that can't be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The destination is none.
    #[error("read the destination")]
    Destination(#[source] IdError),
}

/// What the server asks of the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamHeader {
    /// What to dial.
    pub destination: Destination,
    /// How long the dial may take.
    pub deadline: Duration,
    /// W3C traceparent, or empty.
    pub trace: String,
    /// The pod that is to be dialled, if it is one that the server knows.
    pub pod: Option<PodPort>,
}

/// What a server vouches for: the destination is that pod's, which is on that node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPort {
    /// `NAMESPACE/NAME`.
    pub pod: String,
    /// Its node.
    pub node: String,
    /// The pod says that it serves the port, or a Service says so.
    pub declared: bool,
}

impl PodPort {
    fn to_pb(&self) -> pb::PodPort {
        pb::PodPort {
            pod: self.pod.clone(),
            node: self.node.clone(),
            declared: self.declared,
        }
    }

    fn from_pb(pod: &pb::PodPort) -> Self {
        Self {
            pod: printable(&pod.pod, MAX_POD),
            node: printable(&pod.node, MAX_POD),
            declared: pod.declared,
        }
    }
}

impl StreamHeader {
    /// The message.
    #[must_use]
    pub fn to_pb(&self) -> pb::StreamHeader {
        let host = match &self.destination.host {
            Host::Ip(ip) => ip.to_string(),
            Host::Name(name) => name.clone(),
        };
        pb::StreamHeader {
            host,
            port: self.destination.port.into(),
            deadline_ms: u32::try_from(self.deadline.as_millis()).unwrap_or(u32::MAX),
            trace: self.trace.clone(),
            pod: self.pod.as_ref().map(PodPort::to_pb),
            ..pb::StreamHeader::default()
        }
    }

    /// Reads the message.
    ///
    /// # Errors
    /// When host or port are none.
    pub fn from_pb(header: &pb::StreamHeader) -> Result<Self, HeaderError> {
        let port = u16::try_from(header.port).ok().filter(|p| *p != 0);
        let port = port.ok_or(HeaderError::Destination(IdError::Port))?;
        let host = header.host.parse().map_err(HeaderError::Destination)?;
        Ok(Self {
            destination: Destination { host, port },
            deadline: Duration::from_millis(header.deadline_ms.into()),
            trace: printable(&header.trace, MAX_TRACE),
            pod: header.pod.as_ref().map(PodPort::from_pb),
        })
    }
}

/// What the agent answers: connected, or why not.
pub type StreamReply = Result<(), (Reason, String)>;

impl From<&StreamReply> for pb::StreamReply {
    fn from(reply: &StreamReply) -> Self {
        match reply {
            Ok(()) => Self {
                reason: 0,
                detail: String::new(),
            },
            Err((reason, detail)) => Self {
                reason: reason.code(),
                detail: printable(detail, MAX_DETAIL),
            },
        }
    }
}

impl From<&pb::StreamReply> for StreamReply {
    fn from(reply: &pb::StreamReply) -> Self {
        match reply.reason {
            0 => Ok(()),
            code => Err((
                Reason::from_code(code.into()),
                printable(&reply.detail, MAX_DETAIL),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_read_back() {
        for text in ["edge1:10250", "10.0.0.1:1", "[fd00::1]:65535"] {
            let header = StreamHeader {
                destination: text.parse().unwrap(),
                deadline: Duration::from_secs(10),
                trace: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into(),
                pod: Some(PodPort {
                    pod: "default/web".into(),
                    node: "edge1".into(),
                    declared: true,
                }),
            };
            assert_eq!(StreamHeader::from_pb(&header.to_pb()).unwrap(), header);
        }
    }

    #[test]
    fn a_header_without_a_destination_is_refused() {
        for (host, port) in [("", 1), ("a", 0), ("a", 65_536), ("a b", 1), ("[a]", 1)] {
            let header = pb::StreamHeader {
                host: host.into(),
                port,
                ..Default::default()
            };
            assert!(StreamHeader::from_pb(&header).is_err(), "{host} {port}");
        }
    }

    #[test]
    fn replies_read_back_and_are_printable() {
        let refused: StreamReply =
            Err((Reason::DialRefused, "dial 127.0.0.1:1:\r\nrefused".into()));
        let read = StreamReply::from(&pb::StreamReply::from(&refused));
        assert_eq!(
            read,
            Err((Reason::DialRefused, "dial 127.0.0.1:1:refused".into()))
        );
        assert_eq!(StreamReply::from(&pb::StreamReply::from(&Ok(()))), Ok(()));
    }
}
