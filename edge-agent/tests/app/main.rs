//! The whole agent against a server of the test's own: real sockets, real TLS, every port chosen by the system.
//!
//! Each scenario runs in a process of its own, so that what it leaves behind (tasks, descriptors) can be counted.

#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests: a panic is the report"
)]

mod enrol;
mod harness;
mod limits;
mod reload;
mod seek;
mod sessions;
mod stop;
mod streams;
