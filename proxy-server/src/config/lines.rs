//! The sections `lines:` and `path:`: ways to nodes beside the tunnel, and when they are taken.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use daemon::Problems;
use proto::LineName;
use serde::{Deserialize, Serialize};

use super::{Cidr, Config, Frontend, Mark};

/// What a line is called that nobody has configured: wherever the routes of this machine lead.
pub const ROUTE: &str = "route";
/// More lines than anybody has; each is a label of metrics.
const MOST_LINES: usize = 64;
/// What may be said of a silence.
const SILENCE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_hours(1);
/// Shortest `stable`.
const LEAST_STABLE: Duration = Duration::from_secs(1);
/// Shortest time-out of a probe.
const LEAST_TIMEOUT: Duration = Duration::from_millis(50);
/// Longest name of an interface (Linux, `IFNAMSIZ` without its zero).
const MOST_INTERFACE: usize = 15;

/// How nodes are reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PathMode {
    /// Through their agents' sessions.
    #[default]
    Tunnel,
    /// Dialled from here, always.
    Direct,
    /// Dialled from here while that works, else through the tunnel.
    Auto,
}

impl PathMode {
    /// The mode of that name, as in an annotation.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        [Self::Tunnel, Self::Direct, Self::Auto]
            .into_iter()
            .find(|mode| mode.label() == name)
    }

    /// As it is written.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Direct => "direct",
            Self::Auto => "auto",
        }
    }
}

impl fmt::Display for PathMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// A way to nodes that is not the tunnel: Express Connect, a VPN, a plain route.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Line {
    /// What people and metrics call it.
    pub name: String,
    /// It has what is dialled at an address in these. With `pools` both must hold.
    #[serde(default)]
    pub networks: Vec<Cidr>,
    /// It has the nodes of these pools.
    #[serde(default)]
    pub pools: Vec<String>,
    /// What is dialled comes from this address.
    #[serde(default)]
    pub source: Option<IpAddr>,
    /// What is dialled goes out by this interface or VRF, whatever the routes say: so the line says which site it reaches.
    #[serde(default)]
    pub interface: Option<String>,
    /// The mark of what is dialled.
    #[serde(default)]
    pub mark: Option<Mark>,
    /// How those that it has are reached, where nothing before it says so. With `tunnel` it is there for those of which
    /// something does.
    #[serde(default = "auto")]
    pub mode: PathMode,
}

const fn auto() -> PathMode {
    PathMode::Auto
}

impl Line {
    /// Whether what goes by it leaves as any connection does.
    #[must_use]
    pub const fn is_plain(&self) -> bool {
        self.source.is_none() && self.interface.is_none() && self.mark.is_none()
    }

    /// The line that nobody has configured.
    #[must_use]
    pub fn route() -> Self {
        Self {
            name: ROUTE.to_owned(),
            networks: Vec::new(),
            pools: Vec::new(),
            source: None,
            interface: None,
            mark: None,
            mode: PathMode::Auto,
        }
    }
}

/// When nodes are not reached by the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PathSettings {
    /// For nodes of which nothing else is said.
    pub default: PathMode,
    /// What a node says of itself counts for addresses that no line has.
    pub believe_nodes: bool,
    /// Without a connection by the line for so long, the tunnel is tried beside it.
    #[serde(with = "humantime_serde")]
    pub race_after: Duration,
    /// A line that was down is taken again after so long without a failure.
    #[serde(with = "humantime_serde")]
    pub stable: Duration,
    /// A connection over a line that is silent for so long is reset.
    #[serde(with = "humantime_serde")]
    pub silence: Duration,
    /// How lines are looked at.
    pub probes: Probes,
}

impl Default for PathSettings {
    fn default() -> Self {
        Self {
            default: PathMode::Tunnel,
            believe_nodes: false,
            race_after: Duration::from_millis(250),
            stable: Duration::from_secs(30),
            silence: Duration::from_secs(30),
            probes: Probes::default(),
        }
    }
}

/// How lines are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Probes {
    /// Each node on a line is dialled once in so long.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// A dial is given up after this.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// Dials a second at most, however many nodes there are.
    pub per_second: u32,
    /// Good ones in a row before a node that was down is up.
    pub rise: u32,
    /// Bad ones in a row before it is down.
    pub fall: u32,
    /// Whoever is connected to must answer to TLS, too.
    pub tls: bool,
}

impl Default for Probes {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(2),
            per_second: 100,
            rise: 3,
            fall: 2,
            tls: false,
        }
    }
}

