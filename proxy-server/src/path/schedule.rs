//! When which node on a line is looked at. Pure: the time in, whom to dial now or when to come again out.
//!
//! New ones are spread over the interval, each comes again after its pause, a fifth more or less, and never more than so
//! many a second are dialled: where there are more, the interval grows. Those of which something is to be found out, a verdict
//! that is under way or a request that did without the line, take turns with the others, however many of these wait.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use super::policy::Bypass;

/// A node on a line.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) line: String,
    pub(crate) node: String,
}

impl Key {
    pub(crate) fn new(bypass: &Bypass, node: &str) -> Self {
        Self {
            line: bypass.line.name.clone(),
            node: node.to_owned(),
        }
    }
}

/// When somebody is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Due {
    at: Instant,
    is_urgent: bool,
}

/// What is to be dialled.
#[derive(Debug)]
pub(crate) struct Schedule {
    /// When each is due; `None` while it is being dialled.
    due: HashMap<Key, Option<Due>>,
    queue: BTreeSet<(Instant, Key)>,
    /// Those of which something is to be found out now.
    urgent: BTreeSet<(Instant, Key)>,
    /// The last one that was dialled was of these.
    was_urgent: bool,
    /// Between two dials.
    gap: Duration,
    /// No dial before this.
    free: Instant,
}

impl Schedule {
    pub(crate) fn new(now: Instant, per_second: u32) -> Self {
        Self {
            due: HashMap::new(),
            queue: BTreeSet::new(),
            urgent: BTreeSet::new(),
            was_urgent: false,
            gap: Duration::from_secs(1) / per_second.max(1),
            free: now,
        }
    }

    /// These and no others. `random` is of 0 to 1.
    pub(crate) fn keep(
        &mut self,
        now: Instant,
        keys: impl Iterator<Item = Key>,
        interval: Duration,
        mut random: impl FnMut() -> f64,
    ) {
        let mut old = std::mem::take(&mut self.due);
        self.queue.clear();
        self.urgent.clear();
        for key in keys {
            let due = old.remove(&key).unwrap_or_else(|| {
                Some(Due {
                    at: now + interval.mul_f64(random()),
                    is_urgent: false,
                })
            });
            match due {
                Some(due) => self.put(key, due),
                None => drop(self.due.insert(key, None)),
            }
        }
    }

    fn put(&mut self, key: Key, due: Due) {
        self.queue_of(due).insert((due.at, key.clone()));
        self.due.insert(key, Some(due));
    }

    const fn queue_of(&mut self, due: Due) -> &mut BTreeSet<(Instant, Key)> {
        if due.is_urgent {
            &mut self.urgent
        } else {
            &mut self.queue
        }
    }

    /// That one at once, unless it is being dialled.
    pub(crate) fn hasten(&mut self, now: Instant, key: &Key) {
        if let Some(Some(due)) = self.due.get(key).copied()
            && !(due.is_urgent && due.at <= now)
        {
            self.queue_of(due).remove(&(due.at, key.clone()));
            let due = Due {
                at: now,
                is_urgent: true,
            };
            self.put(key.clone(), due);
        }
    }

    /// Some others on the same line at once: what becomes of them tells whether it is the line.
    pub(crate) fn hasten_others(&mut self, now: Instant, key: &Key, most: usize) {
        let others = self.due.keys();
        let others = others.filter(|other| other.line == key.line && *other != key);
        let others: Vec<_> = others.take(most).cloned().collect();
        for other in others {
            self.hasten(now, &other);
        }
    }

    /// Whom to dial now, or when there will be somebody.
    ///
    /// # Errors
    /// Nobody yet; `None` if there is nobody at all.
    pub(crate) fn next(&mut self, now: Instant) -> Result<Key, Option<Instant>> {
        let at = |queue: &BTreeSet<(Instant, Key)>| queue.first().map(|(at, _)| *at);
        let (usual, urgent) = (at(&self.queue), at(&self.urgent));
        let soonest = usual.into_iter().chain(urgent).min().ok_or(None)?;
        let soonest = soonest.max(self.free);
        if soonest > now {
            return Err(Some(soonest));
        }
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        // Turn by turn, so that what is urgent on one line does not hide the others.
        self.was_urgent = is_due(urgent) && !(self.was_urgent && is_due(usual));
        let queue = if self.was_urgent {
            &mut self.urgent
        } else {
            &mut self.queue
        };
        let (_, key) = queue.pop_first().ok_or(None)?;
        self.due.insert(key.clone(), None);
        self.free = now + self.gap;
        Ok(key)
    }

