//! Who may ask for what, and as a reload changes it.

use tokio::net::UnixStream;
use tokio::task::JoinSet;

use super::requester::{Call, close, data};
use super::{idle, wire};
use crate::stack::{Stack, allow, configuration_of, echo, reloaded, rewrite, text};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_rules_are_for_new_dials_of_a_call_that_is_open_too() {
    let mut edge = JoinSet::new();
    let port = echo(&mut edge).await;
    let dir = tempfile::tempdir().unwrap();
    let uid = nix::unistd::geteuid().as_raw();
    let frontend = format!(
        "- {{type: konnectivity, listen: 'unix:{}/konnectivity.sock', default: direct, \
         allow: [{{uids: [{uid}], nodes: [edge1], elsewhere: true, ports: [{port}]}}]}}\n",
        dir.path().display()
    );
    let file = configuration_of(dir.path(), &frontend, "");
    let mut stack = Stack::start_with(dir, &file);
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let mut call = Call::alone(&stack).await;
    let to = format!("edge1:{port}");
    let id = call.dial(&to, 1).await.unwrap();
    let before = text(&file);
    rewrite(&file, &before.replace("nodes: [edge1]", "nodes: [edge7]"));
    stack.reload.reload();
    reloaded(&stack, 1.0).await;
    let said = call.dial(&to, 2).await.unwrap_err();
    assert!(said.contains("may not ask for it"), "{said}");
    // The connection that is open goes on.
    call.say(data(id, "still here")).await;
    assert_eq!(call.bytes(id, 10).await, b"still here");
    // What is not at the edge is dialled no more either.
    let elsewhere = format!("localhost:{port}");
    let said = call.dial(&elsewhere, 3).await.unwrap_err();
    assert!(
        said.contains("may not be dialled") || said.contains("never dialled"),
        "{said}"
    );
    rewrite(&file, &before.replace("default: direct, ", ""));
    stack.reload.reload();
    reloaded(&stack, 2.0).await;
    let said = call.dial(&elsewhere, 4).await.unwrap_err();
    assert!(said.contains("no node at the edge"), "{said}");
    let id = call.dial(&to, 5).await.unwrap();
    call.say(close(id)).await;
    call.closed(id).await;
    drop(call);
    idle(&stack).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whom_no_rule_names_is_told_so_once_and_holds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let other = nix::unistd::geteuid().as_raw() + 1;
    let frontend = format!(
        "- {{type: konnectivity, listen: 'unix:{}/konnectivity.sock', allow: [{{uids: [{other}], nodes: ['*'], ports: ['1-65535']}}]}}\n",
        dir.path().display()
    );
    // Nothing ends because it is late.
    let more = "timeouts: {header: 10m}\nroutes: [{node: edge1}]";
    let file = configuration_of(dir.path(), &frontend, more);
    let stack = Stack::start_with(dir, &file);
    let mut call = Call::alone(&stack).await;
    let said = call.dial("edge1:10250", 1).await.unwrap_err();
    assert!(said.contains("may not ask for it"), "{said}");
    assert!(call.heard().await.unwrap().is_none(), "the call goes on");
    // What is no dial is not even read.
    let mut call = Call::alone(&stack).await;
    call.say(data(1, vec![0; 1 << 20])).await;
    // The end comes with an error where it overtakes what was sent.
    let heard = call.heard().await;
    assert!(!matches!(heard, Ok(Some(_))), "it was read: {heard:?}");
    // Nor is there room for more than a call.
    let mut silent = UnixStream::connect(stack.dir.path().join("konnectivity.sock"))
        .await
        .unwrap();
    assert_eq!(wire::most_calls(&mut silent).await, Some(1));
    stack.stop().await;
}
