//! What a session goes over, as that bears on which of an agent's sessions is taken first: a dedicated line before the
//! internet, but not one that was silent of late.
//!
//! | the line | a session over it is taken |
//! | --- | --- |
//! | well | before others, whichever is newer |
//! | silent: a request or the keepalives show it | last, as any that is silent (`rank.rs`) |
//! | heard again, for less than `path.stable` | after those over the internet |
//!
//! The name is the agent's word. It orders that agent's own sessions and is shown; nothing else follows from it.

use std::time::Duration;

use parking_lot::Mutex;
use proto::LineName;
use tokio::time::Instant;

use crate::path::gate::Gate;

/// What a session goes over. Better ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Over {
    /// A line that was silent of late.
    ShakyLine,
    /// No line.
    Internet,
    /// A line.
    Line,
}

/// The line that a session goes over.
#[derive(Debug)]
pub struct OverLine {
    name: LineName,
    stable: Duration,
    gate: Mutex<Gate>,
}

impl OverLine {
    /// Taken to be well, until it is silent; from then on after `stable`.
    #[must_use]
    pub fn new(name: LineName, stable: Duration) -> Self {
        let gate = Mutex::new(Gate::new(Instant::now()));
        Self { name, stable, gate }
    }

    /// What is known of it now.
    pub(super) fn copy(&self) -> Self {
        Self::new(self.name.clone(), self.stable).after(Some(self))
    }

    /// The same, as well as it was found to be by a session over it that has ended or is about to.
    #[must_use]
    pub fn after(self, before: Option<&Self>) -> Self {
        if let Some(before) = before {
            *self.gate.lock() = *before.gate.lock();
        }
        self
    }

    /// What the agent calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name.as_str()
    }

    /// What it is now, given whether the session is silent.
    pub(super) fn look(&self, silent: bool) -> Over {
        if self.gate.lock().look(!silent, Instant::now(), self.stable) {
            Over::Line
        } else {
            Over::ShakyLine
        }
    }
}
