//! The machine that a node runs on, in as far as the network namespace is not enough: a process tree and mounts of its own.
//!
//! containerd's shims and pods outlive containerd, and mounts outlive everybody. Inside a pid namespace and a mount
//! namespace they end with one process, also when the test is killed: the kernel does the cleaning. What is left are
//! empty cgroups of containers, which the end of a sandbox, or the next run, removes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::steps::until;
use crate::net::Host;
use crate::process::{Process, Spawn};

/// The parent of all containers' cgroups: containerd names it after its namespace when kubelet names none.
const PARENT: &str = "k8s.io";

/// Folders where programs of two nodes would meet: shim sockets and namespace names, the CNI cache, links to pod logs.
/// Files that the kubelet sets, and that belong to the whole machine, become copies.
const SCRIPT: &str = r#"set -e
for dir in /run /var/lib/cni /var/log; do mkdir -p $dir; mount -t tmpfs tmpfs $dir; done
for key in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
  copy=/run/sysctl/$key; mkdir -p ${copy%/*}
  cat /proc/sys/$key >$copy; mount --bind $copy /proc/sys/$key
done
echo sandbox is ready
while :; do sleep 3600 & wait; done"#;

/// A running sandbox.
#[derive(Debug)]
pub(super) struct Sandbox {
    holder: Process,
    host: Host,
    tasks: PathBuf,
}

impl Sandbox {
    /// Makes one on a host; in `tasks` containerd will have a folder for each of its containers.
    pub(super) fn new(host: &Host, tasks: PathBuf, logs: &Path) -> Result<Self> {
        let holder = Spawn::new(&format!("sandbox-{}", host.name()), "unshare")
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--kill-child=KILL",
                "--mount-proc",
            ])
            .args(["sh", "-c", SCRIPT])
            .host(host)
            .start(logs)?;
        let sandbox = Self {
            holder,
            host: host.clone(),
            tasks,
        };
        sandbox
            .holder
            .wait_for_line("sandbox is ready", Duration::from_secs(10))?;
        Ok(sandbox)
    }

    /// The arguments with which `nsenter` starts a program inside: its children's children stay inside too.
    fn enter(&self) -> [String; 4] {
        let ns = format!("/proc/{}/ns", self.holder.id());
        [
            format!("--net={}", self.host.netns().display()),
            format!("--mount={ns}/mnt"),
            format!("--pid={ns}/pid_for_children"),
            "--".to_owned(),
        ]
    }

    /// Where a file inside is, seen from outside.
    pub(super) fn outside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.holder.id()))
    }

    /// A program to start inside.
    pub(super) fn spawn(&self, name: &str, program: &str) -> Spawn {
        Spawn::new(name, "nsenter").args(self.enter()).arg(program)
    }

    /// Runs a program inside to its end.
    pub(super) fn run(&self, program: &str, args: &[&str], deadline: Duration) -> Result<()> {
        let mut command = std::process::Command::new("nsenter");
        command.args(self.enter()).arg(program).args(args);
        let output = crate::process::output(command, deadline)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {args:?}: {errors}");
        Ok(())
    }
}

impl Drop for Sandbox {
    #[expect(
        clippy::print_stderr,
        reason = "libtest shows it with the test that failed"
    )]
    fn drop(&mut self) {
        let ended = self.holder.kill().and_then(|()| {
            // The kernel ends the rest of the tree a moment after its first process.
            until(Duration::from_secs(20), "containers are gone", || {
                remove_cgroups(&self.tasks)
            })
        });
        if let Err(error) = ended {
            eprintln!("{error:#}");
        }
    }
}

/// Removes the cgroups of the containers that have a folder in `tasks`.
pub(super) fn remove_cgroups(tasks: &Path) -> Result<()> {
    for container in fs::read_dir(tasks).into_iter().flatten().flatten() {
        for hierarchy in hierarchies() {
            remove_tree(&hierarchy.join(PARENT).join(container.file_name()))?;
        }
    }
    for hierarchy in hierarchies() {
        // Another run may have containers in it.
        fs::remove_dir(hierarchy.join(PARENT)).ok();
    }
    Ok(())
}

/// Where cgroups are: one hierarchy a controller (v1), or one for all (v2).
fn hierarchies() -> Vec<PathBuf> {
    let root = PathBuf::from("/sys/fs/cgroup");
    let inner = fs::read_dir(&root)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    inner.filter(|path| path.is_dir()).chain([root]).collect()
}

/// Removes a cgroup with those inside it: the files in it are not there to be removed, only the folders are.
fn remove_tree(dir: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(()); // not made in this hierarchy
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(dir).with_context(|| format!("remove the cgroup {}", dir.display()))
}
