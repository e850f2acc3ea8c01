use super::*;
use crate::policy::PodPorts;

const PIN: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

pub(super) fn read(text: &str) -> Result<Config, ConfigError> {
    parse(Path::new("agent.yaml"), text, &Overrides::default())
}

#[test]
fn the_smallest_configuration_has_every_default() {
    let text = format!(
        "name: edge1\nservers: ['proxy.example.com:8443']\njoin: {{tokenFile: /t, caPin: '{PIN}'}}\n"
    );
    let config = read(&text).unwrap();
    assert_eq!(config.state_dir, Path::new("/var/lib/corvid-agent"));
    assert_eq!(config.servers[0].to_string(), "proxy.example.com:8443");
    assert_eq!(config.memory, 20 << 20);
    assert_eq!(config.pods.ports, PodPorts::Declared);
    assert_eq!(config.timeouts.dial, Duration::from_secs(10));
    assert_eq!(config.backoff.max, Duration::from_secs(30));
    assert_eq!(config.drain.grace, Duration::from_secs(30));
    assert_eq!(config.observe.to_string(), "tcp:0.0.0.0:9441");
    assert_eq!(config.admin.to_string(), "tcp:127.0.0.1:9443");
    assert!(matches!(
        config.join,
        Some(Join {
            token: TokenSource::File(_),
            ..
        })
    ));
}

#[test]
fn all_mistakes_of_meaning_are_listed_at_once() {
    let text = "
name: Edge_1!
servers: ['proxy', 'proxy:0']
join: {token: a.b, caPin: md5:00}
credential: {certificate: a, key: b, ca: c}
localhostPorts: [0]
allow: [{cidr: 10.0.0.0/33, ports: []}, {cidr: 10.0.0.1, ports: ['9-1', 0, x]}]
pods: {nodes: [lathe, Press, 'a b']}
memory: 1KiB
timeouts: {dial: 0s, halfOpen: 0s}
backoff: {min: 1ms, max: 0s}
admin: {listen: '0.0.0.0:9443'}
log: {level: 'a=b=c'}
";
    let error = read(text).unwrap_err();
    let ConfigError::Invalid { problems, .. } = &error else {
        panic!("{error}")
    };
    let keys: Vec<_> = problems
        .iter()
        .map(|problem| problem.path.as_str())
        .collect();
    for key in [
        "name",
        "servers[0]",
        "servers[1]",
        "join.token",
        "join.caPin",
        "pods.nodes[1]",
        "pods.nodes[2]",
        "localhostPorts[0]",
        "allow[0].cidr",
        "allow[0].ports",
        "allow[1].ports",
        "memory",
        "timeouts.dial",
        "timeouts.halfOpen",
        "backoff.min",
        "backoff.max",
        "admin.listen",
        "log.level",
    ] {
        assert!(keys.contains(&key), "{key} is missing in {keys:?}");
    }
    assert_eq!(error.exit().code(), 64);
}

#[test]
fn join_and_credential_exclude_each_other() {
    let text = format!(
        "name: a\nservers: ['b:1']\njoin: {{tokenFile: /t, caPin: '{PIN}'}}\ncredential: {{certificate: a, key: b, ca: c}}\n"
    );
    assert!(read(&text).unwrap_err().to_string().contains("not both"));
}

#[test]
fn a_mistake_of_syntax_is_reported_with_its_line() {
    let error = read("name: a\nservres: []\n").unwrap_err().to_string();
    assert!(error.starts_with("agent.yaml:2:1: "), "{error}");
}

