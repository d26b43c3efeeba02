//! After a failover the failed node's load is spread over the survivors: roles are swapped, no data is moved.
//!
//! In a chain the next node serves what the failed one had, and hands what it has of its own on to the node after it,
//! which does the same, until all serve about as much (chained declustering: Hsiao and DeWitt, 1990). Where two nodes
//! mirror only each other nothing can be handed on.
//!
//! At home a slice is where it has a slot of a primary segment. Who serves nothing, because it has failed or was failed
//! over by an operator, gets nothing here either: that is left to `mirrorctl rebalance`. Of what nobody is at home for,
//! each survivor should serve its share; everything else belongs at home if that is even enough.

use super::regeneration::Situation;
use super::registry::Standing;
use super::{Change, Lines, promotion};
use crate::format::alloc::Segment;
use crate::ids::{DeviceId, DiskId, NodeId, SliceIndex};
use crate::map::runs::Runs;
use crate::map::verbs::Run;
use crate::map::{Device, DistributionMap, ReplicaState, Span};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

/// Nothing is done before somebody serves so much more than its share, in percent: roles are not swapped for little.
const UNEVEN_ABOVE: u64 = 20;
/// Nor for so few slices.
const SLICES_MIN: u64 = 2;

/// A part of a span that may be served by any of several nodes.
#[derive(Clone)]
struct Part<'a> {
    device: &'a Device,
    span: &'a Span,
    first: u32,
    count: u32,
    /// Who is to serve it.
    disk: DiskId,
    /// All who could.
    disks: Vec<DiskId>,
}

/// The roles that are to be swapped now; nothing if the load is even enough, or cannot be more so.
pub(super) fn spread(map: &DistributionMap, now: &Situation<'_>) -> Change {
    let Some(loads) = Loads::of(map, now) else { return Change::default() };
    let mut parts = loads.parts(map, now);
    if loads.homeless > 0 {
        if !loads.is_uneven() {
            return Change::default();
        }
        loads.balance(map, &mut parts);
    }
    let mut change = Change::default();
    let mut lines: BTreeMap<DeviceId, Lines> = BTreeMap::new();
    for part in parts.iter().filter(|part| part.disk != part.span.primary().disk) {
        let run = Run { device: part.device.id, first: SliceIndex(part.first), count: part.count };
        let cut = Span { first: run.first, count: run.count, ..part.span.clone() };
        change.batch.extend(promotion(map, now.registry, now.now_ms, &cut, run, part.disk));
        let name = map.disk_name(part.disk);
        lines.entry(part.device.id).or_default().add(&cut, format!("served by {name} from now on"));
    }
    for (id, lines) in lines {
        if let Some(device) = map.device(id) {
            change.why.extend(lines.finish(&device.name, device.slices));
        }
    }
    if !change.is_empty() {
        let why = if loads.homeless > 0 { "the load of who failed is spread" } else { "roles go home" };
        change.why.insert(0, format!("{why}: no data moves"));
    }
    change
}

/// How much everybody serves.
struct Loads {
    /// Slices that a node serves, of those that serve any and are there.
    served: BTreeMap<NodeId, u64>,
    /// What each should serve of all.
    shares: BTreeMap<NodeId, u64>,
    /// Slices whose home serves nothing, or is gone.
    homeless: u64,
}

