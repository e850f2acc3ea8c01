//! Named steps of one long test, in order, each reported with its time when it ends; all failures are told at the end.

use std::fmt::{self, Debug, Display, Formatter};
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use anyhow::{Result, anyhow};
use tokio::time::Instant;

use crate::wait;

/// Comma-separated beginnings of names: only the steps whose name has one of them run.
const ONLY: &str = "CORVID_STEPS";

/// The steps so far.
#[derive(Debug)]
pub struct Steps {
    start: Instant,
    only: Option<String>,
    done: usize,
    failures: Vec<String>,
}

impl Default for Steps {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            only: std::env::var(ONLY).ok(),
            done: 0,
            failures: Vec::new(),
        }
    }
}

impl Steps {
    /// Runs a step. What it returns is shown beside its time; a failure or a panic is kept for [`Self::finish`]. Returns
    /// whether it went well, or was not asked for.
    pub fn run<T: Display>(&mut self, name: &str, step: impl FnOnce() -> Result<T>) -> bool {
        if let Some(only) = &self.only
            && !only.split(',').any(|part| name.starts_with(part))
        {
            return true;
        }
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(step)).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(anyhow!("panicked: {}", text.unwrap_or("no message")))
        });
        let took = seconds(start.elapsed());
        self.done += 1;
        match result {
            Ok(note) => {
                report(&format!("  {name}: {took}; {note}"));
                true
            }
            Err(error) => {
                let failure = format!("{name} ({took}): {error:#}");
                report(&format!("  FAILED {failure}"));
                self.failures.push(failure);
                false
            }
        }
    }

    /// Ends the test.
    ///
    /// # Panics
    /// When a step failed, or none ran, with all failures.
    #[expect(clippy::panic, reason = "this is an assertion of a test")]
    pub fn finish(self) {
        let took = seconds(self.start.elapsed());
        let failed = self.failures.len();
        report(&format!("  {} steps in {took}, {failed} failed", self.done));
        if self.done == 0 {
            panic!("no step has a name that {ONLY} asks for");
        }
        if failed > 0 {
            panic!(
                "{failed} of {} steps failed:\n{}",
                self.done,
                self.failures.join("\n")
            );
        }
    }
}

/// A line for the one who waits: past libtest's capture, since the whole takes minutes.
pub fn report(line: &str) {
    // Nobody to tell is no reason to fail.
    writeln!(std::io::stderr(), "{line}").ok();
}

/// [`wait::poll`] for a probe whose error is told without its backtrace.
///
/// # Errors
/// At the deadline.
pub fn until<T>(deadline: Duration, what: &str, mut probe: impl FnMut() -> Result<T>) -> Result<T> {
    wait::poll(deadline, what, || {
        probe().map_err(|error| Seen(format!("{error:#}")))
    })
}

/// Shows a text as it is.
struct Seen(String);

impl Debug for Seen {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
