//! To the edge by whatever way: the tunnel, a line, or both beside one another.
//!
//! | path | what is tried | who asked is told |
//! | --- | --- | --- |
//! | `tunnel` | the tunnel | its failure |
//! | `direct` | the line, until `timeouts.dial` | its failure, with the line's name |
//! | `direct`, and no line may be taken | nothing | why: who else has the address, or that none is known |
//! | `auto`, what is dialled by the line comes back here | the tunnel | its failure |
//! | `auto`, the node or the line is down | the tunnel; after four times `path.raceAfter`, or at once when it fails, the line beside it | the same as below |
//! | `auto`, else | the line; after `path.raceAfter`, or at once when it fails, the tunnel beside it | the tunnel's failure with the line's; the line's where there is no session |
//!
//! What answers first is used, the line where both do. The other is dropped: not a byte of the request is on it. The word
//! of an agent that has dialled, or will not, is final, as there is one destination; a tunnel that fails otherwise leaves
//! the line its time. A line that is down may be back before it is trusted again, and a session may be silent: so neither
//! is waited for alone.
//!
//! What runs over a line that goes silent is cut after `path.silence`: see [`silence`](crate::path::silence).

use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use proto::Reason;
use proto::transport::tcp;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use super::open::{Ask, Failure, Stream};
use super::tunnel::Reach;
use super::{Forwarder, Halves};
use crate::error::Refusal;
use crate::path::dial::{self, Failed};
use crate::path::health::Down;
use crate::path::policy::{Bypass, Decided, Decision, Unfit};
use crate::path::schedule::Key;
use crate::path::silence::Watch;
use crate::path::used::Use;
use crate::path::{Dialled, Ends, Known, Meant};
use crate::record::StreamRecord;

/// For so many times `path.raceAfter` the tunnel is alone where the line is down: a round trip to a far edge is no reason to
/// take what bounces.
const TRUST_IN_TUNNEL: u32 = 4;

/// What came of a race.
enum Won {
    Line(TcpStream),
    Tunnel(Stream),
    Nobody(Failure, Option<Failed>),
}

impl Forwarder {
    /// How that is reached now.
    pub(crate) fn path_of(&self, meant: Meant<'_>) -> Decided {
        let (routes, cluster) = (self.routing.table.load(), self.routing.cluster.table());
        let known = Known {
            routes: &routes,
            cluster: &cluster,
            servers: &|ip| self.leads_here(ip),
        };
        self.paths.decide(known, meant)
    }

    /// Whether a request for that goes by a line now, as far as is known.
    pub(crate) fn goes_by_line(&self, meant: Meant<'_>) -> bool {
        if self.paths.is_idle() {
            return false;
        }
        let decision = self.path_of(meant).decision;
        let way = self.paths.in_use(meant.node, &decision);
        matches!(way, Use::Line(_) | Use::Alone(..))
    }

    /// Whose that address is, if requests come to this server or another one by it.
    pub(crate) fn leads_here(&self, ip: IpAddr) -> Option<String> {
        let ip = ip.to_canonical();
        let published = self.routing.cluster.published();
        if let Some(published) = published.filter(|published| published.leads_here(ip)) {
            return Some(format!("proxy-servers, by the DNS map {}", published.map));
        }
        let is_member = self.peers.has_member(ip);
        is_member.then(|| "a proxy-server, by `peers`".to_owned())
    }

    /// Opens a stream to the edge.
    pub(super) async fn to_edge(
        &self,
        ask: &Ask,
        record: &mut StreamRecord,
    ) -> Result<(Halves, Bytes), Refusal> {
        if self.paths.is_idle() {
            return self.by_tunnel(ask, record).await;
        }
        let decided = self.path_of(Meant {
            node: &ask.node,
            to: &ask.destination,
            pod: ask.pod.as_ref(),
        });
        match decided.decision {
            Decision::Tunnel => self.by_tunnel(ask, record).await,
            Decision::Refused => Err(refused(ask, decided.unfit.as_ref())),
            Decision::Direct(bypass) => {
                let stream = self.by_line(ask, &bypass, record).await;
                let stream = stream.map_err(|failed| told(ask, &failed))?;
                Ok(self.direct(stream, &bypass, &ask.node))
            }
            Decision::Auto(bypass) => self.by_either(ask, &bypass, record).await,
        }
    }

    async fn by_tunnel(
        &self,
        ask: &Ask,
        record: &mut StreamRecord,
    ) -> Result<(Halves, Bytes), Refusal> {
        let tried = |way: &_| record.tried(way);
        let stream = self.tunnel(ask, Reach::Anywhere, tried).await;
        Ok(tunnelled(stream.map_err(|failure| failure.refusal(ask))?))
    }

    async fn by_line(
        &self,
        ask: &Ask,
        bypass: &Bypass,
        record: &mut StreamRecord,
    ) -> Result<TcpStream, Failed> {
        record.tried_line(&bypass.line);
        self.dial(ask, bypass).await
    }

    async fn by_either(
        &self,
        ask: &Ask,
        bypass: &Bypass,
        record: &mut StreamRecord,
    ) -> Result<(Halves, Bytes), Refusal> {
        let down = self.paths.is_down(&bypass.line.name, &ask.node);
        if down == Some(Down::LedBack) {
            return self.by_tunnel(ask, record).await;
        }
        let is_down = down.is_some();
        if !is_down {
            record.tried_line(&bypass.line);
        }
        match self.race(ask, bypass, is_down, record).await {
            Won::Line(stream) => {
                record.tried_line(&bypass.line);
                Ok(self.direct(stream, bypass, &ask.node))
            }
            Won::Tunnel(stream) => Ok(tunnelled(stream)),
            Won::Nobody(failure, None) => Err(failure.refusal(ask)),
            Won::Nobody(failure, Some(failed)) => Err(both(ask, &failure, &failed)),
        }
    }

