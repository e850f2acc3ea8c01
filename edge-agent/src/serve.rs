//! One stream: header → policy → dial → reply → relay → record. Each step has its time limit; whatever goes wrong is
//! one [`Reason`], told to the server and written into the stream's record.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use daemon::chain;
use proto::asked::{gone, read_header, refuse, reply};
use proto::transport::{RecvHalf, SendHalf};
use proto::wire::StreamHeader;
use proto::{Budget, Early, Host, Local, Reason, Relay, RelayEnd, SocketBuffer, relay};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::Timeouts;
use crate::dial::{self, dial};
use crate::files::{FilePermit, Files};
use crate::metrics::AgentMetrics;
use crate::own::OwnAddresses;
use crate::policy::Policy;
use crate::record::Record;
use crate::resolve::Resolver;
use crate::session::Live;

/// What serving a stream needs.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) policy: ArcSwap<Policy>,
    pub(crate) own: OwnAddresses,
    pub(crate) resolver: Resolver,
    pub(crate) files: Files,
    pub(crate) budget: Budget,
    pub(crate) timeouts: Timeouts,
    pub(crate) metrics: AgentMetrics,
    /// Cancelled once new streams are refused.
    pub(crate) refusing: CancellationToken,
    /// Cancelled when what still runs is cut.
    pub(crate) cut: CancellationToken,
}

/// Why a stream did not come to its relay: the reason and the words for whoever asked.
type Refusal = (Reason, String);

/// Serves one stream to its end. `lost` resolves a while after its session is over.
pub(crate) async fn serve<S: SendHalf, R: RecvHalf>(
    serving: Arc<Serving>,
    session: Option<Arc<Live>>,
    (mut send, recv): (S, R),
    lost: impl Future<Output = Reason> + Send,
) {
    let mut record = Record::new(serving.metrics.clone(), session);
    let (read, mut recv, mut early) = read_header(recv).await;
    let header = match read {
        Ok(header) => header,
        Err(error) => {
            record.failed(error.reason(), &chain(&error).to_string());
            send.reset(error.reason());
            recv.reset(error.reason());
            return;
        }
    };
    let reached = match StreamHeader::from_pb(&header) {
        Err(error) => Err((Reason::BadRequest, chain(&error).to_string())),
        Ok(header) => {
            record.asked(&header.destination, &header.trace);
            tokio::select! {
                biased;
                reason = gone(&mut recv, &mut early) => {
                    // Nobody is left to answer.
                    record.failed(reason, "while dialling");
                    send.reset(reason);
                    recv.reset(reason);
                    return;
                }
                () = serving.cut.cancelled() => Err(stopping()),
                reached = reach(&serving, &header, &mut record) => reached,
            }
        }
    };
    match reached {
        Err((reason, detail)) => {
            record.failed(reason, &detail);
            refuse(send, recv, reason, detail).await;
        }
        Ok((mut stream, buffer, _permit)) => {
            if let Err(reason) = reply(&mut send, &Ok(())).await {
                record.failed(reason, "while replying");
                dial::abort(&stream);
                return;
            }
            let end = run(
                &serving,
                &record,
                (&mut send, &mut recv),
                (&mut stream, &buffer),
                early.freeze(),
                lost,
            )
            .await;
            if let RelayEnd::Cut(_) = end {
                dial::abort(&stream);
            }
            record.relayed(end);
        }
    }
}

fn stopping() -> Refusal {
    (Reason::Draining, "the agent is stopping".to_owned())
}

/// Policy, then dial.
async fn reach(
    serving: &Serving,
    header: &StreamHeader,
    record: &mut Record,
) -> Result<(TcpStream, SocketBuffer, FilePermit), Refusal> {
    if serving.refusing.is_cancelled() {
        return Err(stopping());
    }
    let asked = Some(header.deadline).filter(|deadline| !deadline.is_zero());
    let limit = asked
        .unwrap_or(serving.timeouts.dial)
        .min(serving.timeouts.dial);
    let started = Instant::now();
    let targets = targets(serving, header, limit).await?;
    let permit = serving.files.take().ok_or_else(|| {
        (
            Reason::FilesExhausted,
            "the agent's open files are near their limit".to_owned(),
        )
    })?;
    let buffer = serving.budget.socket_buffer();
    let (stream, address) = dial(&targets, buffer.bytes(), started + limit)
        .await
        .map_err(|error| (error.reason(), chain(&error).to_string()))?;
    record.dialled(address, started);
    Ok((stream, buffer, permit))
}

/// The addresses to dial: decided about one by one, after names are resolved.
async fn targets(
    serving: &Serving,
    header: &StreamHeader,
    limit: Duration,
) -> Result<Vec<SocketAddr>, Refusal> {
    let policy = serving.policy.load_full();
    let own = serving.own.with(&policy.node_addresses);
    let destination = &header.destination;
    if policy.is_node(&destination.host) {
        return policy
            .node_targets(&own, destination.port)
            .map_err(|denied| (denied.reason(), denied.to_string()));
    }
    let resolved = serving
        .resolver
        .resolve(destination, limit)
        .await
        .map_err(|error| (error.reason(), chain(&error).to_string()))?;
    let mut denied = None;
    let mut targets = Vec::new();
    for address in resolved {
        match policy.target(&own, address.ip(), address.port(), header.pod.as_ref()) {
            Ok(target) => targets.push(target),
            Err(error) => denied = denied.or(Some(error)),
        }
    }
    match denied {
        Some(denied) if targets.is_empty() => {
            let detail = match &destination.host {
                Host::Ip(_) => denied.to_string(),
                Host::Name(name) => format!("{name}: {denied}"),
            };
            Err((denied.reason(), detail))
        }
        Some(_) | None => Ok(targets),
    }
}

async fn run<S: SendHalf, R: RecvHalf>(
    serving: &Serving,
    record: &Record,
    tunnel: (&mut S, &mut R),
    (stream, buffer): (&mut TcpStream, &SocketBuffer),
    early: Bytes,
    lost: impl Future<Output = Reason> + Send,
) -> RelayEnd {
    let settings = Relay {
        local: Local::Destination,
        budget: serving.budget.clone(),
        local_buffer: buffer.cost(),
        half_open: serving.timeouts.half_open,
        counters: record.counters(),
    };
    let early = Early {
        from_tunnel: early,
        from_local: Bytes::new(),
    };
    let stop = async {
        tokio::select! {
            () = serving.cut.cancelled() => Reason::Draining,
            reason = lost => reason,
        }
    };
    relay(&settings, tunnel, stream, early, stop).await
}

#[cfg(test)]
mod tests;
