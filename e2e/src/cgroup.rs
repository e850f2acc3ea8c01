//! A control group with a memory limit, as a container has one. Both versions of the kernel's interface.
//!
//! Processes get in by writing their own id before they become what they are, so that all they ever take is counted.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result};

use crate::process::Spawn;

/// Where version 1 has its memory controller, and version 2 everything.
const V1: &str = "/sys/fs/cgroup/memory";
const V2: &str = "/sys/fs/cgroup";

/// A group of processes that together have so much memory. Removed when dropped; its processes must have ended by then.
#[derive(Debug)]
pub struct MemoryGroup {
    folder: PathBuf,
    version_1: bool,
}

impl MemoryGroup {
    /// Makes one without swap. Version 1 of the interface counts what the kernel keeps for sockets apart: there `sockets` of
    /// the limit is theirs, and what is left the rest's. That is stricter than version 2, where both share the limit.
    ///
    /// # Errors
    /// When the kernel has no memory controller for us.
    pub fn new(limit: u64, sockets: u64) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let version_1 = Path::new(V1).join("memory.limit_in_bytes").exists();
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("corvid-{}-{number}", std::process::id());
        let folder = Path::new(if version_1 { V1 } else { V2 }).join(name);
        fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
        let group = Self { folder, version_1 };
        if version_1 {
            group.set("memory.limit_in_bytes", limit.saturating_sub(sockets))?;
            group.set("memory.kmem.tcp.limit_in_bytes", sockets)?;
        } else {
            group.set("memory.max", limit)?;
            group.set("memory.swap.max", 0).ok(); // a kernel without swap has no such file
        }
        Ok(group)
    }

    fn set(&self, file: &str, value: u64) -> Result<()> {
        let path = self.folder.join(file);
        fs::write(&path, value.to_string()).with_context(|| format!("write {}", path.display()))
    }

    fn number(&self, file: &str) -> Result<u64> {
        let path = self.folder.join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Ok(text.trim().parse()?)
    }

    /// A program that starts within.
    #[must_use]
    pub fn spawn(&self, name: &str, program: &Path) -> Spawn {
        let join = format!(
            "echo $$ >{}/cgroup.procs && exec \"$0\" \"$@\"",
            self.folder.display()
        );
        Spawn::new(name, "sh").args(["-c", &join]).arg(program)
    }

    /// The most that was ever taken, bytes.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn peak(&self) -> Result<u64> {
        self.number(if self.version_1 {
            "memory.max_usage_in_bytes"
        } else {
            "memory.peak"
        })
    }

    /// The most that sockets ever held, bytes, where it is counted apart.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn socket_peak(&self) -> Result<Option<u64>> {
        if self.version_1 {
            return self.number("memory.kmem.tcp.max_usage_in_bytes").map(Some);
        }
        Ok(None)
    }

    /// How often sockets were refused memory, where it is counted apart.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn sockets_refused(&self) -> Result<u64> {
        if self.version_1 {
            return self.number("memory.kmem.tcp.failcnt");
        }
        Ok(0)
    }

    /// How many of its processes the kernel has killed for want of memory.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn kills(&self) -> Result<u64> {
        let file = if self.version_1 {
            "memory.oom_control"
        } else {
            "memory.events"
        };
        let text = fs::read_to_string(self.folder.join(file))?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(count.context("no oom_kill")?.trim().parse()?)
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // One that is left behind is empty, and costs nothing.
        fs::remove_dir(&self.folder).ok();
    }
}
