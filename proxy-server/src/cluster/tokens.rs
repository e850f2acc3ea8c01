//! Which Node a ServiceAccount token is of: kube-apiserver checks the token (TokenReview), and what it then says of the
//! token is held against the pod that it names and the Node on which that pod is.
//!
//! | step | refused as |
//! | --- | --- |
//! | `kubernetes.enrol` is not set | not taken |
//! | TokenReview: authenticated, for our audience | refused |
//! | user is `system:serviceaccount:NAMESPACE:NAME` of the configuration | other account |
//! | bound to a pod; that pod is there, with that uid, of that account, not ended nor being deleted | not running |
//! | the pod is on the node that the token names (tokens of clusters before 1.30 name none) | not running |
//! | the Node is there, with the uid that the token names; else with the one it has now | node gone |
//! | kube-apiserver does not answer in time, or not to the point; rights are missing | unavailable |
//!
//! Nothing of a token is believed that kube-apiserver has not said; nothing is kept, so a token is worth at each server
//! and each moment what the cluster says then. A token may be shown again: it only ever gives its own Node's certificate.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use certs::{Answer, Name, NodeUid, NotVouched, ServiceAccountToken, Vouch, Vouched, WhyNot};
use http::Method;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::json;
use tokio::time::timeout;

use super::ask::AskError;
use super::standing::{Standing, Verdict};
use crate::config::Enrol;

/// For all questions about one token together: agents wait 15 s for an answer.
const LIMIT: Duration = Duration::from_secs(9);
/// Characters of what kube-apiserver says that stand in the audit.
const MOST_WORDS: usize = 200;

const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";

/// Knows whose tokens are whose.
#[derive(Debug)]
pub(crate) struct Tokens {
    pub(crate) standing: Arc<Standing>,
    /// Which account enrols; `None` takes no tokens.
    pub(crate) enrol: Option<Enrol>,
}

