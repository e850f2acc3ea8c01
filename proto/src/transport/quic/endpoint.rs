//! UDP sockets and the settings of QUIC. What is measured here and elsewhere is in docs/performance.md.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use quinn::congestion::{BbrConfig, CubicConfig};
use quinn::{AsyncUdpSocket, IdleTimeout, Runtime as _, TokioRuntime, TransportConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::QuicSession;
use super::apart::Apart;
use super::headroom::HeadroomFactory;
use crate::budget::MAX_SEND_WINDOW;
use crate::transport::{SessionError, quic};

/// A server's streams are opened by the server itself, so agents may open few: state is allocated for each permitted one.
const SERVER_ACCEPTS: u32 = 16;
/// Reads of a socket in one call. The kernel makes one of those of one sender only, so a server has more to read.
const LISTEN_READS: usize = 32;
const DIAL_READS: usize = 8;

/// How a sender finds its rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Congestion {
    /// RFC 9438, for ordinary lines.
    #[default]
    Cubic,
    /// For lines that lose packets at random (LTE, satellite): ten times as fast there, slower on clean long ones.
    Bbr,
}

/// Settings of an endpoint.
#[derive(Debug, Clone, Copy)]
pub struct Tuning {
    /// Receive window of each stream, bytes.
    pub stream_window: u32,
    /// Bytes sent and not yet acknowledged, a connection, and what is asked of the kernel for the UDP socket of a listener
    /// (half of it for a dial's): its default of 208 KiB loses packets in bursts.
    pub send_window: u32,
    /// Streams the peer may have open at once.
    pub max_streams: u32,
    /// Silence after which a connection is lost.
    pub idle_timeout: Duration,
    /// How this end sends.
    pub congestion: Congestion,
}

impl Tuning {
    /// For a server with that stream window.
    #[must_use]
    pub const fn server(stream_window: u32, idle_timeout: Duration) -> Self {
        Self {
            stream_window,
            send_window: MAX_SEND_WINDOW,
            max_streams: SERVER_ACCEPTS,
            idle_timeout,
            congestion: Congestion::Cubic,
        }
    }

    fn transport(&self) -> TransportConfig {
        let mut config = TransportConfig::default();
        let idle = IdleTimeout::try_from(self.idle_timeout).unwrap_or_else(|_| VarInt::MAX.into());
        config
            .max_concurrent_bidi_streams(self.max_streams.into())
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .max_idle_timeout(Some(idle))
            .stream_receive_window(self.stream_window.into())
            .receive_window(self.stream_window.into())
            .send_window(self.send_window.into())
            .datagram_receive_buffer_size(None);
        match self.congestion {
            Congestion::Cubic => config.congestion_controller_factory(Arc::new(HeadroomFactory(
                Arc::<CubicConfig>::default(),
            ))),
            Congestion::Bbr => config.congestion_controller_factory(Arc::new(HeadroomFactory(
                Arc::<BbrConfig>::default(),
            ))),
        };
        config
    }
}

/// A failure of the local endpoint or of a dial.
#[derive(Debug, thiserror::Error)]
pub enum QuicError {
    /// The socket could not be made.
    #[error("bind a UDP socket to {address}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The TLS settings don't suit QUIC.
    #[error("use the TLS settings for QUIC")]
    Tls(#[source] quinn::crypto::rustls::NoInitialCipherSuite),
    /// The dial could not begin.
    #[error("begin the dial")]
    Connect(#[source] quinn::ConnectError),
    /// The dial failed.
    #[error("dial {address}")]
    Dial {
        /// Whom.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: SessionError,
    },
}

fn socket(address: SocketAddr, buffer: u32, at_once: usize) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let wanted = usize::try_from(buffer).unwrap_or(usize::MAX);
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() {
        // One socket for both families, where the address is `::`.
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    let socket = UdpSocket::from(socket);
    let buffers = SockRef::from(&socket);
    buffers.set_recv_buffer_size(wanted)?;
    buffers.set_send_buffer_size(wanted)?;
    let granted = buffers.recv_buffer_size()?;
    // Linux reports twice what it grants for payload.
    if granted < wanted {
        tracing::debug!(
            granted,
            wanted,
            "small UDP buffers: raise net.core.rmem_max"
        );
    }
    let socket = TokioRuntime.wrap_udp_socket(socket)?;
    Ok(Arc::new(Apart::new(socket, at_once)))
}

/// Connection ids and reset tokens that whoever has the secret recognises as its own.
fn endpoint_config(secret: &[u8; 32]) -> quinn::EndpointConfig {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    // A key of its own for the ids, which every observer sees parts of.
    let ids = hmac::sign(&key, b"corvid connection ids");
    let seed = ids
        .as_ref()
        .iter()
        .take(8)
        .fold(0_u64, |n, b| n << 8 | u64::from(*b));
    let mut config = quinn::EndpointConfig::new(Arc::new(key));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(seed)));
    config
}

