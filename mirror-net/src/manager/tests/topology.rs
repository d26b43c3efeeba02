//! Who mirrors whom, and how many copies there are, changed online.

use super::{Bench, map_of};

use super::redistribution::{ALL, roomy, spare};
use crate::control::{DeviceChange, PlanOrder, Redistribution, RedistributionOrder};
use crate::map::{DistributionMap, SegmentSlots, Topology};

fn order(wish: Redistribution, carry_out: bool) -> RedistributionOrder {
    RedistributionOrder { wish, carry_out }
}

fn topology(topology: Topology, copies: Option<u8>) -> RedistributionOrder {
    order(Redistribution::Topology { topology: Some(topology), copies }, true)
}

fn copies(device: &str, copies: u8) -> RedistributionOrder {
    order(Redistribution::Copies { device: device.into(), copies }, true)
}

/// Six nodes, two feeds, two switches; room for three copies.
fn wide() -> DistributionMap {
    let mut map = roomy();
    for (index, disk) in map.disks.iter_mut().enumerate() {
        disk.slots = SegmentSlots { primary: 16, secondary: 40, unmirrored: 4 };
        disk.spare = index > 3;
    }
    map.validate().unwrap();
    map
}

#[test]
fn from_each_topology_to_each_other_with_two_copies_and_with_three() {
    let mut bench = Bench::up(&wide());
    let wishes = [
        (Topology::Chain, None),
        (Topology::Pair, None),
        (Topology::Chain, Some(3)),
        (Topology::Chain, Some(2)),
        (Topology::Pair, Some(1)),
        (Topology::Pair, Some(2)),
    ];
    for (wish, number) in wishes {
        let before = bench.stored.len();
        bench.redistribute(topology(wish, number)).unwrap();
        bench.copy_on(&ALL);
        assert_eq!(bench.map().topology, Some(wish));
        assert_eq!(bench.map().deviation(wish), None, "{wish:?}");
        bench.all_have_their_copies();
        if let Some(number) = number {
            // One with a single copy is like one that never was mirrored.
            let device = bench.map().device_named("n1-d1").unwrap();
            assert_eq!(device.copies, number);
        }
        for proposal in &bench.stored[before..] {
            proposal.next.validate().unwrap();
        }
        // Primaries stay where they are laid out.
        for index in 1..=4 {
            assert!(bench.copies(&format!("n{index}-d1")).starts_with(&format!("n{index}+")));
        }
    }
}

#[test]
fn a_device_gets_a_third_copy_and_loses_it_again() {
    let mut bench = Bench::up(&wide());
    let lines = bench.redistribute(copies("n1-d1", 3)).unwrap();
    assert_eq!(lines[0], "n1-d1: 3 copies instead of 2");
    assert!(lines[1].starts_with("512 MiB to copy"), "{lines:#?}");
    bench.copy_on(&ALL);
    let others: Vec<u8> = bench.map().devices.iter().map(|device| device.copies).collect();
    assert_eq!(others, [3, 1, 2, 1, 2, 1, 2, 1]);
    bench.all_have_their_copies();
    let lines = bench.redistribute(copies("n1-d1", 2)).unwrap();
    assert_eq!(lines[0], "n1-d1: 2 copies instead of 3");
    bench.copy_on(&ALL);
    bench.all_have_their_copies();
    assert_eq!(bench.redistribute(copies("n1-d1", 2)).unwrap(), ["n1-d1 has 2 copies already"]);
    // What nobody mirrored is mirrored as well.
    bench.redistribute(copies("n2-d1-unmirrored", 2)).unwrap();
    bench.copy_on(&ALL);
    bench.all_have_their_copies();
}

#[test]
fn what_is_cancelled_half_way_is_told_of_and_made_by_a_rebalance() {
    let mut bench = Bench::up(&wide());
    bench.redistribute(copies("n1-d1", 3)).unwrap();
    let plan = bench.map().plans[0].id;
    bench.order(plan.0, PlanOrder::Cancel);
    bench.copy_on(&ALL);
    let device = bench.map().device_named("n1-d1").unwrap();
    assert_eq!(device.copies, 3);
    let short = device.spans.iter().any(|span| span.replicas.len() < 3);
    let status = bench.manager.status(bench.now_ms);
    let told = status.findings.iter().any(|finding| finding.todo.contains("mirrorctl rebalance"));
    assert_eq!(short, told, "{:#?}", status.findings);
    bench.redistribute(order(Redistribution::Balance, true)).unwrap();
    bench.copy_on(&ALL);
    bench.all_have_their_copies();
}

