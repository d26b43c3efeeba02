//! Where no spare is left, a third disk is emptied, becomes the spare, and takes the place of what is gone.

use super::bench::Bench;
use super::redistribution::{ALL, roomy};
use crate::config::Policy;
use crate::control::PlanOrder;
use crate::map::{DistributionMap, SegmentSlots};

const AUTO: Policy = Policy { auto_spare: true, auto_make_spare: true, ..Policy::MANUAL };
/// Without the node whose disk is broken.
const UP: [u64; 5] = [2, 3, 4, 5, 6];

/// No spares: n1 and n2, n3 and n4 mirror each other, n5 and n6 have mirrors' slots only, and hold nothing.
fn without_spares() -> DistributionMap {
    let mut map = roomy();
    for disk in &mut map.disks[4..] {
        disk.spare = false;
        disk.slots = SegmentSlots { primary: 0, secondary: 12, unmirrored: 4 };
    }
    map.validate().unwrap();
    map
}

fn broken(map: &DistributionMap, policy: Policy) -> Bench {
    let mut bench = Bench::up_with(map, policy);
    bench.breaks(1);
    bench.pass(1_500);
    bench
}

impl Bench {
    fn said(&self, what: &str) -> bool {
        self.log
            .iter()
            .chain(self.stored.iter().flat_map(|stored| &stored.why))
            .any(|line| line.contains(what))
    }

    /// Until nothing is moved any more, and what follows has begun and is over too.
    fn come_to_rest(&mut self, up: &[u64]) {
        for _ in 0..4 {
            self.copy_on(up);
            self.pass(1_500);
            up.iter().for_each(|node| self.heartbeat(*node));
        }
        assert!(self.map().plans.is_empty(), "{:?}", self.map().plans);
    }
}

#[test]
fn a_third_disk_is_emptied_and_both_segments_are_made_again_on_it() {
    let map = without_spares();
    let mut bench = broken(&map, AUTO);
    let plan = bench.map().plans.first().unwrap();
    assert!(plan.cause.contains("n3/d1 becomes a spare: there is none for what n1/d1 had"), "{}", plan.cause);
    // What lost a copy is moved by nobody.
    assert!(plan.moves.iter().all(|step| {
        map.spans_of(step.run).all(|(span, _)| !span.replicas.iter().any(|copy| copy.disk.0 == 1))
    }));
    bench.come_to_rest(&UP);
    assert!(bench.said("n3/d1 is a spare from now on"));
    assert!(bench.said("n1/d1 is made again on n3/d1"));
    bench.all_have_their_copies_but("n1-d1-unmirrored");
    assert_eq!(bench.slices_on(3), 16, "eight slices of its own, eight mirrors");
    assert_eq!(bench.copies("n1-d1"), "n3+ n2+", "served where its home is now");
    assert!(!bench.map().disks[2].spare);
    bench.pass(10_000);
    assert!(bench.map().plans.is_empty(), "and that is all");
}

#[test]
fn a_disk_that_holds_nothing_is_the_spare_at_once() {
    let mut map = without_spares();
    map.disks[4].slots = map.disks[0].slots;
    let mut bench = broken(&map, AUTO);
    assert!(bench.said("n1/d1 is made again on n5/d1"));
    bench.come_to_rest(&UP);
    bench.all_have_their_copies_but("n1-d1-unmirrored");
}

#[test]
fn nothing_is_emptied_where_that_is_turned_off_or_has_no_room() {
    let bench = broken(&without_spares(), Policy { auto_make_spare: false, ..AUTO });
    assert!(bench.map().plans.is_empty());
    assert!(bench.said("n1/d1 cannot be made again: there is no spare"));

    let mut map = without_spares();
    for disk in &mut map.disks {
        disk.slots = SegmentSlots { primary: 8, secondary: 8, unmirrored: 2 };
    }
    for disk in &mut map.disks[4..] {
        disk.slots = SegmentSlots { primary: 2, secondary: 2, unmirrored: 2 };
    }
    let mut bench = broken(&map, AUTO);
    let version = bench.map().version;
    for _ in 0..10 {
        ALL.iter().for_each(|node| bench.heartbeat(*node));
        bench.pass(1_500);
    }
    assert_eq!(bench.map().version, version);
    assert!(bench.said("n3/d1 cannot be emptied to become one: there is no place for"), "{:#?}", bench.log);
    let told = bench.log.iter().filter(|line| line.contains("cannot be made again")).count();
    assert_eq!(told, 1, "{:#?}", bench.log);
}

#[test]
fn what_an_operator_cancels_is_not_begun_again() {
    let mut bench = broken(&without_spares(), AUTO);
    let plan = bench.map().plans.first().unwrap().id;
    assert!(matches!(bench.order(plan.0, PlanOrder::Cancel), crate::control::OperatorReply::Done { .. }));
    bench.pass(10_000);
    assert!(bench.map().plans.is_empty(), "{:?}", bench.map().plans);
    assert!(bench.said("an operator cancelled making one"));
}

#[test]
fn a_spare_that_is_away_for_a_moment_is_waited_for() {
    let mut map = without_spares();
    map.disks[5].spare = true;
    map.disks[5].slots = map.disks[0].slots;
    let mut bench = Bench::up_with(&map, AUTO);
    bench.disconnect(6);
    bench.pass(100);
    bench.breaks(1);
    bench.pass(2_000);
    assert!(bench.map().plans.is_empty());
    assert!(bench.said("n6/d1 is waited for"), "{:#?}", bench.log);
    // One that stays away is not.
    for _ in 0..35 {
        for node in 2..=5 {
            bench.heartbeat(node);
        }
        bench.pass(2_000);
    }
    assert_eq!(bench.map().plans.len(), 1, "{:#?}", bench.log);
}

#[test]
fn two_disks_get_a_spare_each() {
    let mut map = without_spares();
    for disk in &mut map.disks[4..] {
        disk.slots = SegmentSlots { primary: 8, secondary: 24, unmirrored: 6 };
    }
    let mut bench = broken(&map, AUTO);
    bench.breaks(3);
    bench.come_to_rest(&[2, 4, 5, 6]);
    assert!(bench.said("n1/d1 is made again on n5/d1") || bench.said("n1/d1 is made again on n6/d1"));
    assert!(
        bench.said("n3/d1 is made again on n5/d1") || bench.said("n3/d1 is made again on n6/d1"),
        "{:#?}",
        bench.log
    );
    bench.all_have_their_copies_but("unmirrored");
    assert!(ALL.len() == bench.map().nodes.len());
}
