//! Join tokens, the agents that are known, and those that are revoked: `store.json` in the state
//! directory.
//!
//! Several processes use it at once (a running server, an operator's command). Each change is read,
//! made and written under one lock between processes, and written as a whole; reading needs no lock.
//! A file that can't be understood is an error and never overwritten.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::UnixTime;
use serde::{Deserialize, Serialize};

use crate::csr::KeyDigest;
use crate::identity::Name;
use crate::store::{self, FileLock, StoreError};
use crate::token::{AgentPattern, JoinToken, NoRandomness, SecretHash};

/// The form of the file that we write.
const VERSION: u32 = 1;

/// An expired token is kept for this long, so that its late user is told "expired", not "unknown".
const KEEP_EXPIRED: Duration = Duration::from_secs(7 * 86_400);

/// Tokens at a time: each is a line of a file that is read as a whole.
const MAX_TOKENS: usize = 1000;

/// Uses of one token: each leaves its name in the file.
pub const MAX_USES: u32 = 10_000;

/// The store can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenStoreError {
    /// Reading, writing or locking failed.
    #[error("use the token store")]
    Store(#[from] StoreError),
    /// Not what we wrote. It is left as it is.
    #[error("the token store {} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// Written by a newer program. It is left as it is.
    #[error("the token store {} is of version {version}, which this program does not know", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The content can't be written as JSON.
    #[error("write the token store")]
    Serialize(#[source] serde_json::Error),
    /// No randomness for a token.
    #[error("make a token")]
    Random(#[from] NoRandomness),
    /// 0 or more than [`MAX_USES`] uses.
    #[error("a token has 1 to 10000 uses")]
    Uses,
    /// It would be expired at once.
    #[error("a token lives at least a second")]
    Ttl,
    /// Revoke some first.
    #[error("there are 1000 tokens already")]
    TooMany,
}

/// A token is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum RedeemError {
    /// No token has this id.
    #[error("unknown token")]
    UnknownToken,
    /// The id is known, the secret is another. To the outside the same as unknown.
    #[error("wrong secret")]
    WrongSecret,
    /// Past its time.
    #[error("the token has expired")]
    Expired,
    /// All its uses are counted.
    #[error("the token is used up")]
    UsedUp,
    /// The token is for other names.
    #[error("the token is not for this name")]
    NameNotAllowed,
    /// The operator has revoked the agent.
    #[error("the agent is revoked")]
    Revoked,
    /// The store failed.
    #[error("look the token up")]
    Store(#[from] TokenStoreError),
}

/// What a new token allows.
#[derive(Debug, Clone)]
pub struct NewToken {
    /// How long.
    pub ttl: Duration,
    /// How often: 1 to [`MAX_USES`].
    pub uses: u32,
    /// For which names.
    pub agents: AgentPattern,
}

/// A token as it is listed. Times are seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TokenEntry {
    /// Its public half.
    pub id: String,
    /// When it was made.
    pub created: u64,
    /// When it ends.
    pub expires: u64,
    /// How often it may be used in all.
    pub uses: u32,
    /// How often still.
    pub uses_left: u32,
    /// For which names.
    pub agents: AgentPattern,
    /// Who used it.
    pub used_by: Vec<Name>,
}

/// An agent that was certified. Times are seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentEntry {
    /// When it was first.
    pub enrolled_at: u64,
    /// When its last leaf ends.
    pub not_after: u64,
}

