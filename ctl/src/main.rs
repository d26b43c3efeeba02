//! `mirrorctl`: everything is in the library.
use std::process::ExitCode;

fn main() -> ExitCode {
    ctl::main()
}
