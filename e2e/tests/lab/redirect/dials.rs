//! What the server dials directly is exempt from the rules, by its mark.

use std::io::{Read, Write};
use std::net::TcpListener;

use anyhow::{Context, Result, ensure};
use e2e::net::Host;
use e2e::process::{Process, Spawn};
use e2e::{lab, wait};
use serde_json::{Value, json};

use super::host::ours;
use crate::intercept::{NAMELESS, SOON, door, is_told, routes, site};

/// A listener beyond the tunnel that greets in plain text.
fn plain(host: &Host, address: &str) -> Result<TcpListener> {
    let listener = host.enter(|| TcpListener::bind(address))??;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// How many connections the rule for marked ones has seen.
fn exempted(host: &Host) -> Result<u64> {
    let rules = ours(host, "rule")?;
    let expressions = rules.first().and_then(|rule| rule.get("expr")?.as_array());
    let counter = expressions
        .into_iter()
        .flatten()
        .find_map(|expression| expression.get("counter")?.get("packets")?.as_u64());
    counter.context("no counter")
}

#[test]
fn our_own_direct_dials_are_exempt_and_would_come_back_without_their_mark() {
    lab::scenario(|lab| {
        let site = site(lab, &door(), |config| {
            routes(config);
            config["frontends"][0]["default"] = json!("direct");
        })?;
        let (cloud, inet) = (lab.host("cloud")?, lab.host("inet")?);
        // Addresses that the rules lead to us and that the server itself takes for ones of the cloud.
        inet.ip("addr add 10.1.0.9/32 dev lo")?;
        inet.ip("addr add fd00::9/128 dev lo nodad")?;
        let config: Value = serde_json::from_str(&std::fs::read_to_string(site.server.config())?)?;
        let with = |name: &str, mark: Option<u32>| {
            let mut config = config.clone();
            config["routes"] = json!([{"node": "edge9", "addresses": ["10.1.0.9", "fd00::9"]}]);
            config["direct"] = json!({"mark": mark});
            lab.config(name, &config)
        };
        let (ours, another) = (with("ours", None)?, with("another", Some(7))?);
        for address in ["10.1.0.9:10250", "[fd00::9]:10250"] {
            site.server.redirect("--apply", Some(&ours))?;
            let target = plain(&inet, address)?;
            let mut stream = site.server.door().connect(address)??;
            let (mut target, _) = wait::poll(SOON, "the dial comes to its target", || {
                target.accept().map_err(|error| error.kind())
            })?;
            target.write_all(b"plain")?;
            drop(target);
            stream.patience(SOON)?;
            let mut greeting = String::new();
            stream.read_to_string(&mut greeting)?;
            ensure!(greeting == "plain", "{address} says {greeting:?}");
            ensure!(
                exempted(&cloud)? == 1,
                "the rule has not seen the dial of {address}"
            );
            // Without the mark it is led to us: anybody else's, and our own if the rules exempt another mark.
            let ours_says =
                format!("HTTP/1.1 403 no node is named, and {address} is no node's address");
            is_told(&cloud, address, &ours_says)?;
            site.server.redirect("--apply", Some(&another))?;
            let mut stream = site.server.door().connect(address)??;
            stream.patience(SOON)?;
            stream.write_all(NAMELESS.as_bytes())?;
            let mut said = String::new();
            stream.read_to_string(&mut said)?;
            ensure!(said.starts_with(&ours_says), "{said:?}");
        }
        Ok(())
    });
}

#[test]
fn a_server_that_may_not_mark_its_dials_says_so() {
    lab::scenario(|lab| {
        let cloud = lab.host("cloud")?;
        let start = |name: &str, mark: Option<u32>| -> Result<Process> {
            let socket = lab.dir().join(format!("{name}.sock"));
            let config = json!({
                "name": "proxy-1", "stateDir": lab.dir().join(name), "direct": {"mark": mark},
                "frontends": [{"type": "httpConnect", "listen": format!("unix:{}", socket.display()), "default": "direct"}, door()],
                "admin": {"socket": lab.dir().join("admin.sock")},
            });
            let config = lab.config(name, &config)?;
            // Since Linux 5.17 either will do.
            Spawn::new(name, "setpriv")
                .args(["--bounding-set", "-net_admin,-net_raw", "--"])
                .arg(lab::binary("proxy-server")?)
                .args(["run", "--config"])
                .arg(config)
                .host(&cloud)
                .start(lab.dir())
        };
        let asked = start("asked", Some(7))?;
        ensure!(asked.wait(lab::START)?.code() == Some(1), "{}", asked.log());
        ensure!(
            asked
                .log()
                .contains("direct.mark: marking a connection needs CAP_NET_ADMIN"),
            "{}",
            asked.log()
        );
        let unasked = start("unasked", None)?;
        unasked.wait_for_line(
            "direct dials can't be marked without CAP_NET_ADMIN",
            lab::START,
        )?;
        unasked.wait_for_line("ready", lab::START)?;
        Ok(())
    });
}
