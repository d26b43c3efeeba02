//! The protocol's model: with every rule on nothing breaks, without any one of them something does.
//! `mirror-model --long` searches more.

use mirror_tests::model::checker::Verdict;
use mirror_tests::model::rules::{RULES, Rules, name};
use mirror_tests::model::scenarios::{KNOCK_OUTS, SCENARIOS};

/// Some times more than the largest has: growth shall be noticed.
const STATES_MAX: usize = 4_000_000;

fn holds(wanted: impl Fn(&str) -> bool) {
    for scenario in SCENARIOS.iter().filter(|scenario| !scenario.long && wanted(scenario.name)) {
        let outcome = scenario.scene.search(Rules::ALL, STATES_MAX);
        println!("{}: {} states, depth {}, {:?}", scenario.name, outcome.states, outcome.depth, outcome.time);
        assert_eq!(outcome.verdict, Verdict::Holds, "{}", scenario.name);
    }
}

#[test]
fn two_copies_keep_every_promise() {
    holds(|name| name.starts_with("pair"));
}

#[test]
fn three_copies_keep_every_promise() {
    holds(|name| name.starts_with("three"));
}

#[test]
fn roles_leases_and_claims_of_two_slices_never_contradict_each_other() {
    holds(|name| name.starts_with("roles"));
}

#[test]
fn exporters_neither_overtake_nor_repeat_each_other() {
    holds(|name| !["pair", "three", "roles"].iter().any(|other| name.starts_with(other)));
}

#[test]
fn each_rule_is_missed_when_it_is_switched_off() {
    for knock_out in KNOCK_OUTS {
        let outcome = knock_out.scene.search(Rules::without(knock_out.rule), STATES_MAX);
        let rule = name(knock_out.rule);
        println!("{rule}: {} states, depth {}: {}", outcome.states, outcome.depth, knock_out.trace);
        match outcome.verdict {
            Verdict::Violated { trace, .. } | Verdict::Stuck { trace, .. } => {
                assert!(knock_out.missed, "{rule} is needed after all:\n{}", trace.join("\n"));
            }
            Verdict::Holds => {
                assert!(!knock_out.missed, "nothing breaks without {rule} in {:?}", knock_out.scene)
            }
            Verdict::TooMany => panic!("{rule}: too many states"),
        }
    }
}

#[test]
fn every_rule_is_switched_off_somewhere() {
    for (rule, name, _, _) in RULES {
        assert!(KNOCK_OUTS.iter().any(|knock_out| knock_out.rule == rule), "{name}");
    }
}
