//! `disk remove` and `node remove`, as the manager decides and carries them out.

use super::bench::incarnation;
use super::redistribution::{ALL, on_two_feeds, roomy, spare};
use super::{Bench, map_of};
use crate::config::Policy;
use crate::control::{
    ExportReport, ManagerMessage, NodeMessage, NodeReport, PlanOrder, Redistribution, RedistributionOrder,
};
use crate::ids::{DiskId, NodeId, PlanId};
use crate::manager::{Input, Ticket};
use std::time::Duration;

fn disk(name: &str, onto: &[&str], carry_out: bool) -> RedistributionOrder {
    let onto = onto.iter().map(|name| (*name).to_owned()).collect();
    RedistributionOrder { wish: Redistribution::RemoveDisk { disk: name.into(), onto }, carry_out }
}

fn node(name: &str, onto: &[&str], force: bool) -> RedistributionOrder {
    let onto = onto.iter().map(|name| (*name).to_owned()).collect();
    RedistributionOrder {
        wish: Redistribution::RemoveNode { node: name.into(), onto, force },
        carry_out: true,
    }
}

#[test]
fn a_disk_is_emptied_and_leaves() {
    let mut bench = Bench::up(&roomy());
    let told = bench.redistribute(disk("n1/d1", &[], false)).unwrap();
    assert!(told[0].starts_with("1.1 GiB to copy"), "{told:#?}");
    assert!(told.iter().any(|line| line == "then n1/d1 leaves the cluster"), "{told:#?}");
    assert!(bench.stored.is_empty(), "a dry run");
    bench.redistribute(disk("n1/d1", &[], true)).unwrap();
    assert!(bench.map().disk(DiskId(1)).is_some(), "not before all of it is elsewhere");
    bench.copy_on(&ALL);
    assert_eq!(bench.map().disk(DiskId(1)), None);
    assert_eq!(bench.map().last_disk, 6);
    assert_eq!(bench.map().nodes, roomy().nodes, "the node stays, and exports");
    assert_eq!(bench.map().devices[0].claim, roomy().devices[0].claim);
    bench.all_have_their_copies();
    let why = &bench.stored.last().unwrap().why;
    assert!(why.iter().any(|line| line == "n1/d1 is no part of the cluster any more"), "{why:#?}");
    // The machine restarts with the disk still in it: its node is ours all the same.
    let mut registration = bench.registration(2, incarnation(1));
    registration.node = "n1".into();
    let content = crate::control::DiskContent::Ours { cluster: bench.map().cluster, disk: DiskId(1) };
    registration.disks[0].content = content;
    let connection = bench.register_as(registration);
    assert!(!bench.closed.contains(&connection));
}

#[test]
fn a_node_leaves_with_its_disk_once_others_export_and_hold_all_that_it_had() {
    let mut bench = Bench::up(&roomy());
    let told = bench.redistribute(node("n1", &[], false)).unwrap();
    let exported = "n1-d1 is exported by n2 from the beginning, which then has 8 of its 8 slices";
    assert!(told.iter().any(|line| line == exported), "{told:#?}");
    assert!(told.iter().any(|line| line == "then n1 leaves the cluster with n1/d1"), "{told:#?}");
    assert_eq!(bench.map().device_named("n1-d1").unwrap().claim.node, NodeId(2));
    bench.copy_on(&ALL);
    assert_eq!((bench.map().node(NodeId(1)), bench.map().disk(DiskId(1))), (None, None));
    assert!(bench.map().devices.iter().all(|device| device.claim.node != NodeId(1)));
    bench.all_have_their_copies();
    // It is told, and waits to be added as a newcomer.
    let connection = bench.connections["n1"];
    let told = |(to, message): &(_, ManagerMessage)| {
        *to == connection && matches!(message, ManagerMessage::Map { map } if map.node(NodeId(1)).is_none())
    };
    assert!(bench.sent.iter().any(told));
    bench.disconnect(1);
    assert!(bench.manager.status(bench.now_ms).nodes.iter().all(|node| node.name != "n1"));
    let connection = bench.register(1, incarnation(1));
    let waits = |(to, message): &(_, ManagerMessage)| {
        *to == connection
            && matches!(message, ManagerMessage::Waiting { why } if why.contains("if it was removed"))
    };
    assert!(bench.sent.iter().any(waits));
    let given = |(to, message): &(_, ManagerMessage)| {
        *to == connection && !matches!(message, ManagerMessage::Waiting { .. })
    };
    assert!(!bench.sent.iter().any(given));
}

#[test]
fn what_holds_nothing_leaves_at_once() {
    let mut bench = Bench::up(&roomy());
    let lines = bench.redistribute(disk("n5/d1", &[], true)).unwrap();
    assert_eq!(lines, ["n5/d1 is no part of the cluster any more"]);
    bench.redistribute(node("n5", &[], false)).unwrap();
    bench.redistribute(node("n6", &[], false)).unwrap();
    assert_eq!(bench.map().nodes.len(), 4);
    assert_eq!((bench.map().last_disk, bench.map().last_node), (6, 6));
    assert!(bench.map().plans.is_empty());
}

