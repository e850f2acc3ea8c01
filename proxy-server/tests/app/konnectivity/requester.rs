//! What asks: calls over the Unix socket, packet by packet.

use std::path::PathBuf;

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use proxy_server::frontend::konnectivity::pb::packet::Payload;
use proxy_server::frontend::konnectivity::pb::proxy_service_client::ProxyServiceClient;
use proxy_server::frontend::konnectivity::pb::{
    CloseDial, CloseRequest, Data, DialRequest, Packet, PacketType,
};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

use crate::stack::{Stack, within};

/// An HTTP/2 connection. `window` is what the requester lets the server send beyond what it reads, in all.
pub(super) async fn channel(stack: &Stack, window: u32) -> Channel {
    let socket: PathBuf = stack.dir.path().join("konnectivity.sock");
    let connect = move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    };
    let endpoint = Endpoint::from_static("http://localhost")
        .initial_stream_window_size(65_535)
        .initial_connection_window_size(window);
    endpoint
        .connect_with_connector(tower::service_fn(connect))
        .await
        .unwrap()
}

/// One `Proxy` call.
pub(super) struct Call {
    pub(super) packets: mpsc::Sender<Packet>,
    pub(super) answers: Streaming<Packet>,
}

pub(super) fn packet(kind: PacketType, payload: Payload) -> Packet {
    Packet {
        r#type: kind.into(),
        payload: Some(payload),
    }
}

pub(super) fn dial(address: &str, random: i64) -> Packet {
    let request = DialRequest {
        protocol: "tcp".into(),
        address: address.into(),
        random,
    };
    packet(PacketType::DialReq, Payload::DialRequest(request))
}

pub(super) fn data(connect_id: i64, data: impl Into<Bytes>) -> Packet {
    let data = Data {
        connect_id,
        error: String::new(),
        data: data.into(),
    };
    packet(PacketType::Data, Payload::Data(data))
}

pub(super) fn close(connect_id: i64) -> Packet {
    let request = CloseRequest { connect_id };
    packet(PacketType::CloseReq, Payload::CloseRequest(request))
}

pub(super) fn give_up(random: i64) -> Packet {
    packet(
        PacketType::DialCls,
        Payload::CloseDial(CloseDial { random }),
    )
}

impl Call {
    /// A call on a connection of its own.
    pub(super) async fn alone(stack: &Stack) -> Self {
        Self::on(channel(stack, 65_535).await).await
    }

    pub(super) async fn on(channel: Channel) -> Self {
        let (packets, queue) = mpsc::channel(1);
        let call = ProxyServiceClient::new(channel)
            .proxy(ReceiverStream::new(queue))
            .await;
        Self {
            packets,
            answers: call.unwrap().into_inner(),
        }
    }

    pub(super) async fn say(&self, packet: Packet) {
        within(self.packets.send(packet)).await.unwrap();
    }

    /// The next packet; `None` at a good end of the call.
    pub(super) async fn heard(&mut self) -> Result<Option<Packet>, Status> {
        within(self.answers.message()).await
    }

    pub(super) async fn answer(&mut self) -> Payload {
        let packet = self.heard().await.unwrap().expect("the call has ended");
        let payload = packet.payload.expect("a packet without a payload");
        let kind = match &payload {
            Payload::DialResponse(_) => PacketType::DialRsp,
            Payload::Data(_) => PacketType::Data,
            Payload::CloseResponse(_) => PacketType::CloseRsp,
            other => panic!("a server does not say {other:?}"),
        };
        assert_eq!(packet.r#type, i32::from(kind));
        payload
    }

    /// Dials: the connectID, or the sentence.
    pub(super) async fn dial(&mut self, address: &str, random: i64) -> Result<i64, String> {
        self.say(dial(address, random)).await;
        self.dialled(random).await
    }

    pub(super) async fn dialled(&mut self, random: i64) -> Result<i64, String> {
        let Payload::DialResponse(response) = self.answer().await else {
            panic!("no answer to the dial");
        };
        assert_eq!(response.random, random);
        if response.error.is_empty() {
            assert_ne!(response.connect_id, 0);
            return Ok(response.connect_id);
        }
        assert_eq!(response.connect_id, 0);
        Err(response.error)
    }

    /// Data of one connection and the error of its CLOSE_RSP; nothing else may come.
    pub(super) async fn rest(&mut self, id: i64) -> (Vec<u8>, String) {
        let mut all = Vec::new();
        loop {
            match self.answer().await {
                Payload::Data(data) => {
                    assert_eq!(data.connect_id, id);
                    assert!(!data.data.is_empty(), "the client takes it for the end");
                    assert!(data.data.len() <= 64 << 10);
                    all.extend_from_slice(&data.data);
                }
                Payload::CloseResponse(close) => {
                    assert_eq!(close.connect_id, id);
                    return (all, close.error);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// So many bytes of one connection; nothing else may come.
    pub(super) async fn bytes(&mut self, id: i64, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < count {
            let Payload::Data(data) = self.answer().await else {
                panic!("{} of {count} bytes came", all.len());
            };
            assert_eq!(data.connect_id, id);
            all.extend_from_slice(&data.data);
        }
        all
    }

    /// The next packet is a CLOSE_RSP of that connection: its error.
    pub(super) async fn closed(&mut self, id: i64) -> String {
        let (data, error) = self.rest(id).await;
        assert!(data.is_empty(), "data instead of the end");
        error
    }
}
