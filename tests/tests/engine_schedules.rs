//! A few seeds of the simulator in every test run; `mirror-sim` runs many.

use mirror_tests::sim::schedule::run;

#[test]
fn the_first_seeds_hold_every_promise() {
    for seed in 1..=60 {
        assert_eq!(run(seed, false).violations, Vec::<String>::new(), "mirror-sim --replay {seed} --trace");
    }
}

#[test]
fn a_seed_tells_the_same_story_every_time() {
    assert_eq!(run(5, false).hash, run(5, false).hash);
}
