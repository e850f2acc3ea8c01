//! Other requests: what a `kubectl exec` begins with, at a steady rate whatever became of the ones before: CONNECT over the
//! Unix socket, TLS with the kubelet, a small request and its answer.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::door;
use super::nodes::{self, Node};
use super::times::{Failures, Times};

/// Between two of them.
const EVERY: Duration = Duration::from_millis(25);
/// A request that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(10);
/// Nodes are asked in an order that has nothing to do with the scraper's.
const STEP: usize = 389;

/// Where requests go in, and to whom.
pub(super) struct Others {
    socket: PathBuf,
    nodes: Vec<Node>,
    tls: TlsConnector,
}

/// What came of them.
#[derive(Debug, Default)]
pub(super) struct Asked {
    pub(super) times: Times,
    pub(super) failures: Failures,
}

impl Others {
    pub(super) fn new(dir: &Path) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            socket: dir.join("connect.sock"),
            nodes: nodes::read(dir)?,
            tls: door::tls(&dir.join("kubelets.crt"))?,
        }))
    }

    /// Asks until `stop`, and waits for the last answers.
    pub(super) async fn ask(self: &Arc<Self>, stop: CancellationToken) -> Result<Asked> {
        let mut asked = Asked::default();
        let mut running = JoinSet::new();
        let mut ticks = interval(EVERY);
        for node in (0..).map(|i: usize| i.wrapping_mul(STEP) % self.nodes.len()) {
            let due = tokio::select! {
                due = ticks.tick() => due,
                () = stop.cancelled() => break,
            };
            let others = Arc::clone(self);
            running.spawn(async move { others.timed(node, due).await });
            while let Some(ended) = running.try_join_next() {
                asked.add(ended?);
            }
        }
        while let Some(ended) = running.join_next().await {
            asked.add(ended?);
        }
        Ok(asked)
    }

    async fn timed(&self, node: usize, due: Instant) -> Result<Duration> {
        let ended = timeout_at(due + LIMIT, self.request(&self.nodes[node])).await;
        ended
            .unwrap_or_else(|_elapsed| Err(anyhow::anyhow!("no answer in time")))
            .with_context(|| self.nodes[node].name.clone())?;
        Ok(due.elapsed())
    }

    async fn request(&self, node: &Node) -> Result<()> {
        let destination = format!("{}:{}", node.name, node.kubelet);
        let mut stream = UnixStream::connect(&self.socket).await?;
        door::connect(&mut stream, &destination, "").await?;
        let name = ServerName::try_from(node.name.clone())?;
        let mut stream = self.tls.connect(name, stream).await?;
        let request =
            format!("GET /healthz HTTP/1.1\r\nHost: {destination}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        let whole = answer.starts_with(b"HTTP/1.1 200 ") && answer.ends_with(b"\r\n\r\nok");
        ensure!(whole, "{}", String::from_utf8_lossy(&answer));
        Ok(())
    }
}

impl Asked {
    fn add(&mut self, ended: Result<Duration>) {
        match ended {
            Ok(took) => self.times.add(took),
            Err(error) => self.failures.add(format!("{error:#}")),
        }
    }
}