#[test]
fn flags_and_variables_go_before_the_file() {
    let overrides = Overrides {
        name: Some("edge9".into()),
        state_dir: Some("/s".into()),
        servers: vec!["[::1]:1".into(), "vpn=other:2".into()],
        node_addresses: vec!["10.0.0.7".parse().unwrap()],
        join_token: Some("abcdef.0123456789abcdef".to_owned().into()),
        join_token_file: None,
        service_account_token_file: Some("/not/this".into()),
        ca_pin: Some(PIN.into()),
        ca_file: None,
        log_format: Some(LogFormat::Json),
        log_level: Some("debug".into()),
    };
    let text = "name: edge1\nservers: ['proxy:1']\nnodeAddresses: [10.0.0.1]\nlog: {level: warn}\n";
    let config = parse(Path::new("agent.yaml"), text, &overrides).unwrap();
    assert_eq!(
        (config.name.as_str(), config.state_dir.as_path()),
        ("edge9", Path::new("/s"))
    );
    let servers: Vec<_> = config.servers.iter().map(Server::to_string).collect();
    assert_eq!(servers, ["[::1]:1", "vpn=other:2"]);
    assert_eq!(config.node_addresses, overrides.node_addresses);
    assert_eq!(
        (config.log_level.as_str(), config.log_format),
        ("debug", LogFormat::Json)
    );
    assert!(matches!(
        config.join,
        Some(Join {
            token: TokenSource::Value(_),
            ..
        })
    ));
    assert!(
        !format!("{config:?}").contains("0123456789abcdef\""),
        "the token is in no debug output"
    );
}

#[test]
fn a_pod_joins_with_its_account_and_a_file_of_roots() {
    let join = |join: &str| read(&format!("name: a\nservers: ['b:1']\njoin: {join}\n"));
    let config = join("{serviceAccountTokenFile: /t, caFile: /ca}").unwrap();
    let Some(Join { token, anchor }) = config.join else {
        panic!("no join")
    };
    assert!(matches!(token, TokenSource::ServiceAccount(_)));
    assert!(matches!(anchor, Anchor::File(_)));
    // Each goes with each.
    join(&format!("{{serviceAccountTokenFile: /t, caPin: '{PIN}'}}")).unwrap();
    join("{tokenFile: /t, caFile: /ca}").unwrap();
    for (bad, wanted) in [
        (
            "{serviceAccountTokenFile: /t, tokenFile: /u, caFile: /ca}",
            "give one of",
        ),
        (
            &*format!("{{tokenFile: /t, caFile: /ca, caPin: '{PIN}'}}"),
            "either caPin or caFile",
        ),
        ("{serviceAccountTokenFile: /t}", "this or caFile is needed"),
        ("{}", "is needed"),
    ] {
        let error = join(bad).unwrap_err().to_string();
        assert!(error.contains(wanted), "{bad}: {error}");
    }
    let overrides = Overrides {
        service_account_token_file: Some("/t".into()),
        ca_file: Some("/ca".into()),
        ..Overrides::default()
    };
    let text = format!("name: a\nservers: ['b:1']\njoin: {{tokenFile: /u, caPin: '{PIN}'}}\n");
    let config = parse(Path::new("agent.yaml"), &text, &overrides).unwrap();
    let join = config.join.unwrap();
    assert!(matches!(join.token, TokenSource::ServiceAccount(_)));
    assert!(matches!(join.anchor, Anchor::File(_)));
}

#[test]
fn ports_are_numbers_and_ranges() {
    let text = "name: a\nservers: ['b:1']\nallow: [{cidr: 192.168.1.0/24, ports: [9100, '10000-10100']}, {cidr: 'fd00::1', ports: ['80']}]\n";
    let config = read(text).unwrap();
    assert_eq!(config.allow[0].ports, [9100..=9100, 10_000..=10_100]);
    assert_eq!(config.allow[1].cidr.to_string(), "fd00::1/128");
}

#[test]
fn keys_that_need_a_restart_are_named() {
    let old = read("name: a\nservers: ['b:1']\n").unwrap();
    let new =
        read("name: a\nservers: ['c:1']\nmemory: 30MiB\nadmin: {listen: '127.0.0.1:1'}\n").unwrap();
    assert_eq!(old.fixed_differences(&new), ["memory", "admin"]);
}
