//! Small requests at a steady pace, whatever happens meanwhile: each a connection of its own to a kubelet at the edge, whose
//! certificate says whose it is.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_rustls::TlsConnector;

use crate::net::Host;

/// Between two requests.
const PACE: Duration = Duration::from_millis(100);
/// Who waits longer has no answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What came of the requests.
#[derive(Debug, Default, Clone)]
pub struct Probes {
    /// How many were answered right.
    pub right: usize,
    /// What became of the others, with the time since the first request.
    pub wrong: Vec<(Duration, String)>,
    /// The longest that a right answer took.
    pub slowest: Duration,
}

impl fmt::Display for Probes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (wrong, all) = (self.wrong.len(), self.right + self.wrong.len());
        let share = 100.0 * self.right as f64 / all.max(1) as f64;
        write!(
            f,
            "{all} requests, {wrong} not answered right ({share:.3} % were), slowest {:.1} s",
            self.slowest.as_secs_f64()
        )
    }
}

/// Asks until it is told to stop.
#[derive(Debug)]
pub struct Prober {
    stop: Arc<AtomicBool>,
    probes: Arc<Mutex<Probes>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Prober {
    pub(super) fn start(
        host: &Host,
        [ca, certificate, key]: &[PathBuf; 3],
        targets: Vec<(&'static str, SocketAddr)>,
    ) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_file_iter(ca)? {
            roots.add(root?)?;
        }
        let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<Vec<_>, _>>()?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key)?)?;
        let tls = TlsConnector::from(Arc::new(config));
        let (stop, probes) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (host, told, kept) = (host.clone(), Arc::clone(&stop), Arc::clone(&probes));
        let thread = std::thread::spawn(move || {
            host.join()?;
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(ask(tls, targets, &told, &kept));
            Ok(())
        });
        Ok(Self {
            stop,
            probes,
            thread: Some(thread),
        })
    }

    /// What came of them so far.
    #[must_use]
    pub fn so_far(&self) -> Probes {
        self.probes.lock().clone()
    }

    /// Waits for the last answers.
    ///
    /// # Errors
    /// When it could not ask.
    pub fn finish(mut self) -> Result<Probes> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread
                .join()
                .map_err(|_panic| anyhow!("the prober panicked"))??;
        }
        Ok(self.so_far())
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

async fn ask(
    tls: TlsConnector,
    targets: Vec<(&'static str, SocketAddr)>,
    stop: &AtomicBool,
    probes: &Mutex<Probes>,
) {
    let (start, mut asking) = (Instant::now(), JoinSet::new());
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for (node, address) in targets.into_iter().cycle() {
        pace.tick().await;
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let tls = tls.clone();
        asking.spawn(async move {
            let asked = Instant::now();
            let answer = timeout(PATIENCE, healthz(tls, node, address)).await;
            let answer = answer.unwrap_or_else(|_elapsed| Err(anyhow!("no answer in time")));
            (
                asked,
                answer
                    .map(|()| asked.elapsed())
                    .with_context(|| node.to_owned()),
            )
        });
        while let Some(done) = asking.try_join_next() {
            note(probes, start, done);
        }
    }
    while let Some(done) = asking.join_next().await {
        note(probes, start, done);
    }
}

fn note(
    probes: &Mutex<Probes>,
    start: Instant,
    done: Result<(Instant, Result<Duration>), tokio::task::JoinError>,
) {
    let mut probes = probes.lock();
    match done {
        Ok((_asked, Ok(took))) => {
            probes.right += 1;
            probes.slowest = probes.slowest.max(took);
        }
        Ok((asked, Err(error))) => probes.wrong.push((asked - start, format!("{error:#}"))),
        Err(error) => probes.wrong.push((start.elapsed(), error.to_string())),
    }
}

/// One request. Whoever answers has to prove that it is the node's kubelet.
async fn healthz(tls: TlsConnector, node: &'static str, address: SocketAddr) -> Result<()> {
    #[expect(
        clippy::disallowed_methods,
        reason = "a requester, outside of what is tested"
    )]
    let stream = TcpStream::connect(address).await.context("connect")?;
    let name = ServerName::try_from(node)?;
    let mut stream = tls.connect(name, stream).await.context("TLS")?;
    let request = format!("GET /healthz HTTP/1.1\r\nHost: {node}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.context("ask")?;
    let mut answer = String::new();
    stream
        .take(64 << 10)
        .read_to_string(&mut answer)
        .await
        .context("read")?;
    ensure!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok"),
        "{answer:?}"
    );
    Ok(())
}
