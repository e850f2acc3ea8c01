//! Connections that are meant for nodes and led here by DNS, a Service or firewall rules, for control planes whose flags
//! can't be changed. They carry no request of ours: the destination is what the connection itself gives away, and every
//! byte of it goes on unchanged. TLS is never ended here.
//!
//! States of a connection, in order; all up to `open` share the limit `timeouts.header`:
//!
//! | state | what | failure | what the requester sees |
//! | --- | --- | --- | --- |
//! | header | from `proxyProtocol.trusted` only: a PROXY header, required | none, or malformed; late | a reset (`bad_request`, `timeout`) |
//! | admit | a rule of `allow` must name the source, the header's if there is one | none does | a reset (`not_allowed`); nothing was read |
//! | first flight | at most 16 KiB, until there is a whole ClientHello or HTTP head | too large, malformed | goes by the original destination, else an alert, `400`/`431`, or a reset |
//! | | | a PROXY header | the same way, whatever the original destination (`not_allowed`) |
//! | | | begun and not ended in time | an alert, `504` (`timeout`) |
//! | | | nothing came | goes by the original destination after 2 s, else a reset (`timeout`) |
//! | | | hung up: before a byte, or within | nothing; `bad_request` in the log |
//! | | | we are stopping | an alert, `503`, a reset (`draining`) |
//! | decide | name, else original destination (`intercept/destination.rs`) | neither | alert `unrecognized_name`, `403`, a reset (`unknown_destination`) |
//! | | | two nodes share the address | the same with `ambiguous_destination` |
//! | | | it is our own dial by a line, led back by rules of this machine | the same with `forbidden_destination` |
//! | open | [`Forwarder::open`] | no rule permits that node and port | alert `access_denied`, `403`, a reset (`not_allowed`) |
//! | | | no session, refused, denied, … | alert `internal_error` or `access_denied`; the status and the sentence; a reset |
//! | relay | what was read goes first | cut | a reset |
//!
//! An original destination comes from a PROXY header, `SO_ORIGINAL_DST`, or, with `transparent`, is the address the
//! connection was accepted at. One of our own listeners counts for nothing: that way lies a loop.

mod answer;
mod client_hello;
mod destination;
mod flight;
mod proxy_header;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::{BufMut, BytesMut};
use daemon::{Peer, Stream};
use destination::Clues;
use flight::{Malformed, Named, Speech};
use proto::{Destination, Reason, RelayEnd};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::config::{self, Cidr, Elsewhere};
use crate::error::Refusal;
use crate::frontend::policy::{Policy, Requester};
use crate::path::{Ends, direct};
use crate::record::{Outcome, Path};
use crate::route::Route;
use crate::serve::{Forwarder, Request};

/// Metric label.
const NAME: &str = "intercept";
/// How long a requester is waited for that need not speak first: it may be one that never does. TLS clients speak at
/// once; one that is slower is served by its original destination, too.
const SILENCE: Duration = Duration::from_secs(2);
/// What is kept of what a requester sends while its stream is being opened; more waits in its socket.
const MAX_EARLY: usize = flight::MAX + (16 << 10);
/// Read at once.
const CHUNK: usize = 2 << 10;

/// One listener.
#[derive(Debug)]
pub struct Intercept {
    forwarder: Arc<Forwarder>,
    settings: ArcSwap<Settings>,
    /// Who may ask for what.
    pub(crate) policy: ArcSwap<Policy>,
    /// The port that is listened on.
    bound: u16,
    transparent: bool,
    /// Cancelled when no more requests are taken.
    stop: CancellationToken,
}

/// What a reload may change.
#[derive(Debug)]
struct Settings {
    port: u16,
    trusted: Vec<Cidr>,
}

impl Settings {
    fn new(settings: &config::Intercept, bound: u16) -> Self {
        let trusted = settings.proxy_protocol.as_ref();
        Self {
            port: settings.port.unwrap_or(bound),
            trusted: trusted.map_or_else(Vec::new, |p| p.trusted.clone()),
        }
    }

    fn trusts(&self, ip: IpAddr) -> bool {
        self.trusted.iter().any(|net| net.contains(ip))
    }
}

/// Why a connection ends before there is a request.
#[derive(Debug)]
enum Stop {
    /// It hung up without a word, as load balancers' probes do.
    Gone,
    /// It can't be served.
    Refused(Refusal),
}

fn stop(reason: Reason, sentence: &str) -> Stop {
    Stop::Refused(Refusal {
        reason,
        sentence: sentence.to_owned(),
    })
}

fn late(_elapsed: tokio::time::error::Elapsed) -> Stop {
    stop(Reason::Timeout, "no request came in time")
}

