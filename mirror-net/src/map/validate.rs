//! What must hold of every map, checked on every load and after every change.

use super::plan::Move;
use super::{Device, Disk, DistributionMap, MAP_FORMAT, ReplicaState, Span};
use crate::format::alloc::Segment;
use crate::format::geometry::SLOTS_MAX;
use crate::ids::{DeviceId, DiskId, NodeId, PlanId};
use crate::region::masks::REGIONS_PER_SLICE;
use std::collections::{HashMap, HashSet};

/// Smallest slice: a region is then 4 KiB, the largest block size that we know.
pub const SLICE_BYTES_MIN: u32 = 4096 * REGIONS_PER_SLICE;
/// Largest slice: offsets within a slice stay well inside 32 bits.
pub const SLICE_BYTES_MAX: u32 = 1 << 30;
/// Largest number of a version, epoch or generation: each counts changes one by one, so none comes near, and
/// one more never overflows.
pub const COUNT_MAX: u64 = 1 << 60;
/// The same for the loss generation, whose room on disk is smaller.
pub const LOSS_MAX: u32 = 1 << 30;
/// Most copies of a slice that a layout wants.
pub const COPIES_MAX: usize = 3;
/// Most replicas in a list: one more, since a copy that moves is at two places until the new one is in sync.
pub const REPLICAS_MAX: usize = COPIES_MAX + 1;

