//! Tasks with an owner: it knows how many run, sees how each ends, and stops them in two phases.
//!
//! Invariants: a panic in one task is counted (the hook of [`crate::telemetry`] logs it, once) and takes no other task
//! down; when [`Tasks::drain`] returns no task runs any more, unless one blocks its thread. Nothing else in the
//! services spawns.
//!
//! It must not end the process: whoever awaits [`Tasks::failed`] decides.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

/// How long cut tasks may take to go away. A task is dropped at its next await, so only one that blocks its thread
/// needs longer, and the process must end all the same.
const CUT_WAIT: Duration = Duration::from_secs(5);

tokio::task_local! {
    static NAME: &'static str;
}

/// How a [`Tasks::drain`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// So many tasks did not end in time and were cut.
    Aborted(usize),
    /// Every task ended by itself.
    Clean,
}

/// The owner of a group of tasks. Clones are the same owner.
#[derive(Clone, Debug)]
pub struct Tasks {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    tracker: TaskTracker,
    stop: CancellationToken,
    abort: CancellationToken,
    panics: AtomicU64,
    cut: AtomicUsize,
    failure: watch::Sender<Option<&'static str>>,
}

impl Default for Tasks {
    fn default() -> Self {
        Self::new()
    }
}

impl Tasks {
    /// An owner without tasks.
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                tracker: TaskTracker::new(),
                stop: CancellationToken::new(),
                abort: CancellationToken::new(),
                panics: AtomicU64::new(0),
                cut: AtomicUsize::new(0),
                failure: watch::Sender::new(None),
            }),
        }
    }

    /// Runs a task. `name` is for logs: a word for the kind of task, not for this one.
    ///
    /// The task is asked to end by [`Tasks::stopping`], and dropped at its next await when a drain runs out of time.
    pub fn spawn<F>(&self, name: &'static str, task: F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let shared = Arc::clone(&self.shared);
        let task = Box::pin(task);
        let guarded = async move {
            shared.run(name, task).await;
        };
        self.shared.tracker.spawn(guarded).abort_handle()
    }

    /// Runs a task that the process cannot do without: if it ends, by itself or by a panic, before [`Tasks::stop`],
    /// [`Tasks::failed`] names it.
    pub fn critical<F>(&self, name: &'static str, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let shared = Arc::clone(&self.shared);
        let task = Box::pin(task);
        let guarded = async move {
            shared.run(name, task).await;
            if !shared.stop.is_cancelled() {
                shared.failure.send_if_modified(|first| {
                    let is_first = first.is_none();
                    first.get_or_insert(name);
                    is_first
                });
            }
        };
        self.shared.tracker.spawn(guarded);
    }

    /// Waits until a critical task has ended too early and returns its name; for ever if none does.
    pub async fn failed(&self) -> &'static str {
        let mut failure = self.shared.failure.subscribe();
        let name = failure
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|name| *name);
        match name {
            Some(name) => name,
            // The sender lives in `self`, so it cannot be gone; without it nothing can fail any more.
            None => std::future::pending().await,
        }
    }

    /// The critical task that ended too early, if one did.
    pub fn failure(&self) -> Option<&'static str> {
        *self.shared.failure.borrow()
    }

    /// Cancelled when the tasks are asked to end.
    pub fn stopping(&self) -> CancellationToken {
        self.shared.stop.clone()
    }

    /// Asks all tasks to end and returns at once.
    pub fn stop(&self) {
        self.shared.stop.cancel();
    }

    /// How many tasks run.
    pub fn len(&self) -> usize {
        self.shared.tracker.len()
    }

    /// Whether no task runs.
    pub fn is_empty(&self) -> bool {
        self.shared.tracker.is_empty()
    }

    /// How many tasks ended by a panic.
    pub fn panics(&self) -> u64 {
        self.shared.panics.load(Ordering::Relaxed)
    }

    /// Asks all tasks to end, waits at most `grace`, and drops those that are left. Tasks spawned afterwards are
    /// dropped at once.
    pub async fn drain(&self, grace: Duration) -> Drained {
        let Shared {
            tracker,
            abort,
            cut,
            ..
        } = &*self.shared;
        self.stop();
        tracker.close();
        if timeout(grace, tracker.wait()).await.is_ok() {
            abort.cancel();
            return Drained::Clean;
        }
        abort.cancel();
        let blocked = match timeout(CUT_WAIT, tracker.wait()).await {
            Ok(()) => 0,
            Err(_) => {
                let left = tracker.len();
                tracing::warn!(left, "tasks block their thread and are left behind");
                left
            }
        };
        match cut.load(Ordering::Relaxed) + blocked {
            0 => Drained::Clean,
            n => Drained::Aborted(n),
        }
    }
}

