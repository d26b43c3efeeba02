use super::*;
use crate::map::Topology;
use crate::map::layout::tests::pair_map;
use crate::map::wanted::{Wish, copies_of_all};

/// Uniform in (0, 1), the same for the same seed on every machine.
fn random(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64 + f64::MIN_POSITIVE
    }
}

/// Lets things fail, be missing and be made again for a year, many times; how often data was lost.
fn simulate(map: &DistributionMap, assume: &Assumptions, years: u32, seed: u64) -> f64 {
    let mut random = random(seed);
    let mirrored = map.devices.iter().filter(|device| device.is_mirrored());
    let slices: Vec<Vec<DiskId>> = mirrored
        .flat_map(|device| &device.spans)
        .map(|span| span.replicas.iter().map(|copy| copy.disk).collect())
        .collect();
    let bytes = |disk: DiskId| -> f64 {
        let copies =
            map.devices.iter().filter(|device| device.is_mirrored()).flat_map(|device| &device.spans);
        let held = copies.filter(|span| span.replica_on(disk).is_some()).map(|span| f64::from(span.count));
        held.sum::<f64>() * f64::from(map.slice_bytes)
    };
    let hours = |disks: &[DiskId]| {
        let longest = disks.iter().map(|disk| bytes(*disk)).fold(0.0, f64::max);
        assume.delay_hours + longest / assume.bytes_per_hour
    };
    // What fails: how often, what it takes, for how long that is missing.
    let mut units: Vec<(f64, Vec<DiskId>)> =
        map.disks.iter().map(|disk| (assume.disk_hours, vec![disk.id])).collect();
    let of_nodes = |wanted: &dyn Fn(&crate::map::Node) -> bool| -> Vec<DiskId> {
        let nodes: Vec<NodeId> = map.nodes.iter().filter(|node| wanted(node)).map(|node| node.id).collect();
        map.disks.iter().filter(|disk| nodes.contains(&disk.node)).map(|disk| disk.id).collect()
    };
    units.extend(map.nodes.iter().map(|node| (assume.node_hours, of_nodes(&|other| other.id == node.id))));
    let feeds: std::collections::BTreeSet<_> =
        map.nodes.iter().filter_map(|node| node.power.clone()).collect();
    for feed in feeds {
        units.push((assume.set_hours, of_nodes(&|node| node.power.as_ref() == Some(&feed))));
    }
    let units: Vec<(f64, Vec<DiskId>, f64)> =
        units.into_iter().map(|(mean, disks)| (mean, disks.clone(), hours(&disks))).collect();
    let longest = units.iter().map(|unit| unit.2).fold(0.0, f64::max);
    let mut lost = 0;
    for _ in 0..years {
        let mut failures: Vec<(f64, usize)> = Vec::new();
        for (unit, (mean, _, hours)) in units.iter().enumerate() {
            let mut at = -random().ln() * mean;
            while at < YEAR_HOURS {
                failures.push((at, unit));
                at += hours - random().ln() * mean;
            }
        }
        failures.sort_by(|a, b| a.0.total_cmp(&b.0));
        lost += u32::from(failures.iter().enumerate().any(|(index, (at, _))| {
            let missing: Vec<DiskId> = failures[..=index]
                .iter()
                .rev()
                .take_while(|(since, _)| since + longest > *at)
                .filter(|(since, unit)| since + units[*unit].2 > *at)
                .flat_map(|(_, unit)| &units[*unit].1)
                .copied()
                .collect();
            slices.iter().any(|disks| disks.iter().all(|disk| missing.contains(disk)))
        }));
    }
    f64::from(lost) / f64::from(years)
}

/// Things fail often enough for losses to be counted, and are made again fast enough for the formula to hold.
const OFTEN: Assumptions = Assumptions {
    disk_hours: 1_200.0,
    node_hours: 2_000.0,
    set_hours: 30_000.0,
    delay_hours: 4.0,
    bytes_per_hour: (8 << 26) as f64,
};

fn fed(map: DistributionMap, feeds: &[&str]) -> DistributionMap {
    let mut map = map;
    for (node, feed) in map.nodes.iter_mut().zip(feeds) {
        node.power = Some((*feed).into());
    }
    map
}

