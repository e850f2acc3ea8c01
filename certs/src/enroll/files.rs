//! The agent's state directory: `agent.crt`, `agent.key`, `ca.crt`, `clock`.

use std::path::{Path, PathBuf};

use crate::bundle::{BundleError, TrustBundle};
use crate::credential::{Credential, CredentialError};
use crate::store::{self, StoreError};

/// Where an agent keeps what it was given.
#[derive(Debug, Clone)]
pub struct AgentFiles {
    dir: PathBuf,
}

/// What an agent keeps can't be read.
#[derive(Debug, thiserror::Error)]
pub enum AgentFilesError {
    /// Chain or key.
    #[error("load the agent's credential")]
    Credential(#[from] CredentialError),
    /// The roots.
    #[error("load the agent's trust bundle")]
    Bundle(#[from] BundleError),
    /// The directory.
    #[error("use the agent's state directory")]
    Store(#[from] StoreError),
}

impl AgentFiles {
    /// Files in `state_dir`.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: state_dir.into(),
        }
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The chain.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.dir.join("agent.crt")
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> PathBuf {
        self.dir.join("agent.key")
    }

    /// The roots.
    #[must_use]
    pub fn bundle(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// The last server time, for [`Clock::with_file`](crate::Clock::with_file).
    #[must_use]
    pub fn clock(&self) -> PathBuf {
        self.dir.join("clock")
    }

    /// What was kept; `None` if the agent is not enrolled yet.
    ///
    /// # Errors
    /// There is something, and it can't be read.
    pub fn load(&self) -> Result<Option<(Credential, TrustBundle)>, AgentFilesError> {
        if store::read_if_there(&self.certificate())?.is_none() {
            return Ok(None);
        }
        let credential = Credential::load(&self.certificate(), &self.key())?;
        let bundle = TrustBundle::load(&self.bundle())?;
        Ok(Some((credential, bundle)))
    }

    /// Keeps what was given. The roots first: new ones also vouch for servers that the old leaf meets.
    pub(super) fn save(
        &self,
        credential: &Credential,
        bundle: &TrustBundle,
    ) -> Result<(), StoreError> {
        bundle.save(&self.bundle())?;
        credential.save(&self.certificate(), &self.key())
    }
}
