//! Who knows the nodes, if anybody does: a cluster, of which this crate knows nothing.

use std::fmt;
use std::pin::Pin;

use crate::identity::Name;
use crate::node_uid::NodeUid;
use crate::service_token::ServiceAccountToken;

/// An answer that has to be asked for elsewhere.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Knows the nodes that certificates are issued for. Bounds its answers in time itself.
pub trait Vouch: fmt::Debug + Send + Sync + 'static {
    /// Whose token this is.
    fn vouch<'a>(
        &'a self,
        token: &'a ServiceAccountToken,
    ) -> Answer<'a, Result<Vouched, NotVouched>>;

    /// Whether it is certain that there is no node of that name and uid any more. Whoever can't tell says no.
    fn is_gone<'a>(&'a self, name: &'a Name, uid: &'a NodeUid) -> Answer<'a, bool>;
}

/// The one node that may be certified for a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vouched {
    /// Its name.
    pub name: Name,
    /// Which of that name.
    pub node_uid: NodeUid,
    /// Whose token it was, for the audit.
    pub workload: String,
}

/// Nobody vouches for a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotVouched {
    /// Which of the closed list.
    pub why: WhyNot,
    /// For the audit; no part of the token.
    pub detail: String,
}

/// Why nobody vouches for a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhyNot {
    /// Such tokens are not taken here.
    NotTaken,
    /// The cluster does not accept it: expired, for another audience, signed by somebody else, its workload deleted.
    Refused,
    /// It is of another account.
    OtherAccount,
    /// Its workload is none that runs on a node now, or not the one that the token says.
    NotRunning,
    /// The workload's node is not in the cluster any more.
    NodeGone,
    /// The cluster can't be asked.
    Unavailable,
}

impl WhyNot {
    /// With words for the audit.
    pub fn because(self, detail: impl Into<String>) -> NotVouched {
        NotVouched {
            why: self,
            detail: detail.into(),
        }
    }
}