impl Shared {
    /// Drives `task` to its end, the drain's cut or its panic, whichever is first. Boxed, as each layer of futures around
    /// one that was moved in would take its size once more.
    async fn run(&self, name: &'static str, task: Pin<Box<dyn Future<Output = ()> + Send>>) {
        let cuttable = async {
            tokio::select! {
                biased;
                () = self.abort.cancelled() => {
                    self.cut.fetch_add(1, Ordering::Relaxed);
                }
                () = task => {}
            }
        };
        // Nothing of the task outlives its panic: the future is dropped with all it owns.
        let ended = AssertUnwindSafe(NAME.scope(name, cuttable))
            .catch_unwind()
            .await;
        if ended.is_err() {
            self.panics.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The name of the task that runs here, for the panic hook.
pub(crate) fn current() -> Option<&'static str> {
    NAME.try_with(|name| *name).ok()
}

/// Runs a task whose owner is the returned handle: dropping it aborts the task. For tasks that must outlive a drain
/// (signals, watchdog).
pub(crate) fn owned<F>(task: F) -> AbortOnDropHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    #[expect(
        clippy::disallowed_methods,
        reason = "the handle that is returned owns the task"
    )]
    AbortOnDropHandle::new(tokio::spawn(task))
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::sync::oneshot;

    use super::*;

    const GRACE: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn work_that_ends_in_time_drains_cleanly() {
        let tasks = Tasks::new();
        let stopping = tasks.stopping();
        tasks.spawn("work", async move {
            stopping.cancelled().await;
            tokio::time::sleep(GRACE / 2).await;
        });
        assert_eq!(tasks.len(), 1);
        assert_eq!(tasks.drain(GRACE).await, Drained::Clean);
        assert!(tasks.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_does_not_end_is_cut_after_the_grace() {
        let tasks = Tasks::new();
        let (dropped, seen) = oneshot::channel::<()>();
        tasks.spawn("stuck", async move {
            let _dropped = dropped;
            pending::<()>().await;
        });
        tasks.spawn("quick", async {});
        let start = tokio::time::Instant::now();
        assert_eq!(tasks.drain(GRACE).await, Drained::Aborted(1));
        assert_eq!(start.elapsed().as_secs(), GRACE.as_secs());
        assert!(seen.await.is_err(), "what the task owned is dropped");
        assert!(tasks.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_spawned_after_the_drain_does_not_stay() {
        let tasks = Tasks::new();
        assert_eq!(tasks.drain(GRACE).await, Drained::Clean);
        let (dropped, seen) = oneshot::channel::<()>();
        tasks.spawn("late", async move {
            let _dropped = dropped;
            pending::<()>().await;
        });
        assert!(seen.await.is_err(), "it is dropped at once");
    }

    #[tokio::test]
    async fn a_panic_in_one_task_is_counted_and_leaves_the_others_running() {
        let tasks = Tasks::new();
        let (ask, asked) = oneshot::channel::<u32>();
        let (answer, answered) = oneshot::channel();
        tasks.spawn("survivor", async move {
            answer.send(asked.await.unwrap() + 1).unwrap();
        });
        let (dropped, broken) = oneshot::channel::<()>();
        tasks.spawn("broken", async move {
            let _dropped = dropped;
            panic!("expected by the test");
        });
        assert!(broken.await.is_err(), "the broken task is over");
        ask.send(41).unwrap();
        assert_eq!(answered.await.unwrap(), 42);
        assert_eq!(tasks.drain(GRACE).await, Drained::Clean);
        assert_eq!(tasks.panics(), 1);
        assert_eq!(
            tasks.failure(),
            None,
            "an ordinary task does not end the process"
        );
    }

    #[tokio::test]
    async fn a_critical_task_that_ends_or_panics_is_named() {
        let ends = Tasks::new();
        ends.critical("listener", async {});
        assert_eq!(ends.failed().await, "listener");
        let panics = Tasks::new();
        panics.critical("watcher", async { panic!("expected by the test") });
        assert_eq!(panics.failed().await, "watcher");
        assert_eq!(panics.failure(), Some("watcher"));
        assert_eq!(panics.panics(), 1);
    }

    #[tokio::test]
    async fn a_critical_task_may_end_once_it_is_told_to() {
        let tasks = Tasks::new();
        let stopping = tasks.stopping();
        tasks.critical("listener", async move { stopping.cancelled().await });
        assert_eq!(tasks.drain(GRACE).await, Drained::Clean);
        assert_eq!(tasks.failure(), None);
    }

    #[tokio::test]
    async fn an_owned_task_ends_with_its_owner() {
        let (dropped, seen) = oneshot::channel::<()>();
        let handle = owned(async move {
            let _dropped = dropped;
            pending::<()>().await;
        });
        drop(handle);
        assert!(seen.await.is_err());
    }
}
