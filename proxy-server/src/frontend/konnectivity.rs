//! konnectivity's `ProxyService`, as kube-apiserver's egress selector speaks it (`proxyProtocol: GRPC`), over a Unix
//! socket: gRPC over HTTP/2 without TLS, compatible with konnectivity-client 0.28 to 0.36.
//!
//! kube-apiserver opens a socket and one call for each connection. The protocol, and newer clients, know more: several
//! calls on a socket, several dials in a call. All are served. A connection within a call goes through these states:
//!
//! | state | event | what is said | next |
//! | --- | --- | --- | --- |
//! | none | DIAL_REQ (a packet without a type is one) | | dialling |
//! | | DIAL_REQ that is not tcp, has no address, is one too many, while we stop | DIAL_RSP with the sentence | none |
//! | dialling | the destination answers | DIAL_RSP, same random, our connectID (never 0) | open |
//! | | refused, too late, session lost | DIAL_RSP, same random, the refusal's sentence as it is | none |
//! | | DIAL_CLS | nothing; the dial is cancelled as far as the edge | none |
//! | open | DATA | to the destination; an empty one is dropped | open |
//! | | bytes of the destination | DATA of 1 byte to 64 KiB | open |
//! | | end of file of the destination | CLOSE_RSP behind the last DATA: the protocol has no half-close | closed |
//! | | CLOSE_REQ, or DIAL_CLS that crossed the answer | CLOSE_RSP at once | closed |
//! | | the relay is cut | CLOSE_RSP with the reason's sentence | none |
//! | closed | | nothing; the destination gets what is queued and an end of file, 30 s at most | none |
//! | any | the call or its socket ends | nothing | none: dials are cancelled, open connections reset |
//!
//! **A cut looks like an end.** The client gives its reader an end of file for a CLOSE_RSP with an error as for one without,
//! and for a call that ends with an error status as well; there is no third. CLOSE_RSP with the sentence is chosen as it
//! leaves the call's other connections alone, and as the client hands the sentence on from `Close`. What is carried is TLS,
//! whose reader notices that no close_notify came. Who needs to see cuts uses HTTP CONNECT over TCP.
//!
//! | failure | what happens |
//! | --- | --- |
//! | the requester stops reading | its call's HTTP/2 window closes, its relays stop, at most 4 packets wait; then the QUIC windows of these streams close. Other calls go on |
//! | a destination stops reading, alone in its call | 64 KiB and a packet are queued, then the call's window closes |
//! | a destination stops reading, others share the call | the same, but the window of a call is all there is to close, and it would stop the others: after 10 s the connection is cut as `slow_reader` |
//! | more than 1,024 dials and connections in a call | the dial is refused, `overloaded` |
//! | DATA or CLOSE_REQ of an unknown connectID | CLOSE_RSP with an error |
//! | a packet of unknown type, or whose payload is not of its type | passed over |
//! | a message over 4 MiB, garbage in place of one | the call ends |
//! | no call within `timeouts.header`, no dial within a call's first | the connection, the call ends |
//! | no rule names the requester | it may call once and dial once, to be told so; nothing larger than a dial is read of it |
//! | we stop | calls without connections end, new dials are refused, the rest may finish within the grace. The socket stays until then: the client would try for 30 s to reach one that is not there, and say nothing of why |
//!
//! kube-apiserver puts the socket's path into `:authority`, which no HTTP/2 server in Rust accepts; see `authority.rs`.

mod authority;
mod block;
mod call;
mod connection;
mod packet;
mod table;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use arc_swap::ArcSwap;
use authority::Readable;
use call::Call;
use daemon::{Peer, Stream, Tasks};
use futures_util::FutureExt as _;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use pb::Packet;
use pb::proxy_service_server::{ProxyService, ProxyServiceServer};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status, Streaming};
use tower_service::Service as _;

use crate::config::Elsewhere;
use crate::frontend::policy::{Policy, Requester};
use crate::serve::Forwarder;

/// What the build script makes of konnectivity.proto.
#[expect(
    missing_docs,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::clone_on_ref_ptr,
    unused_qualifications,
    reason = "generated code"
)]
pub mod pb {
    tonic::include_proto!("_");
}

