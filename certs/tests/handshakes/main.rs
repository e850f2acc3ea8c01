//! The crate as its users have it: what certificates do in real handshakes.

mod doors;
mod enrolment;
mod rotation;
