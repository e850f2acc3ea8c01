//! The images: what is in them, and that their programs run with nothing else.
//!
//! arm64 is looked at where it was built (`make images ARCH=arm64`), under qemu on other machines; with `CI=true` it must be.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::client::{Door, Tunnel};
use e2e::cluster::tools;
use e2e::kubelet::Behaviour;
use e2e::lab::{self, Lab, START};
use e2e::manifests::text;
use e2e::process::{Process, Spawn};
use e2e::{pattern, wait};
use serde_json::{Value, json};

use crate::archive::{Image, NOBODY};

/// The names of all images.
const IMAGES: [&str; 3] = ["proxy-server", "proxy-server-redirect", "edge-agent"];
/// An emulated agent starts and shakes hands within this.
const SLOW: Duration = Duration::from_secs(120);
/// What a download through the tunnel has.
const BYTES: u64 = 4 << 20;
/// The server's name, known to nobody but the DNS server of the lab.
const NAME: &str = "proxy.corvid.example";

/// The machines whose images are there.
fn machines() -> Vec<&'static str> {
    let must = |arch: &&str| {
        let built = Image::archive("edge-agent", arch).exists();
        built || *arch == "amd64" || std::env::var("CI").is_ok_and(|ci| ci == "true")
    };
    ["amd64", "arm64"].into_iter().filter(must).collect()
}

#[test]
fn images_hold_one_program_and_run_as_nobody() {
    for arch in machines() {
        for name in IMAGES {
            let image = Image::unpack(name, arch).unwrap_or_else(|error| panic!("{error:#}"));
            let what = format!("{name} for {arch}");
            let redirect = name == "proxy-server-redirect";
            let user = if redirect {
                "0:0".to_owned()
            } else {
                format!("{NOBODY}:{NOBODY}")
            };
            assert_eq!(text(&image.config, "/config/User"), user, "{what}");
            assert_eq!(text(&image.config, "/architecture"), arch, "{what}");
            let tag = format!("localhost/corvid/{name}:{}", env!("CARGO_PKG_VERSION"));
            assert_eq!(image.tags, [tag], "{what}");
            let files: BTreeSet<_> = image.files().unwrap().into_iter().collect();
            let program = format!("bin/{}", name.trim_end_matches("-redirect"));
            if redirect {
                // nft, what it is linked to, and what loads that.
                let rest = files.iter().filter(|file| **file != program);
                let (mut nft, mut libraries) = (0, 0);
                for file in rest {
                    nft += usize::from(file == "usr/sbin/nft");
                    libraries += usize::from(file.contains(".so."));
                }
                assert_eq!((nft, nft + libraries + 1), (1, files.len()), "{files:?}");
            } else {
                assert_eq!(files, [program.clone()].into(), "{what}");
            }
            let port = if name == "edge-agent" {
                "9441/tcp"
            } else {
                "9440/tcp"
            };
            let exposed = image.config.pointer("/config/ExposedPorts");
            assert!(
                exposed.is_some_and(|ports| ports.get(port).is_some()),
                "{what}"
            );
        }
    }
}

