//! Wire messages and how they are framed. Sans-IO: bytes and values in, bytes and values out; no clock.

mod announce;
mod forward;
mod frame;
mod handshake;
mod header;

pub use announce::{AgentState, AnnounceError, Announcement, Departure, Draft};
pub use forward::{ForwardError, ForwardHeader};
pub use frame::{FrameError, MAX_FRAME, decode, encode};
pub(crate) use handshake::printable;
pub use handshake::{
    Accepted, Capabilities, HandshakeError, Limits, Offer, ServerOffer, VERSIONS, answer_hello,
    check_hello_ack,
};
pub use header::{HeaderError, PodPort, StreamHeader, StreamReply};

/// The generated messages of `tunnel.proto`.
#[expect(missing_docs, reason = "generated code; tunnel.proto has the comments")]
pub mod pb {
    include!(concat!(env!("OUT_DIR"), "/corvid.tunnel.v1.rs"));
}
