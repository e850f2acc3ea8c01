//! QUIC (RFC 9000) by quinn: the transport of choice.
//!
//! Two facts of quinn that this file hides: a dropped send stream is *finished*, and a connection's receive window
//! couples its streams. So halves reset themselves when dropped, and the session's window grows with each open stream.

mod apart;
mod endpoint;
mod half;
mod headroom;

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

pub use endpoint::{Congestion, Endpoint, Incoming, QuicError, Tuning};
pub use half::{QuicRecv, QuicSend};
use parking_lot::Mutex;
use quinn::VarInt;

use crate::Reason;
use crate::transport::stream::Release;
use crate::transport::{Session, SessionError, SessionStats, Shared};

/// A QUIC connection.
#[derive(Clone)]
pub struct QuicSession {
    connection: quinn::Connection,
    ledger: Arc<Ledger>,
    /// The agent's own socket, to bind anew when the line is silent, and its buffer.
    endpoint: Option<(quinn::Endpoint, u32)>,
}

/// Keeps the session's credit above the sum of its open streams' windows, and remembers how it was closed.
struct Ledger {
    connection: quinn::Connection,
    stream_window: u32,
    /// Held while the credit is set, so that the last to count is the last to set.
    open: Mutex<u32>,
    /// Why this end closed it; quinn says only that it did.
    closed: OnceLock<Reason>,
}

/// Streams' worth of credit beyond the open ones, for streams whose first bytes come before they are accepted.
const SPARE_STREAMS: u32 = 4;

/// Credit of a session with that many open streams. quinn announces new credit only once an eighth of the whole window
/// was read, so a window of exactly the sum would stall the one running stream beside many stopped ones: a quarter more
/// keeps the part that stopped streams can't take above that eighth.
fn credit(stream_window: u32, open: u32) -> u64 {
    let open = u64::from(open);
    u64::from(stream_window) * (open + open / 4 + u64::from(SPARE_STREAMS))
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger")
            .field("open", &*self.open.lock())
            .finish_non_exhaustive()
    }
}

impl Ledger {
    fn count(&self, change: impl FnOnce(u32) -> u32) {
        let mut open = self.open.lock();
        *open = change(*open);
        let credit = credit(self.stream_window, *open);
        let credit = VarInt::from_u64(credit).unwrap_or(VarInt::MAX);
        self.connection.set_receive_window(credit);
    }

    /// What quinn's end of this connection means to us.
    fn error(&self, error: &quinn::ConnectionError) -> SessionError {
        match (error, self.closed.get()) {
            (quinn::ConnectionError::LocallyClosed, Some(reason)) => SessionError::Local(*reason),
            _ => session_error(error),
        }
    }
}

/// One open stream's part of the credit.
struct Open(Arc<Ledger>);

impl Release for Open {}

impl fmt::Debug for Open {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Open")
    }
}

impl Open {
    fn new(ledger: &Arc<Ledger>) -> Self {
        ledger.count(|open| open.saturating_add(1));
        Self(Arc::clone(ledger))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.count(|open| open.saturating_sub(1));
    }
}

impl fmt::Debug for QuicSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuicSession")
            .field("remote", &self.connection.remote_address())
            .finish_non_exhaustive()
    }
}

impl QuicSession {
    fn new(
        connection: quinn::Connection,
        stream_window: u32,
        own: Option<(quinn::Endpoint, u32)>,
    ) -> Self {
        let ledger = Arc::new(Ledger {
            connection: connection.clone(),
            stream_window,
            open: Mutex::new(0),
            closed: OnceLock::new(),
        });
        ledger.count(|open| open);
        Self {
            connection,
            ledger,
            endpoint: own,
        }
    }

