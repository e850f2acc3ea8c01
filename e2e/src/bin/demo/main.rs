//! `make demo`: both daemons over real QUIC on this machine, a stand-in kubelet, a request and a scrape through the
//! tunnel. Everything lives in one directory and ends with the process.
#![expect(clippy::print_stdout, reason = "a demo talks")]

mod edge;
mod requests;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use certs::{AgentPattern, Clock, Name, NewToken, Store};
use clap::Parser;
use daemon::{Exit, Listen, LogHandle, Reload, Signals};
use proxy_server::app::{App, Bound, Environment};
use proxy_server::config::Overrides;
use proxy_server::reload::Source;
use secrecy::ExposeSecret as _;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Shows a Corvid tunnel on this machine.
#[derive(Debug, Parser)]
struct Args {
    /// Exit once everything was shown, in place of staying up until Ctrl-C.
    #[arg(long)]
    once: bool,
    /// Where to keep the state; a temporary directory if not given.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Log level of both daemons.
    #[arg(long, default_value = "warn")]
    log: String,
}

fn main() -> Exit {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let shown = runtime
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(Box::pin(show(args))));
    match shown {
        Ok(()) => Exit::Drained,
        Err(error) => {
            println!("the demo failed: {error:#}");
            Exit::Failed
        }
    }
}

async fn show(args: Args) -> Result<()> {
    let signals = Signals::install()?;
    daemon::telemetry::init(daemon::LogFormat::Text, &args.log)?;
    let temporary = tempfile::tempdir()?;
    let dir = args.dir.unwrap_or_else(|| temporary.path().to_owned());
    std::fs::create_dir_all(&dir)?;

    let mut tasks = JoinSet::new();
    let edge = edge::start(&mut tasks).await?;
    say(
        "edge",
        &format!(
            "a stand-in kubelet on 127.0.0.1:{} (TLS) and an exporter on 127.0.0.1:{}",
            edge.kubelet, edge.exporter
        ),
    );

    let stop = CancellationToken::new();
    let server = server(&dir)?;
    let (backend, proxy) = addresses(&server)?;
    tasks.spawn(discard(server.run(stop.clone(), signals.immediate())));
    say(
        "cloud",
        &format!(
            "proxy-server up: agents on {backend} (QUIC and enrolment), CONNECT on {}/connect.sock, scrapers on {proxy}",
            dir.display()
        ),
    );

    let began = Instant::now();
    let (status_at, agent) = agent(&dir, backend, &edge)?;
    let stop_agent = edge_agent::Stop {
        shutdown: stop.clone(),
        immediate: signals.immediate(),
    };
    tasks.spawn(discard(agent.run(stop_agent)));
    tokio::time::timeout(PATIENCE, session(&status_at))
        .await
        .context("the agent has no session")??;
    say(
        "edge",
        &format!(
            "edge-agent enrolled with a join token, then opened its session: {}",
            ms(began)
        ),
    );

    let began = Instant::now();
    let logs = requests::logs(&dir.join("connect.sock"), &edge).await?;
    say(
        "request",
        &format!(
            "CONNECT edge1:{} and TLS to the kubelet through the tunnel: {}",
            edge.kubelet,
            ms(began)
        ),
    );
    for line in logs.lines() {
        println!("            | {line}");
    }
    let began = Instant::now();
    let samples = requests::scrape(&dir, proxy, &edge).await?;
    say(
        "scrape",
        &format!(
            "GET http://edge1:{}/metrics through the forward proxy: {}",
            edge.exporter,
            ms(began)
        ),
    );
    for line in samples.lines() {
        println!("            | {line}");
    }
    let refused = requests::refused(&dir.join("connect.sock"), "edge1:22").await?;
    say(
        "refusal",
        &format!("CONNECT edge1:22 is answered: {refused}"),
    );
    hints(&dir, proxy, &edge);

    if !args.once {
        println!("\nCtrl-C ends it.");
        signals.shutdown().cancelled().await;
    }
    stop.cancel();
    edge.stop.cancel();
    tokio::time::timeout(PATIENCE, tasks.join_all())
        .await
        .context("something did not stop")?;
    say("done", "both daemons drained and stopped");
    Ok(())
}

fn say(who: &str, what: &str) {
    println!("{who:>10}  {what}");
}

fn ms(since: Instant) -> String {
    format!("{:.1} ms", since.elapsed().as_secs_f64() * 1000.0)
}

/// Runs a daemon to its end; what went wrong is in its log.
async fn discard<T>(run: impl Future<Output = T>) {
    run.await;
}

