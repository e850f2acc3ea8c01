//! Who knows the nodes, if anybody does: a cluster, of which this crate knows nothing.

use std::fmt;
use std::pin::Pin;

use crate::identity::Name;
use crate::node_uid::NodeUid;

/// An answer that has to be asked for elsewhere.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Knows the nodes that certificates are issued for. Bounds its answers in time itself.
pub trait Vouch: fmt::Debug + Send + Sync + 'static {
    /// Whether it is certain that there is no node of that name and uid any more. Whoever can't tell says no.
    fn is_gone<'a>(&'a self, name: &'a Name, uid: &'a NodeUid) -> Answer<'a, bool>;
}
