//! Dials by a line: at an address, never a name, out as the line says, with the mark that exempts from the rules of this
//! machine.
//!
//! Never dialled are what [`direct`] never dials, and loopback but where a line's own network is within it: a forwarded
//! port is a line, too. What is connected and idle is asked by keepalives whether the other end is there, so that
//! [`silence`](super::silence) is noticed.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use nix::libc;
use proto::{Reason, is_loopback};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::direct::{self, Out, Step};
use super::policy::Bypass;
use super::silence;
use crate::config::{Line, Mark};

/// What all dials by lines have in common.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings<'a> {
    /// Our own listeners.
    pub(crate) own: &'a [SocketAddr],
    /// The mark of a line that has none of its own.
    pub(crate) mark: Option<Mark>,
    /// How long the other end may be silent.
    pub(crate) silence: Duration,
}

/// A dial that brought nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failed {
    pub(crate) reason: Reason,
    /// What is said of it: the line and the address, and what else is known.
    pub(crate) detail: String,
    /// It shows that the line or the node does not work. Who refuses has been reached, and what this server lacks says
    /// nothing of the line.
    pub(crate) is_of_line: bool,
}

impl Failed {
    pub(super) fn new(bypass: &Bypass, port: u16, reason: Reason, more: &str) -> Self {
        let at = SocketAddr::new(bypass.address, port);
        let comma = if more.is_empty() { "" } else { ", " };
        Self {
            reason,
            detail: format!("dialled {at} by line {}{comma}{more}", bypass.line.name),
            is_of_line: matches!(reason, Reason::DialTimeout | Reason::DialUnreachable),
        }
    }
}

/// Whether an error that has no reason of its own shows that the line is not there, as its interface or address is not.
fn is_of_line(line: &Line, error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(libc::ENODEV | libc::ENETDOWN | libc::EHOSTDOWN) => true,
        // Else it is ports that have run out.
        Some(libc::EADDRNOTAVAIL) => line.source.is_some(),
        Some(_) | None => false,
    }
}

fn out<'a>(line: &'a Line, mark: Option<Mark>) -> Out<'a> {
    Out {
        mark: line.mark.or(mark),
        source: line.source,
        interface: line.interface.as_deref(),
    }
}

/// Whether that is never dialled, whatever line has it.
fn is_forbidden(bypass: &Bypass, address: SocketAddr, own: &[SocketAddr]) -> bool {
    let ip = bypass.address;
    let networks = bypass.line.networks.iter();
    let mut within = networks.filter(|net| is_loopback(net.0.addr()) && net.0.contains(&ip));
    let is_meant = is_loopback(ip) && within.next().is_some();
    (direct::is_forbidden(ip) && !is_meant) || direct::is_own(address, own)
}

/// A connection by that line.
///
/// # Errors
/// Why there is none, and by which line.
pub(crate) async fn dial(
    bypass: &Bypass,
    port: u16,
    settings: Settings<'_>,
    deadline: Instant,
) -> Result<TcpStream, Failed> {
    let address = SocketAddr::new(bypass.address, port);
    let failed = |reason, more: &str| Failed::new(bypass, port, reason, more);
    if is_forbidden(bypass, address, settings.own) {
        return Err(failed(Reason::ForbiddenDestination, ""));
    }
    let out = out(&bypass.line, settings.mark);
    let connected = timeout_at(deadline, direct::connect(address, &out)).await;
    let stream = connected
        .map_err(|_late| failed(Reason::DialTimeout, ""))?
        .map_err(|error| {
            let reason = direct::reason(&error);
            let more = if reason == Reason::DialFailed {
                direct::words(&error)
            } else {
                String::new()
            };
            let failed = failed(reason, &more);
            Failed {
                is_of_line: failed.is_of_line || is_of_line(&bypass.line, &error),
                ..failed
            }
        })?;
    direct::prepare(&stream);
    keep_alive(&stream, settings.silence);
    silence::ask_often(&stream, settings.silence);
    Ok(stream)
}

/// An idle connection is asked after a third of the time that the other end may be silent, and again and again.
///
/// The kernel counts from what was last heard: a line that is cut a moment before it asks would be given up so much sooner
/// than it has been silent. So it asks for longer than that, and who is silent is found by
/// [`silence`](super::silence), which counts from the question.
fn keep_alive(stream: &TcpStream, silence: Duration) {
    let least = Duration::from_secs(1);
    let keepalive = TcpKeepalive::new()
        .with_time((silence / 3).max(least))
        .with_interval((silence / 6).max(least))
        .with_retries(10);
    SockRef::from(stream).set_tcp_keepalive(&keepalive).ok(); // the half-open reaper is left
}

