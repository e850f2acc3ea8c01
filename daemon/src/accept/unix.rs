//! Unix sockets: permission bits without a gap, stale files replaced, live ones stolen only where that was asked for.

use std::collections::hash_map::RandomState;
use std::fs::{self, Permissions};
use std::hash::BuildHasher as _;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;

/// The file of a socket of ours; removed on drop, unless another process has replaced it meanwhile.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: Option<(u64, u64)>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && self.identity == identity(&self.path) {
            // Already gone is as good; anything else is seen by the next start, which replaces a stale file.
            fs::remove_file(&self.path).ok();
        }
    }
}

/// Listens on `path` with the permission bits `mode`.
pub(super) fn bind(path: &Path, mode: u32, backlog: i32) -> io::Result<(UnixListener, SocketFile)> {
    let addr = SockAddr::unix(path)?;
    let socket = with_mode(mode)?;
    match socket.bind(&addr) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path, &addr)?;
            socket.bind(&addr)?;
        }
        bound => bound?,
    }
    let file = SocketFile {
        path: path.to_owned(),
        identity: identity(path),
    };
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    socket.listen(backlog)?;
    Ok((UnixListener::from_std(socket.into())?, file))
}

/// As [`bind`], but takes the path from whoever listens on it. There is no moment without a listener, and connections to
/// the earlier one stay its own.
pub(super) fn take_over(
    path: &Path,
    mode: u32,
    backlog: i32,
) -> io::Result<(UnixListener, SocketFile)> {
    if fs::symlink_metadata(path).is_ok_and(|there| !there.file_type().is_socket()) {
        return Err(in_use("the path exists and is not a socket"));
    }
    let socket = with_mode(mode)?;
    // Process ids are no names here: two containers that share the folder both have 1.
    let unique = RandomState::new().hash_one(path) >> 32;
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{unique:08x}"));
    let mut file = SocketFile {
        path: name.into(),
        identity: None,
    };
    socket.bind(&SockAddr::unix(&file.path)?)?;
    file.identity = identity(&file.path);
    fs::set_permissions(&file.path, Permissions::from_mode(mode))?;
    socket.listen(backlog)?;
    fs::rename(&file.path, path)?;
    path.clone_into(&mut file.path);
    Ok((UnixListener::from_std(socket.into())?, file))
}

/// A socket whose file will have these bits. On Linux the file gets the bits of the socket, less the umask (fchmod before
/// bind), so there is no moment in which more may connect than `mode` says; afterwards the bits are made exact.
fn with_mode(mode: u32) -> io::Result<Socket> {
    let socket = new_socket()?;
    fchmod(socket.as_fd(), Mode::from_bits_truncate(mode))?;
    Ok(socket)
}

/// Removes the file of a socket that nobody listens on.
fn remove_stale(path: &Path, addr: &SockAddr) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(in_use("the path exists and is not a socket"));
    }
    // Not blocking: a listener whose queue is full answers `WouldBlock`, and is alive.
    match new_socket()?.connect(addr) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(()) | Err(_) => Err(in_use("another process listens on the socket")),
    }
}

fn new_socket() -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn in_use(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::AddrInUse, why)
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path)
        .ok()
        .map(|metadata| (metadata.dev(), metadata.ino()))
}
