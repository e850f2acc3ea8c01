//! What only QUIC has to get right: a line that carries one way and loses the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use proto::Reason;
use proto::transport::{SendHalf, Session, SessionError};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{DEADLINE, Quic, stream};

/// Carries datagrams between one dialling end and the listener, until it is told to lose what the listener sends.
pub(crate) struct Line {
    pub(crate) near: UdpSocket,
    deaf: Arc<AtomicBool>,
}

impl Line {
    pub(crate) async fn new() -> Self {
        let near = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let deaf = Arc::default();
        Self { near, deaf }
    }

    /// Carries to `listener` until what is returned is dropped. From `deaf` on, the dialling end hears nothing.
    fn carry(self, listener: std::net::SocketAddr) -> (JoinSet<()>, Arc<AtomicBool>) {
        let Self { near, deaf } = self;
        let switch = Arc::clone(&deaf);
        let mut carrying = JoinSet::new();
        carrying.spawn(async move {
            let far = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            far.connect(listener).await.unwrap();
            let (mut up, mut down) = (vec![0; 64 << 10], vec![0; 64 << 10]);
            let mut dialler = None;
            loop {
                tokio::select! {
                    Ok((n, from)) = near.recv_from(&mut up) => {
                        dialler = Some(from);
                        far.send(&up[..n]).await.unwrap();
                    }
                    Ok(n) = far.recv(&mut down) => {
                        if let (Some(to), false) = (dialler, deaf.load(Ordering::Acquire)) {
                            near.send_to(&down[..n], to).await.unwrap();
                        }
                    }
                }
            }
        });
        (carrying, switch)
    }
}

/// The agent's congestion window is full for ever once it hears no acknowledgement; its close leaves all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_arrives_though_nothing_is_acknowledged_any_more() {
    let line = Line::new().await;
    let entry = line.near.local_addr().unwrap();
    let (listener, dial) = Quic::ends(DEADLINE, 8 << 20);
    let (_carrying, deaf) = line.carry(listener.local_address().unwrap());
    let accept = async { listener.accept().await.unwrap().handshake().await.unwrap() };
    let (server, agent) = tokio::join!(accept, dial(entry));
    let agent = agent.unwrap();
    let ((mut send, _recv), accepted) = stream(&agent, &server).await;
    deaf.store(true, Ordering::Release);
    // Until the window is full: what the stream may send is far more.
    let block = Bytes::from(vec![0; 64 << 10]);
    while let Ok(wrote) = timeout(Duration::from_secs(1), send.write_chunk(block.clone())).await {
        wrote.unwrap();
    }
    agent.close(Reason::Draining);
    let ended = timeout(DEADLINE / 4, server.closed()).await.unwrap();
    assert_eq!(ended, SessionError::Peer(Reason::Draining));
    drop(accepted);
}
