//! Frames in, frames out, cut at every place.

use proptest::prelude::*;
use tokio::io::AsyncReadExt;

use super::*;

const CLIENT_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = BytesMut::new();
    frame.put_uint(payload.len() as u64, 3);
    frame.put_u8(kind);
    frame.put_u8(flags);
    frame.put_u32(stream);
    frame.put_slice(payload);
    frame.to_vec()
}

/// `:method: POST`, `:authority` as a new field of the table.
fn request(authority: &[u8]) -> Vec<u8> {
    let length = u8::try_from(authority.len()).unwrap();
    [&[0x83, 0x41, length], authority].concat()
}

/// What comes out of it: `:method: POST`, `:authority: localhost`, as literals.
fn readable() -> Vec<u8> {
    b"\x00\x07:method\x04POST\x00\x0a:authority\x09localhost".to_vec()
}

/// Reads all that comes through when it arrives in pieces of those sizes.
async fn through(sent: &[u8], pieces: &[usize], reads: usize) -> io::Result<Vec<u8>> {
    let mut mock = tokio_util::io::StreamReader::new(Pieces::of(sent, pieces));
    let mut read = Vec::new();
    let mut readable = Readable::new(&mut mock);
    let mut buffer = vec![0; reads];
    loop {
        match readable.read(&mut buffer).await? {
            0 => return Ok(read),
            n => read.extend_from_slice(&buffer[..n]),
        }
    }
}

/// A stream of the bytes in pieces of the sizes, which are used again and again.
struct Pieces(std::vec::IntoIter<Bytes>);

impl Pieces {
    fn of(bytes: &[u8], sizes: &[usize]) -> Self {
        let mut rest = Bytes::copy_from_slice(bytes);
        let mut pieces = Vec::new();
        for size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            pieces.push(rest.split_to((*size).clamp(1, rest.len())));
        }
        Self(pieces.into_iter())
    }
}

impl futures_util::Stream for Pieces {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(self.0.next().map(Ok))
    }
}

#[tokio::test]
async fn both_forms_become_localhost_and_the_rest_is_untouched() {
    let settings = frame(4, 0, 0, &[]);
    let data = frame(0, 1, 1, &[7; 40_000]);
    for authority in [&b"%2Frun%2Fkon.sock"[..], b"/run/kon.sock"] {
        let sent = [
            CLIENT_PREFACE,
            &settings,
            &frame(HEADERS, END_HEADERS, 1, &request(authority)),
            &data,
            &frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x83, 0xbe]),
        ]
        .concat();
        let wanted = [
            CLIENT_PREFACE,
            &settings,
            &frame(HEADERS, END_HEADERS, 1, &readable()),
            &data,
            &frame(HEADERS, END_HEADERS | END_STREAM, 1, &readable()),
        ]
        .concat();
        for pieces in [&[1][..], &[7], &[9, 3], &[1 << 20]] {
            assert!(through(&sent, pieces, 8192).await.unwrap() == wanted);
            assert!(through(&sent, pieces, 5).await.unwrap() == wanted);
        }
    }
}

#[tokio::test]
async fn padding_priority_and_continuations_become_one_frame() {
    let block = request(b"/run/kon.sock");
    let (first, rest) = block.split_at(2);
    let mut padded = vec![3, 0x80, 0, 0, 9, 200];
    padded.extend_from_slice(first);
    padded.extend([0; 3]);
    let sent = [
        CLIENT_PREFACE,
        &frame(HEADERS, PADDED | PRIORITY | END_STREAM, 5, &padded),
        &frame(CONTINUATION, 0, 5, &[]),
        &frame(CONTINUATION, END_HEADERS, 5, rest),
    ]
    .concat();
    let wanted = [
        CLIENT_PREFACE,
        &frame(HEADERS, END_HEADERS | END_STREAM, 5, &readable()),
    ]
    .concat();
    assert_eq!(through(&sent, &[1], 100).await.unwrap(), wanted);
}

#[tokio::test]
async fn what_breaks_the_rules_ends_the_connection() {
    let open = frame(HEADERS, 0, 1, &[0x83]);
    let endless = frame(CONTINUATION, 0, 1, &[]).repeat(MAX_PIECES);
    let large = frame(CONTINUATION, 0, 1, &[0; MAX_FRAME]);
    let mut huge = frame(HEADERS, END_HEADERS, 1, &[]);
    huge[0] = 1; // 64 KiB
    for sent in [
        frame(CONTINUATION, END_HEADERS, 1, &[0x83]),
        [&open[..], &frame(0, 0, 1, &[])].concat(),
        [&open[..], &frame(HEADERS, END_HEADERS, 1, &[0x83])].concat(),
        [&open[..], &frame(CONTINUATION, END_HEADERS, 3, &[0x83])].concat(),
        [&open[..], &endless].concat(),
        [&open[..], &large].concat(),
        frame(HEADERS, END_HEADERS | PADDED, 1, &[9, 0x83]),
        frame(HEADERS, END_HEADERS | PADDED, 1, &[]),
        frame(HEADERS, END_HEADERS | PRIORITY, 1, &[0, 0, 0]),
        frame(HEADERS, END_HEADERS, 1, &[0x80]),
        huge,
    ] {
        let sent = [CLIENT_PREFACE, &sent].concat();
        let error = through(&sent, &[11], 100).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{sent:x?}");
    }
}

proptest! {
    /// However it is cut, the same comes out; and nothing makes it panic.
    #[test]
    fn where_it_is_cut_does_not_matter(
        frames in prop::collection::vec((0_u8..10, any::<u8>(), 0_u32..4, prop::collection::vec(any::<u8>(), 0..40)), 0..12),
        pieces in prop::collection::vec(1_usize..50, 1..5),
        reads in 1_usize..60,
    ) {
        let frames = frames.iter().map(|(kind, flags, stream, payload)| frame(*kind, *flags, *stream, payload));
        let sent = [CLIENT_PREFACE.to_vec(), frames.collect::<Vec<_>>().concat()].concat();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let whole = runtime.block_on(through(&sent, &[1 << 20], 1 << 20));
        let cut = runtime.block_on(through(&sent, &pieces, reads));
        prop_assert_eq!(whole.ok(), cut.ok());
    }
}