#[test]
fn programs_of_images_say_their_version_and_check_configurations() {
    lab::scenario(|lab| {
        let cloud = lab.host("cloud")?;
        for arch in machines() {
            for name in IMAGES {
                let image = Image::unpack(name, arch)?;
                let version = image.run(&cloud, &["--version"])?;
                ensure!(
                    version.trim().ends_with(env!("CARGO_PKG_VERSION")),
                    "{version:?}"
                );
                let pin = format!("sha256:{}", "0".repeat(64));
                let config = if name == "edge-agent" {
                    json!({"name": "edge1", "servers": ["a:1"], "join": {"tokenFile": "/t", "caPin": pin}})
                } else {
                    json!({"name": "proxy-1"})
                };
                image.mount("/etc/corvid/it.yaml", config.to_string())?;
                image.run(&cloud, &["check-config", "--config", "/etc/corvid/it.yaml"])?;
                image.mount("/etc/corvid/it.yaml", r#"{"nonsense": 1}"#)?;
                let refused =
                    image.run(&cloud, &["check-config", "--config", "/etc/corvid/it.yaml"]);
                let refused = format!("{:#}", refused.err().context("nonsense is taken")?);
                ensure!(refused.contains("nonsense"), "{refused}");
            }
        }
        Ok(())
    });
}

/// A DNS server in the cloud that knows the proxy-server's name, and nothing else.
fn dns(lab: &Lab) -> Result<Process> {
    let corefile =
        format!(".:53 {{\n bind 203.0.113.10\n log\n hosts {{\n  203.0.113.10 {NAME}\n }}\n}}\n");
    let file = lab.dir().join("Corefile");
    std::fs::write(&file, corefile)?;
    let dns = Spawn::new("coredns", tools()?.join("coredns"))
        .arg("-conf")
        .arg(file)
        .host(&lab.host("cloud")?)
        .start(lab.dir())?;
    dns.wait_for_line("CoreDNS-", START)?;
    Ok(dns)
}

/// What a runtime puts into a container's `/etc`.
fn resolver(image: &Image) -> Result<()> {
    image.mount("/etc/hosts", "127.0.0.1 localhost\n")?;
    image.mount(
        "/etc/resolv.conf",
        "nameserver 203.0.113.10\nsearch corvid.svc.cluster.local\noptions ndots:5\n",
    )
}

/// A proxy-server out of its image.
fn server(lab: &Lab, image: &Image) -> Result<Process> {
    let config = json!({
        "stateDir": "/var/lib/corvid", "name": "proxy-1",
        "frontends": [{"type": "httpConnect", "listen": "unix:/run/corvid/connect.sock"}],
        "admin": {"listen": "127.0.0.1:9442", "socket": "/run/corvid/admin.sock"},
    });
    image.mount("/etc/corvid/proxy-server.yaml", config.to_string())?;
    image.empty_dir("/var/lib/corvid")?;
    image.empty_dir("/run/corvid")?;
    resolver(image)?;
    let process = image
        .spawn("proxy-server", &lab.host("cloud")?, &["run"])?
        .start(lab.dir())?;
    process.wait_for_line("ready", START)?;
    Ok(process)
}

/// An agent out of its image, enrolled by a token of the server.
fn agent(lab: &Lab, image: &Image, server: &Image) -> Result<Process> {
    let cloud = lab.host("cloud")?;
    let token = server.run(&cloud, &["token", "create", "--agents", "edge1"])?;
    let token = token.lines().next().context("no token")?.to_owned();
    let shown = server.run(&cloud, &["cert", "show"])?;
    let pin = shown
        .split_whitespace()
        .find(|word| word.starts_with("sha256:"));
    let config = json!({
        "name": "edge1", "servers": [format!("{NAME}:8443")],
        "join": {"tokenFile": "/etc/corvid/token", "caPin": pin.context("no pin")?},
    });
    image.mount("/etc/corvid/edge-agent.yaml", config.to_string())?;
    image.mount("/etc/corvid/token", token)?;
    image.empty_dir("/var/lib/corvid-agent")?;
    resolver(image)?;
    let run = ["run", "--config", "/etc/corvid/edge-agent.yaml"];
    image
        .spawn("edge-agent", &lab.host("edge1")?, &run)?
        .start(lab.dir())
}

/// Names from the node and content from the stand-in kubelet, through both.
fn reached(door: &Door) -> Result<()> {
    let ask = || -> Result<Tunnel> { Ok(door.connect("edge1:10250")??) };
    let mut tunnel = wait::poll(SLOW, "edge1 is reached", ask)?;
    writeln!(tunnel, "{}", Behaviour::Name)?;
    ensure!(tunnel.line()? == "edge1");
    let mut tunnel = door.open(
        "edge1:10250",
        Behaviour::Send {
            bytes: BYTES,
            seed: 7,
        },
    )?;
    let (content, _) = tunnel.read_out();
    ensure!(
        content == pattern::expected(BYTES, 7),
        "not what was sent: {content}"
    );
    Ok(())
}

/// No shell, no loader, no `/proc`, no user database: a hosts file and a resolv.conf, as a runtime makes them.
#[test]
fn an_agent_in_its_image_finds_its_server_by_name_and_serves() {
    for arch in machines() {
        lab::scenario(|lab| {
            let _kubelet = lab.kubelet("edge1")?;
            let _dns = dns(lab)?;
            let (in_cloud, at_edge) = (
                Image::unpack("proxy-server", "amd64")?,
                Image::unpack("edge-agent", arch)?,
            );
            let server = server(lab, &in_cloud)?;
            let agent = agent(lab, &at_edge, &in_cloud)?;
            reached(&Door::Unix(in_cloud.root().join("run/corvid/connect.sock")))?;
            let cloud = lab.host("cloud")?;
            let sessions = in_cloud.run(&cloud, &["status", "--json"])?;
            let sessions: Value = serde_json::from_str(&sessions)?;
            ensure!(text(&sessions, "/0/agent") == "edge1", "{sessions}");
            ensure!(agent.terminate(SLOW)?.success(), "the agent failed");
            ensure!(server.terminate(SLOW)?.success(), "the server failed");
            lab::measured(&format!("{arch}: enrolled by name, served, stopped"));
            Ok(())
        });
    }
}

/// The rules of `redirect` are made by the `nft` in the image.
#[test]
fn the_redirect_image_makes_rules_with_the_nft_that_it_has() {
    lab::scenario(|lab| {
        let cloud = lab.host("cloud")?;
        let image = Image::unpack("proxy-server-redirect", "amd64")?;
        let any = json!([{"from": ["0.0.0.0/0"], "nodes": ["*"], "ports": [10250]}]);
        let config = json!({
            "name": "proxy-1",
            "frontends": [{"type": "intercept", "listen": "127.0.0.1:10350", "port": 10250, "allow": any}],
            "routes": [{"node": "edge1", "addresses": ["192.168.1.10"]}],
        });
        image.mount("/etc/corvid/proxy-server.yaml", config.to_string())?;
        image.run(&cloud, &["redirect", "--apply"])?;
        let rules = cloud.run("nft", &["list", "ruleset"])?;
        ensure!(
            rules.contains("192.168.1.10") && rules.contains("redirect to :10350"),
            "{rules}"
        );
        image.run(&cloud, &["redirect", "--remove"])?;
        let rules = cloud.run("nft", &["list", "ruleset"])?;
        ensure!(!rules.contains("corvid"), "{rules}");
        Ok(())
    });
}
