//! The thread that starts all children.
//!
//! The kernel sends a child its parent-death signal when the *thread* that forked it ends, not the process. libtest runs each
//! test on a thread of its own and helpers start more, so one thread that lives as long as the process does all the forking.

use std::io;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, sync_channel};

type Job = (Command, SyncSender<io::Result<Child>>);

/// Starts a child on that thread.
pub(super) fn start(command: Command) -> io::Result<Child> {
    static JOBS: OnceLock<SyncSender<Job>> = OnceLock::new();
    let jobs = JOBS.get_or_init(|| {
        // Nobody waits long for a fork: callers block until it is their turn.
        let (jobs, queue) = sync_channel::<Job>(1);
        std::thread::spawn(move || {
            for (mut command, answer) in queue {
                // A caller that is gone has dropped its half; its child is killed by nobody, but none gives up waiting.
                answer.send(command.spawn()).ok();
            }
        });
        jobs
    });
    let (answer, started) = sync_channel(1);
    jobs.send((command, answer))
        .map_err(|_gone| io::ErrorKind::BrokenPipe)?;
    started.recv().map_err(io::Error::other)?
}
