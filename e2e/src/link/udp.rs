//! The UDP side: one socket towards the server for each source address at the near end, as a NAT box has one port for each.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use socket2::SockRef;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::late::Late;
use super::{Rebind, SOCKET_BUFFER, Sky};

/// Datagrams under way, both directions together: 100 Mbit/s for 200 ms and some more. What comes when it is full is lost.
const QUEUE: usize = 4096;
/// Largest datagram.
const DATAGRAM: usize = 65_536;
/// Source addresses at the near end; more than that are no agents of a test.
const FLOWS: usize = 1024;

/// Forwards until it is dropped.
pub(super) async fn run(
    near: std::net::UdpSocket,
    to: SocketAddr,
    sky: Arc<Sky>,
    rebinds: mpsc::Receiver<Rebind>,
) -> Result<()> {
    near.set_nonblocking(true)?;
    let near = Arc::new(UdpSocket::from_std(near)?);
    let line = Arc::new(Line {
        near,
        to,
        sky,
        late: Late::new(QUEUE),
    });
    let deliver = async {
        loop {
            line.deliver().await;
        }
    };
    tokio::select! {
        ended = line.take_all(rebinds) => ended,
        () = deliver => Ok(()),
    }
}

/// The sockets towards the server, by source address at the near end.
#[derive(Default)]
struct Flows {
    /// Where they are bound; the kernel chooses while there is none.
    ip: Option<IpAddr>,
    ways: HashMap<SocketAddr, Arc<UdpSocket>>,
    readers: JoinSet<Result<()>>,
}

impl Flows {
    fn way(&mut self, from: SocketAddr, line: &Arc<Line>) -> Result<Option<Arc<UdpSocket>>> {
        if let Some(way) = self.ways.get(&from) {
            return Ok(Some(Arc::clone(way)));
        }
        if self.ways.len() == FLOWS {
            return Ok(None);
        }
        self.add(from, line).map(Some)
    }

    fn add(&mut self, from: SocketAddr, line: &Arc<Line>) -> Result<Arc<UdpSocket>> {
        let ip = self.ip.unwrap_or_else(|| Ipv4Addr::UNSPECIFIED.into());
        let socket = std::net::UdpSocket::bind((ip, 0))
            .with_context(|| format!("a socket at {ip} towards the server"))?;
        SockRef::from(&socket).set_recv_buffer_size(SOCKET_BUFFER)?;
        socket.set_nonblocking(true)?;
        let way = Arc::new(UdpSocket::from_std(socket)?);
        self.ways.insert(from, Arc::clone(&way));
        let (line, reader) = (Arc::clone(line), Arc::clone(&way));
        self.readers
            .spawn(async move { line.back(&reader, from).await });
        Ok(way)
    }

    fn rebind(&mut self, ip: IpAddr, line: &Arc<Line>) -> Result<()> {
        self.ip = Some(ip);
        // The old sockets close with their readers, and with what is still on its way through them.
        self.readers = JoinSet::new();
        let sources: Vec<_> = self.ways.drain().map(|(from, _)| from).collect();
        sources
            .into_iter()
            .try_for_each(|from| self.add(from, line).map(|_| ()))
    }
}

/// What is under way.
struct Line {
    near: Arc<UdpSocket>,
    to: SocketAddr,
    sky: Arc<Sky>,
    late: Late<Datagram>,
}

struct Datagram {
    bytes: Vec<u8>,
    by: Arc<UdpSocket>,
    to: SocketAddr,
}

impl Line {
    /// From all sources at the near end to the server.
    async fn take_all(self: &Arc<Self>, mut rebinds: mpsc::Receiver<Rebind>) -> Result<()> {
        let mut flows = Flows::default();
        let mut buffer = vec![0; DATAGRAM];
        loop {
            tokio::select! {
                received = self.near.recv_from(&mut buffer) => {
                    let (count, from) = received.context("receiving at the near end")?;
                    match flows.way(from, self)? {
                        Some(way) => {
                            self.take(buffer.get(..count).unwrap_or_default(), &way, self.to);
                        }
                        None => self.sky.dropped(),
                    }
                }
                // The channel ends with the link, which ends this future too.
                Some(Rebind { ip, done }) = rebinds.recv() => {
                    // A test that has gone away is not told.
                    done.send(flows.rebind(ip, self)).ok();
                }
                Some(ended) = flows.readers.join_next() => ended??,
            }
        }
    }

    /// From the server back to one source at the near end.
    async fn back(&self, way: &UdpSocket, from: SocketAddr) -> Result<()> {
        let mut buffer = vec![0; DATAGRAM];
        loop {
            let (count, sender) = way.recv_from(&mut buffer).await?;
            if sender == self.to {
                self.take(buffer.get(..count).unwrap_or_default(), &self.near, from);
            }
        }
    }

    /// Puts a datagram on its way, or loses it.
    fn take(&self, bytes: &[u8], by: &Arc<UdpSocket>, to: SocketAddr) {
        let Some(delay) = self.sky.fate() else {
            return;
        };
        let datagram = Datagram {
            bytes: bytes.to_vec(),
            by: Arc::clone(by),
            to,
        };
        if !self.late.add(delay, datagram) {
            self.sky.dropped();
        }
    }

    /// Hands over the next that is due.
    async fn deliver(&self) {
        let Datagram { bytes, by, to } = self.late.next().await;
        // A host that is down answers with ICMP, which shows here; it loses the datagram and not the line.
        let is_sent = !self.sky.is_cut() && by.send_to(&bytes, to).await.is_ok();
        self.sky.arrived(is_sent);
    }
}
