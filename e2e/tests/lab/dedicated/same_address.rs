//! The same private address at the line's site and at a site of the internet, and where the cloud's routes lead: a
//! different answer is planted on each.

use anyhow::{Result, ensure};
use e2e::client::Door;
use e2e::lab::{Lab, Server};
use e2e::link::IpLink;
use e2e::process::Process;
use proto::Reason;
use serde_json::{Value, json};

use super::{SOON, kubelet, until};
use crate::api::Api;
use crate::redirect::host::{beside_an_apiserver, edge, kubernetes, node};
use crate::steps::name_of;

/// What three machines have.
const SHARED: &str = "192.168.1.10";
const BY_LINE: &str = "the site of the line";

/// Everybody who has the address.
struct Sites {
    _kubelets: [Process; 3],
    line: IpLink,
}

/// `edge1` is at the internet, with an agent; `plant` at the end of the line, without one; and the cloud's own routes
/// lead to neither.
fn sites(lab: &Lab, api: &Api) -> Result<Sites> {
    let (cloud, inet) = (lab.host("cloud")?, lab.host("inet")?);
    let plant = lab.net().add("plant")?;
    let line = IpLink::lay(
        (&cloud, "line0", "10.40.0.1/30"),
        (&plant, "line0", "10.40.0.2/30"),
        7,
    )?;
    plant.ip(&format!("addr add {SHARED}/32 dev lo"))?;
    inet.ip(&format!("addr add {SHARED}/32 dev lo"))?;
    let labels =
        json!({"openyurt.io/is-edge-worker": "true", "apps.openyurt.io/nodepool": "plants"});
    api.put(node("plant", &labels, &[SHARED]));
    api.put(edge("edge1", &[SHARED]));
    Ok(Sites {
        _kubelets: [
            kubelet(lab, "plant", BY_LINE, SHARED)?,
            kubelet(lab, "inet", "a stranger", SHARED)?,
            lab.kubelet("edge1")?,
        ],
        line,
    })
}

fn server(lab: &Lab, api: &Api, line: &Value) -> Result<Server> {
    lab.server(|config| {
        kubernetes(config, api, lab);
        config["lines"] = json!([line]);
    })
}

/// `edge1` is reached by its agent and by nothing else.
fn is_itself(door: &Door) -> Result<()> {
    for _ in 0..3 {
        let who = name_of(door, "edge1")?;
        ensure!(who == "edge1", "{who} answers for edge1");
    }
    Ok(())
}

/// By the address alone nobody can be meant.
fn address_is_refused(door: &Door) -> Result<()> {
    let refusal = door.refusal(&format!("{SHARED}:10250"))?;
    ensure!(
        refusal.status == Reason::AmbiguousDestination.http_status(),
        "{refusal}"
    );
    for name in ["edge1", "plant"] {
        ensure!(refusal.sentence.contains(name), "{refusal}");
    }
    Ok(())
}

#[test]
fn without_an_interface_an_address_that_two_sites_have_is_dialled_by_no_line() {
    beside_an_apiserver(|lab, _runtime, api| {
        let sites = sites(lab, api)?;
        for mode in ["auto", "direct"] {
            // Even where the routes lead to the right one: nothing says so.
            let line = json!({"name": "express", "pools": ["plants"], "mode": mode});
            let server = server(lab, api, &line)?;
            let door = server.door();
            let _agent = lab.agent(&server, "edge1", |_| {})?;
            until(&door, "edge1", "edge1")?;
            let refusal = door.refusal("plant:10250")?;
            let (reason, said) = match mode {
                "auto" => (Reason::NoSession, "no session"),
                _ => (
                    Reason::AmbiguousDestination,
                    "192.168.1.10 is also that of node edge1, and no interface of a line says which is meant",
                ),
            };
            ensure!(refusal.status == reason.http_status(), "{refusal}");
            ensure!(refusal.sentence.contains(said), "{refusal}");
            is_itself(&door)?;
            address_is_refused(&door)?;
            let told = server.explain("plant")?.to_string();
            ensure!(told.contains("also that of node edge1"), "{told}");
            ensure!(server.stop(SOON)?.success(), "{}", server.process().log());
            // Another state: the next server is another.
            std::fs::remove_dir_all(lab.dir().join("server"))?;
            std::fs::remove_dir_all(lab.dir().join("edge1"))?;
        }
        ensure!(
            sites.line.counts().forwarded == 0,
            "something went over the line"
        );
        Ok(())
    });
}

#[test]
fn with_an_interface_an_address_that_two_sites_have_leads_to_the_one_at_its_end() {
    beside_an_apiserver(|lab, _runtime, api| {
        let sites = sites(lab, api)?;
        let line = json!({"name": "express", "pools": ["plants"], "interface": "line0"});
        let server = server(lab, api, &line)?;
        let door = server.door();
        let _agent = lab.agent(&server, "edge1", |_| {})?;
        until(&door, "edge1", "edge1")?;
        for _ in 0..5 {
            let who = name_of(&door, "plant")?;
            ensure!(who == BY_LINE, "{who} answers for plant");
            is_itself(&door)?;
        }
        address_is_refused(&door)?;

        // With the line cut there is nobody: neither the other site nor the one where the routes lead.
        sites.line.cut();
        let refusal = door.refusal("plant:10250")?;
        ensure!(
            refusal
                .sentence
                .contains("dialled 192.168.1.10:10250 by line express"),
            "{refusal}"
        );
        is_itself(&door)?;
        // The interface gone, as after a restart of a VPN: neither.
        lab.host("cloud")?.ip("link del line0")?;
        let refusal = door.refusal("plant:10250")?;
        ensure!(refusal.sentence.contains("No such device"), "{refusal}");
        is_itself(&door)
    });
}
