//! The cloud side of a Corvid tunnel: agents dial in (`backend`), requests come in (`frontend`), and each request is
//! routed, carried and recorded (`serve`). Bytes are never looked into.
//!
//! Reading order: [`App`] for start and stop, [`frontend`] → [`serve`] → [`registry`] for a request, [`backend`] for
//! a session.

pub mod app;
mod authority;
pub mod backend;
pub mod cli;
pub mod cluster;
pub mod commands;
pub mod config;
mod enrolment;
pub mod error;
pub mod frontend;
pub mod limits;
pub mod metrics;
pub mod path;
pub mod peer;
pub mod record;
pub mod redirect;
pub mod registry;
pub mod reload;
pub mod route;
pub mod serve;
pub mod status;

pub use app::{App, Bound};
pub use config::Config;