impl Loads {
    /// `None` if everything is served at home.
    fn of(map: &DistributionMap, now: &Situation<'_>) -> Option<Self> {
        let node = |disk: DiskId| map.node_of(disk).unwrap_or_default();
        let mirrored = || map.devices.iter().filter(|device| device.is_mirrored());
        let spans = || mirrored().flat_map(|device| &device.spans);
        if is_at_home(map) {
            return None;
        }
        let mut served: BTreeMap<NodeId, u64> = BTreeMap::new();
        for span in spans() {
            *served.entry(node(span.primary().disk)).or_default() += u64::from(span.count);
        }
        served.retain(|id, _| map.node(*id).is_some_and(|node| now.registry.is_up(&node.name, now.now_ms)));
        let has_home = |span: &Span| home(span).is_some_and(|disk| served.contains_key(&node(disk)));
        let homeless = spans().filter(|span| !has_home(span)).map(|span| u64::from(span.count)).sum();
        let in_use = map.disks_in_use();
        let capacity = |id: NodeId| -> u64 {
            let disks = map.disks.iter().filter(|disk| disk.node == id && in_use.contains(&disk.id));
            disks.filter(|disk| disk.failed.is_none()).map(|disk| u64::from(disk.slots.primary)).sum()
        };
        let capacities: BTreeMap<NodeId, u64> = served.keys().map(|id| (*id, capacity(*id))).collect();
        let (all, room): (u64, u64) = (served.values().sum(), capacities.values().sum::<u64>().max(1));
        let share = |capacity: u64| (u128::from(all) * u128::from(capacity) / u128::from(room)) as u64;
        let mut shares: BTreeMap<NodeId, u64> =
            capacities.iter().map(|(id, capacity)| (*id, share(*capacity))).collect();
        // What does not divide goes to those that come first, a slice each.
        let odd = all.saturating_sub(shares.values().sum());
        shares.values_mut().take(odd as usize).for_each(|share| *share += 1);
        Some(Self { served, shares, homeless })
    }

    fn share(&self, node: NodeId) -> u64 {
        self.shares.get(&node).copied().unwrap_or(0)
    }

    fn is_uneven(&self) -> bool {
        self.served.iter().any(|(node, served)| {
            let share = self.share(*node);
            served * 100 > share * (100 + UNEVEN_ABOVE) && *served >= share + SLICES_MIN
        })
    }

    /// What could be served elsewhere, with who is to serve it if nothing speaks against: its home.
    fn parts<'a>(&self, map: &'a DistributionMap, now: &Situation<'_>) -> Vec<Part<'a>> {
        let mut moving: HashMap<DeviceId, Runs> = HashMap::new();
        for step in map.plans.iter().flat_map(|plan| &plan.moves) {
            moving
                .entry(step.run.device)
                .or_default()
                .add(step.run.first.0, step.run.first.0 + step.run.count);
        }
        let mut parts = Vec::new();
        for device in map.devices.iter().filter(|device| device.is_mirrored()) {
            for span in &device.spans {
                let moves =
                    moving.get(&device.id).is_some_and(|runs| runs.overlaps(span.first.0, span.end()));
                // Whoever is being filled would have to begin anew, and whoever is away would be left behind.
                let is_calm = span.replicas.iter().all(|copy| match copy.state {
                    ReplicaState::Stale => true,
                    ReplicaState::Syncing => false,
                    ReplicaState::InSync => {
                        now.registry.standing(map, device, span, copy, now.now_ms) == Standing::Intact
                    }
                });
                if moves || !is_calm || span.members().count() < 2 {
                    continue;
                }
                let serves =
                    |disk: &DiskId| map.node_of(*disk).is_some_and(|node| self.served.contains_key(&node));
                let disks: Vec<DiskId> = span.members().map(|copy| copy.disk).filter(serves).collect();
                let disk = home(span).filter(|disk| disks.contains(disk)).unwrap_or(span.primary().disk);
                parts.push(Part { device, span, first: span.first.0, count: span.count, disk, disks });
            }
        }
        parts
    }

