//! The authority before anything else can start, where it is kept in the cluster.
//!
//! A server that has a copy starts with it while kube-apiserver is away. One that has none waits, with livez and readyz up
//! and not ready: it has nothing to show to anybody yet. A copy that can't be read counts as none. An
//! authority of this directory's own that can't be read stops the start: its key may be the only one there is.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use certs::{Ca, CaDir, Clock};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::http::Ground;
use crate::authority;
use crate::cluster::{Questions, Source, Vault};
use crate::config::Config;

/// Longest pause between two attempts.
const MOST_PAUSE: Duration = Duration::from_secs(10);
const LEAST_PAUSE: Duration = Duration::from_millis(100);

/// Where the authority is kept in the cluster, if it is.
pub(crate) fn vault(config: &Config, questions: Option<&Arc<Questions>>) -> Option<Vault> {
    let kubernetes = config.kubernetes.as_ref()?;
    let settings = kubernetes.authority.clone()?;
    let source = Source::new(kubernetes);
    let namespace = source.namespace_for(kubernetes);
    let questions = questions.map_or_else(|| Questions::new(source), Arc::clone);
    let trust_domain = config.trust_domain.clone();
    Some(Vault::new(questions, namespace, settings, trust_domain))
}

/// Waits for the authority. `None` if the server was told to stop meanwhile.
pub(super) async fn obtain(
    config: &Config,
    vault: &Vault,
    ground: &mut Ground,
    shutdown: &CancellationToken,
) -> anyhow::Result<Option<Ca>> {
    let dir = authority::dir(config);
    let cached = match dir.load(&config.trust_domain) {
        Ok(cached) => cached,
        Err(error) if dir.is_copy() => {
            tracing::warn!(dir = %dir.path().display(), error = %daemon::chain(&error), "the copy of the authority can't be read and is not used");
            None
        }
        Err(error) => {
            let what = format!("open the authority in {}", dir.path().display());
            return Err(error).context(what);
        }
    };
    let (mut pause, mut waiting) = (LEAST_PAUSE, None);
    loop {
        let now = Clock::system().now();
        let error = tokio::select! {
            () = shutdown.cancelled() => return Ok(None),
            obtained = vault.obtain(cached.as_ref(), now) => match obtained {
                Ok(ca) => {
                    keep(&dir, vault, cached.as_ref(), &ca).await?;
                    return Ok(Some(ca));
                }
                Err(error) => error,
            },
        };
        let error = daemon::chain(&error).to_string();
        if let Some(cached) = cached {
            tracing::warn!(
                error,
                "the authority's Secret can't be read, the copy of it is used"
            );
            return Ok(Some(cached));
        }
        if waiting.as_ref() != Some(&error) {
            tracing::warn!(
                error,
                "waiting for the authority: without it nobody can be served"
            );
        }
        waiting = Some(error);
        ground.serve_observe();
        tokio::select! {
            () = shutdown.cancelled() => return Ok(None),
            () = sleep(pause.mul_f64(0.5 + 0.5 * rand::random::<f64>())) => {}
        }
        pause = (pause * 2).min(MOST_PAUSE).min(vault.refresh());
    }
}

/// Keeps a copy, marked as one: what was an authority of its own is changed here no longer. What is there and is another authority is moved aside: its key may be the only one there is.
async fn keep(dir: &CaDir, vault: &Vault, cached: Option<&Ca>, ca: &Ca) -> anyhow::Result<()> {
    if let Some(cached) = cached
        && !ca.follows(cached.pin())
    {
        let pin = cached.pin().to_string();
        let mark: String = pin.chars().skip("sha256:".len()).take(8).collect();
        let aside = dir
            .set_aside(&mark)
            .context("move another authority aside")?;
        tracing::warn!(pin, aside = %aside.display(), adopted = %ca.pin(), "the state directory had another authority than the Secret; it is kept aside and not used");
    }
    let origin = vault.origin();
    let (dir, ca) = (dir.clone(), ca.clone());
    let kept = tokio::task::spawn_blocking(move || dir.save_copy(&ca, &origin)).await;
    if let Ok(Err(error)) = kept {
        tracing::warn!(error = %daemon::chain(&error), "the authority is not kept in the state directory; it is at work all the same");
    }
    Ok(())
}
