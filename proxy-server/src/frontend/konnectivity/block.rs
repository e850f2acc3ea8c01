//! One header block (RFC 7541): decoded, its `:authority` replaced, encoded again.
//!
//! The decoder keeps the requester's dynamic table, so every block of a connection has to pass here, in order. What is
//! written refers to no table at all: each field is a literal that is not indexed, which any decoder reads alone.

use std::borrow::Cow;

use bytes::{BufMut, BytesMut};
use loona_hpack::Decoder;
use loona_hpack::decoder::DecoderError;

/// What stands in the place of any `:authority`. Nothing looks at it.
const AUTHORITY: &[u8] = b"localhost";
/// Dynamic table that a requester may use: HTTP/2's default (RFC 9113 section 6.5.2), as hyper announces no other.
const TABLE: usize = 4096;
/// Decoded fields in all. A block may name one large field of the table in each byte, so this is counted as it is
/// decoded. kube-apiserver's come to 300 bytes. Together with what a length costs it also fits one frame.
pub(super) const MAX_LIST: usize = 8 << 10;

/// Why a block can't be taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum BlockError {
    /// The block is not HPACK.
    #[error("decode a header block")]
    Hpack(#[source] DecoderError),
    /// More fields than any requester of ours has.
    #[error("a header block holds more than 8 KiB")]
    TooLarge,
}

/// The state of one connection's header blocks.
pub(super) struct Blocks {
    decoder: Decoder<'static>,
}

impl Blocks {
    pub(super) fn new() -> Self {
        let mut decoder = Decoder::new();
        decoder.set_max_allowed_table_size(TABLE);
        Self { decoder }
    }

    /// Appends the block to `out` with the authority replaced.
    pub(super) fn rewrite(&mut self, block: &[u8], out: &mut BytesMut) -> Result<(), BlockError> {
        let mut left = MAX_LIST;
        let mut fits = true;
        let field = |name: Cow<'_, [u8]>, value: Cow<'_, [u8]>| {
            let value = if *name == *b":authority" {
                AUTHORITY
            } else {
                &value
            };
            // Two lengths and the kind of field take eight bytes at most.
            match left.checked_sub(name.len() + value.len() + 8) {
                Some(rest) if fits => {
                    left = rest;
                    out.put_u8(0); // literal without indexing, new name (section 6.2.2)
                    put_string(out, &name);
                    put_string(out, value);
                }
                _ => fits = false,
            }
        };
        self.decoder
            .decode_with_cb(block, field)
            .map_err(BlockError::Hpack)?;
        if fits {
            Ok(())
        } else {
            Err(BlockError::TooLarge)
        }
    }
}

/// A string without Huffman coding (section 5.2): its length with a prefix of seven bits, its bytes.
fn put_string(out: &mut BytesMut, text: &[u8]) {
    const PREFIX: usize = 0x7f;
    if text.len() < PREFIX {
        put_byte(out, text.len());
    } else {
        put_byte(out, PREFIX);
        let mut rest = text.len() - PREFIX;
        while rest >= 0x80 {
            put_byte(out, (rest & 0x7f) | 0x80);
            rest >>= 7;
        }
        put_byte(out, rest);
    }
    out.put_slice(text);
}

/// `value` is under 256.
fn put_byte(out: &mut BytesMut, value: usize) {
    out.put_u8(u8::try_from(value).unwrap_or(u8::MAX));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(block: &[u8]) -> Vec<(String, String)> {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let list = Decoder::new().decode(block).unwrap();
        list.into_iter().map(|(n, v)| (text(n), text(v))).collect()
    }

    #[test]
    fn the_authority_alone_is_replaced_and_nothing_refers_to_a_table() {
        let mut blocks = Blocks::new();
        // :method POST, :authority (indexed from here on), grpc-x: 300 bytes
        let mut block = vec![0x83, 0x41, 4];
        block.extend(b"/run");
        block.extend([0x40, 6]);
        block.extend(b"grpc-x");
        block.extend([0x7f, 0xad, 0x01]); // 300
        block.extend([b'x'; 300]);
        for block in [&block[..], &[0x83, 0xbf, 0xbe]] {
            let mut out = BytesMut::new();
            blocks.rewrite(block, &mut out).unwrap();
            // A fresh decoder reads each block, as no table was used.
            assert_eq!(
                fields(&out),
                [
                    (":method".into(), "POST".into()),
                    (":authority".into(), "localhost".into()),
                    ("grpc-x".into(), "x".repeat(300)),
                ]
            );
        }
    }

    #[test]
    fn a_small_block_with_a_large_meaning_is_refused() {
        let mut blocks = Blocks::new();
        let mut block = vec![0x40, 1, b'a', 0x7f, 0xa1, 0x0f]; // 2,080
        block.extend([b'x'; 2080]);
        blocks.rewrite(&block, &mut BytesMut::new()).unwrap();
        let mut out = BytesMut::new();
        let bomb = blocks.rewrite(&[0xbe; 1000], &mut out);
        assert!(matches!(bomb, Err(BlockError::TooLarge)));
        assert!(out.len() <= MAX_LIST, "{}", out.len());
    }

    #[test]
    fn garbage_and_tables_larger_than_announced_are_refused() {
        for block in [
            &[0x80][..],
            &[0xff, 0xff],
            &[0x40, 0x05, b'a'],
            &[0x3f, 0xe2, 0x1f, 0x83],
        ] {
            let refused = Blocks::new().rewrite(block, &mut BytesMut::new());
            assert!(matches!(refused, Err(BlockError::Hpack(_))), "{block:?}");
        }
    }
}
