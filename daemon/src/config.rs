//! Loading a configuration file: YAML, bounded, with the place of each mistake.
//!
//! Two kinds of mistakes: those of form (syntax, a wrong type, an unknown key where the caller's type refuses them)
//! stop at the first one and carry `file:line:column`; those of meaning are collected by the caller in [`Problems`]
//! and shown all at once. An error never shows lines of the file: they may hold a token.
//!
//! It must not know which keys exist; that is each service's own `config.rs`.

mod bytes;
mod listen;
mod mode;
mod problems;

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_saphyr::{DefaultMessageFormatter, Localizer, Location, MessageFormatter, RenderOptions};

pub use self::bytes::{ByteSize, ByteSizeError};
pub use self::listen::{Listen, ListenError};
pub use self::mode::{FileMode, FileModeError};
pub use self::problems::{Problem, Problems};
use crate::Exit;

/// Largest configuration file that is read. A real one has a few KiB; a device or a log named by mistake must not
/// fill the memory.
pub const MAX_FILE_SIZE: u64 = 1024 * 1024;

/// Why a configuration file was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The keys are right, but what they say is not; every problem is listed.
    #[error("{}: {problems}", file.display())]
    Invalid {
        /// The file.
        file: PathBuf,
        /// What is wrong, key by key.
        problems: Problems,
    },
    /// The file is not UTF-8.
    #[error("{} is not UTF-8 text", file.display())]
    NotText {
        /// The file.
        file: PathBuf,
    },
    /// The file cannot be read.
    #[error("read {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The YAML is malformed, a value has the wrong type, or a key is unknown.
    #[error("{}:{line}:{column}: {message}", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// Line, counted from 1; 0 if the parser does not know.
        line: u64,
        /// Column, counted from 1; 0 if the parser does not know.
        column: u64,
        /// What is wrong there.
        message: String,
    },
    /// The file is larger than [`MAX_FILE_SIZE`].
    #[error("{} is larger than {MAX_FILE_SIZE} bytes", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
    },
}

impl ConfigError {
    /// The exit code that belongs to it: always [`Exit::Usage`].
    pub const fn exit(&self) -> Exit {
        Exit::Usage
    }
}

/// Reads a YAML file of at most [`MAX_FILE_SIZE`] bytes.
///
/// # Errors
/// [`ConfigError`], except [`ConfigError::Invalid`], which is the caller's to make.
pub fn load<T: DeserializeOwned>(file: &Path) -> Result<T, ConfigError> {
    let text = read(file)?;
    parse(file, &text)
}

/// Parses YAML text; `file` is only named in errors. An empty text is an empty mapping: every key has its default.
///
/// # Errors
/// [`ConfigError::Syntax`].
pub fn parse<T: DeserializeOwned>(file: &Path, text: &str) -> Result<T, ConfigError> {
    let only_comments = text
        .lines()
        .all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'));
    let text = if only_comments { "{}" } else { text };
    let options = serde_saphyr::options! { with_snippet: false };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let location = error.location().unwrap_or(Location::UNKNOWN);
        ConfigError::Syntax {
            file: file.to_owned(),
            line: location.line(),
            column: location.column(),
            message: error.render_with_options(RenderOptions::new(&Sentence)),
        }
    })
}

fn read(file: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read {
        file: file.to_owned(),
        source,
    };
    let too_large = || ConfigError::TooLarge {
        file: file.to_owned(),
    };
    let opened = File::open(file).map_err(failed)?;
    if opened.metadata().map_err(failed)?.len() > MAX_FILE_SIZE {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    // The length of a pipe or a growing file says nothing, so what is read is bounded as well.
    opened
        .take(MAX_FILE_SIZE + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > MAX_FILE_SIZE) {
        return Err(too_large());
    }
    String::from_utf8(bytes)
        .ok()
        .ok_or_else(|| ConfigError::NotText {
            file: file.to_owned(),
        })
}

/// The parser's message alone: the place stands in front of it already.
struct Sentence;

impl MessageFormatter for Sentence {
    fn localizer(&self) -> &dyn Localizer {
        self
    }

    fn format_message<'a>(&self, error: &'a serde_saphyr::Error) -> Cow<'a, str> {
        DefaultMessageFormatter.format_message(error)
    }
}

