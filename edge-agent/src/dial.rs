//! Dials destinations: the only place of the agent that connects a TCP socket.
//!
//! It dials addresses that the policy has decided about, never names.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use proto::Reason;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout_at};

use crate::error::is_out_of_files;

/// Finds destinations that vanished without a word (a pulled plug) within about two minutes.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(60))
    .with_interval(Duration::from_secs(15))
    .with_retries(4);
/// Least time for each of several addresses: three SYNs at a round trip of a third of a second.
const LEAST: Duration = Duration::from_secs(1);

/// A destination that could not be dialled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// The operating system said no.
    #[error("dial {address}")]
    Connect {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    /// There was nothing to dial.
    #[error("no address to dial")]
    Nothing,
    /// Nobody answered.
    #[error("dial {address}: no answer in time")]
    Timeout { address: SocketAddr },
}

impl DialError {
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::Connect { source, .. } => of_error(source),
            Self::Nothing => Reason::Resolve,
            Self::Timeout { .. } => Reason::DialTimeout,
        }
    }
}

/// What connect(2) and socket(2) may say, as a reason.
fn of_error(error: &io::Error) -> Reason {
    let kind = error.kind();
    if is_out_of_files(error) {
        Reason::FilesExhausted
    } else if kind == io::ErrorKind::ConnectionRefused {
        Reason::DialRefused
    } else if kind == io::ErrorKind::TimedOut {
        Reason::DialTimeout
    } else if [
        io::ErrorKind::HostUnreachable,
        io::ErrorKind::NetworkUnreachable,
    ]
    .contains(&kind)
    {
        Reason::DialUnreachable
    } else {
        Reason::DialFailed
    }
}

/// Dials the addresses in order until one answers. Each may take its share of what is left of the time. `buffer` is asked
/// of the kernel for each way.
///
/// # Errors
/// That of the last address; running out of descriptors ends it at once.
pub(crate) async fn dial(
    targets: &[SocketAddr],
    buffer: u32,
    deadline: Instant,
) -> Result<(TcpStream, SocketAddr), DialError> {
    let mut last = DialError::Nothing;
    for (tried, address) in targets.iter().enumerate() {
        let now = Instant::now();
        let left = u32::try_from(targets.len().saturating_sub(tried)).unwrap_or(u32::MAX);
        let share = (deadline.saturating_duration_since(now) / left.max(1)).max(LEAST);
        match connect(*address, buffer, deadline.min(now + share)).await {
            Ok(stream) => return Ok((stream, *address)),
            Err(error) => last = error,
        }
        if last.reason() == Reason::FilesExhausted || Instant::now() >= deadline {
            break;
        }
    }
    Err(last)
}

async fn connect(
    address: SocketAddr,
    buffer: u32,
    deadline: Instant,
) -> Result<TcpStream, DialError> {
    let failed = |source| DialError::Connect { address, source };
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let socket = socket.map_err(failed)?;
    // Before the handshake, which tells how large a window can become. Without them the stream costs more memory.
    socket.set_recv_buffer_size(buffer).ok();
    socket.set_send_buffer_size(buffer).ok();
    #[expect(clippy::disallowed_methods, reason = "this is where the agent dials")]
    let connected = timeout_at(deadline, socket.connect(address)).await;
    let stream = connected
        .map_err(|_elapsed| DialError::Timeout { address })?
        .map_err(failed)?;
    // Without either the stream only does worse: a small write waits, or a dead destination stays.
    stream.set_nodelay(true).ok();
    SockRef::from(&stream).set_tcp_keepalive(&KEEPALIVE).ok();
    Ok(stream)
}

/// Makes the close of this connection abnormal (RST): what the tunnel cut must not look like a clean end.
pub(crate) fn abort(stream: &TcpStream) {
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).ok(); // a socket that is closed needs none
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;
    use tokio::net::TcpListener;

    use super::*;

    const BUFFER: u32 = 64 << 10;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    async fn closed_port() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap()
    }

    #[tokio::test]
    async fn the_next_address_is_tried_after_a_refusal() {
        let closed = closed_port().await;
        let open = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = open.local_addr().unwrap();
        let (_stream, dialled) = dial(&[closed, address], BUFFER, soon()).await.unwrap();
        assert_eq!(dialled, address);
        let refused = dial(&[closed], BUFFER, soon()).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::DialRefused);
        assert_eq!(refused.to_string(), format!("dial {closed}"));
    }

    #[tokio::test]
    async fn the_kernel_may_hold_little_of_a_stream() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let open = TcpListener::bind(local).await.unwrap();
            let (stream, _) = dial(&[open.local_addr().unwrap()], BUFFER, soon())
                .await
                .unwrap();
            let socket = SockRef::from(&stream);
            // Doubled by the kernel (socket(7)).
            let most = 2 * usize::try_from(BUFFER).unwrap();
            assert!(socket.recv_buffer_size().unwrap() <= most);
            assert!(socket.send_buffer_size().unwrap() <= most);
        }
    }

    #[tokio::test]
    async fn a_dial_ends_at_its_deadline() {
        // A listener whose queue is full answers no SYN.
        let listener =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        listener
            .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
            .unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let near = || Instant::now() + Duration::from_millis(300);
        let mut kept = Vec::new();
        let hung = loop {
            match dial(&[address], BUFFER, near()).await {
                Ok(connected) => kept.push(connected),
                Err(error) => break error,
            }
        };
        assert_eq!(hung.reason(), Reason::DialTimeout);
    }

    #[test]
    fn each_error_has_its_reason() {
        for (errno, reason) in [
            (Errno::ECONNREFUSED, Reason::DialRefused),
            (Errno::ETIMEDOUT, Reason::DialTimeout),
            (Errno::EHOSTUNREACH, Reason::DialUnreachable),
            (Errno::ENETUNREACH, Reason::DialUnreachable),
            (Errno::EMFILE, Reason::FilesExhausted),
            (Errno::ENFILE, Reason::FilesExhausted),
            (Errno::EACCES, Reason::DialFailed),
            (Errno::EADDRNOTAVAIL, Reason::DialFailed),
        ] {
            assert_eq!(
                of_error(&io::Error::from_raw_os_error(errno as i32)),
                reason,
                "{errno}"
            );
        }
    }
}
