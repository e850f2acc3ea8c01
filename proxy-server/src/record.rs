//! One line in the access log and the counters for each request, written when its guard is dropped, whatever happened.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proto::{Counters, Destination, Reason};
use tokio::time::Instant;

use crate::config::Line;
use crate::metrics::Metrics;
use crate::serve::Request;
use crate::serve::open::Way;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Both ways with their end of file.
    Ok,
    /// Not well.
    Failed(Reason),
}

impl Outcome {
    /// Metric label and log field.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed(reason) => reason.label(),
        }
    }
}

/// Which way a request took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// None yet.
    None,
    /// Through an agent's session.
    Tunnel,
    /// Through a session of an agent at another server.
    Peer,
    /// Dialled from here.
    Direct,
}

impl Path {
    /// Metric label and log field.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Tunnel => "tunnel",
            Self::Peer => "peer",
            Self::Direct => "direct",
        }
    }
}

/// The record of one request. Dropped without [`StreamRecord::end`] it says [`Reason::Internal`] after a panic, else
/// [`Reason::Cancelled`]: hyper drops what it serves when the requester hangs up.
#[derive(Debug)]
pub struct StreamRecord {
    metrics: Arc<Metrics>,
    frontend: &'static str,
    requester: String,
    /// From where.
    from: String,
    destination: Destination,
    /// Which way it took.
    pub path: Path,
    /// The node, once routed.
    pub node: String,
    /// The session, once picked: the agent's, or that with the other server.
    pub session: String,
    /// The other server, if it goes through one.
    pub via: String,
    /// The line, if it is dialled by one.
    pub line: Option<Arc<Line>>,
    /// The line that the agent's session goes over. The agent's word: logged, and no label of metrics.
    over: Option<String>,
    /// What moved.
    pub counters: Arc<Counters>,
    started: Instant,
    answered: Option<Instant>,
    outcome: Outcome,
    sentence: String,
}

impl StreamRecord {
    /// Begins with the request.
    #[must_use]
    pub fn new(metrics: &Arc<Metrics>, request: &Request) -> Self {
        metrics.streams_open.inc();
        Self {
            metrics: Arc::clone(metrics),
            frontend: request.frontend,
            requester: request.requester.to_string(),
            from: request.requester.source(),
            destination: request.destination.clone(),
            path: Path::None,
            node: String::new(),
            session: String::new(),
            via: String::new(),
            line: None,
            over: None,
            counters: Arc::default(),
            started: Instant::now(),
            answered: None,
            outcome: Outcome::Failed(Reason::Cancelled),
            sentence: String::new(),
        }
    }

    /// The way that is tried now, or that counts in the end.
    pub(crate) fn tried(&mut self, way: &Way) {
        self.session = way.id();
        self.line = None;
        self.over = way.line().map(str::to_owned);
        (self.path, self.via) = match way {
            Way::Agent(_) => (Path::Tunnel, String::new()),
            Way::Peer(peer) => (Path::Peer, peer.server.to_string()),
        };
    }

    /// The line that is tried now, or that counts in the end.
    pub(crate) fn tried_line(&mut self, line: &Arc<Line>) {
        self.path = Path::Direct;
        self.session.clear();
        self.via.clear();
        self.line = Some(Arc::clone(line));
        self.over = None;
    }

    /// The destination answered.
    pub fn answered(&mut self) {
        self.answered = Some(Instant::now());
        let line = self.line.as_ref().map(|line| line.name.as_str());
        self.metrics.opened(self.path, line, self.started.elapsed());
    }

    /// How it ended; `sentence` is what the requester was told, if anything.
    pub fn end(&mut self, outcome: Outcome, sentence: &str) {
        self.outcome = outcome;
        sentence.clone_into(&mut self.sentence);
    }
}

impl Drop for StreamRecord {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.outcome = Outcome::Failed(Reason::Internal);
        }
        self.metrics.streams_open.dec();
        self.metrics.stream(self.frontend, self.path, self.outcome);
        let (to_edge, from_edge) = (self.counters.sent(), self.counters.received());
        self.metrics.moved(to_edge, from_edge);
        let dial = self
            .answered
            .map(|at| at.duration_since(self.started).as_millis());
        let line = self.line.as_ref().map(|line| line.name.as_str());
        let line = line.or(self.over.as_deref());
        tracing::info!(
            target: "access",
            frontend = self.frontend,
            requester = self.requester,
            from = self.from,
            destination = %self.destination,
            node = self.node,
            path = self.path.label(),
            session = self.session,
            via = self.via,
            line,
            reason = self.outcome.label(),
            said = self.sentence,
            to_edge,
            from_edge,
            dial_ms = dial.and_then(|ms| u64::try_from(ms).ok()),
            ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "stream"
        );
    }
}

/// The record of one request over a kept connection of the forward proxy, whose stream has a record of its own. Only the
/// bytes of bodies count. Dropped without [`RequestRecord::end`] it says [`Reason::Cancelled`].
#[derive(Debug)]
pub struct RequestRecord {
    frontend: &'static str,
    requester: String,
    from: String,
    destination: Destination,
    /// The node, once routed.
    pub node: String,
    /// Of the URL, without the query, which may hold secrets.
    url_path: String,
    /// What the exporter answered.
    pub status: Option<u16>,
    /// Which way it was answered.
    pub path: Path,
    /// Bytes of the request's body.
    pub to_edge: Arc<AtomicU64>,
    /// Bytes of the answer's body.
    pub from_edge: u64,
    started: Instant,
    outcome: Outcome,
    sentence: String,
}

impl RequestRecord {
    /// Begins with the request.
    #[must_use]
    pub fn new(request: &Request, url_path: &str) -> Self {
        Self {
            frontend: request.frontend,
            requester: request.requester.to_string(),
            from: request.requester.source(),
            destination: request.destination.clone(),
            node: String::new(),
            url_path: url_path.to_owned(),
            status: None,
            path: Path::None,
            to_edge: Arc::default(),
            from_edge: 0,
            started: Instant::now(),
            outcome: Outcome::Failed(Reason::Cancelled),
            sentence: String::new(),
        }
    }

    /// How it ended; `sentence` is what the requester was told, if anything.
    pub fn end(&mut self, outcome: Outcome, sentence: &str) {
        self.outcome = outcome;
        sentence.clone_into(&mut self.sentence);
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        tracing::info!(
            target: "access",
            frontend = self.frontend,
            requester = self.requester,
            from = self.from,
            destination = %self.destination,
            node = self.node,
            path = self.path.label(),
            url_path = self.url_path,
            status = self.status,
            reason = self.outcome.label(),
            said = self.sentence,
            to_edge = self.to_edge.load(Ordering::Relaxed),
            from_edge = self.from_edge,
            ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "request"
        );
    }
}
