//! What any Corvid service needs to run: telemetry, configuration loading, tasks that have an owner, listeners,
//! the observe and admin endpoints, readiness, signals and the service manager.
//!
//! Invariants: every task has an owner that sees its end; every queue, body, header and number of connections is
//! bounded; nothing here ends the process by itself.
//!
//! It must not know the tunnel, certificates or Kubernetes: both services depend on it, it depends on nothing of ours.

pub mod accept;
pub mod admin;
pub mod config;
pub mod limits;
pub mod metrics;
pub mod readiness;
pub mod sd;
pub mod signal;
pub mod tasks;
pub mod telemetry;
pub mod watch;

mod error;
mod exit;

pub use accept::{BindOptions, Listener, Peer, Stream};
pub use config::{ByteSize, ConfigError, FileMode, Listen, Problems};
pub use error::{Chain, chain};
pub use exit::Exit;
pub use metrics::Metrics;
pub use readiness::{Readiness, ReadinessGuard};
pub use signal::{Reload, ReloadTrigger, Signals};
pub use tasks::{Drained, Tasks};
pub use telemetry::{LogFormat, LogHandle};
pub use watch::{Change, Watch, WatchOptions};

#[cfg(test)]
mod testing;