fn server(dir: &Path) -> Result<Bound> {
    let user = proxy_server::frontend::credentials::line(requests::USER, requests::PASSWORD)?;
    std::fs::write(dir.join("users"), user)?;
    let file = dir.join("proxy-server.yaml");
    let text = format!(
        "stateDir: {d}/server\nname: proxy-1\ncertificate: {{dnsNames: [localhost], ipAddresses: [127.0.0.1]}}\n\
         backend: {{listen: ['127.0.0.1:0']}}\n\
         frontends:\n- {{type: httpConnect, listen: 'unix:{d}/connect.sock'}}\n\
         - {{type: forwardProxy, listen: 'tcp:127.0.0.1:0', basicAuthFile: {d}/users, allow: [{{users: [{user}], nodes: ['*'], ports: ['1-65535']}}]}}\n\
         observe: {{listen: '127.0.0.1:0'}}\nadmin: {{listen: '127.0.0.1:0', socket: {d}/admin.sock}}\n\
         drain: {{minDelay: 100ms, grace: 5s}}\n",
        d = dir.display(),
        user = requests::USER,
    );
    std::fs::write(&file, text)?;
    let overrides = Overrides::default();
    let config = proxy_server::config::load(&file, &overrides)?;
    let source = Source {
        file: Some(file),
        overrides,
    };
    App::bind(
        config,
        Environment {
            source,
            log: LogHandle::detached(),
            reload: Reload::never(),
        },
    )
}

fn addresses(server: &Bound) -> Result<(std::net::SocketAddr, std::net::SocketAddr)> {
    let backend = server
        .backend
        .first()
        .copied()
        .context("no backend address")?;
    let proxy = server
        .frontends
        .iter()
        .find_map(Listen::tcp)
        .context("no forward proxy")?;
    Ok((backend, proxy))
}

fn agent(
    dir: &Path,
    backend: std::net::SocketAddr,
    edge: &edge::Edge,
) -> Result<(PathBuf, edge_agent::Bound)> {
    let state = dir.join("server");
    let now = Clock::system().now();
    let new = NewToken {
        ttl: Duration::from_secs(600),
        uses: 1,
        agents: AgentPattern::any(),
    };
    let token = Store::open(&state)?.create_token(&new, now)?.expose();
    let issuer =
        certs::Issuer::load_or_create(&state.join("ca"), &certs::TrustDomain::default(), now)?;
    let name = Name::parse(edge::NODE)?;
    let text = format!(
        "name: {name}\nstateDir: {}/agent\nservers: ['{backend}']\njoin: {{token: {}, caPin: '{}'}}\n\
         allow: [{{cidr: 127.0.0.1/32, ports: [{}, {}]}}]\nobserve: {{listen: '127.0.0.1:0'}}\nadmin: {{listen: '127.0.0.1:0'}}\n",
        dir.display(),
        token.expose_secret(),
        issuer.pin(),
        edge.kubelet,
        edge.exporter,
    );
    let file = dir.join("edge-agent.yaml");
    certs::write_atomic(&file, text.as_bytes(), certs::MODE_SECRET)?;
    let config = edge_agent::config::load(&file, &edge_agent::config::Overrides::default())?;
    Ok((dir.join("admin.sock"), edge_agent::App::bind(config)?))
}

/// Waits until the server shows a session.
async fn session(socket: &Path) -> Result<()> {
    let listen = Listen::Unix(socket.to_owned());
    loop {
        let body = daemon::admin::client::get(&listen, "/sessions").await?;
        let sessions: Vec<proxy_server::status::SessionStatus> = serde_json::from_slice(&body)?;
        if !sessions.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn hints(dir: &Path, proxy: std::net::SocketAddr, edge: &edge::Edge) {
    let d = dir.display();
    println!("\nTry it:");
    println!(
        "  curl --proxy https://{proxy} --proxy-cacert {d}/server/ca/ca.crt --proxy-user {}:{} http://edge1:{}/metrics",
        requests::USER,
        requests::PASSWORD,
        edge.exporter
    );
    println!(
        "  curl --insecure --proxy https://{proxy} --proxy-cacert {d}/server/ca/ca.crt --proxy-user {}:{} https://edge1:{}/containerLogs/default/hello/app",
        requests::USER,
        requests::PASSWORD,
        edge.kubelet
    );
    println!(
        "  cargo run --quiet --profile quick -p proxy-server -- status --socket {d}/admin.sock"
    );
}