/// What is wrong with a map.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum InvalidMap {
    #[error(
        "the map has format {found}, this program reads format {MAP_FORMAT}: use the program that wrote it"
    )]
    Format { found: u32 },
    #[error("{what} {number} is beyond anything that was counted")]
    Count { what: &'static str, number: u64 },
    #[error("{what} {id} has a block size of {bytes} bytes: neither 512, 1024, 2048 nor 4096")]
    BlockBytes { what: &'static str, id: String, bytes: u32 },
    #[error("{disk} has {slots} slots, more than {SLOTS_MAX}")]
    TooManySlots { disk: DiskId, slots: u64 },
    #[error("slice size {0} is not a power of two between {SLICE_BYTES_MIN} and {SLICE_BYTES_MAX}")]
    SliceBytes(u32),
    #[error("{what} {id} appears twice or out of order")]
    Order { what: &'static str, id: String },
    #[error("{what} name {name:?} appears twice")]
    DuplicateName { what: &'static str, name: String },
    #[error("{0} belongs to a node that is not in the map")]
    DiskWithoutNode(DiskId),
    #[error("device {0:?}: its claim names a node that is not in the map")]
    ClaimWithoutNode(String),
    #[error("device {0:?}: its claim is from beyond the map's version")]
    ClaimAhead(String),
    #[error("device {device:?} is to have {copies} copies, neither 1 nor up to {COPIES_MAX}")]
    Copies { device: String, copies: u8 },
    #[error("device {device:?}: slices {from} to {to} are missing or doubled")]
    Coverage { device: String, from: u32, to: u32 },
    #[error("device {device:?} slice {slice}: no replica at all")]
    NoReplica { device: String, slice: u32 },
    #[error("device {device:?} slice {slice}: more than {REPLICAS_MAX} replicas")]
    TooManyReplicas { device: String, slice: u32 },
    #[error("device {device:?} slice {slice}: two replicas on the same node")]
    SameNode { device: String, slice: u32 },
    #[error("device {device:?} slice {slice}: two replicas in the same failure set")]
    SameSet { device: String, slice: u32 },
    #[error("device {device:?} slice {slice}: a replica on {disk}, which is not in the map")]
    UnknownDisk { device: String, slice: u32, disk: DiskId },
    #[error("device {device:?} slice {slice}: no replica is in sync")]
    NoMember { device: String, slice: u32 },
    #[error("device {device:?} slice {slice}: its primary is not in sync")]
    PrimaryNotInSync { device: String, slice: u32 },
    #[error("device {device:?} slice {slice}: its epoch is beyond the map's version")]
    EpochAhead { device: String, slice: u32 },
    #[error("device {device:?}: a block size of {bytes} bytes is smaller than that of {disk}")]
    BlockSize { device: String, bytes: u32, disk: DiskId },
    #[error("the {segment:?} segment of {disk} would hold {wanted} slices, it has {slots} slots")]
    Overcommitted { disk: DiskId, segment: Segment, wanted: u64, slots: u32 },
    #[error("device {device:?} slice {slice}: its copy on {disk} was added in a map that is still to come")]
    AddedAhead { device: String, slice: u32, disk: DiskId },
    #[error("{0} is a spare, and its primary or secondary segment is in use")]
    SpareInUse(DiskId),
    #[error("{plan} moves something of a device, or to a disk, that is not in the map")]
    PlanOfNothing { plan: PlanId },
}

impl DistributionMap {
    /// Checks everything that must hold of a map.
    pub fn validate(&self) -> Result<(), InvalidMap> {
        if self.format != MAP_FORMAT {
            return Err(InvalidMap::Format { found: self.format });
        }
        if !self.slice_bytes.is_power_of_two()
            || !(SLICE_BYTES_MIN..=SLICE_BYTES_MAX).contains(&self.slice_bytes)
        {
            return Err(InvalidMap::SliceBytes(self.slice_bytes));
        }
        counted("map version", self.version.0)?;
        ordered("node", self.nodes.iter().map(|node| node.id))?;
        ordered("disk", self.disks.iter().map(|disk| disk.id))?;
        ordered("device", self.devices.iter().map(|device| device.id))?;
        unique("node", self.nodes.iter().map(|node| node.name.as_str()))?;
        unique("device", self.devices.iter().map(|device| device.name.as_str()))?;
        let nodes: HashSet<NodeId> = self.nodes.iter().map(|node| node.id).collect();
        for disk in &self.disks {
            if !nodes.contains(&disk.node) {
                return Err(InvalidMap::DiskWithoutNode(disk.id));
            }
            block_bytes("disk", disk.id, disk.block_bytes)?;
            // Bounds the length of every device, and so what anybody keeps of it in memory.
            if disk.slots.total() > u64::from(SLOTS_MAX) {
                return Err(InvalidMap::TooManySlots { disk: disk.id, slots: disk.slots.total() });
            }
        }
        let mut committed: HashMap<(DiskId, Segment), u64> = HashMap::new();
        let moving = Moving::of(self);
        for device in &self.devices {
            if !nodes.contains(&device.claim.node) {
                return Err(InvalidMap::ClaimWithoutNode(device.name.clone()));
            }
            counted("claim generation", device.claim.generation.0)?;
            if device.claim.since > self.version {
                return Err(InvalidMap::ClaimAhead(device.name.clone()));
            }
            if !(1..=COPIES_MAX).contains(&usize::from(device.copies)) {
                return Err(InvalidMap::Copies { device: device.name.clone(), copies: device.copies });
            }
            block_bytes("device", device.id, device.block_bytes)?;
            self.validate_spans(device, &moving, &mut committed)?;
        }
        for (&(disk, segment), &wanted) in &committed {
            let slots = self.disk(disk).map_or(0, |disk| disk.slots.of(segment));
            if wanted > u64::from(slots) {
                return Err(InvalidMap::Overcommitted { disk, segment, wanted, slots });
            }
        }
        if let Some(spare) = self.disks.iter().find(|disk| {
            let used = |segment| committed.contains_key(&(disk.id, segment));
            disk.spare && (used(Segment::Primary) || used(Segment::Secondary))
        }) {
            return Err(InvalidMap::SpareInUse(spare.id));
        }
        ordered("plan", self.plans.iter().map(|plan| plan.id))?;
        for plan in &self.plans {
            counted("plan", plan.id.0)?;
            let in_map = |step: &Move| self.device(step.run.device).is_some() && self.disk(step.to).is_some();
            if !plan.moves.iter().all(in_map) {
                return Err(InvalidMap::PlanOfNothing { plan: plan.id });
            }
        }
        Ok(())
    }

    fn validate_spans(
        &self,
        device: &Device,
        moving: &Moving,
        committed: &mut HashMap<(DiskId, Segment), u64>,
    ) -> Result<(), InvalidMap> {
        let name = || device.name.clone();
        let mut next = 0u32;
        for span in &device.spans {
            let slice = span.first.0;
            if slice != next || span.count == 0 || span.count > device.slices.saturating_sub(slice) {
                return Err(InvalidMap::Coverage { device: name(), from: next, to: slice });
            }
            next = span.end();
            if span.replicas.is_empty() {
                return Err(InvalidMap::NoReplica { device: name(), slice });
            }
            if span.replicas.len() > REPLICAS_MAX {
                return Err(InvalidMap::TooManyReplicas { device: name(), slice });
            }
            if span.members().next().is_none() {
                return Err(InvalidMap::NoMember { device: name(), slice });
            }
            if span.primary().state != ReplicaState::InSync {
                return Err(InvalidMap::PrimaryNotInSync { device: name(), slice });
            }
            if span.epoch.0 > self.version.0 {
                return Err(InvalidMap::EpochAhead { device: name(), slice });
            }
            if span.loss.0 > LOSS_MAX {
                return Err(InvalidMap::Count { what: "loss generation", number: span.loss.0.into() });
            }
            for (index, replica) in span.replicas.iter().enumerate() {
                let disk = self.disk(replica.disk).ok_or(InvalidMap::UnknownDisk {
                    device: name(),
                    slice,
                    disk: replica.disk,
                })?;
                if disk.block_bytes > device.block_bytes {
                    return Err(InvalidMap::BlockSize {
                        device: name(),
                        bytes: device.block_bytes,
                        disk: disk.id,
                    });
                }
                for other in &span.replicas[..index] {
                    self.validate_apart(device, span, moving, disk, other.disk)?;
                }
                if replica.added > self.version {
                    return Err(InvalidMap::AddedAhead { device: name(), slice, disk: disk.id });
                }
                *committed.entry((disk.id, replica.segment)).or_default() += u64::from(span.count);
            }
        }
        if next != device.slices {
            return Err(InvalidMap::Coverage { device: name(), from: next, to: device.slices });
        }
        Ok(())
    }

    /// Two replicas of a slice never share a node, nor a failure set where sets are named. Only the two ends of a
    /// move may share a set: what moves within a set is there twice until the old copy goes.
    fn validate_apart(
        &self,
        device: &Device,
        span: &Span,
        moving: &Moving,
        disk: &Disk,
        other: DiskId,
    ) -> Result<(), InvalidMap> {
        let (name, slice) = (|| device.name.clone(), span.first.0);
        let other_node = self.node_of(other).unwrap_or_default();
        if disk.node == other_node {
            return Err(InvalidMap::SameNode { device: name(), slice });
        }
        if self.other_set(disk.node, other_node) || moving.has(device.id, span, disk.id, other) {
            return Ok(());
        }
        Err(InvalidMap::SameSet { device: name(), slice })
    }

    /// Whether no failure set has both nodes.
    pub fn other_set(&self, a: NodeId, b: NodeId) -> bool {
        let (Some(a), Some(b)) = (self.node(a), self.node(b)) else { return true };
        let same = |a: &Option<String>, b: &Option<String>| a.is_some() && a == b;
        !same(&a.power, &b.power) && !same(&a.switch, &b.switch)
    }
}

/// What plans move, by device and the two disks, the lower id first: runs as first slice and end, in order, none of
/// which touches another. Found once for a map, since every node validates every map.
struct Moving(HashMap<(DeviceId, DiskId, DiskId), Vec<(u32, u32)>>);

impl Moving {
    fn of(map: &DistributionMap) -> Self {
        let mut by_ends: HashMap<_, Vec<(u32, u32)>> = HashMap::new();
        for step in map.plans.iter().flat_map(|plan| &plan.moves) {
            let Some(from) = step.from else { continue };
            let run = (step.run.first.0, step.run.first.0.saturating_add(step.run.count));
            by_ends.entry(Self::key(step.run.device, from, step.to)).or_default().push(run);
        }
        for runs in by_ends.values_mut() {
            runs.sort_unstable();
            // Equal spans are merged, so more than one run may make one up.
            runs.dedup_by(|next, run| {
                let touches = next.0 <= run.1;
                if touches {
                    run.1 = run.1.max(next.1);
                }
                touches
            });
        }
        Self(by_ends)
    }

    fn key(device: DeviceId, a: DiskId, b: DiskId) -> (DeviceId, DiskId, DiskId) {
        (device, a.min(b), a.max(b))
    }

    /// Whether all slices of a span are moved from one of the disks to the other.
    fn has(&self, device: DeviceId, span: &Span, a: DiskId, b: DiskId) -> bool {
        let Some(runs) = self.0.get(&Self::key(device, a, b)) else { return false };
        let after = runs.partition_point(|(first, _)| *first <= span.first.0);
        after > 0 && runs[after - 1].1 >= span.end()
    }
}

fn counted(what: &'static str, number: u64) -> Result<(), InvalidMap> {
    if number > COUNT_MAX { Err(InvalidMap::Count { what, number }) } else { Ok(()) }
}

fn block_bytes(what: &'static str, id: impl ToString, bytes: u32) -> Result<(), InvalidMap> {
    let known = bytes.is_power_of_two() && (512..=4096).contains(&bytes);
    if known { Ok(()) } else { Err(InvalidMap::BlockBytes { what, id: id.to_string(), bytes }) }
}

fn ordered<I: Ord + Copy + ToString>(
    what: &'static str,
    ids: impl Iterator<Item = I>,
) -> Result<(), InvalidMap> {
    let mut last: Option<I> = None;
    for id in ids {
        if last.is_some_and(|last| last >= id) {
            return Err(InvalidMap::Order { what, id: id.to_string() });
        }
        last = Some(id);
    }
    Ok(())
}

fn unique<'a>(what: &'static str, names: impl Iterator<Item = &'a str>) -> Result<(), InvalidMap> {
    let mut seen = HashSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(InvalidMap::DuplicateName { what, name: name.to_owned() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::layout::tests::pair_map;
    use crate::map::verbs::Verb;

    fn refused(change: impl FnOnce(&mut DistributionMap)) -> String {
        let mut map = pair_map(2);
        assert_eq!(map.validate(), Ok(()));
        change(&mut map);
        map.validate().unwrap_err().to_string()
    }

    #[test]
    fn numbers_that_nobody_counted_to_are_refused() {
        assert!(refused(|map| map.version.0 = u64::MAX).contains("map version"));
        assert!(refused(|map| map.devices[0].claim.generation.0 = u64::MAX).contains("claim generation"));
        assert!(refused(|map| map.devices[0].claim.since.0 = map.version.0 + 1).contains("its claim"));
        assert!(refused(|map| map.devices[0].spans[0].loss.0 = u32::MAX).contains("loss generation"));
    }

    #[test]
    fn a_spare_holds_no_copies() {
        assert!(refused(|map| map.disks[0].spare = true).contains("is a spare"));
    }

    #[test]
    fn the_last_version_that_can_be_counted_is_the_last() {
        let mut map = pair_map(2);
        map.version.0 = COUNT_MAX;
        assert_eq!(map.validate(), Ok(()));
        let verb = Verb::MoveClaim { device: map.devices[0].id, node: map.nodes[1].id };
        assert!(map.apply(&[verb]).is_err());
    }

    #[test]
    fn sizes_that_no_disk_has_are_refused() {
        assert!(refused(|map| map.disks[0].slots.unmirrored = u32::MAX).contains("slots"));
        for bytes in [0, 256, 513, 8192, u32::MAX] {
            assert!(refused(|map| map.disks[0].block_bytes = bytes).contains("block size"));
            assert!(refused(|map| map.devices[0].block_bytes = bytes).contains("block size"));
        }
    }
}
