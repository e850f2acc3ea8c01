//! `proxy-server redirect` on the control plane's host, with the real `nft`: which addresses are in the kernel's sets,
//! how they follow the nodes, and what becomes of them when things go wrong.

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use e2e::{lab, wait};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::time::Instant;

mod dials;
mod hindrance;
pub(crate) mod host;
mod line;

use host::{
    CHECKED, EDGES, Held, NOT_OURS, beside_an_apiserver, edge, kubernetes, node, run, run_with,
    table, until,
};

use crate::api::Mood;
use crate::intercept::{NAME, SOON, dialled, door, each_reaches_its_own, routes, site};

#[test]
fn the_sets_follow_the_nodes_and_nothing_of_us_stays_at_the_end() {
    beside_an_apiserver(|lab, runtime, api| {
        let hostile = "x\n}\nflush ruleset\n#";
        api.put(edge(
            "edge1",
            &["10.1.0.1", "fd00::1", "192.168.1.10", "203.0.113.10"],
        ));
        api.put(edge(
            "edge2",
            &[
                "10.1.0.2",
                "fd00::2",
                "192.168.1.10",
                "10.1.0.9",
                "169.254.1.1",
            ],
        ));
        api.put(node("cloud1", &json!({}), &["10.1.0.8", "10.1.0.9"]));
        let mut twin = edge(hostile, &["10.1.0.3"]);
        twin["metadata"]["annotations"] = json!({"corvid.io/agent": "somebody"});
        api.put(twin);
        let site = site(lab, &door(), |config| kubernetes(config, api, lab))?;
        let cloud = lab.host("cloud")?;
        cloud.nft(NOT_OURS)?;

        let rules = run(lab, &site.server)?;
        until(&cloud, &[&EDGES[..], &["10.1.0.3"]].concat())?;
        each_reaches_its_own(&cloud)?;
        for said in [
            "# left out: 192.168.1.10 is shared by nodes that different agents serve: edge1, edge2",
            "# left out: 203.0.113.10 is this machine's own: edge1",
            "# left out: 10.1.0.9 is also that of a node that is not at the edge: cloud1, edge2",
            "ip daddr @nodes4 tcp dport 10250 counter redirect to :10250",
        ] {
            ensure!(
                rules.log().contains(said),
                "{said:?} is not in {}",
                rules.log()
            );
        }

        // Another node with the same address, under a name that would end the rules.
        let mut claim = edge("thief\n}\nflush ruleset", &["10.1.0.3", "10.1.0.4"]);
        claim["metadata"]["annotations"] = json!({"corvid.io/agent": "thief"});
        api.put(claim);
        until(&cloud, &[&EDGES[..], &["10.1.0.4"]].concat())?;
        let left_out = r"10.1.0.3 is shared by nodes that different agents serve: thief\n}\nflush ruleset, x\n}\nflush ruleset\n#";
        rules.wait_for_line(left_out, SOON)?;
        let shown = site.server.redirect("--dry-run", None)?;
        ensure!(shown.contains(left_out), "{shown}");
        let file = lab.dir().join("shown.nft");
        std::fs::write(&file, &shown)?;
        cloud.run(
            "nft",
            &["-c", "-f", file.to_str().context("a strange folder")?],
        )?;
        api.delete(hostile);
        until(&cloud, &[&EDGES[..], &["10.1.0.3", "10.1.0.4"]].concat())?;
        api.delete("thief\n}\nflush ruleset");
        until(&cloud, &EDGES)?;

        // A node that is at the edge no more, and one that becomes it.
        api.put(node("edge2", &json!({}), &["10.1.0.2", "fd00::2"]));
        api.put(edge("cloud1", &["10.1.0.8"]));
        until(&cloud, &["10.1.0.1", "10.1.0.8", "192.168.1.10", "fd00::1"])?;
        api.put(edge("edge2", &["10.1.0.2", "fd00::2", "192.168.1.10"]));
        api.delete("cloud1");
        until(&cloud, &EDGES)?;

        // While kube-apiserver is away the last known stay, also when somebody removes them.
        runtime.block_on(api.down());
        cloud.run("nft", &["flush", "ruleset"])?;
        cloud.nft(NOT_OURS)?;
        until(&cloud, &EDGES)?;
        rules.wait_for_line("somebody has removed the rules", SOON)?;
        // A set that somebody changes, and a rule that somebody adds.
        cloud.nft("delete element inet corvid_redirect nodes4 { 10.1.0.1 }")?;
        until(&cloud, &EDGES)?;
        cloud.nft("insert rule inet corvid_redirect output return")?;
        wait::poll(CHECKED, "the rule is gone", || {
            let chain = cloud.run(
                "nft",
                &["list", "chain", "inet", "corvid_redirect", "output"],
            );
            let chain = chain.map_err(|error| format!("{error:#}"))?;
            let strange = chain.lines().any(|line| line.trim() == "return");
            if strange { Err(chain) } else { Ok(()) }
        })?;
        each_reaches_its_own(&cloud)?;
        api.put(edge("edge3", &["10.1.0.5"]));
        runtime.block_on(api.up());
        until(&cloud, &[&EDGES[..], &["10.1.0.5"]].concat())?;

        // What is open stays so, as the kernel goes on translating while anybody has rules for it (kube-proxy has).
        let to = "10.1.0.1:10250".parse()?;
        let open = Held::open(&cloud, to)?;
        ensure!(rules.terminate(lab::STOP)?.success(), "{}", rules.log());
        ensure!(table(&cloud)?.is_none(), "the table stays");
        ensure!(open.says()? == "edge1\n", "it is cut");
        ensure!(
            TcpStream::connect_timeout(&to, Duration::from_secs(1)).is_err(),
            "it is led to us"
        );
        let rest = cloud.run("nft", &["list", "tables"])?;
        ensure!(rest.trim() == "table inet not_ours", "{rest}");
        Ok(())
    });
}

