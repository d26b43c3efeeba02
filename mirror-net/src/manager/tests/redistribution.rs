//! `spare make` and `rebalance`, as the manager decides and carries them out.

use super::bench::incarnation;
use super::{Bench, map_of};
use crate::control::{OperatorReply, PlanOrder, Redistribution, RedistributionOrder};
use crate::format::alloc::Segment;
use crate::ids::{DiskId, PlanId};
use crate::manager::{Input, Ticket, run_of};
use crate::map::plan::{Move, Plan};
use crate::map::verbs::Verb;
use crate::map::{DistributionMap, ReplicaState, SegmentSlots};

/// Six nodes: four that mirror each other two by two, with an eighth of their slots free, and two spares.
pub(super) fn roomy() -> DistributionMap {
    let mut map = map_of(4);
    for disk in &mut map.disks {
        disk.slots = SegmentSlots { primary: 16, secondary: 16, unmirrored: 4 };
    }
    for index in [5u16, 6] {
        let node = crate::map::Node {
            id: crate::ids::NodeId(index),
            name: format!("n{index}"),
            ..map.nodes[0].clone()
        };
        let disk =
            crate::map::Disk { id: DiskId(index.into()), node: node.id, spare: true, ..map.disks[0].clone() };
        map.nodes.push(node);
        map.disks.push(disk);
    }
    map.validate().unwrap();
    map
}

pub(super) fn spare(emptied: &str, onto: &[&str], carry_out: bool) -> RedistributionOrder {
    let onto = onto.iter().map(|name| (*name).to_owned()).collect();
    RedistributionOrder { wish: Redistribution::Spare { emptied: emptied.into(), onto }, carry_out }
}

impl Bench {
    pub(super) fn redistribute(&mut self, order: RedistributionOrder) -> Result<Vec<String>, String> {
        self.input(Input::Redistribute { ticket: Ticket(9), order });
        match self.replies.pop().unwrap().1 {
            OperatorReply::Done { lines } => Ok(lines),
            OperatorReply::Refused { reason } => Err(reason),
            reply => panic!("{reply:?}"),
        }
    }

    pub(super) fn refused(&mut self, order: RedistributionOrder) -> String {
        let (before, stored) = (self.map().version, self.stored.len());
        let reason = self.redistribute(order).unwrap_err();
        assert_eq!((self.map().version, self.stored.len()), (before, stored), "nothing changed");
        assert!(!reason.contains('\n'), "{reason}");
        reason
    }

    /// Every node says what it would: primaries ask to have what is syncing in sync, and everybody adopts.
    pub(super) fn copy_on(&mut self, up: &[u64]) {
        for _ in 0..200 {
            if self.map().plans.iter().all(|plan| plan.paused) {
                return;
            }
            self.copy_once(up);
        }
        panic!("it does not end: {:?}", self.map().plans);
    }

    pub(super) fn copy_once(&mut self, up: &[u64]) {
        for node in up {
            self.adopt(*node);
            self.heartbeat(*node);
        }
        let map = self.map().clone();
        for device in &map.devices {
            for span in &device.spans {
                let node = |disk| map.node_of(disk).unwrap().0;
                let asker = u64::from(node(span.primary().disk));
                for copy in &span.replicas {
                    let peer = node(copy.disk);
                    if !up.contains(&asker) || !up.contains(&u64::from(peer)) {
                        continue;
                    }
                    match copy.state {
                        ReplicaState::InSync => {}
                        ReplicaState::Syncing => self.ask_in_sync(asker, peer, &device.name, None),
                        ReplicaState::Stale => self.ask_syncing(asker, peer, None),
                    }
                }
            }
        }
        self.pass(100);
    }

    pub(super) fn slices_on(&self, disk: u32) -> u32 {
        let spans = self.map().devices.iter().flat_map(|device| &device.spans);
        spans.filter(|span| span.replica_on(DiskId(disk)).is_some()).map(|span| span.count).sum()
    }

    pub(super) fn all_have_their_copies(&self) {
        self.all_have_their_copies_but("no device");
    }

