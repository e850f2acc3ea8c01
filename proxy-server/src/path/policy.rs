//! How a node is reached: through the tunnel, or dialled from here by a line. Pure: what is said of the node and of lines
//! in, a decision and every rule that was looked at out.
//!
//! | rule, in this order | says | counts |
//! | --- | --- | --- |
//! | annotation `corvid.io/path` of the node | `tunnel`, `direct`, `auto` | `tunnel` always; the others where a configured line has the node's address, or with `path.believeNodes` |
//! | `kubernetes.pools.NAME.path` of its pool | the same | always |
//! | label `alibabacloud.com/interconnection-mode=private` of the node | the mode of the line that has it unless that is `tunnel`, else `auto` | as the annotation |
//! | a configured line has an address of the node | the line's mode | always |
//! | `path.default` | the same | always |
//!
//! A kubelet writes annotations and labels of its own Node, and its addresses: were it believed, it could lead what we
//! dial to whatever it claims as its address. So it only ever chooses among lines that the operator has given to those
//! addresses.
//!
//! | the path is not the tunnel, and | `auto` | `direct` |
//! | --- | --- | --- |
//! | one line has the address: most specific network first, then the one that names the pool too | by it | by it |
//! | none has it | as the routes of this machine lead (line `route`) | the same |
//! | two have it | tunnel | refused, both named |
//! | another node or pod has the address as well, and it is not certain that the line reaches this one alone | tunnel | refused, all named |
//! | the address is a Service's, of another proxy-server, or one where names at the edge point | tunnel | refused: what is dialled may come back here |
//! | no address is known | tunnel | refused |
//!
//! It is certain where the line has an interface, and the others are not reached by that: an address alone proves nothing,
//! and a bypass has no certificate of an agent that would.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::cluster::nodes::Wish;
use crate::config::{Config, Line, PathMode};

/// So many nodes that share an address are named.
const NAMED: usize = 5;

/// What the operator says.
#[derive(Debug, Clone)]
pub struct Policy {
    lines: Vec<Arc<Line>>,
    pools: BTreeMap<String, PathMode>,
    default: PathMode,
    believe_nodes: bool,
    /// Where no line is configured: the routes of this machine.
    route: Arc<Line>,
    is_idle: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            lines: Vec::new(),
            pools: BTreeMap::new(),
            default: PathMode::Tunnel,
            believe_nodes: false,
            route: Arc::new(Line::route()),
            is_idle: true,
        }
    }
}

/// Whom a decision is about.
#[derive(Debug, Clone, Copy, Default)]
pub struct Subject<'a> {
    /// What its annotation says.
    pub wish: Option<&'a Wish>,
    /// Its pool.
    pub pool: Option<&'a str>,
    /// It has ACK's label.
    pub is_private: bool,
    /// What may be dialled, best first: the node's addresses, or the one address that is meant.
    pub addresses: &'a [IpAddr],
}

/// Somebody else who has an address as well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimant {
    /// `node edge2`, `pod default/web on edge2`.
    pub name: String,
    /// The pool of its node.
    pub pool: Option<String>,
    /// It is an address by which requests come to servers like this one, or may be led to them: whatever line is taken to
    /// it, what is dialled could come back here, and so on until nothing is left to dial with.
    pub leads_back: bool,
}

/// A way past the tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bypass {
    /// By this line.
    pub line: Arc<Line>,
    /// To this address.
    pub address: IpAddr,
}

/// How a node is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Through its agent.
    Tunnel,
    /// By that and nothing else.
    Direct(Bypass),
    /// By that while it works, else through its agent.
    Auto(Bypass),
    /// By a line and nothing else, and there is none that may be taken.
    Refused,
}

/// Why there is no bypass although the path is not the tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfit {
    /// No address is known.
    NoAddress,
    /// These lines have it alike.
    SeveralLines {
        /// What is dialled.
        address: IpAddr,
        /// The lines.
        lines: Vec<String>,
    },
    /// Others have the address, and the line does not tell them apart.
    Shared {
        /// What is dialled.
        address: IpAddr,
        /// Some of the others.
        others: Vec<String>,
    },
    /// Whose the address is as well is no matter of sites: what is dialled there may come back here.
    LeadsBack {
        /// What is dialled.
        address: IpAddr,
        /// Whose it is.
        whose: String,
    },
}

impl std::fmt::Display for Unfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoAddress => f.write_str("no address of it is known"),
            Self::SeveralLines { address, lines } => {
                write!(f, "lines {} have {address} alike", lines.join(" and "))
            }
            Self::Shared { address, others } => write!(
                f,
                "{address} is also that of {}, and no interface of a line says which is meant",
                others.join(" and ")
            ),
            Self::LeadsBack { address, whose } => write!(
                f,
                "{address} is that of {whose}, and what is dialled there may come back here"
            ),
        }
    }
}

