//! What is left of a plan's moves once they are finished, and once the plan is given up.

use super::bench::{Bench, incarnation};
use super::map_of;
use super::redistribution::{ALL, roomy, spare};
use crate::config::Policy;
use crate::control::{NodeMessage, OperatorReply, PlanOrder, Redistribution, RedistributionOrder};
use crate::format::alloc::Segment;
use crate::ids::{DiskId, PlanId};
use crate::manager::{Input, Ticket, run_of};
use crate::map::plan::{Move, Plan};
use crate::map::verbs::Verb;
use crate::map::{DistributionMap, ReplicaState};

/// Copies that are gone are made again.
const AUTO_SPARE: Policy = Policy { auto_spare: true, ..Policy::MANUAL };

impl Bench {
    pub(super) fn order(&mut self, plan: u64, order: PlanOrder) -> OperatorReply {
        self.input(Input::Plan { ticket: Ticket(1), plan: PlanId(plan), order });
        self.replies.pop().unwrap().1
    }

    fn cancel(&mut self, plan: u64) {
        assert!(matches!(self.order(plan, PlanOrder::Cancel), OperatorReply::Done { .. }));
        assert!(self.map().plan(PlanId(plan)).is_none());
    }

    /// Empties n1 onto n5, of which what n1-d1 has becomes in sync alone.
    fn half_emptied(map: &DistributionMap) -> Self {
        let mut bench = Bench::up(map);
        bench.redistribute(spare("n1", &["n5"], true)).unwrap();
        bench.pass(10);
        bench.adopt(1);
        bench.ask_in_sync(1, 5, "n1-d1", None);
        assert_eq!(bench.copies("n1-d1"), "n5+ n2+");
        bench
    }

    fn fail_disk(&mut self, disk: u32) {
        let reason = "it is broken".to_owned();
        self.say(disk.into(), NodeMessage::DiskFailed { disk: DiskId(disk), reason });
    }
}

#[test]
fn a_taker_that_dies_keeps_what_it_had_taken_over() {
    let up = [1, 2, 3, 4, 6];
    for cancelled in [false, true] {
        let mut bench = Bench::half_emptied(&roomy());
        bench.disconnect(5);
        bench.failover("n5");
        assert_eq!(bench.copies("n1-d1"), "n2+ n5-");
        if cancelled {
            bench.cancel(2);
        }
        // As long as copies are not waited for any more.
        bench.pass(70_000);
        for _ in 0..5 {
            bench.copy_once(&up);
        }
        assert!(bench.map().plans.is_empty(), "what had not begun to be its own is given up");
        assert_eq!((bench.copies("n1-d1"), bench.copies("n2-d1")), ("n2+ n5-".into(), "n2+ n1+".into()));
        bench.register(5, incarnation(5));
        for _ in 0..5 {
            bench.copy_once(&ALL);
        }
        bench.all_have_their_copies();
    }
}

/// n1 and n2, and three spares, of which n3 is the one that fits best.
fn with_spares() -> DistributionMap {
    let mut map = map_of(2);
    for (index, power) in [(3u16, Some("a")), (4, None), (5, None)] {
        let node = crate::map::Node {
            id: crate::ids::NodeId(index),
            name: format!("n{index}"),
            power: power.map(str::to_owned),
            ..map.nodes[0].clone()
        };
        let disk =
            crate::map::Disk { id: DiskId(index.into()), node: node.id, spare: true, ..map.disks[0].clone() };
        map.nodes.push(node);
        map.disks.push(disk);
    }
    // n1 and its spare n3 hang on one feed, so what n1 had is dropped before n3 takes it.
    map.nodes[0].power = Some("a".into());
    map.disks[3].slots.primary += 1;
    map.disks[4].slots.primary += 2;
    map.validate().unwrap();
    map
}

