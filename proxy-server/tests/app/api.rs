//! An emulated Kubernetes API that knows nodes: pages, watches with bookmarks, and everything that goes wrong with it.
//! Other objects ([`objects`]) are read and written one by one.
//!
//! It keeps a log of events with resource versions as etcd does, and refuses versions that are compacted away.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use objects::{Door, Objects, Write};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokens::Issued;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

// Named, as the lab has this file too.
#[path = "api/objects.rs"]
pub(crate) mod objects;
#[path = "api/tokens.rs"]
pub(crate) mod tokens;

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// What happens to the next requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    Well,
    /// Every request is answered with this status.
    Status(u16),
    /// Pages after the first are refused with 410.
    PagesGone,
    /// Every request is answered well, with something that is no answer to it.
    Nonsense,
    /// Every request is answered by something that is not kube-apiserver and knows nothing of it.
    Elsewhere,
    /// No request is answered; watches that run go on.
    Silent,
    /// Watches end as soon as they have said what is new, and well.
    EndsWatches,
}

#[derive(Debug)]
struct State {
    version: u64,
    /// Versions up to this one can't be watched from.
    compacted: u64,
    nodes: List,
    /// EndpointSlices of all namespaces.
    slices: List,
    /// Pods of all namespaces.
    pods: List,
    /// Services of all namespaces.
    services: List,
    mood: Mood,
    /// Requests for nodes, as `list`, `list+` (a further page), `node` (of that name) and `watch`; and `tokenreview`.
    seen: Vec<&'static str>,
    objects: Objects,
    /// Writes of other objects.
    writes: Vec<Write>,
    /// Requests for other objects, by their door.
    asked: Vec<(usize, String)>,
    doors: usize,
    tokens: BTreeMap<String, Issued>,
}

/// What can be watched.
#[derive(Debug, Default)]
struct List {
    items: BTreeMap<String, Value>,
    log: Vec<(u64, Value)>,
}

/// Which of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Nodes,
    Slices,
    Pods,
    Services,
}

impl Kind {
    /// What that path lists; `None` for single objects.
    fn at(path: &str) -> Option<Self> {
        match path {
            "/api/v1/nodes" => Some(Self::Nodes),
            "/api/v1/pods" => Some(Self::Pods),
            "/api/v1/services" => Some(Self::Services),
            path if path.ends_with("/endpointslices") => Some(Self::Slices),
            _ => None,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Nodes => "Node",
            Self::Slices => "EndpointSlice",
            Self::Pods => "Pod",
            Self::Services => "Service",
        }
    }

    const fn version(self) -> &'static str {
        match self {
            Self::Nodes | Self::Pods | Self::Services => "v1",
            Self::Slices => "discovery.k8s.io/v1",
        }
    }
}

/// The API, or another door to it. Dropping it cuts all its connections.
pub(crate) struct Api {
    state: Arc<Mutex<State>>,
    door: Arc<Door>,
    changed: watch::Sender<()>,
    address: SocketAddr,
    server: Option<JoinSet<()>>,
}

impl Api {
    pub(crate) async fn start() -> Self {
        let state = State {
            version: 100,
            compacted: 0,
            nodes: List::default(),
            slices: List::default(),
            pods: List::default(),
            services: List::default(),
            mood: Mood::Well,
            seen: Vec::new(),
            objects: Objects::new(),
            writes: Vec::new(),
            asked: Vec::new(),
            doors: 0,
            tokens: BTreeMap::new(),
        };
        let mut api = Self {
            state: Arc::new(Mutex::new(state)),
            door: Arc::new(Door::new(0)),
            changed: watch::Sender::new(()),
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            server: None,
        };
        api.up().await;
        api
    }

    /// Another door to the same API, at a port of its own: what happens to requests here does not happen there.
    pub(crate) async fn another_door(&self) -> Self {
        let number = {
            let mut state = self.state.lock();
            state.doors += 1;
            state.doors
        };
        let mut api = Self {
            state: Arc::clone(&self.state),
            door: Arc::new(Door::new(number)),
            changed: self.changed.clone(),
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            server: None,
        };
        api.up().await;
        api
    }

