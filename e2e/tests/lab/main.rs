//! The lab: real daemons between network namespaces, NAT boxes and bad lines. Needs root.
//!
//! Every scenario has a lab of its own, one at a time; what it started is gone when it ends. `e2e::lab` says where the
//! daemons' binaries are looked for.

#[path = "../../../proxy-server/tests/app/api.rs"]
#[expect(
    dead_code,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a part of the tests of proxy-server, which use all of it"
)]
mod api;
mod content;
mod dedicated;
mod harness;
mod intercept;
mod konnectivity;
mod line;
mod load;
mod memory;
mod outage;
mod peers;
mod redirect;
mod refusal;
mod restart;
mod scrape;
mod steps;
mod streams;
