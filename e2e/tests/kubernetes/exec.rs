//! `kubectl exec` and `kubectl attach`.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::content::{HashCheck, noise, sha256};
use e2e::cluster::{Cluster, NODES, Running, pods};
use parking_lot::Mutex;
use tokio::time::Instant;

/// For one answer of a program in a container.
const DEADLINE: Duration = Duration::from_secs(30);
/// For 100 MB there and back.
const LONG_DEADLINE: Duration = Duration::from_secs(180);

/// Sends a megabyte, whose hash comes back only after the end of input has reached the container.
pub(super) fn stdin<T>(cluster: &Cluster<T>) -> Result<String> {
    for node in NODES {
        let sent = noise(node.len() as u64, 1_000_003);
        let pod = pods::name(node);
        let script = "sha256sum; hostname";
        let args = ["exec", "-i", &pod, "-c", "tools", "--", "sh", "-c", script];
        let mut kubectl = cluster.kubectl().start(&args)?;
        kubectl.write(&sent)?;
        kubectl.close_stdin();
        let text = String::from_utf8(kubectl.finish(DEADLINE)?)?;
        let wanted = format!("{}  -\n{pod}\n", sha256(&sent));
        ensure!(
            text == wanted,
            "{node} answers {text:?} in place of {wanted:?}"
        );
    }
    Ok("1 MB to each node".to_owned())
}

pub(super) fn exit_codes<T>(cluster: &Cluster<T>) -> Result<String> {
    let pod = pods::name("edge1");
    let cases = [
        ("true", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -9 $$", 137),
    ];
    for (script, code) in cases {
        let script = format!("echo to be ended; {script}");
        let args = ["exec", &pod, "-c", "tools", "--", "sh", "-c", &script];
        let output = cluster.kubectl().output(&args)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(code),
            "{script}: {}: {errors}",
            output.status
        );
        ensure!(output.stdout == b"to be ended\n", "{script}: {output:?}");
        let told = format!("command terminated with exit code {code}");
        ensure!(code == 0 || errors.contains(&told), "{script}: {errors}");
    }
    Ok(format!("{} codes", cases.len()))
}

/// A shell on a terminal, whose size is changed from outside while it runs.
pub(super) fn terminal<T>(cluster: &Cluster<T>) -> Result<String> {
    let pod = pods::name("edge2");
    let tty = cluster.dir().join("tty");
    // script makes the terminal that kubectl runs on, and ends with kubectl's status.
    let inner = format!(
        "tty >{}; stty rows 40 cols 100; exec $kubectl exec -it {pod} -c tools -- sh",
        tty.display()
    );
    let command = cluster
        .kubectl()
        .shell(&format!("exec script -qefc '{inner}' /dev/null"));
    let mut shell = Running::start("kubectl exec on a terminal", command)?;
    shell.wait_for("# ", DEADLINE)?;
    // The terminal echoes what is typed: answers are spelled otherwise than questions.
    shell.write(b"[ -t 0 ] && [ -t 1 ] && echo is''aterminal; echo size: $(stty size)\n")?;
    let text = shell.wait_for("size: 40 100", DEADLINE)?;
    ensure!(text.contains("isaterminal"), "no terminal: {text:?}");

    let path = std::fs::read_to_string(&tty).context("the name of the terminal")?;
    let mut stty = Command::new("stty");
    stty.args(["-F", path.trim(), "rows", "51", "cols", "132"]);
    ensure!(stty.status()?.success(), "stty -F {path}");
    shell
        .write(b"until [ \"$(stty size)\" = '51 132' ]; do usleep 50000; done; echo re''sized\n")?;
    shell.wait_for("resized", DEADLINE)?;

    // An interrupt is a byte to the terminal and a signal in the container.
    shell.write(b"echo a''sleep; sleep 1000\n")?;
    shell.wait_for("asleep", DEADLINE)?;
    shell.write(b"\x03")?;
    shell.write(b"echo status $?\n")?;
    shell.wait_for("status 130", DEADLINE)?;
    shell.write(b"exit 3\n")?;
    let status = shell.wait(DEADLINE)?;
    ensure!(status.code() == Some(3), "{status}: {}", shell.text());
    Ok("40x100, then 51x132, interrupt, exit 3".to_owned())
}

/// 100 MB into `cat` and out again, both ways at once.
pub(super) fn cat<T>(cluster: &Cluster<T>) -> Result<String> {
    const LENGTH: usize = 100_000_000;
    let sent = noise(100, LENGTH);
    let start = Instant::now();
    let hash = Arc::new(Mutex::new(HashCheck::default()));
    let sink = Arc::clone(&hash);
    let args = [
        "exec",
        "-i",
        &pods::name("edge1"),
        "-c",
        "tools",
        "--",
        "cat",
    ];
    let mut kubectl = cluster
        .kubectl()
        .start_into(&args, move |bytes| sink.lock().feed(bytes))?;
    kubectl.write(&sent)?;
    kubectl.close_stdin();
    kubectl.finish(LONG_DEADLINE)?;
    let seconds = start.elapsed().as_secs_f64();
    hash.lock().expect(&sent)?;
    Ok(format!(
        "{:.0} MB/s each way",
        LENGTH as f64 / 1e6 / seconds
    ))
}

/// Speaks to a container's own standard input, and hears its output. Its pods come for it and go with it.
pub(super) fn attach<T>(cluster: &Cluster<T>) -> Result<String> {
    for node in NODES {
        cluster.create(&pods::listener(node))?;
    }
    for node in NODES {
        let pod = pods::listener_name(node);
        cluster.wait_ready(&pod)?;
        let args = ["attach", "-i", &pod, "-c", "listener"];
        let mut kubectl = cluster.kubectl().start(&args)?;
        for word in ["one", "two", "three"] {
            kubectl.write(format!("{word}\n").as_bytes())?;
            kubectl.wait_for(&format!("{node} heard {word}\n"), DEADLINE)?;
        }
        kubectl.close_stdin();
        let text = String::from_utf8(kubectl.finish(DEADLINE)?)?;
        let wanted =
            ["one", "two", "three", "the end"].map(|word| format!("{node} heard {word}\n"));
        ensure!(text == wanted.concat(), "{text:?}");
        cluster.kubectl().ok(&["delete", "pod", &pod])?;
    }
    Ok("three words and the end of input to each node".to_owned())
}