    /// Hands on from who has most to who has least, over as many others as it takes.
    fn balance(&self, map: &DistributionMap, parts: &mut Vec<Part<'_>>) {
        let node = |disk: DiskId| map.node_of(disk).unwrap_or_default();
        let mut served = self.served.clone();
        for part in parts.iter() {
            let (from, to) = (node(part.span.primary().disk), node(part.disk));
            if from != to {
                *served.entry(from).or_default() -= u64::from(part.count);
                *served.entry(to).or_default() += u64::from(part.count);
            }
        }
        // Each round evens out one node at least, or finds that it cannot be.
        let mut stuck = BTreeSet::new();
        while let Some((from, surplus)) = served
            .iter()
            .filter(|(node, _)| !stuck.contains(*node))
            .map(|(node, served)| (*node, served.saturating_sub(self.share(*node))))
            .max_by_key(|(_, surplus)| *surplus)
            .filter(|(_, surplus)| *surplus > 0)
        {
            let lacks =
                |node: NodeId| self.share(node).saturating_sub(served.get(&node).copied().unwrap_or(0));
            let Some(way) = way(map, parts, from, |node| lacks(node) > 0) else {
                stuck.insert(from);
                continue;
            };
            let last = way.last().map_or(from, |(_, to)| *to);
            let of = |(from, to): (NodeId, NodeId)| -> u64 {
                let movable = parts.iter().filter(|part| node(part.disk) == from);
                movable
                    .filter(|part| part.disks.iter().any(|disk| node(*disk) == to))
                    .map(|part| u64::from(part.count))
                    .sum()
            };
            let count = way.iter().map(|step| of(*step)).min().unwrap_or(0).min(surplus).min(lacks(last));
            for (from, to) in way {
                hand_on(map, parts, from, to, count);
            }
            *served.entry(from).or_default() -= count;
            *served.entry(last).or_default() += count;
        }
    }
}

/// Whether everything is served where it is at home.
pub(super) fn is_at_home(map: &DistributionMap) -> bool {
    let mut spans = map.devices.iter().filter(|device| device.is_mirrored()).flat_map(|device| &device.spans);
    spans.all(|span| {
        let elsewhere = span.replicas.iter().any(|copy| copy.segment == Segment::Primary);
        span.primary().segment == Segment::Primary || !elsewhere
    })
}

/// Where a span has a slot of a primary segment, if that copy is in sync.
fn home(span: &Span) -> Option<DiskId> {
    span.members().find(|copy| copy.segment == Segment::Primary).map(|copy| copy.disk)
}

/// The shortest way over which something can be handed on from a node to one that lacks something.
fn way(
    map: &DistributionMap,
    parts: &[Part<'_>],
    from: NodeId,
    lacks: impl Fn(NodeId) -> bool,
) -> Option<Vec<(NodeId, NodeId)>> {
    let node = |disk: DiskId| map.node_of(disk).unwrap_or_default();
    let mut ties: BTreeMap<NodeId, BTreeSet<NodeId>> = BTreeMap::new();
    for part in parts {
        ties.entry(node(part.disk)).or_default().extend(part.disks.iter().map(|disk| node(*disk)));
    }
    let mut came: BTreeMap<NodeId, NodeId> = BTreeMap::from([(from, from)]);
    let mut next = VecDeque::from([from]);
    while let Some(at) = next.pop_front() {
        if lacks(at) && at != from {
            let mut way = Vec::new();
            let mut to = at;
            while to != from {
                way.push((came[&to], to));
                to = came[&to];
            }
            way.reverse();
            return Some(way);
        }
        for to in ties.get(&at).into_iter().flatten().copied() {
            came.entry(to).or_insert_with(|| {
                next.push_back(to);
                at
            });
        }
    }
    None
}

/// Has `to` serve `count` slices that `from` was to.
fn hand_on(map: &DistributionMap, parts: &mut Vec<Part<'_>>, from: NodeId, to: NodeId, mut count: u64) {
    let node = |disk: DiskId| map.node_of(disk).unwrap_or_default();
    for index in 0..parts.len() {
        let part = &mut parts[index];
        if count == 0 || node(part.disk) != from {
            continue;
        }
        let Some(disk) = part.disks.iter().copied().find(|disk| node(*disk) == to) else { continue };
        let taken = u64::from(part.count).min(count) as u32;
        count -= u64::from(taken);
        if taken < part.count {
            let mut rest = part.clone();
            rest.first += taken;
            rest.count -= taken;
            part.count = taken;
            part.disk = disk;
            parts.push(rest);
        } else {
            part.disk = disk;
        }
    }
}