#[test]
fn ten_thousand_nodes_are_led_and_followed() {
    beside_an_apiserver(|lab, _runtime, api| {
        let address = |i: usize| format!("10.{}.{}.{}", 100 + (i >> 16), (i >> 8) & 255, i & 255);
        let many = |i: usize| edge(&format!("n{i}"), &[&address(i), &format!("fd00::1:{i:x}")]);
        api.put_all((0..10_000).map(many));
        let config = json!({
            "name": "proxy-1", "frontends": [door()],
            "kubernetes": {"kubeconfig": api.kubeconfig(lab.dir())},
        });
        let config = lab.config("many", &config)?;
        let cloud = lab.host("cloud")?;
        let start = Instant::now();
        let rules = run_with(lab, &config)?;
        let count = |wanted: usize| {
            wait::poll(CHECKED, &format!("{wanted} addresses"), || {
                let now = table(&cloud).map_err(|error| format!("{error:#}"))?;
                let now = now.unwrap_or_default().len();
                if now == wanted {
                    Ok(())
                } else {
                    Err(now.to_string())
                }
            })
        };
        count(20_000)?;
        let (led, start) = (start.elapsed(), Instant::now());
        api.put(edge("one-more", &["10.1.0.1", "fd00::1"]));
        count(20_002)?;
        lab::measured(&format!(
            "10,000 nodes with 20,000 addresses led after {led:?}, one more after {:?}",
            start.elapsed()
        ));
        ensure!(
            !rules.log().contains("somebody has changed"),
            "it takes its own table for another's"
        );
        ensure!(rules.terminate(lab::STOP)?.success(), "{}", rules.log());
        Ok(())
    });
}

#[test]
fn what_a_killed_run_has_left_stays_until_the_nodes_are_known_and_can_be_removed() {
    beside_an_apiserver(|lab, _runtime, api| {
        api.put(edge("edge1", &["10.1.0.1", "fd00::1"]));
        api.put(edge("edge2", &["10.1.0.2", "fd00::2"]));
        let site = site(lab, &door(), |config| kubernetes(config, api, lab))?;
        let cloud = lab.host("cloud")?;
        let first = run(lab, &site.server)?;
        until(&cloud, &EDGES)?;
        first.kill()?;
        ensure!(
            table(&cloud)?.is_some(),
            "a killed run can't remove its table"
        );
        each_reaches_its_own(&cloud)?;

        // kube-apiserver is up and serves nobody.
        api.mood(Mood::Status(503));
        api.delete("edge2");
        let mark = first.mark();
        let second = run(lab, &site.server)?;
        second.wait_for_line_since(mark, "the rules are in place", CHECKED)?;
        until(&cloud, &EDGES)?;
        api.mood(Mood::Well);
        until(&cloud, &["10.1.0.1", "fd00::1"])?;
        second.kill()?;
        for _ in 0..2 {
            site.server.redirect("--remove", None)?;
            ensure!(table(&cloud)?.is_none(), "the table stays");
        }
        Ok(())
    });
}

