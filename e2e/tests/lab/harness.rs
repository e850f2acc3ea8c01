//! The lab itself: a scenario is worth no more than the network under it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use e2e::link::{IpLink, Link, Weather};
use e2e::net::Host;
use e2e::process::Spawn;
use e2e::{lab, wait};
use socket2::SockRef;
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(5);

/// A socket that reads for at most so long.
fn socket(host: &Host, addr: &str, patience: Duration) -> Result<UdpSocket> {
    let socket = host.enter(|| UdpSocket::bind(addr))??;
    socket.set_read_timeout(Some(patience))?;
    // The usual size holds 277 datagrams, however small they are.
    SockRef::from(&socket).set_recv_buffer_size(1 << 20)?;
    Ok(socket)
}

fn receive(socket: &UdpSocket) -> Result<(Vec<u8>, SocketAddr)> {
    let mut buffer = vec![0; 2048];
    let (count, from) = socket.recv_from(&mut buffer)?;
    buffer.truncate(count);
    Ok((buffer, from))
}

#[test]
fn edges_with_the_same_address_get_out_and_nobody_gets_in_unasked() {
    lab::scenario(|lab| {
        let cloud = socket(&lab.host("cloud")?, "203.0.113.10:7000", SOON)?;
        for (edge, public) in [
            ("edge1", "198.51.100.2"),
            ("edge2", "198.51.100.10"),
            ("edge3", "198.51.100.18"),
        ] {
            let inside = socket(&lab.host(edge)?, "0.0.0.0:7001", SOON)?;
            inside.send_to(edge.as_bytes(), "203.0.113.10:7000")?;
            let (text, from) = receive(&cloud)?;
            ensure!(
                text == edge.as_bytes() && from.ip().to_string() == public,
                "{edge}: {from}"
            );
            // The answer comes in, and what was not asked for does not.
            let stranger = socket(&lab.host("cloud")?, "203.0.113.10:0", SOON)?;
            stranger.send_to(b"unasked", from)?;
            cloud.send_to(b"answer", from)?;
            let (text, _) = receive(&inside)?;
            ensure!(
                text == b"answer",
                "{edge} got {:?}",
                String::from_utf8_lossy(&text)
            );
        }
        let scan = lab.host("cloud")?.enter(|| {
            TcpStream::connect_timeout(
                &"198.51.100.2:10250".parse().unwrap(),
                Duration::from_millis(500),
            )
        })?;
        ensure!(scan.is_err(), "a NAT box let a connection in");
        Ok(())
    });
}

/// Sends numbered datagrams through a line and returns them as they arrive, with the time of each in milliseconds.
fn across(to: SocketAddr, edge: &Host, cloud: &UdpSocket, count: u32) -> Result<Vec<(u32, u128)>> {
    let inside = socket(edge, "0.0.0.0:0", SOON)?;
    cloud.set_read_timeout(Some(Duration::from_millis(700)))?;
    let start = Instant::now();
    // Read while it is written, and never more than the sockets on the way can hold.
    let seen = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = Vec::new();
            while let Ok((text, _)) = receive(cloud) {
                let number = text.try_into().map(u32::from_be_bytes).unwrap_or(u32::MAX);
                seen.push((number, start.elapsed().as_millis()));
            }
            seen
        });
        for number in 0..count {
            inside.send_to(&number.to_be_bytes(), to)?;
        }
        reader
            .join()
            .map_err(|_panic| anyhow!("the reader panicked"))
    })?;
    Ok(seen)
}

