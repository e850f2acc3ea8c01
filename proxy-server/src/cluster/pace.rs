//! How often a watch is opened. kube's watcher opens the next one as soon as one has ended, without a pause and without
//! a word; a server that ends each of them at once, and well, would be asked as fast as it can answer.
//!
//! | the last watch | the next one |
//! | --- | --- |
//! | lasted [`SHORT`] or longer, as a healthy one does | at once |
//! | ended sooner | after a pause that doubles up to [`MOST_PAUSE`], and is random in its upper half |
//! | could not be opened | at once: whoever follows the nodes pauses after failures by itself |

use std::sync::Arc;
use std::time::Duration;

use http::Request;
use kube::client::{Body, Client};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use super::watch::{LEAST_PAUSE, MOST_PAUSE};

/// A watch that ends sooner ends early. One is asked to last a minute.
const SHORT: Duration = Duration::from_secs(5);

/// The watches of one follower, however often its client is made anew. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Pace(Arc<Mutex<Opened>>);

/// What was opened until now.
#[derive(Debug, Default)]
struct Opened {
    /// The last one, if it was opened at all.
    at: Option<Instant>,
    /// Those that ended early, in a row.
    early: u32,
}

impl Opened {
    /// For how long another one is not to be opened; `random` is within 0 and 1.
    fn pause(&mut self, now: Instant, random: f64) -> Duration {
        let Some(at) = self.at.take() else {
            return Duration::ZERO;
        };
        if now.saturating_duration_since(at) >= SHORT {
            self.early = 0;
            return Duration::ZERO;
        }
        self.early = self.early.saturating_add(1);
        let ceiling = LEAST_PAUSE
            .saturating_mul(1 << self.early.min(10))
            .min(MOST_PAUSE);
        ceiling.mul_f64(f64::midpoint(1.0, random))
    }
}

impl Pace {
    /// The client, with watches at this pace; `opened` hears of each.
    pub(super) fn of(
        &self,
        client: Client,
        opened: impl Fn() + Clone + Send + Sync + 'static,
    ) -> Client {
        let (pace, namespace) = (self.clone(), client.default_namespace().to_owned());
        let service = tower::service_fn(move |request: Request<Body>| {
            let (pace, client, opened) = (pace.clone(), client.clone(), opened.clone());
            async move {
                if !is_watch(&request) {
                    return client.send(request).await;
                }
                let pause = pace.0.lock().pause(Instant::now(), rand::random());
                if !pause.is_zero() {
                    tracing::debug!(?pause, "kube-apiserver ends watches early");
                    sleep(pause).await;
                }
                let response = client.send(request).await?;
                if response.status().is_success() {
                    pace.0.lock().at = Some(Instant::now());
                    opened();
                }
                Ok(response)
            }
        });
        Client::new(service, namespace)
    }
}