    /// Listens, on the same port each time.
    pub(crate) async fn up(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.address = listener.local_addr().unwrap();
        let shared = (
            Arc::clone(&self.state),
            self.changed.clone(),
            Arc::clone(&self.door),
        );
        let mut server = JoinSet::new();
        server.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (state, changed, door) = shared.clone();
                connections.spawn(async move {
                    let serve = service_fn(|request: Request<Incoming>| {
                        let (state, changed, door) = (&state, &changed, &door);
                        async move {
                            let mood = state.lock().mood;
                            match mood {
                                Mood::Silent => std::future::pending().await,
                                Mood::Nonsense => return Ok(whole(StatusCode::OK, &json!({}))),
                                Mood::Elsewhere => return Ok(elsewhere()),
                                Mood::Well
                                | Mood::Status(_)
                                | Mood::PagesGone
                                | Mood::EndsWatches => {}
                            }
                            let kind = Kind::at(request.uri().path());
                            Ok::<_, Infallible>(match (kind, request.uri().path()) {
                                (Some(kind), _) => answer(state, changed, kind, &request),
                                (None, tokens::REVIEWS) => tokens::answer(state, request).await,
                                (None, _) => objects::answer(state, door, request).await,
                            })
                        }
                    });
                    let connection =
                        http1::Builder::new().serve_connection(TokioIo::new(stream), serve);
                    connection.await.ok(); // cut by the test or by the client
                });
            }
        });
        self.server = Some(server);
    }

    /// Cuts every connection and listens no longer.
    pub(crate) async fn down(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.shutdown().await;
        }
    }

    pub(crate) fn kubeconfig(&self, dir: &Path) -> PathBuf {
        let file = dir.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{server: 'http://{}'}}}}]\n\
             users: [{{name: u, user: {{}}}}]\ncontexts: [{{name: x, context: {{cluster: c, user: u}}}}]\ncurrent-context: x\n",
            self.address
        );
        std::fs::write(&file, text).unwrap();
        file
    }

    /// Creates or changes a node.
    pub(crate) fn put(&self, node: Value) {
        let mut state = self.state.lock();
        state.put(Kind::Nodes, node);
        drop(state);
        self.changed.send_replace(());
    }

    /// Creates or changes an EndpointSlice.
    pub(crate) fn put_slice(&self, slice: Value) {
        let mut state = self.state.lock();
        state.put(Kind::Slices, slice);
        drop(state);
        self.changed.send_replace(());
    }

    /// Creates or changes a pod.
    pub(crate) fn put_pod(&self, pod: Value) {
        let mut state = self.state.lock();
        state.put(Kind::Pods, pod);
        drop(state);
        self.changed.send_replace(());
    }

    /// Creates or changes a Service.
    pub(crate) fn put_service(&self, service: Value) {
        let mut state = self.state.lock();
        state.put(Kind::Services, service);
        drop(state);
        self.changed.send_replace(());
    }

    /// As [`Api::put`], but watches are not told until something else happens.
    pub(crate) fn put_quietly(&self, node: Value) {
        self.state.lock().put(Kind::Nodes, node);
    }

    pub(crate) fn put_all(&self, nodes: impl Iterator<Item = Value>) {
        let mut state = self.state.lock();
        for node in nodes {
            state.put(Kind::Nodes, node);
        }
        drop(state);
        self.changed.send_replace(());
    }

    pub(crate) fn delete(&self, name: &str) {
        self.delete_of(Kind::Nodes, name);
    }

    pub(crate) fn delete_slice(&self, name: &str) {
        self.delete_of(Kind::Slices, name);
    }

    pub(crate) fn delete_pod(&self, name: &str) {
        self.delete_of(Kind::Pods, name);
    }

    pub(crate) fn delete_service(&self, name: &str) {
        self.delete_of(Kind::Services, name);
    }

    fn delete_of(&self, kind: Kind, name: &str) {
        let mut state = self.state.lock();
        state.version += 1;
        let version = state.version;
        let list = state.list(kind);
        let mut item = list.items.remove(name).unwrap();
        item["metadata"]["resourceVersion"] = json!(version.to_string());
        let event = json!({"type": "DELETED", "object": item});
        list.log.push((version, event));
        drop(state);
        self.changed.send_replace(());
    }

    /// Forgets all history: who watches from an older version is told 410, also watches that run and are behind.
    pub(crate) fn compact(&self) {
        let mut state = self.state.lock();
        state.compacted = state.version;
        state.nodes.log.clear();
        state.slices.log.clear();
        state.pods.log.clear();
        state.services.log.clear();
        drop(state);
        self.changed.send_replace(());
    }

    /// Tells every watch how far it is, although nothing has changed for it.
    pub(crate) fn bookmark(&self) {
        let mut state = self.state.lock();
        state.version += 1;
        let version = state.version;
        let object = json!({"kind": "Node", "apiVersion": "v1", "metadata": {"resourceVersion": version.to_string(), "creationTimestamp": null}});
        state
            .nodes
            .log
            .push((version, json!({"type": "BOOKMARK", "object": object})));
        drop(state);
        self.changed.send_replace(());
    }

    pub(crate) fn mood(&self, mood: Mood) {
        self.state.lock().mood = mood;
    }

    /// How many requests of that kind came.
    pub(crate) fn seen(&self, kind: &str) -> usize {
        self.state
            .lock()
            .seen
            .iter()
            .filter(|seen| **seen == kind)
            .count()
    }
}

