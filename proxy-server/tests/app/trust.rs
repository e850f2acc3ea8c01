//! The roots that agents in pods mount, and what is left alone of objects that are written.

use certs::{Clock, Pin, TrustBundle};
use proxy_server::commands;
use serde_json::json;

use crate::api::Api;
use crate::authority::{SECRET, kept, pin, put, start};
use crate::rotation::{DAY, command};
use crate::stack::eventually;
const TRUST: &str = "corvid/corvid-trust";

/// The roots that agents in pods mount, as pins.
fn trusted(api: &Api) -> Option<Vec<Pin>> {
    let map = api.object("configmaps", TRUST)?;
    let bundle = TrustBundle::from_pem(map["data"]["ca.crt"].as_str()?.as_bytes()).unwrap();
    Some(bundle.pins().to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_roots_are_kept_in_a_config_map_and_nothing_else_of_it_is_touched() {
    let api = Api::start().await;
    let stack = start(&api).await;
    eventually("the roots are written", || {
        trusted(&api) == Some(vec![pin(&stack)])
    })
    .await;

    // Somebody else adds what is theirs, and breaks what is ours.
    let mut map = api.object("configmaps", TRUST).unwrap();
    map["data"] = json!({"ca.crt": "nonsense", "other.crt": "theirs"});
    map["metadata"]["labels"] = json!({"team": "theirs"});
    map["metadata"]["annotations"]["corvid.io/ca-pin"] = json!("another");
    api.set("configmaps", TRUST, map);
    let repaired = || {
        let map = api.object("configmaps", TRUST).unwrap();
        map["data"]["ca.crt"] != "nonsense"
    };
    eventually("the roots are repaired", repaired).await;
    let map = api.object("configmaps", TRUST).unwrap();
    assert_eq!(map["data"]["other.crt"], "theirs");
    assert_eq!(map["metadata"]["labels"]["team"], "theirs");
    let own = pin(&stack).to_string();
    assert_eq!(map["metadata"]["annotations"]["corvid.io/ca-pin"], own);

    api.remove("configmaps", TRUST);
    eventually("the roots are written again", || {
        trusted(&api) == Some(vec![pin(&stack)])
    })
    .await;

    // A rotation: both roots until the old one's leaves are gone.
    let rotated = kept(&api).rotate(DAY, Clock::system().now()).unwrap();
    put(&api, &rotated);
    let both = || trusted(&api).is_some_and(|pins| pins.len() == 2 && pins[0] == rotated.pin());
    eventually("both roots are trusted", both).await;
    let writes = |what: &str| {
        api.writes()
            .iter()
            .filter(|write| write.what == what)
            .count()
    };
    let before = (writes("PATCH configmaps"), api.asked("GET configmaps"));
    eventually("it is looked at again", || {
        api.asked("GET configmaps") > before.1 + 2
    })
    .await;
    assert_eq!(
        writes("PATCH configmaps"),
        before.0,
        "it is written again and again"
    );
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roots_that_can_not_be_written_stop_nothing_and_are_written_later() {
    let api = Api::start().await;
    api.refuse("configmaps", 403);
    let stack = start(&api).await;
    eventually("it is tried", || api.asked("GET configmaps") > 1).await;
    assert!(stack.metric("corvid_authority_failures_total").await > 0.0);
    assert_eq!(trusted(&api), None);
    // The Secret is followed all the same.
    let rotated = kept(&api).rotate(DAY, Clock::system().now()).unwrap();
    put(&api, &rotated);
    eventually("it is taken over", || pin(&stack) == rotated.pin()).await;
    api.refuse_nothing();
    eventually("both roots are written", || {
        trusted(&api).is_some_and(|pins| pins.len() == 2)
    })
    .await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_touches_no_label_and_no_key_of_others() {
    let api = Api::start().await;
    let stack = start(&api).await;
    let mut secret = api.object("secrets", SECRET).unwrap();
    secret["metadata"]["labels"]["team"] = json!("theirs");
    secret["data"]["theirs"] = json!("eA==");
    api.set("secrets", SECRET, secret);
    let before = kept(&api).pin();
    let rotated = command(&stack, |args| commands::ca_rotate(args, None)).await;
    rotated.unwrap();
    let secret = api.object("secrets", SECRET).unwrap();
    assert_ne!(kept(&api).pin(), before);
    assert_eq!(secret["metadata"]["labels"]["team"], "theirs");
    assert_eq!(secret["data"]["theirs"], "eA==");
    stack.stop().await;
}
