//! `mirror-model [--long] [--only NAME]` searches the protocol's model with every rule on;
//! `mirror-model --without RULE` shows what happens without one; `--rules` lists them.

use mirror_tests::model::checker::{Outcome, Verdict};
use mirror_tests::model::rules::{RULES, Rules, name, named};
use mirror_tests::model::scenarios::{KNOCK_OUTS, SCENARIOS};
use std::process::ExitCode;

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
        return ExitCode::from(64);
    };
    for knock_out in KNOCK_OUTS.iter().filter(|knock_out| knock_out.rule == rule) {
        let outcome = knock_out.scene.search(Rules::without(rule), STATES_MAX);
        told(&format!("without {}, {:?}", name(rule), knock_out.scene), &outcome);
    }
    ExitCode::SUCCESS
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |flag: &str| {
        let at = arguments.iter().position(|argument| argument == flag)?;
        arguments.get(at + 1)
    };
    if arguments.iter().any(|argument| argument == "--rules") {
        for (_, name, number, text) in RULES {
            println!("{name:22} ({number:2}) {text}");
        }
        return ExitCode::SUCCESS;
    }
    if let Some(rule) = value("--without") {
        return without(rule);
    }
    let long = arguments.iter().any(|argument| argument == "--long");
    let only = value("--only");
    let wanted = SCENARIOS.iter().filter(|scenario| match only {
        Some(only) => scenario.name == only,
        None => long || !scenario.long,
    });
    let mut failed = false;
    for scenario in wanted {
        let outcome = scenario.scene.search(Rules::ALL, STATES_MAX);
        failed |= outcome.verdict != Verdict::Holds;
        told(scenario.name, &outcome);
    }
    u8::from(failed).into()
}
