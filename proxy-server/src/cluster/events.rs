//! Events on Nodes whose path has changed, for `kubectl describe node` and `kubectl get events`.
//!
//! Each server looks for itself, and tells what it has seen under its own name. A line that is lost may lead hundreds of
//! nodes another way at once: they are told of one after the other, [`BURST`] at once and then [`PER_SECOND`] a second, each
//! with the way it has when its turn comes. What repeats within minutes is one Event that counts, by kube's recorder.
//!
//! | failure (metric label) | what happens |
//! | --- | --- |
//! | `refused`: 401, 403, what kube-apiserver does not like of it | that change is not told; said in the log once until one is taken again |
//! | `unavailable`: no answer in time, 429, 5xx, can't be reached | the node waits again, behind the others, and all of them for some seconds; then a new client is tried |
//! | `missing`: the Event that would count has gone meanwhile | another one is made |
//! | `conflict`: there is one of that name | as `refused` |
//!
//! No request ever waits for this: a change lies with its node until it is taken from there, and no node has more than one.

use std::convert::Infallible;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::time::{Instant, sleep, sleep_until};

use super::ask::{AskError, Asker, within};
use super::client::Source;
use crate::metrics::{EventMetrics, WriteLabels};
use crate::path::health::Down;
use crate::path::used::{Change, Kind, Use};
use crate::serve::Forwarder;

/// Who tells, as Kubernetes wants a name of it.
const CONTROLLER: &str = "corvid.io/proxy-server";
/// So many at once,
const BURST: u32 = 25;
/// and so many a second.
const PER_SECOND: u32 = 5;
/// For one of them.
const LIMIT: Duration = Duration::from_secs(10);
/// How long nobody is told where kube-apiserver is away.
const AWAY: Duration = Duration::from_secs(5);
/// Longest note (Kubernetes).
const MOST_NOTE: usize = 1024;

/// Tells of changes.
pub(crate) struct Events {
    forwarder: Arc<Forwarder>,
    server: String,
    asker: Asker,
    recorder: Option<Recorder>,
    metrics: EventMetrics,
    /// It is known that they are not taken.
    is_failing: bool,
}

impl Events {
    pub(crate) fn new(
        server: &str,
        forwarder: &Arc<Forwarder>,
        source: &Source,
        metrics: &daemon::Metrics,
    ) -> Self {
        let of_events = EventMetrics::default();
        metrics.register(|registry| of_events.register(registry));
        Self {
            forwarder: Arc::clone(forwarder),
            server: server.to_owned(),
            asker: Asker::new(source.clone()),
            recorder: None,
            metrics: of_events,
            is_failing: false,
        }
    }

    /// For as long as it lives.
    #[expect(clippy::infinite_loop, reason = "ended by being dropped")]
    pub(crate) async fn run(mut self) -> Infallible {
        let forwarder = Arc::clone(&self.forwarder);
        let mut turn = Turn::new(Instant::now());
        loop {
            sleep_until(turn.next(Instant::now())).await;
            let change = forwarder.paths.turned().await;
            let Some(uid) = self.uid(&change.node) else {
                continue; // a node of the configuration alone
            };
            turn.taken(Instant::now());
            let told = self.tell(&change, uid).await;
            let is_away = told.as_ref().is_err_and(AskError::is_of_the_moment);
            self.note(&change.node, told);
            if is_away {
                forwarder.paths.untold(change);
                sleep(AWAY).await;
            }
        }
    }

    fn uid(&self, node: &str) -> Option<String> {
        let table = self.forwarder.routing.cluster.table();
        Some(table.nodes().get(node)?.uid.clone())
    }

    async fn tell(&mut self, change: &Change, uid: String) -> Result<(), AskError> {
        let (event, node) = (
            event(change, &self.server),
            ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Node".to_owned()),
                name: Some(change.node.clone()),
                uid: Some(uid),
                ..ObjectReference::default()
            },
        );
        let told = self.publish(&event, &node).await;
        if matches!(told, Err(AskError::Missing(_))) {
            // It counts in one that somebody has deleted.
            self.recorder = None;
            return self.publish(&event, &node).await;
        }
        told
    }

    async fn publish(&mut self, event: &Event, node: &ObjectReference) -> Result<(), AskError> {
        let recorder = match &self.recorder {
            Some(recorder) => recorder.clone(),
            None => {
                let client = self.asker.client().await?;
                let reporter = Reporter {
                    controller: CONTROLLER.to_owned(),
                    instance: Some(self.server.clone()),
                };
                let recorder = Recorder::new(client, reporter);
                self.recorder.insert(recorder).clone()
            }
        };
        within(LIMIT, None, recorder.publish(event, node)).await
    }

    /// Told once until one is taken again.
    fn note(&mut self, node: &str, told: Result<(), AskError>) {
        let result = told.as_ref().map_or_else(AskError::label, |()| "ok");
        let labels = WriteLabels { result };
        self.metrics.told.get_or_create(&labels).inc();
        let was_failing = std::mem::replace(&mut self.is_failing, told.is_err());
        match told {
            Ok(()) if was_failing => tracing::info!(node, "Events are taken again"),
            Ok(()) => {}
            Err(error) => {
                self.asker.failed(&error);
                if !matches!(error, AskError::Missing(_) | AskError::Conflict) {
                    self.recorder = None;
                }
                let error = daemon::chain(&error).to_string();
                if was_failing {
                    tracing::debug!(node, error, "an Event was not taken");
                } else {
                    tracing::warn!(
                        node,
                        error,
                        "Events on Nodes whose path changes are not taken; everything else goes on"
                    );
                }
            }
        }
    }
}

