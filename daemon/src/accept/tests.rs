//! Listeners over real sockets.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::sys::resource::{Resource, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

use super::*;
use crate::Drained;
use crate::testing::{block_on, in_child_process};

fn loopback(options: BindOptions) -> Listener {
    Listener::bind_with(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap()
}

fn at_most(max_connections: usize) -> BindOptions {
    BindOptions {
        max_connections,
        ..BindOptions::default()
    }
}

async fn dial(listener: &Listener) -> TcpStream {
    #[expect(clippy::disallowed_methods, reason = "a client of the test")]
    TcpStream::connect(listener.bound().tcp().unwrap())
        .await
        .unwrap()
}

#[tokio::test]
async fn a_tcp_connection_carries_bytes_both_ways_and_names_its_peer() {
    let listener = loopback(BindOptions::default());
    assert_ne!(listener.bound().port(), Some(0), "the real port is told");
    let mut client = dial(&listener).await;
    let (mut stream, peer) = listener.accept().await.unwrap();
    assert_eq!(peer.tcp(), Some(client.local_addr().unwrap()));
    assert_eq!(stream.local_addr(), listener.bound().tcp());
    client.write_all(b"ping").await.unwrap();
    stream.readable().await.unwrap();
    let mut read = bytes::BytesMut::with_capacity(64);
    assert_eq!(stream.try_read_buf(&mut read).unwrap(), 4);
    let parts = [io::IoSlice::new(b"po"), io::IoSlice::new(b"ng")];
    assert!(stream.is_write_vectored());
    assert_eq!(stream.write_vectored(&parts).await.unwrap(), 4);
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "pong");
}

#[tokio::test]
async fn accepted_connections_have_nodelay_and_keepalive() {
    let listener = loopback(BindOptions::default());
    let _client = dial(&listener).await;
    let (socket, _) = listener.accept_once().await.unwrap();
    let stream::Kind::Tcp(socket) = socket else {
        panic!("not TCP")
    };
    assert!(socket.nodelay().unwrap());
    assert!(SockRef::from(&socket).keepalive().unwrap());
}

#[tokio::test]
async fn an_abort_is_a_reset_and_a_drop_is_an_end() {
    let listener = loopback(BindOptions::default());
    let mut client = dial(&listener).await;
    listener.accept().await.unwrap().0.abort();
    let error = client.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let mut client = dial(&listener).await;
    drop(listener.accept().await.unwrap());
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn above_the_most_connections_accepting_waits() {
    let listener = loopback(at_most(1));
    let _clients = (dial(&listener).await, dial(&listener).await);
    let (first, _) = listener.accept().await.unwrap();
    assert_eq!(listener.connections(), 1);
    {
        let mut second = std::pin::pin!(listener.accept());
        assert!(
            futures_util::poll!(second.as_mut()).is_pending(),
            "the second one waits"
        );
        drop(first);
        second.await.unwrap();
    }
    assert_eq!(listener.connections(), 0);
}

#[tokio::test]
async fn the_loop_serves_until_it_is_told_to_stop() {
    let listener = loopback(BindOptions::default());
    let addr = listener.bound().tcp().unwrap();
    let tasks = Tasks::new();
    let owner = tasks.clone();
    let stop = CancellationToken::new();
    let (stopping, served) = (stop.clone(), Arc::new(Notify::new()));
    let seen = Arc::clone(&served);
    tasks.spawn("accept", async move {
        let serve = |_stream, _peer| {
            let seen = Arc::clone(&seen);
            async move { seen.notify_one() }
        };
        listener
            .serve("connection", &owner, stopping, serve)
            .await
            .unwrap();
    });
    #[expect(clippy::disallowed_methods, reason = "a client of the test")]
    let client = TcpStream::connect(addr).await;
    served.notified().await;
    stop.cancel();
    assert_eq!(tasks.drain(Duration::from_secs(30)).await, Drained::Clean);
    drop(client);
}

#[test]
fn running_out_of_descriptors_pauses_the_loop_and_it_recovers() {
    const NAME: &str = "accept::tests::running_out_of_descriptors_pauses_the_loop_and_it_recovers";
    in_child_process(NAME, &[], || {
        block_on(async {
            let pauses = Counter::default();
            let options = BindOptions {
                pauses: pauses.clone(),
                ..BindOptions::default()
            };
            let listener = loopback(options);
            let mut client = dial(&listener).await;
            setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
            let mut hoard = Vec::new();
            while let Ok(file) = std::fs::File::open("/dev/null") {
                hoard.push(file);
            }
            let mut accepting = std::pin::pin!(listener.accept());
            tokio::select! {
                _ = accepting.as_mut() => panic!("accepted without a descriptor"),
                () = async {
                    while pauses.get() < 2 {
                        tokio::task::yield_now().await;
                    }
                } => {}
            }
            drop(hoard);
            let (mut stream, _) = accepting.await.unwrap();
            stream.write_all(b"!").await.unwrap();
            assert_eq!(client.read_u8().await.unwrap(), b'!');
        });
    });
}

#[test]
fn errors_of_a_connection_are_ignored_and_those_of_the_listener_are_not() {
    let of = |code: Errno| verdict(&io::Error::from_raw_os_error(code as i32));
    for code in [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM] {
        assert_eq!(of(code), Verdict::Pause, "{code}");
    }
    for code in [
        Errno::ECONNABORTED,
        Errno::EPERM,
        Errno::EPROTO,
        Errno::ENETUNREACH,
        Errno::EINVAL,
    ] {
        assert_eq!(of(code), Verdict::Ignore, "{code}");
    }
    for code in [Errno::EBADF, Errno::ENOTSOCK] {
        assert_eq!(of(code), Verdict::Fatal, "{code}");
    }
}

fn unix(path: &Path, mode: u32) -> io::Result<Listener> {
    let options = BindOptions {
        mode,
        ..BindOptions::default()
    };
    Listener::bind_with(&Listen::Unix(path.to_owned()), options)
}

#[tokio::test]
async fn a_unix_socket_has_its_mode_names_its_peer_and_goes_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("connect.sock");
    let listener = unix(&path, 0o660).unwrap();
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o660
    );
    let mut client = UnixStream::connect(&path).await.unwrap();
    let (mut stream, peer) = listener.accept().await.unwrap();
    let Peer::Unix { uid, pid } = peer else {
        panic!("{peer}")
    };
    assert_eq!(uid, Some(nix::unistd::Uid::effective().as_raw()));
    assert_eq!(pid, i32::try_from(std::process::id()).ok());
    assert!(!stream.is_tcp());
    stream.write_all(b"!").await.unwrap();
    assert_eq!(client.read_u8().await.unwrap(), b'!');
    drop(listener);
    assert!(!path.exists(), "the file is removed with the listener");
}

