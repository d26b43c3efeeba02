//! While a move lasts there is a copy too many: which of them goes, and when, whoever dies meanwhile.

use super::bench::{Bench, incarnation};
use super::redistribution::{ALL, on_two_feeds, roomy, spare};
use crate::config::Policy;
use crate::control::{NodeMessage, OperatorReply, PlanOrder};
use crate::format::alloc::Segment;
use crate::ids::{DiskId, PlanId};
use crate::manager::{Input, Ticket, run_of};
use crate::map::DistributionMap;
use crate::map::plan::{Move, Plan};
use crate::map::verbs::Verb;

const PLAN: PlanId = PlanId(2);
/// Copies that are gone are made again.
const AUTO_SPARE: Policy = Policy { auto_spare: true, ..Policy::MANUAL };

impl Bench {
    pub(super) fn up_with(map: &DistributionMap, policy: Policy) -> Self {
        let mut bench = Self::with(Some(map.clone()), policy);
        for node in 1..=map.nodes.len() as u64 {
            bench.register(node, incarnation(node));
        }
        bench
    }

    fn tell(&mut self, order: PlanOrder) {
        self.input(Input::Plan { ticket: Ticket(1), plan: PLAN, order });
        let reply = self.replies.pop().unwrap().1;
        assert!(matches!(reply, OperatorReply::Done { .. }), "{reply:?}");
    }

    pub(super) fn breaks(&mut self, disk: u32) {
        let reason = "it is broken".to_owned();
        self.say(disk.into(), NodeMessage::DiskFailed { disk: DiskId(disk), reason });
        self.pass(10);
    }

    /// n1 is being emptied onto n5; everything is in sync there too, and the plan rests.
    fn both_in_sync(map: &DistributionMap, policy: Policy) -> Self {
        let mut bench = Self::up_with(map, policy);
        bench.redistribute(spare("n1", &["n5"], true)).unwrap();
        bench.pass(10);
        bench.tell(PlanOrder::Pause);
        for _ in 0..3 {
            bench.copy_once(&ALL);
        }
        assert_eq!(
            (bench.copies("n1-d1"), bench.copies("n2-d1")),
            ("n1+ n2+ n5+".into(), "n2+ n1+ n5+".into())
        );
        bench
    }

    fn both(&self) -> [String; 2] {
        ["n1-d1", "n2-d1"].map(|device| self.copies(device))
    }
}

fn step(map: &DistributionMap, device: &str, from: u32, to: u32) -> Move {
    let device = map.device_named(device).unwrap();
    let run = run_of(device.id, &device.spans[0]);
    Move { run, from: Some(DiskId(from)), to: DiskId(to), segment: Segment::Secondary, primary: false }
}

#[test]
fn of_two_copies_that_are_well_the_old_one_stays_when_the_plan_is_cancelled() {
    let mut bench = Bench::both_in_sync(&roomy(), Policy::MANUAL);
    bench.tell(PlanOrder::Cancel);
    assert!(bench.map().plans.is_empty());
    bench.all_have_their_copies();
    assert_eq!(bench.both(), ["n1+ n2+", "n2+ n1+"]);
    assert!(bench.map().disks[4].spare, "n5 is a spare again");
}

