//! What idle things cost: 1,000 streams at both daemons, many sessions at a server.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use certs::{AgentFiles, Clock, EnrollRequest, LiveBundle, LiveCredential, Name, Own, Store, TrustDomain};
use proto::control::{Control, Liveness};
use proto::transport::Session as _;
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::{Congestion, Endpoint, Tuning};
use proto::wire::{Limits, Offer};
use tokio::task::JoinSet;

use crate::load::pinger;
use crate::tunnel::{Way, server, wait_for_backend, wait_for_sessions};

/// KiB for each idle stream.
pub(crate) struct IdleStreams {
    pub(crate) count: usize,
    pub(crate) server: f64,
    pub(crate) agent: f64,
}

/// KiB for each idle session at the server.
pub(crate) struct IdleSessions {
    pub(crate) count: usize,
    pub(crate) each: f64,
}

fn kib(before: u64, after: u64, count: usize) -> f64 {
    after.saturating_sub(before) as f64 / 1024.0 / count as f64
}

pub(crate) async fn idle_streams(way: &Way, count: usize) -> Result<IdleStreams> {
    let [server, agent] = &way.hops;
    let before = (server.rss()?, agent.rss()?);
    let mut streams = Vec::new();
    for _ in 0..count {
        streams.push(pinger(way).await?);
    }
    let after = (server.rss()?, agent.rss()?);
    Ok(IdleStreams {
        count: streams.len(),
        server: kib(before.0, after.0, count),
        agent: kib(before.1, after.1, count),
    })
}

pub(crate) async fn idle_sessions(count: usize) -> Result<IdleSessions> {
    let dir = tempfile::tempdir()?;
    let limits = "limits: {sessionsPerAgent: 1000000, sessionsPerSecond: 1000000, handshakes: 4096}";
    let hop = server(dir.path(), limits)?;
    let backend = wait_for_backend(dir.path())?.parse()?;
    let own = enrolled(dir.path(), backend).await?;
    let offer = Offer {
        agent: "edge1".parse()?,
        software: "bench".into(),
        capabilities: vec![],
        limits: Limits { max_streams: 4096, stream_window: 640 << 10 },
        instance: String::new(),
    };
    let tls = certs::tunnel_client_quic(&own)?;
    let tuning = Tuning {
        stream_window: 640 << 10,
        max_streams: 8,
        idle_timeout: Duration::from_secs(120),
        congestion: Congestion::Cubic,
    };
    let mut sessions = JoinSet::new();
    let mut open = async |wanted: usize| -> Result<()> {
        for _ in 0..wanted {
            let session = Endpoint::dial(backend, certs::SERVER_SNI, Arc::clone(&tls), tuning).await?;
            let (control, _) = Control::dial(session.clone(), &offer).await?;
            sessions.spawn(async move {
                let live = Liveness::new(Keepalive::default());
                control.run(&live, |_| ()).await;
                session.close(proto::Reason::Draining);
            });
        }
        Ok(())
    };
    // The first ones pay for what is made once.
    open(20).await?;
    wait_for_sessions(dir.path(), 20)?;
    let before = hop.rss()?;
    open(count).await?;
    wait_for_sessions(dir.path(), 20 + count)?;
    Ok(IdleSessions { count, each: kib(before, hop.rss()?, count) })
}

async fn enrolled(dir: &std::path::Path, backend: std::net::SocketAddr) -> Result<Own> {
    let state = dir.join("server");
    let clock = Clock::system();
    let trust_domain = TrustDomain::default();
    let issuer = certs::Issuer::load_or_create(&state.join("ca"), &trust_domain, clock.now())?;
    let new = certs::NewToken { ttl: Duration::from_secs(600), uses: 1, agents: certs::AgentPattern::any() };
    let token = Store::open(&state)?.create_token(&new, clock.now())?;
    let files = AgentFiles::new(dir.join("agent"));
    let name = Name::parse("edge1")?;
    let request = EnrollRequest {
        server: backend,
        pin: issuer.pin(),
        token: &token,
        name: &name,
        trust_domain: &trust_domain,
        files: &files,
        clock: &clock,
    };
    let enrolled = certs::enroll(&request).await.context("enrol")?;
    Ok(Own {
        credential: LiveCredential::new(enrolled.credential),
        bundle: LiveBundle::new(enrolled.bundle),
        clock,
        trust_domain,
    })
}
