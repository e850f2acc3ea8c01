//! The two small HTTP endpoints of a service: *observe* (livez, readyz, metrics; on the pod's address, because
//! kubelet probes and scrapers need it) and *admin* (sessions, log level; loopback and Unix sockets only).
//!
//! Invariants: headers, bodies, connections and every step in time are bounded; admin never listens beyond loopback,
//! and over TCP never answers a request made for another host (a browser on the machine that was lured).
//! It must not know what the routes say; each service adds its own.

pub mod client;
mod routes;

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

pub use self::client::Probe;
pub use self::routes::{Reply, Request, Routes};
use crate::{BindOptions, Listen, Listener, Metrics, Stream, Tasks};

/// Connections at once: probes, two or three scrapers, a few operators.
const MAX_CONNECTIONS: usize = 64;
/// Largest request body: a log filter is the largest there is.
const MAX_BODY: usize = 64 * 1024;
/// Largest head of a request, and most headers in it.
const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
/// For a head to arrive, idle time of a kept connection included: probes and scrapes come more often or pay a connect.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// For a body to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// For the answer to be made.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// After this a connection is asked to end after the present answer, so that one that reads nothing frees its place.
const MAX_AGE: Duration = Duration::from_secs(300);
/// For that last answer to leave.
const LAST_REPLY_TIMEOUT: Duration = Duration::from_secs(15);

/// Why an endpoint cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The operating system refuses the address.
    #[error("listen on {listen}")]
    Bind {
        /// The address.
        listen: Listen,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The admin endpoint has no authentication, so its address must not be reachable from elsewhere.
    #[error("the admin endpoint listens on loopback addresses and unix sockets only, not on {0}")]
    NotLoopback(Listen),
}

/// A bound endpoint, not answering yet.
#[derive(Debug)]
pub struct Endpoint {
    listener: Listener,
    hosts: Hosts,
}

/// Whose `Host` is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hosts {
    Any,
    LoopbackOnly,
}

impl Endpoint {
    /// Binds an endpoint for everybody who reaches the address; see [`BindOptions::handover`].
    ///
    /// # Errors
    /// [`AdminError::Bind`].
    pub fn observe(listen: &Listen, metrics: &Metrics, handover: bool) -> Result<Self, AdminError> {
        Self::bind(listen, 0o666, metrics, Hosts::Any, handover)
    }

    /// Binds an endpoint for operators on this machine; a Unix socket gets the mode 0600.
    ///
    /// # Errors
    /// [`AdminError::NotLoopback`], [`AdminError::Bind`].
    pub fn admin(listen: &Listen, metrics: &Metrics, handover: bool) -> Result<Self, AdminError> {
        if !is_local(listen) {
            return Err(AdminError::NotLoopback(listen.clone()));
        }
        Self::bind(listen, 0o600, metrics, Hosts::LoopbackOnly, handover)
    }

    fn bind(
        listen: &Listen,
        mode: u32,
        metrics: &Metrics,
        hosts: Hosts,
        handover: bool,
    ) -> Result<Self, AdminError> {
        let pauses = metrics.accept_pauses();
        let options = BindOptions {
            max_connections: MAX_CONNECTIONS,
            mode,
            pauses,
            handover,
            ..BindOptions::default()
        };
        let listener = Listener::bind_with(listen, options).map_err(|source| AdminError::Bind {
            listen: listen.clone(),
            source,
        })?;
        Ok(Self { listener, hosts })
    }

    /// The address, with the port that the system chose.
    pub const fn bound(&self) -> &Listen {
        self.listener.bound()
    }

    /// Answers until `tasks` is asked to stop; connections are tasks of `tasks`. An endpoint that must answer during
    /// the drain of the service (readyz does) belongs to tasks that are drained later.
    ///
    /// # Errors
    /// The listener is broken.
    pub async fn serve(self, routes: Routes, tasks: &Tasks) -> io::Result<()> {
        let Self { listener, hosts } = self;
        // A peer over a Unix socket is no browser, and its Host means nothing.
        let hosts = if listener.bound().tcp().is_some() {
            hosts
        } else {
            Hosts::Any
        };
        let stop = tasks.stopping();
        let for_connections = stop.clone();
        let serve =
            move |stream, _| connection(stream, routes.clone(), hosts, for_connections.clone());
        listener.serve("http", tasks, stop, serve).await
    }
}

/// Whether only this machine can reach the address.
pub fn is_local(listen: &Listen) -> bool {
    listen
        .tcp()
        .is_none_or(|addr| addr.ip().to_canonical().is_loopback())
}

async fn connection(stream: Stream, routes: Routes, hosts: Hosts, stop: CancellationToken) {
    let service = service_fn(move |request| {
        let routes = routes.clone();
        async move { Ok::<_, Infallible>(into_response(answer(request, &routes, hosts).await)) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        // How a connection ends is the client's affair.
        _ = connection.as_mut() => return,
        () = tokio::time::sleep(MAX_AGE) => {}
        () = stop.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    timeout(LAST_REPLY_TIMEOUT, connection).await.ok();
}

async fn answer(request: http::Request<Incoming>, routes: &Routes, hosts: Hosts) -> Reply {
    if hosts == Hosts::LoopbackOnly && !is_loopback_host(request.headers().get(header::HOST)) {
        return Reply::text(
            StatusCode::FORBIDDEN,
            "only requests for localhost are answered here\n",
        );
    }
    let (head, body) = request.into_parts();
    // hyper drops the body of an answer to HEAD by itself.
    let method = if head.method == Method::HEAD {
        Method::GET
    } else {
        head.method
    };
    let body = match timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            return Reply::text(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large\n");
        }
        Ok(Err(_)) => return Reply::text(StatusCode::BAD_REQUEST, "the body is broken\n"),
        Err(_) => return Reply::text(StatusCode::REQUEST_TIMEOUT, "the body did not arrive\n"),
    };
    let request = Request {
        path: head.uri.path().to_owned(),
        query: head.uri.query().map(str::to_owned),
        body,
    };
    match timeout(REPLY_TIMEOUT, routes.answer(&method, request)).await {
        Ok(reply) => reply,
        Err(_) => Reply::text(
            StatusCode::SERVICE_UNAVAILABLE,
            "the answer took too long\n",
        ),
    }
}

/// Whether a `Host` names this machine. A page that a browser on this machine has loaded from elsewhere can reach a
/// loopback port through a name of its own (DNS rebinding), but cannot choose the `Host`.
fn is_loopback_host(host: Option<&HeaderValue>) -> bool {
    let Some(authority) = host.and_then(|host| host.to_str().ok()) else {
        return false;
    };
    let Ok(authority) = authority.parse::<http::uri::Authority>() else {
        return false;
    };
    let host = authority
        .host()
        .trim_start_matches('[')
        .trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || host
            .parse::<IpAddr>()
            .is_ok_and(|ip| ip.to_canonical().is_loopback())
}

fn into_response(reply: Reply) -> http::Response<Full<Bytes>> {
    let Reply {
        status,
        content_type,
        body,
        allow,
    } = reply;
    let mut response = http::Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    if let Some(allow) = allow.and_then(|allow| HeaderValue::try_from(allow).ok()) {
        headers.insert(header::ALLOW, allow);
    }
    response
}

#[cfg(test)]
mod tests;
