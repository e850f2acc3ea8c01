//! One request to kube-apiserver beside the watch of nodes: bounded in time, its failure named.

use std::fmt;
use std::time::Duration;

use kube::client::Client;
use tokio::time::{Instant, timeout_at};

use super::client::{ClientError, Source};

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// Somebody else has changed the object since it was read, or made it first.
    #[error("somebody else has changed it at the same time")]
    Conflict,
    /// The object, or the namespace it is to be in, does not exist.
    #[error("{0}")]
    Missing(String),
    /// kube-apiserver does not want it: rights, or the object itself.
    #[error("{message} ({code})")]
    Refused {
        /// HTTP status.
        code: u16,
        /// Its words.
        message: String,
    },
    /// It has no answer now.
    #[error("kube-apiserver: {message} ({code})")]
    Unavailable {
        /// HTTP status.
        code: u16,
        /// Its words.
        message: String,
    },
    /// There was no answer in time.
    #[error("kube-apiserver did not answer in time")]
    Late,
    /// It can't be reached, or what it says can't be read.
    #[error("ask kube-apiserver")]
    Unreachable(#[source] kube::Error),
    /// It says something else than what was asked for.
    #[error("kube-apiserver's answer can't be read")]
    Answer,
    /// There is no credential to ask with.
    #[error(transparent)]
    Client(#[from] ClientError),
}

impl AskError {
    /// Whether the same may be taken later.
    pub(super) fn is_of_the_moment(&self) -> bool {
        self.label() == "unavailable"
    }

    /// For metrics.
    pub(super) const fn label(&self) -> &'static str {
        match self {
            Self::Conflict => "conflict",
            Self::Missing(_) => "missing",
            Self::Refused { .. } => "refused",
            Self::Unavailable { .. }
            | Self::Late
            | Self::Unreachable(_)
            | Self::Answer
            | Self::Client(_) => "unavailable",
        }
    }
}

impl From<kube::Error> for AskError {
    fn from(error: kube::Error) -> Self {
        let kube::Error::Api(status) = error else {
            return Self::Unreachable(error);
        };
        let (code, message) = (status.code, status.message);
        match code {
            // In its own words: what stands between and knows nothing of it says 404 too.
            404 if status.reason == "NotFound" => Self::Missing(message),
            404 => Self::Unavailable { code, message },
            409 => Self::Conflict,
            // 408 and 429 are about the moment, not about what was asked.
            400..=407 | 410..=428 | 430..=499 => Self::Refused { code, message },
            _ => Self::Unavailable { code, message },
        }
    }
}

/// Asks, with a client that is made anew after each failure: the credential may have been renewed, or the connection
/// may be dead.
pub(super) struct Asker {
    source: Source,
    client: Option<Client>,
}

impl fmt::Debug for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Asker")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl Asker {
    pub(super) const fn new(source: Source) -> Self {
        Self {
            source,
            client: None,
        }
    }

    pub(super) async fn client(&mut self) -> Result<Client, AskError> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        let client = self.source.connect_apart().await?;
        self.client = Some(client.clone());
        Ok(client)
    }

    /// What was asked has failed like this.
    pub(super) fn failed(&mut self, error: &AskError) {
        if !matches!(error, AskError::Conflict | AskError::Missing(_)) {
            self.client = None;
        }
    }
}

/// The answer, if it comes within `limit` and before `until`.
pub(super) async fn within<T>(
    limit: Duration,
    until: Option<Instant>,
    asked: impl Future<Output = kube::Result<T>>,
) -> Result<T, AskError> {
    let limit = Instant::now() + limit;
    let until = until.map_or(limit, |until| until.min(limit));
    match timeout_at(until, asked).await {
        Ok(answer) => Ok(answer?),
        Err(_elapsed) => Err(AskError::Late),
    }
}
