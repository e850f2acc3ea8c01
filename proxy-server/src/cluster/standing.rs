//! Whether the Node that a certificate was issued for is still there, by name and uid.
//!
//! | what is known | verdict |
//! | --- | --- |
//! | the snapshot has it | there |
//! | nodes were never read as a whole | unknown |
//! | the snapshot lacks it, kube-apiserver says at this moment that it has it | there: our watch is behind |
//! | the snapshot lacks it, and so does kube-apiserver | gone |
//! | the snapshot lacks it, kube-apiserver does not answer | unknown |
//!
//! Only *gone* has consequences: the agent is refused, its sessions are closed, its certificate is not renewed. So
//! nothing is ever closed because of a list that failed or is not complete, a watch that is behind the server that
//! has issued the certificate, or a kube-apiserver that is away.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use certs::NodeUid;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ListMeta, ObjectMeta};
use proto::Reason;
use proto::transport::Session;
use serde::Deserialize;
use tokio::time::sleep;

use super::Cluster;
use super::ask::AskError;
use super::questions::Questions;
use crate::registry::Registry;

/// How often sessions are looked at when no node has changed: for those that came up while kube-apiserver was away.
const LOOK: Duration = Duration::from_secs(30);

/// Knows which nodes there are.
#[derive(Debug)]
pub(crate) struct Standing {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) questions: Arc<Questions>,
}

/// Where the node of a certificate stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    There,
    Gone,
    Unknown,
}

/// What is read of a list of nodes.
#[derive(Deserialize)]
struct NodeList {
    kind: String,
    metadata: ListMeta,
    items: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    metadata: ObjectMeta,
}

impl Standing {
    /// Where the node stands.
    pub(crate) async fn verdict(&self, name: &str, uid: &NodeUid) -> Verdict {
        let known = self.known(name, uid);
        if known == Verdict::There || self.cluster.is_waiting() {
            return known;
        }
        match self.uid(name).await {
            Ok(Some(found)) if found == uid.as_str() => Verdict::There,
            Ok(_other_or_none) => Verdict::Gone,
            Err(error) => {
                tracing::debug!(node = name, error = %daemon::chain(&error), "can't ask for a node");
                Verdict::Unknown
            }
        }
    }

    /// Where the node stands as far as is known here: there, or unknown.
    pub(crate) fn known(&self, name: &str, uid: &NodeUid) -> Verdict {
        if self.cluster.has(name, uid.as_str()) {
            Verdict::There
        } else {
            Verdict::Unknown
        }
    }

    /// The uid that the node has now; `None` if there is none of that name. As a list, for which the rights to follow
    /// all nodes are enough.
    pub(crate) async fn uid(&self, name: &str) -> Result<Option<String>, AskError> {
        let path = format!("/api/v1/nodes?fieldSelector=metadata.name%3D{name}");
        let list: NodeList = self.questions.get(&path).await?;
        // Not the answer of something between that knows nothing of nodes.
        if list.kind != "NodeList" || list.metadata.resource_version.is_none() {
            return Err(AskError::Answer);
        }
        let mut named = list
            .items
            .into_iter()
            .filter(|node| node.metadata.name.as_deref() == Some(name));
        Ok(named.next().and_then(|node| node.metadata.uid))
    }

    /// Closes the sessions of agents whose nodes are gone, for ever.
    pub(crate) async fn close_gone<S: Session>(
        self: Arc<Self>,
        registry: Registry<S>,
    ) -> Infallible {
        let mut changes = self.cluster.changes();
        loop {
            tokio::select! {
                // The sender lives in `self`.
                _ = changes.changed() => {}
                () = sleep(LOOK) => {}
            }
            changes.borrow_and_update();
            for session in registry.all() {
                let Some(uid) = &session.node_uid else {
                    continue;
                };
                match self.verdict(session.agent.as_str(), uid).await {
                    Verdict::There => {}
                    Verdict::Gone => {
                        tracing::info!(target: "audit", agent = %session.agent, session = %session.id, node_uid = %uid, "session of a deleted node ended");
                        session.transport.close(Reason::NodeGone);
                    }
                    // The next one would have to wait as long for no answer.
                    Verdict::Unknown => break,
                }
            }
        }
    }
}
