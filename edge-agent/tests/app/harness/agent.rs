//! An agent that runs within the test.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use certs::test_ca::TestCa;
use certs::{AgentFiles, Credential};
use daemon::{Exit, Listen, Reload, WatchOptions};
use edge_agent::config::{self, Overrides};
use edge_agent::status::SessionStatus;
use edge_agent::{App, AppError, ConfigSource, Stop};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{DEADLINE, Server, eventually};

/// The configuration of an agent `edge1`, before it is written.
pub(crate) struct Settings {
    pub(crate) dir: Arc<tempfile::TempDir>,
    pub(crate) servers: Vec<String>,
    pub(crate) allow: String,
    pub(crate) more: String,
}

impl Settings {
    /// With a credential in the state directory, and everything on loopback allowed.
    pub(crate) fn new(ca: &TestCa, servers: &[&Server]) -> Self {
        let settings = Self::without_credential(servers);
        settings.keep(&ca.agent("edge1"), ca);
        settings
    }

    pub(crate) fn without_credential(servers: &[&Server]) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap().into(),
            servers: servers
                .iter()
                .map(|server| server.address.to_string())
                .collect(),
            allow: "[{cidr: 127.0.0.0/8, ports: ['1-65535']}]".to_owned(),
            more: String::new(),
        }
    }

    /// Puts a credential into the state directory.
    pub(crate) fn keep(&self, credential: &Credential, ca: &TestCa) {
        let files = AgentFiles::new(self.dir.path());
        credential.save(&files.certificate(), &files.key()).unwrap();
        ca.bundle().save(&files.bundle()).unwrap();
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.dir.path().join("agent.yaml")
    }

    /// Writes the file as it stands now.
    pub(crate) fn write(&self) {
        let mut text = String::from("name: edge1\n");
        writeln!(text, "stateDir: {}", self.dir.path().display()).unwrap();
        writeln!(text, "servers: {:?}", self.servers).unwrap();
        writeln!(text, "allow: {}", self.allow).unwrap();
        text.push_str("observe: {listen: '127.0.0.1:0'}\nadmin: {listen: '127.0.0.1:0'}\n");
        text.push_str("backoff: {min: 50ms, max: 1s}\n");
        text.push_str(&self.more);
        std::fs::write(self.file(), text).unwrap();
    }

    pub(crate) fn start(&self) -> Agent {
        self.write();
        Agent::start(&self.file(), Arc::clone(&self.dir))
    }
}

pub(crate) struct Agent {
    pub(crate) stop: Stop,
    observe: Listen,
    admin: Listen,
    running: JoinSet<Result<Exit, AppError>>,
    /// Its files live as long as it does.
    _dir: Arc<tempfile::TempDir>,
}

impl Agent {
    fn start(file: &Path, dir: Arc<tempfile::TempDir>) -> Self {
        let config = config::load(file, &Overrides::default()).unwrap();
        let source = ConfigSource {
            file: file.to_owned(),
            overrides: Overrides::default(),
            reload: Reload::never(),
        };
        let quick = Duration::from_millis(20);
        let bound = App::bind(config)
            .unwrap()
            .with_source(source)
            .with_watching(WatchOptions {
                poll: Duration::from_millis(200),
                quiet: quick,
            });
        let stop = Stop::default();
        let (observe, admin) = (bound.observe().clone(), bound.admin().clone());
        let mut running = JoinSet::new();
        running.spawn(bound.run(stop.clone()));
        Self {
            stop,
            observe,
            admin,
            running,
            _dir: dir,
        }
    }

    /// How it ends by itself or as told.
    pub(crate) async fn ended(&mut self) -> Result<Exit, AppError> {
        let ended = timeout(DEADLINE, self.running.join_next())
            .await
            .expect("the agent stays");
        ended.unwrap().unwrap()
    }

    /// Stops it and asserts that it ends as it should.
    pub(crate) async fn stopped(mut self) {
        self.stop.shutdown.cancel();
        assert_eq!(self.ended().await.unwrap(), Exit::Drained);
    }

    pub(crate) async fn sessions(&self) -> Vec<SessionStatus> {
        let body = daemon::admin::client::get(&self.admin, "/sessions")
            .await
            .unwrap();
        serde_json::from_slice(&body).unwrap()
    }

    pub(crate) async fn metrics(&self) -> String {
        let body = daemon::admin::client::get(&self.observe, "/metrics")
            .await
            .unwrap();
        String::from_utf8(body.to_vec()).unwrap()
    }

    pub(crate) async fn is_ready(&self) -> bool {
        daemon::admin::client::get(&self.observe, "/readyz")
            .await
            .is_ok()
    }

    /// Waits until a metric has a value.
    pub(crate) async fn counts(&self, name: &str, value: f64) {
        eventually(name, async || {
            let text = self.metrics().await;
            match metric(&text, name) {
                Some(now) if now == value => Ok(()),
                other => Err(other),
            }
        })
        .await;
    }

    /// Waits until there are so many sessions.
    pub(crate) async fn has_sessions(&self, count: usize) {
        eventually("sessions", async || {
            let sessions = self.sessions().await;
            if sessions.len() == count {
                Ok(())
            } else {
                Err(sessions)
            }
        })
        .await;
    }
}

/// The value of a metric with its labels, as in `corvid_streams_total{reason="finished"}`.
pub(crate) fn metric(text: &str, name: &str) -> Option<f64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}
