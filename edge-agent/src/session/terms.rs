//! What the agent asks of the transport and tells the server of itself.

use proto::Budget;
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::Tuning;
use proto::wire::{Limits, Offer};

use crate::Config;
use crate::error::AppError;

/// Streams that a server may have open in one session (design: limits).
const MAX_STREAMS: u32 = 4096;
/// Name and version, as servers see them.
const SOFTWARE: &str = concat!("edge-agent ", env!("CARGO_PKG_VERSION"));

/// Settings of the transport.
pub(crate) fn tuning(config: &Config, budget: &Budget) -> Tuning {
    Tuning {
        stream_window: budget.stream_window(),
        send_window: budget.send_window(),
        max_streams: MAX_STREAMS,
        idle_timeout: Keepalive::default().idle_timeout,
        congestion: config.congestion,
    }
}

/// What the server is told.
///
/// # Errors
/// When the name is none that servers take.
pub(crate) fn offer(config: &Config, budget: &Budget) -> Result<Offer, AppError> {
    let limits = Limits {
        max_streams: MAX_STREAMS,
        stream_window: budget.stream_window().into(),
    };
    Ok(Offer {
        agent: config.name.as_str().parse()?,
        software: SOFTWARE.to_owned(),
        capabilities: Vec::new(),
        limits,
        instance: format!("{:016x}", rand::random::<u64>()),
        line: None,
    })
}
