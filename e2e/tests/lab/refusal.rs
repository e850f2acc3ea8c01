//! Requests that cannot be served: each gets its status and its sentence, and leaves nothing behind.

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::client::Refusal;
use e2e::lab;
use proto::Reason;
use serde_json::json;
use tokio::time::Instant;

use crate::steps::{Descriptors, doors, name_of};

const SOON: Duration = Duration::from_secs(10);

/// The refusal is for that reason, and its sentence says so about that node.
fn says(refusal: &Refusal, reason: Reason, node: &str) -> Result<()> {
    ensure!(refusal.status == reason.http_status(), "{refusal}");
    ensure!(refusal.sentence.contains(node), "no {node} in: {refusal}");
    ensure!(
        refusal.sentence.contains(reason.sentence()),
        "not {:?}: {refusal}",
        reason.sentence()
    );
    Ok(())
}

#[test]
fn every_refusal_says_which_node_and_why() {
    lab::scenario(|lab| {
        let small = lab.small_with(|_| {}, |config| config["timeouts"] = json!({"dial": "2s"}))?;
        // A port that swallows what is sent to it: a dial that hangs.
        lab.host("edge1")?.nft(
            "table ip filter {
                chain swallow { type filter hook input priority filter; tcp dport 9100 drop; }
            }",
        )?;
        let descriptors = Descriptors::of(&small)?;
        for door in doors(&small.server)? {
            says(
                &door.refusal("nowhere:10250")?,
                Reason::UnknownDestination,
                "nowhere",
            )?;
            says(
                &door.refusal("192.0.2.1:443")?,
                Reason::UnknownDestination,
                "192.0.2.1",
            )?;
            says(
                &door.refusal("edge1:22")?,
                Reason::DestinationDenied,
                "edge1",
            )?;
            says(&door.refusal("edge1:10255")?, Reason::DialRefused, "edge1")?;
            let start = Instant::now();
            says(&door.refusal("edge1:9100")?, Reason::DialTimeout, "edge1")?;
            let took = start.elapsed();
            ensure!(
                took > Duration::from_secs(1) && took < SOON,
                "given up after {took:?}"
            );
            ensure!(name_of(&door, "edge1")? == "edge1", "others are harmed");
        }
        descriptors.returned(SOON)
    });
}

#[test]
fn a_request_that_is_not_connect_is_refused() {
    lab::scenario(|lab| {
        let small = lab.small()?;
        let descriptors = Descriptors::of(&small)?;
        let long = format!(
            "CONNECT edge1:10250 HTTP/1.1\r\nX: {}\r\n\r\n",
            "x".repeat(1 << 20)
        );
        for door in doors(&small.server)? {
            for bad in [
                "GET / HTTP/1.1\r\nHost: edge1\r\n\r\n",
                "CONNECT edge1 HTTP/1.1\r\n\r\n",
                "CONNECT edge1:0 HTTP/1.1\r\n\r\n",
                "CONNECT edge1:99999 HTTP/1.1\r\n\r\n",
                "CONNECT http://edge1:10250/ HTTP/1.1\r\n\r\n",
                "\0\u{1}\u{2}\u{3}\r\n\r\n",
                &long,
            ] {
                let what = bad.chars().take(60).collect::<String>();
                let mut tunnel = door.knock()?;
                // A server that has heard enough may hang up before all is written.
                tunnel
                    .write_all(bad.as_bytes())
                    .and_then(|()| tunnel.flush())
                    .ok();
                let mut answer = Vec::new();
                // And what it did not read turns the end into a reset.
                tunnel.read_to_end(&mut answer).ok();
                let answer = String::from_utf8_lossy(&answer);
                ensure!(
                    answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
                    "{what:?}: {answer:?}"
                );
                ensure!(bad == long || !answer.is_empty(), "{what:?} got no answer");
            }
            ensure!(name_of(&door, "edge1")? == "edge1");
        }
        descriptors.returned(SOON)
    });
}