    /// The same, but for devices with that in their name.
    pub(super) fn all_have_their_copies_but(&self, name: &str) {
        for device in self.map().devices.iter().filter(|device| !device.name.contains(name)) {
            for span in &device.spans {
                let states: Vec<_> = span.replicas.iter().map(|copy| copy.state).collect();
                assert_eq!(states, vec![ReplicaState::InSync; device.copies.into()], "{}", device.name);
            }
        }
    }
}

pub(super) const ALL: [u64; 6] = [1, 2, 3, 4, 5, 6];

#[test]
fn a_node_is_emptied_onto_the_others_and_is_a_spare_then() {
    let mut bench = Bench::up(&roomy());
    let lines = bench.redistribute(spare("n1", &[], true)).unwrap();
    assert!(lines[0].starts_with("1.1 GiB to copy"), "{lines:#?}");
    assert!(lines.iter().any(|line| line == "then n1/d1 is a spare"), "{lines:#?}");
    bench.copy_on(&ALL);
    assert_eq!(bench.slices_on(1), 0);
    assert!(bench.map().disks[0].spare);
    bench.all_have_their_copies();
    assert_eq!((bench.slices_on(5), bench.slices_on(6)), (0, 0), "spares are left alone");
    // The device stays where it is mounted, and no move took more copies in sync away than it had made.
    assert_eq!(bench.map().devices[0].claim, roomy().devices[0].claim);
    let reason = bench.refused(spare("n1", &[], true));
    assert_eq!(reason, "n1 is a spare already");
}

#[test]
fn a_dry_run_tells_and_changes_nothing() {
    let mut bench = Bench::up(&roomy());
    let version = bench.map().version;
    let lines = bench.redistribute(spare("n1/d1", &["n5", "n6/d1"], false)).unwrap();
    assert_eq!(
        lines,
        [
            "1.1 GiB to copy, 4 runs, onto n5/d1 (576 MiB), n6/d1 (576 MiB)",
            "n1-d1: 512 MiB to copy, 1 run, 512 MiB change their primary",
            "n1-d1-unmirrored: 128 MiB to copy, 2 runs, 128 MiB change their primary",
            "n2-d1: 512 MiB to copy, 1 run",
            "at most 1m 4s where disks and links can do 10 MiB/s a node while hosts are busy (regen_floor), less where \
             hosts leave gaps",
            "at risk meanwhile: nothing; a copy goes when its successor is in sync",
            "n1-d1, n1-d1-unmirrored stay exported where they are",
            "then n1/d1 is a spare",
        ]
    );
    assert_eq!((bench.map().version, bench.stored.len()), (version, 0));
}