impl Localizer for Sentence {
    fn attach_location<'a>(&self, base: Cow<'a, str>, _: Location) -> Cow<'a, str> {
        base
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
    struct Sample {
        name: String,
        memory: Option<ByteSize>,
        listen: Vec<Listen>,
        port_count: u16,
    }

    fn sample(text: &str) -> Result<Sample, ConfigError> {
        parse(Path::new("sample.yaml"), text)
    }

    fn message(text: &str) -> String {
        sample(text).unwrap_err().to_string()
    }

    #[test]
    fn a_good_file_is_loaded() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(
            b"name: edge1\nmemory: 20MiB\nlisten: ['tcp:127.0.0.1:0', '0.0.0.0:8443']\n",
        )
        .unwrap();
        let loaded: Sample = load(file.path()).unwrap();
        assert_eq!(loaded.name, "edge1");
        assert_eq!(loaded.memory, Some(ByteSize(20 << 20)));
        assert_eq!(loaded.listen.len(), 2);
    }

    #[test]
    fn an_empty_file_means_defaults() {
        assert_eq!(sample("").unwrap(), Sample::default());
        assert_eq!(
            sample("# nothing\n\n  # here\n").unwrap(),
            Sample::default()
        );
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_place_and_what_was_expected() {
        let message = message("name: a\nmemroy: 20MiB\n");
        assert!(message.starts_with("sample.yaml:2:1: "), "{message}");
        assert!(
            message.contains("memroy") && message.contains("memory"),
            "{message}"
        );
        assert!(
            !message.contains(" at line "),
            "the place is said once: {message}"
        );
    }

    #[test]
    fn a_wrong_type_is_refused_with_its_place() {
        let message = message("name: a\nportCount: many\n");
        assert!(message.starts_with("sample.yaml:2:12: "), "{message}");
    }

    #[test]
    fn a_wrong_value_is_refused_with_its_place_and_a_sentence() {
        let message = message("listen:\n  - 'tcp:nowhere'\n");
        assert!(message.starts_with("sample.yaml:2:"), "{message}");
        assert!(message.contains("host:port"), "{message}");
    }

    #[test]
    fn a_syntax_mistake_is_refused_with_its_line() {
        let message = message("name: a\nlisten: [\"x\"\nmemory: 1\n");
        assert!(
            message.starts_with("sample.yaml:3:") || message.starts_with("sample.yaml:4:"),
            "{message}"
        );
    }

    #[test]
    fn a_mistake_does_not_show_the_lines_around_it() {
        let message = message("name: top-secret\nmemroy: 1\n");
        assert!(!message.contains("top-secret"), "{message}");
    }

    #[test]
    fn a_key_given_twice_is_refused() {
        let message = message("name: a\nname: b\n");
        assert!(message.starts_with("sample.yaml:2:"), "{message}");
    }

    #[test]
    fn a_file_that_is_too_large_is_not_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(MAX_FILE_SIZE + 1).unwrap();
        let error = load::<Sample>(file.path()).unwrap_err();
        assert!(matches!(error, ConfigError::TooLarge { .. }), "{error}");
        let endless = load::<Sample>(Path::new("/dev/zero")).unwrap_err();
        assert!(matches!(endless, ConfigError::TooLarge { .. }), "{endless}");
    }

    #[test]
    fn a_file_that_is_not_there_or_not_text_is_named() {
        let missing = load::<Sample>(Path::new("/nonexistent/a.yaml")).unwrap_err();
        assert_eq!(missing.to_string(), "read /nonexistent/a.yaml");
        assert!(std::error::Error::source(&missing).is_some());
        assert_eq!(missing.exit(), Exit::Usage);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[0xff, 0xfe]).unwrap();
        assert!(matches!(
            load::<Sample>(file.path()),
            Err(ConfigError::NotText { .. })
        ));
    }
}