#[test]
fn a_cancelled_plan_never_gives_up_what_is_there_for_what_is_not() {
    let mut bench = Bench::both_in_sync(&roomy(), Policy::MANUAL);
    bench.disconnect(1);
    bench.tell(PlanOrder::Cancel);
    // Where n1 is primary nobody can say yet who goes on; where it is not, its copy goes.
    assert_eq!(bench.both(), ["n1+ n2+ n5+", "n2+ n5+"]);
    assert!(bench.map().plans[0].cancelled);
    let told = bench.manager.status(bench.now_ms).findings;
    assert!(told.iter().any(|told| told.what.starts_with("plan 2 is cancelled: 10 slices have")), "{told:?}");
    assert!(bench.refused(spare("n1", &["n6"], true)).contains("is cancelled and not over"));
    // It cannot be taken back, nor go on.
    for order in [PlanOrder::Pause, PlanOrder::Resume, PlanOrder::Cancel] {
        bench.input(Input::Plan { ticket: Ticket(1), plan: PLAN, order });
        let reply = bench.replies.pop().unwrap().1;
        assert!(matches!(reply, OperatorReply::Refused { .. }), "{reply:?}");
    }
    // Whoever is manager then.
    bench.restart(Policy::MANUAL);
    for node in [2, 3, 4, 5, 6] {
        bench.register(node, incarnation(node));
    }
    bench.failover("n1");
    bench.pass(10);
    assert_eq!(bench.both(), ["n2+ n5+", "n2+ n5+"]);
    // Its unmirrored slices are where they were, and nobody can read them: both copies wait for it.
    bench.register(1, incarnation(1));
    for _ in 0..3 {
        bench.copy_once(&ALL);
    }
    assert!(bench.map().plans.is_empty());
    bench.all_have_their_copies();
}

#[test]
fn the_copy_on_a_dead_taker_goes_with_a_cancelled_plan() {
    let mut bench = Bench::both_in_sync(&roomy(), Policy::MANUAL);
    bench.disconnect(5);
    bench.tell(PlanOrder::Cancel);
    assert!(bench.map().plans.is_empty());
    bench.all_have_their_copies();
    assert_eq!(bench.both(), ["n1+ n2+", "n2+ n1+"]);
}

#[test]
fn a_taker_that_dies_while_the_plan_rests_leaves_no_copy_too_many() {
    let mut bench = Bench::both_in_sync(&roomy(), Policy::MANUAL);
    bench.breaks(5);
    assert!(bench.map().plans.is_empty());
    bench.all_have_their_copies();
    assert_eq!(bench.both(), ["n1+ n2+", "n2+ n1+"]);
}

/// The partner is gone: the old copy and the new one are the two that there are.
#[test]
fn the_old_copy_stays_as_long_as_another_is_missing() {
    let mut bench = Bench::up(&roomy());
    bench.redistribute(spare("n1", &["n5"], true)).unwrap();
    bench.pass(10);
    bench.disconnect(2);
    bench.failover("n2");
    bench.adopt(1);
    bench.ask_stale(1, 2);
    let up = [1, 3, 4, 5, 6];
    for _ in 0..5 {
        bench.copy_once(&up);
    }
    assert_eq!(bench.both(), ["n1+ n2- n5+", "n1+ n2- n5+"]);
    bench.register(2, incarnation(2));
    bench.copy_on(&ALL);
    bench.all_have_their_copies();
    assert_eq!(bench.slices_on(1), 0);
}

#[test]
fn a_copy_that_is_lost_meanwhile_is_made_again_before_the_old_one_goes() {
    let mut bench = Bench::up_with(&roomy(), AUTO_SPARE);
    bench.redistribute(spare("n1", &["n5"], true)).unwrap();
    bench.pass(10);
    bench.breaks(2);
    // On n6, beside the plan.
    assert_eq!(bench.both(), ["n1+ n2- n5~ n6~", "n1+ n2- n5- n6~"]);
    bench.copy_on(&[1, 3, 4, 5, 6]);
    bench.all_have_their_copies();
    assert_eq!((bench.slices_on(1), bench.slices_on(2)), (0, 2), "n2 has what nobody else has");
}

#[test]
fn where_nothing_can_be_made_again_the_new_copy_takes_the_place_of_the_one_that_is_lost() {
    for cancelled in [false, true] {
        let mut map = roomy();
        map.disks[5].spare = false;
        let mut bench = Bench::up_with(&map, if cancelled { Policy::MANUAL } else { AUTO_SPARE });
        bench.redistribute(spare("n1", &["n5"], true)).unwrap();
        bench.pass(10);
        bench.breaks(2);
        for _ in 0..5 {
            bench.copy_once(&[1, 3, 4, 5, 6]);
        }
        if cancelled {
            assert_eq!(bench.both(), ["n1+ n2- n5+", "n1+ n2- n5+"]);
            bench.tell(PlanOrder::Cancel);
        }
        assert!(bench.map().plans.is_empty());
        assert_eq!(bench.both(), ["n1+ n5+", "n1+ n5+"]);
    }
}

