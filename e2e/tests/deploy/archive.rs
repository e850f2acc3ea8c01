//! An image that `make images` has exported, unpacked.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use e2e::manifests::{list, text};
use e2e::net::Host;
use e2e::process::Spawn;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::Value;
use tempfile::TempDir;

/// The user that images run as.
pub(crate) const NOBODY: u32 = 65532;
/// Runs programs of arm64 on other machines; Debian's qemu-user-static.
const QEMU: &str = "/usr/bin/qemu-aarch64-static";

/// An image of one machine, with its files in a folder.
#[derive(Debug)]
pub(crate) struct Image {
    dir: TempDir,
    /// What a runtime is told: user, entry point.
    pub(crate) config: Value,
    /// Under which names it is known.
    pub(crate) tags: Vec<String>,
    emulated: bool,
}

impl Image {
    /// Where it was exported to.
    pub(crate) fn archive(name: &str, arch: &str) -> PathBuf {
        let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/images");
        images.join(format!("{name}-{arch}.tar"))
    }

    /// Unpacks it.
    pub(crate) fn unpack(name: &str, arch: &str) -> Result<Self> {
        let archive = Self::archive(name, arch);
        let there = File::open(&archive);
        let there = there.with_context(|| format!("{}: make images", archive.display()))?;
        let dir = tempfile::Builder::new().prefix("corvid-").tempdir()?;
        let parts = dir.path().join("parts");
        tar::Archive::new(there).unpack(&parts)?;
        let read = |file: &str| -> Result<Value> {
            Ok(serde_json::from_slice(&fs::read(parts.join(file))?)?)
        };
        let manifest = read("manifest.json")?;
        let config = read(text(&manifest, "/0/Config"))?;
        let root = dir.path().join("root");
        for layer in list(&manifest, "/0/Layers").filter_map(Value::as_str) {
            let mut layer = tar::Archive::new(File::open(parts.join(layer))?);
            layer.set_preserve_permissions(true);
            layer.unpack(&root)?;
        }
        let tags = list(&manifest, "/0/RepoTags").filter_map(Value::as_str);
        let tags = tags.map(str::to_owned).collect();
        let emulated = arch == "arm64" && std::env::consts::ARCH != "aarch64";
        Ok(Self {
            dir,
            config,
            tags,
            emulated,
        })
    }

    /// The root of its file system.
    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// All files, from the root.
    pub(crate) fn files(&self) -> Result<Vec<String>> {
        fn walk(root: &Path, folder: &Path, files: &mut Vec<String>) -> Result<()> {
            for entry in fs::read_dir(folder)? {
                let path = entry?.path();
                if path.is_dir() {
                    walk(root, &path, files)?;
                } else {
                    files.push(path.strip_prefix(root)?.display().to_string());
                }
            }
            Ok(())
        }
        let (root, mut files) = (self.root(), Vec::new());
        walk(&root, &root, &mut files)?;
        files.sort();
        Ok(files)
    }

    /// Puts a file there, as a volume would.
    pub(crate) fn mount(&self, file: &str, content: impl AsRef<[u8]>) -> Result<()> {
        let file = self.root().join(file.trim_start_matches('/'));
        fs::create_dir_all(file.parent().context("no folder")?)?;
        Ok(fs::write(file, content)?)
    }

    /// Makes a folder that the image's user may write to, as an `emptyDir` is.
    pub(crate) fn empty_dir(&self, folder: &str) -> Result<()> {
        let folder = self.root().join(folder.trim_start_matches('/'));
        fs::create_dir_all(&folder)?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
        Ok(chown(&folder, Some(NOBODY), Some(NOBODY))?)
    }

    /// The words that start its program with nothing but its own files, as its user.
    pub(crate) fn command(&self, args: &[&str]) -> Result<Vec<String>> {
        let root = self.root();
        // Every runtime gives containers this much of `/dev`.
        fs::create_dir_all(root.join("dev"))?;
        for (name, minor) in [("random", 8), ("urandom", 9)] {
            let device = root.join("dev").join(name);
            if !device.exists() {
                mknod(&device, SFlag::S_IFCHR, Mode::empty(), makedev(1, minor))?;
                fs::set_permissions(&device, fs::Permissions::from_mode(0o666))?;
            }
        }
        let mut words = vec!["chroot".to_owned()];
        words.push(format!("--userspec={}", text(&self.config, "/config/User")));
        words.push(root.display().to_string());
        if self.emulated {
            let within = root.join(QEMU.trim_start_matches('/'));
            if !within.exists() {
                fs::create_dir_all(within.parent().context("no folder")?)?;
                fs::copy(QEMU, &within).with_context(|| format!("{QEMU} (qemu-user-static)"))?;
            }
            words.push(QEMU.to_owned());
        }
        let entry: Vec<_> = list(&self.config, "/config/Entrypoint")
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect();
        ensure!(entry.len() == 1, "the entry point is {entry:?}");
        words.extend(entry);
        words.extend(args.iter().map(|arg| (*arg).to_owned()));
        Ok(words)
    }

    /// Its program as a process on a host.
    pub(crate) fn spawn(&self, name: &str, host: &Host, args: &[&str]) -> Result<Spawn> {
        let words = self.command(args)?;
        let (chroot, rest) = words.split_first().context("no words")?;
        Ok(Spawn::new(name, chroot).args(rest).host(host))
    }

    /// Runs its program to the end on a host.
    pub(crate) fn run(&self, host: &Host, args: &[&str]) -> Result<String> {
        let words = self.command(args)?;
        let (chroot, rest) = words.split_first().context("no words")?;
        let rest: Vec<_> = rest.iter().map(String::as_str).collect();
        host.run(chroot, &rest)
    }
}