#[test]
fn what_cannot_leave_is_refused_before_anything_moves() {
    let mut bench = Bench::up(&map_of(4));
    assert!(bench.refused(disk("n1/d1", &[], true)).contains("16 more slots are needed"));
    assert!(bench.refused(node("n1", &[], false)).contains("16 more slots are needed"));
    assert!(bench.refused(disk("n1", &[], true)).ends_with("mirrorctl node remove n1"));
    assert!(bench.refused(disk("n1/d9", &[], true)).contains("its disks are d1"));
    assert!(bench.refused(node("n9", &[], false)).starts_with("there is no node \"n9\""));

    let mut bench = Bench::up(&roomy());
    assert!(bench.refused(disk("n1/d1", &["n1/d1"], true)).contains("is to be emptied"));
    bench.redistribute(disk("n1/d1", &[], true)).unwrap();
    assert!(bench.refused(disk("n1/d1", &[], true)).contains("removes n1/d1 already"));
    assert!(bench.refused(node("n1", &[], false)).contains("mirrorctl plan watch 2"));
    assert!(bench.refused(spare("n1", &["n6"], true)).contains("mirrorctl plan watch 2"));
    // What is being removed takes nothing.
    assert!(bench.refused(disk("n3/d1", &["n1"], true)).contains("mirrorctl plan watch 2"));

    // The last copy of something, on a node that is away.
    let mut bench = Bench::up(&roomy());
    bench.disconnect(1);
    let reason = bench.refused(disk("n1/d1", &[], true));
    assert!(reason.contains("nobody could read what is to move: n1-d1"), "{reason}");

    // One feed less, and too little room on the other nodes of n2's feed.
    let mut map = on_two_feeds();
    for disk in [3, 5] {
        map.disks[disk].slots.primary = map.disks[disk].slots.primary.min(8);
        map.disks[disk].slots.secondary = map.disks[disk].slots.secondary.min(8);
    }
    let mut bench = Bench::up(&map);
    let reason = bench.refused(node("n2", &[], false));
    assert!(reason.contains("shares its power or switch"), "{reason}");

    let mut alone = map_of(2);
    alone.devices.clear();
    alone.disks.truncate(1);
    alone.nodes.truncate(1);
    let mut bench = Bench::up(&alone);
    assert!(bench.refused(node("n1", &[], false)).contains("only node"));
}

#[test]
fn what_is_in_use_is_not_taken_from_its_user_unasked() {
    let mut bench = Bench::up(&roomy());
    let device = bench.map().device_named("n1-d1").unwrap().id;
    let export = ExportReport {
        device,
        in_use: Some("mounted at /srv".into()),
        path: Some("/dev/ublkb0".into()),
        uri: None,
        error: None,
        requests: 1,
        pending: 0,
    };
    let adopted = bench.map().version;
    let report = NodeReport { adopted, exports: vec![export], ..NodeReport::default() };
    bench.say(1, NodeMessage::Report(report));
    let reason = bench.refused(node("n1", &[], false));
    assert!(reason.starts_with("n1-d1 is in use: mounted at /srv on n1; end that first"), "{reason}");
    bench.redistribute(node("n1", &[], true)).unwrap();
    assert_eq!(bench.map().device_named("n1-d1").unwrap().claim.node, NodeId(2));
}

#[test]
fn a_removal_that_is_cancelled_removes_nothing() {
    let mut bench = Bench::up(&roomy());
    bench.redistribute(disk("n1/d1", &[], true)).unwrap();
    bench.pass(10);
    bench.input(Input::Plan { ticket: Ticket(1), plan: PlanId(2), order: PlanOrder::Cancel });
    bench.copy_on(&ALL);
    assert!(bench.map().disk(DiskId(1)).is_some());
    bench.all_have_their_copies();
    bench.redistribute(disk("n1/d1", &[], true)).unwrap();
    bench.copy_on(&ALL);
    assert_eq!(bench.map().disk(DiskId(1)), None);
}

/// Its unmirrored data would be lost with it, so these nodes have none.
fn all_mirrored() -> crate::map::DistributionMap {
    let mut map = roomy();
    map.devices.retain(|device| device.is_mirrored());
    map.validate().unwrap();
    map
}

#[test]
fn a_disk_that_failed_leaves_once_what_it_had_is_made_again() {
    let mut bench = Bench::up(&all_mirrored());
    let reason = "it is broken".to_owned();
    bench.say(1, NodeMessage::DiskFailed { disk: DiskId(1), reason });
    bench.copy_once(&ALL);
    bench.copy_once(&ALL);
    assert!(bench.slices_on(1) > 0, "stale copies");
    bench.redistribute(disk("n1/d1", &[], true)).unwrap();
    bench.copy_on(&ALL);
    assert_eq!(bench.map().disk(DiskId(1)), None);
    bench.all_have_their_copies();
}

#[test]
fn a_node_that_is_gone_for_good_leaves_and_a_regeneration_meanwhile_is_waited_for() {
    let up = [2, 3, 4, 5, 6];
    for policy in [
        Policy::MANUAL,
        Policy { auto_spare: true, spare_after: Duration::from_millis(300), ..Policy::MANUAL },
    ] {
        let map = all_mirrored();
        let mut bench = Bench::with(Some(map), policy);
        for index in ALL {
            bench.register(index, incarnation(index));
        }
        bench.redistribute(node("n1", &[], false)).unwrap();
        bench.disconnect(1);
        bench.failover("n1");
        bench.copy_on(&up);
        assert_eq!(bench.map().node(NodeId(1)), None, "{:?}", bench.map().plans);
        bench.all_have_their_copies();
    }
    let mut bench = Bench::up(&all_mirrored());
    bench.disconnect(1);
    bench.failover("n1");
    bench.copy_once(&up);
    bench.redistribute(node("n1", &[], false)).unwrap();
    bench.copy_on(&up);
    assert_eq!(bench.map().node(NodeId(1)), None);
    bench.all_have_their_copies();
}