/// Binds a new local port of the same family.
pub(super) fn rebind(endpoint: &quinn::Endpoint, buffer: u32) -> io::Result<()> {
    let any = SocketAddr::new(endpoint.local_addr()?.ip(), 0);
    endpoint.rebind_abstract(socket(any, buffer, DIAL_READS)?)
}

/// A UDP socket that speaks QUIC. Clones are handles to the same one.
#[derive(Debug, Clone)]
pub struct Endpoint {
    inner: quinn::Endpoint,
    tuning: Tuning,
}

impl Endpoint {
    /// Listens. `tls` decides who is let in. `secret` is the same at each start of this server, and at all servers that
    /// may get each other's packets: those of sessions that an earlier process or another server has are then answered
    /// with a stateless reset (RFC 9000 section 10.3), and their agents come back at once in place of waiting out the
    /// idle time-out.
    ///
    /// # Errors
    /// When the socket can't be bound or `tls` has no TLS 1.3.
    pub fn listen(
        address: SocketAddr,
        tls: Arc<quinn::crypto::rustls::QuicServerConfig>,
        tuning: Tuning,
        secret: &[u8; 32],
    ) -> Result<Self, QuicError> {
        let mut config = quinn::ServerConfig::with_crypto(tls);
        config.transport_config(Arc::new(tuning.transport()));
        let bind = |source| QuicError::Bind { address, source };
        let socket = socket(address, tuning.send_window, LISTEN_READS).map_err(bind)?;
        let inner = quinn::Endpoint::new_with_abstract_socket(
            endpoint_config(secret),
            Some(config),
            socket,
            Arc::new(TokioRuntime),
        )
        .map_err(bind)?;
        Ok(Self { inner, tuning })
    }

    /// The next connection that knocks; `None` once closed. Nothing was read of its TLS yet. Cancel-safe.
    pub async fn accept(&self) -> Option<Incoming> {
        let incoming = self.inner.accept().await?;
        Some(Incoming {
            inner: incoming,
            stream_window: self.tuning.stream_window,
        })
    }

    /// Dials a server from a socket of its own, so that the session can bind anew without touching others.
    ///
    /// # Errors
    /// When the socket can't be bound, or the handshake fails.
    pub async fn dial(
        address: SocketAddr,
        sni: &str,
        tls: Arc<quinn::crypto::rustls::QuicClientConfig>,
        tuning: Tuning,
    ) -> Result<QuicSession, QuicError> {
        let any: IpAddr = match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let local = SocketAddr::new(any, 0);
        let bind = |source| QuicError::Bind {
            address: local,
            source,
        };
        // The kernel takes twice of it, and memory may be short here.
        let buffer = tuning.send_window / 2;
        let socket = socket(local, buffer, DIAL_READS).map_err(bind)?;
        let endpoint = quinn::Endpoint::new_with_abstract_socket(
            quinn::EndpointConfig::default(),
            None,
            socket,
            Arc::new(TokioRuntime),
        )
        .map_err(bind)?;
        let mut config = quinn::ClientConfig::new(tls);
        config.transport_config(Arc::new(tuning.transport()));
        let dial = |source| QuicError::Dial { address, source };
        let connection = endpoint
            .connect_with(config, address, sni)
            .map_err(QuicError::Connect)?
            .await
            .map_err(|error| dial(quic::session_error(&error)))?;
        Ok(QuicSession::new(
            connection,
            tuning.stream_window,
            Some((endpoint, buffer)),
        ))
    }

    /// Where it is bound.
    ///
    /// # Errors
    /// When the socket is gone.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    /// Waits until every connection has said good-bye, or `most` is over.
    pub async fn flush(&self, most: Duration) {
        tokio::time::timeout(most, self.inner.wait_idle())
            .await
            .ok(); // a peer that is gone can't be waited for
    }
}

/// A connection that knocks.
#[derive(Debug)]
pub struct Incoming {
    inner: quinn::Incoming,
    stream_window: u32,
}

impl Incoming {
    /// Where from. Not proved unless [`Incoming::is_validated`].
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.remote_address()
    }

    /// True once the peer showed that it receives at its address.
    #[must_use]
    pub fn is_validated(&self) -> bool {
        self.inner.remote_address_validated()
    }

    /// Asks the peer to come again with a token (RFC 9000 section 8.1.2): costs us no state.
    pub fn retry(self) {
        if let Err(already) = self.inner.retry() {
            already.into_incoming().refuse();
        }
    }

    /// Turns the peer away.
    pub fn refuse(self) {
        self.inner.refuse();
    }

    /// Does the handshake.
    ///
    /// # Errors
    /// When it fails; the words say why.
    pub async fn handshake(self) -> Result<QuicSession, SessionError> {
        let connecting = self
            .inner
            .accept()
            .map_err(|error| quic::session_error(&error))?;
        let connection = connecting
            .await
            .map_err(|error| quic::session_error(&error))?;
        Ok(QuicSession::new(connection, self.stream_window, None))
    }
}