impl Intercept {
    /// The front of a listener at port `bound`; `stop` is cancelled when no more requests are taken.
    #[must_use]
    pub fn new(
        forwarder: Arc<Forwarder>,
        settings: &config::Intercept,
        policy: Policy,
        bound: u16,
        stop: CancellationToken,
    ) -> Self {
        Self {
            forwarder,
            policy: ArcSwap::from_pointee(policy),
            settings: ArcSwap::from_pointee(Settings::new(settings, bound)),
            bound,
            transparent: settings.transparent,
            stop,
        }
    }

    /// Takes new settings for connections to come.
    pub(crate) fn change(&self, settings: &config::Intercept) {
        self.settings
            .store(Arc::new(Settings::new(settings, self.bound)));
    }

    /// Serves one connection.
    pub async fn serve(self: Arc<Self>, mut stream: Stream, peer: Peer) {
        let mut requester = Requester::new(&peer);
        let mut buffer = BytesMut::new();
        let read = self.destination(&stream, &peer, &mut requester, &mut buffer);
        let destination = match read.await {
            Ok(destination) => destination,
            Err(Stop::Gone) => return,
            Err(Stop::Refused(refusal)) => {
                let failed = Outcome::Failed(refusal.reason);
                self.forwarder.metrics.stream(NAME, Path::None, failed);
                tracing::info!(target: "audit", frontend = NAME, %requester, from = requester.source(), reason = refusal.reason.label(), said = %refusal, "connection refused");
                return answer::refuse(stream, Speech::of(&buffer), &refusal).await;
            }
        };
        let speech = Speech::of(&buffer);
        let request = Request {
            frontend: NAME,
            requester,
            destination,
            elsewhere: Elsewhere::Refuse,
            policy: self.policy.load_full(),
        };
        let gone = until_gone(&stream, &mut buffer, speech);
        match self.forwarder.open(request, gone).await {
            Err(refusal) if refusal.reason == Reason::Cancelled => {}
            Err(refusal) => answer::refuse(stream, speech, &refusal).await,
            Ok(opened) => {
                if let RelayEnd::Cut(_) = opened.relay(&mut stream, buffer.freeze()).await {
                    stream.abort();
                }
            }
        }
    }

    /// Everything up to the destination; what was read stays in `buffer`, a PROXY header apart.
    async fn destination(
        &self,
        stream: &Stream,
        peer: &Peer,
        requester: &mut Requester,
        buffer: &mut BytesMut,
    ) -> Result<Destination, Stop> {
        let settings = self.settings.load_full();
        let deadline = Instant::now() + self.forwarder.timeouts.header;
        let peer = peer.tcp().ok_or(Stop::Gone)?;
        let ends = if settings.trusts(peer.ip()) {
            self.proxy_header(stream, buffer, deadline).await?
        } else {
            None
        };
        let (source, original) = match ends {
            Some(ends) => {
                *requester = Requester::from_source(ends.source, Some(peer));
                (ends.source, Some(ends.destination))
            }
            None => {
                *requester = Requester::from_source(peer, None);
                (peer, self.original(stream))
            }
        };
        self.policy.load().hear(requester).map_err(Stop::Refused)?;
        let own = self.forwarder.own.load_full();
        let original = original.filter(|address| !direct::is_own(*address, &own));
        let mut clues = Clues {
            named: None,
            original,
        };
        let at_edge = |to: &Destination| {
            let route = self.forwarder.route(to, Elsewhere::Refuse)?;
            Ok(matches!(route, Route::Edge { .. }))
        };
        let need_no_name = clues.need_no_name(&at_edge);
        let patience = if need_no_name {
            deadline.min(Instant::now() + SILENCE)
        } else {
            deadline
        };
        let unread = match self.name(stream, buffer, patience, deadline).await {
            Ok(named) => {
                clues.named = named;
                None
            }
            Err(Unread::Stop(stop)) => return Err(stop),
            Err(Unread::Nameless(refusal)) => Some(refusal),
        };
        // Only now: whoever dialled it has begun to relay.
        let led_back = |to| self.forwarder.paths.is_led_back(Ends::new(source, to));
        if original.is_some_and(led_back) {
            return Err(stop(
                Reason::ForbiddenDestination,
                "a dial of this server by a line was led back here: rules of this machine don't exempt its mark",
            ));
        }
        match clues.destination(settings.port, &at_edge) {
            Ok(Some(destination)) => Ok(destination),
            Ok(None) => Err(Stop::Refused(unread.unwrap_or_else(|| Refusal {
                reason: Reason::UnknownDestination,
                sentence: clues.tell(),
            }))),
            Err(shared) => Err(Stop::Refused(shared)),
        }
    }

