//! kubectl on the cloud host: as a command with an end, and as one that goes on while the test does something else.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;

use crate::net::Host;
use crate::wait;

/// For a command that has little to do: long, since all of them share the machine's cores.
const DEADLINE: Duration = Duration::from_secs(60);

/// Starts kubectl with the admin's credentials.
#[derive(Clone, Debug)]
pub struct Kubectl {
    host: Host,
    program: PathBuf,
    kubeconfig: PathBuf,
    home: PathBuf,
}

impl Kubectl {
    pub(super) fn new(host: &Host, program: &Path, kubeconfig: PathBuf, home: &Path) -> Self {
        Self { host: host.clone(), program: program.to_owned(), kubeconfig, home: home.to_owned() }
    }

    /// A kubectl command, not started.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.on_host(&self.program);
        command.args(args);
        command
    }

    /// A shell on the cloud host, not started, with `$kubectl`: for what needs a terminal around kubectl.
    #[must_use]
    pub fn shell(&self, script: &str) -> Command {
        let mut command = self.on_host(Path::new("sh"));
        command.args(["-c", script]).env("kubectl", &self.program);
        command
    }

    /// A program that dies with the thread that starts it; nsenter and setpriv end in an exec, so its id is the child's.
    fn on_host(&self, program: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "nsenter"]);
        command.arg(format!("--net={}", self.host.netns().display())).arg("--").arg(program);
        // The cache of the API's resources goes below HOME.
        command.env("KUBECONFIG", &self.kubeconfig).env("HOME", &self.home);
        command
    }

    /// Runs to the end, whatever the status.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn output(&self, args: &[&str]) -> Result<Output> {
        crate::process::output(self.command(args), DEADLINE)
    }

    /// Runs to the end and returns what it wrote.
    ///
    /// # Errors
    /// With its standard error, when it fails.
    pub fn ok(&self, args: &[&str]) -> Result<Vec<u8>> {
        let output = self.output(args)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {}: {}", args.join(" "), errors.trim());
        Ok(output.stdout)
    }

    /// Runs to the end and returns its standard error.
    ///
    /// # Errors
    /// When it succeeds.
    pub fn fails(&self, args: &[&str]) -> Result<String> {
        let output = self.output(args)?;
        ensure!(!output.status.success(), "kubectl {} did not fail", args.join(" "));
        Ok(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }

    /// Starts it, keeps what it writes.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, args: &[&str]) -> Result<Running> {
        Running::start(self.command(args))
    }

    /// Starts it, hands what it writes to standard output to `sink`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_into(
        &self,
        args: &[&str],
        sink: impl FnMut(&[u8]) + Send + 'static,
    ) -> Result<Running> {
        Running::start_into(self.command(args), sink)
    }
}

/// A program that is running with pipes on all three of its ends. Killed when it is dropped.
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
    /// Starts a command, keeps what it writes.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: Command) -> Result<Self> {
        let out = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&out);
        let mut running = Self::start_into(command, move |bytes| {
            sink.lock().extend_from_slice(bytes);
        })?;
        running.out = out;
        Ok(running)
    }

    /// Starts a command, hands what it writes to standard output to `sink`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_into(
        mut command: Command,
        sink: impl FnMut(&[u8]) + Send + 'static,
    ) -> Result<Self> {
        let what = format!("{command:?}");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
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
        Ok(Self { stdin: child.stdin.take(), child, what, out: Arc::default(), err, readers })
    }

    /// Writes to its standard input.
    ///
    /// # Errors
    /// When it is closed.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self.stdin.as_mut().ok_or_else(|| anyhow!("standard input is closed"))?;
        stdin.write_all(bytes).and_then(|()| stdin.flush()).context("write to kubectl")
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
        wait::poll(deadline, &format!("{} writes {needle:?}", self.what), || {
            let text = self.text();
            if text.contains(needle) { Ok(text) } else { Err((text, self.errors())) }
        })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        ensure!(self.child.try_wait()?.is_none(), "{} has ended", self.what);
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    /// Waits for its end, and for the end of what it wrote.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let ended = wait::poll(deadline, &format!("{} ends", self.what), || {
            self.child.try_wait().map_err(|error| error.to_string())?.ok_or_else(|| {
                let errors = String::from_utf8_lossy(&self.err.lock()).into_owned();
                format!("it runs; standard error: {errors}")
            })
        });
        let status = ended?;
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
        ensure!(status.success(), "{}: {status}: {}", self.what, self.errors());
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
