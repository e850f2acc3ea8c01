//! Child processes: started in a namespace, with their output in a file, ended by id.
//!
//! A child is the leader of a process group of its own and gets SIGKILL when the test process dies. Dropping a [`Process`]
//! ends its group. Nothing else is ever signalled: no names, no patterns.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use parking_lot::Mutex;

use crate::wait;

mod parent;
mod spawn;
mod usage;

pub use spawn::Spawn;

/// Lines of a log that are shown when a test fails.
const TAIL: usize = 40;
/// How long a process may take to vanish after SIGKILL: the kernel needs milliseconds, unless the disk is very busy.
const KILL_DEADLINE: Duration = Duration::from_secs(20);

/// A running child. It is ended, with its process group, when this is dropped; while a test fails, the end of its log is shown.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    id: u32,
    child: Mutex<Child>,
}

impl Process {
    /// The process id, and that of its group.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The name it was started under.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its output goes.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Its output so far, with that of earlier processes of the same name in the same folder.
    #[must_use]
    pub fn log(&self) -> String {
        self.log_since(0)
    }

    /// The length of its output so far, for [`Process::wait_for_line_since`].
    #[must_use]
    pub fn mark(&self) -> u64 {
        fs::metadata(&self.log).map_or(0, |log| log.len())
    }

    /// Its output from a mark on.
    #[must_use]
    pub fn log_since(&self, mark: u64) -> String {
        let mut text = Vec::new();
        // A log that cannot be read is an empty one: what waits for its lines says so.
        if let Ok(mut file) = File::open(&self.log)
            && file.seek(SeekFrom::Start(mark)).is_ok()
        {
            file.read_to_end(&mut text).ok();
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Waits for the first line that holds `needle`.
    ///
    /// # Errors
    /// With the end of the log, at the deadline or when the process ends before.
    pub fn wait_for_line(&self, needle: &str, deadline: Duration) -> Result<String> {
        self.wait_for_line_since(0, needle, deadline)
    }

    /// The same, without what was written before `mark`.
    ///
    /// # Errors
    /// As [`Process::wait_for_line`].
    pub fn wait_for_line_since(&self, mark: u64, needle: &str, within: Duration) -> Result<String> {
        let what = format!("{} writes {needle:?}", self.name);
        let found = wait::poll(within, &what, || {
            // The end is looked at first: what it wrote before is in the log by then.
            let ended = self.exited().ok().flatten();
            let log = self.log_since(mark);
            match (log.lines().find(|line| line.contains(needle)), ended) {
                (Some(line), _) => Ok(Ok(line.to_owned())),
                (None, Some(status)) => Ok(Err(anyhow!("{} ended with {status}", self.name))),
                (None, None) => Err("no such line"),
            }
        });
        found.and_then(|line| line).with_context(|| self.tail())
    }

    /// Sends a signal to it alone, not to its group.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // Under the lock nobody can reap it meanwhile, so the id is still its own.
        let mut child = self.child.lock();
        if let Some(status) = child.try_wait()? {
            bail!("{} has ended: {status}", self.name);
        }
        kill(pid(self.id)?, signal).with_context(|| format!("signalling {}", self.name))
    }

    /// Ends its whole group at once with SIGKILL.
    ///
    /// # Errors
    /// When it does not vanish.
    pub fn kill(&self) -> Result<()> {
        {
            let mut child = self.child.lock();
            if child.try_wait()?.is_some() {
                return Ok(());
            }
            killpg(pid(self.id)?, Signal::SIGKILL)?;
        }
        self.wait(KILL_DEADLINE).map(|_| ())
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// When the kernel does not know it.
    pub fn exited(&self) -> Result<Option<ExitStatus>> {
        self.child
            .lock()
            .try_wait()
            .with_context(|| format!("looking at {}", self.name))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it still runs at the deadline.
    pub fn wait(&self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("{} ends", self.name);
        let seen = wait::poll(deadline, &what, || match self.exited() {
            Ok(None) => Err("it runs"),
            Ok(Some(status)) => Ok(Ok(status)),
            Err(error) => Ok(Err(error)),
        });
        seen.and_then(|status| status).with_context(|| self.tail())
    }

    /// Asks it to end with SIGTERM, and waits.
    ///
    /// # Errors
    /// When it has ended before, or still runs at the deadline.
    pub fn terminate(&self, deadline: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(deadline)
    }

    fn tail(&self) -> String {
        tail(&self.name, &self.log())
    }
}

impl Drop for Process {
    #[expect(
        clippy::print_stderr,
        reason = "libtest shows it with the test that failed"
    )]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.tail());
        }
        if let Err(error) = self.kill() {
            eprintln!("{error:#}");
        }
    }
}

/// The ends of all logs in a folder, for a test that failed.
#[must_use]
pub fn tails(log_dir: &Path) -> String {
    let mut files: Vec<_> = fs::read_dir(log_dir)
        .map(|files| files.flatten().map(|file| file.path()).collect())
        .unwrap_or_default();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "log"));
    files.sort();
    let show = |file: &PathBuf| {
        let text = fs::read(file).unwrap_or_default();
        tail(&file.display().to_string(), &String::from_utf8_lossy(&text))
    };
    files.iter().map(show).collect::<Vec<_>>().join("\n")
}

fn tail(name: &str, log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    let tail = lines
        .get(lines.len().saturating_sub(TAIL)..)
        .unwrap_or_default();
    format!("--- end of the log of {name} ---\n{}\n---", tail.join("\n"))
}

fn pid(id: u32) -> Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(id)?))
}

/// Runs a command to its end and returns what it wrote.
///
/// # Errors
/// When it cannot be started, or does not end within the deadline (it is killed then).
pub fn output(mut command: Command, deadline: Duration) -> Result<Output> {
    let what = format!("{command:?}");
    // Files and not pipes: a command that writes much would wait for us, while we wait for it.
    let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command
        .stdin(Stdio::null())
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?);
    let mut child = parent::start(command).with_context(|| format!("starting {what}"))?;
    let ended = wait::poll(deadline, &what, || match child.try_wait() {
        Ok(status) => status.ok_or_else(|| "it runs".to_owned()),
        Err(error) => Err(error.to_string()),
    });
    let status = match ended {
        Ok(status) => status,
        Err(error) => {
            child.kill().and_then(|()| child.wait())?;
            return Err(error);
        }
    };
    let read = |file: &mut File| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    Ok(Output {
        status,
        stdout: read(&mut stdout)?,
        stderr: read(&mut stderr)?,
    })
}