/// Whether it asks for a watch.
pub(super) fn is_watch<B>(request: &Request<B>) -> bool {
    let query = request.uri().query().unwrap_or_default();
    query.split('&').any(|pair| pair == "watch=true")
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bytes::Bytes;
    use futures_util::stream;
    use http::Response;
    use http_body_util::combinators::UnsyncBoxBody;
    use http_body_util::{BodyExt, Empty, Full, StreamBody};
    use hyper::body::Frame;
    use serde_json::json;
    use tokio::time::timeout;

    use super::super::Cluster;
    use super::super::client::Source;
    use super::super::watch::{Failures, Watch};
    use super::*;
    use crate::config::Kubernetes;

    /// How the server's watches go.
    #[derive(Debug, Clone, Copy)]
    enum Ends {
        /// With the time that they are asked to last.
        InTime,
        AtOnce,
        /// With the word that all has to be read anew.
        Gone,
        /// They are not opened, with this code.
        Refused(u16),
    }

    /// When a follower asked a server for so long; lists and watches.
    async fn asked(ends: Ends, long: Duration) -> (Vec<Instant>, Vec<Instant>) {
        let seen = Arc::new(Mutex::new((Vec::new(), Vec::new())));
        let cluster = Arc::new(Cluster::default());
        let (log, heard) = (Arc::clone(&seen), Arc::clone(&cluster));
        let server = tower::service_fn(move |request: Request<Body>| {
            let answer = answer(ends, &request, &mut log.lock());
            if answer.status().is_success() {
                heard.answered();
            }
            async move { Ok::<_, Infallible>(answer) }
        });
        let watch = Watch {
            cluster: Arc::clone(&cluster),
            source: Source::InCluster,
            settings: Kubernetes::default(),
        };
        let pace = Pace::default();
        let follow = async {
            let mut failures = Failures::default();
            loop {
                let followed = Arc::clone(&cluster);
                let client = Client::new(server.clone(), "default");
                let client = pace.of(client, move || followed.followed());
                watch.follow(client, &mut failures).await;
                sleep(failures.pause()).await;
            }
        };
        timeout(long, follow).await.unwrap_err();
        let seen = seen.lock();
        (seen.0.clone(), seen.1.clone())
    }

    fn answer(
        ends: Ends,
        request: &Request<Body>,
        seen: &mut (Vec<Instant>, Vec<Instant>),
    ) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
        let whole =
            |text: String| Response::new(Full::new(Bytes::from(text + "\n")).boxed_unsync());
        let now = Instant::now();
        if !is_watch(request) {
            seen.0.push(now);
            let list = json!({"kind": "NodeList", "apiVersion": "v1", "metadata": {"resourceVersion": "7"}, "items": []});
            return whole(list.to_string());
        }
        seen.1.push(now);
        // Without a pause time stands still.
        assert!(seen.1.len() < 10_000, "asked without a pause");
        let status = |code: u16| json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "no", "reason": "Expired", "code": code});
        match ends {
            Ends::InTime => {
                let query = request.uri().query().unwrap_or_default();
                assert!(query.contains("timeoutSeconds=60"), "{query}");
                let after_all = async {
                    sleep(Duration::from_secs(60)).await;
                    Ok(Frame::data(Bytes::new()))
                };
                Response::new(StreamBody::new(stream::once(after_all)).boxed_unsync())
            }
            Ends::AtOnce => Response::new(Empty::new().boxed_unsync()),
            Ends::Gone => whole(json!({"type": "ERROR", "object": status(410)}).to_string()),
            Ends::Refused(code) => {
                let mut response = whole(status(code).to_string());
                *response.status_mut() = code.try_into().unwrap();
                response
            }
        }
    }

    fn gaps(at: &[Instant]) -> Vec<Duration> {
        at.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn a_healthy_watch_is_renewed_at_once() {
        let (lists, watches) = asked(Ends::InTime, HOUR).await;
        assert_eq!((lists.len(), watches.len()), (1, 60));
        let renewal = Duration::from_secs(60)..Duration::from_millis(60_010);
        assert!(gaps(&watches).iter().all(|gap| renewal.contains(gap)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_ends_each_watch_at_once_is_asked_at_a_bounded_rate() {
        for ends in [Ends::AtOnce, Ends::Gone] {
            let (_lists, watches) = asked(ends, HOUR).await;
            let gaps = gaps(&watches);
            let least = |n: usize| (LEAST_PAUSE * (1 << n.min(10))).min(MOST_PAUSE / 2);
            for (n, gap) in gaps.iter().enumerate() {
                assert!(*gap >= least(n), "{ends:?} {n}: {gap:?}");
                assert!(*gap <= MOST_PAUSE + SHORT, "{ends:?} {n}: {gap:?}");
            }
            let most = HOUR.as_secs() / (MOST_PAUSE / 2).as_secs() + 6;
            assert!(watches.len() as u64 <= most, "{ends:?}: {}", watches.len());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_refused_is_paused_for_once_and_not_twice() {
        let (_lists, watches) = asked(Ends::Refused(503), HOUR).await;
        assert!(gaps(&watches).iter().all(|gap| *gap <= MOST_PAUSE * 3));
        assert!(watches.len() > 300, "{}", watches.len());
    }

    #[tokio::test(start_paused = true)]
    async fn who_may_list_and_not_watch_asks_at_a_bounded_rate() {
        let (lists, watches) = asked(Ends::Refused(403), HOUR).await;
        assert!(lists.len() < 1_500, "{}", lists.len());
        assert!(watches.len() > 300, "{}", watches.len());
    }

    #[test]
    fn one_watch_that_lasts_ends_the_row() {
        let (mut opened, now) = (Opened::default(), Instant::now());
        assert_eq!(opened.pause(now, 1.0), Duration::ZERO, "the first");
        let pauses = [1, 2, 3].map(|_| {
            opened.at = Some(now);
            opened.pause(now + SHORT / 2, 1.0)
        });
        assert_eq!(pauses, [2, 4, 8].map(|n| LEAST_PAUSE * n));
        assert_eq!(opened.pause(now, 1.0), Duration::ZERO, "it was not opened");
        opened.at = Some(now);
        assert_eq!(opened.pause(now, 0.0), LEAST_PAUSE * 8, "the row goes on");
        opened.at = Some(now);
        assert_eq!(opened.pause(now + SHORT, 1.0), Duration::ZERO);
        opened.at = Some(now);
        assert_eq!(opened.pause(now, 1.0), LEAST_PAUSE * 2);
        opened.early = u32::MAX;
        opened.at = Some(now);
        assert_eq!(opened.pause(now, 1.0), MOST_PAUSE);
    }

    #[test]
    fn only_watches_are_paced() {
        let request = |uri: &str| Request::get(uri).body(Body::empty()).unwrap();
        assert!(is_watch(&request(
            "/api/v1/nodes?&watch=true&timeoutSeconds=60"
        )));
        assert!(!is_watch(&request("/api/v1/nodes?&limit=500")));
        assert!(!is_watch(&request("/api/v1/nodes")));
    }
}