#[derive(Debug, Deserialize)]
struct Review {
    kind: String,
    #[serde(default)]
    status: ReviewStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ReviewStatus {
    authenticated: bool,
    user: User,
    audiences: Vec<String>,
    error: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct User {
    username: String,
    extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// What the authenticator says of the token; more than one value is none.
    fn says(&self, key: &str) -> Option<&str> {
        let key = format!("authentication.kubernetes.io/{key}");
        match self.extra.get(&key)?.as_slice() {
            [one] => Some(one),
            [] | [_, _, ..] => None,
        }
    }
}

/// What kube-apiserver says of a token.
#[derive(Debug, PartialEq, Eq)]
struct Claims {
    pod: Name,
    pod_uid: String,
    node: Option<String>,
    node_uid: Option<NodeUid>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Pod {
    kind: String,
    metadata: ObjectMeta,
    spec: PodSpec,
    status: PodStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PodSpec {
    node_name: String,
    service_account_name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PodStatus {
    phase: String,
}

/// Reads the review's verdict.
fn claims(status: &ReviewStatus, enrol: &Enrol) -> Result<Claims, NotVouched> {
    if !status.authenticated {
        let said = if status.error.is_empty() {
            "not authenticated"
        } else {
            &status.error
        };
        return Err(WhyNot::Refused.because(words(said)));
    }
    // Empty: kube-apiserver knows of no audiences, and the token may be meant for anybody.
    if !status.audiences.contains(&enrol.audience) {
        return Err(WhyNot::Refused.because("for another audience"));
    }
    let account = format!(
        "system:serviceaccount:{}:{}",
        enrol.namespace, enrol.service_account
    );
    if status.user.username != account {
        return Err(WhyNot::OtherAccount.because(words(&status.user.username)));
    }
    let pod = status.user.says("pod-name");
    let pod = pod.and_then(|pod| Name::parse(pod).ok());
    let (Some(pod), Some(pod_uid)) = (pod, status.user.says("pod-uid")) else {
        return Err(WhyNot::NotRunning.because("the token is bound to no pod"));
    };
    let node_uid = match status.user.says("node-uid").map(str::parse) {
        None => None,
        Some(Ok(uid)) => Some(uid),
        Some(Err(_no_uid)) => return Err(WhyNot::NodeGone.because("its node's uid is none")),
    };
    Ok(Claims {
        pod,
        pod_uid: pod_uid.to_owned(),
        node: status.user.says("node-name").map(str::to_owned),
        node_uid,
    })
}

/// The node on which the pod that was found is, if it is the one that the token was given to.
fn node_of(pod: &Pod, claims: &Claims, enrol: &Enrol) -> Result<Name, NotVouched> {
    let refused = |detail: &str| Err(WhyNot::NotRunning.because(detail));
    if pod.metadata.uid.as_deref() != Some(&claims.pod_uid) {
        return refused("another pod has the name of the token's");
    }
    if pod.metadata.deletion_timestamp.is_some() {
        return refused("the token's pod is being deleted");
    }
    if matches!(pod.status.phase.as_str(), "Succeeded" | "Failed") {
        return refused("the token's pod has ended");
    }
    if pod.spec.service_account_name != enrol.service_account {
        return refused("the token's pod is of another ServiceAccount");
    }
    if claims
        .node
        .as_ref()
        .is_some_and(|node| *node != pod.spec.node_name)
    {
        return refused("the token's pod is on another node than the token says");
    }
    match Name::parse(&pod.spec.node_name) {
        Ok(node) => Ok(node),
        Err(_none) => refused("the token's pod is on no node"),
    }
}

impl Pod {
    fn is_one(&self) -> bool {
        self.kind == "Pod"
    }
}

/// What somebody else says, fit for a log.
fn words(said: &str) -> String {
    let printable = |c: char| if c.is_ascii_graphic() { c } else { ' ' };
    said.chars().take(MOST_WORDS).map(printable).collect()
}

/// kube-apiserver has not said what was to be known.
fn unanswered(what: &'static str) -> impl Fn(AskError) -> NotVouched {
    move |error| {
        // 403 is missing rights, and those don't come back by themselves.
        if matches!(error, AskError::Refused { code: 403, .. }) {
            tracing::error!(what, error = %daemon::chain(&error), "may not ask about a ServiceAccount token: see deploy/rbac");
        }
        WhyNot::Unavailable.because(words(&format!("{what}: {}", daemon::chain(&error))))
    }
}

impl Tokens {
    async fn judge(&self, token: &ServiceAccountToken) -> Result<Vouched, NotVouched> {
        let Some(enrol) = &self.enrol else {
            return Err(WhyNot::NotTaken.because("kubernetes.enrol is not set"));
        };
        let questions = &self.standing.questions;
        let review = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
            "spec": {"token": token.expose(), "audiences": [enrol.audience]},
        });
        let review = questions.send(Method::POST, REVIEWS, &review).await;
        let review: Review = review.map_err(unanswered("TokenReview"))?;
        // Not the answer of something between that knows nothing of it.
        if review.kind != "TokenReview" {
            return Err(unanswered("TokenReview")(AskError::Answer));
        }
        let claims = claims(&review.status, enrol)?;

        let Enrol { namespace, .. } = enrol;
        let path = format!("/api/v1/namespaces/{namespace}/pods/{}", claims.pod);
        let pod: Pod = match questions.get(&path).await {
            Ok(pod) if Pod::is_one(&pod) => pod,
            Ok(_other) => return Err(unanswered("the token's pod")(AskError::Answer)),
            Err(AskError::Missing(_)) => {
                return Err(WhyNot::NotRunning.because("the token's pod is gone"));
            }
            Err(error) => return Err(unanswered("the token's pod")(error)),
        };
        let node = node_of(&pod, &claims, enrol)?;
        let node_uid = self.node_uid(&node, claims.node_uid).await?;
        Ok(Vouched {
            name: node,
            node_uid,
            workload: format!("pod {namespace}/{} {}", claims.pod, claims.pod_uid),
        })
    }

    /// The uid of the node, which is the one that the token names, if it names one.
    async fn node_uid(&self, node: &Name, named: Option<NodeUid>) -> Result<NodeUid, NotVouched> {
        if let Some(uid) = &named
            && self.standing.known(node.as_str(), uid) == Verdict::There
        {
            return Ok(uid.clone());
        }
        let found = self.standing.uid(node.as_str()).await;
        let found = found.map_err(unanswered("the token's node"))?;
        let found = found.and_then(|uid| uid.parse::<NodeUid>().ok());
        match (found, named) {
            (None, _) => Err(WhyNot::NodeGone.because("there is no such node")),
            (Some(found), Some(named)) if found != named => {
                Err(WhyNot::NodeGone.because("the node has joined again since"))
            }
            (Some(found), _) => Ok(found),
        }
    }
}

impl Vouch for Tokens {
    fn vouch<'a>(
        &'a self,
        token: &'a ServiceAccountToken,
    ) -> Answer<'a, Result<Vouched, NotVouched>> {
        Box::pin(async move {
            match timeout(LIMIT, self.judge(token)).await {
                Ok(judged) => judged,
                Err(_elapsed) => Err(WhyNot::Unavailable.because("no answer in time")),
            }
        })
    }

    fn is_gone<'a>(&'a self, name: &'a Name, uid: &'a NodeUid) -> Answer<'a, bool> {
        Box::pin(async move { self.standing.verdict(name.as_str(), uid).await == Verdict::Gone })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "6f1c5b0e-9d1f-4c5e-8a55-0123456789ab";

