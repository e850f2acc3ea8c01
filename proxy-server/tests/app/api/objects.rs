//! Leases, ConfigMaps, Services, Pods, Secrets and Events of the emulated API: read, create, replace and merge-patch by
//! resource version, as kube-apiserver does it, and what one way in to it may do to requests.

use std::collections::BTreeMap;
use std::sync::Arc;

use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::{Api, Body, State, whole};

/// The largest sum of values of a ConfigMap.
const MOST: usize = 1 << 20;

/// A write that came.
#[derive(Debug, Clone)]
pub(crate) struct Write {
    /// By which door.
    pub(crate) door: usize,
    /// As `PATCH configmaps`.
    pub(crate) what: String,
    /// How it was answered.
    pub(crate) code: u16,
    pub(crate) body: Value,
}

/// What one way in does to requests, by `VERB resource` or a part of it.
pub(crate) struct Door {
    number: usize,
    refused: Mutex<Vec<(&'static str, u16)>>,
    held: watch::Sender<Option<&'static str>>,
    waiting: watch::Sender<usize>,
    /// What is held arrives, also when its sender has gone.
    late: Mutex<JoinSet<()>>,
}

impl Door {
    pub(crate) fn new(number: usize) -> Self {
        Self {
            number,
            refused: Mutex::default(),
            held: watch::Sender::new(None),
            waiting: watch::Sender::new(0),
            late: Mutex::default(),
        }
    }
}

/// Objects by `RESOURCE NAMESPACE/NAME`.
pub(crate) type Objects = BTreeMap<String, Value>;

impl Api {
    /// An object as it is now, as in `("leases", "corvid/corvid-proxy-server")`.
    pub(crate) fn object(&self, resource: &str, name: &str) -> Option<Value> {
        let state = self.state.lock();
        state.objects.get(&format!("{resource} {name}")).cloned()
    }

    /// Somebody else changes or makes an object.
    pub(crate) fn set(&self, resource: &str, name: &str, mut object: Value) {
        let mut state = self.state.lock();
        state.version += 1;
        let (namespace, own) = name.split_once('/').unwrap();
        object["metadata"]["namespace"] = json!(namespace);
        object["metadata"]["name"] = json!(own);
        object["metadata"]["resourceVersion"] = json!(state.version.to_string());
        state.objects.insert(format!("{resource} {name}"), object);
    }

    /// Somebody else deletes an object.
    pub(crate) fn remove(&self, resource: &str, name: &str) {
        let mut state = self.state.lock();
        state.version += 1;
        assert!(
            state
                .objects
                .remove(&format!("{resource} {name}"))
                .is_some()
        );
    }

    /// Every Event, oldest first.
    pub(crate) fn events(&self) -> Vec<Value> {
        let state = self.state.lock();
        let events = state.objects.iter();
        let events = events.filter(|(key, _)| key.starts_with("events default/"));
        let mut events: Vec<_> = events.map(|(_, event)| event.clone()).collect();
        events.sort_by_key(|event| event["eventTime"].as_str().unwrap().to_owned());
        events
    }

    /// Which door this is, in [`Write::door`].
    pub(crate) fn number(&self) -> usize {
        self.door.number
    }

    /// Every write so far.
    pub(crate) fn writes(&self) -> Vec<Write> {
        self.state.lock().writes.clone()
    }

    /// How many requests like `GET leases` came by this door.
    pub(crate) fn asked(&self, what: &str) -> usize {
        let state = self.state.lock();
        let here = |(door, asked): &&(usize, String)| *door == self.door.number && asked == what;
        state.asked.iter().filter(here).count()
    }

    /// Requests like `leases`, `GET` or `PATCH configmaps` by this door are answered with that status.
    pub(crate) fn refuse(&self, what: &'static str, code: u16) {
        self.door.refused.lock().push((what, code));
    }

    pub(crate) fn refuse_nothing(&self) {
        self.door.refused.lock().clear();
    }

    /// Requests like these by this door are held on their way.
    pub(crate) fn hold(&self, what: &'static str) {
        self.door.held.send_replace(Some(what));
    }

    /// What was held arrives, in whatever order.
    pub(crate) fn release(&self) {
        self.door.held.send_replace(None);
    }

