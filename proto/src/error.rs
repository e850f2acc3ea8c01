//! [`Reason`]: the closed list of how things end badly. One value is the metric label, the log field, the wire
//! code, the HTTP status and the sentence that a user reads; `docs/errors.md` says what to do about each.

use std::fmt;

/// Who has to act for it not to happen again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The edge: its agent, its network or its destination.
    Edge,
    /// The proxy-server or its operator.
    Server,
    /// Whoever asked, or its settings.
    Requester,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $label:literal, $status:literal, $fault:ident, $sentence:literal;)*) => {
        /// Why a stream or session failed or was refused. Codes are on the wire: they never change meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason {
            $($(#[$doc])* $variant,)*
        }

        impl Reason {
            /// Every reason, for tables and metrics.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Number on the wire. 0 is never a reason: it means success in a `StreamReply`.
            #[must_use]
            pub const fn code(self) -> u32 {
                match self { $(Self::$variant => $code,)* }
            }

            /// The reason with that code; one from a newer peer is [`Reason::Unspecified`].
            #[must_use]
            pub const fn from_code(code: u64) -> Self {
                match code { $($code => Self::$variant,)* _ => Self::Unspecified }
            }

            /// Metric label and log field.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)* }
            }

            /// HTTP status of a CONNECT that ends this way.
            #[must_use]
            pub const fn http_status(self) -> u16 {
                match self { $(Self::$variant => $status,)* }
            }

            /// Who has to act.
            #[must_use]
            pub const fn fault(self) -> Fault {
                match self { $(Self::$variant => Fault::$fault,)* }
            }

            /// What happened, in words for the person who typed `kubectl`; no subject, no final dot.
            #[must_use]
            pub const fn sentence(self) -> &'static str {
                match self { $(Self::$variant => $sentence,)* }
            }
        }
    };
}

reasons! {
    /// The other end gave a code that this version does not know.
    Unspecified = 1, "unspecified", 502, Edge, "ended for a reason this version does not know";
    /// Whoever asked went away, or a half was dropped unfinished.
    Cancelled = 2, "cancelled", 499, Requester, "the requester went away";
    /// A frame, header or message broke the protocol.
    Protocol = 3, "protocol", 502, Edge, "the other end broke the tunnel protocol";
    /// A defect of ours: a panic, or a state that should not be.
    Internal = 4, "internal", 500, Server, "internal error";
    /// The process is stopping.
    Draining = 5, "draining", 503, Server, "stopping";
    /// A step of set-up did not end in time.
    Timeout = 6, "timeout", 504, Edge, "no answer in time";
    /// No version in common.
    Version = 7, "version", 502, Edge, "no protocol version in common";

    /// The agent of that node has no session.
    NoSession = 16, "no_session", 503, Edge, "no session";
    /// The session was lost while the stream was open or being opened.
    SessionLost = 17, "session_lost", 502, Edge, "session lost";
    /// A newer session of the agent took over and this one was told to go.
    Replaced = 18, "replaced", 503, Edge, "replaced by a newer session";
    /// The session outlived its certificate.
    CertificateExpired = 19, "certificate_expired", 503, Edge, "the session outlived its certificate";
    /// The agent was revoked.
    Revoked = 20, "revoked", 403, Server, "the agent is revoked";
    /// The name in `Hello` is not the one in the certificate.
    IdentityMismatch = 21, "identity_mismatch", 403, Edge, "the agent claims a name that is not in its certificate";
    /// TLS failed: certificates, names, trust.
    Tls = 22, "tls", 502, Edge, "the TLS handshake failed";
    /// The other end could not be reached or did not answer at all.
    Unreachable = 23, "unreachable", 502, Edge, "the other end of the tunnel can't be reached";
    /// The Node that the agent's certificate was issued for is not in the cluster any more.
    NodeGone = 24, "node_gone", 403, Edge, "the node was deleted from the cluster";

    /// The request could not be read.
    BadRequest = 32, "bad_request", 400, Requester, "the request could not be read";
    /// The request was larger than its limit.
    TooLarge = 33, "too_large", 431, Requester, "the request is larger than its limit";
    /// No rule of the frontend permits it.
    NotAllowed = 34, "not_allowed", 403, Requester, "not allowed";
    /// The requester has to say who it is.
    Unauthenticated = 35, "unauthenticated", 407, Requester, "no valid credentials";
    /// The destination is not at the edge and this frontend does not dial anything else.
    UnknownDestination = 36, "unknown_destination", 403, Requester, "the destination is no node at the edge";
    /// Two agents share that address.
    AmbiguousDestination = 37, "ambiguous_destination", 409, Requester, "more than one node has that address";
    /// A destination that is never dialled: loopback, link-local, metadata, ourselves.
    ForbiddenDestination = 38, "forbidden_destination", 403, Requester, "that address is never dialled";
    /// A limit of streams or connections is reached.
    Overloaded = 39, "overloaded", 503, Server, "a limit is reached, try again later";

    /// The agent's allow-list does not have the destination.
    DestinationDenied = 48, "destination_denied", 403, Edge, "the agent's allow-list does not have the destination";
    /// The destination refused the connection.
    DialRefused = 49, "dial_refused", 502, Edge, "connection refused";
    /// The destination did not answer the dial.
    DialTimeout = 50, "dial_timeout", 504, Edge, "the destination does not answer";
    /// No way to the destination.
    DialUnreachable = 51, "dial_unreachable", 502, Edge, "no route to the destination";
    /// The destination's name could not be resolved.
    Resolve = 52, "resolve", 502, Edge, "the name could not be resolved";
    /// No descriptors left.
    FilesExhausted = 53, "files_exhausted", 503, Edge, "out of file descriptors";
    /// Any other failure of the dial.
    DialFailed = 54, "dial_failed", 502, Edge, "the dial failed";

    /// The destination cut its connection.
    DestinationReset = 64, "destination_reset", 502, Edge, "the destination cut the connection";
    /// The requester cut its connection.
    RequesterReset = 65, "requester_reset", 499, Requester, "the requester cut the connection";
    /// Stopped longest while memory was over its budget.
    SlowReader = 66, "slow_reader", 503, Requester, "nobody read for too long while memory was short";
    /// One way was closed and nothing came the other way for too long.
    HalfOpenIdle = 67, "half_open_idle", 504, Edge, "half closed, and silent for too long";
}

