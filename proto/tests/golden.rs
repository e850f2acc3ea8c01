//! The bytes of every wire message. A change here is a change of the protocol.

use proto::wire::pb::control_frame::Body;
use proto::wire::{encode, pb};

fn hex(message: &impl prost::Message) -> String {
    encode(message)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn control(body: Body) -> String {
    hex(&pb::ControlFrame { body: Some(body) })
}

fn limits() -> Option<pb::Limits> {
    Some(pb::Limits {
        max_streams: 4096,
        stream_window: 1 << 20,
    })
}

#[test]
fn hello() {
    let hello = pb::Hello {
        min_version: 1,
        max_version: 1,
        agent: "edge1".into(),
        software: "x".into(),
        capabilities: vec!["y".into()],
        limits: limits(),
        instance: "z".into(),
    };
    assert_eq!(
        control(Body::Hello(hello)),
        "1f0a1d080110011a0565646765312201782a01793207088020108080403a017a"
    );
}

#[test]
fn hello_ack() {
    let ack = pb::HelloAck {
        version: 1,
        session: "s".into(),
        server: "p".into(),
        software: "x".into(),
        capabilities: vec![],
        limits: limits(),
        server_time_ms: 1,
    };
    assert_eq!(
        control(Body::HelloAck(ack)),
        "18121608011201731a01702201783207088020108080403801"
    );
}

#[test]
fn keepalives() {
    assert_eq!(
        control(Body::Keepalive(pb::Keepalive { sequence: 300 })),
        "051a0308ac02"
    );
    assert_eq!(
        control(Body::KeepaliveAck(pb::KeepaliveAck { sequence: 300 })),
        "05220308ac02"
    );
}

#[test]
fn go_away() {
    let away = pb::GoAway {
        reason: 5,
        deadline_ms: 30_000,
        retry_after_ms: 1,
        detail: "d".into(),
    };
    assert_eq!(control(Body::GoAway(away)), "0d2a0b080510b0ea011801220164");
}

#[test]
fn stream_header() {
    let header = pb::StreamHeader {
        host: "edge1".into(),
        port: 10_250,
        deadline_ms: 10_000,
        trace: String::new(),
    };
    assert_eq!(hex(&header), "0d0a056564676531108a5018904e");
}

#[test]
fn stream_reply() {
    assert_eq!(
        hex(&pb::StreamReply {
            reason: 0,
            detail: String::new()
        }),
        "00"
    );
    assert_eq!(
        hex(&pb::StreamReply {
            reason: 49,
            detail: "no".into()
        }),
        "06083112026e6f"
    );
}