impl State {
    const fn list(&mut self, kind: Kind) -> &mut List {
        match kind {
            Kind::Nodes => &mut self.nodes,
            Kind::Slices => &mut self.slices,
            Kind::Pods => &mut self.pods,
            Kind::Services => &mut self.services,
        }
    }

    fn put(&mut self, kind: Kind, mut item: Value) {
        self.version += 1;
        let version = self.version;
        let name = item["metadata"]["name"].as_str().unwrap().to_owned();
        item["metadata"]["resourceVersion"] = json!(version.to_string());
        let list = self.list(kind);
        let event = if list.items.insert(name, item.clone()).is_some() {
            "MODIFIED"
        } else {
            "ADDED"
        };
        list.log
            .push((version, json!({"type": event, "object": item})));
    }
}

fn answer(
    state: &Arc<Mutex<State>>,
    changed: &watch::Sender<()>,
    kind: Kind,
    request: &Request<Incoming>,
) -> Response<Body> {
    let query: BTreeMap<String, String> = request
        .uri()
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    let watches = query.contains_key("watch");
    let named = query
        .get("fieldSelector")
        .map(|selector| selector.strip_prefix("metadata.name%3D").unwrap());
    let everywhere = !request.uri().path().contains("/namespaces/");
    let mut locked = state.lock();
    let seen = match (kind, watches, query.contains_key("continue")) {
        (Kind::Slices, true, _) if everywhere => "watch all slices",
        (Kind::Slices, false, _) if everywhere => "all slices",
        (Kind::Slices, ..) => "slices",
        (Kind::Services, true, _) => "watch services",
        (Kind::Services, false, _) => "services",
        (Kind::Pods, true, _) => "watch pods",
        (Kind::Pods, false, _) => "pods",
        (Kind::Nodes, true, _) => "watch",
        (Kind::Nodes, false, true) => "list+",
        (Kind::Nodes, false, false) if named.is_some() => "node",
        (Kind::Nodes, false, false) => "list",
    };
    locked.seen.push(seen);
    if kind == Kind::Slices && !everywhere {
        let path = "/apis/discovery.k8s.io/v1/namespaces/corvid/endpointslices";
        assert_eq!(request.uri().path(), path);
        assert_eq!(
            query["labelSelector"],
            "kubernetes.io%2Fservice-name%3Dpeers"
        );
    }
    match locked.mood {
        Mood::Status(code) => return status(code),
        Mood::PagesGone if seen == "list+" => return status(410),
        Mood::Well
        | Mood::PagesGone
        | Mood::EndsWatches
        | Mood::Nonsense
        | Mood::Elsewhere
        | Mood::Silent => {}
    }
    if watches {
        let from = query["resourceVersion"].parse::<u64>().unwrap();
        assert_eq!(query["allowWatchBookmarks"], "true");
        let seconds = if locked.mood == Mood::EndsWatches {
            0
        } else {
            query["timeoutSeconds"].parse().unwrap()
        };
        drop(locked);
        return events(state, changed, kind, from, Duration::from_secs(seconds));
    }
    let limit = query
        .get("limit")
        .map_or(usize::MAX, |limit| limit.parse().unwrap());
    let after = query
        .get("continue")
        .map(String::as_str)
        .unwrap_or_default();
    let version = locked.version.to_string();
    let mut rest = locked
        .list(kind)
        .items
        .iter()
        .filter(|(name, _)| name.as_str() > after)
        .filter(|(name, _)| named.is_none_or(|wanted| wanted == name.as_str()));
    let page: Vec<_> = rest.by_ref().take(limit).collect();
    let more = rest.next().is_some();
    let next = page.last().filter(|_| more).map(|(name, _)| name.as_str());
    let items: Vec<_> = page.iter().map(|(_, item)| *item).collect();
    let list = json!({
        "kind": format!("{}List", kind.name()), "apiVersion": kind.version(),
        "metadata": {"resourceVersion": version, "continue": next.unwrap_or_default()},
        "items": items,
    });
    whole(StatusCode::OK, &list)
}