impl Config {
    /// Whether any node may be reached by something else than the tunnel.
    #[must_use]
    pub fn has_paths(&self) -> bool {
        let of_pool = |kubernetes: &super::Kubernetes| {
            let mut pools = kubernetes.pools.values();
            pools.any(|pool| pool.path.is_some_and(|path| path != PathMode::Tunnel))
        };
        !self.lines.is_empty()
            || self.path.default != PathMode::Tunnel
            || self.path.believe_nodes
            || self.kubernetes.as_ref().is_some_and(of_pool)
    }
}

/// What is wrong with the lines and their settings.
pub(super) fn check(config: &Config, problems: &mut Problems) {
    problems.check(
        config.lines.len() <= MOST_LINES,
        "lines",
        format!("at most {MOST_LINES}"),
    );
    for (i, line) in config.lines.iter().enumerate() {
        let earlier = config.lines.iter().take(i);
        line.check(config, earlier, &format!("lines[{i}]"), problems);
    }
    let path = &config.path;
    for (key, value) in [
        ("path.raceAfter", path.race_after),
        ("path.stable", path.stable),
        ("path.silence", path.silence),
        ("path.probes.interval", path.probes.interval),
        ("path.probes.timeout", path.probes.timeout),
    ] {
        problems.check(!value.is_zero(), key, "must not be zero");
    }
    for (key, value) in [
        ("path.probes.perSecond", path.probes.per_second),
        ("path.probes.rise", path.probes.rise),
        ("path.probes.fall", path.probes.fall),
    ] {
        problems.check(value > 0, key, "must not be zero");
    }
    problems.check(
        path.race_after < config.timeouts.dial || !config.has_paths(),
        "path.raceAfter",
        "must be under timeouts.dial, or the tunnel has no time left",
    );
    problems.check(
        SILENCE.contains(&path.silence),
        "path.silence",
        "must be 1s to 1h: a lost packet takes a second to be sent again",
    );
    problems.check(
        path.stable >= LEAST_STABLE,
        "path.stable",
        "must be at least 1s: what bounces would be led back and forth",
    );
    problems.check(
        path.probes.timeout >= LEAST_TIMEOUT,
        "path.probes.timeout",
        "must be at least 50ms, or far nodes are never reached in time",
    );
    problems.check(
        path.probes.timeout <= path.probes.interval,
        "path.probes.timeout",
        "must not be longer than path.probes.interval",
    );
}