    /// The address that was dialled, as far as this machine's own rules hide or keep it.
    fn original(&self, stream: &Stream) -> Option<SocketAddr> {
        let accepted = || self.transparent.then(|| stream.local_addr()).flatten();
        stream.original_dst().or_else(accepted)
    }

    async fn proxy_header(
        &self,
        stream: &Stream,
        buffer: &mut BytesMut,
        deadline: Instant,
    ) -> Result<Option<proxy_header::Ends>, Stop> {
        loop {
            match proxy_header::parse(buffer) {
                Ok(Some((ends, length))) => {
                    drop(buffer.split_to(length));
                    return Ok(ends);
                }
                Ok(None) => {}
                Err(proxy_header::NoHeader) => {
                    // What it speaks is not known to be its requester's.
                    buffer.clear();
                    return Err(stop(
                        Reason::BadRequest,
                        "no PROXY header, which is required from there",
                    ));
                }
            }
            let begun = !buffer.is_empty();
            match self.more(stream, buffer, flight::MAX, deadline).await? {
                0 if begun => {
                    return Err(stop(Reason::BadRequest, "ended within its PROXY header"));
                }
                0 => return Err(Stop::Gone),
                _ => {}
            }
        }
    }

    /// The name in the first flight, if it has one.
    async fn name(
        &self,
        stream: &Stream,
        buffer: &mut BytesMut,
        patience: Instant,
        deadline: Instant,
    ) -> Result<Option<Named>, Unread> {
        loop {
            let begun = !buffer.is_empty();
            if begun {
                match flight::name(buffer) {
                    Ok(Some(named)) => return Ok(named),
                    Ok(None) => {}
                    Err(malformed) => return Err(unread(malformed)),
                }
            }
            let until = if begun { deadline } else { patience };
            let end = match self.more(stream, buffer, flight::MAX, until).await {
                Ok(count) => count == 0,
                Err(Stop::Refused(refusal)) if !begun && refusal.reason == Reason::Timeout => {
                    return Err(Unread::Nameless(refusal));
                }
                Err(stop) => return Err(Unread::Stop(stop)),
            };
            if end && begun {
                let stop = stop(Reason::BadRequest, "the request ended within its head");
                return Err(Unread::Stop(stop));
            }
            if end {
                return Err(Unread::Stop(Stop::Gone));
            }
        }
    }

    /// Reads what comes next, up to `most` bytes in `buffer`; 0 is the end. A connection that says nothing holds no buffer.
    async fn more(
        &self,
        stream: &Stream,
        buffer: &mut BytesMut,
        most: usize,
        deadline: Instant,
    ) -> Result<usize, Stop> {
        let read = timeout_at(deadline, read_some(stream, buffer, most));
        tokio::select! {
            biased;
            read = read => Ok(read.map_err(late)?.unwrap_or(0)),
            () = self.stop.cancelled() => Err(stop(Reason::Draining, "proxy-server: stopping")),
        }
    }
}

/// Why there is no name.
#[derive(Debug)]
enum Unread {
    /// An original destination will do.
    Nameless(Refusal),
    /// Whatever else there is.
    Stop(Stop),
}

fn unread(malformed: Malformed) -> Unread {
    let (reason, sentence) = match malformed {
        Malformed::ProxyHeader => {
            let sentence = "a PROXY header from a source that is not in `proxyProtocol.trusted`";
            return Unread::Stop(stop(Reason::NotAllowed, sentence));
        }
        Malformed::Tls => (Reason::BadRequest, "it begins as TLS and is no ClientHello"),
        Malformed::Http => (Reason::BadRequest, "the request is not HTTP/1.1"),
        Malformed::Neither => (Reason::BadRequest, "it is neither TLS nor HTTP"),
        Malformed::TooLarge => (Reason::TooLarge, "the first flight is larger than 16 KiB"),
    };
    Unread::Nameless(Refusal {
        reason,
        sentence: sentence.to_owned(),
    })
}

/// Reads once, without holding room meanwhile. Cancel-safe.
async fn read_some(stream: &Stream, buffer: &mut BytesMut, most: usize) -> std::io::Result<usize> {
    loop {
        stream.readable().await?;
        let room = most.saturating_sub(buffer.len()).min(CHUNK);
        buffer.reserve(room);
        match stream.try_read_buf(&mut (&mut *buffer).limit(room)) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            read => return read,
        }
    }
}

/// Resolves when the requester hangs up. What it sends meanwhile is kept, up to a limit.
async fn until_gone(stream: &Stream, early: &mut BytesMut, speech: Speech) {
    while early.len() < MAX_EARLY {
        match read_some(stream, early, MAX_EARLY).await {
            // Nobody ends one way of TLS before the other side has said anything. Others may have said all they had to.
            Ok(0) if speech != Speech::Tls => break,
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
    std::future::pending::<()>().await;
}
