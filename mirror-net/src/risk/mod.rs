//! How likely data is lost in a year, from how often things fail and how long a copy is missing then.
//!
//! What fails is a disk, a node with all its disks, or a failure set (a power feed, a switch) with all its nodes,
//! each independently of the others and at a constant rate. What a failure took is missing until it has been
//! made again. Data is lost when every copy of some slice is missing at the same time.
//!
//! A set of failures that together take all copies of some slice, none of them in vain, is a *fatal* one. With rates
//! `r` and times `t` for which each is missing, all of them are missing at once `r1·r2·…·Σ(product of the t of all but
//! one)` times an hour: the last may come at any moment at which the others are missing. That holds while
//! `r·t` is small, as it is of anything that one would store data on. The probability of a loss in a year is `1 -
//! exp(-hours · Σ)` over all fatal sets. docs/risk.md says more; a test compares it with a simulation.

mod layouts;
#[cfg(test)]
mod tests;

pub use layouts::{Layout, layouts};

use crate::ids::{DiskId, NodeId};
use crate::map::DistributionMap;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Hours in a year.
const YEAR_HOURS: f64 = 8_766.0;

/// How often things fail, and how fast what is lost is made again.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Assumptions {
    /// Mean time to failure of a disk, in hours.
    pub disk_hours: f64,
    /// Mean time until a node is lost with all its disks, in hours.
    pub node_hours: f64,
    /// Mean time until a failure set, a power feed or a switch, takes all its nodes with it for good, in hours.
    pub set_hours: f64,
    /// Hours until copies begin to be made again.
    pub delay_hours: f64,
    /// Bytes in an hour that one disk takes while it is filled.
    pub bytes_per_hour: f64,
}

/// Probabilities of losing data in a year.
#[derive(Clone, Copy, PartialEq, Default, Debug)]
pub struct Risk {
    /// By anything.
    pub any: f64,
    /// By failures that all lie within one failure set.
    pub within: f64,
    /// By failures in different sets, or of nodes that name none.
    pub across: f64,
}

impl Risk {
    /// Whether failures that lie together, which may come together, are the more dangerous ones.
    pub fn is_wrong_way_round(&self) -> bool {
        self.within > self.across
    }

    fn of_rates(within: f64, across: f64) -> Self {
        let probability = |rate: f64| -(-rate * YEAR_HOURS).exp_m1();
        Self { any: probability(within + across), within: probability(within), across: probability(across) }
    }
}

/// Something that fails at once.
#[derive(Clone, Copy, Debug)]
struct Event {
    /// Times an hour.
    rate: f64,
    /// For how long what it took is missing.
    hours: f64,
    /// Nodes that share power or switch, directly or through others, have the same.
    group: usize,
}

/// Everything that may fail, and what each disk is taken by.
#[derive(Debug)]
struct Events {
    events: Vec<Event>,
    /// Indices into the events: its own, its node's, its sets'.
    of_disk: HashMap<DiskId, Vec<u32>>,
}

impl Events {
    /// Of those disks of a map, each with the bytes that are to be made again when it is lost.
    fn of(map: &DistributionMap, assume: &Assumptions, disks: &BTreeMap<DiskId, u64>) -> Self {
        let groups = groups(map);
        let mut found = Self { events: Vec::new(), of_disk: HashMap::new() };
        let mut numbers: HashMap<(u8, String), u32> = HashMap::new();
        for (disk, bytes) in disks {
            let Some(node) = map.node_of(*disk).and_then(|id| map.node(id)) else { continue };
            let hours = assume.delay_hours + *bytes as f64 / assume.bytes_per_hour;
            let mut taken_by = Vec::new();
            let names = [
                (Some((0, disk.to_string())), assume.disk_hours),
                (Some((1, node.name.clone())), assume.node_hours),
                (node.power.clone().map(|name| (2, name)), assume.set_hours),
                (node.switch.clone().map(|name| (3, name)), assume.set_hours),
            ];
            for (name, mean) in names {
                let Some(name) = name else { continue };
                let number = *numbers.entry(name).or_insert_with(|| {
                    let group = groups[&node.id];
                    found.events.push(Event { rate: 1.0 / mean, hours, group });
                    found.events.len() as u32 - 1
                });
                // All its disks are made again at the same time; the fullest is the last.
                let event = &mut found.events[number as usize];
                event.hours = event.hours.max(hours);
                taken_by.push(number);
            }
            found.of_disk.insert(*disk, taken_by);
        }
        found
    }