#[test]
fn there_is_no_moment_without_rules_while_they_are_replaced() {
    lab::scenario(|lab| {
        let site = site(lab, &door(), routes)?;
        let cloud = lab.host("cloud")?;
        site.server.redirect("--apply", None)?;
        let open = Held::open(&cloud, "[fd00::1]:10250".parse()?)?;
        let (over, dials) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            let dialling = scope.spawn(|| -> Result<()> {
                while !over.load(Ordering::Relaxed) {
                    for (to, wanted) in [
                        ("10.1.0.1:10250", "edge1\n"),
                        ("[fd00::2]:10250", "edge2\n"),
                    ] {
                        let said = dialled(&cloud, to, NAME)?;
                        ensure!(said == wanted, "{to} says {said:?}");
                        dials.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Ok(())
            });
            let replaced =
                (0..50).try_for_each(|_| site.server.redirect("--apply", None).map(drop));
            over.store(true, Ordering::Relaxed);
            dialling
                .join()
                .map_err(|_panic| anyhow!("the client panicked"))??;
            replaced
        })?;
        ensure!(open.says()? == "edge1\n", "an open connection is cut");
        let dials = dials.into_inner();
        ensure!(dials > 100, "only {dials} dials");
        lab::measured(&format!(
            "{dials} dials while the table was replaced 50 times, none astray"
        ));
        Ok(())
    });
}

/// As pods do that are replaced: the new one is there before the old one goes.
#[test]
fn a_run_takes_over_from_another_and_the_last_one_removes_the_rules() {
    lab::scenario(|lab| {
        let site = site(lab, &door(), routes)?;
        let cloud = lab.host("cloud")?;
        let old = run(lab, &site.server)?;
        until(&cloud, &EDGES)?;
        let mark = old.mark();
        let new = run(lab, &site.server)?;
        new.wait_for_line_since(mark, "the rules are in place", SOON)?;
        old.terminate(lab::STOP)?;
        ensure!(
            table(&cloud)?.is_some(),
            "the rules are gone with the old run"
        );
        each_reaches_its_own(&cloud)?;
        // One that is killed is nobody that keeps them.
        let killed = run(lab, &site.server)?;
        let mark = new.mark();
        killed.wait_for_line_since(mark, "the rules are in place", SOON)?;
        killed.kill()?;
        ensure!(new.terminate(lab::STOP)?.success(), "{}", new.log());
        ensure!(table(&cloud)?.is_none(), "the table stays");
        Ok(())
    });
}

#[test]
fn routes_are_followed_and_a_cidr_is_led_without_what_is_shared() {
    lab::scenario(|lab| {
        let site = site(lab, &door(), routes)?;
        let cloud = lab.host("cloud")?;
        let rules = run(lab, &site.server)?;
        until(&cloud, &EDGES)?;
        let file = site.server.config();
        let old = std::fs::read_to_string(file)?;
        let mut config: Value = serde_json::from_str(&old)?;
        config["routes"] = json!([
            {"node": "edge1", "addresses": ["10.1.0.0/30", "fd00::1"]},
            {"node": "edge2", "addresses": ["10.1.0.2", "fd00::2"]},
            {"node": "twin", "addresses": ["10.1.0.3"]},
            {"node": "other", "addresses": ["10.1.0.3"]},
        ]);
        let write = |text: &str| -> Result<()> {
            let new = file.with_extension("new");
            std::fs::write(&new, text)?;
            Ok(std::fs::rename(&new, file)?)
        };
        write(&config.to_string())?;
        until(&cloud, &["10.1.0.0/31", "10.1.0.2", "fd00::1", "fd00::2"])?;
        each_reaches_its_own(&cloud)?;
        // Without a frontend there is nothing to lead to: such a reload is refused, and the sets stay.
        config["frontends"] = json!([]);
        write(&config.to_string())?;
        rules.wait_for_line("the new configuration is refused", SOON)?;
        ensure!(table(&cloud)?.is_some(), "the table is gone");
        write(&old)?;
        until(&cloud, &EDGES)?;
        rules.signal(Signal::SIGINT)?;
        ensure!(rules.wait(lab::STOP)?.success(), "{}", rules.log());
        ensure!(table(&cloud)?.is_none(), "the table stays");
        Ok(())
    });
}

#[test]
fn a_frontend_on_another_port_of_one_address_is_led_to() {
    lab::scenario(|lab| {
        // As on a machine whose own kubelet has port 10250.
        let door = json!({
            "type": "intercept", "listen": "203.0.113.10:10260", "port": 10250,
            "allow": [{"from": ["203.0.113.10"], "nodes": ["*"], "ports": [10250]}],
        });
        let site = site(lab, &door, routes)?;
        let cloud = lab.host("cloud")?;
        let shown = site.server.redirect("--apply", None)?;
        let said = "# left out: all IPv6 addresses (2), as no `intercept` frontend listens on IPv6";
        ensure!(shown.contains(said), "{shown}");
        for (address, node) in [("10.1.0.1:10250", "edge1\n"), ("10.1.0.2:10250", "edge2\n")] {
            let said = dialled(&cloud, address, NAME)?;
            ensure!(said == node, "{address} says {said:?}");
        }
        Ok(())
    });
}
