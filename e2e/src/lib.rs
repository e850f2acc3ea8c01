//! e2e

pub mod cluster;
pub mod net;
pub mod process;
pub mod wait;