    /// The fatal sets of slices whose copies lie on these disks, as far as none of their parts is fatal itself.
    fn fatal(&self, placements: impl Iterator<Item = Vec<DiskId>>) -> Vec<Vec<u32>> {
        let mut found: HashSet<Vec<u32>> = HashSet::new();
        let mut seen: HashSet<Vec<DiskId>> = HashSet::new();
        for mut disks in placements {
            disks.sort_unstable();
            if !seen.insert(disks.clone()) {
                continue;
            }
            let mut sets: Vec<Vec<u32>> = vec![Vec::new()];
            for disk in &disks {
                let Some(events) = self.of_disk.get(disk) else { continue };
                let longer = |set: &Vec<u32>| {
                    let set = set.clone();
                    events.iter().map(move |event| {
                        let mut set = set.clone();
                        set.push(*event);
                        set.sort_unstable();
                        set.dedup();
                        set
                    })
                };
                sets = sets.iter().flat_map(longer).collect();
            }
            found.extend(sets);
        }
        let in_vain = |set: &Vec<u32>| {
            let parts = 1..(1usize << set.len()) - 1;
            parts.into_iter().any(|part| {
                let chosen = set.iter().enumerate().filter(|(place, _)| part >> place & 1 == 1);
                found.contains(&chosen.map(|(_, event)| *event).collect::<Vec<u32>>())
            })
        };
        found.iter().filter(|set| !in_vain(set)).cloned().collect()
    }

    fn risk(&self, fatal: &[Vec<u32>]) -> Risk {
        let (mut within, mut across) = (0.0, 0.0);
        for set in fatal {
            let events: Vec<&Event> = set.iter().map(|event| &self.events[*event as usize]).collect();
            let rates: f64 = events.iter().map(|event| event.rate).product();
            let others = |last: usize| -> f64 {
                events
                    .iter()
                    .enumerate()
                    .filter(|(place, _)| *place != last)
                    .map(|(_, event)| event.hours)
                    .product()
            };
            let rate = rates * (0..events.len()).map(others).sum::<f64>();
            let together = events.iter().all(|event| event.group == events[0].group);
            *if together { &mut within } else { &mut across } += rate;
        }
        Risk::of_rates(within, across)
    }
}

/// Numbers for nodes: the same for those that share power or switch, directly or through others.
fn groups(map: &DistributionMap) -> BTreeMap<NodeId, usize> {
    let mut groups: BTreeMap<NodeId, usize> =
        map.nodes.iter().enumerate().map(|(index, node)| (node.id, index)).collect();
    let mut first: HashMap<(bool, &str), NodeId> = HashMap::new();
    for node in &map.nodes {
        let names = [(true, &node.power), (false, &node.switch)];
        for (kind, name) in names.into_iter().filter_map(|(kind, name)| Some((kind, name.as_deref()?))) {
            let other = *first.entry((kind, name)).or_insert(node.id);
            let (old, new) = (groups[&node.id], groups[&other]);
            groups.values_mut().filter(|group| **group == old).for_each(|group| *group = new);
        }
    }
    groups
}

/// The risk of a map as it is: a copy that is not in sync is none, and what nobody mirrors is left out.
pub fn risk(map: &DistributionMap, assume: &Assumptions) -> Risk {
    let mut disks: BTreeMap<DiskId, u64> = BTreeMap::new();
    let spans = || map.devices.iter().filter(|device| device.is_mirrored()).flat_map(|device| &device.spans);
    for span in spans() {
        for copy in &span.replicas {
            *disks.entry(copy.disk).or_default() += u64::from(span.count) * u64::from(map.slice_bytes);
        }
    }
    let events = Events::of(map, assume, &disks);
    let placements = spans().map(|span| span.members().map(|copy| copy.disk).collect());
    events.risk(&events.fatal(placements))
}
