//! Questions to kube-apiserver that somebody waits for: many may be asked at once, and no more at a time than it should
//! cost. Each has a time limit and an answer of bounded size.
//!
//! What is read may be secret, so no answer is ever logged, not even one that can't be read.

use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, header};
use kube::client::Client;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::{Mutex, Semaphore};
use tokio::time::timeout;

use super::ask::AskError;
use super::client::{ClientError, Source};

/// For a question, waiting for its turn and a connection included. kube-apiserver answers such within milliseconds.
const LIMIT: Duration = Duration::from_secs(4);
/// Questions at a time: what a server may cost kube-apiserver, whoever knocks here.
const TURNS: usize = 16;

/// Asks. Shared by all who ask.
pub(crate) struct Questions {
    source: Source,
    client: Mutex<Option<Client>>,
    turns: Semaphore,
}

impl std::fmt::Debug for Questions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Questions")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl Questions {
    pub(crate) fn new(source: Source) -> Arc<Self> {
        Arc::new(Self {
            source,
            client: Mutex::default(),
            turns: Semaphore::new(TURNS),
        })
    }

    /// Asks for what is at `path`.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, AskError> {
        self.ask(Method::GET, path, Vec::new()).await
    }

    /// Sends `body` to `path`.
    pub(crate) async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &Value,
    ) -> Result<T, AskError> {
        self.ask(method, path, body.to_string().into_bytes()).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, AskError> {
        let asked = async {
            let _turn = self.turns.acquire().await;
            let content = if method == Method::PATCH {
                "application/merge-patch+json" // RFC 7396
            } else {
                "application/json"
            };
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header(header::ACCEPT, "application/json")
                .header(header::CONTENT_TYPE, content)
                .body(body)
                .map_err(|error| AskError::from(kube::Error::HttpError(error)))?;
            let client = self.client().await?;
            // As text: kube's own reading would log what it can't read.
            Ok(client.request_text(request).await?)
        };
        let answer = match timeout(LIMIT, asked).await {
            Ok(Ok(text)) => serde_json::from_str(&text).map_err(|_unread| AskError::Answer),
            Ok(Err(error)) => Err(error),
            Err(_elapsed) => Err(AskError::Late),
        };
        if let Err(error) = &answer
            && !matches!(error, AskError::Conflict | AskError::Missing(_))
        {
            // The credential may have been renewed, or the connection may be dead.
            *self.client.lock().await = None;
        }
        answer
    }

    async fn client(&self) -> Result<Client, ClientError> {
        let mut kept = self.client.lock().await;
        if let Some(client) = &*kept {
            return Ok(client.clone());
        }
        let client = self.source.connect_apart().await?;
        *kept = Some(client.clone());
        Ok(client)
    }
}