/// What a path is decided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// The node's annotation.
    Annotation,
    /// Its pool's setting.
    Pool,
    /// ACK's label.
    Label,
    /// A configured line.
    Line,
    /// `path.default`.
    Default,
}

impl Rule {
    /// In words.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Annotation => "annotation corvid.io/path",
            Self::Pool => "setting of the pool",
            Self::Label => "label alibabacloud.com/interconnection-mode=private",
            Self::Line => "configured lines",
            Self::Default => "path.default",
        }
    }
}

/// What became of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// It says nothing of this node.
    Nothing,
    /// It decides.
    Decides(PathMode),
    /// It is the node's own word, and no configured line has an address of the node.
    NotBelieved(PathMode),
    /// It says what is none of the words for it.
    Unknown(String),
    /// One before it has decided.
    NotReached,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing => f.write_str("says nothing"),
            Self::Decides(mode) => write!(f, "decides: {mode}"),
            Self::NotBelieved(mode) => write!(
                f,
                "says {mode}, but is the node's own word, and no configured line has an address of it"
            ),
            Self::Unknown(said) => write!(
                f,
                "says {:?}, which is none of tunnel, direct, auto",
                said.escape_default().to_string()
            ),
            Self::NotReached => f.write_str("not looked at"),
        }
    }
}

/// A decision and how it came about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decided {
    /// What.
    pub decision: Decision,
    /// Why no line is taken, where one would be.
    pub unfit: Option<Unfit>,
    /// Each rule, in order.
    pub rules: [(Rule, Finding); 5],
}

impl Decided {
    /// In a sentence: why no line is taken where one would be, else the rule that has decided.
    #[must_use]
    pub fn why(&self) -> String {
        if let Some(unfit) = &self.unfit {
            return unfit.to_string();
        }
        let mut rules = self.rules.iter();
        let decides = rules.find_map(|(rule, finding)| match finding {
            Finding::Decides(mode) => Some(format!("{}: {mode}", rule.label())),
            Finding::Nothing
            | Finding::NotBelieved(_)
            | Finding::Unknown(_)
            | Finding::NotReached => None,
        });
        decides.unwrap_or_default()
    }
}

impl Decision {
    /// As it is written: `tunnel`, `direct`, `auto` or `refused`.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Direct(_) => "direct",
            Self::Auto(_) => "auto",
            Self::Refused => "refused",
        }
    }

    /// The way past the tunnel.
    #[must_use]
    pub const fn bypass(&self) -> Option<&Bypass> {
        match self {
            Self::Direct(bypass) | Self::Auto(bypass) => Some(bypass),
            Self::Tunnel | Self::Refused => None,
        }
    }
}

/// The line that has an address.
#[derive(Debug, Clone, Copy)]
enum Best<'a> {
    None,
    One(&'a Arc<Line>),
    Several(&'a Arc<Line>, &'a Arc<Line>),
}

