//! Notices that configuration or certificate files have changed.
//!
//! The *directories* are watched, not the files: Kubernetes mounts a volume as a chain of symbolic links and swaps one
//! of them (`..data`), editors write a new file and rename it. Since notifications can be lost or missing (network
//! file systems, exhausted inotify instances), the contents are compared at intervals too, and SIGHUP asks at once.
//!
//! Invariants: a change is what the *contents* say, so touching a file is none; at most one notification is queued.
//! It must not decide whether the new contents are good: the caller loads them, and keeps the old ones if they are not.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::Reload;
use crate::config::MAX_FILE_SIZE;

/// While events keep coming, they are waited out for so many times the quiet time and no longer: a log file beside
/// the configuration must not starve it.
const MAX_QUIET_WAITS: u32 = 10;

/// Times of a [`Watch`].
#[derive(Clone, Copy, Debug)]
pub struct WatchOptions {
    /// How often the contents are compared without a notification.
    pub poll: Duration,
    /// How long nothing must happen in the directories before the files are read, so that one rollout is one change.
    pub quiet: Duration,
}

impl Default for WatchOptions {
    fn default() -> Self {
        Self {
            poll: Duration::from_secs(10),
            quiet: Duration::from_millis(200),
        }
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A file has other contents, appeared or vanished.
    Contents,
    /// Somebody asked for a reload (SIGHUP), whatever the files say.
    Requested,
}

/// Watches a few small files.
#[derive(Debug)]
pub struct Watch {
    files: Vec<PathBuf>,
    seen: u64,
    options: WatchOptions,
    reload: Reload,
    next_poll: Instant,
    /// When to read the files after a notification, and when at the latest.
    due: Option<(Instant, Instant)>,
    notified: mpsc::Receiver<()>,
    notifier: Option<RecommendedWatcher>,
}

impl Watch {
    /// Watches `files` from their present contents on. If the directories cannot be watched, that is logged and
    /// polling goes on alone.
    pub fn new(
        files: impl IntoIterator<Item = PathBuf>,
        options: WatchOptions,
        reload: Reload,
    ) -> Self {
        // One place: a queued notification already says everything, so a full queue drops the new one.
        let (notify, notified) = mpsc::channel(1);
        let mut watch = Self {
            files: Vec::new(),
            seen: 0,
            options,
            reload,
            next_poll: Instant::now() + options.poll,
            due: None,
            notified,
            notifier: notifier(notify),
        };
        watch.replace(files);
        watch
    }

    /// Watches other files instead, from their present contents on: a new configuration may name other certificates.
    pub fn replace(&mut self, files: impl IntoIterator<Item = PathBuf>) {
        let old = directories(&self.files);
        self.files = files.into_iter().collect();
        let new = directories(&self.files);
        if let Some(notifier) = &mut self.notifier {
            for gone in old.difference(&new) {
                // A directory that no longer exists is not watched any more anyway.
                notifier.unwatch(gone).ok();
            }
            for added in new.difference(&old) {
                if let Err(error) = notifier.watch(added, RecursiveMode::NonRecursive) {
                    tracing::warn!(directory = %added.display(), %error, "changes are noticed by polling only");
                }
            }
        }
        self.seen = digest(&self.files);
    }

    /// Waits for the next change. Cancel-safe: a change that was not returned is returned by the next call.
    pub async fn changed(&mut self) -> Change {
        loop {
            let wake = self
                .due
                .map_or(self.next_poll, |(due, _)| due.min(self.next_poll));
            tokio::select! {
                biased;
                () = self.reload.requested() => {
                    self.due = None;
                    self.seen = digest(&self.files);
                    return Change::Requested;
                }
                Some(()) = self.notified.recv() => self.put_off(),
                () = sleep_until(wake) => {
                    if wake >= self.next_poll {
                        self.next_poll = Instant::now() + self.options.poll;
                    }
                    self.due = None;
                    let now = digest(&self.files);
                    if now != self.seen {
                        self.seen = now;
                        return Change::Contents;
                    }
                }
            }
        }
    }

