//! The packets that a server says.

use bytes::Bytes;

use super::pb::packet::Payload;
use super::pb::{CloseResponse, Data, DialResponse, Packet, PacketType};

fn packet(kind: PacketType, payload: Payload) -> Packet {
    Packet {
        r#type: kind.into(),
        payload: Some(payload),
    }
}

/// The destination has answered.
pub(super) fn dialled(random: i64, connect_id: i64) -> Packet {
    let response = DialResponse {
        error: String::new(),
        connect_id,
        random,
    };
    packet(PacketType::DialRsp, Payload::DialResponse(response))
}

/// The dial has failed; the sentence reaches whoever typed `kubectl` as it is.
pub(super) fn refused(random: i64, sentence: &str) -> Packet {
    let response = DialResponse {
        error: sentence.to_owned(),
        connect_id: 0,
        random,
    };
    packet(PacketType::DialRsp, Payload::DialResponse(response))
}

/// `data` is not empty.
pub(super) fn data(connect_id: i64, data: Bytes) -> Packet {
    let data = Data {
        connect_id,
        error: String::new(),
        data,
    };
    packet(PacketType::Data, Payload::Data(data))
}

/// The last packet of a connection.
pub(super) fn close_response(connect_id: i64, error: &str) -> Packet {
    let response = CloseResponse {
        error: error.to_owned(),
        connect_id,
    };
    packet(PacketType::CloseRsp, Payload::CloseResponse(response))
}