    /// The certificates that the peer proved to have, leaf first.
    #[must_use]
    pub fn peer_certificates(&self) -> Vec<rustls::pki_types::CertificateDer<'static>> {
        self.connection
            .peer_identity()
            .and_then(|identity| identity.downcast().ok())
            .map(|chain| *chain)
            .unwrap_or_default()
    }

    /// Waits until a close has left, or `most` is over. A server's sessions share an endpoint and are flushed there.
    pub async fn flush(&self, most: Duration) {
        if let Some((endpoint, _)) = &self.endpoint {
            tokio::time::timeout(most, endpoint.wait_idle()).await.ok(); // a peer that is gone can't be waited for
        }
    }

    fn halves(&self, send: quinn::SendStream, recv: quinn::RecvStream) -> (QuicSend, QuicRecv) {
        let shared = Shared::new(Some(Box::new(Open::new(&self.ledger))));
        (
            QuicSend::new(send, Arc::clone(&shared), Arc::clone(&self.ledger)),
            QuicRecv::new(recv, shared, Arc::clone(&self.ledger)),
        )
    }
}

impl Session for QuicSession {
    type Send = QuicSend;
    type Recv = QuicRecv;

    async fn open(&self) -> Result<(QuicSend, QuicRecv), SessionError> {
        let (send, recv) = self
            .connection
            .open_bi()
            .await
            .map_err(|e| self.ledger.error(&e))?;
        Ok(self.halves(send, recv))
    }

    async fn accept(&self) -> Result<(QuicSend, QuicRecv), SessionError> {
        let (send, recv) = self
            .connection
            .accept_bi()
            .await
            .map_err(|e| self.ledger.error(&e))?;
        Ok(self.halves(send, recv))
    }

    fn close(&self, reason: Reason) {
        self.ledger.closed.set(reason).ok(); // the first close counts
        headroom::for_close(&self.connection);
        self.connection
            .close(reason.code().into(), reason.label().as_bytes());
    }

    async fn closed(&self) -> SessionError {
        self.ledger.error(&self.connection.closed().await)
    }

    fn nudge(&self) {
        let Some((endpoint, buffer)) = &self.endpoint else {
            return;
        };
        headroom::for_probe(&self.connection);
        // A new local port makes quinn send a probe at once; the old port's mapping in a NAT may be what is broken.
        if let Err(error) = endpoint::rebind(endpoint, *buffer) {
            tracing::debug!(%error, "could not bind a new local port");
        }
    }

    fn remote_address(&self) -> SocketAddr {
        let address = self.connection.remote_address();
        SocketAddr::new(address.ip().to_canonical(), address.port())
    }

    fn stats(&self) -> SessionStats {
        let stats = self.connection.stats();
        SessionStats {
            rtt: stats.path.rtt,
            sent: stats.udp_tx.bytes,
            received: stats.udp_rx.bytes,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
            mtu: stats.path.current_mtu,
        }
    }

    fn answered(&self) -> Option<tokio::time::Instant> {
        headroom::answered(&self.connection)
    }
}

/// What quinn's end of a connection means to us.
fn session_error(error: &quinn::ConnectionError) -> SessionError {
    use quinn::ConnectionError as E;
    match error {
        E::ApplicationClosed(close) => {
            SessionError::Peer(Reason::from_code(close.error_code.into_inner()))
        }
        E::LocallyClosed => SessionError::Local(Reason::Cancelled),
        E::TimedOut => SessionError::Silent,
        E::VersionMismatch | E::CidsExhausted | E::Reset => {
            SessionError::Transport(error.to_string())
        }
        E::ConnectionClosed(close) => coded(close.error_code.into(), close.to_string()),
        E::TransportError(failure) => coded(failure.code.into(), failure.to_string()),
    }
}

/// Codes 0x100 to 0x1ff are TLS alerts (RFC 9001 section 4.8).
fn coded(code: u64, text: String) -> SessionError {
    match u8::try_from(code.wrapping_sub(0x100)) {
        Ok(alert) => SessionError::Tls { alert, text },
        Err(_other) => SessionError::Transport(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stopped_streams_never_hold_the_credit_that_makes_quinn_announce_more() {
        let window = u64::from(1_u32 << 20);
        for open in 0..5000 {
            let all = credit(1 << 20, open);
            assert!(all - window * u64::from(open) > all / 8 + window, "{open}");
        }
    }
}