fn regenerating(map: &DistributionMap) -> Bench {
    let mut bench = Bench::with(Some(map.clone()), AUTO_SPARE);
    for node in 1..=5 {
        bench.register(node, incarnation(node));
    }
    bench.fail_disk(1);
    bench.pass(10);
    bench
}

#[test]
fn a_spare_that_dies_is_replaced_like_what_it_was_to_replace() {
    for all in [false, true] {
        let mut map = with_spares();
        if !all {
            map.nodes[0].power = None;
        }
        let mut bench = regenerating(&map);
        let had = if all { "n2+ n3~" } else { "n2+ n1- n3~" };
        assert_eq!(bench.copies("n1-d1"), had);
        // Half of it is finished.
        bench.adopt(2);
        bench.ask_in_sync(2, 3, "n1-d1", None);
        assert_eq!(bench.copies("n1-d1"), "n3+ n2+");
        bench.fail_disk(3);
        let up = [1, 2, 4, 5];
        for _ in 0..20 {
            bench.copy_once(&up);
        }
        assert!(bench.map().plans.is_empty());
        // What n1 has still and what n3 had by then are two disks that are gone.
        let of_n1 = if all { "n4+ n2+" } else { "n5+ n2+" };
        assert_eq!((bench.copies("n1-d1"), bench.copies("n2-d1")), (of_n1.into(), "n2+ n4+".into()));
    }
}

#[test]
fn the_old_copy_stays_until_the_new_one_is_there() {
    for restarted in [false, true] {
        let mut bench = Bench::up(&roomy());
        bench.redistribute(spare("n1", &["n5"], true)).unwrap();
        bench.pass(10);
        bench.order(2, PlanOrder::Pause);
        for _ in 0..3 {
            bench.copy_once(&ALL);
        }
        assert_eq!(bench.copies("n2-d1"), "n2+ n1+ n5+");
        bench.disconnect(5);
        if restarted {
            bench.restart(Policy::MANUAL);
            for node in [1, 2, 3, 4, 6] {
                bench.register(node, incarnation(node));
            }
        }
        bench.order(2, PlanOrder::Resume);
        bench.pass(10);
        assert_eq!(bench.copies("n2-d1"), "n2+ n1+ n5+");
        bench.register(5, incarnation(5));
        bench.copy_on(&ALL);
        assert_eq!(bench.copies("n2-d1"), "n2+ n5+");
        assert_eq!(bench.slices_on(1), 0);
    }
}

#[test]
fn what_an_operator_fails_over_is_not_failed_back_by_a_plan_that_goes_on() {
    let mut bench = Bench::half_emptied(&roomy());
    bench.failover("n5");
    bench.pass(10);
    assert_eq!(bench.copies("n1-d1"), "n2+ n5+");
    let progress = bench.map().plans[0].progress(bench.map());
    assert_eq!((progress.slices, progress.in_sync, progress.syncing), (18, 8, 10));
    bench.copy_on(&ALL);
    assert_eq!(bench.copies("n1-d1"), "n2+ n5+");
    assert!(bench.map().disks[0].spare);
}