#[tokio::test]
async fn a_stale_unix_socket_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("connect.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left behind, as after kill -9");
    let listener = unix(&path, 0o600).unwrap();
    let _client = UnixStream::connect(&path).await.unwrap();
    listener.accept().await.unwrap();
}

#[tokio::test]
async fn a_live_unix_socket_is_not_stolen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("connect.sock");
    let first = unix(&path, 0o600).unwrap();
    let error = unix(&path, 0o600).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    let mut client = UnixStream::connect(&path).await.unwrap();
    // The attempt to bind has connected once, too.
    drop(first.accept().await.unwrap());
    let (mut stream, _) = first.accept().await.unwrap();
    stream.write_all(b"!").await.unwrap();
    assert_eq!(client.read_u8().await.unwrap(), b'!');
}

#[tokio::test]
async fn a_file_that_is_not_a_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    let error = unix(&path, 0o600).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert_eq!(error.to_string(), "the path exists and is not a socket");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
}

#[tokio::test]
async fn a_socket_that_another_process_has_replaced_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("connect.sock");
    let first = unix(&path, 0o600).unwrap();
    std::fs::remove_file(&path).unwrap();
    let second = unix(&path, 0o600).unwrap();
    drop(first);
    let _client = UnixStream::connect(&path).await.unwrap();
    second.accept().await.unwrap();
}

fn handing_over(listen: &Listen) -> Listener {
    let options = BindOptions {
        handover: true,
        ..BindOptions::default()
    };
    Listener::bind_with(listen, options).unwrap()
}

/// One listener takes over from another, with connections in the queue of the one that closes; each must be answered.
/// `dial` doesn't wait, so that the accepting tasks don't run meanwhile.
async fn nobody_is_refused<S: AsyncRead + Unpin>(listen: Listen, dial: impl Fn() -> S) {
    let first = handing_over(&listen);
    let tasks = Tasks::new();
    let serve = |listener: Listener, byte: u8| {
        let (owner, stop) = (tasks.clone(), CancellationToken::new());
        let stopping = stop.clone();
        tasks.spawn("accept", async move {
            let answer = |mut stream: Stream, _| async move {
                stream.write_all(&[byte]).await.unwrap();
            };
            listener
                .serve("connection", &owner, stopping, answer)
                .await
                .unwrap();
        });
        stop
    };
    let first = serve(first, 1);
    assert_eq!(dial().read_u8().await.unwrap(), 1);
    let mut waiting: Vec<_> = (0..32).map(|_| dial()).collect();
    let second = serve(handing_over(&listen), 2);
    waiting.extend((0..32).map(|_| dial()));
    first.cancel();
    let mut by_first = 0;
    for stream in &mut waiting {
        by_first += usize::from(stream.read_u8().await.unwrap() == 1);
    }
    assert!((32..=64).contains(&by_first), "{by_first}");
    assert_eq!(dial().read_u8().await.unwrap(), 2);
    second.cancel();
    assert_eq!(tasks.drain(Duration::from_secs(30)).await, Drained::Clean);
}

#[tokio::test]
async fn a_listener_takes_over_a_tcp_address_and_no_connection_is_refused() {
    let free = loopback(BindOptions::default()).bound().clone();
    let addr = free.tcp().unwrap();
    let dial = || {
        let stream = std::net::TcpStream::connect(addr).unwrap();
        stream.set_nonblocking(true).unwrap();
        TcpStream::from_std(stream).unwrap()
    };
    nobody_is_refused(free, dial).await;
}

#[tokio::test]
async fn a_listener_takes_over_a_unix_socket_and_no_connection_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("connect.sock");
    let dial = || {
        let stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
        stream.set_nonblocking(true).unwrap();
        UnixStream::from_std(stream).unwrap()
    };
    nobody_is_refused(Listen::Unix(path.clone()), dial).await;
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn an_address_is_taken_over_from_nobody_who_did_not_say_so() {
    let alone = loopback(BindOptions::default());
    let options = BindOptions {
        handover: true,
        ..BindOptions::default()
    };
    let error = Listener::bind_with(alone.bound(), options.clone()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    let error = Listener::bind_with(&Listen::Unix(path.clone()), options).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
}
