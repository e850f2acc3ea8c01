//! One host: its namespace, what runs in it, and what makes it a router or a NAT box.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::CloneFlags;

use super::{ip, succeeded};
use crate::process;

/// Programs that set up a host end in milliseconds; this only keeps a broken one from stopping a run.
const PROGRAM_DEADLINE: Duration = Duration::from_secs(120);

/// A handle to one host; the [`Net`](super::Net) owns the namespace behind it.
#[derive(Clone, Debug)]
pub struct Host {
    pub(super) name: Arc<str>,
    pub(super) netns: Arc<Path>,
}

impl Host {
    /// The name it was added under.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for its namespace.
    #[must_use]
    pub fn netns(&self) -> &Path {
        &self.netns
    }

    pub(super) fn netns_name(&self) -> &str {
        self.netns
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default()
    }

    /// A command that will run in this namespace. By `nsenter`, not `ip netns exec`: that one mounts another `/sys`, which
    /// hides the cgroup mounts that a kubelet looks for.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.netns.display()))
            .arg("--")
            .arg(program);
        command
    }

    /// Runs a program to its end and returns what it wrote.
    ///
    /// # Errors
    /// When it cannot be started, fails (with its standard error) or does not end within two minutes.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = self.command(program);
        command.args(args);
        let output = process::output(command, PROGRAM_DEADLINE)?;
        succeeded(&output).with_context(|| format!("{program} {args:?} on {}", self.name))
    }

    /// `ip` in this namespace; the arguments are split at blanks.
    ///
    /// # Errors
    /// When it fails.
    pub fn ip(&self, args: &str) -> Result<String> {
        let mut all = vec!["-n", self.netns_name()];
        all.extend(args.split_whitespace());
        ip(&all)
    }

    /// Loads nftables rules.
    ///
    /// # Errors
    /// When `nft` refuses them.
    pub fn nft(&self, rules: &str) -> Result<()> {
        let mut command = self.command("nft");
        command
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context("starting nft")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin
                .write_all(rules.as_bytes())
                .context("writing to nft")?;
        }
        let output = child.wait_with_output().context("waiting for nft")?;
        succeeded(&output).with_context(|| format!("nft on {}", self.name))?;
        Ok(())
    }

    /// Sets a `net.*` variable of this namespace.
    ///
    /// # Errors
    /// When it is not under `net`, or cannot be written.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        ensure!(
            key.starts_with("net."),
            "{key} is not a variable of a network namespace"
        );
        let file = Path::new("/proc/sys").join(key.replace('.', "/"));
        let written = self.enter(|| fs::write(&file, value))?;
        written.with_context(|| format!("setting {key} on {}", self.name))
    }

    /// Makes it a router.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn forward(&self) -> Result<()> {
        self.sysctl("net.ipv4.ip_forward", "1")
    }

    /// Makes it a NAT box as a home or factory has it: what leaves by `wan` gets the box's own address, and what comes in
    /// unasked is dropped.
    ///
    /// # Errors
    /// When the kernel or `nft` refuses.
    pub fn masquerade(&self, wan: &str) -> Result<()> {
        self.forward()?;
        self.nft(&format!(
            "table ip nat {{
                 chain out {{ type nat hook postrouting priority srcnat; oifname \"{wan}\" masquerade; }}
             }}
             table ip filter {{
                 chain unasked {{
                     type filter hook forward priority filter;
                     iifname \"{wan}\" ct state established,related accept
                     iifname \"{wan}\" drop
                 }}
             }}"
        ))
    }

    /// Runs `work` on a thread inside the namespace; sockets that it makes stay there.
    ///
    /// # Errors
    /// When the namespace is gone, or `work` panics.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let thread = || {
            self.join()?;
            Ok(work())
        };
        std::thread::scope(|scope| scope.spawn(thread).join())
            .unwrap_or_else(|_| bail!("a thread inside {} panicked", self.name))
    }

    /// Moves the calling thread into the namespace, for good.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub(crate) fn join(&self) -> Result<()> {
        let opened = File::open(&self.netns);
        let file = opened.with_context(|| format!("opening the namespace of {}", self.name))?;
        nix::sched::setns(file, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("entering the namespace of {}", self.name))
    }
}
