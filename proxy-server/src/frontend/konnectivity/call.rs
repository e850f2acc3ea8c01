//! One `Proxy` call: reads its packets in order and starts, feeds and ends the connections in it.
//!
//! It never waits for a destination while another connection may be concerned, beyond [`PATIENCE`]: see the parent's
//! failure table.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proto::{Destination, Reason, RelayEnd};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::connection::ConnectionIo;
use super::pb::packet::Payload;
use super::pb::{Data, DialRequest, Packet, PacketType};
use super::table::Table;
use super::{Konnectivity, NAME, packet};
use crate::error::Refusal;
use crate::frontend::policy::Requester;
use crate::record::{Outcome, Path};
use crate::serve::Request;

/// Dials and connections of one call. A requester that has more takes another call.
const MOST: usize = 1_024;
/// How long a destination may stop while others share its call: as long as the konnectivity client itself waits for a
/// reader that has stopped.
const PATIENCE: Duration = Duration::from_secs(10);

/// The requester has left.
struct Gone;

/// One call.
pub(super) struct Call {
    /// Asked for each dial anew: what it permits may change while a call is open.
    pub(super) frontend: Arc<Konnectivity>,
    pub(super) requester: Requester,
    /// It is there to be told why not: it may dial once.
    pub(super) once: bool,
    pub(super) table: Arc<Table>,
    /// To the requester; `None` ends the call.
    pub(super) packets: mpsc::Sender<Option<Packet>>,
    /// Cancelled when nobody takes packets any more.
    pub(super) gone: CancellationToken,
}

impl Call {
    /// Serves the call until the requester ends it or, while we stop, until nothing is left in it.
    pub(super) async fn run(self: Arc<Self>, mut incoming: Streaming<Packet>) {
        let stopping = self.frontend.tasks.stopping();
        // A call that comes while we stop is there to be told so: it may dial once.
        let late = self.once || stopping.is_cancelled();
        let mut dials = 0;
        loop {
            let drained = async {
                if !self.once {
                    stopping.cancelled().await;
                }
                self.table.is_empty().await;
            };
            let next = tokio::select! {
                biased;
                () = self.gone.cancelled() => break,
                next = incoming.message() => next,
                () = drained, if !late || dials > 0 => break,
                () = sleep(self.frontend.forwarder.timeouts.header), if dials == 0 => break,
            };
            // tonic does not tell a call that was reset from one whose requester has no more to say.
            let Ok(Some(packet)) = next else { break };
            if self.take(packet, &mut dials).await.is_err() {
                break;
            }
        }
        self.table.cut_all(Reason::RequesterReset);
        self.send(None).await.ok();
    }

