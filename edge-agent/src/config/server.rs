//! Where a proxy-server is, and over what it is reached there: the internet, or a dedicated line.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use daemon::Problems;
use proto::{Destination, IdError, LineName};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// With one over the internet that is three sessions with a server, which keeps four of an agent (`limits.sessionsPerAgent`):
/// one may take the place of another before that one ends.
const MOST_LINES: usize = 2;

/// A proxy-server at one of its addresses; as text `[LINE=]HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// By name or address.
    pub address: Destination,
    /// The dedicated line by which that address is reached.
    pub line: Option<LineName>,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = &self.line {
            write!(f, "{line}=")?;
        }
        self.address.fmt(f)
    }
}

/// As it is written: `HOST:PORT`, `LINE=HOST:PORT` or `{address, line}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Written {
    address: String,
    line: Option<String>,
}

impl From<&str> for Written {
    fn from(text: &str) -> Self {
        match text.split_once('=') {
            Some((line, address)) => Self {
                address: address.to_owned(),
                line: Some(line.to_owned()),
            },
            None => Self {
                address: text.to_owned(),
                line: None,
            },
        }
    }
}

impl<'de> Deserialize<'de> for Written {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Shape)
    }
}

/// Tells text from a table; an untagged enum could not say what is wrong with a table.
struct Shape;

impl<'de> Visitor<'de> for Shape {
    type Value = Written;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HOST:PORT or {address: HOST:PORT, line: NAME}")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Written, E> {
        Ok(text.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Written, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            address: String,
            line: Option<String>,
        }
        let Table { address, line } = Table::deserialize(MapAccessDeserializer::new(map))?;
        Ok(Written { address, line })
    }
}

/// What they mean.
pub(super) fn servers(written: &[Written], problems: &mut Problems) -> Vec<Server> {
    problems.check(
        !written.is_empty(),
        "servers",
        "at least one proxy-server is needed",
    );
    let mut servers: Vec<Server> = Vec::new();
    let mut first: BTreeMap<Destination, Option<LineName>> = BTreeMap::new();
    for (i, Written { address, line }) in written.iter().enumerate() {
        let line = line.as_deref().map(|line| {
            let key = format!("servers[{i}].line");
            read::<LineName>(problems, &key, line)
        });
        let address = read::<Destination>(problems, &format!("servers[{i}]"), address);
        let (Some(address), None | Some(Some(_))) = (address, &line) else {
            continue;
        };
        let line = line.flatten();
        let before = first.entry(address.clone()).or_insert_with(|| line.clone());
        problems.check(
            *before == line,
            format!("servers[{i}]"),
            format!("{address} stands here before, with another line or without one"),
        );
        servers.push(Server { address, line });
    }
    let lines: BTreeSet<_> = servers.iter().filter_map(|it| it.line.as_ref()).collect();
    problems.check(
        lines.len() <= MOST_LINES,
        "servers",
        format!("{} lines, and at most {MOST_LINES} may be", lines.len()),
    );
    servers
}

fn read<T: FromStr<Err = IdError>>(problems: &mut Problems, key: &str, text: &str) -> Option<T> {
    text.parse()
        .map_err(|error| problems.push(key, format_args!("`{text}`: {error}")))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::super::tests::read;

    fn shown(servers: &str) -> Result<Vec<String>, String> {
        let config = read(&format!("name: a\nservers: {servers}\n"));
        let config = config.map_err(|error| error.to_string())?;
        Ok(config.servers.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_server_is_an_address_or_one_with_the_line_that_leads_there() {
        let written = "[proxy.example.com:8443, {address: '10.0.0.1:8443', line: express}, {address: b:1}, 'vpn=[::1]:2']";
        let meant = [
            "proxy.example.com:8443",
            "express=10.0.0.1:8443",
            "b:1",
            "vpn=[::1]:2",
        ];
        assert_eq!(shown(written).unwrap(), meant);
        // Several addresses by one line, as of several servers.
        let same = "[{address: '10.0.0.1:1', line: l}, {address: '10.0.0.2:1', line: l}, {address: '10.0.0.3:1', line: l}]";
        assert_eq!(shown(same).unwrap().len(), 3);
    }

    #[test]
    fn mistakes_in_servers_are_told_one_by_one() {
        let told = shown(
            "[{address: proxy, line: Express}, {address: 'a:1', line: ''}, 'b:1', 'l=b:1', 'l=[::ffff:10.0.0.1]:1', \
             '10.0.0.1:1', '=c:1']",
        )
        .unwrap_err();
        for wanted in [
            "servers[0].line: `Express`: the name is not",
            "servers[0]: `proxy`: the port is missing",
            "servers[1].line: ``",
            "servers[3]: b:1 stands here before",
            "servers[5]: 10.0.0.1:1 stands here before",
            "servers[6].line: ``",
        ] {
            assert!(told.contains(wanted), "{wanted} is missing in {told}");
        }
        let many = shown("['a=h:1', 'b=h:2', 'c=h:3']").unwrap_err();
        assert!(many.contains("3 lines, and at most 2 may be"), "{many}");
        assert!(shown("[]").unwrap_err().contains("at least one"));
    }

    #[test]
    fn a_table_that_is_none_of_a_server_is_a_mistake_with_its_line() {
        for (wrong, wanted) in [
            ("[{address: 'a:1', lines: express}]", "lines"),
            ("[{line: express}]", "address"),
            ("[7]", "HOST:PORT or {address: HOST:PORT, line: NAME}"),
        ] {
            let told = shown(wrong).unwrap_err();
            let at = told.starts_with("agent.yaml:2:");
            assert!(at && told.contains(wanted), "{wrong}: {told}");
        }
    }
}
