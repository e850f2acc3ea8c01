//! What both ends of a Corvid tunnel agree on: names, wire messages, transports, and the relay of bytes.
//!
//! Reading order: [`Destination`] and the other ids, [`Reason`], the messages in [`wire`], the seam in
//! [`transport`], the [`control`] stream of a session, and [`relay`]. `docs/protocol.md` is the specification.
//!
//! This crate knows neither certificates nor Kubernetes, and never looks into the bytes it carries.

mod address;
pub mod asked;
mod budget;
pub mod control;
mod error;
mod framed;
mod id;
mod relay;
pub mod transport;
pub mod wire;

pub use address::{is_loopback, is_never_dialled};
pub use budget::{Budget, SocketBuffer, Stopped, Waiting};
pub use error::{Fault, Reason};
pub use framed::{FrameReader, ReadFrameError, read_frame_within};
pub use id::{AgentName, Destination, Host, IdError, LineName, ServerName, SessionId};
pub use relay::{Counters, Early, Local, Relay, RelayEnd, relay, relay_streams, session_over};
