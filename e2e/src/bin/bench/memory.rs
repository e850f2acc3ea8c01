//! What idle things cost: 1,000 streams at both daemons, many sessions at a server.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail};
use base64::Engine as _;
use certs::{
    Clock, Credential, Csr, Issuer, Key, LiveBundle, LiveCredential, Name, Own, TrustDomain,
};
use proto::control::{Control, Liveness};
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::{Congestion, Endpoint, Tuning};
use proto::wire::{Limits, Offer};
use secrecy::ExposeSecret as _;
use tokio::task::JoinSet;

use crate::load::pinger;
use crate::tunnel::{Server, Way, wait_for_backend, wait_for_sessions};

/// Sessions before the first figure is taken.
const WARM_UP: usize = 20;

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
    let [server, agent] = way.hops.as_slice() else {
        bail!("idle streams are measured with two hops")
    };
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
    let server = Server {
        more: "limits: {sessionsPerSecond: 1000000, handshakes: 4096}",
        ..Server::default()
    };
    let hop = server.start(dir.path())?;
    let backend = wait_for_backend(dir.path())?.parse()?;
    let trust_domain = TrustDomain::default();
    let now = Clock::system().now();
    let issuer = Issuer::load_or_create(&dir.path().join("server/ca"), &trust_domain, now)?;
    let mut sessions = JoinSet::new();
    // The first ones pay for what is made once.
    for i in 0..WARM_UP {
        sessions.spawn(session(&issuer, &format!("warm{i}"), backend).await?);
    }
    wait_for_sessions(dir.path(), WARM_UP)?;
    let before = hop.rss()?;
    for i in 0..count {
        sessions.spawn(session(&issuer, &format!("edge{i}"), backend).await?);
    }
    wait_for_sessions(dir.path(), WARM_UP + count)?;
    Ok(IdleSessions {
        count,
        each: kib(before, hop.rss()?, count),
    })
}

/// A session of an agent of that name; it lasts as long as the returned future runs.
async fn session(
    issuer: &Issuer,
    name: &str,
    backend: SocketAddr,
) -> Result<impl Future<Output = ()> + Send + 'static> {
    let own = agent(issuer, name)?;
    let tuning = Tuning {
        stream_window: 640 << 10,
        send_window: 4 << 20,
        max_streams: 8,
        idle_timeout: Duration::from_secs(120),
        congestion: Congestion::Cubic,
    };
    let offer: Offer = Offer {
        agent: name.parse()?,
        software: "bench".into(),
        capabilities: vec![],
        limits: Limits {
            max_streams: 4096,
            stream_window: 640 << 10,
        },
        instance: String::new(),
        line: None,
    };
    let tls = certs::tunnel_client_quic(&own)?;
    let session = Endpoint::dial(backend, certs::SERVER_SNI, tls, tuning).await?;
    let (control, _) = Control::dial(session, &offer).await?;
    Ok(async move {
        control
            .run(&Liveness::new(Keepalive::default()), |_| ())
            .await;
    })
}

/// What an enrolled agent of that name has.
fn agent(issuer: &Issuer, name: &str) -> Result<Own> {
    Ok(Own {
        credential: LiveCredential::new(credential(issuer, name)?),
        bundle: LiveBundle::new(issuer.bundle().clone()),
        clock: Clock::system(),
        trust_domain: issuer.trust_domain().clone(),
    })
}

/// An agent's credential as enrolment gives it.
pub(crate) fn credential(issuer: &Issuer, name: &str) -> Result<Credential> {
    let key = Key::generate()?;
    let csr = Csr::check(&Csr::make(&key)?)?;
    let issued = issuer.sign_agent(&Name::parse(name)?, None, &csr, Clock::system().now())?;
    let mut chain = String::new();
    for certificate in issued.chain {
        let text = base64::engine::general_purpose::STANDARD.encode(certificate);
        writeln!(
            chain,
            "-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----"
        )?;
    }
    let key = key.to_pem();
    Ok(Credential::from_pem(
        chain.as_bytes(),
        key.expose_secret().as_bytes(),
    )?)
}
