//! Whether the other end of a connection by a line is silent: it was asked, and nothing of it has come.
//!
//! The kernel is asked what it knows (`TCP_INFO`); nothing is sent for it.
//!
//! | what the kernel says | means |
//! | --- | --- |
//! | everything that was sent has been acknowledged, no probe is out | nobody was asked: silence is no sign of anything |
//! | something is out, and something has come after it | nobody is asked until it is sent again: a reader who has paused, whose kernel answers that, and each probe of its closed window |
//! | one probe of a closed window is out | it may be lost, or its answer held back (kernels answer at most two a second): the next one tells |
//! | something is out, and for the whole time nothing has come, no byte and no acknowledgement | silent |
//!
//! `TCP_USER_TIMEOUT` does not tell a paused reader from a line that is cut: both take nothing for that time. An idle
//! connection is asked by keepalives (`dial.rs`), so that it is not silent for good.

use std::future::pending;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::libc;
use nix::sys::socket::sockopt::{GetStruct, SetUsize};
use nix::sys::socket::{getsockopt, setsockopt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

/// The longest between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// So many that nobody has answered are enough.
const ENOUGH: u8 = 2;
/// The shortest.
const LEAST: Duration = Duration::from_millis(10);

/// What there is at the beginning of the kernel's `struct tcp_info`, as it has been since Linux 2.6. C libraries know
/// more or less of what follows, and the kernel gives as much as is asked for. Numbers alone, without gaps: whatever the
/// kernel writes is one.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Info {
    state: u8,
    ca_state: u8,
    retransmits: u8,
    /// Probes of an idle connection or a closed window that nobody has answered.
    probes: u8,
    backoff: u8,
    options: u8,
    scales: u8,
    flags: u8,
    rto: u32,
    ato: u32,
    sent_mss: u32,
    received_mss: u32,
    /// Segments.
    unacknowledged: u32,
    sacked: u32,
    lost: u32,
    retransmitted: u32,
    fackets: u32,
    /// Milliseconds ago, as all that follow.
    data_sent: u32,
    ack_sent: u32,
    data_received: u32,
    ack_received: u32,
}

#[derive(Debug, Clone, Copy)]
struct TcpInfo;

/// How rarely the kernel asks at most, in milliseconds.
#[derive(Debug, Clone, Copy)]
struct RtoMax;

/// `TCP_RTO_MAX_MS`, since Linux 6.15.
const RTO_MAX: libc::c_int = 44;

nix::setsockopt_impl!(RtoMax, libc::IPPROTO_TCP, RTO_MAX, usize, SetUsize);
nix::getsockopt_impl!(
    TcpInfo,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    Info,
    GetStruct<Info>
);

/// What matters of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    /// How often something was sent that has to be answered; 0 if it was.
    asked: u8,
    /// When something last came: so long ago.
    heard: Duration,
}

impl Seen {
    fn of(socket: impl AsFd) -> nix::Result<Self> {
        Ok(Self::new(&getsockopt(&socket, TcpInfo)?))
    }

    fn new(info: &Info) -> Self {
        let heard = info.data_received.min(info.ack_received);
        // What does not fit into a paused reader's window is sent again and again, ever more rarely, and its kernel says
        // each time that it does not: whose last word came after ours is not asked anything.
        let is_answered = heard <= info.data_sent;
        Self {
            asked: if info.unacknowledged > 0 && !is_answered {
                ENOUGH
            } else {
                info.probes
            },
            heard: Duration::from_millis(heard.into()),
        }
    }
}

/// What was seen so far.
#[derive(Debug, Default)]
struct Silence {
    /// Since when something is out, as far as was seen: only an answer ends that.
    asked: Option<Instant>,
}

impl Silence {
    /// How long nothing has come although something had to.
    fn lasts(&mut self, now: Instant, seen: Seen) -> Duration {
        if seen.asked == 0 {
            self.asked = None;
            return Duration::ZERO;
        }
        // A probe may be the first thing in minutes that has to be answered.
        let asked = *self.asked.get_or_insert(now);
        if seen.asked < ENOUGH {
            return Duration::ZERO;
        }
        now.duration_since(asked).min(seen.heard)
    }
}

/// Looks whether a connection has fallen silent.
#[derive(Debug, Clone)]
pub(crate) struct Watch {
    socket: Arc<TcpStream>,
    limit: Duration,
}

impl Watch {
    pub(crate) const fn new(socket: Arc<TcpStream>, limit: Duration) -> Self {
        Self { socket, limit }
    }

    /// Resolves once the other end has been silent for the limit, and at most a look later.
    pub(crate) async fn silent(&self) {
        let pause = (self.limit / 6).clamp(LEAST, LOOK);
        let mut silence = Silence::default();
        loop {
            sleep(pause).await;
            let Ok(seen) = Seen::of(&*self.socket) else {
                // Nothing can be told; whoever reads and writes is told what is wrong with it.
                return pending().await;
            };
            if silence.lasts(Instant::now(), seen) >= self.limit {
                return;
            }
        }
    }
}

/// Has the kernel ask twice within the limit whoever has been silent for a while, where it would do so ever more rarely;
/// older ones go on as they do. Not more often: a closed window that nobody has confirmed for twice that time, it gives up.
pub(super) fn ask_often(socket: &TcpStream, limit: Duration) {
    let most = (limit / 2).max(Duration::from_secs(1)).as_millis();
    // The longest that there is without this.
    let most = usize::try_from(most).map_or(120_000, |most| most.min(120_000));
    setsockopt(socket, RtoMax, &most).ok(); // only where the kernel knows it
}

