//! The pod that each node runs for the tests: one container for each kind of thing that is asked of it.

use serde_json::{Value, json};

use super::content;
pub use super::image::BUSYBOX;
use super::image::FOR_EVER;

/// Lines of `book`'s log: 50 MB.
pub const BOOK_LINES: u64 = 100_000;
/// There once `book` has written its log.
pub const WRITTEN: &str = "/tmp/written";
/// Lines of the file that `web` serves: 1 MB.
pub const WEB_LINES: u64 = 2_000;
/// Lines of `firehose`: 100 MB, more than all buffers on the way could hold.
pub const FIREHOSE_LINES: u64 = 200_000;
/// Where `web` listens in the pod.
pub const WEB_PORT: u16 = 8080;
/// Where `echo` listens in the pod.
pub const ECHO_PORT: u16 = 7777;

/// The pod of a node.
#[must_use]
pub fn name(node: &str) -> String {
    format!("box-{node}")
}

/// Its specification.
///
/// * `tools` sleeps; commands are run in it
/// * `book` has written a long log
/// * `ticker` writes a numbered line each few milliseconds, for ever
/// * `web` serves a file by HTTP, `echo` sends back what it gets
/// * `firehose` writes as fast as it can, once something is written to `/tmp/go`
#[must_use]
pub fn pod(node: &str) -> Value {
    let book = content::awk(node, BOOK_LINES);
    let web = content::awk(node, WEB_LINES);
    let firehose = content::awk(node, FIREHOSE_LINES);
    let containers = json!([
        container("tools", &format!("exec sleep {FOR_EVER}")),
        container(
            "book",
            &format!("{book}; >{WRITTEN}; exec sleep {FOR_EVER}")
        ),
        container("ticker", &ticker(node)),
        serving(&web),
        container("echo", &format!("exec nc -ll -p {ECHO_PORT} -e cat")),
        container(
            "firehose",
            &format!("mkfifo /tmp/go; read -r _ </tmp/go; {firehose}; exec sleep {FOR_EVER}")
        ),
    ]);
    of_node(&name(node), node, &containers)
}

/// A pod that serves what `web` serves, and nothing else.
#[must_use]
pub fn web(name: &str, node: &str) -> Value {
    of_node(
        name,
        node,
        &json!([serving(&content::awk(node, WEB_LINES))]),
    )
}

/// The name of [`listener`].
#[must_use]
pub fn listener_name(node: &str) -> String {
    format!("listener-{node}")
}

/// A pod that repeats what it hears on its standard input, to the end of it: good for one who attaches to it.
#[must_use]
pub fn listener(node: &str) -> Value {
    let heard = format!("{node} heard");
    let script =
        format!("while read -r line; do echo \"{heard} $line\"; done; echo {heard} the end");
    let mut container = container("listener", &script);
    if let Some(container) = container.as_object_mut() {
        container.insert("stdin".to_owned(), json!(true));
        // The first one who attaches brings the container's input, and its end.
        container.insert("stdinOnce".to_owned(), json!(true));
    }
    of_node(&listener_name(node), node, &json!([container]))
}

/// A pod that is put onto a node, and ends at once when it is deleted.
fn of_node(name: &str, node: &str, containers: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "nodeName": node,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": 0,
            "restartPolicy": "Never",
            "containers": containers,
        },
    })
}

fn container(name: &str, script: &str) -> Value {
    json!({
        "name": name,
        "image": BUSYBOX,
        "imagePullPolicy": "Never",
        "command": ["/bin/sh", "-c", script],
    })
}

/// Serves what `web` prints as `/lines`, at a port that it declares, as no other container does.
fn serving(web: &str) -> Value {
    let script = format!("mkdir /www; {web} >/www/lines; exec httpd -f -p {WEB_PORT} -h /www");
    let mut container = container("web", &script);
    if let Some(container) = container.as_object_mut() {
        container.insert("ports".to_owned(), json!([{"containerPort": WEB_PORT}]));
    }
    container
}

/// Some fifty lines a second.
fn ticker(node: &str) -> String {
    let rest = content::rest(node);
    format!("i=0; while :; do printf '%08d {rest}\\n' $i; i=$((i+1)); usleep 20000; done")
}
