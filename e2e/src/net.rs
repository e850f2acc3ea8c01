//! Named hosts in network namespaces, veth links between them, routers and NAT boxes.
//!
//! A [`Net`] owns its namespaces and removes them when it is dropped; the next run removes those of a run that was killed.
//! Names carry the pid, so that runs side by side never meet. It must not touch the machine's own addresses, routes or
//! firewall rules: everything happens inside namespaces that it made.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sched::CloneFlags;
use parking_lot::Mutex;

mod sites;

/// Where `ip netns` keeps its names.
const NAMES: &str = "/run/netns";
/// Every namespace of ours starts so; the pid of its run and a number of the [`Net`] follow.
const PREFIX: &str = "corvid-";
/// Programs that set up a host end in milliseconds; this only keeps a broken one from stopping a run.
const PROGRAM_DEADLINE: Duration = Duration::from_secs(120);

/// True for a test that may make namespaces.
#[must_use]
pub fn root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// First line of every test that needs root: `false` after one line that says that the test is skipped.
///
/// # Panics
/// With `CI=true` in the environment, where a skipped test is a failure.
#[must_use]
#[expect(clippy::print_stderr, clippy::panic, reason = "speaks to the one who runs the tests")]
pub fn may_run() -> bool {
    if root() {
        return true;
    }
    if std::env::var("CI").is_ok_and(|value| value == "true") {
        panic!("needs root, and CI=true allows no skipped test");
    }
    eprintln!("skipped: needs root");
    false
}

/// The namespaces of one run.
#[derive(Debug)]
pub struct Net {
    prefix: String,
    hosts: Mutex<Vec<Host>>,
}

impl Net {
    /// Makes a net without hosts, and removes what runs that were killed have left.
    ///
    /// # Errors
    /// When a leftover cannot be removed.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        sweep()?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{PREFIX}{}-{number}-", std::process::id());
        Ok(Self { prefix, hosts: Mutex::new(Vec::new()) })
    }

    /// Adds a host, with its loopback interface up.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn add(&self, name: &str) -> Result<Host> {
        let netns = format!("{}{name}", self.prefix);
        ip(&["netns", "add", &netns])?;
        let host = Host { name: name.into(), netns: Path::new(NAMES).join(netns).into() };
        self.hosts.lock().push(host.clone());
        host.ip("link set lo up")?;
        Ok(host)
    }

    /// A host that was added before.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn host(&self, name: &str) -> Result<Host> {
        let hosts = self.hosts.lock();
        let found = hosts.iter().find(|host| &*host.name == name).cloned();
        found.ok_or_else(|| anyhow!("no host {name} in this net"))
    }

    /// Lays a veth pair between two hosts: host, interface, address with prefix length on each side; both ends up.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn link(&self, a: (&Host, &str, &str), b: (&Host, &str, &str)) -> Result<()> {
        let (near, far) = (a.0.netns_name(), b.0.netns_name());
        ip(&[
            "link", "add", a.1, "netns", near, "type", "veth", "peer", "name", b.1, "netns", far,
        ])?;
        for (host, interface, address) in [a, b] {
            host.ip(&format!("addr add {address} dev {interface}"))?;
            host.ip(&format!("link set {interface} up"))?;
        }
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for host in self.hosts.get_mut() {
            // What cannot be removed stays for the next run's sweep.
            ip(&["netns", "del", host.netns_name()]).ok();
        }
    }
}

/// A handle to one host; the [`Net`] owns the namespace behind it.
#[derive(Clone, Debug)]
pub struct Host {
    name: Arc<str>,
    netns: Arc<Path>,
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

    fn netns_name(&self) -> &str {
        self.netns.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// A command that will run in this namespace. By `nsenter`, not `ip netns exec`: that one mounts another `/sys`, which
    /// hides the cgroup mounts that a kubelet looks for.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.netns.display())).arg("--").arg(program);
        command
    }

    /// Runs a program to its end and returns what it wrote.
    ///
    /// # Errors
    /// When it cannot be started, fails (with its standard error) or does not end within two minutes.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = self.command(program);
        command.args(args);
        let output = crate::process::output(command, PROGRAM_DEADLINE)?;
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
        command.args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("starting nft")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(rules.as_bytes()).context("writing to nft")?;
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
        ensure!(key.starts_with("net."), "{key} is not a variable of a network namespace");
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
        let opened = fs::File::open(&self.netns);
        let file = opened.with_context(|| format!("opening the namespace of {}", self.name))?;
        nix::sched::setns(file, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("entering the namespace of {}", self.name))
    }
}

fn ip(args: &[&str]) -> Result<String> {
    let output = Command::new("ip").args(args).output().context("starting ip")?;
    succeeded(&output).with_context(|| format!("ip {}", args.join(" ")))
}

fn succeeded(output: &Output) -> Result<String> {
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}", output.status, errors.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Removes the namespaces of runs whose process is gone.
fn sweep() -> Result<()> {
    let Ok(names) = fs::read_dir(NAMES) else {
        return Ok(()); // no namespace was ever made on this machine
    };
    for name in names.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok()) else {
            continue;
        };
        if !PathBuf::from(format!("/proc/{pid}")).exists() {
            let removed = ip(&["netns", "del", &name]);
            // Another run may sweep at the same time.
            if Path::new(NAMES).join(&name).exists() {
                removed?;
            }
        }
    }
    Ok(())
}