/// Metric label.
const NAME: &str = "konnectivity";
/// Calls of one connection at a time.
const MAX_CALLS: u32 = 1_024;
/// What a call may send before it is read. Over a Unix socket a round trip takes microseconds.
const CALL_WINDOW: u32 = 64 << 10;
/// As much as all calls may send, so that one that is not read never closes the window of the others.
const CONNECTION_WINDOW: u32 = MAX_CALLS * CALL_WINDOW;
/// What hyper keeps of a call's answer beside the packets below.
const SEND_BUFFER: usize = 128 << 10;
/// Largest message of whoever may not do more than dial.
const DIAL: usize = 4 << 10;
/// Packets of a call on their way to the requester. Full: the relays wait, and with them the destinations.
const PACKETS: usize = 4;

/// One listener's settings.
#[derive(Debug)]
pub struct Konnectivity {
    /// What carries requests.
    pub forwarder: Arc<Forwarder>,
    /// What about destinations that are not at the edge.
    pub elsewhere: ArcSwap<Elsewhere>,
    /// Who may ask for what.
    pub policy: ArcSwap<Policy>,
    /// Owner of calls and connections.
    pub tasks: Tasks,
}

impl Konnectivity {
    /// Serves one connection.
    pub async fn serve(self: Arc<Self>, stream: Stream, peer: Peer) {
        let stopping = self.tasks.stopping();
        let requester = Requester::new(&peer);
        let named = self.policy.load().hear(&requester).is_ok();
        // One that comes while we stop, or that no rule names, is there to be told so: it may call once.
        let once = stopping.is_cancelled() || !named;
        let called = CancellationToken::new();
        let first_call = self.forwarder.timeouts.header;
        let executor = Executor(self.tasks.clone());
        let calls = ProxyServiceServer::new(Calls {
            frontend: self,
            requester,
            called: called.clone(),
            once,
        });
        let calls = if named {
            calls
        } else {
            calls.max_decoding_message_size(DIAL)
        };
        let service = hyper::service::service_fn(move |request: http::Request<Incoming>| {
            let mut calls = calls.clone();
            async move { calls.call(request).await }
        });
        let connection = http2::Builder::new(executor)
            .timer(TokioTimer::new())
            .max_concurrent_streams(if once { 1 } else { MAX_CALLS })
            .initial_stream_window_size(CALL_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .serve_connection(TokioIo::new(Readable::new(stream)), service);
        let late = tokio::time::sleep(first_call).fuse();
        let no_more_calls = async {
            if once {
                called.cancelled().await;
            } else {
                stopping.cancelled().await;
            }
        };
        let no_more_calls = no_more_calls.fuse();
        tokio::pin!(connection, late, no_more_calls);
        loop {
            tokio::select! {
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::debug!(%peer, error = %daemon::chain(&error), "a konnectivity connection broke");
                    }
                    return;
                }
                () = &mut no_more_calls => connection.as_mut().graceful_shutdown(),
                () = &mut late => {
                    if !called.is_cancelled() {
                        return;
                    }
                }
            }
        }
    }
}

/// The service for one connection: it knows who is at the other end.
struct Calls {
    frontend: Arc<Konnectivity>,
    requester: Requester,
    called: CancellationToken,
    /// It may call once, and dial once.
    once: bool,
}

#[tonic::async_trait]
impl ProxyService for Calls {
    type ProxyStream = Packets;

    async fn proxy(
        &self,
        request: Request<Streaming<Packet>>,
    ) -> Result<Response<Packets>, Status> {
        self.called.cancel();
        let (packets, queue) = mpsc::channel(PACKETS);
        let gone = CancellationToken::new();
        let answer = Packets {
            queue,
            _gone: gone.clone().drop_guard(),
        };
        let call = Arc::new(Call {
            frontend: Arc::clone(&self.frontend),
            requester: self.requester.clone(),
            once: self.once,
            table: Arc::default(),
            packets,
            gone,
        });
        let tasks = &self.frontend.tasks;
        tasks.spawn("konnectivity", call.run(request.into_inner()));
        Ok(Response::new(answer))
    }
}

/// What a call says, to its end. Dropped, it tells the call that nobody listens.
#[derive(Debug)]
pub struct Packets {
    queue: mpsc::Receiver<Option<Packet>>,
    _gone: DropGuard,
}

impl futures_util::Stream for Packets {
    type Item = Result<Packet, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let packet = ready!(self.queue.poll_recv(cx)).flatten();
        Poll::Ready(packet.map(Ok))
    }
}

/// Runs hyper's work for a call under the owner of all streams.
#[derive(Debug, Clone)]
struct Executor(Tasks);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Executor {
    fn execute(&self, task: F) {
        self.0.spawn("konnectivity", task);
    }
}
