//! The TCP side, for enrolment: each connection is joined to one at the far end, and each chunk takes the line's delay.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::Sky;

/// Bytes read at once.
const CHUNK: usize = 16 * 1024;
/// Chunks under way in one direction of one connection; when it is full, nothing more is read.
const QUEUE: usize = 64;
/// Connections at once; more wait to be accepted.
const CONNECTIONS: usize = 256;

/// Forwards until it is dropped.
pub(super) async fn run(
    listener: std::net::TcpListener,
    to: SocketAddr,
    sky: Arc<Sky>,
) -> Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS => {
                let (near, _) = accepted.context("accepting at the near end")?;
                connections.spawn(connection(near, to, Arc::clone(&sky)));
            }
            // How a connection ends is the business of its two ends.
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(near: TcpStream, to: SocketAddr, sky: Arc<Sky>) -> Result<()> {
    #[expect(clippy::disallowed_methods, reason = "the line")]
    let far = TcpSocket::new_v4()?.connect(to).await?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
    // An error of one way drops both, so the other end sees a connection that is gone.
    tokio::try_join!(
        way(near_read, far_write, &sky),
        way(far_read, near_write, &sky)
    )?;
    Ok(())
}

async fn way(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    sky: &Sky,
) -> Result<()> {
    let (chunks, mut queue) = mpsc::channel::<(Instant, Vec<u8>)>(QUEUE);
    let read = async move {
        loop {
            let mut chunk = vec![0; CHUNK];
            let count = from.read(&mut chunk).await?;
            chunk.truncate(count);
            chunks.send((Instant::now() + sky.delay(), chunk)).await?;
            if count == 0 {
                return Ok(());
            }
        }
    };
    let write = async move {
        let mut cut = sky.cut.subscribe();
        while let Some((due, chunk)) = queue.recv().await {
            sleep_until(due).await;
            cut.wait_for(|cut| !cut).await?;
            if chunk.is_empty() {
                break;
            }
            to.write_all(&chunk).await?;
        }
        Ok(to.shutdown().await?)
    };
    tokio::try_join!(read, write).map(|((), ())| ())
}
