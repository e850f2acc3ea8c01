//! kubectl on the cloud host, as the admin.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Result, ensure};

use super::running::Running;
use crate::net::Host;

/// For a command that has little to do: long, since all of them share the machine's cores.
const DEADLINE: Duration = Duration::from_secs(60);

/// Starts kubectl commands.
#[derive(Clone, Debug)]
pub struct Kubectl {
    host: Host,
    program: PathBuf,
    kubeconfig: PathBuf,
    home: PathBuf,
}

impl Kubectl {
    /// Of a host, as whom that kubeconfig says; `home` is a folder of its own.
    #[must_use]
    pub fn new(host: &Host, program: &Path, kubeconfig: PathBuf, home: &Path) -> Self {
        Self {
            host: host.clone(),
            program: program.to_owned(),
            kubeconfig,
            home: home.to_owned(),
        }
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
        command
            .arg(format!("--net={}", self.host.netns().display()))
            .arg("--")
            .arg(program);
        // The cache of the API's resources goes below HOME.
        command
            .env("KUBECONFIG", &self.kubeconfig)
            .env("HOME", &self.home);
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
        ensure!(
            output.status.success(),
            "{}: {}",
            label(args),
            errors.trim()
        );
        Ok(output.stdout)
    }

    /// Runs to the end and returns its standard error.
    ///
    /// # Errors
    /// When it succeeds.
    pub fn fails(&self, args: &[&str]) -> Result<String> {
        let output = self.output(args)?;
        ensure!(!output.status.success(), "{} did not fail", label(args));
        Ok(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }

    /// Starts it, keeps what it writes.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, args: &[&str]) -> Result<Running> {
        Running::start(&label(args), self.command(args))
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
        Running::start_into(&label(args), self.command(args), sink)
    }
}

fn label(args: &[&str]) -> String {
    format!("kubectl {}", args.join(" "))
}
