//! Length-delimited protobuf with a limit that is checked before anything is kept (docs/protocol.md section 2).

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;

/// Most bytes of one message. Names are ≤ 253 bytes and capabilities few: real frames are under 1 KiB.
pub const MAX_FRAME: usize = 4096;
/// Two 7-bit groups reach 16,383, enough for [`MAX_FRAME`].
const MAX_VARINT: usize = 2;

/// A frame that is not acceptable. Always the other end's mistake.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The announced length is over [`MAX_FRAME`].
    #[error("a frame of more than {MAX_FRAME} bytes was announced")]
    TooLong,
    /// The bytes are no such message.
    #[error("decode a frame")]
    Decode(#[source] prost::DecodeError),
    /// The stream ended within a frame.
    #[error("the stream ended within a frame")]
    Truncated,
}

/// The message as a frame.
#[must_use]
pub fn encode(message: &impl Message) -> Bytes {
    message.encode_length_delimited_to_vec().into()
}

/// Takes one message off the front of `buffer`, or `None` while it is incomplete. Bytes behind it stay.
///
/// # Errors
/// [`FrameError::TooLong`] as soon as the length is known, [`FrameError::Decode`] for garbage.
pub fn decode<M: Message + Default>(buffer: &mut BytesMut) -> Result<Option<M>, FrameError> {
    let mut length = 0_usize;
    let mut prefix = 0_usize;
    loop {
        let Some(byte) = buffer.get(prefix) else {
            return Ok(None);
        };
        length |= usize::from(byte & 0x7f) << (7 * prefix);
        prefix += 1;
        if byte & 0x80 == 0 {
            break;
        }
        if prefix == MAX_VARINT {
            return Err(FrameError::TooLong);
        }
    }
    if length > MAX_FRAME {
        return Err(FrameError::TooLong);
    }
    if buffer.len() < prefix + length {
        return Ok(None);
    }
    buffer.advance(prefix);
    M::decode(buffer.split_to(length))
        .map(Some)
        .map_err(FrameError::Decode)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::pb;

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_bytes_come() {
        let mut bytes = BytesMut::from(&[0x81, 0x20][..]);
        assert!(matches!(
            decode::<pb::Hello>(&mut bytes),
            Err(FrameError::TooLong)
        ));
        let mut bytes = BytesMut::from(&[0xff, 0xff][..]);
        assert!(matches!(
            decode::<pb::Hello>(&mut bytes),
            Err(FrameError::TooLong)
        ));
    }

    #[test]
    fn unknown_fields_are_ignored() {
        // Field 100, varint 5, then `sequence` = 7.
        let mut bytes = BytesMut::from(&[5, 0xa0, 0x06, 0x05, 0x08, 0x07][..]);
        assert_eq!(
            decode::<pb::Keepalive>(&mut bytes)
                .unwrap()
                .unwrap()
                .sequence,
            7
        );
    }

    proptest! {
        #[test]
        fn frames_survive_any_split(host in ".{0,200}", port in any::<u32>(), tail in proptest::collection::vec(any::<u8>(), 0..50), cut in any::<usize>()) {
            let header = pb::StreamHeader { host, port, ..Default::default() };
            let mut wire = encode(&header).to_vec();
            let whole = wire.len();
            wire.extend_from_slice(&tail);
            let cut = cut % whole;
            let mut buffer = BytesMut::from(&wire[..cut]);
            prop_assert!(decode::<pb::StreamHeader>(&mut buffer).unwrap().is_none());
            buffer.extend_from_slice(&wire[cut..]);
            prop_assert_eq!(decode::<pb::StreamHeader>(&mut buffer).unwrap().unwrap(), header);
            prop_assert_eq!(&buffer[..], &tail[..]);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode::<pb::ControlFrame>(&mut buffer) {}
        }
    }
}
