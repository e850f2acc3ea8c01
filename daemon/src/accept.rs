//! Listening and accepting, the same way for every listener of a service.
//!
//! Invariants: the number of open connections is bounded, above it the loop waits and the kernel's queue fills; a
//! connection that fails while it is accepted is nobody's error; running out of descriptors or memory pauses the loop
//! and never ends it; what the kernel has accepted when the loop is told to stop is served. It must not read or write:
//! handshakes belong into the task of the connection.

mod stream;
mod unix;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use prometheus_client::metrics::counter::Counter;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

pub use self::stream::{Peer, Stream};
use self::unix::SocketFile;
use crate::{Listen, Tasks};

/// Connections that the kernel keeps for us while we do not accept; `net.core.somaxconn` caps it (4,096 today).
const BACKLOG: i32 = 1024;

/// Long enough for a connection to end and give its descriptor back, short enough that nobody times out.
const PAUSE: Duration = Duration::from_millis(100);

/// A peer that vanished without a word is noticed after 30 s + 3 × 10 s, in the order of the tunnel's own time-outs.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;

/// How to listen.
#[derive(Clone, Debug)]
pub struct BindOptions {
    /// Most connections open at once. Each costs a descriptor and a task, so it must stay well under the limit of
    /// descriptors.
    pub max_connections: usize,
    /// Permission bits of a Unix socket.
    pub mode: u32,
    /// Counts the pauses; usually [`crate::Metrics::accept_pauses`].
    pub pauses: Counter,
    /// Takes connections to addresses that are not this machine's, as TPROXY rules hand them over (`IP_TRANSPARENT`,
    /// ip(7)). Needs `CAP_NET_ADMIN`.
    pub transparent: bool,
    /// Listens although another process of this user does that says the same: new connections go to either until one of
    /// them closes (TCP, `SO_REUSEPORT`), or to the later one (Unix socket). So a process takes over from another and
    /// nobody is refused meanwhile.
    pub handover: bool,
}

impl Default for BindOptions {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            mode: 0o600,
            pauses: Counter::default(),
            transparent: false,
            handover: false,
        }
    }
}

/// A bound address. Dropping it closes it, and removes the file of a Unix socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socketed,
    bound: Listen,
    permits: Arc<Semaphore>,
    max_connections: usize,
    pauses: Counter,
}

#[derive(Debug)]
enum Socketed {
    Tcp(TcpListener),
    /// The file comes first, so that it is removed while we still answer: until then nobody can take it for stale.
    Unix(
        #[expect(dead_code, reason = "held for its drop")] SocketFile,
        UnixListener,
    ),
}

/// What to do about an error of `accept(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Fatal,
    Ignore,
    Pause,
}

impl Listener {
    /// Listens with the default [`BindOptions`]. Must be called within a runtime.
    ///
    /// # Errors
    /// See [`Listener::bind_with`].
    pub fn bind(listen: &Listen) -> io::Result<Self> {
        Self::bind_with(listen, BindOptions::default())
    }

    /// Listens. Must be called within a runtime.
    ///
    /// # Errors
    /// What the operating system says; `AddrInUse` for a Unix socket that somebody answers on, or a path that is not
    /// a socket.
    pub fn bind_with(listen: &Listen, options: BindOptions) -> io::Result<Self> {
        let (socket, bound) = match listen {
            Listen::Tcp(addr) => {
                let listener = bind_tcp(*addr, &options)?;
                let bound = Listen::Tcp(listener.local_addr()?);
                (Socketed::Tcp(listener), bound)
            }
            Listen::Unix(path) => {
                let bind = if options.handover {
                    unix::take_over
                } else {
                    unix::bind
                };
                let (listener, file) = bind(path, options.mode, BACKLOG)?;
                (Socketed::Unix(file, listener), listen.clone())
            }
        };
        let max_connections = options.max_connections.clamp(1, Semaphore::MAX_PERMITS);
        let permits = Arc::new(Semaphore::new(max_connections));
        Ok(Self {
            socket,
            bound,
            permits,
            max_connections,
            pauses: options.pauses,
        })
    }

    /// The address, with the port that the system chose.
    pub const fn bound(&self) -> &Listen {
        &self.bound
    }

    /// How many of its connections are open.
    pub fn connections(&self) -> usize {
        self.max_connections - self.permits.available_permits()
    }

