//! A scraper as Prometheus is one: each target at its own moment of each interval, whatever became of the one before (open
//! loop); connections kept, to kubelets one each, to the proxy for plain exporters a pool. An answer is compared byte by
//! byte, and its time counts from the moment it was due.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_rustls::TlsConnector;

use super::content::{Content, Expected};
use super::door::{self, Io};
use super::nodes::{self, Node};
use super::times::{Failures, Times};
use super::{PASSWORD, USER};

/// Prometheus' own limit of a scrape.
const LIMIT: Duration = Duration::from_secs(10);
/// Before the first scrape is due.
const LEAD: Duration = Duration::from_millis(200);
/// The golden ratio's fraction: multiples of it are spread evenly, however many there are.
const SPREAD: f64 = 0.618_033_988_749_895;

/// Scrapes for one interval, prints `warm`, scrapes on and prints a [`Scraped`].
#[derive(Debug, Clone, Args)]
pub(crate) struct Scraper {
    #[arg(long)]
    dir: PathBuf,
    /// The forward proxy; without one the stand-ins are scraped directly.
    #[arg(long)]
    proxy: Option<std::net::SocketAddr>,
    #[arg(long)]
    interval: u64,
    #[arg(long)]
    intervals: u32,
    #[arg(long)]
    exporter_kib: usize,
    #[arg(long)]
    cadvisor_kib: usize,
}

/// What came of it, the first interval's failures included.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Scraped {
    pub(super) exporter: Times,
    pub(super) cadvisor: Times,
    pub(super) failures: Failures,
    /// Bytes of bodies.
    pub(super) bytes: u64,
    /// Connections opened after the first interval.
    pub(super) opened: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Job {
    Exporter,
    Cadvisor,
}

/// A way in with its TLS.
struct Shared {
    proxy: Option<(std::net::SocketAddr, TlsConnector)>,
    kubelets: TlsConnector,
    authorization: String,
    /// Connections to the proxy for plain exporters, as Go's client has them.
    pool: Mutex<Vec<Connection>>,
}

struct Connection {
    sender: SendRequest<Empty<Bytes>>,
    _driver: JoinSet<()>,
}

/// One target of one job.
struct Target {
    shared: Arc<Shared>,
    node: Node,
    job: Job,
    answer: [Bytes; 3],
    kept: Option<Connection>,
    scraped: Scraped,
}

impl Scraper {
    pub(crate) async fn run(self) -> Result<()> {
        daemon::limits::raise_nofile();
        let shared = Arc::new(self.shared()?);
        let exporter = Content::exporter(self.exporter_kib << 10);
        let cadvisor = Content::cadvisor(self.cadvisor_kib << 10);
        let mut targets = Vec::new();
        for (index, node) in nodes::read(&self.dir)?.into_iter().enumerate() {
            for (job, content) in [(Job::Exporter, &exporter), (Job::Cadvisor, &cadvisor)] {
                targets.push(Target {
                    shared: Arc::clone(&shared),
                    answer: content.of(index, &node.name),
                    node: node.clone(),
                    job,
                    kept: None,
                    scraped: Scraped::default(),
                });
            }
        }
        let every = Duration::from_secs(self.interval);
        let start = Instant::now() + LEAD;
        let mut running = JoinSet::new();
        for (index, target) in targets.into_iter().enumerate() {
            let offset = every.mul_f64((index as f64 * SPREAD).fract());
            running.spawn(target.run(start + offset, every, self.intervals));
        }
        sleep_until(start + every).await;
        println!("warm");
        let mut all = Scraped::default();
        while let Some(ended) = running.join_next().await {
            all.extend(ended?);
        }
        println!("{}", serde_json::to_string(&all)?);
        Ok(())
    }

    fn shared(&self) -> Result<Shared> {
        let proxy_ca = self.dir.join("server/ca/ca.crt");
        let proxy = self
            .proxy
            .map(|proxy| anyhow::Ok((proxy, door::tls(&proxy_ca)?)));
        let secret = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
        Ok(Shared {
            proxy: proxy.transpose()?,
            kubelets: door::tls(&self.dir.join("kubelets.crt"))?,
            authorization: format!("Basic {secret}"),
            pool: Mutex::default(),
        })
    }
}

impl Scraped {
    fn extend(&mut self, more: Self) {
        self.exporter.extend(more.exporter);
        self.cadvisor.extend(more.cadvisor);
        self.failures.extend(more.failures);
        self.bytes += more.bytes;
        self.opened += more.opened;
    }
}

