//! Ways to a destination beside the tunnel: what is not at the edge, and nodes by a dedicated line.

pub mod direct;
pub mod policy;
