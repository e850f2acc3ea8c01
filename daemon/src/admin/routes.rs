//! Routes of an endpoint: an exact path and a method → an async function that makes the answer.

use std::collections::BTreeMap;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, StatusCode};
use serde::Serialize;

use crate::{LogHandle, Metrics, Readiness, Tasks, chain, metrics};

type Answer = Arc<dyn Fn(Request) -> Pin<Box<dyn Future<Output = Reply> + Send>> + Send + Sync>;

/// What was asked for; its body has arrived.
#[derive(Clone, Debug)]
pub struct Request {
    /// The path, which is that of the route.
    pub path: String,
    /// What follows the `?`, undecoded.
    pub query: Option<String>,
    /// The body, at most 64 KiB.
    pub body: Bytes,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status.
    pub status: StatusCode,
    /// What the body is.
    pub content_type: &'static str,
    /// The body.
    pub body: Bytes,
    pub(super) allow: Option<String>,
}

impl Reply {
    /// Any answer.
    pub fn new(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self {
            status,
            content_type,
            body: body.into(),
            allow: None,
        }
    }

    /// A sentence for people.
    pub fn text(status: StatusCode, sentence: impl Into<String>) -> Self {
        Self::new(status, "text/plain; charset=utf-8", sentence.into())
    }

    /// A value as JSON, with the status 200.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Self::new(StatusCode::OK, "application/json", body),
            Err(error) => Self::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }
}

/// The routes of one endpoint.
#[derive(Clone, Default)]
pub struct Routes {
    routes: BTreeMap<&'static str, Vec<(Method, Answer)>>,
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.routes.keys()).finish()
    }
}

impl Routes {
    /// None yet: everything is 404.
    pub fn new() -> Self {
        Self::default()
    }

    /// `GET /livez` (no critical task of `tasks` has ended), `GET /readyz` (503 with one line for each thing that is
    /// missing) and `GET /metrics`.
    pub fn observe(readiness: Readiness, tasks: &[Tasks], metrics: Metrics) -> Self {
        Self::new()
            .probes(readiness, tasks)
            .get("/metrics", move |_| std::future::ready(encoded(&metrics)))
    }

    /// Adds `GET /livez` and `GET /readyz`, as [`Routes::observe`] has them. As kube-apiserver's, `/readyz?exclude=NAME` leaves
    /// one thing out: `draining` for who looks by other means at whether the service goes.
    #[must_use]
    pub fn probes(self, readiness: Readiness, tasks: &[Tasks]) -> Self {
        let tasks = tasks.to_vec();
        self.get("/livez", move |_| std::future::ready(livez(&tasks)))
            .get("/readyz", move |request| {
                std::future::ready(readyz(&readiness, request.query.as_deref()))
            })
    }

    /// `GET` and `PUT /log-level`, with the filter as the body; add the service's own.
    pub fn admin(log: LogHandle) -> Self {
        let reader = log.clone();
        Self::new()
            .get("/log-level", move |_| {
                std::future::ready(Reply::text(
                    StatusCode::OK,
                    format!("{}\n", reader.current()),
                ))
            })
            .put("/log-level", move |request| {
                std::future::ready(set_level(&log, &request.body))
            })
    }

    /// Adds a route for GET (and HEAD).
    #[must_use]
    pub fn get<F, R>(self, path: &'static str, answer: F) -> Self
    where
        F: Fn(Request) -> R + Send + Sync + 'static,
        R: Future<Output = Reply> + Send + 'static,
    {
        self.add(Method::GET, path, answer)
    }

    /// Adds a route for POST.
    #[must_use]
    pub fn post<F, R>(self, path: &'static str, answer: F) -> Self
    where
        F: Fn(Request) -> R + Send + Sync + 'static,
        R: Future<Output = Reply> + Send + 'static,
    {
        self.add(Method::POST, path, answer)
    }

    /// Adds a route for PUT.
    #[must_use]
    pub fn put<F, R>(self, path: &'static str, answer: F) -> Self
    where
        F: Fn(Request) -> R + Send + Sync + 'static,
        R: Future<Output = Reply> + Send + 'static,
    {
        self.add(Method::PUT, path, answer)
    }

    fn add<F, R>(mut self, method: Method, path: &'static str, answer: F) -> Self
    where
        F: Fn(Request) -> R + Send + Sync + 'static,
        R: Future<Output = Reply> + Send + 'static,
    {
        let answer: Answer = Arc::new(move |request| Box::pin(answer(request)));
        let methods = self.routes.entry(path).or_default();
        // The last one counts, so that a service may replace what is built in.
        methods.retain(|(known, _)| *known != method);
        methods.push((method, answer));
        self
    }

    pub(super) async fn answer(&self, method: &Method, request: Request) -> Reply {
        let Some(methods) = self.routes.get(request.path.as_str()) else {
            let mut known = String::from("not found; there is\n");
            for path in self.routes.keys() {
                known.push_str(path);
                known.push('\n');
            }
            return Reply::text(StatusCode::NOT_FOUND, known);
        };
        if let Some((_, answer)) = methods.iter().find(|(known, _)| known == method) {
            return answer(request).await;
        }
        let allowed: Vec<&str> = methods.iter().map(|(known, _)| known.as_str()).collect();
        let allowed = allowed.join(", ");
        let refusal = format!("only {allowed} is answered here\n");
        let mut reply = Reply::text(StatusCode::METHOD_NOT_ALLOWED, refusal);
        reply.allow = Some(allowed);
        reply
    }
}

fn livez(tasks: &[Tasks]) -> Reply {
    match tasks.iter().find_map(Tasks::failure) {
        None => Reply::text(StatusCode::OK, "ok\n"),
        Some(name) => Reply::text(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("{name} has ended\n"),
        ),
    }
}

fn readyz(readiness: &Readiness, query: Option<&str>) -> Reply {
    let excluded: Vec<&str> = query
        .into_iter()
        .flat_map(|query| query.split('&'))
        .filter_map(|part| part.strip_prefix("exclude="))
        .collect();
    let mut missing = readiness.missing();
    missing.retain(|name| !excluded.contains(&name.as_str()));
    if missing.is_empty() {
        return Reply::text(StatusCode::OK, "ok\n");
    }
    let lines: String = missing
        .iter()
        .map(|name| format!("not ready: {name}\n"))
        .collect();
    Reply::text(StatusCode::SERVICE_UNAVAILABLE, lines)
}

fn encoded(metrics: &Metrics) -> Reply {
    match metrics.encode() {
        Ok(text) => Reply::new(StatusCode::OK, metrics::CONTENT_TYPE, text),
        Err(error) => Reply::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn set_level(log: &LogHandle, body: &[u8]) -> Reply {
    let Ok(filter) = std::str::from_utf8(body) else {
        return Reply::text(StatusCode::BAD_REQUEST, "the body is not UTF-8\n");
    };
    match log.set(filter) {
        Ok(()) => {
            let filter = log.current();
            tracing::info!(filter, "log filter changed");
            Reply::text(StatusCode::OK, format!("{filter}\n"))
        }
        Err(error) => Reply::text(StatusCode::BAD_REQUEST, format!("{}\n", chain(&error))),
    }
}