/// Two in one failure set cannot both stay.
#[test]
fn within_a_failure_set_a_cancelled_move_leaves_what_was_there_although_another_is_lost() {
    let mut bench = Bench::up(&on_two_feeds());
    bench.redistribute(spare("n1", &["n5"], true)).unwrap();
    bench.pass(10);
    bench.breaks(2);
    for _ in 0..5 {
        bench.copy_once(&[1, 3, 4, 5, 6]);
    }
    assert_eq!(bench.both(), ["n1+ n2- n5+", "n1+ n2- n5+"]);
    bench.tell(PlanOrder::Cancel);
    assert!(bench.map().plans.is_empty());
    assert_eq!(bench.both(), ["n1+ n2-", "n1+ n2-"]);
}

#[test]
fn a_disk_from_which_a_plan_takes_something_is_made_again_at_once_but_for_that() {
    for begun in [true, false] {
        let map = roomy();
        let plan = Plan::new(PLAN, "n1 has less".into(), vec![step(&map, "n2-d1", 1, 4)]);
        let plan = Plan { paused: !begun, ..plan };
        let map = map.apply(&[Verb::BeginPlan { plan }]).unwrap().unwrap();
        let mut bench = Bench::up_with(&map, AUTO_SPARE);
        bench.pass(10);
        bench.breaks(1);
        // What a plan that rests has not come to waits for nobody.
        let there = if begun { "n2+ n1- n4~" } else { "n2+ n1- n5~" };
        assert_eq!(bench.both(), ["n2+ n1- n5~", there]);
        for _ in 0..10 {
            bench.copy_once(&[2, 3, 4, 5, 6]);
        }
        assert!(bench.map().plans.is_empty(), "{:?}", bench.map().plans);
        assert_eq!(bench.both(), ["n5+ n2+", if begun { "n2+ n4+" } else { "n2+ n5+" }]);
    }
}

/// Its primary does not count on it, and so does not ask to go on without it.
#[test]
fn a_copy_whose_node_dies_for_good_while_it_is_filled_is_made_again() {
    let mut bench = Bench::up_with(&roomy(), AUTO_SPARE);
    bench.failover_while_away(2);
    bench.ask_stale(1, 2);
    bench.ask_syncing(1, 2, None);
    assert_eq!(bench.both(), ["n1+ n2~", "n1+ n2~"]);
    bench.disconnect(2);
    for _ in 0..AUTO_SPARE.spare_after.as_secs() {
        [1, 3, 4, 5, 6].iter().for_each(|node| bench.heartbeat(*node));
        bench.pass(1_000);
    }
    assert_eq!(bench.both(), ["n1+ n2- n5~", "n1+ n2- n5~"]);
    bench.copy_on(&[1, 3, 4, 5, 6]);
    assert_eq!(bench.both(), ["n1+ n5+", "n5+ n1+"]);
}