    /// The line, and the tunnel beside it when that is slow or fails; where the line is down the other way round.
    async fn race(
        &self,
        ask: &Ask,
        bypass: &Bypass,
        is_down: bool,
        record: &mut StreamRecord,
    ) -> Won {
        let mut line = pin!(self.dial(ask, bypass));
        let mut tunnel = pin!(self.tunnel(ask, Reach::Anywhere, |way| record.tried(way)));
        let race_after = self.paths.settings.race_after;
        let patience = if is_down {
            race_after * TRUST_IN_TUNNEL
        } else {
            race_after
        };
        let mut alone = pin!(sleep(patience));
        let (mut by_line, mut by_tunnel) = (!is_down, is_down);
        let (mut failed, mut lost) = (None, None);
        loop {
            tokio::select! {
                biased;
                dialled = &mut line, if by_line && failed.is_none() => match (dialled, lost.take()) {
                    (Ok(stream), _) => return Won::Line(stream),
                    (Err(error), Some(failure)) => return Won::Nobody(failure, Some(error)),
                    (Err(error), None) => {
                        failed = Some(error);
                        by_tunnel = true;
                    }
                },
                opened = &mut tunnel, if by_tunnel && lost.is_none() => match opened {
                    Ok(stream) => {
                        if by_line && failed.is_none() {
                            self.paths.metrics.dialled(&bypass.line.name, "lost");
                        }
                        return Won::Tunnel(stream);
                    }
                    Err(failure) if failed.is_some() || failure.is_final() => {
                        return Won::Nobody(failure, failed);
                    }
                    Err(failure) => {
                        lost = Some(failure);
                        by_line = true;
                    }
                },
                () = &mut alone, if !(by_line && by_tunnel) => {
                    (by_line, by_tunnel) = (true, true);
                    if !is_down {
                        self.paths.suspect(Key::new(bypass, &ask.node));
                    }
                }
            }
        }
    }

    async fn dial(&self, ask: &Ask, bypass: &Bypass) -> Result<TcpStream, Failed> {
        let (port, begun) = (ask.destination.port, Instant::now());
        let dialled = self.dial_by(bypass, port, ask.deadline).await;
        let took = begun.elapsed();
        let failed = dialled.as_ref().err();
        match failed {
            None => self.paths.metrics.connected(&bypass.line.name, took),
            Some(failed) => {
                let why = failed.reason.label();
                self.paths.metrics.dialled(&bypass.line.name, why);
            }
        }
        self.paths.saw(&ask.node, bypass, port, failed, took);
        dialled
    }

    /// Dials, and counts nothing.
    pub(crate) async fn dial_by(
        &self,
        bypass: &Bypass,
        port: u16,
        deadline: Instant,
    ) -> Result<TcpStream, Failed> {
        let own = self.own.load_full();
        let settings = dial::Settings {
            own: &own,
            mark: self.mark,
            silence: self.paths.settings.silence,
        };
        dial::dial(bypass, port, settings, deadline).await
    }

    fn direct(&self, stream: TcpStream, bypass: &Bypass, node: &str) -> (Halves, Bytes) {
        let ends = stream.local_addr().and_then(|from| {
            let to = stream.peer_addr()?;
            Ok(Ends::new(from, to))
        });
        let stream = Arc::new(stream);
        let by_line = ByLine {
            watch: Watch::new(Arc::clone(&stream), self.paths.settings.silence),
            key: Key::new(bypass, node),
            _dialled: ends
                .ok()
                .map(|ends| self.paths.remember(ends, &bypass.line)),
        };
        let (send, recv) = tcp::halves(stream);
        (Halves::Direct(send, recv, Some(by_line)), Bytes::new())
    }
}

/// What belongs to a connection by a line.
#[derive(Debug)]
pub(super) struct ByLine {
    pub(super) watch: Watch,
    /// Of whom a silence tells.
    pub(super) key: Key,
    _dialled: Option<Dialled>,
}

fn tunnelled(stream: Stream) -> (Halves, Bytes) {
    let halves = Halves::Tunnel(stream.carried, stream.send, stream.recv);
    (halves, stream.early)
}

fn subject(ask: &Ask) -> String {
    format!("node {}", ask.node)
}

fn told(ask: &Ask, failed: &Failed) -> Refusal {
    Refusal::detailed(subject(ask), failed.reason, &failed.detail)
}

/// Neither way led there.
fn both(ask: &Ask, failure: &Failure, failed: &Failed) -> Refusal {
    if failure.reason == Reason::NoSession {
        let Refusal { reason, sentence } = told(ask, failed);
        let by_tunnel = failure.refusal(ask).sentence;
        let sentence = format!("{sentence}; by the tunnel {by_tunnel}");
        return Refusal { reason, sentence };
    }
    let Refusal { reason, sentence } = failure.refusal(ask);
    let said = failed.reason.sentence();
    let sentence = format!("{sentence}; {said}: {}", failed.detail);
    Refusal { reason, sentence }
}

fn refused(ask: &Ask, unfit: Option<&Unfit>) -> Refusal {
    let reason = match unfit {
        Some(Unfit::Shared { .. } | Unfit::SeveralLines { .. }) => Reason::AmbiguousDestination,
        Some(Unfit::LeadsBack { .. }) => Reason::ForbiddenDestination,
        Some(Unfit::NoAddress) | None => Reason::DialUnreachable,
    };
    let why = unfit.map(Unfit::to_string).unwrap_or_default();
    Refusal::detailed(
        subject(ask),
        reason,
        &format!("its path is direct, and {why}"),
    )
}
