//! The simulator notices what it is there for: each planted mistake has a seed that shows it, and
//! shows nothing without it.

use mirror_net::planted::{Bug, is, set};
use mirror_tests::sim::schedule::{broken_by, run};
use std::collections::BTreeSet;

/// Lines of `BUG SEED`; `mirror-sim --hunt all` prints such lines.
const SEEDS: &str = include_str!("../planted-seeds.txt");

#[test]
fn every_planted_bug_is_noticed_by_its_seed_and_only_with_it() {
    let mut left: Vec<Bug> = Bug::ALL.to_vec();
    for line in SEEDS.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let mut words = line.split_whitespace();
        let bug = words.next().and_then(Bug::named).unwrap_or_else(|| panic!("no bug: {line}"));
        let seed =
            words.next().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| panic!("no seed: {line}"));
        assert_eq!(run(seed, false).violations, Vec::<String>::new(), "seed {seed} without {}", bug.name());
        assert!(broken_by(bug, seed).is_some(), "seed {seed} shows nothing of {}", bug.name());
        left.retain(|other| *other != bug);
    }
    let left: Vec<&str> = left.iter().map(|bug| bug.name()).collect();
    assert_eq!(left, Vec::<&str>::new(), "no seed for these: mirror-sim --hunt all");
}

#[test]
fn a_bug_has_a_name_of_its_own_and_is_active_alone() {
    let names: BTreeSet<&str> = Bug::ALL.iter().map(|bug| bug.name()).collect();
    assert_eq!(names.len(), Bug::ALL.len());
    for bug in Bug::ALL {
        assert_eq!(Bug::named(bug.name()), Some(*bug));
        assert!(!bug.description().is_empty());
        set(Some(*bug));
        assert_eq!(Bug::ALL.iter().copied().filter(|other| is(*other)).collect::<Vec<_>>(), [*bug]);
    }
    set(None);
    assert!(!Bug::ALL.iter().copied().any(is));
}
