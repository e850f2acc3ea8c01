//! Dedicated lines beside the rules: what is dialled by a line does not come back, and what is always dialled as any
//! machine would is not led to us.

use anyhow::{Result, ensure};
use e2e::lab::{self, Lab};
use serde_json::{Value, json};

use super::host::{EDGES, beside_an_apiserver, edge, kubernetes, run_with, until};
use crate::intercept::{NAME, SOON, dialled, is_told, site};

/// Lays a line to edge1, at whose end its address is.
fn lay(lab: &Lab) -> Result<()> {
    let (cloud, edge1) = (lab.host("cloud")?, lab.host("edge1")?);
    let (near, far) = ("10.9.9.1/30", "10.9.9.2/30");
    lab.net()
        .link((&cloud, "line1", near), (&edge1, "line", far))?;
    edge1.ip("addr add 10.1.0.1/32 dev line")?;
    cloud.ip("route add 10.1.0.1/32 via 10.9.9.2").map(drop)
}

/// What this host dials at edge1 comes from its address on the line.
fn door() -> Value {
    json!({
        "type": "intercept", "listen": "[::]:10250",
        "allow": [{"from": ["203.0.113.10", "10.9.9.1"], "nodes": ["*"], "ports": [10250]}],
    })
}

fn line(mode: &str) -> Value {
    json!([{"name": "express", "networks": ["10.1.0.1/32"], "mode": mode}])
}

#[test]
fn what_is_dialled_by_a_line_is_not_led_back_to_us() {
    beside_an_apiserver(|lab, _runtime, api| {
        api.put(edge("edge1", &["10.1.0.1", "fd00::1"]));
        api.put(edge("edge2", &["10.1.0.2", "fd00::2"]));
        lay(lab)?;
        let site = site(lab, &door(), |config| {
            kubernetes(config, api, lab);
            config["lines"] = line("auto");
        })?;
        let cloud = lab.host("cloud")?;
        let rules = run_with(lab, site.server.config())?;
        until(&cloud, &EDGES)?;
        let log = site.server.process();
        ensure!(dialled(&cloud, "10.1.0.1:10250", NAME)? == "edge1\n");
        log.wait_for_line("line=\"express\"", SOON)?;
        ensure!(dialled(&cloud, "10.1.0.2:10250", NAME)? == "edge2\n");
        ensure!(rules.terminate(lab::STOP)?.success(), "{}", rules.log());

        // Rules that exempt another mark lead it back: one dial, and it is told why. Then the line is left alone.
        let mut config: Value =
            serde_json::from_str(&std::fs::read_to_string(site.server.config())?)?;
        config["direct"] = json!({"mark": 7});
        let another = lab.config("another", &config)?;
        site.server.redirect("--apply", Some(&another))?;
        let told = "HTTP/1.1 403 a dial of this server by a line was led back here";
        is_told(&cloud, "10.1.0.1:10250", told)?;
        log.wait_for_line("what is dialled by it comes back to this server", SOON)?;
        ensure!(
            dialled(&cloud, "10.1.0.1:10250", NAME)? == "edge1\n",
            "by the tunnel"
        );
        site.server.redirect("--remove", None)?;
        Ok(())
    });
}

#[test]
fn what_is_always_dialled_by_a_plain_line_needs_us_for_nothing() {
    beside_an_apiserver(|lab, _runtime, api| {
        api.put(edge("edge1", &["10.1.0.1"]));
        api.put(edge("edge2", &["10.1.0.2"]));
        lay(lab)?;
        let site = site(lab, &door(), |config| {
            kubernetes(config, api, lab);
            config["lines"] = line("direct");
        })?;
        let cloud = lab.host("cloud")?;
        let rules = run_with(lab, site.server.config())?;
        until(&cloud, &["10.1.0.2"])?;
        let left_out = "# left out: 10.1.0.1 is always dialled past the tunnel, and left to whoever asks: edge1";
        ensure!(rules.log().contains(left_out), "{}", rules.log());
        ensure!(dialled(&cloud, "10.1.0.1:10250", NAME)? == "edge1\n");
        ensure!(dialled(&cloud, "10.1.0.2:10250", NAME)? == "edge2\n");
        let log = site.server.process().log();
        ensure!(!log.contains("10.1.0.1:10250"), "it came to us: {log}");

        // The annotation has it by the tunnel, and so led to us; another word, and it is not.
        let mut held = edge("edge1", &["10.1.0.1"]);
        held["metadata"]["annotations"] = json!({"corvid.io/path": "tunnel"});
        api.put(held);
        until(&cloud, &["10.1.0.1", "10.1.0.2"])?;
        ensure!(dialled(&cloud, "10.1.0.1:10250", NAME)? == "edge1\n");
        api.put(edge("edge1", &["10.1.0.1"]));
        until(&cloud, &["10.1.0.2"])?;
        ensure!(rules.terminate(lab::STOP)?.success(), "{}", rules.log());
        Ok(())
    });
}