#[test]
fn what_is_lost_later_is_made_again_where_the_rest_of_it_is() {
    let mut map = roomy();
    map.disks[5].spare = false;
    let mut bench = Bench::up_with(&map, AUTO_SPARE);
    // Of n2-d1, which n1 mirrors, n2 has to say so first.
    bench.disconnect(2);
    bench.breaks(1);
    assert_eq!(bench.both(), ["n1+ n2+", "n2+ n1+"]);
    bench.register(2, incarnation(2));
    bench.pass(10);
    assert_eq!(bench.both(), ["n2+ n1- n5~", "n2+ n1- n5~"]);
    let plan = bench.map().plans[0].clone();
    let first =
        plan.moves.iter().filter(|step| step.run.device == bench.map().devices[0].id).copied().collect();
    // As if it had been found out a moment later.
    let later = step(bench.map(), "n2-d1", 1, 5).run;
    let mut map = bench.map().clone();
    map = map
        .apply(&[
            Verb::EndPlan { plan: plan.id },
            Verb::DropReplica { run: later, disk: DiskId(5) },
            Verb::BeginPlan { plan: Plan { moves: first, ..plan } },
        ])
        .unwrap()
        .unwrap();
    bench.input(Input::Conflict { newest: Some(Box::new(map)) });
    bench.pass(10);
    assert_eq!(bench.both(), ["n2+ n1- n5~", "n2+ n1- n5~"]);
    bench.copy_on(&[2, 3, 4, 5, 6]);
    bench.all_have_their_copies_but("unmirrored");
}

#[test]
fn a_spare_that_was_taken_by_the_operator_and_dies_is_replaced_by_another() {
    for done in [false, true] {
        let mut bench = Bench::up_with(&roomy(), AUTO_SPARE);
        bench.redistribute(spare("n1", &["n5"], true)).unwrap();
        bench.pass(10);
        bench.adopt(1);
        bench.ask_in_sync(1, 5, "n1-d1", None);
        assert_eq!(bench.both(), ["n5+ n2+", "n2+ n1+ n5~"]);
        if done {
            bench.copy_on(&ALL);
            assert_eq!(bench.both(), ["n5+ n2+", "n2+ n5+"]);
        }
        bench.breaks(5);
        for _ in 0..20 {
            bench.copy_once(&[1, 2, 3, 4, 6]);
        }
        assert!(bench.map().plans.is_empty(), "{:?}", bench.map().plans);
        // n1 is a spare itself by then, and of two the first is taken.
        let (on, other) = if done { ("n1+ n2+", "n2+ n1+") } else { ("n6+ n2+", "n2+ n1+") };
        assert_eq!(bench.both(), [on, other]);
    }
}

/// It was pulled out, or did not come up with the machine: nobody reports that it failed.
#[test]
fn a_disk_that_its_node_has_come_back_without_is_not_waited_for() {
    let mut map = roomy();
    map.disks[4].spare = false;
    let step = step(&map, "n2-d1", 1, 5);
    let plan = Plan::new(PLAN, "n1 has less".into(), vec![step]);
    let mut bench = Bench::up_with(&map.apply(&[Verb::BeginPlan { plan }]).unwrap().unwrap(), AUTO_SPARE);
    for device in ["n1-d1", "n2-d1"] {
        assert_eq!(bench.map().device_named(device).unwrap().spans.len(), 1);
    }
    bench.pass(10);
    assert_eq!(bench.both(), ["n1+ n2+", "n2+ n1+ n5~"]);
    let lacks = |bench: &mut Bench, node: u64| {
        let mut registration = bench.registration(node, incarnation(node));
        registration.disks[0].content = crate::control::DiskContent::Blank;
        bench.register_as(registration);
    };
    lacks(&mut bench, 5);
    for round in 0..8 {
        for node in ALL {
            bench.heartbeat(node);
        }
        // Another connection begins nothing anew.
        if round == 4 {
            lacks(&mut bench, 5);
        }
        bench.pass(10_000);
    }
    assert!(bench.map().plans.is_empty());
    assert_eq!(bench.both(), ["n1+ n2+", "n2+ n1+"]);
    // And what lies on one that is missing is made again.
    lacks(&mut bench, 1);
    bench.ask_stale(2, 1);
    for _ in 0..8 {
        for node in ALL {
            bench.heartbeat(node);
        }
        bench.pass(10_000);
    }
    assert_eq!(bench.both(), ["n2+ n1- n6~", "n2+ n1- n6~"]);
}