/// What a running server keeps in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Agents to be refused.
    pub revoked: HashSet<Name>,
    /// Agents that were certified.
    pub agents: BTreeMap<Name, AgentEntry>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Token {
    id: String,
    hash: SecretHash,
    created: u64,
    expires: u64,
    uses: u32,
    agents: AgentPattern,
    #[serde(default)]
    redeemed: Vec<Redemption>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Redemption {
    agent: Name,
    key: KeyDigest,
    at: u64,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Content {
    version: u32,
    #[serde(default)]
    tokens: Vec<Token>,
    #[serde(default)]
    agents: BTreeMap<Name, AgentEntry>,
    /// With the time of the revocation.
    #[serde(default)]
    revoked: BTreeMap<Name, u64>,
}

/// The store of one state directory. Clones are the same store.
#[derive(Debug, Clone)]
pub struct Store {
    paths: Arc<Paths>,
}

#[derive(Debug)]
struct Paths {
    file: PathBuf,
    lock: PathBuf,
}

impl Store {
    /// Opens the store of `state_dir`; an absent one is empty.
    ///
    /// # Errors
    /// The directory can't be made, or what is there can't be read.
    pub fn open(state_dir: &Path) -> Result<Self, TokenStoreError> {
        store::create_dir(state_dir)?;
        let paths = Paths {
            file: state_dir.join("store.json"),
            lock: state_dir.join("store.lock"),
        };
        let store = Self {
            paths: Arc::new(paths),
        };
        store.read()?;
        Ok(store)
    }

    /// The file; it is replaced at each change, so watch its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.paths.file
    }

    /// Makes a token.
    ///
    /// # Errors
    /// What is asked for makes no sense, there are too many, or the store fails.
    pub fn create_token(
        &self,
        new: &NewToken,
        now: UnixTime,
    ) -> Result<JoinToken, TokenStoreError> {
        if !(1..=MAX_USES).contains(&new.uses) {
            return Err(TokenStoreError::Uses);
        }
        if new.ttl.as_secs() == 0 {
            return Err(TokenStoreError::Ttl);
        }
        self.change(|content| {
            prune(content, now);
            if content.tokens.len() >= MAX_TOKENS {
                return Err(TokenStoreError::TooMany);
            }
            let mut token = JoinToken::generate()?;
            while content.tokens.iter().any(|other| other.id == token.id()) {
                token = JoinToken::generate()?;
            }
            content.tokens.push(Token {
                id: token.id().to_owned(),
                hash: token.hash(),
                created: now.as_secs(),
                expires: now.as_secs().saturating_add(new.ttl.as_secs()),
                uses: new.uses,
                agents: new.agents.clone(),
                redeemed: Vec::new(),
            });
            Ok(token)
        })
    }

    /// All tokens, the oldest first; expired ones among them for a week.
    ///
    /// # Errors
    /// The store can't be read.
    pub fn list_tokens(&self) -> Result<Vec<TokenEntry>, TokenStoreError> {
        Ok(self.read()?.tokens.into_iter().map(Token::entry).collect())
    }

    /// Forgets a token; `false` if there is none of this id. Agents that used it stay.
    ///
    /// # Errors
    /// The store fails.
    pub fn revoke_token(&self, id: &str) -> Result<bool, TokenStoreError> {
        self.change(|content| {
            let before = content.tokens.len();
            content.tokens.retain(|token| token.id != id);
            Ok(content.tokens.len() != before)
        })
    }

    /// Counts one use of a token by `agent` with the key `key`.
    ///
    /// The same agent with the same key may come again while the token lives, without being counted: its
    /// answer was lost on the way, and nobody but the holder of that key has any use of a certificate.
    ///
    /// # Errors
    /// The token is not accepted, or the store fails.
    pub fn redeem(
        &self,
        token: &JoinToken,
        agent: &Name,
        key: &KeyDigest,
        now: UnixTime,
    ) -> Result<(), RedeemError> {
        self.change(|content| {
            let revoked = content.revoked.contains_key(agent);
            let entry = content
                .tokens
                .iter_mut()
                .find(|entry| entry.id == token.id());
            let entry = entry.ok_or(RedeemError::UnknownToken)?;
            if !entry.hash.matches(&token.hash()) {
                return Err(RedeemError::WrongSecret);
            }
            if entry.expires <= now.as_secs() {
                return Err(RedeemError::Expired);
            }
            if !entry.agents.matches(agent) || agent.is_of_service() {
                return Err(RedeemError::NameNotAllowed);
            }
            if revoked {
                return Err(RedeemError::Revoked);
            }
            if entry
                .redeemed
                .iter()
                .any(|use_| use_.agent == *agent && use_.key == *key)
            {
                return Ok(());
            }
            if entry.uses_left() == 0 {
                return Err(RedeemError::UsedUp);
            }
            let redemption = Redemption {
                agent: agent.clone(),
                key: key.clone(),
                at: now.as_secs(),
            };
            entry.redeemed.push(redemption);
            prune(content, now);
            Ok(())
        })
    }

    /// Notes that `name` has a leaf until `not_after`.
    ///
    /// # Errors
    /// The store fails.
    pub fn record_agent(
        &self,
        name: &Name,
        not_after: UnixTime,
        now: UnixTime,
    ) -> Result<(), TokenStoreError> {
        self.change(|content| {
            let entry = content.agents.entry(name.clone());
            let entry = entry.or_insert_with(|| AgentEntry {
                enrolled_at: now.as_secs(),
                not_after: 0,
            });
            entry.not_after = not_after.as_secs();
            Ok(())
        })
    }

    /// Refuses an agent from now on; returns whether it was known.
    ///
    /// # Errors
    /// The store fails.
    pub fn revoke_agent(&self, name: &Name, now: UnixTime) -> Result<bool, TokenStoreError> {
        self.change(|content| {
            content
                .revoked
                .entry(name.clone())
                .or_insert_with(|| now.as_secs());
            Ok(content.agents.contains_key(name))
        })
    }

    /// Takes a revocation back; returns whether there was one.
    ///
    /// # Errors
    /// The store fails.
    pub fn allow_agent(&self, name: &Name) -> Result<bool, TokenStoreError> {
        self.change(|content| Ok(content.revoked.remove(name).is_some()))
    }

    /// Whether an agent is refused.
    ///
    /// # Errors
    /// The store can't be read.
    pub fn is_revoked(&self, name: &Name) -> Result<bool, TokenStoreError> {
        Ok(self.read()?.revoked.contains_key(name))
    }

    /// A copy of who is known and who is refused.
    ///
    /// # Errors
    /// The store can't be read.
    pub fn snapshot(&self) -> Result<Snapshot, TokenStoreError> {
        let content = self.read()?;
        Ok(Snapshot {
            revoked: content.revoked.into_keys().collect(),
            agents: content.agents,
        })
    }

    fn read(&self) -> Result<Content, TokenStoreError> {
        let path = &self.paths.file;
        let Some(bytes) = store::read_if_there(path)? else {
            return Ok(Content {
                version: VERSION,
                ..Content::default()
            });
        };
        let content: Content =
            serde_json::from_slice(&bytes).map_err(|source| TokenStoreError::Damaged {
                path: path.clone(),
                source,
            })?;
        if content.version != VERSION {
            let version = content.version;
            return Err(TokenStoreError::Version {
                path: path.clone(),
                version,
            });
        }
        Ok(content)
    }

    /// Reads, changes and writes under the lock; nothing is written if `change` fails.
    fn change<T, E: From<TokenStoreError>>(
        &self,
        change: impl FnOnce(&mut Content) -> Result<T, E>,
    ) -> Result<T, E> {
        let _lock = FileLock::hold(&self.paths.lock).map_err(TokenStoreError::from)?;
        let mut content = self.read()?;
        let result = change(&mut content)?;
        let bytes = serde_json::to_vec_pretty(&content).map_err(TokenStoreError::Serialize)?;
        store::write_atomic(&self.paths.file, &bytes, store::MODE_SECRET)
            .map_err(TokenStoreError::from)?;
        Ok(result)
    }
}

impl Token {
    fn uses_left(&self) -> u32 {
        self.uses
            .saturating_sub(u32::try_from(self.redeemed.len()).unwrap_or(u32::MAX))
    }

    fn entry(self) -> TokenEntry {
        TokenEntry {
            uses_left: self.uses_left(),
            id: self.id,
            created: self.created,
            expires: self.expires,
            uses: self.uses,
            agents: self.agents,
            used_by: self.redeemed.into_iter().map(|use_| use_.agent).collect(),
        }
    }
}

fn prune(content: &mut Content, now: UnixTime) {
    let kept_since = now.as_secs().saturating_sub(KEEP_EXPIRED.as_secs());
    content.tokens.retain(|token| token.expires > kept_since);
}

#[cfg(test)]
mod tests;
