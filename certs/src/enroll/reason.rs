//! Why the server refuses: the closed list behind the metadata key `corvid-reason`. Clients classify by
//! it, never by a message.

use std::time::Duration;

use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

const REASON: &str = "corvid-reason";
const RETRY_AFTER: &str = "corvid-retry-after";

/// A refusal, as both sides know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    BadRequest,
    ClusterUnavailable,
    NameNotAllowed,
    NoCertificate,
    NodeGone,
    NoServiceAccounts,
    NotRunning,
    OtherAccount,
    OtherNode,
    RateLimited { after: Duration },
    Revoked,
    ServiceAccountRefused,
    TokenExpired,
    TokenUsedUp,
    Unavailable,
    WrongToken,
}

impl Refusal {
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::ClusterUnavailable => "cluster_unavailable",
            Self::NameNotAllowed => "name_not_allowed",
            Self::NoCertificate => "no_certificate",
            Self::NodeGone => "node_gone",
            Self::NoServiceAccounts => "no_service_accounts",
            Self::NotRunning => "not_running",
            Self::OtherAccount => "other_account",
            Self::OtherNode => "other_node",
            Self::RateLimited { .. } => "rate_limited",
            Self::Revoked => "revoked",
            Self::ServiceAccountRefused => "service_account_refused",
            Self::TokenExpired => "token_expired",
            Self::TokenUsedUp => "token_used_up",
            Self::Unavailable => "unavailable",
            Self::WrongToken => "wrong_token",
        }
    }

    const fn code_and_message(self) -> (Code, &'static str) {
        match self {
            Self::BadRequest => (Code::InvalidArgument, "the request is malformed"),
            Self::ClusterUnavailable => (Code::Unavailable, "the cluster does not answer"),
            Self::NameNotAllowed => (
                Code::PermissionDenied,
                "the join token is not for this name",
            ),
            Self::NoCertificate => (
                Code::Unauthenticated,
                "renewal needs the present certificate",
            ),
            Self::NodeGone => (
                Code::PermissionDenied,
                "the certificate's node is no longer in the cluster",
            ),
            Self::NoServiceAccounts => (
                Code::FailedPrecondition,
                "ServiceAccount tokens are not taken here",
            ),
            Self::NotRunning => (
                Code::PermissionDenied,
                "the token's pod does not run, or not where the token says",
            ),
            Self::OtherAccount => (
                Code::PermissionDenied,
                "the token is of another ServiceAccount",
            ),
            Self::OtherNode => (
                Code::PermissionDenied,
                "the token is of a pod on another node",
            ),
            Self::RateLimited { .. } => (Code::ResourceExhausted, "too many requests"),
            Self::Revoked => (Code::PermissionDenied, "the agent is revoked"),
            Self::ServiceAccountRefused => (
                Code::Unauthenticated,
                "the cluster does not accept the ServiceAccount token",
            ),
            Self::TokenExpired => (Code::PermissionDenied, "the join token has expired"),
            Self::TokenUsedUp => (Code::PermissionDenied, "the join token is used up"),
            Self::Unavailable => (Code::Unavailable, "the server cannot certify now"),
            Self::WrongToken => (Code::Unauthenticated, "the join token is wrong"),
        }
    }

    /// The refusal of a status; `None` if it didn't come from our service.
    pub(super) fn of(status: &Status) -> Option<Self> {
        let all = [
            Self::BadRequest,
            Self::ClusterUnavailable,
            Self::NameNotAllowed,
            Self::NoCertificate,
            Self::NodeGone,
            Self::NoServiceAccounts,
            Self::NotRunning,
            Self::OtherAccount,
            Self::OtherNode,
            Self::RateLimited {
                after: retry_after(status.metadata()),
            },
            Self::Revoked,
            Self::ServiceAccountRefused,
            Self::TokenExpired,
            Self::TokenUsedUp,
            Self::Unavailable,
            Self::WrongToken,
        ];
        let label = status.metadata().get(REASON)?.to_str().ok()?;
        all.into_iter().find(|refusal| refusal.label() == label)
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let (code, message) = refusal.code_and_message();
        let mut metadata = MetadataMap::new();
        metadata.insert(REASON, MetadataValue::from_static(refusal.label()));
        if let Refusal::RateLimited { after } = refusal {
            metadata.insert(RETRY_AFTER, MetadataValue::from(whole_seconds(after)));
        }
        Self::with_metadata(code, message, metadata)
    }
}

/// Rounded up: who waits that long is not told to wait again.
fn whole_seconds(after: Duration) -> u64 {
    after.as_secs() + u64::from(after.subsec_nanos() > 0)
}

fn retry_after(metadata: &MetadataMap) -> Duration {
    let seconds = metadata
        .get(RETRY_AFTER)
        .and_then(|text| text.to_str().ok()?.parse().ok());
    Duration::from_secs(seconds.unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_survives_the_way_through_a_status() {
        let after = Duration::from_secs(7);
        for refusal in [
            Refusal::BadRequest,
            Refusal::ClusterUnavailable,
            Refusal::NameNotAllowed,
            Refusal::NoCertificate,
            Refusal::NodeGone,
            Refusal::NoServiceAccounts,
            Refusal::NotRunning,
            Refusal::OtherAccount,
            Refusal::OtherNode,
            Refusal::RateLimited { after },
            Refusal::Revoked,
            Refusal::ServiceAccountRefused,
            Refusal::TokenExpired,
            Refusal::TokenUsedUp,
            Refusal::Unavailable,
            Refusal::WrongToken,
        ] {
            assert_eq!(Refusal::of(&Status::from(refusal)), Some(refusal));
        }
        assert_eq!(Refusal::of(&Status::internal("revoked")), None);
    }
}