    /// The next connection, once fewer than the most are open. Cancel-safe.
    ///
    /// # Errors
    /// The listener itself is broken; no further call will do better.
    pub async fn accept(&self) -> io::Result<(Stream, Peer)> {
        let permits = Arc::clone(&self.permits);
        let permit = permits.acquire_owned().await.map_err(io::Error::other)?;
        let mut paused = false;
        loop {
            let error = match self.accept_once().await {
                Ok((socket, peer)) => return Ok((Stream::new(socket, permit), peer)),
                Err(error) => error,
            };
            match verdict(&error) {
                Verdict::Ignore => {
                    tracing::debug!(listen = %self.bound, %error, "a connection failed while it was accepted");
                }
                Verdict::Pause => {
                    self.pauses.inc();
                    // Once an episode: the counter has the rest.
                    if !std::mem::replace(&mut paused, true) {
                        tracing::warn!(listen = %self.bound, %error, "cannot accept, pausing");
                    }
                    tokio::time::sleep(PAUSE).await;
                }
                Verdict::Fatal => return Err(error),
            }
        }
    }

    /// Accepts until `stop`, and runs `serve` for each connection as a task of `tasks`. Connections that the kernel has
    /// accepted by then are served too, as far as there is room.
    ///
    /// # Errors
    /// The listener itself is broken. Run the loop as a critical task.
    pub async fn serve<S, F>(
        self,
        name: &'static str,
        tasks: &Tasks,
        stop: CancellationToken,
        serve: S,
    ) -> io::Result<()>
    where
        S: Fn(Stream, Peer) -> F,
        F: Future<Output = ()> + Send + 'static,
    {
        loop {
            let (stream, peer) = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                accepted = self.accept() => accepted?,
            };
            tasks.spawn(name, serve(stream, peer));
        }
        for (stream, peer) in self.last() {
            tasks.spawn(name, serve(stream, peer));
        }
        Ok(())
    }

    /// Closes it, and returns what is in the kernel's queue and would be reset by that.
    fn last(self) -> Vec<(Stream, Peer)> {
        let mut last = Vec::new();
        while let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() {
            match self.accept_now() {
                Ok((socket, peer)) => last.push((Stream::new(socket, permit), peer)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if verdict(&error) == Verdict::Ignore => {}
                Err(_) => break,
            }
        }
        last
    }

    /// As [`Self::accept_once`], without waiting: the runtime may not have heard yet of what is there.
    fn accept_now(&self) -> io::Result<(stream::Kind, Peer)> {
        let listener = match &self.socket {
            Socketed::Tcp(listener) => SockRef::from(listener),
            Socketed::Unix(_, listener) => SockRef::from(listener),
        };
        let (socket, addr) = listener.accept()?;
        socket.set_nonblocking(true)?;
        if let Some(addr) = addr.as_socket() {
            let socket = TcpStream::from_std(socket.into())?;
            prepare(&socket)?;
            return Ok((stream::Kind::Tcp(socket), Peer::Tcp(addr)));
        }
        let socket = UnixStream::from_std(socket.into())?;
        let peer = peer_of(&socket);
        Ok((stream::Kind::Unix(socket), peer))
    }

    async fn accept_once(&self) -> io::Result<(stream::Kind, Peer)> {
        match &self.socket {
            Socketed::Tcp(listener) => {
                let (socket, addr) = listener.accept().await?;
                prepare(&socket)?;
                Ok((stream::Kind::Tcp(socket), Peer::Tcp(addr)))
            }
            Socketed::Unix(_, listener) => {
                let (socket, _) = listener.accept().await?;
                let peer = peer_of(&socket);
                Ok((stream::Kind::Unix(socket), peer))
            }
        }
    }
}

fn bind_tcp(addr: SocketAddr, options: &BindOptions) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    // A restart must not wait for connections in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(options.handover)?;
    if options.transparent {
        // One flag of the socket for both families: Linux takes the IPv4 option on an IPv6 socket too.
        socket.set_ip_transparent_v4(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    SockRef::from(socket).set_tcp_keepalive(&keepalive)
}

fn peer_of(socket: &UnixStream) -> Peer {
    let credentials = socket.peer_cred().ok();
    Peer::Unix {
        uid: credentials.map(|credentials| credentials.uid()),
        pid: credentials.and_then(|credentials| credentials.pid()),
    }
}

/// Classifies an error of `accept(2)`, or of the options set on what it returned: Linux passes errors of the new
/// connection on as errors of `accept` (accept(2), "Error handling").
fn verdict(error: &io::Error) -> Verdict {
    let Some(code) = error.raw_os_error() else {
        return Verdict::Fatal;
    };
    let errno = Errno::from_raw(code);
    if matches!(
        errno,
        Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM
    ) {
        Verdict::Pause
    } else if matches!(errno, Errno::EBADF | Errno::EFAULT | Errno::ENOTSOCK) {
        Verdict::Fatal
    } else {
        Verdict::Ignore
    }
}

#[cfg(test)]
mod tests;
