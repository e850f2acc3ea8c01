//! A program that goes on while the test does something else, with pipes on all three of its ends.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;

use super::steps::until;

/// A running program. It is killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    what: String,
    stdin: Option<ChildStdin>,
    out: Arc<Mutex<Vec<u8>>>,
    err: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Running {
    /// Starts a command, called `what` in messages, and keeps what it writes.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(what: &str, command: Command) -> Result<Self> {
        let out = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&out);
        let mut running = Self::start_into(what, command, move |bytes| {
            sink.lock().extend_from_slice(bytes);
        })?;
        running.out = out;
        Ok(running)
    }

    /// Starts a command, called `what` in messages, and hands what it writes to standard output to `sink`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_into(
        what: &str,
        mut command: Command,
        sink: impl FnMut(&[u8]) + Send + 'static,
    ) -> Result<Self> {
        let what = what.to_owned();
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start {what}"))?;
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            bail!("{what} has no pipes");
        };
        let err = Arc::new(Mutex::new(Vec::new()));
        let errors = Arc::clone(&err);
        let readers = vec![
            std::thread::spawn(move || read(stdout, sink)),
            std::thread::spawn(move || {
                read(stderr, move |bytes| errors.lock().extend_from_slice(bytes));
            }),
        ];
        Ok(Self {
            stdin: child.stdin.take(),
            child,
            what,
            out: Arc::default(),
            err,
            readers,
        })
    }

    /// Writes to its standard input.
    ///
    /// # Errors
    /// When it is closed.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self
            .stdin
            .as_mut()
            .ok_or_else(|| anyhow!("standard input is closed"))?;
        stdin
            .write_all(bytes)
            .and_then(|()| stdin.flush())
            .context("write to kubectl")
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// What it has written so far, unless a sink takes it.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out.lock()).into_owned()
    }

    /// What it has written to standard error so far.
    #[must_use]
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.err.lock()).trim().to_owned()
    }

    /// Waits until its output holds `needle`, returns the output.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn wait_for(&self, needle: &str, deadline: Duration) -> Result<String> {
        until(
            deadline,
            &format!("{} writes {needle:?}", self.what),
            || {
                let text = self.text();
                ensure!(text.contains(needle), "{text:?}, {:?}", self.errors());
                Ok(text)
            },
        )
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        ensure!(self.child.try_wait()?.is_none(), "{} has ended", self.what);
        Ok(kill(
            Pid::from_raw(i32::try_from(self.child.id())?),
            signal,
        )?)
    }

    /// Waits for its end, and for the end of what it wrote.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let status = until(deadline, &format!("{} ends", self.what), || {
            let ended = self.child.try_wait()?;
            ended.with_context(|| {
                let errors = String::from_utf8_lossy(&self.err.lock()).into_owned();
                format!("it runs; standard error: {errors:?}")
            })
        })?;
        for reader in self.readers.drain(..) {
            ensure!(reader.join().is_ok(), "the sink of {} panicked", self.what);
        }
        Ok(status)
    }

    /// All it wrote, once it has ended well.
    ///
    /// # Errors
    /// When it fails, with its standard error, or does not end in time.
    pub fn finish(&mut self, deadline: Duration) -> Result<Vec<u8>> {
        let status = self.wait(deadline)?;
        ensure!(
            status.success(),
            "{}: {status}: {}",
            self.what,
            self.errors()
        );
        Ok(std::mem::take(&mut self.out.lock()))
    }

    /// Ends it at once.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("kill")?;
        self.child.wait().context("reap")?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails when it has been reaped already, which is what is wanted.
        self.kill().ok();
    }
}

fn read(mut from: impl Read, mut sink: impl FnMut(&[u8])) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count) = from.read(&mut buffer) {
        match buffer.get(..count) {
            Some(bytes) if count > 0 => sink(bytes),
            _ => return,
        }
    }
}