/// Whether this process may dial by that line, as far as can be told without dialling.
///
/// # Errors
/// What it lacks for good, with the capability.
pub(crate) fn check(line: &Line) -> anyhow::Result<()> {
    let is_v4 = line.source.is_none_or(|source| source.is_ipv4());
    let Err((step, error)) = out(line, None).socket(is_v4) else {
        return Ok(());
    };
    let denied = error.kind() == io::ErrorKind::PermissionDenied
        || error.raw_os_error() == Some(libc::EPERM);
    let name = &line.name;
    match step {
        Step::Mark => Err(anyhow::Error::new(error).context(format!(
            "line {name}: marking a connection needs CAP_NET_ADMIN"
        ))),
        Step::Interface if denied => Err(anyhow::Error::new(error).context(format!(
            "line {name}: binding to an interface needs CAP_NET_RAW before Linux 5.7"
        ))),
        Step::Interface | Step::Source => {
            tracing::warn!(line = name, %error, interface = line.interface, source = line.source.map(tracing::field::display), "the line's interface or source address is not there; until it is, the line is down");
            Ok(())
        }
        Step::Socket => Err(anyhow::Error::new(error).context(format!("line {name}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use tokio::net::TcpListener;

    use super::*;
    use crate::config::Config;

    fn bypass(line: &str, address: &str) -> Bypass {
        let text = format!("lines: [{line}]");
        let config: Config = daemon::config::parse(Path::new("x.yaml"), &text).unwrap();
        Bypass {
            line: Arc::new(config.lines[0].clone()),
            address: address.parse().unwrap(),
        }
    }

    const SETTINGS: Settings<'_> = Settings {
        own: &[],
        mark: None,
        silence: Duration::from_secs(30),
    };

    async fn dialled(
        bypass: &Bypass,
        port: u16,
        settings: Settings<'_>,
    ) -> Result<TcpStream, Failed> {
        dial(
            bypass,
            port,
            settings,
            Instant::now() + Duration::from_secs(30),
        )
        .await
    }

    #[tokio::test]
    async fn it_leaves_by_the_source_and_the_interface_of_its_line() {
        let listener = TcpListener::bind("127.0.0.9:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for line in [
            "{name: l, networks: [127.0.0.0/8], source: 127.0.0.77}",
            "{name: l, networks: [127.0.0.0/8], source: 127.0.0.77, interface: lo}",
        ] {
            let bypass = bypass(line, "127.0.0.9");
            check(&bypass.line).unwrap();
            let stream = dialled(&bypass, port, SETTINGS).await.unwrap();
            let (_, from) = listener.accept().await.unwrap();
            assert_eq!(from.ip().to_string(), "127.0.0.77");
            let socket = SockRef::from(&stream);
            // A reader that pauses must not be taken for one that is gone.
            assert_eq!(socket.tcp_user_timeout().unwrap(), None);
            assert_eq!(
                socket.tcp_keepalive_time().unwrap(),
                Duration::from_secs(10)
            );
            let device = line.contains("interface").then(|| b"lo".to_vec());
            assert_eq!(socket.device().unwrap(), device);
        }
    }

    #[tokio::test]
    async fn the_kernel_asks_an_idle_connection_soon_and_gives_it_up_after_its_silence_only() {
        let listener = TcpListener::bind("127.0.0.9:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let bypass = bypass("{name: l, networks: [127.0.0.0/8]}", "127.0.0.9");
        for seconds in [1, 6, 30, 600] {
            let silence = Duration::from_secs(seconds);
            let settings = Settings {
                silence,
                ..SETTINGS
            };
            let stream = dialled(&bypass, port, settings).await.unwrap();
            let socket = SockRef::from(&stream);
            // Once it asks it goes on for that long, and for what it takes to see it.
            let asks =
                socket.tcp_keepalive_interval().unwrap() * socket.tcp_keepalive_retries().unwrap();
            assert!(asks >= silence * 3 / 2, "{silence:?}: {asks:?}");
            let begins = socket.tcp_keepalive_time().unwrap();
            assert!(begins <= silence.max(Duration::from_secs(1)), "{begins:?}");
        }
    }

    #[tokio::test]
    async fn what_is_not_there_is_told_with_the_line_and_the_address() {
        let listener = TcpListener::bind("127.0.0.9:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        for (line, reason, said) in [
            (
                "{name: l, networks: [127.0.0.0/8]}",
                Reason::DialRefused,
                "by line l",
            ),
            (
                "{name: l, networks: [127.0.0.0/8], interface: corvid-none}",
                Reason::DialFailed,
                "by line l, No such device",
            ),
            (
                "{name: l, networks: [127.0.0.0/8], source: 192.0.2.77}",
                Reason::DialFailed,
                "by line l, Cannot assign requested address",
            ),
        ] {
            let bypass = bypass(line, "127.0.0.9");
            check(&bypass.line).unwrap();
            let failed = dialled(&bypass, port, SETTINGS).await.unwrap_err();
            assert_eq!(failed.reason, reason, "{line}");
            assert_eq!(failed.is_of_line, reason != Reason::DialRefused, "{line}");
            let wanted = format!("dialled 127.0.0.9:{port} {said}");
            assert_eq!(failed.detail, wanted, "{line}");
        }
    }

    #[tokio::test]
    async fn what_is_never_dialled_is_not_dialled_by_a_line_either() {
        let own: SocketAddr = "127.0.0.9:8443".parse().unwrap();
        let settings = Settings {
            own: &[own],
            ..SETTINGS
        };
        for (networks, address, port) in [
            // Loopback of a line that does not name it as such.
            ("0.0.0.0/0", "127.0.0.9", 1),
            ("10.0.0.0/8", "127.0.0.9", 1),
            ("169.254.0.0/16", "169.254.169.254", 80),
            ("127.0.0.0/8", "127.0.0.9", 8443),
        ] {
            let bypass = bypass(&format!("{{name: l, networks: [{networks}]}}"), address);
            let failed = dialled(&bypass, port, settings).await.unwrap_err();
            assert_eq!(
                failed.reason,
                Reason::ForbiddenDestination,
                "{networks} {address}"
            );
        }
    }
}
