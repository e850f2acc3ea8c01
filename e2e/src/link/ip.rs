//! A line for packets: an interface (TUN) in each of two namespaces, and what is routed into one comes out of the other,
//! late, or not at all. So the kernels at both ends see what they would see of a bad line: late and lost SYNs, silence.

use std::ops::Deref;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use tokio_tun::Tun;

use super::late::Late;
use super::{Runs, Sky};
use crate::net::Host;

/// Packets under way in one direction. What comes when it is full is lost, so with a delay of 10 ms a line carries 300 Mbit/s.
const QUEUE: usize = 256;
/// Largest packet: the interfaces have the usual MTU of 1500.
const PACKET: usize = 2048;

/// A line for packets between two namespaces; its interfaces are gone when it is dropped.
#[derive(Debug)]
pub struct IpLink {
    sky: Arc<Sky>,
    _runs: Runs,
}

impl IpLink {
    /// Lays a line: host, interface, address with prefix length on each side; both ends up.
    ///
    /// # Errors
    /// When a namespace is gone, or the kernel makes no TUN interface there.
    pub fn lay(a: (&Host, &str, &str), b: (&Host, &str, &str), seed: u64) -> Result<Self> {
        let sky = Sky::new(seed);
        let (ready, is_ready) = std::sync::mpsc::sync_channel(1);
        let ends = [a, b].map(|(host, interface, _)| (host.clone(), interface.to_owned()));
        let skies = Arc::clone(&sky);
        let runs = Runs::start(format!("line {} of {}", a.1, a.0.name()), async move {
            let [a, b] = ends.map(tun);
            let (a, b) = (a?, b?);
            // Whoever waits goes only with the line.
            ready.send(()).ok();
            tokio::select! {
                ended = way(&a, &b, &skies) => ended,
                ended = way(&b, &a, &skies) => ended,
            }
        });
        // Its thread says why, when it is dropped.
        ensure!(is_ready.recv().is_ok(), "there is no line");
        for (host, interface, address) in [a, b] {
            // Else it is heard of without being asked: solicitations, reports. Kernels without IPv6 have no such variable.
            let quiet = format!("net.ipv6.conf.{interface}.disable_ipv6");
            host.sysctl(&quiet, "1").ok();
            host.ip(&format!("addr add {address} dev {interface}"))?;
            host.ip(&format!("link set {interface} up"))?;
        }
        Ok(Self { sky, _runs: runs })
    }
}

impl Deref for IpLink {
    type Target = Sky;

    fn deref(&self) -> &Sky {
        &self.sky
    }
}

/// An interface is born where the thread is; where that goes after does not matter to it.
fn tun((host, interface): (Host, String)) -> Result<Tun> {
    host.join()?;
    let made = Tun::builder().name(&interface).build();
    let made = made.with_context(|| format!("a TUN interface {interface}"))?;
    made.into_iter().next().context("no interface was made")
}

/// One direction, for ever.
async fn way(from: &Tun, to: &Tun, sky: &Sky) -> Result<()> {
    let late = Late::new(QUEUE);
    let take = async {
        let mut buffer = vec![0; PACKET];
        loop {
            let count = from.recv(&mut buffer).await.context("taking a packet")?;
            let Some(delay) = sky.fate() else {
                continue;
            };
            let packet = buffer.get(..count).unwrap_or_default().to_vec();
            if !late.add(delay, packet) {
                sky.dropped();
            }
        }
    };
    let deliver = async {
        loop {
            let packet = late.next().await;
            // An interface that was taken down loses the packet, and not the line.
            let is_sent = !sky.is_cut() && to.send(&packet).await.is_ok();
            sky.arrived(is_sent);
        }
    };
    tokio::select! {
        ended = take => ended,
        () = deliver => Ok(()),
    }
}