/// With room for three copies of everything.
fn three_copies(nodes: usize) -> DistributionMap {
    let mut map = pair_map(nodes);
    for disk in &mut map.disks {
        disk.slots.secondary = 64;
    }
    let takers = map.disks.iter().map(|disk| disk.id).collect();
    let wish = Wish { takers, copies: copies_of_all(&map, 3), ..Wish::default() };
    for step in map.wanted(&wish).unwrap().moves {
        let incarnation = Default::default();
        let add = crate::map::verbs::Verb::AddReplica {
            run: step.run,
            disk: step.to,
            segment: step.segment,
            incarnation,
        };
        map = map.apply(&[add]).unwrap().unwrap();
    }
    for copy in
        map.devices.iter_mut().flat_map(|device| &mut device.spans).flat_map(|span| &mut span.replicas)
    {
        copy.state = crate::map::ReplicaState::InSync;
    }
    map
}

#[test]
fn the_formula_agrees_with_a_simulation() {
    let more_often = Assumptions { disk_hours: 250.0, node_hours: 400.0, delay_hours: 1.0, ..OFTEN };
    let cases = [
        ("pairs", pair_map(4), OFTEN),
        ("a ring of three", pair_map(3), OFTEN),
        ("pairs on two feeds each", fed(pair_map(4), &["a", "b", "a", "b"]), OFTEN),
        ("three copies", three_copies(4), more_often),
    ];
    for (name, map, assume) in cases {
        let (formula, years) = (risk(&map, &assume).any, 20_000);
        let seen = simulate(&map, &assume, years, 7);
        let deviation = (formula * (1.0 - formula) / f64::from(years)).sqrt();
        assert!((0.02..0.9).contains(&formula), "{name}: {formula} says nothing");
        // What is left out is of the order of rate times hours, a few percent here.
        assert!((formula - seen).abs() < 4.0 * deviation + 0.06 * formula, "{name}: {formula} and {seen}");
    }
}

#[test]
fn a_feed_that_has_both_copies_is_the_wrong_way_round() {
    let rare = Assumptions { set_hours: 876_600.0, disk_hours: 500_000.0, node_hours: 90_000.0, ..OFTEN };
    // The rule that copies lie in different sets holds for names that are there when the layout is made.
    let together = risk(&fed(pair_map(4), &["a", "a", "b", "b"]), &rare);
    assert!(together.is_wrong_way_round(), "{together:?}");
    assert!((together.within - 0.0198).abs() < 0.001, "two feeds, each lost once in 100 years: {together:?}");
    let apart = risk(&fed(pair_map(4), &["a", "b", "a", "b"]), &rare);
    assert!(!apart.is_wrong_way_round() && apart.within == 0.0, "{apart:?}");
    assert!(apart.any < together.any / 100.0);
}

#[test]
fn a_copy_that_is_not_in_sync_is_none() {
    let map = pair_map(2);
    let mut alone = map.clone();
    alone.devices[0].spans[0].replicas[1].state = crate::map::ReplicaState::Stale;
    let (both, one) = (risk(&map, &OFTEN), risk(&alone, &OFTEN));
    let year = -(-YEAR_HOURS * (1.0 / OFTEN.disk_hours + 1.0 / OFTEN.node_hours)).exp_m1();
    assert!(one.any > both.any && one.any >= year, "{one:?}");
}

#[test]
fn layouts_are_what_maps_like_them_are() {
    let map = fed(pair_map(4), &["a", "b", "a", "b"]);
    let found = layouts(&map, &OFTEN);
    let of = |topology, copies| {
        found.iter().find(|layout| (layout.topology, layout.copies) == (topology, copies)).unwrap().risk
    };
    let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
    assert!(near(of(Topology::Pair, 2).unwrap().any, risk(&map, &OFTEN).any), "the map is pairs");
    assert_eq!(of(Topology::Pair, 3), None);
    assert_eq!(of(Topology::Sets, 3), None, "there are two feeds");
    let (chain, sets) = (of(Topology::Chain, 2).unwrap(), of(Topology::Sets, 2).unwrap());
    assert!(chain.any > of(Topology::Pair, 2).unwrap().any, "each node has two neighbours");
    // Two nodes on either feed: whatever fails on one of them is fatal with whatever fails on the other.
    assert!(near(sets.any, chain.any), "{sets:?} {chain:?}");
    assert!(of(Topology::Chain, 3).unwrap().across < chain.across);
    assert!(
        layouts(&pair_map(4), &OFTEN)
            .iter()
            .all(|layout| layout.topology != Topology::Sets || layout.risk.is_none())
    );
}
