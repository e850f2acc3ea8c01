//! Enrolment and renewal: a signing request in, a chain out, over gRPC on 8443/tcp.
//!
//! * [`Enroll`](fn@enroll): a join token decides, or the cluster that has given the agent a token ([`Vouch`]); the server
//!   is known by the pin of its authority, or by its roots.
//! * [`Renew`](renew): the certificate of the connection decides, which may be expired within a grace.
//!
//! The identity of a certificate never comes from its request. Every decision leaves an audit line
//! (tracing target `audit`). This module dials and serves single connections; it listens nowhere.

mod client;
mod error;
mod executor;
mod files;
mod limit;
mod reason;
mod server;
mod trust;
mod vouch;
mod watched;

pub use client::{EnrollRequest, Enrolled, enroll, renew};
pub use error::EnrollError;
pub use files::{AgentFiles, AgentFilesError};
pub use limit::EnrollLimits;
pub use server::{EnrollService, ServeError};
pub use trust::{Proof, Trust};
pub use vouch::{Answer, NotVouched, Vouch, Vouched, WhyNot};

/// What the build script makes of enroll.proto; it never leaves this module.
#[expect(
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::clone_on_ref_ptr,
    unreachable_pub,
    unused_qualifications,
    reason = "generated code"
)]
mod pb {
    tonic::include_proto!("corvid.enroll.v1");
}

/// Largest message of either way: a bundle of 64 roots fits, a flood doesn't.
const MAX_MESSAGE: usize = 64 * 1024;
