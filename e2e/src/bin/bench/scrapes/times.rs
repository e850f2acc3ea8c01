//! How long requests took, from when they were due.

use std::time::Duration;

use anyhow::Result;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Failures that are shown.
const SHOWN: usize = 5;

/// Requests that ended.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub(super) struct Times {
    micros: Vec<u64>,
}

impl Times {
    pub(super) fn add(&mut self, took: Duration) {
        self.micros
            .push(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }

    pub(super) fn extend(&mut self, more: Self) {
        self.micros.extend(more.micros);
    }

    pub(super) fn count(&self) -> usize {
        self.micros.len()
    }

    /// Milliseconds that this share of the requests took at most.
    pub(super) fn quantile(&self, share: f64) -> Result<f64> {
        let mut histogram = Histogram::<u64>::new(3)?;
        for micros in &self.micros {
            histogram.record(*micros)?;
        }
        Ok(histogram.value_at_quantile(share) as f64 / 1e3)
    }
}

/// Requests that failed.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub(super) struct Failures {
    pub(super) count: usize,
    /// The first ones.
    pub(super) said: Vec<String>,
}

impl Failures {
    pub(super) fn add(&mut self, said: String) {
        self.count += 1;
        if self.said.len() < SHOWN {
            self.said.push(said);
        }
    }

    pub(super) fn extend(&mut self, more: Self) {
        self.count += more.count;
        let room = SHOWN.saturating_sub(self.said.len());
        self.said.extend(more.said.into_iter().take(room));
    }
}
