//! Named hosts in network namespaces, veth links between them, routers and NAT boxes.
//!
//! A [`Net`] owns its namespaces and removes them when it is dropped; the next run removes those of a run that was killed.
//! Names carry the pid, so that runs side by side never meet. It must not touch the machine's own addresses, routes or
//! firewall rules: everything happens inside namespaces that it made.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow, ensure};
use parking_lot::Mutex;

mod host;
mod sites;

pub use host::Host;

/// Where `ip netns` keeps its names.
const NAMES: &str = "/run/netns";
/// Every namespace of ours starts so; the pid of its run and a number of the [`Net`] follow.
const PREFIX: &str = "corvid-";

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
#[expect(clippy::panic, reason = "speaks to the one who runs the tests")]
pub fn may_run() -> bool {
    if root() {
        return true;
    }
    if std::env::var("CI").is_ok_and(|value| value == "true") {
        panic!("needs root, and CI=true allows no skipped test");
    }
    // Past libtest, which swallows what a test that passes prints.
    writeln!(std::io::stderr(), "skipped: needs root").ok();
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
        Ok(Self {
            prefix,
            hosts: Mutex::new(Vec::new()),
        })
    }

    /// Adds a host, with its loopback interface up.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn add(&self, name: &str) -> Result<Host> {
        let netns = format!("{}{name}", self.prefix);
        ip(&["netns", "add", &netns])?;
        let host = Host {
            name: name.into(),
            netns: Path::new(NAMES).join(netns).into(),
        };
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

fn ip(args: &[&str]) -> Result<String> {
    let output = Command::new("ip")
        .args(args)
        .output()
        .context("starting ip")?;
    succeeded(&output).with_context(|| format!("ip {}", args.join(" ")))
}

fn succeeded(output: &Output) -> Result<String> {
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{}: {}",
        output.status,
        errors.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Removes the namespaces of runs whose process is gone.
fn sweep() -> Result<()> {
    let Ok(names) = fs::read_dir(NAMES) else {
        return Ok(()); // no namespace was ever made on this machine
    };
    for name in names
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
    {
        let pid = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok()) else {
            continue;
        };
        // A zombie has no program any more: some containers have no init that would reap it.
        if fs::read_link(format!("/proc/{pid}/exe")).is_err() {
            let removed = ip(&["netns", "del", &name]);
            // Another run may sweep at the same time.
            if Path::new(NAMES).join(&name).exists() {
                removed?;
            }
        }
    }
    Ok(())
}