#[test]
fn chosen_spares_take_it_and_are_none_any_more() {
    let mut bench = Bench::up(&roomy());
    bench.redistribute(spare("n1", &["n5"], true)).unwrap();
    assert!(!bench.map().disks[4].spare && bench.map().disks[5].spare);
    bench.copy_on(&ALL);
    assert_eq!((bench.slices_on(1), bench.slices_on(5)), (0, 18));
    bench.all_have_their_copies();
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_moves() {
    let mut bench = Bench::up(&map_of(4));
    let reason = bench.refused(spare("n1", &[], true));
    assert!(
        reason.starts_with("there is no place for 16 slices") && reason.contains("16 more slots"),
        "{reason}"
    );
    assert!(bench.refused(spare("n9", &[], true)).starts_with("there is no node \"n9\""));
    assert_eq!(bench.refused(spare("n1/d7", &[], true)), "node n1 has no disk \"d7\"; its disks are d1");

    let mut bench = Bench::up(&roomy());
    assert!(bench.refused(spare("n1", &["n1/d1", "n5"], true)).contains("is to be emptied"));
    bench.disconnect(5);
    assert!(bench.refused(spare("n1", &["n5"], true)).contains("n5/d1 cannot take anything"));
    // Nobody could read n1's unmirrored slices any more.
    bench.disconnect(1);
    let reason = bench.refused(spare("n1", &["n6"], true));
    assert!(reason.contains("nobody could read what is to move: n1-d1"), "{reason}");
    assert!(reason.contains("n1-d1-unmirrored: their primary n1/d1 does not serve them"), "{reason}");
}

#[test]
fn a_second_plan_for_the_same_disks_is_refused() {
    let mut bench = Bench::up(&roomy());
    bench.redistribute(spare("n1", &["n5"], true)).unwrap();
    for (name, onto) in [("n1", "n6"), ("n3", "n5"), ("n2", "n6")] {
        let reason = bench.refused(spare(name, &[onto], true));
        assert!(reason.contains("mirrorctl plan watch 2"), "{name}: {reason}");
    }
    let order = RedistributionOrder { wish: Redistribution::Balance, carry_out: true };
    assert!(bench.refused(order).contains("plan 2 moves something"));
    // One that has nothing to do with it may run beside it.
    bench.redistribute(spare("n3", &["n6"], true)).unwrap();
    assert_eq!(bench.map().plans.len(), 2);
    bench.copy_on(&ALL);
    assert_eq!((bench.slices_on(1), bench.slices_on(3)), (0, 0));
    bench.all_have_their_copies();
}

#[test]
fn one_that_is_cancelled_leaves_what_was_there_and_what_is_in_sync() {
    let mut bench = Bench::up(&roomy());
    bench.redistribute(spare("n1", &["n5"], true)).unwrap();
    bench.pass(10);
    assert_eq!(bench.slices_on(5), 18, "everything has begun");
    // Only what n1 is primary of is in sync by now.
    bench.adopt(1);
    bench.ask_in_sync(1, 5, "n1-d1", None);
    let plan = PlanId(2);
    bench.input(Input::Plan { ticket: Ticket(1), plan, order: PlanOrder::Cancel });
    assert!(bench.map().plans.is_empty());
    bench.all_have_their_copies();
    assert_eq!(bench.copies("n1-d1"), "n5+ n2+");
    assert_eq!(bench.copies("n2-d1"), "n2+ n1+");
    bench.redistribute(spare("n1", &["n5"], true)).unwrap();
    bench.copy_on(&ALL);
    assert_eq!(bench.slices_on(1), 0);
}

/// n1, n3 and n5 hang on one feed, n2, n4 and n6 on another.
pub(super) fn on_two_feeds() -> DistributionMap {
    let mut map = roomy();
    for (index, node) in map.nodes.iter_mut().enumerate() {
        node.power = Some(["feed-a", "feed-b"][index % 2].into());
    }
    map.validate().unwrap();
    map
}

#[test]
fn within_a_failure_set_a_cancelled_move_leaves_one_of_the_two() {
    for in_sync in [false, true] {
        let mut bench = Bench::up(&on_two_feeds());
        bench.redistribute(spare("n1", &["n5"], true)).unwrap();
        bench.pass(10);
        bench.input(Input::Plan { ticket: Ticket(1), plan: PlanId(2), order: PlanOrder::Pause });
        if in_sync {
            // Paused, so the old copies stay where they are although the new ones are in sync.
            for _ in 0..3 {
                bench.copy_once(&ALL);
            }
            assert_eq!(bench.copies("n1-d1"), "n1+ n2+ n5+");
        }
        bench.input(Input::Plan { ticket: Ticket(1), plan: PlanId(2), order: PlanOrder::Cancel });
        assert!(bench.map().plans.is_empty());
        assert_eq!((bench.copies("n1-d1"), bench.copies("n2-d1")), ("n1+ n2+".into(), "n2+ n1+".into()));
        assert!(bench.map().disks[4].spare, "n5 is a spare again");
    }
}

#[test]
fn within_a_failure_set_the_copy_that_serves_stays_when_the_plan_is_cancelled() {
    let mut bench = Bench::up(&on_two_feeds());
    bench.redistribute(spare("n1", &["n5"], true)).unwrap();
    bench.pass(10);
    bench.input(Input::Plan { ticket: Ticket(1), plan: PlanId(2), order: PlanOrder::Pause });
    for _ in 0..3 {
        bench.copy_once(&ALL);
    }
    // n1 and n2 go, the new copy is all that serves.
    for node in [2u64, 1] {
        bench.disconnect(node);
        bench.failover(&format!("n{node}"));
    }
    assert_eq!(bench.span("n1-d1").primary().disk, DiskId(5));
    bench.input(Input::Plan { ticket: Ticket(1), plan: PlanId(2), order: PlanOrder::Cancel });
    assert!(bench.map().plans.is_empty());
    assert_eq!(bench.span("n1-d1").primary().disk, DiskId(5));
    assert!(bench.span("n1-d1").replica_on(DiskId(1)).is_none());
}

#[test]
fn a_plan_that_has_become_impossible_is_given_up() {
    let mut map = roomy();
    map.disks[4].spare = false;
    map.disks[4].slots = SegmentSlots { primary: 0, secondary: 8, unmirrored: 0 };
    let run = |name: &str| {
        let device = map.device_named(name).unwrap();
        run_of(device.id, &device.spans[0])
    };
    // Somebody has given the only slots to another copy.
    let (disk, segment) = (DiskId(5), Segment::Secondary);
    let taken = Verb::AddReplica { run: run("n3-d1"), disk, segment, incarnation: incarnation(5) };
    let step = Move { run: run("n2-d1"), from: Some(DiskId(1)), to: disk, segment, primary: false };
    let plan = Plan::new(PlanId(2), "n1/d1 is to be empty".into(), vec![step]);
    let mut bench = Bench::new(Some(map.apply(&[taken, Verb::BeginPlan { plan }]).unwrap().unwrap()));
    for node in ALL {
        bench.register(node, incarnation(node));
    }
    bench.pass(10);
    assert!(bench.map().plans.is_empty());
    assert_eq!(bench.slices_on(1), 18);
    assert!(
        bench.stored.iter().any(|stored| stored.why.iter().any(|why| why.contains("has no room any more")))
    );
}

#[test]
fn when_one_of_the_takers_dies_the_plan_goes_on_with_the_others() {
    let mut bench = Bench::up(&roomy());
    bench.redistribute(spare("n1", &["n5", "n6"], true)).unwrap();
    bench.pass(10);
    let reason = "it is broken".to_owned();
    let disk = DiskId(6);
    bench.say(6, crate::control::NodeMessage::DiskFailed { disk, reason });
    bench.copy_on(&ALL);
    assert_eq!(bench.slices_on(6), 0);
    assert_eq!(bench.slices_on(1) + bench.slices_on(5), 18, "n6's part is where it was");
    assert!(bench.slices_on(5) > 0);
    bench.all_have_their_copies();
    bench.redistribute(spare("n1", &["n5"], true)).unwrap();
    bench.copy_on(&ALL);
    assert_eq!(bench.slices_on(1), 0);
}

#[test]
fn the_node_that_is_emptied_may_die_on_the_way() {
    let mut bench = Bench::up(&roomy());
    bench.redistribute(spare("n1", &["n5"], true)).unwrap();
    bench.pass(10);
    let up = [2, 3, 4, 5, 6];
    bench.disconnect(1);
    bench.failover("n1");
    // The unmirrored slices wait for it, and so does the plan.
    for _ in 0..20 {
        bench.copy_once(&up);
    }
    assert_eq!(bench.copies("n2-d1"), "n2+ n5+");
    assert_eq!(bench.map().plans.len(), 1);
    bench.register(1, incarnation(1));
    bench.copy_on(&ALL);
    assert_eq!(bench.slices_on(1), 0);
}

#[test]
fn rebalancing_makes_disks_equally_full_and_brings_primaries_home() {
    let mut map = roomy();
    for disk in &mut map.disks[4..] {
        disk.spare = false;
    }
    let mut bench = Bench::up(&map);
    bench.failover("n3");
    let order = |carry_out| RedistributionOrder { wish: Redistribution::Balance, carry_out };
    let lines = bench.redistribute(order(true)).unwrap();
    assert!(lines[0].starts_with("1.5 GiB to copy"), "{lines:#?}");
    bench.copy_on(&ALL);
    let loads: Vec<u32> = (1..=6).map(|disk| bench.slices_on(disk)).collect();
    assert_eq!(loads, [12; 6]);
    bench.all_have_their_copies();
    let lines = bench.redistribute(order(true)).unwrap();
    assert_eq!(lines, ["nothing is to be moved: it is as even as the rules allow"]);
}
