//! Limits of the operating system on this process.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open descriptors to the hard one and returns the limit that holds afterwards.
///
/// Distributions keep the soft limit at 1,024 for programs that use `select(2)`; these services do not. A failure
/// is logged and harmless: the limit stays what it was.
pub fn raise_nofile() -> u64 {
    let (soft, hard) = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok(limits) => limits,
        Err(error) => {
            tracing::warn!(%error, "the limit of open descriptors cannot be read");
            return 0;
        }
    };
    if soft >= hard {
        return soft;
    }
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(error) => {
            tracing::warn!(%error, soft, hard, "the limit of open descriptors cannot be raised");
            soft
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::in_child_process;

    #[test]
    fn the_soft_limit_of_descriptors_is_raised_to_the_hard_one() {
        in_child_process(
            "limits::tests::the_soft_limit_of_descriptors_is_raised_to_the_hard_one",
            &[],
            || {
                setrlimit(Resource::RLIMIT_NOFILE, 64, 128).unwrap();
                assert_eq!(raise_nofile(), 128);
                assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (128, 128));
                assert_eq!(raise_nofile(), 128, "a second call changes nothing");
            },
        );
    }
}