    /// It was dialled, and is again after that pause.
    pub(crate) fn done(
        &mut self,
        now: Instant,
        key: Key,
        pause: Duration,
        is_urgent: bool,
        random: f64,
    ) {
        if self.due.contains_key(&key) {
            let at = now + pause.mul_f64(0.8 + 0.4 * random);
            self.put(key, Due { at, is_urgent });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(i: u32) -> Key {
        Key {
            line: "l".into(),
            node: format!("n{i}"),
        }
    }

    const INTERVAL: Duration = Duration::from_secs(10);

    /// When each is dialled within that time, if each dial takes no time.
    fn run(schedule: &mut Schedule, start: Instant, span: Duration) -> Vec<(Duration, Key)> {
        let mut dials = Vec::new();
        let (mut now, mut random) = (start, 0.0_f64);
        while now < start + span {
            match schedule.next(now) {
                Ok(key) => {
                    random = (random + 0.618).fract();
                    dials.push((now.duration_since(start), key.clone()));
                    schedule.done(now, key, INTERVAL, false, random);
                }
                Err(Some(at)) => now = at,
                Err(None) => break,
            }
        }
        dials
    }

    fn scheduled(start: Instant, count: u32, per_second: u32) -> Schedule {
        let mut schedule = Schedule::new(start, per_second);
        let mut random = 0.0_f64;
        schedule.keep(start, (0..count).map(key), INTERVAL, || {
            random = (random + 0.618).fract();
            random
        });
        schedule
    }

    #[test]
    fn they_are_spread_over_the_interval_and_each_comes_again() {
        let start = Instant::now();
        let mut schedule = scheduled(start, 100, 1000);
        let dials = run(&mut schedule, start, Duration::from_secs(100));
        for i in 0..100 {
            let own: Vec<_> = dials.iter().filter(|(_, it)| *it == key(i)).collect();
            assert!((8..=12).contains(&own.len()), "{} of {i}", own.len());
        }
        for second in 0..10 {
            let within = dials.iter().filter(|(at, _)| at.as_secs() == second);
            assert!((5..=15).contains(&within.count()), "second {second}");
        }
    }

    #[test]
    fn never_more_than_so_many_a_second_and_none_is_forgotten() {
        let start = Instant::now();
        let mut schedule = scheduled(start, 1000, 20);
        for i in 0..1000 {
            schedule.hasten(start, &key(i));
        }
        let dials = run(&mut schedule, start, Duration::from_secs(120));
        for second in 0..120 {
            let within = dials.iter().filter(|(at, _)| at.as_secs() == second);
            assert!(within.count() <= 20, "second {second}");
        }
        let mut nodes: Vec<_> = dials.iter().map(|(_, key)| key).collect();
        nodes.sort();
        nodes.dedup();
        assert_eq!(nodes.len(), 1000);
    }

    #[test]
    fn who_is_hastened_goes_first_and_who_is_gone_is_not_dialled() {
        let start = Instant::now();
        let mut schedule = Schedule::new(start, 100);
        schedule.keep(start, (0..3).map(key), INTERVAL, || 1.0);
        assert_eq!(schedule.next(start), Err(Some(start + INTERVAL)));
        schedule.hasten(start, &key(1));
        assert_eq!(schedule.next(start), Ok(key(1)));
        // It is being dialled: once is enough.
        schedule.hasten(start, &key(1));
        let gap = Duration::from_millis(10);
        assert_eq!(schedule.next(start + gap), Err(Some(start + INTERVAL)));
        schedule.hasten_others(start + gap, &key(1), 8);
        assert!(schedule.next(start + gap).is_ok() && schedule.next(start + gap * 2).is_ok());
        // Gone meanwhile, and kept while it was dialled.
        schedule.keep(start, [key(1)].into_iter(), INTERVAL, || 1.0);
        schedule.done(start, key(0), INTERVAL, false, 0.5);
        assert_eq!(schedule.next(start + gap * 3), Err(None));
        schedule.done(start, key(1), INTERVAL, false, 0.5);
        assert_eq!(schedule.next(start + gap * 3), Err(Some(start + INTERVAL)));
    }

    #[test]
    fn who_is_hastened_does_not_wait_for_all_that_are_overdue_and_they_not_for_him() {
        let start = Instant::now();
        // For three times as many as can be looked at.
        let mut schedule = scheduled(start, 3000, 100);
        let late = start + INTERVAL * 2;
        let dials = run(&mut schedule, start, INTERVAL * 2);
        assert!(dials.len() >= 1990, "{}", dials.len());
        let waiting = |schedule: &Schedule| {
            let due = schedule
                .due
                .iter()
                .filter_map(|(key, due)| Some((key, (*due)?)));
            let late = due.filter(|(_, due)| due.at < late && !due.is_urgent);
            late.map(|(key, _)| key.clone()).max()
        };
        let last = waiting(&schedule).unwrap();
        schedule.hasten(late, &last);
        let soon = run(&mut schedule, late, Duration::from_millis(20));
        assert!(soon.iter().any(|(_, key)| *key == last), "{soon:?}");
        // It is looked at again and again, and every other dial is one of those that wait.
        let mut now = late + Duration::from_millis(20);
        let mut others = 0;
        schedule.hasten(now, &last);
        for _ in 0..100 {
            let key = schedule.next(now).unwrap();
            others += usize::from(key != last);
            let is_last = key == last;
            schedule.done(now, key, Duration::ZERO, is_last, 0.5);
            now += Duration::from_millis(10);
        }
        assert!((49..=51).contains(&others), "{others}");
    }
}
