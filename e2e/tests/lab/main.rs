//! The lab: real daemons between network namespaces, NAT boxes and bad lines. Needs root.
//!
//! Every scenario has a lab of its own, one at a time; what it started is gone when it ends. `e2e::lab` says where the
//! daemons' binaries are looked for.

mod content;
mod harness;
mod intercept;
mod line;
mod load;
mod outage;
mod refusal;
mod restart;
mod scrape;
mod steps;
mod streams;
