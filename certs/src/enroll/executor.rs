//! Runs the futures that hyper's HTTP/2 wants run beside a connection, owned by that connection: when its
//! future is dropped, they are aborted. hyper's own executors would leave them to themselves.

use std::convert::Infallible;
use std::pin::Pin;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Tasks that wait to be started. More than the streams a connection may have (8) and what hyper itself
/// needs; one beyond that is dropped, which resets its stream.
const QUEUE: usize = 32;

/// What hyper is given.
#[derive(Clone, Debug)]
pub(super) struct Executor {
    queue: mpsc::Sender<Task>,
}

/// What the owner polls.
#[derive(Debug)]
pub(super) struct Tasks {
    queue: mpsc::Receiver<Task>,
    running: JoinSet<()>,
}

pub(super) fn executor() -> (Executor, Tasks) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    (
        Executor { queue: sender },
        Tasks {
            queue: receiver,
            running: JoinSet::new(),
        },
    )
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Executor {
    fn execute(&self, task: F) {
        if self.queue.try_send(Box::pin(task)).is_err() {
            tracing::debug!("too many streams of one enrolment connection");
        }
    }
}

impl Tasks {
    /// Polls the tasks for ever.
    pub(super) async fn run(&mut self) -> Infallible {
        loop {
            tokio::select! {
                Some(task) = self.queue.recv() => { self.running.spawn(task); }
                Some(ended) = self.running.join_next(), if !self.running.is_empty() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "a stream of an enrolment connection panicked");
                    }
                }
                else => std::future::pending().await,
            }
        }
    }
}