#[test]
fn a_line_delays_loses_reorders_and_can_be_cut() {
    lab::scenario(|lab| {
        let (inet, edge) = (lab.host("inet")?, lab.host("edge1")?);
        let cloud = socket(&lab.host("cloud")?, "203.0.113.10:7000", SOON)?;
        let link = Link::lay(
            &inet,
            "198.51.100.1:7000".parse()?,
            &inet,
            cloud.local_addr()?,
            1,
        )?;
        // While hosts look for each other's hardware address, only some datagrams wait.
        ensure!(
            across(link.addr(), &edge, &cloud, 1)?.len() == 1,
            "the first datagram is lost"
        );
        let clear = across(link.addr(), &edge, &cloud, 300)?;
        let numbers: Vec<_> = clear.iter().map(|(number, _)| *number).collect();
        ensure!(
            numbers.iter().copied().eq(0..300),
            "a clear line lost or mixed: {numbers:?}"
        );

        let slow = Weather {
            delay: Duration::from_millis(200),
            ..Weather::default()
        };
        link.weather(slow);
        let late = across(link.addr(), &edge, &cloud, 100)?;
        ensure!(
            late.len() == 100 && late.iter().all(|(_, ms)| (200..600).contains(ms)),
            "{late:?}"
        );

        link.weather(Weather {
            loss: 0.2,
            reorder: 0.1,
            late: Duration::from_millis(50),
            ..slow
        });
        let rough = across(link.addr(), &edge, &cloud, 300)?;
        ensure!(
            (200..280).contains(&rough.len()),
            "{} of 300 arrived",
            rough.len()
        );
        let mut highest = 0;
        let behind = rough.iter().filter(|(number, _)| {
            highest = highest.max(*number);
            *number < highest
        });
        let behind = behind.count();
        ensure!(behind > 5, "only {behind} out of order");
        ensure!(
            link.counts().lost == 300 - rough.len() as u64,
            "{:?}",
            link.counts()
        );

        link.cut();
        ensure!(
            across(link.addr(), &edge, &cloud, 10)?.is_empty(),
            "a cut line let something through"
        );
        link.heal();
        link.weather(Weather::default());
        ensure!(
            across(link.addr(), &edge, &cloud, 10)?.len() == 10,
            "a healed line lost something"
        );
        Ok(())
    });
}

#[test]
fn a_line_for_packets_carries_what_is_routed_there_delays_and_loses_it_and_can_be_cut() {
    lab::scenario(|lab| {
        let (cloud, edge) = (lab.host("cloud")?, lab.host("edge3")?);
        let ends = [
            (&cloud, "line0", "10.40.0.1/30"),
            (&edge, "line0", "10.40.0.2/30"),
        ];
        let link = IpLink::lay(ends[0], ends[1], 1)?;
        let at = socket(&cloud, "10.40.0.1:7000", SOON)?;
        let to = at.local_addr()?;
        ensure!(across(to, &edge, &at, 100)?.len() == 100, "not all arrived");
        let carried = link.counts().forwarded;
        ensure!(carried == 100, "{carried} packets");

        // A handshake is two ways, so a client sees it as late as it is.
        let listener = edge.enter(|| TcpListener::bind("10.40.0.2:7000"))??;
        let far = listener.local_addr()?;
        let connect = |patience| cloud.enter(|| TcpStream::connect_timeout(&far, patience));
        link.weather(Weather {
            delay: Duration::from_millis(100),
            ..Weather::default()
        });
        let start = Instant::now();
        connect(SOON)??;
        let took = start.elapsed().as_millis();
        ensure!((200..1000).contains(&took), "connected after {took} ms");

        link.weather(Weather {
            loss: 0.3,
            ..Weather::default()
        });
        let arrived = across(to, &edge, &at, 200)?.len();
        ensure!((100..180).contains(&arrived), "{arrived} of 200 arrived");
        link.weather(Weather::default());

        link.cut();
        ensure!(
            connect(Duration::from_millis(500))?.is_err(),
            "a cut line let something through"
        );
        link.heal();
        connect(SOON)??;
        drop(link);
        let gone = cloud.ip("link show line0");
        ensure!(gone.is_err(), "the interface is still there: {gone:?}");
        Ok(())
    });
}

