//! The whole proxy-server on port 0 with real edge-agents over real QUIC, and with peers that misbehave.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test fails by panicking"
)]

mod agents;
mod allow;
mod answers;
mod api;
mod authority;
mod cluster;
mod connect;
mod dns;
mod documented;
mod drain;
mod enrol;
mod fleet;
mod held;
mod hostile;
mod intercept;
mod kept;
mod konnectivity;
mod line;
mod over_line;
mod paths;
mod peers;
mod pods;
mod rotation;
mod scrape;
mod services;
mod stack;
mod standing;
mod tls;
mod trust;