impl Reason {
    /// Whether a server may give it in a `StreamReply` to another: what an agent may, and what becomes of sessions. It
    /// does not speak of the requester, whom the other server has let in.
    #[must_use]
    pub const fn is_of_server(self) -> bool {
        self.is_of_agent() || (matches!(self.code(), 1..=31) && !matches!(self, Self::Cancelled))
    }

    /// Whether an agent may give it in a `StreamReply`.
    #[must_use]
    pub const fn is_of_agent(self) -> bool {
        matches!(self.code(), 48..=63)
            || matches!(
                self,
                Self::Draining
                    | Self::ForbiddenDestination
                    | Self::Internal
                    | Self::Overloaded
                    | Self::Protocol
                    | Self::Timeout
                    | Self::TooLarge
                    | Self::Unspecified
            )
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_and_labels_are_unique_and_read_back() {
        let codes: BTreeSet<_> = Reason::ALL.iter().map(|r| r.code()).collect();
        let labels: BTreeSet<_> = Reason::ALL.iter().map(|r| r.label()).collect();
        assert_eq!(
            (codes.len(), labels.len()),
            (Reason::ALL.len(), Reason::ALL.len())
        );
        assert!(!codes.contains(&0), "0 means success");
        for reason in Reason::ALL {
            assert_eq!(Reason::from_code(reason.code().into()), *reason);
            assert!((400..600).contains(&reason.http_status()));
        }
        assert_eq!(Reason::from_code(1 << 40), Reason::Unspecified);
    }

    #[test]
    fn servers_speak_of_sessions_to_each_other_and_agents_do_not() {
        for reason in [Reason::NoSession, Reason::SessionLost, Reason::Replaced] {
            assert!(reason.is_of_server() && !reason.is_of_agent(), "{reason}");
        }
        for reason in Reason::ALL {
            assert!(reason.is_of_server() || !reason.is_of_agent(), "{reason}");
        }
        for reason in [
            Reason::Cancelled,
            Reason::NotAllowed,
            Reason::Unauthenticated,
        ] {
            assert!(!reason.is_of_server(), "{reason}");
        }
    }

    #[test]
    fn every_reason_is_explained_in_the_docs() {
        let docs = include_str!("../../docs/errors.md");
        for reason in Reason::ALL {
            let row = format!(
                "| `{}` | {} | {} |",
                reason.label(),
                reason.code(),
                reason.http_status()
            );
            assert!(docs.contains(&row), "docs/errors.md lacks the row {row}");
        }
    }
}
