//! With `path.probes.tls` a node on a line must answer, not only take connections.

use certs::test_ca::TestCa;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::api::Api;
use crate::cluster::start;
use crate::intercept::kubelet;
use crate::line::{LINE, kubelet_at, route, until_at_least};
use crate::stack::{DEADLINE, Stack};

const PROBES: &str = "path: {stable: 1s, probes: {interval: 200ms, timeout: 150ms, tls: true}}\n";

/// A server that looks at a node on the line `express`, and what the node listens at.
async fn probed(api: &Api) -> (Stack, TcpListener) {
    let listener = TcpListener::bind("127.0.0.9:0").await.unwrap();
    api.put(kubelet_at(listener.local_addr().unwrap().port()));
    let more = format!(
        "kubernetes: {{kubeconfig: KUBECONFIG}}\n{LINE}{PROBES}routes: [{}]",
        route("edge1", "127.0.0.9")
    );
    (start(api, &more), listener)
}

fn probes(result: &str) -> String {
    format!("corvid_line_probes_total{{line=\"express\",result=\"{result}\"}}")
}

fn nodes(state: &str) -> String {
    format!("corvid_line_nodes{{line=\"express\",state=\"{state}\"}}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_answers_a_probe_in_tls_is_up_whoever_it_is() {
    let api = Api::start().await;
    let (stack, listener) = probed(&api).await;
    let mut tasks = JoinSet::new();
    kubelet(&mut tasks, listener, &TestCa::new(), "of-nobody-we-know");
    until_at_least(&stack, &probes("ok"), 5.0).await;
    until_at_least(&stack, &nodes("up"), 1.0).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_answers_a_probe_in_other_words_than_tls_is_up() {
    let api = Api::start().await;
    let (stack, listener) = probed(&api).await;
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut hello = [0; 16];
            stream.read_exact(&mut hello).await.ok();
            stream
                .write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n")
                .await
                .ok();
        }
    });
    until_at_least(&stack, &probes("ok"), 5.0).await;
    until_at_least(&stack, &nodes("up"), 1.0).await;
    stack.stop().await;
}

/// Requests that are connected all the while do not make up for the answer that does not come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_takes_a_probe_and_does_not_answer_is_down() {
    let api = Api::start().await;
    let (stack, listener) = probed(&api).await;
    let to = format!("edge1:{}", listener.local_addr().unwrap().port());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut taken = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            taken.push(stream);
        }
    });
    let is_down = async {
        while stack.metric(&nodes("down")).await < 1.0 {
            stack.connect(&to).await.ok();
        }
    };
    tokio::time::timeout(DEADLINE, is_down).await.unwrap();
    assert!(stack.metric(&probes("dial_timeout")).await >= 2.0);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_takes_a_probe_and_hangs_up_is_down() {
    let api = Api::start().await;
    let (stack, listener) = probed(&api).await;
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { while listener.accept().await.is_ok() {} });
    until_at_least(&stack, &probes("dial_failed"), 2.0).await;
    until_at_least(&stack, &nodes("down"), 1.0).await;
    stack.stop().await;
}
