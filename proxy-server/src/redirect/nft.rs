//! Runs the `nft` program: the only part that touches the kernel's rules.
//!
//! It must not decide anything. Each run has a time limit, and what it says has a bound; one that is killed has changed
//! nothing, as the kernel takes a transaction whole or not at all.
//!
//! The table has no owner flag: `nft` can give it one in its interactive mode only, which takes one line for a
//! transaction, says nothing about how it went and is left out of some builds.

use std::collections::BTreeSet;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::time::timeout;

use super::ruleset::{Family, Ruleset, TABLE, removal};

/// For one run; 20,000 addresses take a tenth of a second.
pub(super) const LIMIT: Duration = Duration::from_secs(20);
/// What is read of a listing; an address takes up to 50 bytes.
const MOST_LISTED: u64 = 64 << 20;
/// What is read of its complaints.
const MOST_SAID: u64 = 4 << 10;
/// Where administrators' programs are, which other users don't always search.
const FURTHER: &str = "/usr/sbin:/sbin";
/// `CAP_NET_ADMIN`, see capabilities(7).
const NET_ADMIN: u64 = 1 << 12;

/// What came of running `nft`.
#[derive(Debug, thiserror::Error)]
pub(super) enum NftError {
    /// The process lacks the capability.
    #[error(
        "changing firewall rules needs CAP_NET_ADMIN in this network namespace: run it as root"
    )]
    Capability,
    /// There is no such program.
    #[error("there is no program `nft`: install the package nftables")]
    Missing,
    /// It did not take the rules.
    #[error(
        "nft refused the rules, which need Linux 5.2 or newer with NAT for the family inet: {said}"
    )]
    Refused {
        /// What it said.
        said: String,
    },
    /// It could not be run.
    #[error("run nft")]
    Run(#[source] io::Error),
    /// It took too long.
    #[error("nft did not end within {} s", LIMIT.as_secs())]
    Timeout,
}

/// Removes the table; it need not be there.
///
/// # Errors
/// `nft` can't be run, or refuses.
pub(super) async fn remove() -> Result<(), NftError> {
    load(&removal()).await
}

/// Makes the table.
///
/// # Errors
/// `nft` can't be run, or refuses.
pub(super) async fn apply(ruleset: &Ruleset) -> Result<(), NftError> {
    load(&ruleset.text()).await
}

/// Hands a transaction to the kernel.
///
/// # Errors
/// `nft` can't be run, or refuses.
pub(super) async fn load(text: &str) -> Result<(), NftError> {
    may()?;
    let ended = run(&["-f", "-"], text).await?;
    if ended.success {
        return Ok(());
    }
    Err(NftError::Refused {
        said: ended.complaint,
    })
}

/// How the table looks, without its counters; `None` if there is none.
///
/// # Errors
/// `nft` can't be run.
pub(super) async fn look() -> Result<Option<String>, NftError> {
    let ended = run(&["-s", "list", "table", "inet", TABLE], "").await?;
    Ok(ended.success.then_some(ended.output))
}

/// The addresses in the table's sets, if there is a table.
///
/// # Errors
/// `nft` can't be run.
pub(super) async fn addresses() -> Result<Option<Vec<IpNet>>, NftError> {
    let ended = run(&["-j", "list", "table", "inet", TABLE], "").await?;
    Ok(ended.success.then(|| elements(&ended.output)))
}

/// The elements of our sets in a listing as JSON (libnftables-json(5)).
fn elements(listing: &str) -> Vec<IpNet> {
    let listing: Value = serde_json::from_str(listing).unwrap_or_default();
    let objects = listing.get("nftables").and_then(Value::as_array);
    let sets = objects.into_iter().flatten().filter_map(|object| {
        let set = object.get("set")?;
        let name = set.get("name")?.as_str()?;
        Family::ALL.iter().find(|family| family.set() == name)?;
        set.get("elem")?.as_array()
    });
    let all: BTreeSet<IpNet> = sets.flatten().filter_map(element).collect();
    all.into_iter().collect()
}

fn element(element: &Value) -> Option<IpNet> {
    if let Some(prefix) = element.get("prefix") {
        let length = u8::try_from(prefix.get("len")?.as_u64()?).ok()?;
        return IpNet::new(prefix.get("addr")?.as_str()?.parse().ok()?, length).ok();
    }
    Some(IpNet::from(
        element.as_str()?.parse::<std::net::IpAddr>().ok()?,
    ))
}

/// Whether this process has what `nft` will need, so that the answer is in our words.
fn may() -> Result<(), NftError> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let has = line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    match has {
        Some(mask) if mask & NET_ADMIN == 0 => Err(NftError::Capability),
        // Without /proc it is nft that says so.
        Some(_) | None => Ok(()),
    }
}

struct Ended {
    success: bool,
    output: String,
    complaint: String,
}

async fn run(args: &[&str], input: &str) -> Result<Ended, NftError> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("nft");
    command
        .args(args)
        .env("PATH", format!("{path}:{FURTHER}"))
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let failed = |error: io::Error| {
        if error.kind() == io::ErrorKind::NotFound {
            NftError::Missing
        } else {
            NftError::Run(error)
        }
    };
    let mut child = command.spawn().map_err(failed)?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let write = async {
        if let Some(mut stdin) = stdin {
            // One that does not read all of it says why.
            stdin.write_all(input.as_bytes()).await.ok();
        }
    };
    let all = async {
        let ((), output, complaint, status) = tokio::join!(
            write,
            read(stdout, MOST_LISTED),
            read(stderr, MOST_SAID),
            child.wait()
        );
        status.map(|status| Ended {
            success: status.success(),
            output,
            complaint: complaint.trim().to_owned(),
        })
    };
    let ended = timeout(LIMIT, all).await;
    ended
        .map_err(|_elapsed| NftError::Timeout)?
        .map_err(NftError::Run)
}

/// Reads to the end and keeps the first `most` bytes.
async fn read(from: Option<impl AsyncRead + Unpin>, most: u64) -> String {
    let mut kept = Vec::new();
    if let Some(mut from) = from {
        // What can't be read is as good as not said: the exit code decides.
        (&mut from).take(most).read_to_end(&mut kept).await.ok();
        tokio::io::copy(&mut from, &mut tokio::io::sink())
            .await
            .ok();
    }
    String::from_utf8_lossy(&kept).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_our_sets_are_read_and_nothing_else() {
        let listing = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"table": {"name": "corvid_redirect"}},
            {"set": {"name": "nodes4", "elem": ["10.1.0.2", {"prefix": {"addr": "10.9.0.0", "len": 24}}, "10.1.0.1"]}},
            {"set": {"name": "nodes6", "elem": ["fd00::1", {"range": ["fd00::5", "fd00::7"]}, "host.name", 7]}},
            {"set": {"name": "others", "elem": ["10.1.0.9"]}}, {"set": {"name": "nodes4"}}, {"rule": {}}]}"#;
        let read: Vec<_> = elements(listing).iter().map(ToString::to_string).collect();
        assert_eq!(
            read,
            ["10.1.0.1/32", "10.1.0.2/32", "10.9.0.0/24", "fd00::1/128"]
        );
        for nothing in [
            "",
            "{}",
            r#"{"nftables": 1}"#,
            r#"{"nftables": [{"set": {}}]}"#,
            "[[[[",
        ] {
            assert!(elements(nothing).is_empty(), "{nothing}");
        }
    }
}