#[test]
fn what_cannot_be_is_refused_before_anything_moves() {
    let mut bench = Bench::up(&wide());
    assert_eq!(
        bench.refused(topology(Topology::Sets, None)),
        "node n1 names neither power nor switch, so it belongs to no failure set"
    );
    let reason = bench.refused(topology(Topology::Pair, Some(3)));
    assert!(reason.starts_with("a pair has two nodes"), "{reason}");
    let reason = bench.refused(copies("n1-d1", 0));
    assert!(reason.contains("1 to 3 can be had"), "{reason}");
    let reason = bench.refused(copies("n9", 2));
    assert!(reason.starts_with("there is no device \"n9\"; the devices are n1-d1,"), "{reason}");
    bench.redistribute(spare("n1", &[], true)).unwrap();
    let reason = bench.refused(topology(Topology::Chain, None));
    assert!(reason.contains("mirrorctl plan watch"), "{reason}");

    // Room for two copies is not room for three.
    let mut bench = Bench::up(&wide());
    bench.disconnect(2);
    let reason = bench.refused(topology(Topology::Chain, None));
    assert!(reason.starts_with("n2/d1 holds data and is not there"), "{reason}");
    let mut bench = Bench::up(&map_of(4));
    let reason = bench.refused(topology(Topology::Chain, Some(3)));
    assert!(reason.contains("more slots are needed"), "{reason}");
}

#[test]
fn sets_of_two_feeds_cannot_hold_three_copies_and_hold_two() {
    let mut map = wide();
    for (node, power) in map.nodes.iter_mut().zip(["a", "b", "a", "b", "a", "b"]) {
        node.power = Some(power.into());
    }
    map.validate().unwrap();
    let mut bench = Bench::up(&map);
    bench.redistribute(topology(Topology::Sets, Some(2))).unwrap();
    bench.copy_on(&ALL);
    bench.all_have_their_copies();
    let reason = bench.refused(topology(Topology::Sets, Some(3)));
    assert!(reason.contains("shares its power or switch"), "{reason}");
}

#[test]
fn a_node_that_is_away_takes_nothing_and_a_topology_that_is_not_kept_is_told_of() {
    let mut bench = Bench::up(&wide());
    bench.redistribute(topology(Topology::Chain, None)).unwrap();
    bench.copy_on(&ALL);
    // Spread over all that have room, as the rules of the map allow.
    bench.redistribute(spare("n2", &["n1", "n3", "n4"], true)).unwrap();
    bench.copy_on(&ALL);
    let status = bench.manager.status(bench.now_ms);
    let finding = status.findings.iter().find(|finding| finding.what.contains("topology chain is not kept"));
    assert!(finding.is_some_and(|finding| finding.todo.starts_with("mirrorctl rebalance")), "{status:#?}");
    bench.redistribute(order(Redistribution::Balance, true)).unwrap();
    bench.copy_on(&ALL);
    assert_eq!(bench.map().deviation(Topology::Chain), None);
}

/// With no spare a dead disk keeps its place in a chain or a pair, until somebody takes it out.
#[test]
fn who_is_told_to_take_a_failed_disk_out_can() {
    let mut map = wide();
    for disk in &mut map.disks {
        disk.spare = false;
    }
    let mut bench = Bench::up(&map);
    bench.redistribute(topology(Topology::Chain, None)).unwrap();
    bench.copy_on(&ALL);
    bench.breaks(3);
    let up = [1, 2, 4, 5, 6];
    for _ in 0..3 {
        bench.copy_once(&up);
    }
    let reason = bench.refused(order(Redistribution::Balance, true));
    assert!(reason.contains("`mirrorctl disk remove n3/d1`"), "{reason}");
    let removal = order(Redistribution::RemoveDisk { disk: "n3/d1".into(), onto: Vec::new() }, true);
    let reason = bench.refused(removal.clone());
    assert!(reason.contains("`mirrorctl device delete n3-d1-unmirrored`"), "{reason}");
    bench.device_order("n3-d1-unmirrored", DeviceChange::Delete { force: true }).unwrap();
    bench.redistribute(removal).unwrap();
    bench.copy_on(&up);
    assert!(bench.map().disk(crate::ids::DiskId(3)).is_none());
    bench.redistribute(order(Redistribution::Balance, true)).unwrap();
    bench.copy_on(&up);
    assert_eq!(bench.map().deviation(Topology::Chain), None);
    bench.all_have_their_copies();
}
