//! A forward proxy for scrapers, over TLS: CONNECT for HTTPS kubelets, absolute-form requests (RFC 9112 section 3.2.2)
//! for plain exporters, with pooled connections to the destinations.
//!
//! Who may use it: a client certificate, a bearer token or a password ([`Credentials`]); for what, [`Policy`] says, for
//! each request, also over kept connections. Only destinations at the edge are reached, never anything else.

mod body;
mod discovery;
mod pool;
mod way;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use body::{Answered, Sent};
use bytes::Bytes;
use daemon::{Peer, Stream, Tasks};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request as HttpRequest, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::ext::ReasonPhrase;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioIo, TokioTimer};
pub use pool::Pool;
use pool::Taken;
use proto::{Destination, Reason, RelayEnd};
use tokio::time::timeout;
use way::Way;

use super::credentials::Credentials;
use super::policy::{Policy, Requester, Who};
use super::{Io, LiveTls, handshake};
use crate::config::Elsewhere;
use crate::error::Refusal;
use crate::record::{Outcome, Path, RequestRecord};
use crate::serve::{Forwarder, Opened, Request};

/// Metric label.
const NAME: &str = "forward_proxy";
/// Most bytes and fields of a head.
const MAX_HEAD: usize = 16 << 10;
const MAX_HEADERS: usize = 64;

type Body = BoxBody<Bytes, hyper::Error>;

/// One listener's settings.
#[derive(Debug)]
pub struct ForwardProxy {
    /// What carries requests.
    pub forwarder: Arc<Forwarder>,
    /// TLS.
    pub tls: LiveTls,
    /// Tokens and passwords.
    pub credentials: ArcSwap<Credentials>,
    /// Who may ask for what.
    pub policy: ArcSwap<Policy>,
    /// Connections to plain exporters.
    pub pool: Pool,
    /// Owner of relays that outlive their request.
    pub tasks: Tasks,
}

