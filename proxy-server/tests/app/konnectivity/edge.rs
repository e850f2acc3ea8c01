//! What is dialled: destinations that send, take or stop when a test says so.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Bytes in which no two places look alike.
pub(super) fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64 / 8 + 1)
        .flat_map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .take(length)
        .collect()
}

/// Sends the bytes to whoever connects, and closes.
pub(super) async fn source(tasks: &mut JoinSet<()>, bytes: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let bytes = bytes.clone();
            connections.spawn(async move {
                stream.write_all(&bytes).await.ok();
            });
        }
    });
    port
}

/// Reads nothing until the gate is open, then all; tells what came, or that it was cut.
pub(super) async fn sink(
    tasks: &mut JoinSet<()>,
    gate: CancellationToken,
) -> (u16, mpsc::Receiver<Result<Vec<u8>, std::io::ErrorKind>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (told, heard) = mpsc::channel(8);
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let (gate, told) = (gate.clone(), told.clone());
            connections.spawn(async move {
                gate.cancelled().await;
                let mut all = Vec::new();
                let read = stream.read_to_end(&mut all).await;
                let what = read.map(|_| all).map_err(|error| error.kind());
                told.send(what).await.ok();
            });
        }
    });
    (port, heard)
}
