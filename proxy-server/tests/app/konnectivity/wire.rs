//! The very bytes that kube-apiserver sends, with the `:authority` that Rust's HTTP/2 refuses.

use bytes::{Buf, BufMut, BytesMut};
use proxy_server::frontend::konnectivity::pb::Packet;
use proxy_server::frontend::konnectivity::pb::packet::Payload;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use crate::stack::{Stack, allow, echo, within};

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = BytesMut::new();
    frame.put_uint(payload.len() as u64, 3);
    frame.put_u8(kind);
    frame.put_u8(flags);
    frame.put_u32(stream);
    frame.put_slice(payload);
    frame.to_vec()
}

fn literal(block: &mut Vec<u8>, index: u8, text: &str) {
    block.push(0x40 | index);
    block.push(u8::try_from(text.len()).unwrap());
    block.extend_from_slice(text.as_bytes());
}

/// The header block of kube-apiserver's call; the later ones of a connection refer to what the first put into the table.
fn headers(authority: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86]; // :method POST, :scheme http
    literal(&mut block, 4, "/ProxyService/Proxy");
    literal(&mut block, 1, authority);
    literal(&mut block, 31, "application/grpc");
    literal(&mut block, 58, "grpc-go/1.81.1");
    for (name, value) in [("te", "trailers"), ("grpc-accept-encoding", "gzip")] {
        literal(&mut block, 0, name);
        block.push(u8::try_from(value.len()).unwrap());
        block.extend_from_slice(value.as_bytes());
    }
    block
}

/// Reads frames of a stream until its gRPC message is whole.
async fn answer(socket: &mut UnixStream, stream: u32) -> Packet {
    let mut message = BytesMut::new();
    loop {
        let mut head = [0; 9];
        within(socket.read_exact(&mut head)).await.unwrap();
        let (mut length, kind, id) = (&head[..3], head[3], &head[5..]);
        let mut payload = vec![0; usize::try_from(length.get_uint(3)).unwrap()];
        within(socket.read_exact(&mut payload)).await.unwrap();
        assert_ne!(kind, 3, "RST_STREAM {payload:?}");
        assert_ne!(kind, 7, "GOAWAY {payload:?}");
        if kind == 0 && id == stream.to_be_bytes() {
            message.extend_from_slice(&payload);
        }
        if message.len() >= 5 {
            let wanted = (&message[1..5]).get_u32() as usize;
            if message.len() >= 5 + wanted {
                return prost::Message::decode(&message[5..5 + wanted]).unwrap();
            }
        }
    }
}

/// How many calls at a time the server's first frame permits (RFC 9113 section 6.5).
pub(super) async fn most_calls(socket: &mut UnixStream) -> Option<u32> {
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    sent.extend(frame(4, 0, 0, &[]));
    within(socket.write_all(&sent)).await.unwrap();
    let mut head = [0; 9];
    within(socket.read_exact(&mut head)).await.unwrap();
    assert_eq!(head[3], 4, "no SETTINGS");
    let mut payload = vec![0; usize::try_from((&head[..3]).get_uint(3)).unwrap()];
    within(socket.read_exact(&mut payload)).await.unwrap();
    let mut settings = payload.chunks(6);
    settings.find_map(|mut setting| (setting.get_u16() == 3).then(|| setting.get_u32()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_authority_of_kube_apiserver_is_taken_in_both_forms() {
    let mut stack = Stack::start("");
    let mut edge = JoinSet::new();
    let port = echo(&mut edge).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let path = stack.dir.path().join("konnectivity.sock");
    let raw = path.display().to_string();
    let escaped = raw.replace('/', "%2F");
    for authority in [raw, escaped] {
        let mut socket = UnixStream::connect(&path).await.unwrap();
        let block = headers(&authority);
        // The second call's block is nothing but references to the first one's fields: te, then backwards.
        let again = [0x83, 0x86, 0xc3, 0xc2, 0xc1, 0xc0, 0xbf, 0xbe];
        let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        sent.extend(frame(4, 0, 0, &[]));
        sent.extend(frame(1, 4, 1, &block));
        sent.extend(frame(1, 4, 3, &again));
        // What kube-apiserver says first, byte for byte: no type, as DIAL_REQ is 0.
        let address = format!("edge1:{port}");
        let mut message = vec![0x0a, 3];
        message.extend(b"tcp");
        message.extend([0x12, u8::try_from(address.len()).unwrap()]);
        message.extend(address.as_bytes());
        message.extend([0x18, 77]);
        let length = u8::try_from(message.len()).unwrap();
        let mut grpc = vec![0, 0, 0, 0, length + 2, 0x12, length];
        grpc.extend(message);
        sent.extend(frame(0, 0, 1, &grpc));
        sent.extend(frame(0, 0, 3, &grpc));
        within(socket.write_all(&sent)).await.unwrap();
        let Some(Payload::DialResponse(response)) = answer(&mut socket, 1).await.payload else {
            panic!("no answer to the dial");
        };
        assert_eq!((response.error.as_str(), response.random), ("", 77));
        assert_ne!(response.connect_id, 0);
    }
    stack.agents_stop.cancel();
    stack.stop().await;
}
