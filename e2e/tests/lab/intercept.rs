//! Interception by original destination: a client dials nodes' addresses and knows nothing of any tunnel; rules of the
//! control plane's host (`proxy-server redirect`, or TPROXY by hand) lead it to the proxy-server. The stand-in kubelet speaks neither TLS nor HTTP, so nothing but the
//! address that was dialled says which node is meant.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::lab::{self, Agent, Lab, Server};
use e2e::net::Host;
use e2e::process::Process;
use serde_json::{Value, json};

/// Longest wait for an answer.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// What the stand-in answers with its name.
pub(crate) const NAME: &str = "name\n";
/// A request that names nobody.
pub(crate) const NAMELESS: &str = "GET / HTTP/1.1\r\n\r\n";

/// What a client on that host reads when it dials `to` and says that.
pub(crate) fn dialled(host: &Host, to: &str, say: &str) -> Result<String> {
    let to: SocketAddr = to.parse()?;
    let ask = || -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(say.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    host.enter(ask)?.with_context(|| format!("dialling {to}"))
}

/// Where connections of the cloud host itself are led to, in both families.
pub(crate) fn door() -> Value {
    json!({
        "type": "intercept", "listen": "[::]:10250",
        "allow": [{"from": ["203.0.113.10", "fd01::10"], "nodes": ["*"], "ports": [10250]}],
    })
}

/// Two nodes that are known by two addresses of each family, and one address that they share.
pub(crate) struct Site {
    _agents: [Agent; 2],
    _kubelets: [Process; 2],
    pub(crate) server: Server,
}

/// With this frontend and these other settings.
pub(crate) fn site(lab: &Lab, door: &Value, edit: impl FnOnce(&mut Value)) -> Result<Site> {
    let server = lab.server(|config| {
        if let Some(frontends) = config["frontends"].as_array_mut() {
            frontends.push(door.clone());
        }
        edit(config);
    })?;
    // Both families between the cloud and the internet's router.
    let (cloud, inet) = (lab.host("cloud")?, lab.host("inet")?);
    cloud.ip("addr add fd01::10/64 dev wan nodad")?;
    inet.ip("addr add fd01::1/64 dev cloud0 nodad")?;
    cloud.ip("-6 route add default via fd01::1")?;
    let agent = |name: &str, own: [&str; 2]| {
        lab.agent(&server, name, |config| {
            config["nodeAddresses"] = json!(own);
            config["localhostPorts"] = json!([10250]);
        })
    };
    Ok(Site {
        _kubelets: [lab.kubelet("edge1")?, lab.kubelet("edge2")?],
        _agents: [
            agent("edge1", ["10.1.0.1", "fd00::1"])?,
            agent("edge2", ["10.1.0.2", "fd00::2"])?,
        ],
        server,
    })
}

pub(crate) fn routes(config: &mut Value) {
    config["routes"] = json!([
        {"node": "edge1", "addresses": ["10.1.0.1", "fd00::1", "192.168.1.10"]},
        {"node": "edge2", "addresses": ["10.1.0.2", "fd00::2", "192.168.1.10"]},
    ]);
}

/// Each address leads to its node.
pub(crate) fn each_reaches_its_own(client: &Host) -> Result<()> {
    for _ in 0..3 {
        for (address, node) in [
            ("10.1.0.1:10250", "edge1\n"),
            ("10.1.0.2:10250", "edge2\n"),
            ("[fd00::1]:10250", "edge1\n"),
            ("[fd00::2]:10250", "edge2\n"),
        ] {
            let said = dialled(client, address, NAME)?;
            ensure!(said == node, "{address} says {said:?}");
        }
    }
    Ok(())
}

pub(crate) fn is_told(client: &Host, to: &str, wanted: &str) -> Result<()> {
    let said = dialled(client, to, NAMELESS)?;
    ensure!(said.starts_with(wanted), "{to} says {said:?}");
    Ok(())
}

#[test]
fn a_redirect_on_the_control_planes_host_leads_to_the_node_that_was_dialled() {
    lab::scenario(|lab| {
        let site = site(lab, &door(), routes)?;
        let cloud = lab.host("cloud")?;
        let shown = site.server.redirect("--apply", None)?;
        let left_out = "192.168.1.10 is shared by nodes that different agents serve: edge1, edge2";
        ensure!(shown.contains(left_out), "{shown}");
        // Services, as kube-proxy makes them, and the address that the command leaves out.
        cloud.nft(
            "table inet led_here {
                chain out {
                    type nat hook output priority -100;
                    ip daddr 192.168.1.10 tcp dport 10250 redirect to :10250
                    ip daddr 10.96.0.7 tcp dport 10250 dnat ip to 203.0.113.10:10250
                    ip6 daddr fd96::7 tcp dport 10250 dnat ip6 to [fd01::10]:10250
                }
            }",
        )?;
        each_reaches_its_own(&cloud)?;
        // What is left of a Service is its ClusterIP: no node's address.
        is_told(
            &cloud,
            "10.96.0.7:10250",
            "HTTP/1.1 403 no node is named, and 10.96.0.7:10250 is no node's address",
        )?;
        is_told(
            &cloud,
            "[fd96::7]:10250",
            "HTTP/1.1 403 no node is named, and [fd96::7]:10250 is no node's address",
        )?;
        // Dialled as it is, or by an address that two nodes share.
        is_told(
            &cloud,
            "203.0.113.10:10250",
            "HTTP/1.1 403 no node is named, and there is no original destination",
        )?;
        is_told(
            &cloud,
            "192.168.1.10:10250",
            "HTTP/1.1 409 address 192.168.1.10 is that of nodes edge1 and edge2",
        )?;
        let audited = "reason=\"ambiguous_destination\"";
        site.server.process().wait_for_line(audited, SOON)?;
        Ok(())
    });
}

#[test]
fn tproxy_hands_over_connections_of_other_hosts_as_they_were_dialled() {
    lab::scenario(|lab| {
        let door = json!({
            "type": "intercept", "listen": "[::]:10251", "port": 10250, "transparent": true,
            "allow": [{"from": ["203.0.113.1", "fd01::1"], "nodes": ["*"], "ports": [10250]}],
        });
        let _site = site(lab, &door, routes)?;
        let (cloud, inet) = (lab.host("cloud")?, lab.host("inet")?);
        inet.ip("route add 10.1.0.0/24 via 203.0.113.10")?;
        inet.ip("-6 route add fd00::/64 via fd01::10")?;
        for family in ["-4", "-6"] {
            cloud.ip(&format!("{family} rule add fwmark 1 lookup 100"))?;
            cloud.ip(&format!(
                "{family} route add local default dev lo table 100"
            ))?;
        }
        cloud.nft(
            "table inet led_here {
                chain pre {
                    type filter hook prerouting priority mangle;
                    ip daddr 10.1.0.0/24 tcp dport 10250 tproxy ip to :10251 meta mark set 1 accept
                    ip6 daddr fd00::/64 tcp dport 10250 tproxy ip6 to :10251 meta mark set 1 accept
                }
            }",
        )?;
        each_reaches_its_own(&inet)?;
        is_told(
            &inet,
            "203.0.113.10:10251",
            "HTTP/1.1 403 no node is named, and there is no original destination",
        )
    });
}