fn status(code: u16) -> Response<Body> {
    let reason = if code == 410 { "Expired" } else { "Other" };
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": format!("said with {code}"), "reason": reason, "code": code});
    whole(StatusCode::from_u16(code).unwrap(), &status)
}

/// What Go's own server says of a path that it does not have.
fn elsewhere() -> Response<Body> {
    let body = Full::new(Bytes::from_static(b"404 page not found\n"));
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}

fn whole(status: StatusCode, body: &Value) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())).boxed_unsync());
    *response.status_mut() = status;
    response
}

fn events(
    state: &Arc<Mutex<State>>,
    changed: &watch::Sender<()>,
    kind: Kind,
    from: u64,
    limit: Duration,
) -> Response<Body> {
    let (state, changed) = (Arc::clone(state), changed.subscribe());
    let ends = tokio::time::Instant::now() + limit;
    let stream = futures_util::stream::unfold(
        (from, changed, false),
        move |(from, mut changed, over)| {
            let state = Arc::clone(&state);
            async move {
                if over {
                    return None;
                }
                loop {
                    changed.borrow_and_update();
                    let (line, next, over) = {
                        let mut state = state.lock();
                        if from < state.compacted {
                            let gone = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "too old resource version", "reason": "Expired", "code": 410});
                            (Some(json!({"type": "ERROR", "object": gone})), from, true)
                        } else {
                            let next = state
                                .list(kind)
                                .log
                                .iter()
                                .find(|(version, _)| *version > from);
                            let line = next.map(|(_, event)| event.clone());
                            (line, next.map_or(from, |(version, _)| *version), false)
                        }
                    };
                    if let Some(line) = line {
                        let frame = Frame::data(Bytes::from(format!("{line}\n")));
                        return Some((Ok::<_, Infallible>(frame), (next, changed, over)));
                    }
                    tokio::select! {
                        change = changed.changed() => change.ok()?,
                        () = tokio::time::sleep_until(ends) => return None,
                    }
                }
            }
        },
    );
    Response::new(StreamBody::new(stream).boxed_unsync())
}
