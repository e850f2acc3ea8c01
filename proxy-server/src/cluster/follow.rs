//! Follows a kind of objects for ever: list, watch, and begin anew after whatever goes wrong, with back-off. Told once.
//!
//! | failure | what happens |
//! | --- | --- |
//! | kube-apiserver can't be reached, 5xx, 429 | said once; the watch is resumed where it was, with back-off; after 8 in a row all is read anew |
//! | 410 Gone | all is read anew; nothing is dropped meanwhile |
//! | 401, 403 | said once; the credential and all objects are read anew, with back-off |
//! | nothing is heard, not even the renewal of a watch that was asked to last a minute | all is read anew after 150 s |

use std::convert::Infallible;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::{Stream, StreamExt as _};
use kube::Resource;
use kube::api::Api;
use kube::client::Client;
use kube::runtime::watcher::{self, Event, watcher};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, timeout_at};

use super::client::{PAGE, Source};
use super::pace::Pace;
use super::watch::{Failures, SILENCE, WATCH_SECONDS, begins_anew};

/// Follows.
#[derive(Debug)]
pub(super) struct Follower {
    source: Source,
    /// What is followed, for people.
    what: String,
    followed: Arc<Followed>,
}

/// Whether it is. A list alone does not tell: who may list may still not watch.
#[derive(Debug, Default)]
struct Followed {
    failing: AtomicBool,
    /// When a watch was last opened.
    at: Mutex<Option<Instant>>,
}

/// All objects.
pub(super) fn settings() -> watcher::Config {
    watcher::Config::default()
        .page_size(PAGE)
        .timeout(WATCH_SECONDS)
}

impl Follower {
    pub(super) fn new(source: &Source, what: impl Into<String>) -> Self {
        Self {
            source: source.clone(),
            what: what.into(),
            followed: Arc::default(),
        }
    }

    /// For ever; `take` is told of every event.
    #[expect(clippy::infinite_loop, reason = "ended by being dropped")]
    pub(super) async fn run<K>(
        self,
        api: impl Fn(Client) -> Api<K>,
        settings: watcher::Config,
        mut take: impl FnMut(Event<K>),
    ) -> Infallible
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    {
        let (mut failures, pace) = (Failures::default(), Pace::default());
        loop {
            match self.source.connect_following().await {
                Ok(client) => {
                    let (followed, what) = (Arc::clone(&self.followed), self.what.clone());
                    let client = pace.of(client, move || {
                        *followed.at.lock() = Some(Instant::now());
                        if followed.failing.swap(false, Ordering::Relaxed) {
                            tracing::info!(what, "followed again");
                        }
                    });
                    let events = watcher(api(client), settings.clone());
                    self.follow(events, &mut failures, &mut take).await;
                }
                Err(error) => self.fail(&mut failures, &daemon::chain(&error).to_string()),
            }
            sleep(failures.pause()).await;
        }
    }

    fn fail(&self, failures: &mut Failures, why: &str) {
        failures.add(*self.followed.at.lock());
        if self.followed.failing.swap(true, Ordering::Relaxed) {
            tracing::debug!(what = self.what, error = why, "not to be followed");
        } else {
            tracing::warn!(
                what = self.what,
                error = why,
                "not to be followed, what is known stays"
            );
        }
    }

    /// Lists and watches until that must begin anew.
    async fn follow<K>(
        &self,
        events: impl Stream<Item = watcher::Result<Event<K>>>,
        failures: &mut Failures,
        take: &mut impl FnMut(Event<K>),
    ) {
        let (mut events, began) = (pin!(events), Instant::now());
        loop {
            let heard = self.followed.at.lock().map_or(began, |at| at.max(began));
            match timeout_at(heard + SILENCE, events.next()).await {
                Ok(Some(Ok(event))) => take(event),
                Ok(Some(Err(error))) => {
                    self.fail(failures, &error.to_string());
                    if failures.is_many() || begins_anew(&error) {
                        return;
                    }
                    sleep(failures.pause()).await;
                }
                Ok(None) => return,
                // The watch was renewed meanwhile: nothing has changed.
                Err(_) if self.followed.at.lock().is_some_and(|at| at > heard) => {}
                Err(_) => {
                    self.fail(failures, "kube-apiserver says nothing");
                    return;
                }
            }
        }
    }
}

/// `NAMESPACE/NAME` of an object.
pub(super) fn key(object: &impl kube::ResourceExt) -> String {
    let namespace = object.namespace().unwrap_or_default();
    format!("{namespace}/{}", object.name_any())
}
