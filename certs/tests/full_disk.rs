//! A disk that is full: the old file stays whole.

use std::path::Path;
use std::process::Command;

const CHILD: &str = "CORVID_TEST_FULL_DISK";

/// Runs itself once more where no file may grow (`ulimit -f 0`): writing fails there as on a full disk,
/// after the temporary file was made.
#[test]
fn a_full_disk_leaves_the_old_file_whole() {
    if let Some(path) = std::env::var_os(CHILD) {
        let error = certs::write_atomic(Path::new(&path), &[b'x'; 8192], certs::MODE_SECRET);
        let error = std::error::Error::source(&error.unwrap_err())
            .unwrap()
            .to_string();
        assert!(
            error.contains("too large") || error.contains("No space"),
            "{error}"
        );
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    certs::write_atomic(&path, b"old", certs::MODE_SECRET).unwrap();
    let child = Command::new("sh")
        .args([
            "-c",
            r#"trap '' XFSZ; ulimit -f 0; exec "$0" --exact "$1" --nocapture"#,
        ])
        .arg(std::env::current_exe().unwrap())
        .arg("a_full_disk_leaves_the_old_file_whole")
        .env(CHILD, &path)
        .output()
        .unwrap();
    assert!(
        child.status.success(),
        "{}",
        String::from_utf8_lossy(&child.stdout)
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}
