//! What a process uses, from `/proc`.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::Process;

/// `USER_HZ`: the unit of the times in `/proc/<pid>/stat`, part of the kernel's ABI (proc(5)).
const TICKS_A_SECOND: u64 = 100;

impl Process {
    /// Resident memory in bytes.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn rss(&self) -> Result<u64> {
        Ok(self.status("VmRSS:")? * 1024)
    }

    /// Its threads.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn threads(&self) -> Result<u64> {
        self.status("Threads:")
    }

    /// Its open file descriptors.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn fds(&self) -> Result<usize> {
        let folder = fs::read_dir(format!("/proc/{}/fd", self.id()));
        Ok(folder
            .with_context(|| format!("descriptors of {}", self.name()))?
            .count())
    }

    /// Processor time so far, user and system, of all its threads.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn cpu(&self) -> Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.id()))
            .with_context(|| format!("times of {}", self.name()))?;
        // The second field is the program's name in brackets, and may hold blanks and brackets itself.
        let fields = stat
            .rsplit_once(')')
            .context("no name in /proc/<pid>/stat")?
            .1;
        let mut ticks = 0;
        for field in fields.split_whitespace().skip(11).take(2) {
            ticks += field.parse::<u64>()?;
        }
        Ok(Duration::from_millis(ticks * 1000 / TICKS_A_SECOND))
    }

    fn status(&self, key: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()))
            .with_context(|| format!("status of {}", self.name()))?;
        let value = status.lines().find_map(|line| line.strip_prefix(key));
        let number = value.and_then(|value| value.split_whitespace().next());
        let number = number.with_context(|| format!("no {key} for {}", self.name()))?;
        Ok(number.parse()?)
    }
}
