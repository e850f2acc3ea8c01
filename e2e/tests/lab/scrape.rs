//! Scrapes through the forward proxy, on a long line.

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::client::Tunnel;
use e2e::lab;
use e2e::link::Weather;
use serde_json::json;
use tokio::time::Instant;

use crate::steps::{LINE, on_a_line};

/// Where scrapers ask.
const PROXY: &str = "203.0.113.10:8445";
/// There and back on the line.
const ROUND_TRIP: Duration = Duration::from_millis(100);

/// Scrapes once over a connection to the proxy that stays open; the body and how long it took.
fn scrape(proxy: &mut Tunnel) -> Result<(String, Duration)> {
    let start = Instant::now();
    write!(
        proxy,
        "GET http://edge1:9100/metrics HTTP/1.1\r\nHost: edge1:9100\r\n\r\n"
    )?;
    proxy.flush()?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        proxy.read_exact(&mut byte)?;
        head.extend_from_slice(&byte);
    }
    let head = String::from_utf8(head)?.to_lowercase();
    ensure!(head.starts_with("http/1.1 200"), "{head}");
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.context("no length")?.parse()?];
    proxy.read_exact(&mut body)?;
    Ok((String::from_utf8(body)?, start.elapsed()))
}

#[test]
fn a_kept_connection_is_scraped_in_one_round_trip() {
    lab::scenario(|lab| {
        let (link, small) = on_a_line(lab, |config| {
            let scrapers = json!({
                "type": "forwardProxy", "listen": format!("tcp:{PROXY}"),
                "allow": [{"clients": ["prometheus"], "nodes": ["*"], "ports": [9100]}],
            });
            if let Some(frontends) = config["frontends"].as_array_mut() {
                frontends.push(scrapers);
            }
        })?;
        link.weather(Weather {
            delay: ROUND_TRIP / 2,
            ..LINE
        });
        let mut proxy = small.server.door_at(PROXY, "prometheus")?.knock()?;
        let (body, fresh) = scrape(&mut proxy)?;
        ensure!(body.contains("stand_in{name=\"edge1\"} 1"), "{body}");
        let mut kept = Vec::new();
        for _ in 0..5 {
            let (again, time) = scrape(&mut proxy)?;
            ensure!(again == body, "{again}");
            kept.push(time);
        }
        lab::measured(&format!(
            "scrape at {ROUND_TRIP:?} there and back: {fresh:?} with a new stream, then {kept:?}"
        ));
        // The line's delay bounds both from below: what needs a stream first takes two round trips.
        let best = kept.iter().min().context("no scrape")?;
        ensure!(fresh >= ROUND_TRIP * 2, "{fresh:?}");
        ensure!((ROUND_TRIP..ROUND_TRIP * 2).contains(best), "{kept:?}");
        Ok(())
    });
}