/// A role changes once: two plans that want different ones do not go on for ever.
#[test]
fn a_role_that_has_changed_is_not_changed_again() {
    let map = roomy();
    let run = |name: &str| {
        let device = map.device_named(name).unwrap();
        run_of(device.id, &device.spans[0])
    };
    let segment = Segment::Secondary;
    let role = |disk: u32| Move { run: run("n1-d1"), from: None, to: DiskId(disk), segment, primary: true };
    // Two that last: each brings something to a disk that is not there.
    let lasts = |from: u32, to: u32, name: &str| Move {
        run: run(name),
        from: Some(DiskId(from)),
        to: DiskId(to),
        segment: Segment::Primary,
        primary: false,
    };
    let plans = [
        Plan::new(PlanId(2), "one".into(), vec![role(2), lasts(3, 5, "n3-d1")]),
        Plan::new(PlanId(3), "another".into(), vec![role(1), lasts(4, 6, "n4-d1")]),
    ];
    let mut map = map.clone();
    for disk in &mut map.disks {
        disk.spare = false;
    }
    for plan in plans {
        map = map.apply(&[Verb::BeginPlan { plan }]).unwrap().unwrap();
    }
    let mut bench = Bench::new(Some(map));
    for node in 1..=4 {
        bench.register(node, incarnation(node));
    }
    bench.pass(10);
    let version = bench.map().version;
    for _ in 0..10 {
        bench.pass(10);
    }
    assert_eq!((bench.map().version, bench.map().plans.len()), (version, 2));
    bench.failover("n1");
    bench.failover("n2");
    let served = bench.copies("n1-d1");
    bench.pass(10);
    assert_eq!(bench.copies("n1-d1"), served);
    assert!(bench.map().devices.iter().all(|device| {
        device.spans.iter().all(|span| span.replicas.iter().all(|copy| copy.state == ReplicaState::InSync))
    }));
}

#[test]
fn rebalancing_makes_no_spare_of_a_disk_that_is_in_use() {
    let mut map = roomy();
    for disk in &mut map.disks[4..] {
        disk.spare = false;
    }
    let mut bench = Bench::up(&map);
    let order = RedistributionOrder { wish: Redistribution::Balance, carry_out: true };
    bench.redistribute(order).unwrap();
    assert!(bench.map().plans[0].spares.is_empty());
    bench.pass(10);
    bench.cancel(2);
    assert!(bench.map().disks.iter().all(|disk| !disk.spare));
}

#[test]
fn emptying_what_is_empty_changes_spares_only_where_there_are_none() {
    let mut map = roomy();
    // n5 has two disks: a spare, and one that never was.
    map.disks[5].node = map.nodes[4].id;
    map.disks[5].name = "d2".into();
    map.disks[5].spare = false;
    let mut bench = Bench::up(&map);
    bench.redistribute(spare("n5", &[], true)).unwrap();
    let last = bench.stored.last().unwrap();
    assert_eq!(last.batch, [Verb::SetSpare { disk: DiskId(6), spare: true }]);
}

#[test]
fn of_two_plans_that_cannot_go_on_neither_waits_for_the_other() {
    for paused in [false, true] {
        let mut map = roomy();
        let slots = |secondary| crate::map::SegmentSlots { primary: 0, secondary, unmirrored: 0 };
        for disk in &mut map.disks[4..] {
            (disk.spare, disk.slots) = (false, slots(8));
        }
        let segment = Segment::Secondary;
        let run = |name: &str| {
            let device = map.device_named(name).unwrap();
            run_of(device.id, &device.spans[0])
        };
        let step = |name: &str, from, to| Move {
            run: run(name),
            from: Some(DiskId(from)),
            to: DiskId(to),
            segment,
            primary: false,
        };
        let add = |name: &str, disk: u32| Verb::AddReplica {
            run: run(name),
            disk: DiskId(disk),
            segment,
            incarnation: incarnation(disk.into()),
        };
        // The slots of both have been given to other copies.
        let one = Plan::new(PlanId(2), "one".into(), vec![step("n2-d1", 1, 5)]);
        let other = Plan { paused, ..Plan::new(PlanId(3), "another".into(), vec![step("n4-d1", 3, 6)]) };
        let map = map.apply(&[add("n3-d1", 5), Verb::BeginPlan { plan: one }]).unwrap().unwrap();
        let map = map.apply(&[add("n1-d1", 6), Verb::BeginPlan { plan: other }]).unwrap().unwrap();
        let mut bench = Bench::new(Some(map));
        for node in ALL {
            bench.register(node, incarnation(node));
        }
        bench.pass(10);
        assert!(bench.map().plan(PlanId(2)).is_none());
        assert_eq!(bench.map().plan(PlanId(3)).is_some(), paused);
    }
}