impl Policy {
    /// The policy of this configuration.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let pools = config.kubernetes.as_ref().map(|k| &k.pools);
        let pools = pools.into_iter().flatten();
        Self {
            lines: config.lines.iter().cloned().map(Arc::new).collect(),
            pools: pools
                .filter_map(|(name, pool)| Some((name.clone(), pool.path?)))
                .collect(),
            default: config.path.default,
            believe_nodes: config.path.believe_nodes,
            route: Arc::new(Line::route()),
            is_idle: !config.has_paths(),
        }
    }

    /// Whether everything goes through the tunnel, whatever a node says.
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        self.is_idle
    }

    /// Every line that may be taken.
    pub fn lines(&self) -> impl Iterator<Item = &Arc<Line>> {
        self.lines.iter().chain([&self.route])
    }

    /// How that node is reached; `others` has everybody else who has an address, and is asked only about one that is
    /// about to be dialled.
    pub fn decide(
        &self,
        subject: Subject<'_>,
        others: impl FnOnce(IpAddr) -> Vec<Claimant>,
    ) -> Decided {
        let of_line = |address: &IpAddr| match self.best(subject.pool, *address) {
            Best::None => None,
            Best::One(line) | Best::Several(line, _) => Some((*address, line)),
        };
        let has_line = subject.addresses.iter().find_map(of_line);
        let (mode, rules) = self.mode(subject, has_line.map(|(_, line)| &**line));
        let tunnel = |unfit| Decided {
            decision: if mode == PathMode::Direct {
                Decision::Refused
            } else {
                Decision::Tunnel
            },
            unfit,
            rules: rules.clone(),
        };
        if mode == PathMode::Tunnel {
            return tunnel(None);
        }
        let first = || subject.addresses.first().copied();
        let Some(address) = has_line.map(|(address, _)| address).or_else(first) else {
            return tunnel(Some(Unfit::NoAddress));
        };
        let line = match self.best(subject.pool, address) {
            Best::None => &self.route,
            Best::One(line) => line,
            Best::Several(one, other) => {
                let lines = vec![one.name.clone(), other.name.clone()];
                return tunnel(Some(Unfit::SeveralLines { address, lines }));
            }
        };
        let mut others = others(address);
        if let Some(back) = others.iter().position(|other| other.leads_back) {
            let whose = others.swap_remove(back).name;
            return tunnel(Some(Unfit::LeadsBack { address, whose }));
        }
        others.retain(|other| !self.tells_apart(line, other, address));
        if !others.is_empty() {
            let mut others: Vec<_> = others.into_iter().map(|other| other.name).collect();
            others.sort_unstable();
            others.truncate(NAMED);
            return tunnel(Some(Unfit::Shared { address, others }));
        }
        let bypass = Bypass {
            line: Arc::clone(line),
            address,
        };
        Decided {
            decision: match mode {
                PathMode::Direct => Decision::Direct(bypass),
                PathMode::Auto | PathMode::Tunnel => Decision::Auto(bypass),
            },
            unfit: None,
            rules,
        }
    }

    /// What the rules say.
    fn mode(&self, subject: Subject<'_>, line: Option<&Line>) -> (PathMode, [(Rule, Finding); 5]) {
        let believed = self.believe_nodes || line.is_some();
        let own_word = |mode| {
            if believed || mode == PathMode::Tunnel {
                Finding::Decides(mode)
            } else {
                Finding::NotBelieved(mode)
            }
        };
        let of_line = line.map(|line| line.mode);
        let said = |mode: Option<PathMode>| mode.map_or(Finding::Nothing, Finding::Decides);
        let of_pool = subject.pool.and_then(|pool| self.pools.get(pool));
        let mut rules = [
            (
                Rule::Annotation,
                match subject.wish {
                    None => Finding::Nothing,
                    Some(Wish::Path(mode)) => own_word(*mode),
                    Some(Wish::Unknown(said)) => Finding::Unknown(said.clone()),
                },
            ),
            (Rule::Pool, said(of_pool.copied())),
            (
                Rule::Label,
                if subject.is_private {
                    let mode = of_line.filter(|mode| *mode != PathMode::Tunnel);
                    own_word(mode.unwrap_or(PathMode::Auto))
                } else {
                    Finding::Nothing
                },
            ),
            (Rule::Line, said(of_line)),
            (Rule::Default, Finding::Decides(self.default)),
        ];
        let mut decided = None;
        for (_, finding) in &mut rules {
            match (decided, &*finding) {
                (Some(_), _) => *finding = Finding::NotReached,
                (None, Finding::Decides(mode)) => decided = Some(*mode),
                (None, _) => {}
            }
        }
        (decided.unwrap_or(self.default), rules)
    }

    /// The line that has an address of a node of that pool: the most specific network, then the one that names the pool.
    fn best(&self, pool: Option<&str>, address: IpAddr) -> Best<'_> {
        let fits = |line: &&Arc<Line>| {
            let family = line
                .source
                .is_none_or(|source| source.is_ipv4() == address.is_ipv4());
            let in_pool = line.pools.is_empty()
                || pool.is_some_and(|pool| line.pools.iter().any(|name| name == pool));
            let in_networks = line.networks.is_empty()
                || line.networks.iter().any(|net| net.0.contains(&address));
            family && in_pool && in_networks
        };
        let rank = |line: &Arc<Line>| {
            let networks = line.networks.iter().filter(|net| net.0.contains(&address));
            let length = networks.map(|net| u16::from(net.0.prefix_len()) + 1).max();
            (length.unwrap_or_default(), !line.pools.is_empty())
        };
        let mut best = Best::None;
        for line in self.lines.iter().filter(fits) {
            best = match best {
                Best::None => Best::One(line),
                Best::One(other) | Best::Several(other, _) if rank(line) > rank(other) => {
                    Best::One(line)
                }
                Best::One(other) if rank(line) == rank(other) => Best::Several(other, line),
                Best::One(_) | Best::Several(..) => best,
            };
        }
        best
    }

    /// Whether what is dialled by `line` can't be that other one.
    fn tells_apart(&self, line: &Line, other: &Claimant, address: IpAddr) -> bool {
        line.interface.is_some()
            && match self.best(other.pool.as_deref(), address) {
                // Reached by nothing that we know of; the interface leads to the site that its line is for.
                Best::None => true,
                Best::One(theirs) => {
                    theirs.interface.is_some() && theirs.interface != line.interface
                }
                Best::Several(..) => false,
            }
    }
}

#[cfg(test)]
mod tests;
