//! Whether another `redirect --run` keeps the rules of this network namespace: the last one that ends removes them, so that
//! one can take over from another (a pod that is replaced) and there is no moment without rules.
//!
//! Each run holds an abstract Unix socket, which belongs to the namespace and vanishes with the process however it ends.
//! Nobody listens on it; `/proc/net/unix` shows it to the others. Where that can't be read, we are alone.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::{fs, io};

/// How the names begin. `@` stands for the zero byte of abstract names in `/proc/net/unix`.
const NAME: &str = "corvid_redirect/";

/// Says that we are here, until it is dropped.
#[derive(Debug)]
pub(super) struct Presence(#[expect(dead_code, reason = "held for its drop")] UnixDatagram);

impl Presence {
    pub(super) fn new() -> io::Result<Self> {
        let name = format!("{NAME}{:016x}", rand::random::<u64>());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
        Ok(Self(socket))
    }

    /// Goes, and says whether that leaves nobody. Who asks has gone before: of two that end at once one at least hears
    /// that nobody is left.
    pub(super) fn leaves_nobody(self) -> bool {
        drop(self);
        let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
        let theirs = |line: &str| {
            let name = line.rsplit(' ').next();
            name.and_then(|name| name.strip_prefix('@'))
                .is_some_and(|name| name.starts_with(NAME))
        };
        !sockets.lines().any(theirs)
    }
}
