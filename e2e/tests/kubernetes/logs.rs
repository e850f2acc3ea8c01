//! `kubectl logs`, whole and followed.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::content::{HashCheck, LineCheck, line, lines};
use e2e::cluster::{Cluster, NODES, Running, pods, until};
use parking_lot::Mutex;
use tokio::time::Instant;

/// For 50 MB: three seconds on an idle machine.
const DEADLINE: Duration = Duration::from_secs(120);
/// How long a log is followed.
const FOLLOWED: Duration = Duration::from_secs(60);

/// Reads one node's 50 MB of log and compares them.
pub(super) fn long_log<T>(cluster: &Cluster<T>, node: &str) -> Result<Duration> {
    let wanted = lines(node, pods::BOOK_LINES);
    let pod = pods::name(node);
    written(cluster, node)?;
    let start = Instant::now();
    let hash = Arc::new(Mutex::new(HashCheck::default()));
    let sink = Arc::clone(&hash);
    let args = ["logs", &pod, "-c", "book"];
    let mut kubectl = cluster
        .kubectl()
        .start_into(&args, move |bytes| sink.lock().feed(bytes))?;
    kubectl.finish(DEADLINE)?;
    hash.lock()
        .expect(wanted.as_bytes())
        .with_context(|| format!("the log of {pod}"))?;
    Ok(start.elapsed())
}

/// Waits until the container has written it all, and containerd has read it all.
fn written<T>(cluster: &Cluster<T>, node: &str) -> Result<()> {
    let pod = pods::name(node);
    let script = format!("until [ -e {} ]; do usleep 100000; done", pods::WRITTEN);
    let args = ["exec", &pod, "-c", "book", "--", "sh", "-c", &script];
    cluster.kubectl().start(&args)?.finish(DEADLINE)?;
    let last = line(node, pods::BOOK_LINES - 1) + "\n";
    until(DEADLINE, "the log is written", || {
        let tail = cluster
            .kubectl()
            .ok(&["logs", &pod, "-c", "book", "--tail=1"])?;
        ensure!(
            tail == last.as_bytes(),
            "{}",
            String::from_utf8_lossy(&tail)
        );
        Ok(())
    })
}

pub(super) fn long_logs<T>(cluster: &Cluster<T>) -> Result<String> {
    let mut notes = Vec::new();
    for node in NODES {
        let seconds = long_log(cluster, node)?.as_secs_f64();
        notes.push(format!("{node} 50 MB in {seconds:.1} s"));
    }
    Ok(notes.join(", "))
}

/// The last line of each node's long log.
pub(super) fn one_line_of_each<T>(cluster: &Cluster<T>) -> Result<()> {
    for node in NODES {
        let pod = pods::name(node);
        let args = ["logs", &pod, "-c", "book", "--tail=1"];
        let tail = String::from_utf8(cluster.kubectl().ok(&args)?)?;
        let last = line(node, pods::BOOK_LINES - 1) + "\n";
        ensure!(tail == last, "{node} logs {tail:?}");
    }
    Ok(())
}

/// A `kubectl logs -f` that goes on beside the other steps.
pub(super) struct Followed {
    node: &'static str,
    start: Instant,
    kubectl: Running,
    check: Arc<Mutex<LineCheck>>,
}

impl Followed {
    pub(super) fn start<T>(cluster: &Cluster<T>, node: &'static str) -> Result<Self> {
        let check = Arc::new(Mutex::new(LineCheck::new(node)));
        let sink = Arc::clone(&check);
        let args = ["logs", "-f", &pods::name(node), "-c", "ticker"];
        let kubectl = cluster
            .kubectl()
            .start_into(&args, move |bytes| sink.lock().feed(bytes))?;
        Ok(Self {
            node,
            start: Instant::now(),
            kubectl,
            check,
        })
    }

    /// How many lines have come, all of them in order.
    pub(super) fn count(&self) -> Result<u64> {
        self.check
            .lock()
            .count()
            .with_context(|| format!("the followed log of {}", self.node))
    }

    /// Follows on until a minute is over, and until it has caught up with what a new reader sees.
    pub(super) fn finish<T>(mut self, cluster: &Cluster<T>) -> Result<String> {
        let node = self.node;
        until(FOLLOWED, "a minute is over", || {
            ensure!(self.start.elapsed() >= FOLLOWED, "not yet");
            Ok(())
        })?;
        let tail = ["logs", &pods::name(node), "-c", "ticker", "--tail=1"];
        let last = String::from_utf8(cluster.kubectl().ok(&tail)?)?;
        let last = last.split(' ').next().unwrap_or_default().parse::<u64>()?;
        ensure!(
            last > 500,
            "the ticker has written no more than {last} lines"
        );
        let lines = until(
            Duration::from_secs(20),
            &format!("line {last} of {node}"),
            || {
                let count = self.count()?;
                ensure!(count > last, "{count} lines; {}", self.kubectl.errors());
                Ok(count)
            },
        )?;
        let seconds = self.start.elapsed().as_secs_f64();
        self.kubectl.kill()?;
        Ok(format!("{node} {lines} lines in {seconds:.0} s"))
    }

    /// Waits until kubectl ends by itself.
    pub(super) fn ended(&mut self, deadline: Duration) -> Result<()> {
        self.kubectl.wait(deadline).map(|_| ())
    }
}
