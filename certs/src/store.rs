//! Files that are whole or absent: written beside their place, synced, renamed, and the directory synced.
//!
//! A full disk, a crash or a second writer leaves the old file as it was. Nothing else in this crate
//! writes a file.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Mode of what is secret.
pub const MODE_SECRET: u32 = 0o600;
/// Mode of what anyone may read.
pub const MODE_PUBLIC: u32 = 0o644;

/// A file could not be read, written or locked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Reading failed.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Writing failed; the file is as it was before.
    #[error("write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The lock that keeps two processes apart could not be had.
    #[error("lock {}", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Replaces `path` by `bytes` as a whole, with permission bits `mode`.
///
/// # Errors
/// The directory can't be written, the disk is full; the old file is then untouched.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StoreError> {
    let replaced = replace(path, bytes, mode, Durability::Synced);
    replaced.map_err(|source| StoreError::Write {
        path: path.to_owned(),
        source,
    })
}

/// As [`write_atomic`], without waiting for the disk: after a crash the file may be the old one or empty.
/// For what may be lost, and is written where nothing may block for long.
pub(crate) fn write_unsynced(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StoreError> {
    let replaced = replace(path, bytes, mode, Durability::Unsynced);
    replaced.map_err(|source| StoreError::Write {
        path: path.to_owned(),
        source,
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Durability {
    Synced,
    Unsynced,
}

fn replace(path: &Path, bytes: &[u8], mode: u32, durability: Durability) -> io::Result<()> {
    let dir = parent(path);
    let mut temp = tempfile::Builder::new()
        .prefix(".corvid-")
        .permissions(fs::Permissions::from_mode(MODE_SECRET))
        .tempfile_in(dir)?;
    temp.write_all(bytes)?;
    // Set on the open file, not at creation, where the umask would have its say.
    temp.as_file()
        .set_permissions(fs::Permissions::from_mode(mode))?;
    if durability == Durability::Unsynced {
        temp.persist(path)?;
        return Ok(());
    }
    temp.as_file().sync_all()?;
    temp.persist(path)?;
    File::open(dir)?.sync_all()
}

/// Renames within one directory and syncs it.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), StoreError> {
    let renamed = fs::rename(from, to).and_then(|()| File::open(parent(to))?.sync_all());
    renamed.map_err(|source| StoreError::Write {
        path: to.to_owned(),
        source,
    })
}

/// The whole content; `None` if there is no such file.
pub(crate) fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(StoreError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// The whole content.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, StoreError> {
    fs::read(path).map_err(|source| StoreError::Read {
        path: path.to_owned(),
        source,
    })
}

/// Makes a directory (0700) and those above it where missing.
pub(crate) fn create_dir(path: &Path) -> Result<(), StoreError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| StoreError::Write {
            path: path.to_owned(),
            source,
        })
}

/// An exclusive lock between processes and between threads, held until dropped.
#[derive(Debug)]
pub(crate) struct FileLock {
    _file: File,
}

impl FileLock {
    /// Waits for the lock on `path`, which is made if missing and never removed.
    pub(crate) fn hold(path: &Path) -> Result<Self, StoreError> {
        let open = || {
            let file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(path)?;
            file.lock()?;
            Ok(file)
        };
        open()
            .map(|file| Self { _file: file })
            .map_err(|source| StoreError::Lock {
                path: path.to_owned(),
                source,
            })
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_file_has_the_mode_that_was_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write_atomic(&path, b"secret", MODE_SECRET).unwrap();
        assert_eq!(mode(&path), 0o600);
        write_atomic(&path, b"public", MODE_PUBLIC).unwrap();
        assert_eq!(mode(&path), 0o644);
        assert_eq!(fs::read(&path).unwrap(), b"public");
    }

    #[test]
    fn no_temporary_file_is_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        write_atomic(&dir.path().join("file"), b"x", MODE_PUBLIC).unwrap();
        write_atomic(&dir.path().join("missing/file"), b"x", MODE_PUBLIC).unwrap_err();
        // A directory can't be replaced by a file: the rename fails after everything was written.
        fs::create_dir(dir.path().join("taken")).unwrap();
        write_atomic(&dir.path().join("taken"), b"x", MODE_PUBLIC).unwrap_err();
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["file", "taken"]);
    }

    #[test]
    fn two_holders_of_a_lock_exclude_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let counter = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _lock = FileLock::hold(&path).unwrap();
                        let seen = counter.load(std::sync::atomic::Ordering::SeqCst);
                        std::thread::yield_now();
                        counter.store(seen + 1, std::sync::atomic::Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(counter.into_inner(), 200);
    }
}
