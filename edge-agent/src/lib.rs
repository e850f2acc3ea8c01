//! The edge side of a Corvid tunnel: it dials out to proxy-servers, and serves their streams by dialling what its
//! policy allows.
//!
//! Reading order: [`App`] for start and stop; `connector` → `session` → `serve` → `policy` → `dial` for a stream;
//! `enroll` for who the agent is.
//!
//! It must not listen for tunnels, and must not trust a destination that the policy does not list.

pub mod app;
mod backoff;
mod candidate;
pub mod cli;
pub mod commands;
pub mod config;
mod connector;
mod dial;
mod drain;
mod endpoints;
mod enroll;
mod error;
mod files;
mod metrics;
mod own;
pub mod policy;
mod ready;
mod record;
mod registry;
mod reload;
mod resolve;
mod seeker;
mod serve;
mod session;
pub mod status;

pub use app::{App, Bound};
pub use config::Config;
pub use drain::Stop;
pub use error::{AppError, JoinError};
pub use reload::ConfigSource;