#[cfg(test)]
mod tests {
    use socket2::{SockFilter, SockRef};
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(300);
    const DEADLINE: Duration = Duration::from_secs(60);

    #[test]
    fn who_was_asked_and_says_nothing_is_silent_from_the_last_that_came() {
        let start = Instant::now();
        let mut silence = Silence::default();
        let mut at = |second: u64, asked, heard: u64| {
            let heard = Duration::from_secs(heard);
            let now = start + Duration::from_secs(second);
            silence.lasts(now, Seen { asked, heard }).as_secs()
        };
        // Idle for an hour, then a probe is out at the moment of the look, and answered before the next.
        assert_eq!(at(0, 0, 3600), 0);
        assert_eq!(at(1, 2, 3601), 0);
        assert_eq!(at(2, 0, 0), 0);
        // Seen only in such moments: what came in between counts.
        assert_eq!(at(100, 2, 98), 0);
        assert_eq!(at(200, 2, 50), 50);
        assert_eq!(at(230, 2, 10), 10);
        // Nothing any more.
        assert_eq!(at(240, 2, 20), 20);
        assert_eq!(at(250, 2, 30), 30);
        // All over again, with a probe that may be lost before the one that tells.
        assert_eq!(at(251, 0, 0), 0);
        assert_eq!(at(300, 1, 49), 0);
        assert_eq!(at(330, 1, 79), 0);
        assert_eq!(at(340, 2, 89), 40);
    }

    #[test]
    fn whose_last_word_came_after_ours_is_not_asked() {
        let mut info = getsockopt(&std::net::UdpSocket::bind("127.0.0.1:0").unwrap(), TcpInfo);
        assert!(info.is_err(), "{info:?}");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        info = getsockopt(&listener, TcpInfo);
        let asked = |unacknowledged, probes, sent, data, ack| {
            let info = Info {
                unacknowledged,
                probes,
                data_sent: sent,
                data_received: data,
                ack_received: ack,
                ..info.unwrap()
            };
            let Seen { asked, heard } = Seen::new(&info);
            (asked, heard.as_millis())
        };
        assert_eq!(asked(0, 0, 5, 9, 9), (0, 9));
        assert_eq!(asked(3, 0, 5, 9, 7), (2, 7));
        assert_eq!(asked(3, 0, 9, 9, 9), (0, 9));
        assert_eq!(asked(3, 0, 9000, 400, 8000), (0, 400));
        assert_eq!(asked(0, 1, 9000, 9000, 8000), (1, 8000));
        assert_eq!(asked(3, 3, 10, 9000, 8000), (2, 8000));
    }

    /// A connection with as much on its way as the kernel takes, and its other end.
    async fn full() -> (Watch, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        #[expect(clippy::disallowed_methods, reason = "both ends are this test's")]
        let dialling = TcpStream::connect(address);
        let (dialled, accepted) = tokio::join!(dialling, listener.accept());
        let (ours, theirs) = (dialled.unwrap(), accepted.unwrap().0);
        (Watch::new(Arc::new(ours), LIMIT), theirs)
    }

    async fn fill(watch: &Watch) -> usize {
        let mut all = 0;
        let some = vec![7; 1 << 16];
        let writes = async {
            loop {
                watch.socket.writable().await.unwrap();
                all += watch.socket.try_write(&some).unwrap_or(0);
            }
        };
        // The window closes, and stays closed.
        timeout(LIMIT, writes).await.unwrap_err();
        all
    }

    async fn until(watch: &Watch, is_so: impl Fn(Seen) -> bool) {
        while !is_so(Seen::of(&*watch.socket).unwrap()) {
            sleep(LEAST).await;
        }
    }

    #[tokio::test]
    async fn a_reader_that_pauses_is_not_silent() {
        let (watch, mut theirs) = full().await;
        let sent = fill(&watch).await;
        // Probes of a closed window come ever more rarely: more rarely than the limit.
        let pauses = async {
            for _ in 0..2 {
                until(&watch, |seen| seen.heard > LIMIT * 2).await;
                until(&watch, |seen| seen.heard < LIMIT).await;
            }
        };
        tokio::select! {
            () = watch.silent() => panic!("a reader that pauses was taken for one that is gone"),
            paused = timeout(DEADLINE, pauses) => paused.unwrap(),
        }
        // Nothing was lost by it.
        drop(watch);
        let mut all = Vec::new();
        let read = timeout(DEADLINE, theirs.read_to_end(&mut all)).await;
        assert_eq!(read.unwrap().unwrap(), sent);
    }

    #[tokio::test]
    async fn an_end_that_is_gone_is_silent_and_one_that_comes_back_sooner_is_not() {
        let (watch, theirs) = full().await;
        // Whatever comes is dropped before TCP sees it.
        let nothing = [SockFilter::new(0x06, 0, 0, 0)];
        let theirs = SockRef::from(&theirs);
        for comes_back in [true, false] {
            theirs.attach_filter(&nothing).unwrap();
            watch.socket.try_write(b"is anybody there?").unwrap();
            if comes_back {
                let back = async {
                    until(&watch, |seen| seen.asked > 0 && seen.heard > LIMIT / 2).await;
                    theirs.detach_filter().unwrap();
                    until(&watch, |seen| seen.asked == 0).await;
                };
                timeout(DEADLINE, back).await.unwrap();
            } else {
                timeout(DEADLINE, watch.silent()).await.unwrap();
                let seen = Seen::of(&*watch.socket).unwrap();
                assert!(seen.asked > 0 && seen.heard >= LIMIT, "{seen:?}");
            }
        }
    }
}
