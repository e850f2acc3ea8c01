//! The processes of a benchmark: what they say, what they cost.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

/// A process that ends with its handle.
pub(crate) struct Hop(Child);

impl Drop for Hop {
    fn drop(&mut self) {
        self.0.kill().ok(); // already gone is as good
        self.0.wait().ok();
    }
}

impl Hop {
    pub(crate) const fn of(child: Child) -> Self {
        Self(child)
    }

    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        Ok(Self(
            command
                .stdin(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .context("start a process")?,
        ))
    }

    /// Starts one that talks.
    pub(crate) fn talking(command: &mut Command) -> Result<(Self, Lines)> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a process")?;
        let out = child.stdout.take();
        let hop = Self(child);
        Ok((hop, Lines(BufReader::new(out.context("no output")?))))
    }

    /// User and system time so far; also of one that has ended.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        // proc(5): utime and stime are fields 14 and 15, the 12th and 13th behind the name; 100 ticks a second.
        let ticks = |i: usize| {
            fields
                .get(i)
                .and_then(|f| f.parse::<u64>().ok())
                .unwrap_or(0)
        };
        Ok(Duration::from_millis(10 * (ticks(11) + ticks(12))))
    }

    /// Resident memory, bytes.
    pub(crate) fn rss(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .context("no VmRSS")?;
        let kib: u64 = line.split_whitespace().nth(1).unwrap_or_default().parse()?;
        Ok(kib << 10)
    }
}

/// What a process says.
pub(crate) struct Lines(BufReader<ChildStdout>);

impl Lines {
    /// Waits for the next line.
    pub(crate) fn next(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "a process ended before its time");
        Ok(line.trim_end().to_owned())
    }
}
