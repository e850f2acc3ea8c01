//! `deploy/` and the images: what a user applies is what the programs take, and what monitoring asks for is what they
//! have. Needs the Go tools (`make tools`) and images (`make images`); what runs in namespaces needs root.

mod archive;
mod configurations;
mod hardening;
mod images;
mod monitoring;
mod references;

use std::sync::LazyLock;

use anyhow::Result;
use e2e::manifests::{Overlay, overlays};

/// All overlays, built once: each costs a start of kubectl.
#[expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "this is an assertion of all tests"
)]
static OVERLAYS: LazyLock<Vec<Overlay>> = LazyLock::new(|| {
    let build = |name: &String| Overlay::build(name).unwrap_or_else(|error| panic!("{error:#}"));
    overlays().unwrap().iter().map(build).collect()
});

/// Looks at every overlay, and tells all that is wrong at once.
fn each_overlay(look: impl Fn(&Overlay) -> Result<Vec<String>>) {
    let mut wrong = Vec::new();
    for overlay in &*OVERLAYS {
        let name = &overlay.name;
        match look(overlay) {
            Ok(found) => wrong.extend(found.into_iter().map(|line| format!("{name}: {line}"))),
            Err(error) => wrong.push(format!("{name}: {error:#}")),
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
