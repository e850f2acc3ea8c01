//! What keeps `redirect` from its work is said, and nothing is half done.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use e2e::lab;
use e2e::process::{self, Spawn};
use serde_json::{Value, json};

use super::host::{CHECKED, EDGES, beside_an_apiserver, run, table, until};
use crate::intercept::{SOON, door, each_reaches_its_own, routes, site};

/// What a command of the cloud says that is not to succeed.
fn fails(command: Command) -> Result<(i32, String)> {
    let Output { status, stderr, .. } = process::output(command, lab::START)?;
    let code = status.code().context("ended by a signal")?;
    Ok((code, String::from_utf8_lossy(&stderr).into_owned()))
}

#[test]
fn what_hinders_it_is_said() {
    beside_an_apiserver(|lab, runtime, api| {
        let cloud = lab.host("cloud")?;
        let program = lab::binary("proxy-server")?;
        let base = json!({
            "name": "proxy-1", "stateDir": lab.dir().join("state"), "frontends": [door()],
            "routes": [{"node": "edge1", "addresses": ["10.1.0.1"]}],
            "kubernetes": {"kubeconfig": api.kubeconfig(lab.dir())},
        });
        let file = |name: &str, edit: &dyn Fn(&mut Value)| {
            let mut config = base.clone();
            edit(&mut config);
            lab.config(name, &config)
        };
        let good = file("good", &|_| {})?;
        let redirect = |before: &[&str], what: &str, config: &Path| {
            // `env` alone changes nothing.
            let mut command = cloud.command("env");
            command.args(before).arg(&program);
            command.args(["redirect", what, "--config"]).arg(config);
            command
        };
        let unprivileged = ["setpriv", "--bounding-set", "-net_admin"];
        let without_nft = [
            "unshare",
            "-m",
            "--",
            "sh",
            "-c",
            "mount -t tmpfs none /usr/sbin && PATH=/usr/bin:/bin exec \"$@\"",
            "sh",
        ];
        for (command, code, said) in [
            (
                redirect(&unprivileged, "--apply", &good),
                1,
                "needs CAP_NET_ADMIN",
            ),
            (
                redirect(&unprivileged, "--run", &good),
                1,
                "needs CAP_NET_ADMIN",
            ),
            (
                redirect(&unprivileged, "--remove", &good),
                1,
                "needs CAP_NET_ADMIN",
            ),
            (
                redirect(&without_nft, "--apply", &good),
                1,
                "install the package nftables",
            ),
            (
                redirect(&without_nft, "--run", &good),
                1,
                "install the package nftables",
            ),
            (
                redirect(
                    &[],
                    "--apply",
                    &file("no-frontend", &|config| config["frontends"] = json!([]))?,
                ),
                64,
                "no `intercept` frontend",
            ),
            (
                redirect(
                    &[],
                    "--run",
                    &file("transparent", &|config| {
                        config["frontends"][0]["transparent"] = json!(true);
                    })?,
                ),
                64,
                "no `intercept` frontend",
            ),
            (
                redirect(
                    &[],
                    "--dry-run",
                    &file("no-kubeconfig", &|config| {
                        config["kubernetes"]["kubeconfig"] = json!("/nowhere");
                    })?,
                ),
                1,
                "read the kubeconfig",
            ),
            (
                redirect(&[], "--dry-run", Path::new("/nowhere")),
                64,
                "read /nowhere",
            ),
        ] {
            let shown = format!("{command:?}");
            let (ended, words) = fails(command)?;
            ensure!(
                ended == code && words.contains(said),
                "{shown}: {ended}: {words}"
            );
            ensure!(table(&cloud)?.is_none(), "{shown}: there is a table");
        }
        // Showing needs no privilege.
        let nobody = [
            "setpriv",
            "--reuid",
            "65534",
            "--clear-groups",
            "--bounding-set",
            "-all",
        ];
        std::fs::set_permissions(
            lab.dir(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )?;
        let shown = process::output(redirect(&nobody, "--dry-run", &good), lab::START)?;
        ensure!(shown.status.success(), "{shown:?}");
        ensure!(
            String::from_utf8_lossy(&shown.stdout).contains("10.1.0.1"),
            "{shown:?}"
        );
        runtime.block_on(api.down());
        let (ended, words) = fails(redirect(&[], "--apply", &good))?;
        ensure!(
            ended == 1 && words.contains("could not be listed within 15 s: "),
            "{words}"
        );
        ensure!(table(&cloud)?.is_none(), "there is a table");
        Ok(())
    });
}

#[test]
fn a_table_that_somebody_else_owns_is_told_once_and_put_back_when_it_is_free() {
    lab::scenario(|lab| {
        let site = site(lab, &door(), routes)?;
        let cloud = lab.host("cloud")?;
        let rules = run(lab, &site.server)?;
        until(&cloud, &EDGES)?;
        // An owned table can be changed by its owner alone, and is gone with it.
        let script = "(echo 'delete table inet corvid_redirect'; \
            echo 'add table inet corvid_redirect { flags owner; }'; sleep 1000) | nft -i";
        let owner = Spawn::new("owner", "sh")
            .args(["-c", script])
            .host(&cloud)
            .start(lab.dir())?;
        let said = rules.wait_for_line("the rules can't be kept right", CHECKED)?;
        ensure!(
            said.contains("nft refused the rules") && said.contains("not permitted"),
            "{said}"
        );
        let owned = cloud.run("nft", &["list", "table", "inet", "corvid_redirect"])?;
        ensure!(
            owned.contains("flags owner") && !owned.contains("chain"),
            "{owned}"
        );
        let apply = site.server.redirect("--apply", None);
        let refused = apply.unwrap_or_else(|error| format!("{error:#}"));
        ensure!(
            refused.contains("proxy-server: nft refused the rules"),
            "{refused}"
        );
        owner.kill()?;
        until(&cloud, &EDGES)?;
        rules.wait_for_line("the rules can be kept right again", SOON)?;
        let times = rules.log().matches("can't be kept right").count();
        ensure!(times == 1, "told {times} times");
        each_reaches_its_own(&cloud)
    });
}
