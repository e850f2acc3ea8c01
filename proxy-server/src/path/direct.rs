//! Dials what is not at the edge, for frontends that say `default: direct`: kube-apiserver sends webhooks and
//! aggregated APIs through the same egress.
//!
//! Never dialled, whatever is asked: loopback, link-local and metadata addresses, unspecified, multicast and broadcast
//! ones, and this server's own listeners. The check is on the address that is then dialled, so no name can be bent.
//! Where rules of this machine lead connections to us, a mark on ours exempts them (`proxy-server redirect`).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::sockopt::IpBindAddressNoPort;
use parking_lot::Mutex;
use proto::{Destination, Host, Reason, is_loopback, is_never_dialled};
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout, timeout_at};

use crate::config::Mark;
use crate::error::Refusal;

/// For so long this machine's addresses are taken to stay.
const LATELY: Duration = Duration::from_secs(1);

/// Whether the address is one that is never dialled.
pub(super) fn is_forbidden(ip: IpAddr) -> bool {
    is_never_dialled(ip) || is_loopback(ip)
}

/// Whether `address` is one of our own listeners; `own` has bound addresses, possibly unspecified ones.
fn is_ourselves(address: SocketAddr, own: &[SocketAddr], interfaces: &[IpAddr]) -> bool {
    let ip = address.ip().to_canonical();
    own.iter().any(|listener| {
        let here = listener.ip().to_canonical() == ip
            || (listener.ip().is_unspecified() && interfaces.contains(&ip));
        here && listener.port() == address.port()
    })
}

/// Whether `address` is one of our own listeners now.
pub(crate) fn is_own(address: SocketAddr, own: &[SocketAddr]) -> bool {
    let may_be = own.iter().any(|listener| listener.port() == address.port());
    may_be && is_ourselves(address, own, &interfaces_of_late())
}

/// Addresses of this machine's interfaces within the last second: a host of a cluster has hundreds, and they are looked at
/// for each dial of a kubelet where a frontend listens at its port.
fn interfaces_of_late() -> Arc<[IpAddr]> {
    static KNOWN: Mutex<Option<(Instant, Arc<[IpAddr]>)>> = Mutex::new(None);
    let now = Instant::now();
    let mut known = KNOWN.lock();
    match &*known {
        Some((at, addresses)) if now.duration_since(*at) < LATELY => Arc::clone(addresses),
        Some(_) | None => {
            let addresses: Arc<[IpAddr]> = interfaces().into();
            *known = Some((now, Arc::clone(&addresses)));
            addresses
        }
    }
}

/// Addresses of this machine's interfaces.
pub(crate) fn interfaces() -> Vec<IpAddr> {
    let Ok(all) = nix::ifaddrs::getifaddrs() else {
        return Vec::new();
    };
    let address = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    };
    all.filter_map(address).collect()
}

pub(super) fn reason(error: &io::Error) -> Reason {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "ErrorKind is not exhaustive"
    )]
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Reason::DialRefused,
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            Reason::DialUnreachable
        }
        io::ErrorKind::TimedOut => Reason::DialTimeout,
        _ if matches!(
            error.raw_os_error(),
            Some(nix::libc::EMFILE | nix::libc::ENFILE)
        ) =>
        {
            Reason::FilesExhausted
        }
        _ => Reason::DialFailed,
    }
}

/// What a failed dial means: the reason says it, and what it leaves open is added.
fn refusal(destination: &Destination, address: SocketAddr, error: &io::Error) -> Refusal {
    let reason = reason(error);
    let mut detail = match &destination.host {
        Host::Ip(_) => String::new(),
        Host::Name(_) => format!("dialled {address}"),
    };
    if reason == Reason::DialFailed {
        let words = words(error);
        let comma = if detail.is_empty() { "" } else { ", " };
        detail = format!("{detail}{comma}{words}");
    }
    Refusal::detailed(destination, reason, &detail)
}

/// An error of the kernel in its words.
pub(super) fn words(error: &io::Error) -> String {
    let errno = error.raw_os_error().map(nix::errno::Errno::from_raw);
    errno.map_or_else(|| error.to_string(), |errno| errno.desc().to_owned())
}

fn unresolved(destination: &Destination, error: &io::Error) -> Refusal {
    let said = error.to_string();
    // "failed to lookup address information" stands before it, which is what the reason says.
    let why = said.rsplit(": ").next().unwrap_or_default();
    Refusal::detailed(destination, Reason::Resolve, why)
}

/// Dials the destination's addresses in the resolver's order until one answers.
///
/// # Errors
/// A refusal that names the destination.
pub async fn dial(
    destination: &Destination,
    own: &[SocketAddr],
    mark: Option<Mark>,
    deadline: Instant,
) -> Result<TcpStream, Refusal> {
    let late = |_elapsed| Refusal::about(destination, Reason::DialTimeout);
    let addresses: Vec<SocketAddr> = match &destination.host {
        Host::Ip(ip) => vec![SocketAddr::new(*ip, destination.port)],
        Host::Name(name) => {
            let lookup = tokio::net::lookup_host((name.as_str(), destination.port));
            let found = timeout_at(deadline, lookup).await.map_err(late)?;
            let failed = |error| unresolved(destination, &error);
            found.map_err(failed)?.collect()
        }
    };
    let interfaces = interfaces();
    let mut last = Refusal::about(destination, Reason::Resolve);
    let mut left = addresses.len();
    for address in addresses {
        // A dead address takes its share of the time and leaves the others theirs.
        let share = deadline.saturating_duration_since(Instant::now())
            / u32::try_from(left.max(1)).unwrap_or(u32::MAX);
        left = left.saturating_sub(1);
        if is_forbidden(address.ip()) || is_ourselves(address, own, &interfaces) {
            last = Refusal::about(destination, Reason::ForbiddenDestination);
            continue;
        }
        let out = Out {
            mark,
            ..Out::default()
        };
        match timeout(share, connect(address, &out)).await {
            Ok(Ok(stream)) => {
                prepare(&stream);
                return Ok(stream);
            }
            Ok(Err(error)) => last = refusal(destination, address, &error),
            Err(_elapsed) => last = Refusal::about(destination, Reason::DialTimeout),
        }
    }
    Err(last)
}