    async fn take(self: &Arc<Self>, packet: Packet, dials: &mut usize) -> Result<(), Gone> {
        // A type that is not of this version, or that does not fit its payload, is passed over.
        let kind = PacketType::try_from(packet.r#type).ok();
        match packet.payload {
            Some(Payload::DialRequest(request)) if kind == Some(PacketType::DialReq) => {
                *dials += 1;
                self.dial(request).await
            }
            Some(Payload::Data(data)) if kind == Some(PacketType::Data) => {
                self.data(data, *dials > 1).await
            }
            Some(Payload::CloseRequest(close)) if kind == Some(PacketType::CloseReq) => {
                self.close(close.connect_id).await
            }
            Some(Payload::CloseDial(close)) if kind == Some(PacketType::DialCls) => {
                if let Some(dial) = self.table.end_dial(close.random) {
                    dial.cancel();
                } else if let Some(connection) = self.table.dialled(close.random) {
                    // It crossed the answer to the dial.
                    return self.close(connection.id).await;
                }
                Ok(())
            }
            Some(
                Payload::DialRequest(_)
                | Payload::DialResponse(_)
                | Payload::Data(_)
                | Payload::CloseRequest(_)
                | Payload::CloseResponse(_)
                | Payload::CloseDial(_)
                | Payload::Drain(_),
            )
            | None => Ok(()),
        }
    }

    async fn dial(self: &Arc<Self>, request: DialRequest) -> Result<(), Gone> {
        let random = request.random;
        let begun = destination(&request).and_then(|destination| {
            if self.frontend.tasks.stopping().is_cancelled() {
                return Err(Refusal::about("proxy-server", Reason::Draining));
            }
            if self.table.len() >= MOST {
                return Err(Refusal::about("proxy-server", Reason::Overloaded));
            }
            let twice = || Refusal {
                reason: Reason::BadRequest,
                sentence: format!("dial {destination}: a dial of that number is under way"),
            };
            let cancel = self.table.begin(random).ok_or_else(twice)?;
            Ok((destination, cancel))
        });
        match begun {
            Ok((destination, cancel)) => {
                let carry = Arc::clone(self).carry(random, destination, cancel);
                self.frontend.tasks.spawn("konnectivity", carry);
                Ok(())
            }
            Err(refusal) => {
                let metrics = &self.frontend.forwarder.metrics;
                metrics.stream(NAME, Path::None, Outcome::Failed(refusal.reason));
                tracing::info!(target: "access", frontend = NAME, requester = %self.requester, from = self.requester.source(), reason = refusal.reason.label(), said = %refusal, "request refused");
                self.say(packet::refused(random, &refusal.sentence)).await
            }
        }
    }

    async fn data(&self, data: Data, shared: bool) -> Result<(), Gone> {
        let id = data.connect_id;
        let Some(connection) = self.table.connection(id) else {
            return self
                .say(packet::close_response(id, "unknown connectID"))
                .await;
        };
        tokio::select! {
            biased;
            () = connection.room() => {
                connection.push(data.data);
                Ok(())
            }
            () = self.gone.cancelled() => Err(Gone),
            () = sleep(PATIENCE), if shared => {
                if self.table.remove(id).is_none() {
                    return Ok(());
                }
                connection.cut(Reason::SlowReader);
                let sentence = "the destination took nothing for 10 s, and other connections share this stream";
                self.say(packet::close_response(id, sentence)).await
            }
        }
    }

    async fn close(&self, id: i64) -> Result<(), Gone> {
        let error = match self.table.remove(id) {
            Some(connection) => {
                connection.close();
                ""
            }
            None => "unknown connectID",
        };
        self.say(packet::close_response(id, error)).await
    }

    /// One dial and what comes of it.
    async fn carry(
        self: Arc<Self>,
        random: i64,
        destination: Destination,
        cancel: CancellationToken,
    ) {
        let Konnectivity {
            forwarder,
            elsewhere,
            policy,
            ..
        } = &*self.frontend;
        let request = Request {
            frontend: NAME,
            requester: self.requester.clone(),
            destination: destination.clone(),
            elsewhere: **elsewhere.load(),
            policy: policy.load_full(),
        };
        let opened = match forwarder.open(request, cancel.cancelled()).await {
            Ok(opened) => opened,
            Err(refusal) => {
                if !cancel.is_cancelled() {
                    self.say(packet::refused(random, &refusal.sentence))
                        .await
                        .ok();
                }
                self.table.end_dial(random);
                return;
            }
        };
        let Some(connection) = self.table.connect(random) else {
            return;
        };
        if self
            .say(packet::dialled(random, connection.id))
            .await
            .is_err()
        {
            self.table.remove(connection.id);
            return;
        }
        let mut io = ConnectionIo::new(&connection, &self.table, &self.packets);
        let relay = opened.relay_until(&mut io, Bytes::new(), connection.must_end());
        let end = Box::pin(relay).await;
        if let RelayEnd::Cut(reason) = end
            && self.table.remove(connection.id).is_some()
        {
            connection.close();
            let refusal = Refusal::about(&destination, reason);
            let last = packet::close_response(connection.id, &refusal.sentence);
            self.say(last).await.ok();
        }
    }

    async fn say(&self, packet: Packet) -> Result<(), Gone> {
        self.send(Some(packet)).await
    }

    async fn send(&self, packet: Option<Packet>) -> Result<(), Gone> {
        tokio::select! {
            biased;
            sent = self.packets.send(packet) => sent.map_err(|_closed| Gone),
            () = self.gone.cancelled() => Err(Gone),
        }
    }
}

/// Where to, or why that is no destination.
fn destination(request: &DialRequest) -> Result<Destination, Refusal> {
    let DialRequest {
        protocol, address, ..
    } = request;
    let bad = |sentence| Refusal {
        reason: Reason::BadRequest,
        sentence,
    };
    // Longer than any name with a port; it is repeated in the answer and in the log.
    if protocol.len() + address.len() > 300 {
        return Err(bad("dial: the address is too long".to_owned()));
    }
    // It may be anything, and one line stays one line.
    let address = address.escape_debug();
    if protocol != "tcp" {
        return Err(bad(format!(
            "dial {address}: only tcp is served here, not {protocol:?}"
        )));
    }
    request
        .address
        .parse()
        .map_err(|error| bad(format!("dial {address}: {error}")))
}