/// A plan takes one copy of some slices elsewhere, and then the other: each waits for the other if that is lost.
#[test]
fn what_waits_behind_a_move_does_not_keep_it_waiting() {
    let mut map = roomy();
    for disk in &mut map.disks[4..] {
        disk.spare = false;
    }
    let moves = vec![step(&map, "n2-d1", 1, 5), Move { primary: true, ..step(&map, "n2-d1", 2, 6) }];
    let plan = Plan::new(PLAN, "both go".into(), moves);
    let mut bench = Bench::up_with(&map.apply(&[Verb::BeginPlan { plan }]).unwrap().unwrap(), AUTO_SPARE);
    bench.pass(10);
    assert_eq!(bench.copies("n2-d1"), "n2+ n1+ n5~");
    bench.breaks(2);
    for _ in 0..5 {
        bench.copy_once(&[1, 3, 4, 5, 6]);
    }
    assert!(bench.map().plans.is_empty(), "{:?}", bench.map().plans);
    assert_eq!(bench.copies("n2-d1"), "n1+ n5+");
}

/// A disk that is to be a spare need not hold anything that is moved: nobody else takes it meanwhile.
#[test]
fn what_one_plan_makes_a_spare_of_no_other_takes() {
    let mut map = roomy();
    map.disks[5].spare = false;
    let first = Plan {
        spares: [DiskId(1), DiskId(6)].into(),
        ..Plan::new(PLAN, "n1 and n6 are spares".into(), vec![step(&map, "n2-d1", 1, 5)])
    };
    map.disks[4].spare = false;
    let map = map.apply(&[Verb::BeginPlan { plan: first }]).unwrap().unwrap();
    let mut bench = Bench::up_with(&map, Policy::MANUAL);
    let reason = bench.refused(spare("n3", &["n6"], true));
    assert!(reason.starts_with("plan 2 moves n6/d1"), "{reason}");
    // One that was there before is not disturbed.
    let second = Plan {
        paused: true,
        ..Plan::new(PlanId(3), "n6 has more".into(), vec![step(bench.map(), "n4-d1", 3, 6)])
    };
    let map = bench.map().apply(&[Verb::BeginPlan { plan: second }]).unwrap().unwrap();
    bench.input(Input::Conflict { newest: Some(Box::new(map)) });
    bench.copy_on(&ALL);
    assert!(bench.map().plan(PLAN).is_none());
    assert!(!bench.map().disks[5].spare);
    bench.input(Input::Plan { ticket: Ticket(1), plan: PlanId(3), order: PlanOrder::Resume });
    bench.copy_on(&ALL);
    assert_eq!(bench.slices_on(6), 8);
}

#[test]
fn what_has_a_copy_on_a_spare_that_was_taken_is_not_made_again_there() {
    // n5 takes n1's place by a plan that rests; what n1-d1 has there took the place of its partner's copy.
    let mut map = roomy();
    map.disks[5].failed = Some(crate::map::Failed { reason: "it is broken".into() });
    map.disks[4].spare = false;
    let incarnation_5 = incarnation(5);
    let device = map.devices.iter_mut().find(|device| device.name == "n1-d1").unwrap();
    let spare_copy =
        crate::map::Replica { disk: DiskId(5), incarnation: incarnation_5, ..device.spans[0].replicas[1] };
    device.spans[0].replicas[1] = spare_copy;
    let plan = Plan {
        spares: [DiskId(1), DiskId(5)].into(),
        paused: true,
        ..Plan::new(PLAN, "n1 becomes a spare".into(), vec![step(&map, "n2-d1", 1, 5)])
    };
    let map = map.apply(&[Verb::BeginPlan { plan }]).unwrap().unwrap();
    let mut bench = Bench::up_with(&map, AUTO_SPARE);
    bench.breaks(1);
    assert_eq!(bench.copies("n1-d1"), "n5+ n1-");
    for _ in 0..5 {
        bench.copy_once(&ALL);
    }
    assert_eq!(bench.copies("n1-d1"), "n5+ n1-", "its only other copy is not given up for one that it has");
}