/// When the next may be told of: a bucket of [`BURST`] that fills by [`PER_SECOND`].
#[derive(Debug)]
struct Turn {
    /// When the bucket is full.
    full: Instant,
}

impl Turn {
    const GAP: Duration = Duration::from_millis(1000 / PER_SECOND as u64);

    const fn new(now: Instant) -> Self {
        Self { full: now }
    }

    fn next(&self, now: Instant) -> Instant {
        let ahead = Self::GAP * (BURST - 1);
        self.full.checked_sub(ahead).map_or(now, |at| at.max(now))
    }

    fn taken(&mut self, now: Instant) {
        self.full = self.full.max(now) + Self::GAP;
    }
}

/// The Event of a change.
fn event(change: &Change, server: &str) -> Event {
    let (type_, reason) = match change.kind() {
        Kind::LineDown => (EventType::Warning, "LineDown"),
        Kind::LineUp => (EventType::Normal, "LineUp"),
        Kind::Decided => (EventType::Normal, "PathChanged"),
    };
    let fallen = |line: &str, down: Down| match down {
        Down::Line => format!("line {line} is down"),
        Down::Node => format!("the node is down on line {line}"),
        Down::LedBack => format!("what is dialled by line {line} comes back to that server"),
    };
    let (action, do_so) = match &change.to {
        Use::Tunnel => ("UseTunnel", "go through the tunnel".to_owned()),
        Use::Line(line) => ("UseLine", format!("go by line {line}")),
        Use::Alone(line, down) => (
            "UseLine",
            format!(
                "go by line {line} and nothing else, although {}",
                fallen(line, *down)
            ),
        ),
        Use::Instead(line, down) => (
            "UseTunnel",
            format!("go through the tunnel, as {}", fallen(line, *down)),
        ),
        Use::Nothing => ("Refuse", "are refused".to_owned()),
    };
    let mut note = format!("requests to this node by proxy-server {server} {do_so}");
    if change.kind() == Kind::Decided {
        note.push_str("; ");
        note.push_str(&change.why);
    }
    note.truncate(note.floor_char_boundary(MOST_NOTE));
    Event {
        type_,
        reason: reason.to_owned(),
        // What differs in nothing but its note counts as one, with the note of the first: so the note is told apart here.
        action: format!("{action}-{:x}", digest(&note)),
        note: Some(note),
        secondary: None,
    }
}

/// Of use within this process alone.
fn digest(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_says_who_saw_what_and_fits_whatever_is_said() {
        let line = || "express".to_owned();
        let (up, alone) = (Use::Line(line()), Use::Alone(line(), Down::Line));
        let instead = |down| Use::Instead(line(), down);
        let change = |from: &Use, to: &Use, why: &str| {
            let (node, from, to) = ("edge1".to_owned(), from.clone(), to.clone());
            let why = why.to_owned();
            event(
                &Change {
                    node,
                    from,
                    to,
                    why,
                },
                "cloud-1",
            )
        };
        let by = "requests to this node by proxy-server cloud-1 ";
        for (from, to, type_, reason, note) in [
            (
                &up,
                &instead(Down::Line),
                EventType::Warning,
                "LineDown",
                "go through the tunnel, as line express is down",
            ),
            (
                &up,
                &instead(Down::Node),
                EventType::Warning,
                "LineDown",
                "go through the tunnel, as the node is down on line express",
            ),
            (
                &up,
                &alone,
                EventType::Warning,
                "LineDown",
                "go by line express and nothing else, although line express is down",
            ),
            (
                &instead(Down::Node),
                &up,
                EventType::Normal,
                "LineUp",
                "go by line express",
            ),
            (
                &up,
                &Use::Tunnel,
                EventType::Normal,
                "PathChanged",
                "go through the tunnel; the rule",
            ),
            (
                &up,
                &Use::Nothing,
                EventType::Normal,
                "PathChanged",
                "are refused; the rule",
            ),
        ] {
            let told = change(from, to, "the rule");
            assert_eq!(told.note.unwrap(), format!("{by}{note}"));
            assert_eq!((told.type_, told.reason.as_str()), (type_, reason));
        }
        let long = change(&up, &Use::Nothing, &"é".repeat(MOST_NOTE));
        assert!((MOST_NOTE - 1..=MOST_NOTE).contains(&long.note.unwrap().len()));
        // As Kubernetes counts what differs in its note alone as one.
        let action = |why| change(&up, &Use::Tunnel, why).action;
        assert_eq!(action("a"), action("a"));
        assert_ne!(action("a"), action("b"));
        assert!(action("a").len() <= 128);
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_at_once_are_told_of_in_their_turn() {
        let start = Instant::now();
        let (mut now, mut turn, mut at_once) = (start, Turn::new(start), 0);
        for _ in 0..1000 {
            let next = turn.next(now);
            at_once += u32::from(next == start);
            now = next;
            turn.taken(now);
        }
        assert_eq!(at_once, BURST);
        let rest = now.duration_since(start).as_secs();
        assert!((190..=200).contains(&rest), "{rest} s");
        // After a pause as many again.
        now += Duration::from_secs(60);
        for _ in 0..BURST {
            assert_eq!(turn.next(now), now);
            turn.taken(now);
        }
        assert!(turn.next(now) > now);
    }
}
