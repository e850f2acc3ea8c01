//! What another server asks for: one stream, to an agent that has a session here.
//!
//! | step | failure | what the other server is answered |
//! | --- | --- | --- |
//! | header | none in time, garbage | nothing: a reset with `timeout` or `protocol` |
//! | header | no agent, no destination, not exactly one hop | `protocol` |
//! | permits | none left; this server stops | `overloaded`; `draining` |
//! | pick | no session here | `no_session`; nobody else is asked |
//! | open, reply | as for a request that entered here | the agent's reason and words, or ours |
//! | relay | any | a reset with the reason, both ways |
//!
//! Whether the requester may ask was decided where the request entered; its words are in the record.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::BytesMut;
use daemon::Peer;
use proto::asked::{gone, read_header, refuse, reply};
use proto::transport::quic::{QuicRecv, QuicSend, QuicSession};
use proto::transport::{RecvHalf, SendHalf};
use proto::wire::ForwardHeader;
use proto::{Early, Local, Reason, Relay, RelayEnd, relay_streams, session_over};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::{Accepted, Acceptor};
use crate::config::Elsewhere;
use crate::frontend::policy::{Policy, Requester, Who};
use crate::record::{Outcome, StreamRecord};
use crate::serve::open::{Ask, Failure, Stream, Way};
use crate::serve::tunnel::Reach;
use crate::serve::{Forwarder, Request};

/// Metric label and log field of what other servers ask for.
const FRONTEND: &str = "peer";

/// Serves one stream to its end.
pub(super) async fn serve(
    acceptor: Arc<Acceptor>,
    from: Arc<Accepted<QuicSession>>,
    (mut send, recv): (QuicSend, QuicRecv),
) {
    let _open = Open::new(&from);
    let (read, mut recv, mut early) = read_header(recv).await;
    let metrics = &acceptor.forwarder.peers.metrics;
    let header = match read {
        Ok(header) => header,
        Err(error) => {
            let reason = error.reason();
            metrics.bad_headers.inc();
            tracing::info!(server = %from.server, reason = reason.label(), error = %daemon::chain(&error), "a peer asked for nothing that can be read");
            send.reset(reason);
            recv.reset(reason);
            return;
        }
    };
    let header = match ForwardHeader::from_pb(&header) {
        Ok(header) => header,
        Err(error) => {
            metrics.bad_headers.inc();
            let why = daemon::chain(&error).to_string();
            tracing::warn!(server = %from.server, error = why, "a peer asked for what is never served");
            return refuse(send, recv, Reason::Protocol, why).await;
        }
    };
    let forwarder = &acceptor.forwarder;
    let mut record = record(forwarder, &from, &header);
    let found = tokio::select! {
        biased;
        reason = gone(&mut recv, &mut early) => {
            // Nobody is left to answer.
            record.end(Outcome::Failed(reason), "");
            send.reset(reason);
            recv.reset(reason);
            return;
        }
        found = find(&acceptor, &header, &mut record) => found,
    };
    let (stream, _permit) = match found {
        Ok(found) => found,
        Err(failure) => {
            record.end(Outcome::Failed(failure.reason), &failure.detail);
            return refuse(send, recv, failure.reason, failure.detail).await;
        }
    };
    if let Err(reason) = reply(&mut send, &Ok(())).await {
        record.end(Outcome::Failed(reason), "");
        return;
    }
    record.answered();
    let end = Box::pin(run(forwarder, &record, &from, (send, recv), stream, early)).await;
    let outcome = match end {
        RelayEnd::Finished => Outcome::Ok,
        RelayEnd::Cut(reason) => Outcome::Failed(reason),
    };
    record.end(outcome, "");
}

/// Counts a stream on the session that it came by.
struct Open(Arc<Accepted<QuicSession>>);

impl Open {
    fn new(from: &Arc<Accepted<QuicSession>>) -> Self {
        from.streams.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(from))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

fn record(
    forwarder: &Forwarder,
    from: &Accepted<QuicSession>,
    header: &ForwardHeader,
) -> StreamRecord {
    let peer = Peer::Tcp(from.remote());
    let asked = header.requester.clone();
    let who = Who::Peer {
        server: from.server.to_string(),
        asked,
    };
    let request = Request {
        frontend: FRONTEND,
        requester: Requester::new(&peer).proved(who),
        destination: header.header.destination.clone(),
        elsewhere: Elsewhere::Refuse,
        policy: Arc::new(Policy::Open),
    };
    let mut record = StreamRecord::new(&forwarder.metrics, &request);
    record.node.clone_from(&header.node);
    record
}

/// A permit, and a stream on a session of the agent with this very server.
async fn find(
    acceptor: &Acceptor,
    header: &ForwardHeader,
    record: &mut StreamRecord,
) -> Result<(Stream, OwnedSemaphorePermit), Failure> {
    let here = |reason: Reason| Failure {
        reason,
        detail: format!("at {}", acceptor.offer.server),
        another: false,
        answered: false,
    };
    if acceptor.refusing.is_cancelled() {
        return Err(here(Reason::Draining));
    }
    let forwarder = &acceptor.forwarder;
    let permit = forwarder.limits.stream().map_err(here)?;
    let _pending = forwarder.limits.pending_dial().map_err(here)?;
    let limit = header.header.deadline.min(forwarder.timeouts.dial);
    let ask = Ask {
        agent: header.agent.clone(),
        node: header.node.clone(),
        destination: header.header.destination.clone(),
        pod: header.header.pod.clone(),
        requester: header.requester.clone(),
        deadline: Instant::now() + limit,
    };
    let tried = |way: &Way| record.tried(way);
    let stream = forwarder.tunnel(&ask, Reach::Here, tried).await?;
    Ok((stream, permit))
}

async fn run(
    forwarder: &Forwarder,
    record: &StreamRecord,
    from: &Accepted<QuicSession>,
    (mut send, mut recv): (QuicSend, QuicRecv),
    mut stream: Stream,
    early: BytesMut,
) -> RelayEnd {
    let settings = Relay {
        local: Local::Requester,
        budget: forwarder.budget.clone(),
        local_buffer: 0,
        half_open: forwarder.timeouts.half_open,
        counters: Arc::clone(&record.counters),
    };
    let early = Early {
        from_local: early.freeze(),
        from_tunnel: std::mem::take(&mut stream.early),
    };
    let stop = async {
        tokio::select! {
            () = forwarder.cut.cancelled() => Reason::Draining,
            reason = session_over(stream.carried.0.transport()) => reason,
            reason = session_over(&from.transport) => reason,
        }
    };
    let requester = (&mut send, &mut recv);
    let edge = (&mut stream.send, &mut stream.recv);
    relay_streams(&settings, requester, edge, early, stop).await
}
