//! The commands about the authority: wherever it is kept, they read it and change it there, by one step.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use certs::{AGENT_LIFE, Ca, CaDir, Clock, IssuerError, Name, Pin, TrustBundle, TrustDomain};
use serde::Serialize;

use super::time;
use crate::cli::StateArgs;
use crate::cluster::Vault;
use crate::config::{self, Overrides};
use crate::{app, authority};

/// Where the authority is kept.
enum Place {
    Dir(CaDir, TrustDomain),
    Secret(Box<Vault>, tokio::runtime::Runtime),
}

impl Place {
    /// As the configuration says, or in a state directory that is given. Also how long agents may take to renew.
    fn find(args: &StateArgs) -> anyhow::Result<(Self, Duration)> {
        if let Some(dir) = &args.state_dir {
            let domain = args.trust_domain.clone().unwrap_or_default();
            let grace = config::Backend::default().renew_grace;
            return Ok((Self::Dir(CaDir::new(dir.join("ca")), domain), grace));
        }
        let config = config::load(&args.config, &Overrides::default())
            .context("find the authority (or give --state-dir)")?;
        let place = match app::vault(&config, None) {
            Some(vault) => {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                Self::Secret(Box::new(vault), runtime)
            }
            None => Self::Dir(authority::dir(&config), config.trust_domain.clone()),
        };
        Ok((place, config.backend.renew_grace))
    }

    fn read(&self) -> anyhow::Result<Ca> {
        match self {
            Self::Dir(dir, domain) => {
                let found = dir.load(domain)?;
                found.with_context(|| {
                    format!(
                        "there is no authority in {}; it is made when the server starts",
                        dir.path().display()
                    )
                })
            }
            Self::Secret(vault, runtime) => Ok(runtime.block_on(vault.show())?),
        }
    }

    fn update(&self, change: impl Fn(&Ca) -> Result<Ca, IssuerError>) -> anyhow::Result<Ca> {
        match self {
            Self::Dir(dir, domain) => Ok(dir.update(domain, change)?),
            Self::Secret(vault, runtime) => Ok(runtime.block_on(vault.update(change))?),
        }
    }

    /// Whom to trust.
    fn bundle(&self, ca: &Ca) -> anyhow::Result<TrustBundle> {
        match self {
            Self::Dir(dir, _) => Ok(dir.issuer(ca, Clock::system().now())?.bundle().clone()),
            Self::Secret(..) => Ok(ca.bundle()?),
        }
    }
}

#[derive(Debug, Serialize)]
struct Shown {
    pin: String,
    not_after: String,
    trusted: Vec<String>,
    old_roots_leave: Option<String>,
    clients_until: Option<String>,
}

/// `ca show`
///
/// # Errors
/// The authority can't be read where it is kept.
pub fn ca_show(args: &StateArgs, json: bool) -> anyhow::Result<String> {
    let (place, _grace) = Place::find(args)?;
    let ca = place.read()?;
    let shown = Shown {
        pin: ca.pin().to_string(),
        not_after: time(ca.not_after().as_secs()),
        trusted: pins(place.bundle(&ca)?.pins()),
        old_roots_leave: ca.retires_at().map(|at| time(at.as_secs())),
        clients_until: ca.clients_until().map(|at| time(at.as_secs())),
    };
    if json {
        return Ok(serde_json::to_string_pretty(&shown)?);
    }
    let mut out = String::new();
    writeln!(out, "caPin:     {}", shown.pin)?;
    writeln!(out, "expires:   {}", shown.not_after)?;
    for (i, pin) in shown.trusted.iter().enumerate() {
        let what = if i == 0 { "trusted:  " } else { "          " };
        writeln!(out, "{what} {pin}")?;
    }
    if let Some(at) = shown.old_roots_leave {
        writeln!(out, "rotation:  the older root leaves at {at}")?;
    }
    if let Some(until) = shown.clients_until {
        writeln!(out, "clients:   certified until {until} at the latest")?;
    }
    Ok(out)
}

fn pins(pins: &[Pin]) -> Vec<String> {
    pins.iter().map(ToString::to_string).collect()
}

/// `ca rotate`
///
/// # Errors
/// A rotation is under way, or the authority can't be changed where it is kept.
pub fn ca_rotate(args: &StateArgs, keep: Option<Duration>) -> anyhow::Result<String> {
    let (place, grace) = Place::find(args)?;
    let keep = keep.unwrap_or_else(|| AGENT_LIFE.saturating_add(grace));
    let now = Clock::system().now();
    let before = place.read()?.pin();
    let ca = place.update(|ca| ca.rotate(keep, now))?;
    let until = ca.retires_at().map(|at| time(at.as_secs()));
    let until = until.unwrap_or_default();
    Ok(format!(
        "caPin:     {}\n\
         old:       {before}, trusted until {until}\n\n\
         Running servers take this over within seconds and agents with their next renewal; no session ends. Until {until}:\n\
         - agents that are still to enrol with a caPin in their configuration need the new one\n\
         - clients of frontends (kube-apiserver, scrapers) need new certificates and the new ca.crt: `proxy-server cert issue`\n\
         If the old key is in wrong hands, don't wait: `proxy-server ca retire --force`.",
        ca.pin()
    ))
}

/// `ca retire`
///
/// # Errors
/// There is nothing to retire, it is not time, somebody else changes it at that moment, or the authority can't be changed where it is kept.
pub fn ca_retire(args: &StateArgs, force: bool) -> anyhow::Result<String> {
    let (place, _grace) = Place::find(args)?;
    let ca = place.read()?;
    let Some(at) = ca.retires_at() else {
        anyhow::bail!("there is no older root: {} alone is trusted", ca.pin());
    };
    let is_time = ca.is_due(Clock::system().now());
    anyhow::ensure!(
        is_time || force,
        "leaves of the older root may be in use until {}: agents and clients that have nothing newer would have to enrol again; --force does it all the same",
        time(at.as_secs())
    );
    // What was looked at, and no root that a rotation has made old since.
    let ca = place.update(|found| {
        if *found == ca {
            Ok(found.retire())
        } else {
            Err(IssuerError::Changed)
        }
    })?;
    Ok(format!("{} alone is trusted", ca.pin()))
}

/// `cert issue`
///
/// # Errors
/// The authority or `out` can't be used, or `days` is out of range.
pub fn cert_issue(
    args: &StateArgs,
    client: &Name,
    days: u32,
    out: &Path,
) -> anyhow::Result<String> {
    let (place, _grace) = Place::find(args)?;
    if let Place::Dir(dir, domain) = &place {
        // The first thing that is done on a new server may be this.
        dir.load_or_create(domain, Clock::system().now())
            .with_context(|| format!("open the authority in {}", dir.path().display()))?;
    }
    let now = Clock::system().now();
    let life = Duration::from_secs(u64::from(days) * 86_400);
    let until = certs::UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()) + life);
    // Noted before it is given out: a rotation keeps the root for as long as that.
    let ca = place.update(|ca| Ok(ca.certifying_client_until(until)))?;
    let credential = ca.issuer(now)?.issue_client(client, days, now)?;
    certs::export_client(&credential, &place.bundle(&ca)?, out)
        .with_context(|| format!("write to {}", out.display()))?;
    let at = out.display();
    Ok(format!(
        "{at}/{client}.crt, {at}/{client}.key, {at}/ca.crt; expires {}",
        time(credential.not_after().as_secs())
    ))
}
