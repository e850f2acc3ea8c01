//! Bounds the descriptors that streams take, so that enough are left for sessions, endpoints and files.

use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Kept for everything that is no stream: a socket a session, the endpoints and their connections, files while they
/// are read, what the runtime needs.
const SPARE: usize = 64;
/// More streams than this are never wanted; the semaphore has a limit of its own.
const MOST: usize = 1 << 20;

/// Places for streams, one a descriptor.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    places: Arc<Semaphore>,
    most: usize,
}

/// A stream's descriptor.
pub(crate) type FilePermit = OwnedSemaphorePermit;

impl Files {
    /// As many places as the process may open files, less the spare ones.
    pub(crate) fn of_process() -> Self {
        let soft = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _hard)| soft);
        Self::new(usize::try_from(soft).unwrap_or(MOST))
    }

    fn new(limit: usize) -> Self {
        let most = limit.saturating_sub(SPARE).min(MOST);
        Self {
            places: Arc::new(Semaphore::new(most)),
            most,
        }
    }

    /// A place, if one is left.
    pub(crate) fn take(&self) -> Option<FilePermit> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }

    /// How many are taken.
    pub(crate) fn taken(&self) -> usize {
        self.most.saturating_sub(self.places.available_permits())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_descriptors_are_never_given_to_streams() {
        let files = Files::new(SPARE + 2);
        let (one, two) = (files.take(), files.take());
        assert!(one.is_some() && two.is_some() && files.take().is_none());
        assert_eq!(files.taken(), 2);
        drop(one);
        assert_eq!(files.taken(), 1);
        assert!(files.take().is_some());
        assert!(Files::new(SPARE / 2).take().is_none());
    }
}
