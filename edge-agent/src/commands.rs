//! What each command does, up to its exit code.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use daemon::{Exit, Signals, admin, limits, telemetry};

use crate::app::App;
use crate::candidate::Candidates;
use crate::cli::{Admin, Command, Settings, Status};
use crate::config::{self, Config};
use crate::drain::Stop;
use crate::enroll::{Enrolment, Expiry};
use crate::error::AppError;
use crate::metrics::AgentMetrics;
use crate::reload::ConfigSource;
use crate::resolve::Resolver;
use crate::status::{SessionStatus, table, timestamp};

/// Runs a command.
///
/// # Errors
/// When it failed; the words are for the person who typed it.
pub async fn run(command: Command) -> anyhow::Result<Exit> {
    match command {
        Command::Run(settings) => agent(&settings).await,
        Command::Enroll(settings) => enroll(&settings).await,
        Command::CheckConfig(settings) => {
            let config = load(&settings)?;
            say(&format!(
                "ok: agent {} of {} servers\n",
                config.name,
                config.servers.len()
            ))?;
            Ok(Exit::Drained)
        }
        Command::Status(status) => show(&status).await,
        Command::Probe { what, admin } => {
            let answer = ask(&admin, what.path()).await?;
            say(&String::from_utf8_lossy(&answer))?;
            Ok(Exit::Drained)
        }
    }
}

/// The exit code of an error: a wrong configuration is told from a failure.
#[must_use]
pub fn exit_of(error: &anyhow::Error) -> Exit {
    let config = error
        .downcast_ref::<daemon::ConfigError>()
        .map(daemon::ConfigError::exit);
    let app = || error.downcast_ref::<AppError>().map(AppError::exit);
    config.or_else(app).unwrap_or(Exit::Failed)
}

fn load(settings: &Settings) -> Result<Config, daemon::ConfigError> {
    let overrides = settings.overrides();
    match &settings.config {
        Some(file) => config::load(file, &overrides),
        None => config::parse(Path::new("the command line"), "", &overrides),
    }
}

async fn agent(settings: &Settings) -> anyhow::Result<Exit> {
    let config = load(settings)?;
    let log = telemetry::init(config.log_format, &config.log_level)?;
    let signals = Signals::install().context("watch for signals")?;
    let files = limits::raise_nofile();
    tracing::info!(name = %config.name, version = env!("CARGO_PKG_VERSION"), files, "edge-agent starts");
    let mut bound = App::bind(config)?.with_log(log);
    if let Some(file) = settings.config.clone() {
        let (overrides, reload) = (settings.overrides(), signals.reload());
        bound = bound.with_source(ConfigSource {
            file,
            overrides,
            reload,
        });
    }
    let stop = Stop {
        shutdown: signals.shutdown(),
        immediate: signals.immediate(),
    };
    Ok(bound.run(stop).await?)
}

async fn enroll(settings: &Settings) -> anyhow::Result<Exit> {
    let config = load(settings)?;
    telemetry::init(
        config.log_format,
        settings.log_level.as_deref().unwrap_or("error"),
    )?;
    let candidates = Arc::new(Candidates::new(config.servers.clone(), Resolver::new()));
    let (metrics, expiry) = (AgentMetrics::new(), Expiry::default());
    let enrolment = Enrolment::new(&config, candidates, metrics, expiry);
    if let Some(own) = enrolment.load()? {
        let until = timestamp(own.credential.not_after());
        say(&format!(
            "{} is enrolled already; its certificate ends {until}\n",
            config.name
        ))?;
        return Ok(Exit::Drained);
    }
    let enrolled = enrolment
        .join_once()
        .await
        .map_err(|source| AppError::Join {
            name: config.name.to_string(),
            source: source.into(),
        })?;
    enrolled.stored.context("keep the certificate")?;
    let until = timestamp(enrolled.credential.not_after());
    say(&format!(
        "{} is enrolled; its certificate ends {until}\n",
        config.name
    ))?;
    Ok(Exit::Drained)
}

async fn show(status: &Status) -> anyhow::Result<Exit> {
    let body = ask(&status.admin, "/sessions").await?;
    if status.json {
        say(&format!("{}\n", String::from_utf8_lossy(&body)))?;
    } else {
        let sessions: Vec<SessionStatus> =
            serde_json::from_slice(&body).context("read the agent's answer")?;
        say(&table(&sessions))?;
    }
    Ok(Exit::Drained)
}

async fn ask(Admin { admin }: &Admin, path: &str) -> anyhow::Result<Bytes> {
    let answer = admin::client::get(admin, path).await;
    answer.with_context(|| format!("ask the agent at {admin}"))
}

/// Writes to standard output; a closed pipe is the reader's choice.
fn say(text: &str) -> std::io::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}