    /// Requests that are held.
    pub(crate) fn waiting(&self) -> usize {
        *self.door.waiting.borrow()
    }
}

pub(super) async fn answer(
    state: &Arc<Mutex<State>>,
    door: &Arc<Door>,
    request: Request<Incoming>,
) -> Response<Body> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let body = (!body.is_empty()).then(|| serde_json::from_slice::<Value>(&body).unwrap());
    let (resource, namespace, name) = parse(head.uri.path());
    let what = format!("{} {resource}", head.method);
    state.lock().asked.push((door.number, what.clone()));
    let refused = door
        .refused
        .lock()
        .iter()
        .find(|(part, _)| what.contains(part))
        .copied();
    let asked = Asked {
        method: head.method,
        key: format!(
            "{resource} {namespace}/{}",
            name.as_deref().unwrap_or_default()
        ),
        namespace,
        content: head
            .headers
            .get("content-type")
            .map(|v| v.to_str().unwrap().to_owned()),
        body: body.clone(),
    };
    let is_write = asked.method != Method::GET;
    let held = door.held.borrow().is_some_and(|part| what.contains(part));
    let (shared, number) = (Arc::clone(state), door.number);
    let apply = move || {
        let mut state = shared.lock();
        let (code, answer) = match refused {
            Some((_, code)) => (code, said(code, "Other", "refused by the test")),
            None => state.apply(asked),
        };
        if is_write {
            state.writes.push(Write {
                door: number,
                what,
                code,
                body: body.unwrap_or_default(),
            });
        }
        whole(StatusCode::from_u16(code).unwrap(), &answer)
    };
    if !held {
        return apply();
    }
    let (tell, told) = oneshot::channel();
    let mut release = door.held.subscribe();
    door.waiting.send_modify(|waiting| *waiting += 1);
    door.late.lock().spawn({
        let door = Arc::downgrade(door);
        async move {
            release.wait_for(Option::is_none).await.unwrap();
            tell.send(apply()).ok(); // its sender may have gone
            if let Some(door) = door.upgrade() {
                door.waiting.send_modify(|waiting| *waiting -= 1);
            }
        }
    });
    told.await.unwrap()
}

struct Asked {
    method: Method,
    key: String,
    namespace: String,
    content: Option<String>,
    body: Option<Value>,
}

/// Resource, namespace, and the name if there is one.
fn parse(path: &str) -> (String, String, Option<String>) {
    let rest = path
        .strip_prefix("/apis/coordination.k8s.io/v1/namespaces/")
        .or_else(|| path.strip_prefix("/apis/events.k8s.io/v1/namespaces/"))
        .or_else(|| path.strip_prefix("/api/v1/namespaces/"));
    let mut parts = rest.unwrap().split('/').map(str::to_owned);
    let (namespace, resource) = (parts.next().unwrap(), parts.next().unwrap());
    assert!(
        [
            "leases",
            "configmaps",
            "services",
            "pods",
            "secrets",
            "events"
        ]
        .contains(&resource.as_str()),
        "{path}"
    );
    (resource, namespace, parts.next())
}

fn said(code: u16, reason: &str, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code})
}

impl State {
    fn apply(&mut self, asked: Asked) -> (u16, Value) {
        let Asked {
            method,
            mut key,
            namespace,
            content,
            body,
        } = asked;
        if method == Method::GET {
            return match self.objects.get(&key) {
                Some(object) => (200, object.clone()),
                None => (404, said(404, "NotFound", &format!("{key} not found"))),
            };
        }
        let mut new = body.unwrap();
        if method == Method::POST {
            if !["kube-system", "corvid", "default"].contains(&namespace.as_str()) {
                return (
                    404,
                    said(
                        404,
                        "NotFound",
                        &format!("namespaces {namespace:?} not found"),
                    ),
                );
            }
            key.push_str(new["metadata"]["name"].as_str().unwrap());
            assert_eq!(new["metadata"].get("resourceVersion"), None);
            if self.objects.contains_key(&key) {
                return (
                    409,
                    said(409, "AlreadyExists", &format!("{key} already exists")),
                );
            }
            new["metadata"]["namespace"] = json!(namespace);
            new["metadata"]["uid"] = json!(format!("uid-{}", self.version));
            return self.store(key, new);
        }
        let Some(old) = self.objects.get(&key).cloned() else {
            return (404, said(404, "NotFound", &format!("{key} not found")));
        };
        let version = new["metadata"]["resourceVersion"].clone();
        // Who tells of the same again overwrites nobody: an Event has one teller.
        let is_event = key.starts_with("events ");
        assert!(
            version.is_string() || is_event,
            "a write without a version: {new}"
        );
        if !is_event && version != old["metadata"]["resourceVersion"] {
            return (409, said(409, "Conflict", "the object has been modified"));
        }
        if method != Method::PUT {
            assert_eq!(method, Method::PATCH);
            assert_eq!(content.as_deref(), Some("application/merge-patch+json"));
            let mut merged = old.clone();
            merge(&mut merged, &new);
            new = merged;
        }
        if old["immutable"] == true && new["data"] != old["data"] {
            return (
                422,
                said(422, "Invalid", "field is immutable when `immutable` is set"),
            );
        }
        if new == old {
            // kube-apiserver makes no version for a write that changes nothing.
            return (200, old);
        }
        self.store(key, new)
    }

    fn store(&mut self, key: String, mut object: Value) -> (u16, Value) {
        let values = object["data"].as_object().into_iter().flatten();
        let bytes: usize = values.map(|(_, value)| value.as_str().unwrap().len()).sum();
        if bytes > MOST {
            return (
                422,
                said(
                    422,
                    "Invalid",
                    "Too long: may not be more than 1048576 bytes",
                ),
            );
        }
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.objects.insert(key, object.clone());
        (200, object)
    }
}

/// RFC 7396.
fn merge(target: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let target = target.as_object_mut().unwrap();
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}
