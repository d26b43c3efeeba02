//! `ublk-probe`: says whether this machine's kernel can serve ublk devices, and what to do if it cannot.

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use kmod::abi::Features;
use kmod::probe::{Verdict, probe};

/// What this kernel's ublk can do, and whether the mirror can use it.
///
/// Exit code: 0 usable, 1 not usable, 64 usage.
#[derive(Parser)]
#[command(name = "ublk-probe", version)]
struct Arguments {
    /// Print the verdict as JSON
    #[arg(long)]
    json: bool,
}

const EXIT_NOT_USABLE: u8 = 1;
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Nothing can be done about a closed terminal.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(EXIT_USAGE),
            };
        }
    };
    match report(arguments.json) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(EXIT_NOT_USABLE),
        Err(error) => {
            eprintln!("ublk-probe: {error:#}");
            ExitCode::from(EXIT_NOT_USABLE)
        }
    }
}

fn report(json: bool) -> anyhow::Result<bool> {
    let verdict = probe()?;
    if json {
        println!("{}", serde_json::to_string_pretty(&verdict)?);
    } else {
        print!("{}", text(&verdict));
    }
    Ok(verdict.usable())
}

fn text(verdict: &Verdict) -> String {
    let mut out = format!("kernel    {}\n", verdict.kernel);
    if let Some(features) = verdict.features {
        out += &format!("features  {:#x}\n", features.0);
        for (flag, name, since) in Features::TABLE {
            let mark = if features.contains(flag) { "yes" } else { "no" };
            let required = if Features::REQUIRED.contains(flag) { ", required" } else { "" };
            out += &format!("  {mark:<4}{name} (since {since}{required})\n");
        }
    }
    for problem in &verdict.problems {
        out += &format!("problem   {problem}\n  next    {}\n", problem.next());
    }
    out += if verdict.usable() {
        "verdict   usable: ublk devices can be served here\n"
    } else {
        "verdict   NOT usable\n"
    };
    out
}
