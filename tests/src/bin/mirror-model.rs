//! Searches the protocol's model.

use clap::Parser;
use mirror_tests::model::checker::{Outcome, Verdict};
use mirror_tests::model::rules::{RULES, Rules, name, named};
use mirror_tests::model::scenarios::{KNOCK_OUTS, SCENARIOS};
use mirror_tests::usage::{USAGE, usage};
use std::process::ExitCode;

/// Searches the model of the replication protocol, all states of it, for a promise that is broken.
#[derive(Parser)]
#[command(
    name = "mirror-model",
    after_help = "Exit code: 0 every promise holds, 1 one does not, 64 wrong usage."
)]
struct Arguments {
    /// The scenarios that take minutes too.
    #[arg(long)]
    long: bool,
    /// Only that scenario.
    #[arg(long, value_name = "SCENARIO", conflicts_with = "long")]
    only: Option<String>,
    /// Tells the shortest story of what happens without that rule.
    #[arg(long, value_name = "RULE", conflicts_with_all = ["long", "only"])]
    without: Option<String>,
    /// Lists the rules.
    #[arg(long, conflicts_with_all = ["long", "only", "without"])]
    rules: bool,
    /// Lists the scenarios.
    #[arg(long, conflicts_with_all = ["long", "only", "without", "rules"])]
    scenarios: bool,
}

/// More than any scenario has; memory is some 100 bytes a state.
const STATES_MAX: usize = 100_000_000;

fn told(title: &str, outcome: &Outcome) {
    let Outcome { states, steps, depth, time, verdict } = outcome;
    let result = match verdict {
        Verdict::Holds => "holds".to_owned(),
        Verdict::Violated { what, .. } => format!("VIOLATED: {what}"),
        Verdict::Stuck { states, .. } => {
            format!("STUCK: from {states} states the copies never become equal again")
        }
        Verdict::TooMany => "UNFINISHED: too many states".to_owned(),
    };
    println!("{title}: {states} states, {steps} steps, depth {depth}, {:.1} s: {result}", time.as_secs_f64());
    if let Verdict::Violated { trace, .. } | Verdict::Stuck { trace, .. } = verdict {
        for (number, line) in trace.iter().enumerate() {
            println!("{:4}. {line}", number + 1);
        }
    }
}

fn without(rule: &str) -> ExitCode {
    let Some(rule) = named(rule) else {
        eprintln!("mirror-model: no rule {rule:?}; --rules lists them");
        return USAGE.into();
    };
    for knock_out in KNOCK_OUTS.iter().filter(|knock_out| knock_out.rule == rule) {
        let outcome = knock_out.scene.search(Rules::without(rule), STATES_MAX);
        told(&format!("without {}, {:?}", name(rule), knock_out.scene), &outcome);
    }
    ExitCode::SUCCESS
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error),
    };
    if arguments.rules {
        for (_, name, number, text) in RULES {
            println!("{name:22} ({number:2}) {text}");
        }
        return ExitCode::SUCCESS;
    }
    if arguments.scenarios {
        for scenario in SCENARIOS {
            println!("{}{}", scenario.name, if scenario.long { "  (--long)" } else { "" });
        }
        return ExitCode::SUCCESS;
    }
    if let Some(rule) = arguments.without {
        return without(&rule);
    }
    let wanted: Vec<_> = SCENARIOS
        .iter()
        .filter(|scenario| match &arguments.only {
            Some(only) => scenario.name == only,
            None => arguments.long || !scenario.long,
        })
        .collect();
    if wanted.is_empty() {
        eprintln!("mirror-model: no such scenario; --scenarios lists them");
        return USAGE.into();
    }
    let mut failed = false;
    for scenario in wanted {
        let outcome = scenario.scene.search(Rules::ALL, STATES_MAX);
        failed |= outcome.verdict != Verdict::Holds;
        told(scenario.name, &outcome);
    }
    u8::from(failed).into()
}
