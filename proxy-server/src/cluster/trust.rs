//! Whom agents in pods trust: the roots of the authority in a ConfigMap that they mount, kept equal to the Secret.
//!
//! Every server that follows the Secret does this after each look at it. No election is needed: what is written follows from
//! what was just read, a change names the version that it changes, and who writes second finds nothing to do.
//!
//! | the ConfigMap | what happens |
//! | --- | --- |
//! | is not there | created, with the roots under `ca.crt` |
//! | says something else, or who signs has changed | that key and the annotation are changed, and nothing else of it |
//! | says this | nothing |
//! | somebody else wrote in between | nothing: it is read again at the next look |
//!
//! A failure is told once until it is over. Agents that run are not concerned: a renewal brings them what they need.

use std::sync::Arc;

use certs::TrustBundle;
use http::Method;
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::{Value, json};

use super::ask::AskError;
use super::plan::{Plan, TooLarge, Wanted, plan};
use super::questions::Questions;
use crate::config::ObjectName;

/// The key of the roots, as that of a ServiceAccount's volume is called.
const KEY: &str = "ca.crt";
/// Which authority signs.
pub(super) const PIN: &str = "corvid.io/ca-pin";

/// Why the ConfigMap is not as it should be.
#[derive(Debug, thiserror::Error)]
#[error("keep whom agents trust in ConfigMap {map}")]
pub(crate) struct TrustError {
    map: ObjectName,
    source: Cause,
}

#[derive(Debug, thiserror::Error)]
enum Cause {
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("{0} bytes are more than it holds")]
    TooLarge(usize),
}

/// The ConfigMap.
#[derive(Debug)]
pub(super) struct TrustMap {
    questions: Arc<Questions>,
    map: ObjectName,
}

impl TrustMap {
    pub(super) const fn new(questions: Arc<Questions>, map: ObjectName) -> Self {
        Self { questions, map }
    }

    /// Brings it in line with `bundle`, in which the authority called `pin` signs.
    pub(super) async fn publish(&self, bundle: &TrustBundle, pin: &str) -> Result<(), TrustError> {
        let done = self.try_publish(bundle, pin).await;
        done.map_err(|source| TrustError {
            map: self.map.clone(),
            source,
        })
    }

    async fn try_publish(&self, bundle: &TrustBundle, pin: &str) -> Result<(), Cause> {
        let all = format!("/api/v1/namespaces/{}/configmaps", self.map.namespace);
        let path = format!("{all}/{}", self.map.name);
        let found: Option<ConfigMap> = match self.questions.get(&path).await {
            Ok(found) => Some(found),
            Err(AskError::Missing(_)) => None,
            Err(error) => return Err(error.into()),
        };
        let wanted = Wanted {
            map: &self.map,
            key: KEY,
            text: &bundle.to_pem(),
            annotation: (PIN, pin),
        };
        let plan =
            plan(found.as_ref(), wanted).map_err(|TooLarge(bytes)| Cause::TooLarge(bytes))?;
        let written: Result<Value, _> = match plan {
            Plan::Keep => return Ok(()),
            Plan::Create(map) => self.questions.send(Method::POST, &all, &json!(map)).await,
            Plan::Change(change) => self.questions.send(Method::PATCH, &path, &change).await,
        };
        match written {
            Ok(_object) => {
                tracing::info!(map = %self.map, pin, roots = bundle.roots().len(), "whom agents trust was written");
                Ok(())
            }
            Err(AskError::Conflict) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