/// How a connection leaves this machine.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Out<'a> {
    /// With this mark.
    pub(super) mark: Option<Mark>,
    /// From this address.
    pub(super) source: Option<IpAddr>,
    /// By this interface or VRF.
    pub(super) interface: Option<&'a str>,
}

impl Out<'_> {
    /// A socket that leaves so.
    ///
    /// # Errors
    /// What the kernel says, and to which of the three.
    pub(super) fn socket(&self, is_v4: bool) -> Result<TcpSocket, (Step, io::Error)> {
        let socket = if is_v4 {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        };
        let socket = socket.map_err(|error| (Step::Socket, error))?;
        if let Some(mark) = self.mark {
            let marked = SockRef::from(&socket).set_mark(mark.get());
            marked.map_err(|error| (Step::Mark, error))?;
        }
        if let Some(interface) = self.interface {
            let bound = socket.bind_device(Some(interface.as_bytes()));
            bound.map_err(|error| (Step::Interface, error))?;
        }
        if let Some(source) = self.source {
            // The port is chosen with the destination known, so that there are enough of them.
            nix::sys::socket::setsockopt(&socket, IpBindAddressNoPort, &true).ok();
            let bound = socket.bind(SocketAddr::new(source, 0));
            bound.map_err(|error| (Step::Source, error))?;
        }
        Ok(socket)
    }
}

/// What the kernel was asked for when it said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Socket,
    Mark,
    Interface,
    Source,
}

pub(super) async fn connect(address: SocketAddr, out: &Out<'_>) -> io::Result<TcpStream> {
    let socket = out
        .socket(address.is_ipv4())
        .map_err(|(_step, error)| error)?;
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place that dials past the tunnel"
    )]
    let connected = socket.connect(address).await;
    connected
}

/// Whether this process may mark its connections.
///
/// # Errors
/// What the kernel says to it.
pub(crate) fn may_mark(mark: Mark) -> io::Result<()> {
    Socket::new(Domain::IPV4, Type::STREAM, None)?.set_mark(mark.get())
}

/// No delay, and a destination that vanishes without a word is noticed.
pub(super) fn prepare(stream: &TcpStream) {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(10))
        .with_retries(3);
    stream.set_nodelay(true).ok(); // only latency is lost without it
    SockRef::from(stream).set_tcp_keepalive(&keepalive).ok(); // the half-open reaper is left
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    #[test]
    fn this_machine_and_metadata_are_never_dialled() {
        for (ip, forbidden) in [
            ("127.0.0.1", true),
            ("169.254.169.254", true),
            ("10.96.0.1", false),
        ] {
            assert_eq!(is_forbidden(ip.parse().unwrap()), forbidden, "{ip}");
        }
    }

    #[test]
    fn our_own_listeners_are_never_dialled() {
        let own = [
            "0.0.0.0:8444".parse().unwrap(),
            "10.0.0.1:8445".parse().unwrap(),
        ];
        let interfaces = ["10.0.0.1".parse().unwrap()];
        let ours = |a: &str| is_ourselves(a.parse().unwrap(), &own, &interfaces);
        assert!(ours("10.0.0.1:8444") && ours("10.0.0.1:8445"));
        assert!(!ours("10.0.0.2:8444") && !ours("10.0.0.1:443"));
    }

    #[test]
    fn a_refusal_says_each_thing_once() {
        let at = "10.0.0.7:443".parse().unwrap();
        for (asked, errno, said) in [
            (
                "10.0.0.7:443",
                Errno::ECONNREFUSED,
                "10.0.0.7:443: connection refused",
            ),
            (
                "web.site:443",
                Errno::ECONNREFUSED,
                "web.site:443: connection refused: dialled 10.0.0.7:443",
            ),
            (
                "10.0.0.7:443",
                Errno::ENETUNREACH,
                "10.0.0.7:443: no route to the destination",
            ),
            (
                "10.0.0.7:443",
                Errno::EMFILE,
                "10.0.0.7:443: out of file descriptors",
            ),
            (
                "10.0.0.7:443",
                Errno::EACCES,
                "10.0.0.7:443: the dial failed: Permission denied",
            ),
            (
                "web.site:443",
                Errno::EADDRNOTAVAIL,
                "web.site:443: the dial failed: dialled 10.0.0.7:443, Cannot assign requested address",
            ),
        ] {
            let error = io::Error::from_raw_os_error(errno as i32);
            let refusal = refusal(&asked.parse().unwrap(), at, &error);
            assert_eq!(refusal.sentence, said);
        }
    }

    #[test]
    fn an_unresolved_name_says_why_once() {
        let error = io::Error::other(
            "failed to lookup address information: Temporary failure in name resolution",
        );
        let refusal = unresolved(&"web.site:443".parse().unwrap(), &error);
        let said =
            "web.site:443: the name could not be resolved: Temporary failure in name resolution";
        assert_eq!(refusal.sentence, said);
    }

    #[tokio::test]
    async fn a_name_that_leads_to_loopback_is_refused() {
        let destination = "localhost:1".parse().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let refusal = dial(&destination, &[], None, deadline).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::ForbiddenDestination);
    }
}
