//! A bad line: a forwarder of UDP and TCP between two namespaces with delay, loss, reordering, cuts and new source addresses.
//!
//! Many kernels have no `tc netem`, so the line is a thread of the test process with its sockets in the namespaces.
//! An agent dials [`Link::addr`] in place of the server's address; an [`IpLink`] is an interface at each end, and carries whatever is routed there. Chance comes from a seed. Queues are bounded: what does
//! not fit is lost for UDP, as in a router, and waits for TCP. It never changes a byte.

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::ops::Deref;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use socket2::SockRef;
use tokio::sync::{mpsc, oneshot, watch};

use crate::net::Host;

mod ip;
mod late;
mod tcp;
mod udp;

pub use ip::IpLink;

/// Buffers of the sockets: a burst of the sender must not be lost here unless the scenario wants it.
const SOCKET_BUFFER: usize = 4 << 20;

/// What the line does to each direction.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weather {
    /// Time from one end to the other.
    pub delay: Duration,
    /// Share of datagrams that vanish, 0 to 1.
    pub loss: f64,
    /// Share of datagrams that take `late` longer and so arrive behind their followers, 0 to 1.
    pub reorder: f64,
    /// How much longer those take.
    pub late: Duration,
}

/// What the line did so far, in datagrams or packets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Passed on.
    pub forwarded: u64,
    /// Lost by chance.
    pub lost: u64,
    /// Held back behind their followers.
    pub reordered: u64,
    /// Lost because the line was cut or its queue full.
    pub dropped: u64,
}

/// A line between two namespaces; it ends when this is dropped.
#[derive(Debug)]
pub struct Link {
    addr: SocketAddr,
    sky: Arc<Sky>,
    rebind: mpsc::Sender<Rebind>,
    _runs: Runs,
}

/// A new source address for all that goes to the server, and where to say that it is done.
struct Rebind {
    ip: IpAddr,
    done: std::sync::mpsc::SyncSender<Result<()>>,
}

/// What the test sets while a line runs, and sees of it.
#[derive(Debug)]
pub struct Sky {
    state: Mutex<State>,
    cut: watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    weather: Weather,
    random: SmallRng,
    counts: Counts,
}

impl Link {
    /// Lays a line: it listens at `listen` on `near`, and goes on to `to` from an address of `far`, the same port for UDP and
    /// TCP. Both may be one host, such as a router in between.
    ///
    /// # Errors
    /// When an address is taken or a namespace gone.
    pub fn lay(
        near: &Host,
        listen: SocketAddr,
        far: &Host,
        to: SocketAddr,
        seed: u64,
    ) -> Result<Self> {
        let bind =
            || -> std::io::Result<_> { Ok((UdpSocket::bind(listen)?, TcpListener::bind(listen)?)) };
        let (udp, tcp) = near
            .enter(bind)?
            .with_context(|| format!("a link at {listen}"))?;
        SockRef::from(&udp).set_recv_buffer_size(SOCKET_BUFFER)?;
        let addr = udp.local_addr()?;
        let sky = Sky::new(seed);
        // One at a time: the test waits for each.
        let (rebind, rebinds) = mpsc::channel(1);
        let (far, skies) = (far.clone(), Arc::clone(&sky));
        let runs = Runs::start(format!("link {addr}"), async move {
            far.join()?;
            tokio::select! {
                ended = udp::run(udp, to, Arc::clone(&skies), rebinds) => ended,
                ended = tcp::run(tcp, to, skies) => ended,
            }
        });
        Ok(Self {
            addr,
            sky,
            rebind,
            _runs: runs,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Gives all UDP flows new source ports at the server's side, at `ip`, as a NAT box does that has forgotten its table or
    /// got another address. What still goes to the old ones is lost.
    ///
    /// # Errors
    /// When `ip` is no address of the far host.
    pub fn rebind(&self, ip: IpAddr) -> Result<()> {
        let (done, rebound) = std::sync::mpsc::sync_channel(1);
        let gone = || anyhow!("the link has ended");
        self.rebind
            .blocking_send(Rebind { ip, done })
            .ok()
            .with_context(gone)?;
        rebound.recv().ok().with_context(gone)?
    }
}

impl Deref for Link {
    type Target = Sky;

    fn deref(&self) -> &Sky {
        &self.sky
    }
}

/// The thread of a line; it ends when this is dropped.
#[derive(Debug)]
struct Runs {
    what: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Runs {
    fn start(what: String, run: impl Future<Output = Result<()>> + Send + 'static) -> Self {
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                tokio::select! {
                    // A dropped sender is a dropped line too.
                    _ = stopped => Ok(()),
                    ended = run => ended,
                }
            })
        });
        Self {
            what,
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Runs {
    #[expect(
        clippy::print_stderr,
        reason = "a line that broke by itself explains what failed after"
    )]
    fn drop(&mut self) {
        self.stop.take(); // the thread ends when this sender is gone
        let ended = self.thread.take().map(JoinHandle::join);
        match ended {
            Some(Ok(Err(error))) => eprintln!("{}: {error:#}", self.what),
            Some(Err(_)) => eprintln!("{}: its thread panicked", self.what),
            Some(Ok(Ok(()))) | None => {}
        }
    }
}

impl Sky {
    /// A clear one.
    fn new(seed: u64) -> Arc<Self> {
        let state = State {
            weather: Weather::default(),
            random: SmallRng::seed_from_u64(seed),
            counts: Counts::default(),
        };
        Arc::new(Self {
            state: Mutex::new(state),
            cut: watch::Sender::new(false),
        })
    }

    /// Changes what the line does from now on.
    pub fn weather(&self, weather: Weather) {
        self.state.lock().weather = weather;
    }

    /// Lets nothing through any more, and tells nobody.
    pub fn cut(&self) {
        self.cut.send_replace(true);
    }

    /// Undoes [`Sky::cut`].
    pub fn heal(&self) {
        self.cut.send_replace(false);
    }

    /// What it did so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.state.lock().counts
    }

    /// How long the next datagram takes; `None` when it does not arrive.
    fn fate(&self) -> Option<Duration> {
        let mut state = self.state.lock();
        let Weather {
            delay,
            loss,
            reorder,
            late,
        } = state.weather;
        if *self.cut.borrow() {
            state.counts.dropped += 1;
            return None;
        }
        if loss > 0.0 && state.random.random_bool(loss) {
            state.counts.lost += 1;
            return None;
        }
        if reorder > 0.0 && state.random.random_bool(reorder) {
            state.counts.reordered += 1;
            return Some(delay + late);
        }
        Some(delay)
    }

    fn is_cut(&self) -> bool {
        *self.cut.borrow()
    }

    fn dropped(&self) {
        self.state.lock().counts.dropped += 1;
    }

    /// Counts one at its end.
    fn arrived(&self, is_whole: bool) {
        let counts = &mut self.state.lock().counts;
        *match is_whole {
            true => &mut counts.forwarded,
            false => &mut counts.dropped,
        } += 1;
    }

    fn delay(&self) -> Duration {
        self.state.lock().weather.delay
    }
}
