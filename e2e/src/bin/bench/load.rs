//! The target and the load. The first byte of a connection says what it is for.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::table::Samples;
use crate::tunnel::{Stream, Way};

const CHUNK: usize = 256 << 10;
/// Pings of a round.
const PINGS: usize = 1000;
/// Bytes of a ping.
const PING: usize = 32;
/// New connections of a round, and how many are opened at once.
const CONNECTIONS: usize = 600;
const OPENERS: usize = 16;
/// A line's worth: what a site with a good uplink sends.
const LINE: u64 = 100_000_000 / 8;
/// How often a paced transfer sends.
const BEAT: Duration = Duration::from_millis(5);
/// How long small requests run beside a bulk stream.
const BESIDE: Duration = Duration::from_secs(2);

/// Serves all connections until dropped.
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Target {
    pub(crate) async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                // What goes wrong shows at the other end.
                connections.spawn(async move { serve(stream).await.ok() });
            }
        });
        Ok(Self {
            address,
            _tasks: tasks,
        })
    }
}

async fn serve(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let kind = stream.read_u8().await?;
    let mut buffer = vec![0; CHUNK];
    match kind {
        b'D' => {
            let mut left = stream.read_u64().await?;
            while left > 0 {
                let now = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
                stream.write_all(&buffer[..now]).await?;
                left -= now as u64;
            }
        }
        b'L' => {
            let each = usize::try_from(LINE).unwrap_or(CHUNK) / 200;
            let mut beat = tokio::time::interval(BEAT);
            loop {
                beat.tick().await;
                stream.write_all(&buffer[..each]).await?;
            }
        }
        b'U' => {
            let mut left = stream.read_u64().await?;
            while left > 0 {
                left = left.saturating_sub(stream.read(&mut buffer).await?.max(1) as u64);
            }
            stream.write_u8(b'.').await?;
        }
        _ => loop {
            stream.read_exact(&mut buffer[..PING]).await?;
            stream.write_all(&buffer[..PING]).await?;
        },
    }
    Ok(())
}

/// Direction of a transfer.
#[derive(Clone, Copy)]
enum Direction {
    Down,
    Up,
    /// Down, at [`LINE`].
    Line,
}

async fn transfer(stream: Stream, way: Direction, bytes: u64) -> Result<()> {
    match stream {
        Stream::Tcp(stream) => move_bytes(stream, way, bytes).await,
        Stream::Unix(stream) => move_bytes(stream, way, bytes).await,
    }
}

async fn move_bytes<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    way: Direction,
    bytes: u64,
) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    match way {
        Direction::Down => {
            stream.write_u8(b'D').await?;
            stream.write_u64(bytes).await?;
            let mut got = 0;
            while got < bytes {
                let now = stream.read(&mut buffer).await?;
                ensure!(now > 0, "ended after {got} of {bytes} bytes");
                got += now as u64;
            }
        }
        Direction::Line => {
            stream.write_u8(b'L').await?;
            while stream.read(&mut buffer).await? > 0 {}
        }
        Direction::Up => {
            stream.write_u8(b'U').await?;
            stream.write_u64(bytes).await?;
            let mut left = bytes;
            while left > 0 {
                let now = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
                stream.write_all(&buffer[..now]).await?;
                left -= now as u64;
            }
            stream.read_u8().await?;
        }
    }
    Ok(())
}

/// Opens a stream that is pinged.
pub(crate) async fn pinger(way: &Way) -> Result<Stream> {
    let mut stream = way.connect().await?;
    match &mut stream {
        Stream::Tcp(stream) => stream.write_u8(b'P').await?,
        Stream::Unix(stream) => stream.write_u8(b'P').await?,
    }
    ping(&mut stream).await?;
    Ok(stream)
}

async fn ping(stream: &mut Stream) -> Result<Duration> {
    async fn once<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<Duration> {
        let mut buffer = [7; PING];
        let began = now();
        stream.write_all(&buffer).await?;
        stream.read_exact(&mut buffer).await?;
        Ok(began.elapsed())
    }
    match stream {
        Stream::Tcp(stream) => once(stream).await,
        Stream::Unix(stream) => once(stream).await,
    }
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// One round of everything.
pub(crate) async fn round(way: &Way, bytes: u64, samples: &mut Samples) -> Result<()> {
    for (label, direction, streams) in [
        ("down 1", Direction::Down, 1),
        ("up 1", Direction::Up, 1),
        ("down 8", Direction::Down, 8),
        ("up 8", Direction::Up, 8),
    ] {
        let (cpu, began) = (way.cpu()?, now());
        let mut all = JoinSet::new();
        for _ in 0..streams {
            all.spawn(transfer(way.connect().await?, direction, bytes / streams));
        }
        while let Some(done) = all.join_next().await {
            done??;
        }
        let seconds = began.elapsed().as_secs_f64();
        let gigabytes = bytes as f64 / 1e9;
        samples.add(
            format!("throughput {label}, Mbit/s"),
            bytes as f64 * 8.0 / 1e6 / seconds,
        );
        samples.add(
            format!("CPU {label}, s/GB"),
            (way.cpu()? - cpu).as_secs_f64() / gigabytes,
        );
    }
    pings(way, samples).await?;
    connections(way, samples).await?;
    let unpaced = "ping p99 beside a bulk stream, us";
    beside_bulk(way, Direction::Down, unpaced, samples).await?;
    let paced = "ping p99 beside 100 Mbit/s, us";
    beside_bulk(way, Direction::Line, paced, samples).await
}

async fn pings(way: &Way, samples: &mut Samples) -> Result<()> {
    let mut stream = pinger(way).await?;
    let mut times = Histogram::<u64>::new(3)?;
    for _ in 0..PINGS {
        times.record(micros(ping(&mut stream).await?))?;
    }
    samples.add("ping p50, us", times.value_at_quantile(0.5) as f64);
    samples.add("ping p99, us", times.value_at_quantile(0.99) as f64);
    Ok(())
}

async fn connections(way: &Way, samples: &mut Samples) -> Result<()> {
    let began = now();
    let each = async |count: usize| -> Result<()> {
        for _ in 0..count {
            drop(pinger(way).await?);
        }
        Ok(())
    };
    futures_util::future::try_join_all((0..OPENERS).map(|_| each(CONNECTIONS / OPENERS))).await?;
    let opened = (CONNECTIONS / OPENERS * OPENERS) as f64;
    samples.add("new connections/s", opened / began.elapsed().as_secs_f64());
    Ok(())
}

/// p99 of a small request while one bulk stream comes down.
async fn beside_bulk(
    way: &Way,
    direction: Direction,
    label: &str,
    samples: &mut Samples,
) -> Result<()> {
    let mut stream = pinger(way).await?;
    let bulk = transfer(way.connect().await?, direction, u64::MAX);
    let mut times = Histogram::<u64>::new(3)?;
    let measured = async {
        let began = now();
        while began.elapsed() < BESIDE {
            times.record(micros(ping(&mut stream).await?))?;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        done = measured => done?,
        ended = bulk => { ended?; }
    }
    samples.add(label, times.value_at_quantile(0.99) as f64);
    Ok(())
}
