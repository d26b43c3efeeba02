//! The same nodes and data, laid out otherwise: what each topology would make of the risk.

use super::{Assumptions, Event, Events, Risk};
use crate::ids::{DiskId, NodeId};
use crate::map::DistributionMap;
use crate::map::Topology;
use std::collections::BTreeMap;

/// A layout that a cluster could have.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Layout {
    /// Who mirrors whom.
    pub topology: Topology,
    /// Copies of every slice.
    pub copies: u8,
    /// Its risk; `None` if the nodes are too few, or share too much, for it.
    pub risk: Option<Risk>,
}

/// Pair, chain and sets with two and three copies, of the disks that are in use, as if these were equally full.
pub fn layouts(map: &DistributionMap, assume: &Assumptions) -> Vec<Layout> {
    let topologies = [Topology::Pair, Topology::Chain, Topology::Sets];
    let all = topologies.into_iter().flat_map(|topology| [2, 3].map(|copies| (topology, copies)));
    all.map(|(topology, copies)| Layout { topology, copies, risk: laid_out(map, assume, topology, copies) })
        .collect()
}

fn laid_out(map: &DistributionMap, assume: &Assumptions, topology: Topology, copies: u8) -> Option<Risk> {
    let used = map.disks.iter().filter(|disk| !disk.spare && disk.failed.is_none());
    let mut nodes: BTreeMap<NodeId, Vec<DiskId>> = BTreeMap::new();
    used.for_each(|disk| nodes.entry(disk.node).or_default().push(disk.id));
    let disks: Vec<DiskId> = nodes.values().flatten().copied().collect();
    let mirrored = map.devices.iter().filter(|device| device.is_mirrored());
    let slices: u64 = mirrored.map(|device| u64::from(device.slices)).sum();
    let bytes = slices * u64::from(map.slice_bytes) * u64::from(copies) / (disks.len() as u64).max(1);
    let events = Events::of(map, assume, &disks.iter().map(|disk| (*disk, bytes)).collect());
    let nodes: Vec<&Vec<DiskId>> = nodes.values().collect();
    let copies = usize::from(copies);
    if nodes.len() < copies {
        return None;
    }
    match topology {
        Topology::Pair if copies > 2 => None,
        Topology::Pair => {
            let ring = if nodes.len().is_multiple_of(2) { nodes.len() } else { nodes.len() - 3 };
            let partner = |at: usize| if at < ring { at ^ 1 } else { ring + (at - ring + 1) % 3 };
            Some(mirrored_by(&events, &nodes, |home| vec![partner(home)]))
        }
        Topology::Chain => {
            let after = |home: usize| (1..copies).map(|step| (home + step) % nodes.len()).collect();
            Some(mirrored_by(&events, &nodes, after))
        }
        Topology::Sets => everywhere(map, &events, copies),
    }
}

/// Each disk's slices are mirrored by the disk in the same place of those nodes.
fn mirrored_by(events: &Events, nodes: &[&Vec<DiskId>], mirrors: impl Fn(usize) -> Vec<usize>) -> Risk {
    let mut placements = Vec::new();
    for (home, disks) in nodes.iter().enumerate() {
        for (place, disk) in disks.iter().enumerate() {
            let there = mirrors(home).into_iter().map(|node| nodes[node][place % nodes[node].len()]);
            placements.push(std::iter::once(*disk).chain(there).collect());
        }
    }
    events.risk(&events.fatal(placements.into_iter()))
}

/// The copies of a slice are in different sets, and some slice lies on any disks that are.
///
/// So any failures in as many sets as there are copies are fatal, and those within one never are. There are too many
/// to be listed; what is summed over sets is, of each, the rates and the rates times the hours of what it has.
fn everywhere(map: &DistributionMap, events: &Events, copies: usize) -> Option<Risk> {
    if !map.nodes.iter().any(|node| node.power.is_some() || node.switch.is_some()) {
        return None;
    }
    let mut sets: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
    for Event { rate, hours, group } in &events.events {
        let sum = sets.entry(*group).or_default();
        sum.0 += rate;
        sum.1 += rate * hours;
    }
    if sets.len() < copies {
        return None;
    }
    // For each number of sets chosen so far: with nothing that came last among them, and with it.
    let mut sums = vec![(0.0, 0.0); copies + 1];
    sums[0].0 = 1.0;
    for (rates, missing) in sets.values() {
        for chosen in (1..=copies).rev() {
            let before: (f64, f64) = sums[chosen - 1];
            sums[chosen].0 += before.0 * missing;
            sums[chosen].1 += before.1 * missing + before.0 * rates;
        }
    }
    Some(Risk::of_rates(0.0, sums[copies].1))
}
