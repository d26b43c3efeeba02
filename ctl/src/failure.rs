//! How a command fails: one line, one exit code.

use std::process::ExitCode;

/// Everything is as it should be.
pub const OK: u8 = 0;
/// The command failed; for `status`: degraded.
pub const FAILED: u8 = 1;
/// `status` only: some data cannot be read or written now.
pub const UNAVAILABLE: u8 = 2;
/// The manager cannot be reached, or does not accept us.
pub const NO_MANAGER: u8 = 3;
/// The command line makes no sense.
pub const USAGE: u8 = 64;

/// Why a command did not do what it was asked for.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// What is wrong, where, and what to do; one line.
    pub message: String,
}

impl Failure {
    /// An ordinary failure.
    pub fn new(message: impl Into<String>) -> Self {
        Self { code: FAILED, message: message.into() }
    }

    /// The manager cannot be asked.
    pub fn no_manager(message: impl Into<String>) -> Self {
        Self { code: NO_MANAGER, message: message.into() }
    }

    /// The command line makes no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { code: USAGE, message: message.into() }
    }
}

/// Says it on stderr, in exactly one line.
pub fn report(failure: &Failure) -> ExitCode {
    let line = failure.message.split('\n').map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>();
    eprintln!("mirrorctl: {}", line.join("; "));
    ExitCode::from(failure.code)
}
