//! Connections to plain exporters, kept between scrapes: hyper's client over streams of the tunnel. One is used for the
//! way that it was opened for ([`Way`]) and no other.

use std::error::Error as _;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use daemon::Tasks;
use http::{Request as HttpRequest, Response, Uri};
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::{Destination, Reason, RelayEnd};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::time::timeout;

use super::NAME;
use super::body::Sent;
use super::way::Way;
use crate::config::Elsewhere;
use crate::error::Refusal;
use crate::frontend::policy::{Policy, Requester};
use crate::record::Path;
use crate::serve::{Forwarder, Request};

/// Scrape intervals are mostly 15 s to 60 s.
const IDLE: Duration = Duration::from_secs(90);
/// Connections kept for a destination: more than one scraper at once is rare.
const KEPT: usize = 2;
/// Between hyper and the relay.
const BUFFER: usize = 64 << 10;
/// For the head of an exporter's answer; Prometheus gives up after 10 s by default, and at most after its interval.
const ANSWER: Duration = Duration::from_secs(60);

/// The pool of a listener.
#[derive(Debug)]
pub struct Pool(ArcSwapOption<Client<Connector, Sent>>);

impl Pool {
    /// An empty pool; its connections are tasks of `tasks`.
    #[must_use]
    pub fn new(forwarder: Arc<Forwarder>, tasks: &Tasks) -> Self {
        let client = Client::builder(Owned(tasks.clone()))
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(KEPT)
            .build(Connector {
                forwarder,
                tasks: tasks.clone(),
            });
        Self(ArcSwapOption::from_pointee(client))
    }

    /// Closes what is idle and takes no more requests, so that a drain waits for running scrapes only.
    pub fn close(&self) {
        self.0.store(None);
    }

    /// Sends a request over a kept or new connection on that way.
    ///
    /// # Errors
    /// The refusal of the stream, or that the exporter does not answer.
    pub(super) async fn send(
        &self,
        mut request: HttpRequest<Sent>,
        way: &Way,
    ) -> Result<Response<Incoming>, Refusal> {
        let defect = || Refusal::about("proxy-server", Reason::Internal);
        *request.uri_mut() = way.uri(request.uri()).ok_or_else(defect)?;
        let Some(client) = self.0.load_full() else {
            return Err(Refusal::about("proxy-server", Reason::Draining));
        };
        let answer = timeout(ANSWER, client.request(request)).await;
        let late = |_elapsed| Refusal::about(&way.dialled, Reason::Timeout);
        answer
            .map_err(late)?
            .map_err(|error| refusal(&error, &way.dialled))
    }
}

/// Why the stream below was cut, if that is what the error comes from.
pub(super) fn cut(error: &(dyn std::error::Error + 'static)) -> Option<Reason> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let inner = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        if let Some(CutError(reason)) = inner.and_then(|inner| inner.downcast_ref()) {
            return Some(*reason);
        }
        cause = error.source();
    }
    None
}

/// What the client's error means: mostly a [`Refusal`] of the connector.
fn refusal(error: &ClientError, dialled: &Destination) -> Refusal {
    if let Some(reason) = cut(error) {
        return Refusal::about(dialled, reason);
    }
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(ConnectError(refusal)) = cause.downcast_ref() {
            return refusal.clone();
        }
        source = cause.source();
    }
    Refusal::detailed(
        dialled,
        Reason::DestinationReset,
        &daemon::chain(error).to_string(),
    )
}

/// Runs hyper's own tasks under an owner.
#[derive(Debug, Clone)]
struct Owned(Tasks);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Owned {
    fn execute(&self, task: F) {
        self.0.spawn("pool", task);
    }
}

/// Opens streams for the client.
#[derive(Debug, Clone)]
struct Connector {
    forwarder: Arc<Forwarder>,
    tasks: Tasks,
}

/// A refusal as the client's error.
#[derive(Debug, thiserror::Error)]
#[error("open a stream")]
struct ConnectError(Refusal);

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<Tunnelled>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ConnectError>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let Self { forwarder, tasks } = self.clone();
        Box::pin(async move {
            let defect = || ConnectError(Refusal::about("proxy-server", Reason::Internal));
            let way = Way::of(&uri).ok_or_else(defect)?;
            // The connection is shared by whoever may ask for this way; who asks was decided about before.
            let request = Request {
                frontend: NAME,
                requester: Requester::pool(),
                destination: way.dialled.clone(),
                elsewhere: Elsewhere::Refuse,
                policy: Arc::new(Policy::Open),
            };
            let opened = forwarder
                .open_on(request, way.route(), std::future::pending())
                .await;
            let opened = opened.map_err(ConnectError)?;
            let path = opened.path();
            // A line may be silent by the next scrape, and a request that is on its way is not tried again; and what had to
            // do without the line is to take it the next time.
            let is_kept = path != Path::Direct && !way.by_line;
            let (near, mut far) = tokio::io::duplex(BUFFER);
            let cut = Arc::new(OnceLock::new());
            let tell = Arc::clone(&cut);
            tasks.spawn("relay", async move {
                if let RelayEnd::Cut(reason) = opened.relay(&mut far, Bytes::new()).await {
                    tell.get_or_init(|| reason);
                }
            });
            Ok(TokioIo::new(Tunnelled {
                near,
                cut,
                path,
                is_kept,
            }))
        })
    }
}

/// The client's end of a stream. One that was cut ends with an error: an answer that is delimited by the end of its
/// connection must not look whole.
#[derive(Debug)]
struct Tunnelled {
    near: DuplexStream,
    cut: Arc<OnceLock<Reason>>,
    path: Path,
    /// For further requests.
    is_kept: bool,
}

/// Which way a connection takes, for whom is answered over it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Taken(pub(super) Path);

/// A stream was cut.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.sentence())]
struct CutError(Reason);

impl Tunnelled {
    fn cut(&self) -> Option<io::Error> {
        let reason = self.cut.get()?;
        Some(io::Error::new(
            io::ErrorKind::ConnectionReset,
            CutError(*reason),
        ))
    }
}

impl Connection for Tunnelled {
    fn connected(&self) -> Connected {
        let connected = Connected::new().extra(Taken(self.path));
        if !self.is_kept {
            connected.poison();
        }
        connected
    }
}

impl AsyncRead for Tunnelled {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let this = self.get_mut();
        let read = Pin::new(&mut this.near).poll_read(cx, buffer);
        let ended = matches!(read, Poll::Ready(Ok(()))) && buffer.filled().len() == before;
        match this.cut() {
            Some(cut) if ended => Poll::Ready(Err(cut)),
            Some(_) | None => read,
        }
    }
}

impl AsyncWrite for Tunnelled {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.near).poll_write(cx, bytes));
        Poll::Ready(written.map_err(|error| this.cut().unwrap_or(error)))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().near).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().near).poll_shutdown(cx)
    }
}
