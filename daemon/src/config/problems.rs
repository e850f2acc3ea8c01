//! All mistakes of meaning in one configuration, shown at once.

use std::fmt::{self, Display};
use std::path::Path;

use super::ConfigError;

/// One mistake: the key's path and what is wrong with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where, as it is written in the file: `frontends[0].listen`.
    pub path: String,
    /// What is wrong, and what would be right.
    pub what: String,
}

/// Collects every [`Problem`], so that an operator mends the file in one go.
///
/// ```
/// let mut problems = daemon::Problems::new();
/// problems.push("drain.grace", "must be longer than drain.minDelay");
/// problems.check(2 + 2 == 4, "name", "is not a DNS name");
/// assert_eq!(problems.to_string(), "1 problem\n  drain.grace: must be longer than drain.minDelay");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems {
    found: Vec<Problem>,
}

impl Problems {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a problem.
    pub fn push(&mut self, path: impl Display, what: impl Display) {
        self.found.push(Problem {
            path: path.to_string(),
            what: what.to_string(),
        });
    }

    /// Adds a problem unless `holds`.
    pub fn check(&mut self, holds: bool, path: impl Display, what: impl Display) {
        if !holds {
            self.push(path, what);
        }
    }

    /// The value, or `None` and a problem that says why not.
    pub fn take<T, E: Display>(&mut self, path: impl Display, value: Result<T, E>) -> Option<T> {
        value.map_err(|error| self.push(path, error)).ok()
    }

    /// Whether nothing is wrong so far.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// What was found, in the order it was found.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.found.iter()
    }

    /// Fails if anything is wrong; `file` is named in the error.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with every problem.
    pub fn into_result(self, file: &Path) -> Result<(), ConfigError> {
        if self.is_empty() {
            return Ok(());
        }
        Err(ConfigError::Invalid {
            file: file.to_owned(),
            problems: self,
        })
    }
}

impl Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.found.len();
        write!(f, "{count} problem{}", if count == 1 { "" } else { "s" })?;
        for Problem { path, what } in &self.found {
            write!(f, "\n  {path}: {what}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_mistakes_are_reported_at_once_with_their_keys() {
        let mut problems = Problems::new();
        problems.push("name", "is not a DNS name");
        let port = problems.take("backend.listen[1]", "99999".parse::<u16>());
        assert_eq!(port, None);
        problems.check(
            false,
            format_args!("frontends[{}].mode", 2),
            "needs a unix socket",
        );
        let error = problems
            .into_result(Path::new("/etc/corvid/a.yaml"))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "/etc/corvid/a.yaml: 3 problems\n  name: is not a DNS name\n  backend.listen[1]: number too large to fit in \
             target type\n  frontends[2].mode: needs a unix socket"
        );
        assert_eq!(error.exit().code(), 64);
    }

    #[test]
    fn no_mistakes_are_no_error() {
        Problems::new().into_result(Path::new("a.yaml")).unwrap();
    }
}