impl Line {
    fn check<'a>(
        &self,
        config: &Config,
        mut earlier: impl Iterator<Item = &'a Self> + Clone,
        key: &str,
        problems: &mut Problems,
    ) {
        let is_name = self.name.parse::<LineName>().is_ok();
        problems.check(
            is_name && self.name != ROUTE,
            format!("{key}.name"),
            format!(
                "{:?} is no name for a line: lower case letters, digits and -, and not {ROUTE:?}, which is this machine's own routes",
                self.name
            ),
        );
        problems.check(
            !earlier.clone().any(|other| other.name == self.name),
            format!("{key}.name"),
            format!("{:?} stands here twice", self.name),
        );
        let twin = earlier.find(|other| {
            (&other.networks, &other.pools) == (&self.networks, &self.pools)
                && !(self.networks.is_empty() && self.pools.is_empty())
        });
        problems.check(
            twin.is_none(),
            key,
            format!(
                "has what line {:?} has, so that neither would ever be taken",
                twin.map_or("", |twin| &twin.name)
            ),
        );
        problems.check(
            !(self.networks.is_empty() && self.pools.is_empty()),
            key,
            "say which nodes it has: networks, pools, or both",
        );
        problems.check(
            self.pools.is_empty() || config.kubernetes.is_some(),
            format!("{key}.pools"),
            "needs kubernetes, which says who is in which pool",
        );
        if let Some(interface) = &self.interface {
            let fits = (1..=MOST_INTERFACE).contains(&interface.len())
                && !interface.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control());
            problems.check(
                fits,
                format!("{key}.interface"),
                format!("{interface:?} is no name of an interface"),
            );
        }
        let led = config.frontends.iter().any(
            |frontend| matches!(frontend, Frontend::Intercept(settings) if !settings.transparent),
        );
        problems.check(
            !led || self.mark.is_none_or(|mark| mark == config.mark()),
            format!("{key}.mark"),
            format!(
                "beside an `intercept` frontend it must be that of direct.mark ({}), which `proxy-server redirect` exempts: else what is dialled would come back here",
                config.mark()
            ),
        );
        if let Some(source) = self.source {
            let fits = |net: &Cidr| net.0.addr().is_ipv4() == source.is_ipv4();
            problems.check(
                self.networks.iter().all(fits),
                format!("{key}.source"),
                format!("{source} and the networks are not of one family"),
            );
            problems.check(
                source == source.to_canonical()
                    && !source.is_unspecified()
                    && !source.is_multicast(),
                format!("{key}.source"),
                format!("{source} is no address of a machine"),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn problems(text: &str) -> String {
        let file = Path::new("x.yaml");
        let config: Config = match daemon::config::parse(file, text) {
            Ok(config) => config,
            Err(error) => return error.to_string(),
        };
        let mut problems = Problems::new();
        check(&config, &mut problems);
        if let Some(kubernetes) = &config.kubernetes {
            super::super::kubernetes::check(kubernetes, &mut problems);
        }
        match problems.into_result(file) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn lines_are_said_in_a_few_words() {
        let said = "kubernetes: {inCluster: true, pools: {hz: {path: direct}, bj: {agent: a, path: auto}}}\n\
            lines:\n- {name: express, networks: [10.20.0.0/16]}\n\
            - {name: vpn, pools: [hz], interface: wg0, source: 10.0.0.5, mark: 7, mode: direct}\n\
            - {name: spare, networks: [10.30.0.0/16], mode: tunnel}\n\
            path: {default: auto, believeNodes: true, stable: 10s, probes: {interval: 5s, perSecond: 20}}";
        assert_eq!(problems(said), "");
        assert_eq!(problems("name: a"), "");
    }

    #[test]
    fn every_mistake_is_told_with_its_key() {
        let said = problems(
            "frontends: [{type: intercept, listen: '[::]:10250'}]\n\
             lines:\n- {name: route, networks: [10.0.0.0/8]}\n- {name: a, pools: [hz]}\n- {name: a, networks: [10.0.0.0/8], source: '::1'}\n\
             - {name: 'No Name'}\n- {name: b, networks: [10.1.0.0/16], interface: a-name-that-is-too-long, mark: 7}\n\
             - {name: c, networks: [10.1.0.0/16]}\n- {name: d, networks: [10.2.0.0/16], source: 0.0.0.0}\n\
             path: {raceAfter: 20s, stable: 0s, silence: 10ms, probes: {interval: 1s, timeout: 2s, perSecond: 0, rise: 0, fall: 0}}",
        );
        for wanted in [
            "lines[0].name",
            "lines[1].pools",
            "lines[2].name: \"a\" stands here twice",
            "lines[2].source",
            "lines[3].name",
            "lines[3]: say which nodes",
            "lines[4].interface",
            "lines[4].mark: beside an `intercept` frontend it must be that of direct.mark (0x20c5)",
            "lines[5]: has what line \"b\" has",
            "lines[6].source: 0.0.0.0 is no address",
            "path.raceAfter",
            "path.stable",
            "path.silence",
            "path.probes.timeout",
            "path.probes.perSecond",
            "path.probes.rise",
            "path.probes.fall",
        ] {
            assert!(said.contains(wanted), "{wanted} is missing in: {said}");
        }
        let bare = problems("kubernetes: {inCluster: true, pools: {hz: {}}}");
        assert!(bare.contains("kubernetes.pools.hz: "), "{bare}");
        for (path, wanted) in [
            ("silence: 2h", "path.silence: must be"),
            ("stable: 10ms", "path.stable: must be"),
            ("probes: {timeout: 1ms}", "path.probes.timeout: must be"),
        ] {
            let said = problems(&format!("path: {{{path}}}"));
            assert!(said.contains(wanted), "{path}: {said}");
        }
    }

    #[test]
    fn a_short_dial_is_no_mistake_where_there_is_no_race() {
        let short = "timeouts: {dial: 200ms}\n";
        assert_eq!(problems(short), "");
        for more in [
            "path: {default: auto}",
            "lines: [{name: a, networks: [10.0.0.0/8]}]",
        ] {
            let said = problems(&format!("{short}{more}"));
            assert!(said.contains("path.raceAfter: must be under"), "{said}");
        }
    }

    #[test]
    fn paths_are_looked_at_only_where_something_is_said_of_them() {
        for (text, wanted) in [
            ("", false),
            ("path: {default: tunnel}", false),
            ("path: {default: auto}", true),
            ("path: {believeNodes: true}", true),
            ("lines: [{name: a, networks: [10.0.0.0/8]}]", true),
            ("kubernetes: {pools: {p: {agent: a, path: tunnel}}}", false),
            ("kubernetes: {pools: {p: {path: auto}}}", true),
        ] {
            let config: Config = daemon::config::parse(Path::new("x.yaml"), text).unwrap();
            assert_eq!(config.has_paths(), wanted, "{text}");
        }
    }
}