#[test]
fn a_line_rebinds_to_another_port_and_address() {
    lab::scenario(|lab| {
        let (inet, edge) = (lab.host("inet")?, lab.host("edge1")?);
        inet.ip("addr add 203.0.113.2/24 dev cloud0")?;
        let cloud = socket(&lab.host("cloud")?, "203.0.113.10:7000", SOON)?;
        let link = Link::lay(
            &inet,
            "198.51.100.1:7000".parse()?,
            &inet,
            cloud.local_addr()?,
            1,
        )?;
        let inside = socket(&edge, "0.0.0.0:0", SOON)?;
        let mut sources = Vec::new();
        for ip in [None, Some("203.0.113.1"), Some("203.0.113.2")] {
            if let Some(ip) = ip {
                link.rebind(ip.parse()?)?;
            }
            inside.send_to(b"hello", link.addr())?;
            let (_, from) = receive(&cloud)?;
            cloud.send_to(b"you too", from)?;
            let (text, _) = receive(&inside)?;
            ensure!(text == b"you too", "the way back is another's");
            sources.push(from);
        }
        ensure!(sources[0].ip() == sources[1].ip() && sources[0].port() != sources[1].port());
        ensure!(sources[2].ip().to_string() == "203.0.113.2", "{sources:?}");
        Ok(())
    });
}

#[test]
fn a_line_carries_tcp_with_its_delay() {
    lab::scenario(|lab| {
        let (inet, edge) = (lab.host("inet")?, lab.host("edge1")?);
        let listener = lab
            .host("cloud")?
            .enter(|| TcpListener::bind("203.0.113.10:7000"))??;
        let link = Link::lay(
            &inet,
            "198.51.100.1:7000".parse()?,
            &inet,
            listener.local_addr()?,
            1,
        )?;
        link.weather(Weather {
            delay: Duration::from_millis(100),
            ..Weather::default()
        });
        let mut inside = edge.enter(|| TcpStream::connect(link.addr()))??;
        let (mut cloud, _) = listener.accept()?;
        inside.set_read_timeout(Some(SOON))?;
        let start = Instant::now();
        inside.write_all(b"ping")?;
        let mut text = [0; 4];
        cloud.read_exact(&mut text)?;
        cloud.write_all(b"pong")?;
        drop(cloud);
        let mut answer = String::new();
        inside.read_to_string(&mut answer)?;
        let took = start.elapsed().as_millis();
        ensure!(
            answer == "pong" && (200..1000).contains(&took),
            "{answer:?} after {took} ms"
        );
        Ok(())
    });
}

#[test]
fn a_process_lives_in_its_namespace_and_ends_with_its_owner() {
    lab::scenario(|lab| {
        let script = "ip -4 addr show dev eth0; echo up; sleep 1000 & wait";
        let process = Spawn::new("script", "bash")
            .args(["-c", script])
            .host(&lab.host("edge3")?)
            .start(lab.dir())?;
        process.wait_for_line("up", SOON)?;
        process.wait_for_line("inet 192.168.3.10/24", SOON)?;
        ensure!(
            process.rss()? > 0 && process.fds()? >= 3 && process.threads()? == 1,
            "no usage"
        );
        let silent = process.wait_for_line("never written", Duration::from_millis(100));
        let text = format!("{:#}", silent.err().unwrap());
        ensure!(
            text.contains("never written") && text.contains("192.168.3.10"),
            "{text}"
        );
        let group = process.id();
        drop(process);
        let members = || -> Result<usize> {
            let stats = std::fs::read_dir("/proc")?.flatten();
            let stats =
                stats.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
            let groups = stats.filter_map(|stat| {
                let fields = stat.rsplit_once(')')?.1.to_owned();
                let mut fields = fields.split_whitespace();
                (fields.next()? != "Z").then(|| fields.nth(1)?.parse::<u32>().ok())?
            });
            Ok(groups.filter(|found| *found == group).count())
        };
        wait::poll(SOON, "the whole group is gone", || match members()? {
            0 => Ok(()),
            left => Err(anyhow!("{left} are left")),
        })
    });
}
