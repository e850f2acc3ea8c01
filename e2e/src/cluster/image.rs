//! Container images without a registry: busybox in one layer, as a docker-archive that `ctr images import` takes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tar::{Builder, EntryType, Header};

use super::content::sha256;

/// The image that the tests' containers run.
pub const BUSYBOX: &str = "corvid.test/busybox:1";
/// The image that holds a pod's namespaces; the same layer, asleep.
pub(super) const PAUSE: &str = "corvid.test/pause:1";

/// Debian's busybox-static puts it here.
const PROGRAM: &str = "/bin/busybox";
/// What `sleep` is told, in seconds.
pub(super) const FOR_EVER: &str = "2147483647";

/// Writes both images into one archive in `dir`.
pub(super) fn make(dir: &Path) -> Result<PathBuf> {
    let layer = layer()?;
    let mut tar = Builder::new(Vec::new());
    append(&mut tar, "layer.tar", &layer)?;
    let mut manifest = Vec::new();
    for (name, entrypoint) in [
        (BUSYBOX, &["/bin/sh"][..]),
        (PAUSE, &["/bin/sleep", FOR_EVER]),
    ] {
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": entrypoint, "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", sha256(&layer))]},
        })
        .to_string();
        let file = format!("{}.json", sha256(config.as_bytes()));
        append(&mut tar, &file, config.as_bytes())?;
        manifest.push(json!({"Config": file, "RepoTags": [name], "Layers": ["layer.tar"]}));
    }
    append(
        &mut tar,
        "manifest.json",
        json!(manifest).to_string().as_bytes(),
    )?;
    let path = dir.join("images.tar");
    fs::write(&path, tar.into_inner()?).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

/// The one layer: busybox, a symlink for each of its applets, and the folders that a container expects.
fn layer() -> Result<Vec<u8>> {
    let program = fs::read(PROGRAM).with_context(|| format!("read {PROGRAM} (busybox-static)"))?;
    let list = std::process::Command::new(PROGRAM)
        .arg("--list")
        .output()
        .context("list busybox's applets")?;
    ensure!(list.status.success(), "busybox --list: {}", list.status);
    let mut tar = Builder::new(Vec::new());
    for (folder, mode) in [
        ("bin/", 0o755),
        ("dev/", 0o755),
        ("etc/", 0o755),
        ("proc/", 0o755),
        ("sys/", 0o755),
        ("tmp/", 0o1777),
    ] {
        let mut header = header(EntryType::Directory, 0, mode);
        tar.append_data(&mut header, folder, &[][..])?;
    }
    append(&mut tar, "bin/busybox", &program)?;
    for applet in String::from_utf8(list.stdout)?.lines() {
        if applet != "busybox" {
            let mut header = header(EntryType::Symlink, 0, 0o777);
            tar.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
        }
    }
    Ok(tar.into_inner()?)
}

fn append(tar: &mut Builder<Vec<u8>>, path: &str, data: &[u8]) -> Result<()> {
    let mut header = header(EntryType::Regular, data.len(), 0o755);
    Ok(tar.append_data(&mut header, path, data)?)
}

fn header(kind: EntryType, size: usize, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size as u64);
    header.set_mode(mode);
    header
}
