//! Where there is room: free slots, loads, and which disks may hold copies of the same slice.

use super::quotas::level;
use crate::format::alloc::Segment;
use crate::ids::{DiskId, NodeId};
use crate::map::DistributionMap;
use std::collections::{BTreeSet, HashMap};

/// A disk as the planner sees it.
#[derive(Clone, Debug)]
pub(super) struct Spot {
    pub(super) id: DiskId,
    pub(super) node: NodeId,
    pub(super) block_bytes: u32,
    /// Whether anything may be put here.
    pub(super) taker: bool,
    /// Used slots of all segments.
    pub(super) load: u32,
    power: Option<u32>,
    switch: Option<u32>,
    /// By segment.
    free: [u32; 3],
}

/// All disks; the planner names a disk by its index here.
#[derive(Clone, Debug)]
pub(super) struct Room {
    pub(super) spots: Vec<Spot>,
}

/// The part of a run that a disk takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    pub(super) at: usize,
    pub(super) segment: Segment,
    pub(super) count: u32,
}

/// Numbers for names, the same for the same.
#[derive(Default)]
struct Numbers<'a>(HashMap<&'a str, u32>);

impl<'a> Numbers<'a> {
    fn of(&mut self, name: Option<&'a str>) -> Option<u32> {
        let next = self.0.len() as u32;
        name.map(|name| *self.0.entry(name).or_insert(next))
    }
}

impl Room {
    /// The room that a map has.
    pub(super) fn of(map: &DistributionMap, takers: &BTreeSet<DiskId>) -> Self {
        let (mut powers, mut switches) = (Numbers::default(), Numbers::default());
        let spot = |disk: &crate::map::Disk| {
            let node = map.node(disk.node);
            Spot {
                id: disk.id,
                node: disk.node,
                block_bytes: disk.block_bytes,
                taker: takers.contains(&disk.id),
                load: 0,
                power: powers.of(node.and_then(|node| node.power.as_deref())),
                switch: switches.of(node.and_then(|node| node.switch.as_deref())),
                free: Segment::ALL.map(|segment| disk.slots.of(segment)),
            }
        };
        let spots = map.disks.iter().map(spot).collect();
        let mut room = Self { spots };
        for span in map.devices.iter().flat_map(|device| &device.spans) {
            for copy in &span.replicas {
                if let Some(at) = room.index(copy.disk) {
                    room.occupy(at, copy.segment, span.count);
                }
            }
        }
        room
    }

    /// The index of a disk.
    pub(super) fn index(&self, disk: DiskId) -> Option<usize> {
        self.spots.binary_search_by_key(&disk, |spot| spot.id).ok()
    }

    pub(super) fn free(&self, at: usize, segment: Segment) -> u32 {
        self.spots[at].free[segment as usize]
    }

    pub(super) fn occupy(&mut self, at: usize, segment: Segment, count: u32) {
        let spot = &mut self.spots[at];
        spot.free[segment as usize] = spot.free[segment as usize].saturating_sub(count);
        spot.load += count;
    }

    pub(super) fn leave(&mut self, at: usize, segment: Segment, count: u32) {
        let spot = &mut self.spots[at];
        spot.free[segment as usize] += count;
        spot.load = spot.load.saturating_sub(count);
    }

    /// Whether two disks are on different nodes.
    pub(super) fn other_node(&self, a: usize, b: usize) -> bool {
        self.spots[a].node != self.spots[b].node
    }

    /// Whether no failure set has both disks.
    pub(super) fn other_set(&self, a: usize, b: usize) -> bool {
        let (a, b) = (&self.spots[a], &self.spots[b]);
        let same = |a: Option<u32>, b: Option<u32>| a.is_some() && a == b;
        !same(a.power, b.power) && !same(a.switch, b.switch)
    }

    /// Disks that may take something.
    pub(super) fn takers(&self) -> impl Iterator<Item = usize> {
        (0..self.spots.len()).filter(|at| self.spots[*at].taker)
    }

    /// The loads at which takers would be even, in their order: each takes and gives until it has that many.
    pub(super) fn even_loads(&self) -> Vec<(usize, u32)> {
        let mut takers: Vec<usize> = self.takers().collect();
        // Of equal shares the larger go to those that have most now: that moves least.
        takers.sort_by_key(|at| (std::cmp::Reverse(self.spots[*at].load), *at));
        let most = |at: &usize| {
            let free = [Segment::Primary, Segment::Secondary].map(|segment| self.free(*at, segment));
            self.spots[*at].load + free.iter().sum::<u32>()
        };
        let levels: Vec<(u32, u32)> = takers.iter().map(|at| (0, most(at))).collect();
        let total = takers.iter().map(|at| u64::from(self.spots[*at].load)).sum();
        takers.iter().copied().zip(level(&levels, total)).collect()
    }
}
