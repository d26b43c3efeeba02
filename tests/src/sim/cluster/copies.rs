//! What the disks hold of each slice, held against each other.

use super::Cluster;
use crate::sim::disk::{PAGE, SimDisk};
use crate::sim::node::{SLICE, position};
use mirror_net::format::Opened;
use mirror_net::ids::{DeviceId, DiskId, SlotIndex};
use mirror_net::map::ReplicaState;
use mirror_net::region::masks::{REGIONS_PER_SLICE, RegionMasks, touched};
use std::collections::BTreeMap;

const REGION: u32 = SLICE / REGIONS_PER_SLICE;
const _: () = assert!(REGION as usize == PAGE, "a region is a page of a simulated disk");

/// A copy of a slice as a reader of the disk finds it.
#[derive(Clone, Copy)]
struct CopyOnDisk<'a> {
    media: &'a SimDisk,
    /// Where it is and what is known of its regions; nothing if no slot holds it: zeros.
    held: Option<(u32, RegionMasks)>,
}

impl CopyOnDisk<'_> {
    fn dirty(&self) -> u64 {
        self.held.map_or(0, |(_, masks)| masks.dirty)
    }

    fn readable(&self) -> u64 {
        self.held.map_or(0, |(_, masks)| masks.readable())
    }

    fn region(&self, region: u32, into: &mut [u8; PAGE]) {
        match self.held {
            Some((slot, masks)) if masks.readable() >> region & 1 == 1 => {
                self.media.read(position(slot, region * REGION), into);
            }
            _ => into.fill(0),
        }
    }

    /// The regions whose logical content differs.
    fn differing(&self, other: &Self) -> u64 {
        let (mut a, mut b) = ([0; PAGE], [0; PAGE]);
        let mut differing = 0;
        let mut left = self.readable() | other.readable();
        while left != 0 {
            let region = left.trailing_zeros();
            left &= left - 1;
            self.region(region, &mut a);
            other.region(region, &mut b);
            differing |= u64::from(a != b) << region;
        }
        differing
    }
}

impl Cluster {
    /// Every difference between two members must be covered by a dirty bit on one of them, at any moment:
    /// each copy's bit is on its disk before its data. With `equal` there must be none.
    pub fn compare_members(&mut self, equal: bool) {
        let mut opened: BTreeMap<DiskId, Option<Opened>> = BTreeMap::new();
        let spans = self.manager.map.devices.iter().flat_map(|device| &device.spans);
        for member in spans.filter(|span| span.members().count() > 1).flat_map(|span| span.members()) {
            let (node, index) = self.locate(member.disk);
            let mounted = &self.node(node).disks[index];
            let open = || mounted.open().ok().filter(|_| !mounted.media.is_dead());
            opened.entry(member.disk).or_insert_with(open);
        }
        let mut wrong = Vec::new();
        for device in &self.manager.map.devices {
            for span in device.spans.iter().filter(|span| span.members().count() > 1) {
                let members: Vec<DiskId> = span.members().map(|member| member.disk).collect();
                for slice in span.first.0..span.end() {
                    let copies = members.iter().filter_map(|disk| {
                        let opened = opened.get(disk)?.as_ref()?;
                        Some((*disk, self.copy(*disk, opened, device.id, slice)))
                    });
                    let copies: Vec<_> = copies.collect();
                    let Some((first, rest)) = copies.split_first() else { continue };
                    for other in rest {
                        let allowed = if equal { 0 } else { first.1.dirty() | other.1.dirty() };
                        let differing = first.1.differing(&other.1) & !allowed;
                        if differing != 0 {
                            let covered = if equal { "" } else { " where neither is dirty" };
                            wrong.push(format!(
                                "{} slice {slice}: {} and {} are in sync and differ{covered} in regions {differing:x}",
                                device.name, first.0, other.0
                            ));
                        }
                    }
                }
            }
        }
        self.checker.violations.append(&mut wrong);
    }

    fn copy(&self, disk: DiskId, opened: &Opened, device: DeviceId, slice: u32) -> CopyOnDisk<'_> {
        let (node, index) = self.locate(disk);
        let journal = &opened.journal;
        let held = (0..journal.slots()).find_map(|slot| {
            let state = journal.slot(SlotIndex(slot));
            let held = state.assignment?;
            (held.device == device && held.slice.0 == slice).then_some((slot, state.masks))
        });
        CopyOnDisk { media: &self.node(node).disks[index].media, held }
    }

    /// Data is about to reach a disk: the dirty bits of its regions must be there, as a crash would leave them
    /// (rule 8).
    pub(super) fn check_intent(&mut self, node: u16, disk: usize, slot: u32, offset: u32, length: u32) {
        let Some(index) = self.process(node).and_then(|process| process.disks.get(disk).copied()) else {
            return;
        };
        let mounted = &self.node(node).disks[index];
        let Ok(opened) = mounted.open() else { return };
        let missing = touched(offset, length, REGION) & !opened.journal.masks(SlotIndex(slot)).dirty;
        if missing != 0 {
            let wrong = format!(
                "{} slot {slot}: data goes to regions {missing:x}, whose intent is not there",
                mounted.id
            );
            self.checker.violations.push(wrong);
        }
    }

    /// Every copy that could come back is in sync again.
    pub fn all_rejoined(&self) -> Result<(), String> {
        for device in &self.manager.map.devices {
            for span in &device.spans {
                // What the only good copy cannot read nobody can give to another.
                let (node, index) = self.locate(span.primary().disk);
                if span.members().count() == 1 && self.node(node).disks[index].media.has_unreadable() {
                    continue;
                }
                let away = span.replicas.iter().find(|replica| {
                    let (node, index) = self.locate(replica.disk);
                    let failed =
                        self.manager.map.disk(replica.disk).is_some_and(|disk| disk.failed.is_some());
                    let usable = !failed && !self.node(node).disks[index].media.is_dead();
                    usable && replica.state != ReplicaState::InSync
                });
                if let Some(away) = away {
                    return Err(format!(
                        "{} slice {}: {} is {:?} for ever",
                        device.name, span.first, away.disk, away.state
                    ));
                }
            }
        }
        Ok(())
    }
}
