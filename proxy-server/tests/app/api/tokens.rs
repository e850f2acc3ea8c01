//! Pods, their projected tokens, and what kube-apiserver says of such a token.

use std::collections::BTreeMap;
use std::sync::Arc;

use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{Api, Body, Mood, State, status, whole};

/// What kube-apiserver would say of a token that it has issued.
#[derive(Debug, Clone)]
pub(crate) struct Issued {
    pub(crate) audiences: Vec<String>,
    pub(crate) username: String,
    pub(crate) extra: BTreeMap<String, Value>,
    /// Key and uid of what it is bound to: gone, so is the token.
    pub(crate) bound: Option<(String, String)>,
}

pub(crate) const NODE_UID: &str = "authentication.kubernetes.io/node-uid";
pub(crate) const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
pub(super) const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";

impl Api {
    /// A pod of the agents' DaemonSet on that node, as the scheduler leaves it. Returns `NAMESPACE/NAME`.
    pub(crate) fn pod(&self, name: &str, uid: &str, node: &str) -> String {
        let path = format!("corvid/{name}");
        self.set(
            "pods",
            &path,
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": "corvid", "uid": uid},
                "spec": {"nodeName": node, "serviceAccountName": "edge-agent", "containers": [{"name": "edge-agent"}]},
                "status": {"phase": "Running"},
            }),
        );
        path
    }

    /// The projected token of that pod for our audience, as the kubelet asks for it.
    pub(crate) fn token_of(&self, pod: &str) -> String {
        self.token(self.issued_for(pod))
    }

    /// What kube-apiserver 1.36 says of such a token.
    pub(crate) fn issued_for(&self, path: &str) -> Issued {
        let state = self.state.lock();
        let key = format!("pods {path}");
        let pod = &state.objects[&key];
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let (name, uid) = (
            text(&pod["metadata"]["name"]),
            text(&pod["metadata"]["uid"]),
        );
        let node = text(&pod["spec"]["nodeName"]);
        let node_uid = state.nodes.items[&node]["metadata"]["uid"].clone();
        let of_pod = |key: &str| format!("authentication.kubernetes.io/pod-{key}");
        Issued {
            audiences: vec!["corvid".to_owned()],
            username: "system:serviceaccount:corvid:edge-agent".to_owned(),
            extra: BTreeMap::from([
                (of_pod("name"), json!([name])),
                (of_pod("uid"), json!([uid])),
                (NODE_NAME.to_owned(), json!([node])),
                (NODE_UID.to_owned(), json!([node_uid])),
            ]),
            bound: Some((key, uid)),
        }
    }

    /// A new token that means that.
    pub(crate) fn token(&self, issued: Issued) -> String {
        let mut state = self.state.lock();
        let token = format!("eyJhbGciOiJSUzI1NiJ9.{}.c2ln", state.tokens.len());
        state.tokens.insert(token.clone(), issued);
        token
    }

    /// Changes a pod.
    pub(crate) fn change(&self, path: &str, change: impl FnOnce(&mut Value)) {
        let mut object = self.object("pods", path).unwrap();
        change(&mut object);
        self.set("pods", path, object);
    }
}

/// Answers a TokenReview.
pub(super) async fn answer(
    state: &Arc<Mutex<State>>,
    request: Request<Incoming>,
) -> Response<Body> {
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let mut state = state.lock();
    state.seen.push("tokenreview");
    if let Mood::Status(code) = state.mood {
        return status(code);
    }
    let review = serde_json::from_slice(&body).unwrap();
    whole(StatusCode::CREATED, &state.reviewed(review))
}

impl State {
    /// A TokenReview with its status.
    pub(super) fn reviewed(&self, mut review: Value) -> Value {
        review["status"] = self.status_of(&review["spec"]);
        review
    }

    fn status_of(&self, spec: &Value) -> Value {
        let wanted: Vec<&str> = spec["audiences"]
            .as_array()
            .unwrap()
            .iter()
            .map(|audience| audience.as_str().unwrap())
            .collect();
        let refused = |error: &str| json!({"authenticated": false, "user": {}, "error": error});
        let Some(issued) = self.tokens.get(spec["token"].as_str().unwrap()) else {
            return refused("invalid bearer token");
        };
        if let Some((path, uid)) = &issued.bound {
            let there = self.objects.get(path);
            if there.is_none_or(|object| object["metadata"]["uid"] != json!(uid)) {
                return refused("invalid bearer token, service account token has been invalidated");
            }
        }
        let mut common = issued.audiences.clone();
        common.retain(|audience| wanted.contains(&audience.as_str()));
        if common.is_empty() {
            return refused(
                "invalid bearer token, token audiences are invalid for the target audiences",
            );
        }
        json!({
            "authenticated": true, "audiences": common,
            "user": {"username": issued.username, "uid": "1", "groups": ["system:serviceaccounts", "system:authenticated"], "extra": issued.extra},
        })
    }
}