impl Target {
    async fn run(mut self, first: Instant, every: Duration, intervals: u32) -> Scraped {
        for round in 0..=intervals {
            let due = first + every * round;
            sleep_until(due).await;
            let ended = timeout_at(due + LIMIT, self.scrape(round > 0)).await;
            match ended.unwrap_or_else(|_elapsed| Err(anyhow::anyhow!("no answer in time"))) {
                Ok(bytes) if round > 0 => {
                    self.scraped.bytes += bytes;
                    match self.job {
                        Job::Exporter => self.scraped.exporter.add(due.elapsed()),
                        Job::Cadvisor => self.scraped.cadvisor.add(due.elapsed()),
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    let said = format!("{:?} of {}: {error:#}", self.job, self.node.name);
                    self.scraped.failures.add(said);
                }
            }
        }
        self.scraped
    }

    /// One scrape; the number of bytes.
    async fn scrape(&mut self, counts: bool) -> Result<u64> {
        let mut connection = match self.take() {
            Some(connection) => connection,
            None => {
                self.scraped.opened += usize::from(counts);
                self.connect().await?
            }
        };
        connection.sender.ready().await?;
        let request = self.request()?;
        let response = connection.sender.send_request(request).await?;
        let status = response.status();
        ensure!(status.is_success(), "{status}");
        let mut body = response.into_body();
        let mut expected = Expected::new(self.answer.clone());
        let mut bytes = 0;
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                expected.take(&data)?;
                bytes += data.len() as u64;
            }
        }
        expected.end()?;
        self.keep(connection);
        Ok(bytes)
    }

    /// Whether its connections are of use for every target.
    fn pools(&self) -> bool {
        self.job == Job::Exporter && self.shared.proxy.is_some()
    }

    fn take(&mut self) -> Option<Connection> {
        let mut pool = self.shared.pool.lock();
        loop {
            let kept = if self.pools() {
                pool.pop()
            } else {
                self.kept.take()
            };
            let usable = kept.as_ref().is_none_or(|kept| !kept.sender.is_closed());
            if usable {
                return kept;
            }
        }
    }

    fn keep(&mut self, connection: Connection) {
        if self.pools() {
            self.shared.pool.lock().push(connection);
        } else {
            self.kept = Some(connection);
        }
    }

    fn request(&self) -> Result<Request<Empty<Bytes>>> {
        let Node {
            name,
            exporter,
            kubelet,
        } = &self.node;
        let request = match self.job {
            Job::Exporter if self.shared.proxy.is_some() => {
                Request::get(format!("http://{name}:{exporter}/metrics"))
                    .header(header::HOST, format!("{name}:{exporter}"))
                    .header(header::PROXY_AUTHORIZATION, &self.shared.authorization)
            }
            Job::Exporter => {
                Request::get("/metrics").header(header::HOST, format!("{name}:{exporter}"))
            }
            Job::Cadvisor => {
                Request::get("/metrics/cadvisor").header(header::HOST, format!("{name}:{kubelet}"))
            }
        };
        Ok(request.body(Empty::new())?)
    }

    async fn connect(&self) -> Result<Connection> {
        let port = match self.job {
            Job::Exporter => self.node.exporter,
            Job::Cadvisor => self.node.kubelet,
        };
        let direct = std::net::SocketAddr::from(([127, 0, 0, 1], port));
        let address = self.shared.proxy.as_ref().map_or(direct, |proxy| proxy.0);
        #[expect(clippy::disallowed_methods, reason = "the scraper")]
        let stream = TcpStream::connect(address).await.context("connect")?;
        stream.set_nodelay(true)?;
        let mut io: Box<dyn Io> = match &self.shared.proxy {
            Some((address, tls)) => {
                let name = ServerName::from(address.ip());
                let stream = tls.connect(name, stream).await;
                Box::new(stream.context("TLS with the proxy-server")?)
            }
            None => Box::new(stream),
        };
        if self.job == Job::Cadvisor {
            let name = &self.node.name;
            if self.shared.proxy.is_some() {
                let fields = format!("Proxy-Authorization: {}\r\n", self.shared.authorization);
                door::connect(&mut io, &format!("{name}:{port}"), &fields).await?;
            }
            let server_name = ServerName::try_from(name.clone())?;
            let stream = self.shared.kubelets.connect(server_name, io).await;
            io = Box::new(stream.context("TLS with the kubelet")?);
        }
        let (sender, connection) = http1::handshake(TokioIo::new(io)).await?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            connection.await.ok(); // the request that it fails has the error
        });
        Ok(Connection {
            sender,
            _driver: driver,
        })
    }
}
