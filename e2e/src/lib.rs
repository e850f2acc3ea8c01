//! e2e

pub mod cgroup;
pub mod client;
pub mod cluster;
pub mod konnectivity;
pub mod kubelet;
pub mod lab;
pub mod link;
pub mod manifests;
pub mod net;
pub mod pattern;
pub mod process;
pub mod wait;
