//! Objects that are read and written one by one: Leases, ConfigMaps, Services, Pods. Versions are kept as kube-apiserver does it:
//! a write that names another than the present one is a conflict.

use std::sync::Arc;

use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::tokens::REVIEWS;
use super::{Api, Body, Mood, State, status, whole};

impl Api {
    /// The object at that path, as in `/api/v1/namespaces/a/configmaps/b`.
    pub(crate) fn object(&self, path: &str) -> Option<Value> {
        self.state.lock().objects.get(path).cloned()
    }

    /// Writes an object past everybody.
    pub(crate) fn put_object(&self, path: &str, object: Value) {
        self.state.lock().store(path, object);
    }

    /// Deletes an object.
    pub(crate) fn delete_object(&self, path: &str) {
        assert!(self.state.lock().objects.remove(path).is_some());
    }
}

impl State {
    fn store(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.objects.insert(path.to_owned(), object.clone());
        object
    }
}

pub(super) async fn answer(
    state: &Arc<Mutex<State>>,
    request: Request<Incoming>,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let path = parts.uri.path();
    let mut state = state.lock();
    state.seen.push(match parts.method {
        _ if path == REVIEWS => "tokenreview",
        Method::GET => "get",
        Method::POST => "create",
        _ => "write",
    });
    if let Mood::Status(code) = state.mood {
        return status(code);
    }
    if path == REVIEWS {
        return whole(StatusCode::CREATED, &state.reviewed(body));
    }
    let held = state.objects.get(path).cloned();
    let same = |held: &Value| {
        let named = &body["metadata"]["resourceVersion"];
        named.is_null() || *named == held["metadata"]["resourceVersion"]
    };
    let stored = match (parts.method, held) {
        (Method::GET, Some(held)) => return whole(StatusCode::OK, &held),
        (Method::POST, _) => {
            let path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap());
            if state.objects.contains_key(&path) {
                return status(409);
            }
            state.store(&path, body)
        }
        (Method::GET | Method::PUT | Method::PATCH, None) => return status(404),
        (Method::PUT | Method::PATCH, Some(held)) if !same(&held) => return status(409),
        (Method::PUT, Some(_)) => state.store(path, body),
        (Method::PATCH, Some(mut held)) => {
            assert_eq!(
                parts.headers["content-type"],
                "application/merge-patch+json"
            );
            merge(&mut held, &body);
            state.store(path, held)
        }
        (_, _) => return status(405),
    };
    whole(StatusCode::OK, &stored)
}

/// RFC 7396.
fn merge(into: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    let into = into.as_object_mut().unwrap();
    for (key, value) in patch {
        if value.is_null() {
            into.remove(key);
        } else {
            merge(into.entry(key).or_insert(Value::Null), value);
        }
    }
}
