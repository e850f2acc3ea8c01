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
        line: String::new(),
    };
    assert_eq!(
        control(Body::Hello(hello.clone())),
        "1f0a1d080110011a0565646765312201782a01793207088020108080403a017a"
    );
    let hello = pb::Hello {
        line: "l".into(),
        ..hello
    };
    assert_eq!(
        control(Body::Hello(hello)),
        "220a20080110011a0565646765312201782a01793207088020108080403a017a42016c"
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
        servers: 0,
    };
    assert_eq!(
        control(Body::HelloAck(ack.clone())),
        "18121608011201731a01702201783207088020108080403801"
    );
    let ack = pb::HelloAck { servers: 2, ..ack };
    assert_eq!(
        control(Body::HelloAck(ack)),
        "1a121808011201731a017022017832070880201080804038014002"
    );
}

#[test]
fn announce() {
    let agent = |agent: &str, state, lost_ms, reason| pb::AnnouncedAgent {
        agent: agent.into(),
        state,
        lost_ms,
        reason,
    };
    let announce = pb::Announce {
        agents: vec![
            agent("a", 1, 0, 0),
            agent("b", 2, 300, 17),
            agent("c", 0, 0, 0),
        ],
        complete: true,
    };
    assert_eq!(
        control(Body::Announce(announce)),
        "1c321a0a050a016110010a0a0a0162100218ac0220110a030a01631001"
    );
}

#[test]
fn servers() {
    assert_eq!(
        control(Body::Servers(pb::Servers { servers: 3 })),
        "043a020803"
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
        ..pb::StreamHeader::default()
    };
    assert_eq!(hex(&header), "0d0a056564676531108a5018904e");
}

#[test]
fn stream_header_about_a_pod() {
    let header = pb::StreamHeader {
        host: "10.2.0.5".into(),
        port: 80,
        deadline_ms: 10_000,
        pod: Some(pb::PodPort {
            pod: "d/w".into(),
            node: "e1".into(),
            declared: true,
        }),
        ..pb::StreamHeader::default()
    };
    assert_eq!(
        hex(&header),
        "1c0a0831302e322e302e35105018904e4a0b0a03642f77120265311801"
    );
}

#[test]
fn stream_header_to_a_peer() {
    let header = pb::StreamHeader {
        host: "edge1".into(),
        port: 10_250,
        deadline_ms: 10_000,
        trace: String::new(),
        hops: 1,
        agent: "a".into(),
        node: "n".into(),
        requester: "uid/0".into(),
        ..pb::StreamHeader::default()
    };
    assert_eq!(
        hex(&header),
        "1c0a056564676531108a5018904e28013201613a016e42057569642f30"
    );
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