    /// A notification came: read the files once it is quiet.
    fn put_off(&mut self) {
        let now = Instant::now();
        let latest = self.due.map_or_else(
            || now + self.options.quiet * MAX_QUIET_WAITS,
            |(_, latest)| latest,
        );
        self.due = Some(((now + self.options.quiet).min(latest), latest));
    }
}

fn notifier(notify: mpsc::Sender<()>) -> Option<RecommendedWatcher> {
    let created = notify::recommended_watcher(move |event: notify::Result<Event>| {
        // Reading the files is an event too; only what may have changed them counts. An error may hide a change.
        let matters = event.as_ref().map_or(true, |event| match event.kind {
            EventKind::Access(kind) => kind == AccessKind::Close(AccessMode::Write),
            EventKind::Any
            | EventKind::Create(_)
            | EventKind::Modify(_)
            | EventKind::Other
            | EventKind::Remove(_) => true,
        });
        if matters {
            // Full means that a notification waits already; closed means that nobody listens any more.
            notify.try_send(()).ok();
        }
    });
    created
        .map_err(|error| tracing::warn!(%error, "changes of files are noticed by polling only"))
        .ok()
}

fn directories(files: &[PathBuf]) -> BTreeSet<PathBuf> {
    let parents = files.iter().filter_map(|file| file.parent());
    parents
        .map(|parent| {
            if parent.as_os_str().is_empty() {
                Path::new(".")
            } else {
                parent
            }
        })
        .map(Path::to_owned)
        .collect()
}

/// A hash of what all files hold, and of which of them cannot be read. The files are few, small and local, so they
/// are read here and not on another thread.
fn digest(files: &[PathBuf]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for file in files {
        let mut contents = Vec::new();
        let read = std::fs::File::open(file)
            .and_then(|opened| opened.take(MAX_FILE_SIZE).read_to_end(&mut contents));
        read.is_ok().hash(&mut hasher);
        contents.hash(&mut hasher);
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use futures_util::poll;

    use super::*;

    /// Polling cannot be what notices within a test.
    const NOTIFIED: WatchOptions = WatchOptions {
        poll: Duration::from_secs(3600),
        quiet: Duration::from_millis(20),
    };

    fn write(path: &Path, contents: &str) {
        std::fs::write(path, contents).unwrap();
    }

    /// As the kubelet mounts a volume: `file` → `..data/file`, and `..data` → a directory of this revision.
    fn publish(mount: &Path, revision: &str, contents: &str) {
        std::fs::create_dir(mount.join(revision)).unwrap();
        write(&mount.join(revision).join("config.yaml"), contents);
        symlink(revision, mount.join("..data_tmp")).unwrap();
        std::fs::rename(mount.join("..data_tmp"), mount.join("..data")).unwrap();
    }

    #[tokio::test]
    async fn a_swapped_symlink_directory_is_a_change() {
        let mount = tempfile::tempdir().unwrap();
        publish(mount.path(), "..2026_01", "a");
        let file = mount.path().join("config.yaml");
        symlink("..data/config.yaml", &file).unwrap();
        let mut watch = Watch::new([file.clone()], NOTIFIED, Reload::never());
        publish(mount.path(), "..2026_02", "b");
        assert_eq!(watch.changed().await, Change::Contents);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "b");
        publish(mount.path(), "..2026_03", "c");
        assert_eq!(watch.changed().await, Change::Contents);
    }

    #[tokio::test]
    async fn a_rewritten_renamed_or_removed_file_is_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tls.crt");
        write(&file, "a");
        let mut watch = Watch::new([file.clone()], NOTIFIED, Reload::never());
        write(&file, "b");
        assert_eq!(watch.changed().await, Change::Contents);
        write(&dir.path().join("new"), "c");
        std::fs::rename(dir.path().join("new"), &file).unwrap();
        assert_eq!(watch.changed().await, Change::Contents);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(watch.changed().await, Change::Contents);
        write(&file, "d");
        assert_eq!(watch.changed().await, Change::Contents);
    }

    #[tokio::test(start_paused = true)]
    async fn polling_notices_what_no_notification_tells() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tls.crt");
        write(&file, "a");
        let mut watch = Watch::new([file.clone()], WatchOptions::default(), Reload::never());
        // Notifications go nowhere.
        watch.notified = mpsc::channel(1).1;
        write(&file, "b");
        let start = Instant::now();
        assert_eq!(watch.changed().await, Change::Contents);
        assert_eq!(
            start.elapsed().as_secs(),
            WatchOptions::default().poll.as_secs()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_is_only_touched_is_no_change() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tls.crt");
        write(&file, "a");
        let (trigger, reload) = Reload::manual();
        let mut watch = Watch::new([file.clone()], WatchOptions::default(), reload);
        write(&file, "a");
        let polled = tokio::time::timeout(Duration::from_secs(60), watch.changed()).await;
        assert!(polled.is_err(), "six polls have seen nothing");
        trigger.reload();
        assert_eq!(watch.changed().await, Change::Requested);
    }

    #[tokio::test]
    async fn a_request_is_a_change_whatever_the_files_say() {
        let (trigger, reload) = Reload::manual();
        let missing = PathBuf::from("/nonexistent/config.yaml");
        let mut watch = Watch::new([missing], WatchOptions::default(), reload);
        assert!(poll!(std::pin::pin!(watch.changed())).is_pending());
        trigger.reload();
        assert_eq!(watch.changed().await, Change::Requested);
    }

    #[tokio::test]
    async fn other_files_can_be_watched_instead() {
        let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = new.path().join("tls.crt");
        let mut watch = Watch::new([old.path().join("tls.crt")], NOTIFIED, Reload::never());
        watch.replace([file.clone()]);
        write(&file, "a");
        assert_eq!(watch.changed().await, Change::Contents);
    }
}
