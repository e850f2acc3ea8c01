//! The `direct:` section: how what is not at the edge is dialled.

use std::fmt;
use std::num::NonZeroU32;

use serde::Deserialize;

use super::{Config, Elsewhere, Frontend};

/// How what is not at the edge is dialled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Direct {
    /// The mark of such connections, by which firewall rules tell them from others.
    pub mark: Option<Mark>,
}

/// A firewall mark (`SO_MARK`). Never 0, which is that of every connection that nobody has marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u32")]
pub struct Mark(NonZeroU32);

impl Mark {
    /// What `proxy-server redirect` exempts, and direct dials have beside an `intercept` frontend, unless
    /// `direct.mark` says another. Its bits are none of those that kube-proxy (0xc000), Calico (0xffff0000) and Cilium
    /// (0x0f00) use.
    pub const DEFAULT: Self = Self(NonZeroU32::new(0x20c5).unwrap());

    /// As the kernel takes it.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl TryFrom<u32> for Mark {
    type Error = &'static str;

    fn try_from(mark: u32) -> Result<Self, Self::Error> {
        let mark = NonZeroU32::new(mark).map(Self);
        mark.ok_or("a mark must not be 0, which is that of every connection without one")
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl Config {
    /// The mark by which rules tell our direct dials from the connections that they lead to us.
    #[must_use]
    pub fn mark(&self) -> Mark {
        self.direct.mark.unwrap_or(Mark::DEFAULT)
    }

    /// Whether rules of this machine may lead a direct dial, or one by a line, back to us, so that it should have a mark.
    #[must_use]
    pub fn may_meet_itself(&self) -> bool {
        let direct = |frontend: &Frontend| {
            matches!(
                frontend,
                Frontend::HttpConnect {
                    default: Elsewhere::Direct,
                    ..
                } | Frontend::Konnectivity {
                    default: Elsewhere::Direct,
                    ..
                }
            )
        };
        let led_to = |frontend: &Frontend| matches!(frontend, Frontend::Intercept(intercept) if !intercept.transparent);
        (self.frontends.iter().any(direct) || self.has_paths()) && self.frontends.iter().any(led_to)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parse(text: &str) -> Result<Config, daemon::ConfigError> {
        daemon::config::parse(Path::new("x.yaml"), text)
    }

    #[test]
    fn a_mark_is_a_number_in_any_notation_but_never_0() {
        for (text, mark) in [
            ("", "0x20c5"),
            ("direct: {mark: 7}", "0x7"),
            ("direct: {mark: 0x4000}", "0x4000"),
            ("direct: {mark: 4294967295}", "0xffffffff"),
        ] {
            assert_eq!(parse(text).unwrap().mark().to_string(), mark, "{text}");
        }
        for text in [
            "direct: {mark: 0}",
            "direct: {mark: 4294967296}",
            "direct: {mark: -1}",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        let error = parse("direct: {mark: 0}").unwrap_err().to_string();
        assert!(error.contains("must not be 0"), "{error}");
    }

    #[test]
    fn only_beside_an_intercepting_frontend_a_direct_dial_may_come_back() {
        let connect =
            |default| format!("- {{type: httpConnect, listen: 'unix:/x', default: {default}}}\n");
        let intercept = |transparent| {
            format!("- {{type: intercept, listen: '[::]:1', transparent: {transparent}}}\n")
        };
        for (frontends, may) in [
            (connect("direct"), false),
            (connect("direct") + &intercept(false), true),
            (connect("direct") + &intercept(true), false),
            (connect("refuse") + &intercept(false), false),
            (
                "- {type: konnectivity, listen: 'unix:/x', default: direct}\n".to_owned()
                    + &intercept(false),
                true,
            ),
        ] {
            let config = parse(&format!("frontends:\n{frontends}")).unwrap();
            assert_eq!(config.may_meet_itself(), may, "{frontends}");
        }
    }
}
