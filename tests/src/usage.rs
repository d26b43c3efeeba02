//! How the programs of this package answer wrong usage.

use std::process::ExitCode;

/// The exit code for it: EX_USAGE of sysexits(3), as `mirrorctl` has it.
pub const USAGE: u8 = 64;

/// Prints what clap says: help that was asked for, which is no failure, or what is wrong.
pub fn usage(error: &clap::Error) -> ExitCode {
    // Whoever reads it may be gone.
    let _ = error.print();
    if error.use_stderr() { USAGE.into() } else { ExitCode::SUCCESS }
}