    /// What kube-apiserver 1.36 answers.
    fn status() -> serde_json::Value {
        json!({
            "authenticated": true,
            "audiences": ["corvid"],
            "user": {
                "username": "system:serviceaccount:corvid:edge-agent",
                "uid": "x", "groups": ["system:serviceaccounts"],
                "extra": {
                    "authentication.kubernetes.io/credential-id": ["JTI=1"],
                    "authentication.kubernetes.io/node-name": ["edge1"],
                    "authentication.kubernetes.io/node-uid": [UID],
                    "authentication.kubernetes.io/pod-name": ["edge-agent-x7x"],
                    "authentication.kubernetes.io/pod-uid": ["pod-uid"],
                },
            },
        })
    }

    fn pod() -> serde_json::Value {
        json!({
            "metadata": {"name": "edge-agent-x7x", "namespace": "corvid", "uid": "pod-uid"},
            "spec": {"nodeName": "edge1", "serviceAccountName": "edge-agent", "containers": []},
            "status": {"phase": "Running"},
        })
    }

    /// A value with one place changed.
    fn with(mut value: serde_json::Value, at: &str, new: serde_json::Value) -> serde_json::Value {
        let (parent, key) = at.rsplit_once('|').unwrap();
        let parent = parent
            .split('|')
            .filter(|key| !key.is_empty())
            .fold(&mut value, |value, key| &mut value[key]);
        parent[key] = new;
        value
    }

    fn read(status: serde_json::Value) -> Result<Claims, WhyNot> {
        let parsed = serde_json::from_value::<ReviewStatus>(status);
        let status = parsed.map_err(|_malformed| WhyNot::NotTaken)?;
        claims(&status, &Enrol::default()).map_err(|error| error.why)
    }

    #[test]
    fn of_a_token_is_believed_what_the_apiserver_says_and_no_half_of_it() {
        let good = read(status()).unwrap();
        assert_eq!(good.pod.as_str(), "edge-agent-x7x");
        assert_eq!(good.node.as_deref(), Some("edge1"));
        assert_eq!(good.node_uid, Some(UID.parse().unwrap()));
        let extra = |key: &str| format!("|user|extra|authentication.kubernetes.io/{key}");
        for (at, new, wanted) in [
            ("|authenticated".to_owned(), json!(false), WhyNot::Refused),
            ("|audiences".to_owned(), json!([]), WhyNot::Refused),
            (
                "|audiences".to_owned(),
                json!(["https://kubernetes.default.svc"]),
                WhyNot::Refused,
            ),
            (
                "|user|username".to_owned(),
                json!("system:serviceaccount:shop:edge-agent"),
                WhyNot::OtherAccount,
            ),
            (
                "|user|username".to_owned(),
                json!("system:serviceaccount:corvid:default"),
                WhyNot::OtherAccount,
            ),
            ("|user|username".to_owned(), json!(""), WhyNot::OtherAccount),
            (extra("pod-name"), json!([]), WhyNot::NotRunning),
            (extra("pod-name"), json!(["a", "b"]), WhyNot::NotRunning),
            (
                extra("pod-name"),
                json!(["../../secrets/x"]),
                WhyNot::NotRunning,
            ),
            (extra("pod-uid"), json!([]), WhyNot::NotRunning),
            (extra("node-uid"), json!(["7"]), WhyNot::NodeGone),
        ] {
            let refused = read(with(status(), &at, new.clone()));
            assert_eq!(refused, Err(wanted), "{at}: {new}");
        }
        // Before 1.30 nodes are not named.
        let old = with(status(), &extra("node-uid"), json!([]));
        let old = read(with(old, &extra("node-name"), json!([]))).unwrap();
        assert_eq!((old.node, old.node_uid), (None, None));
        assert_eq!(read(json!({})), Err(WhyNot::Refused));
    }

    #[test]
    fn the_pod_is_the_one_that_was_given_the_token_and_says_the_node() {
        let claims = read(status()).unwrap();
        let node = |pod| {
            let pod: Pod = serde_json::from_value(pod).unwrap();
            node_of(&pod, &claims, &Enrol::default()).map_err(|error| error.why)
        };
        assert_eq!(node(pod()).unwrap().as_str(), "edge1");
        for (at, new) in [
            ("|metadata|uid", json!("another")),
            ("|metadata|uid", json!(null)),
            ("|metadata|deletionTimestamp", json!("2026-01-01T00:00:00Z")),
            ("|status|phase", json!("Failed")),
            ("|status|phase", json!("Succeeded")),
            ("|spec|serviceAccountName", json!("default")),
            ("|spec|nodeName", json!("edge2")),
            ("|spec|nodeName", json!("")),
        ] {
            let refused = node(with(pod(), at, new.clone()));
            assert_eq!(refused, Err(WhyNot::NotRunning), "{at}: {new}");
        }
        assert_eq!(node(json!({})), Err(WhyNot::NotRunning));
    }

    #[test]
    fn what_others_say_is_one_short_printable_line() {
        let said = words(&format!("a\nb\u{e9}\x1b[0m{}", "x".repeat(1000)));
        assert_eq!(said.len(), MOST_WORDS);
        assert!(said.starts_with("a b  [0mxxx"), "{said}");
    }
}
