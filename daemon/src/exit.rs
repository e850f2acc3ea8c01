//! The exit codes of both services.

use std::process::{ExitCode, Termination};

/// How a process ended, for whoever started it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was told to stop and finished (or cut) what ran: code 0.
    Drained,
    /// Something failed at run time: code 1.
    Failed,
    /// The command line or the configuration is wrong: code 64, `EX_USAGE` of sysexits(3). Starting it again does not help.
    Usage,
}

impl Exit {
    /// The code given to the operating system.
    pub const fn code(self) -> u8 {
        match self {
            Self::Drained => 0,
            Self::Failed => 1,
            Self::Usage => 64,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

impl Termination for Exit {
    fn report(self) -> ExitCode {
        self.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_that_are_documented() {
        let codes = [Exit::Drained, Exit::Failed, Exit::Usage].map(Exit::code);
        assert_eq!(codes, [0, 1, 64]);
    }
}