impl ForwardProxy {
    /// Serves one connection.
    pub async fn serve(self: Arc<Self>, stream: Stream, peer: Peer) {
        let limit = self.forwarder.timeouts.header;
        let metrics = &self.forwarder.metrics;
        let Ok((io, requester)) = handshake(stream, &peer, Some(&self.tls), limit, metrics).await
        else {
            return;
        };
        let stop = self.tasks.stopping();
        let asked = AtomicBool::new(false);
        let service = service_fn(|request| {
            asked.store(true, Ordering::Relaxed);
            let proxy = Arc::clone(&self);
            let requester = requester.clone();
            async move { Ok::<_, Infallible>(proxy.answer(request, requester).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(idle_limit(limit))
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(io), service)
            .with_upgrades();
        let mut connection = std::pin::pin!(connection);
        let silent = async {
            tokio::time::sleep(limit).await;
            if asked.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
        };
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = silent => {
                let sentence = "no request came in time".to_owned();
                self.refuse(&requester, &Refusal { reason: Reason::Timeout, sentence });
                return;
            }
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            if error.is_parse() {
                let sentence = format!("the request is not HTTP/1.1: {error}");
                let (reason, sentence) = if error.is_parse_too_large() {
                    let limits =
                        "the request's head is larger than 16 KiB or has more than 64 fields";
                    (Reason::TooLarge, limits.to_owned())
                } else {
                    (Reason::BadRequest, sentence)
                };
                self.refuse(&requester, &Refusal { reason, sentence });
            }
            tracing::debug!(%peer, error = %daemon::chain(&error), "forward proxy connection ended");
        }
    }

    async fn answer(
        self: Arc<Self>,
        request: HttpRequest<Incoming>,
        connected: Requester,
    ) -> Response<Body> {
        let requester = if connected.who == Who::Unproved {
            let headers = request.headers();
            // Asked of us and not through us, as Prometheus asks for its targets.
            let of_us = request.uri().authority().is_none();
            let field = if of_us && headers.contains_key(header::AUTHORIZATION) {
                header::AUTHORIZATION
            } else {
                header::PROXY_AUTHORIZATION
            };
            let user = self.credentials.load().user(headers, &field);
            match user {
                Some(user) => connected.proved(Who::User(user)),
                None => connected,
            }
        } else {
            connected
        };
        if requester.who == Who::Unproved {
            let refusal = Refusal {
                reason: Reason::Unauthenticated,
                sentence: Reason::Unauthenticated.sentence().to_owned(),
            };
            return self.refuse(&requester, &refusal);
        }
        let uri = request.uri();
        if request.method() == Method::GET
            && uri.authority().is_none()
            && uri.path().starts_with(discovery::PREFIX)
        {
            if let Err(refusal) = self.policy.load().hear(&requester) {
                return self.refuse(&requester, &refusal);
            }
            tracing::info!(target: "access", frontend = NAME, %requester, from = requester.source(), path = uri.path(), "discovery");
            return discovery::answer(&self.forwarder, uri.path());
        }
        let answered = if request.method() == Method::CONNECT {
            self.connect(request, requester).await
        } else {
            self.forward(request, requester).await
        };
        answered.unwrap_or_else(|refusal| response(&refusal))
    }

    /// Refuses what never became a [`Request`].
    fn refuse(&self, requester: &Requester, refusal: &Refusal) -> Response<Body> {
        self.forwarder
            .metrics
            .stream(NAME, Path::None, Outcome::Failed(refusal.reason));
        tracing::info!(target: "access", frontend = NAME, %requester, from = requester.source(), reason = refusal.reason.label(), said = %refusal, "request refused");
        response(refusal)
    }

    async fn connect(
        self: Arc<Self>,
        mut request: HttpRequest<Incoming>,
        requester: Requester,
    ) -> Result<Response<Body>, Refusal> {
        let authority = request.uri().authority().map(http::uri::Authority::as_str);
        let destination = match destination(authority, None) {
            Ok(destination) => destination,
            Err(refusal) => return Ok(self.refuse(&requester, &refusal)),
        };
        let wanted = self.wanted(requester, destination);
        // hyper drops this future when the requester hangs up, and with it the stream that is being opened.
        let opened = self.forwarder.open(wanted, std::future::pending()).await?;
        let upgrade = hyper::upgrade::on(&mut request);
        let limit = self.forwarder.timeouts.header;
        self.tasks.spawn("relay", async move {
            match timeout(limit, upgrade).await {
                Ok(Ok(upgraded)) => Box::pin(relay(opened, upgraded)).await,
                Ok(Err(error)) => {
                    tracing::debug!(%error, "the requester left before its answer");
                }
                Err(_elapsed) => tracing::debug!("the requester did not take its answer in time"),
            }
        });
        Ok(Response::new(empty()))
    }

    async fn forward(
        &self,
        mut request: HttpRequest<Incoming>,
        requester: Requester,
    ) -> Result<Response<Body>, Refusal> {
        let uri = request.uri();
        if uri.scheme() != Some(&http::uri::Scheme::HTTP) {
            let sentence = "only http:// URLs and CONNECT are served here".to_owned();
            let refusal = Refusal {
                reason: Reason::BadRequest,
                sentence,
            };
            return Ok(self.refuse(&requester, &refusal));
        }
        let authority = uri.authority().map(http::uri::Authority::as_str);
        let destination = match destination(authority, Some(80)) {
            Ok(destination) => destination,
            Err(refusal) => return Ok(self.refuse(&requester, &refusal)),
        };
        let wanted = self.wanted(requester, destination);
        let mut record = RequestRecord::new(&wanted, uri.path());
        // A kept connection may be there already, opened for somebody else: who may ask is decided for each request, and
        // where it goes too.
        let way = match self.way(&wanted, &mut record.node) {
            Ok(way) => way,
            Err(refusal) => {
                let outcome = Outcome::Failed(refusal.reason);
                self.forwarder.metrics.stream(NAME, Path::None, outcome);
                record.end(outcome, &refusal.sentence);
                return Err(refusal);
            }
        };
        strip_hop_by_hop(request.headers_mut());
        say_host(&mut request);
        *request.version_mut() = http::Version::HTTP_11;
        let moved = Arc::clone(&record.to_edge);
        let request = request.map(|body| Sent { body, moved });
        let answered = self.pool.send(request, &way).await;
        if let Err(refusal) = &answered {
            record.end(Outcome::Failed(refusal.reason), &refusal.sentence);
        }
        let (mut head, body) = answered?.into_parts();
        record.status = Some(head.status.as_u16());
        let taken = head.extensions.get::<Taken>();
        record.path = taken.map_or(Path::Tunnel, |Taken(path)| *path);
        strip_hop_by_hop(&mut head.headers);
        let body = Answered { body, record };
        Ok(Response::from_parts(head, body.boxed()))
    }

    fn way(&self, wanted: &Request, node: &mut String) -> Result<Way, Refusal> {
        let route = self.forwarder.admit(wanted, node)?;
        let nowhere = || Refusal::about(&wanted.destination, Reason::UnknownDestination);
        let mut way = Way::new(route).ok_or_else(nowhere)?;
        way.by_line = self.forwarder.goes_by_line(way.meant());
        Ok(way)
    }

    fn wanted(&self, requester: Requester, destination: Destination) -> Request {
        Request {
            frontend: NAME,
            requester,
            destination,
            elsewhere: Elsewhere::Refuse,
            policy: self.policy.load_full(),
        }
    }
}

/// A kept connection may be idle between two scrapes.
fn idle_limit(header: Duration) -> Duration {
    header.max(Duration::from_secs(90))
}

/// The destination in an authority; a port may have a default. A user in it is not looked at.
fn destination(authority: Option<&str>, default_port: Option<u16>) -> Result<Destination, Refusal> {
    let text = authority.unwrap_or_default();
    let text = text.rsplit_once('@').map_or(text, |(_, host)| host);
    let with_port = match default_port {
        Some(port) if text.parse::<proto::Host>().is_ok() => format!("{text}:{port}"),
        Some(_) | None => text.to_owned(),
    };
    with_port.parse().map_err(|error: proto::IdError| Refusal {
        reason: Reason::BadRequest,
        sentence: format!("{text:?}: {error}"),
    })
}

/// What was asked for is the `Host`, whatever was sent as such (RFC 9112 section 3.2.2).
fn say_host<B>(request: &mut HttpRequest<B>) {
    let authority = request.uri().authority().map(http::uri::Authority::as_str);
    let asked = authority.unwrap_or_default();
    let asked = asked.rsplit_once('@').map_or(asked, |(_, host)| host);
    if let Ok(host) = HeaderValue::from_str(asked) {
        request.headers_mut().insert(header::HOST, host);
    }
}

/// Fields that are for the next hop only (RFC 9110 section 7.6.1), the proxy's credentials among them.
fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let fixed = [
        header::CONNECTION,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        HeaderName::from_static("proxy-connection"),
        HeaderName::from_static("keep-alive"),
    ];
    // RFC 9112 section 6.3: the coding counts, and nobody further on may believe the length.
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    for name in fixed.into_iter().chain(named) {
        headers.remove(name);
    }
}

async fn relay(opened: Opened, upgraded: Upgraded) {
    let Ok(parts) = upgraded.downcast::<TokioIo<Io>>() else {
        tracing::error!("an upgraded connection is not what was upgraded");
        return;
    };
    let mut io = parts.io.into_inner();
    if let RelayEnd::Cut(_) = opened.relay(&mut io, parts.read_buf).await {
        io.abort();
    }
}

fn empty() -> Body {
    Full::new(Bytes::new())
        .map_err(|never| match never {})
        .boxed()
}

fn response(refusal: &Refusal) -> Response<Body> {
    let sentence = Bytes::from(format!("{refusal}\n"));
    let mut response = Response::new(Full::new(sentence).map_err(|never| match never {}).boxed());
    *response.status_mut() =
        StatusCode::from_u16(refusal.reason.http_status()).unwrap_or(StatusCode::BAD_GATEWAY);
    if let Ok(phrase) = ReasonPhrase::try_from(refusal.reason_phrase().into_bytes()) {
        response.extensions_mut().insert(phrase);
    }
    if refusal.reason == Reason::Unauthenticated {
        let challenge = HeaderValue::from_static("Basic realm=\"corvid\"");
        response
            .headers_mut()
            .insert(header::PROXY_AUTHENTICATE, challenge);
        // Strangers hold no connection: asked again and again, one would last for ever.
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_get_their_default_port() {
        let of = |text, port| destination(Some(text), port).map(|d| d.to_string()).ok();
        assert_eq!(of("edge1", Some(80)).as_deref(), Some("edge1:80"));
        assert_eq!(of("[fd00::1]", Some(80)).as_deref(), Some("[fd00::1]:80"));
        assert_eq!(of("edge1:9100", Some(80)).as_deref(), Some("edge1:9100"));
        assert_eq!(
            of("user:pw@edge1:9100", Some(80)).as_deref(),
            Some("edge1:9100")
        );
        assert_eq!(of("edge1", None), None);
    }

    #[test]
    fn the_proxys_credentials_go_no_further() {
        let mut headers = HeaderMap::new();
        headers.insert(header::PROXY_AUTHORIZATION, "Basic x".parse().unwrap());
        headers.insert(header::CONNECTION, "X-Private, close".parse().unwrap());
        headers.insert("x-private", "1".parse().unwrap());
        headers.insert(
            header::AUTHORIZATION,
            "Bearer for-the-exporter".parse().unwrap(),
        );
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers.keys().collect::<Vec<_>>(), [&header::AUTHORIZATION]);
    }
}
