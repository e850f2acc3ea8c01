//! What to start, and how: in which namespace, with which output, and bound to the life of the test process.

use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;

use super::{Process, parent};
use crate::net::Host;

/// What to start.
#[derive(Debug)]
pub struct Spawn {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(String, OsString)>,
    host: Option<Host>,
}

impl Spawn {
    /// `name` names the log file and stands in messages.
    pub fn new(name: &str, program: impl Into<PathBuf>) -> Self {
        let program = program.into();
        Self {
            name: name.into(),
            program,
            args: Vec::new(),
            env: Vec::new(),
            host: None,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable; the others are inherited.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.into(), value.as_ref().into()));
        self
    }

    /// Runs it in that host's namespace in place of the test's own.
    #[must_use]
    pub fn host(mut self, host: &Host) -> Self {
        self.host = Some(host.clone());
        self
    }

    /// Starts it, with nothing to read and with its output appended to `<log_dir>/<name>.log`.
    ///
    /// # Errors
    /// When the program or the log file is not there, or the fork fails.
    pub fn start(self, log_dir: &Path) -> Result<Process> {
        if self.program.components().count() > 1 && !self.program.exists() {
            bail!("{}: no such program: {}", self.name, self.program.display());
        }
        let log = log_dir.join(format!("{}.log", self.name));
        let opened = OpenOptions::new().create(true).append(true).open(&log);
        let output = opened.with_context(|| format!("opening {}", log.display()))?;
        // setpriv and nsenter end in an exec of the next one, so the id that is returned is the program's own.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        if let Some(host) = &self.host {
            command
                .arg("nsenter")
                .arg(format!("--net={}", host.netns().display()))
                .arg("--");
        }
        command.arg(&self.program).args(self.args).envs(self.env);
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0);
        let child = parent::start(command).with_context(|| format!("starting {}", self.name))?;
        Ok(Process {
            name: self.name,
            log,
            id: child.id(),
            child: Mutex::new(child),
        })
    }
}
