//! Which slots of this node's disks hold what the map gives it.
//!
//! A copy that is new here takes a free slot before the map that adds it is adopted, and lacks
//! everything. A slot whose copy the map has dropped is free again as soon as no operation uses it.

use super::adopt::AdoptError;
use super::view::{DeviceView, Place};
use super::{Device, Engine, Slice};
use crate::format::journal::Change;
use crate::format::table::{Assignment, CopyState, Role};
use crate::ids::{SliceIndex, SlotIndex};
use crate::map::ReplicaState;
use crate::region::masks::RegionMasks;

impl Engine {
    /// Assigns slots to copies that have none, and writes down changed epochs.
    pub(super) fn place_device(&mut self, view: &DeviceView) -> Result<(), AdoptError> {
        let index = match self.by_device.get(&view.id) {
            Some(index) => *index,
            None => {
                let index = self.devices.len();
                self.by_device.insert(view.id, index);
                // An empty view until the adoption is durable: nothing can be asked of it.
                let unborn = DeviceView { slices: 0, spans: Vec::new(), ..view.clone() };
                self.devices.push(Device::new(unborn));
                index
            }
        };
        let concerned = view.claim.node == self.me || view.spans.iter().any(|span| span.mine.is_some());
        if concerned && self.devices[index].slices.len() < view.slices as usize {
            self.devices[index].slices.resize_with(view.slices as usize, Slice::default);
            self.find_slots(index, view);
        }
        for span in &view.spans {
            let Some(mine) = span.mine else { continue };
            let role = if span.primary == Place::Here { Role::Primary } else { Role::Secondary };
            let state = match mine.state {
                ReplicaState::InSync => CopyState::InSync,
                ReplicaState::Syncing => CopyState::Syncing,
                ReplicaState::Stale => CopyState::Stale,
            };
            for slice in span.first..span.end {
                let entry = &self.devices[index].slices[slice as usize];
                let disk = &mut self.disks[mine.disk];
                if let Some((_, slot)) = entry.place.filter(|(on, _)| *on == mine.disk) {
                    let slot = SlotIndex(slot);
                    let held = disk.journal.slot(slot);
                    let known = held.assignment.map(|held| (held.epoch, held.role, held.state));
                    let of_before = known.is_none_or(|(epoch, ..)| epoch.0 < mine.added.0);
                    if of_before {
                        // It was dropped and added again, and this node heard of it only now: what the
                        // slot holds is no copy of anything.
                        let masks = nothing_copied(held.masks);
                        self.devices[index].slices[slice as usize].intent =
                            disk.journal.submit(Change::Masks { slot, masks });
                        self.devices[index].slices[slice as usize].untouched = u64::MAX;
                    }
                    if known != Some((span.epoch, role, state)) {
                        let (first, count, loss) = (slot, 1, span.loss);
                        let epoch = span.epoch;
                        disk.journal.submit(Change::Epoch { first, count, epoch, role, state, loss });
                    }
                    continue;
                }
                let slot = disk.allocator.allocate(mine.segment).ok_or(AdoptError::NoSlot {
                    disk: disk.id,
                    segment: mine.segment,
                    device: view.id,
                    slice: SliceIndex(slice),
                })?;
                let free = disk.journal.slot(slot);
                let assignment = Assignment {
                    device: view.id,
                    slice: SliceIndex(slice),
                    role,
                    state,
                    epoch: span.epoch,
                    loss: span.loss,
                    slot_generation: free.slot_generation,
                };
                // A copy that is still to be filled has no mask of what it lacks: it is all of it.
                let mut masks = nothing_copied(free.masks);
                if state == CopyState::InSync {
                    masks.dirty = 0;
                }
                let ticket = disk.journal.submit(Change::Assign { slot, assignment, masks });
                let entry = &mut self.devices[index].slices[slice as usize];
                entry.place = Some((mine.disk, slot.0));
                entry.intent = ticket;
                entry.untouched = u64::MAX;
            }
        }
        Ok(())
    }

    /// Finds the slots that hold a device's slices already, where the map lists them. After a crash two
    /// slots of a disk may hold the same slice, one from before it was dropped and added again.
    fn find_slots(&mut self, index: usize, view: &DeviceView) {
        for (number, disk) in self.disks.iter().enumerate() {
            for slot in (0..disk.journal.slots()).map(SlotIndex) {
                let held = disk.journal.slot(slot).assignment;
                let Some(held) = held.filter(|held| held.device == view.id && held.slice.0 < view.slices)
                else {
                    continue;
                };
                let listed = view.span(held.slice.0).mine.is_some_and(|mine| mine.disk == number);
                let place = &mut self.devices[index].slices[held.slice.0 as usize].place;
                let newer = place.filter(|(on, _)| *on == number).is_none_or(|(_, other)| {
                    let other = disk.journal.slot(SlotIndex(other)).assignment;
                    other.is_none_or(|other| other.epoch < held.epoch)
                });
                if listed && newer && !self.leaving.contains(&(number, slot)) {
                    *place = Some((number, slot.0));
                }
            }
        }
    }

    /// Gives up the slots of copies that the map does not list any more; at the first map also those
    /// that were left while this node was away.
    pub(super) fn leave_slots(&mut self, first: bool, changed: &[usize]) {
        for device in changed {
            let Device { view, slices, .. } = &mut self.devices[*device];
            for (number, slice) in slices.iter_mut().enumerate().take(view.slices as usize) {
                let listed = view.span(number as u32).mine.map(|mine| mine.disk);
                if let Some((disk, slot)) = slice.place.filter(|(disk, _)| listed != Some(*disk)) {
                    slice.place = None;
                    self.leaving.push((disk, SlotIndex(slot)));
                }
            }
        }
        if first {
            self.leave_forgotten_slots();
        }
        self.free_left_slots();
    }

    /// Slots that hold copies which the map lists nowhere here.
    fn leave_forgotten_slots(&mut self) {
        let Some(map) = &self.map else { return };
        for (number, disk) in self.disks.iter().enumerate() {
            for slot in (0..disk.journal.slots()).map(SlotIndex) {
                let Some(held) = disk.journal.slot(slot).assignment else { continue };
                let index = self.by_device.get(&held.device).copied();
                let slices = index.map_or(&[][..], |index| &self.devices[index].slices);
                let entry = slices.get(held.slice.0 as usize);
                let listed = entry.is_some_and(|entry| entry.place == Some((number, slot.0)));
                // A copy of a map that is newer than this one is not for this one to give up.
                if !listed && held.epoch.0 <= map.version.0 && !self.leaving.contains(&(number, slot)) {
                    self.leaving.push((number, slot));
                }
            }
        }
    }

    /// Frees those that nobody uses any more.
    pub(super) fn free_left_slots(&mut self) {
        if self.leaving.is_empty() {
            return;
        }
        let Self { leaving, ops, disks, .. } = self;
        leaving.retain(|(disk, slot)| {
            let used = ops.values().any(|op| (op.disk, op.slot) == (*disk, slot.0));
            if used {
                return true;
            }
            let disk = &mut disks[*disk];
            if !disk.failed && disk.journal.slot(*slot).assignment.is_some() {
                let RegionMasks { dirty, valid, zero } = disk.journal.masks(*slot);
                // What was written since the slot was zeroed is not zero, whoever wrote it.
                let masks = RegionMasks { dirty: 0, valid: 0, zero: zero & !dirty & !valid };
                disk.journal.submit(Change::Free { slot: *slot, masks });
                disk.allocator.free(*slot);
            }
            false
        });
    }
}

/// The masks of a copy that lacks everything, in a slot with those masks.
fn nothing_copied(slot: RegionMasks) -> RegionMasks {
    RegionMasks { dirty: u64::MAX, valid: 0, zero: slot.zero & !slot.dirty & !slot.valid }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Rig, map, next};
    use crate::ids::{MapVersion, SliceEpoch, SlotIndex};
    use crate::map::{DistributionMap, ReplicaState};
    use crate::wire::header::{Header, Kind};

    /// Without node 2's copy.
    fn dropped(map: &DistributionMap) -> DistributionMap {
        next(map, |span| span.replicas.truncate(1))
    }

    /// With a new copy on node 2.
    fn added(map: &DistributionMap, like: &DistributionMap) -> DistributionMap {
        let mut copy = like.devices[0].spans[0].replicas[1].clone();
        (copy.state, copy.added) = (ReplicaState::Syncing, MapVersion(map.version.0 + 1));
        next(map, |span| span.replicas.push(copy))
    }

    fn write_from_1(rig: &mut Rig, epoch: u64) {
        let write = Header {
            slice_epoch: SliceEpoch(epoch),
            device: super::super::testing::DEVICE.0,
            length: 4096,
            ..Header::new(Kind::Write)
        };
        rig.frame(1, write, None);
    }

    fn slot_in_use(rig: &Rig) -> Vec<u32> {
        let journal = &rig.engine.disks[0].journal;
        (0..journal.slots()).filter(|slot| journal.slot(SlotIndex(*slot)).assignment.is_some()).collect()
    }

    #[test]
    fn a_dropped_copys_slot_is_free_once_nothing_uses_it() {
        let first = map(2, 2, 1);
        let mut rig = Rig::new(2, &first);
        let slots = slot_in_use(&rig);
        assert_eq!(slots.len(), 1);
        rig.hold = true;
        write_from_1(&mut rig, 1);
        assert_eq!(rig.held.len(), 1, "a write is on its way to the disk");
        rig.adopt(&dropped(&first));
        rig.wait(200, &[]);
        assert_eq!(slot_in_use(&rig), slots, "the write still goes there");
        rig.complete_io(Ok(()));
        rig.wait(200, &[]);
        assert_eq!(slot_in_use(&rig), [0; 0]);
        let masks = rig.engine.disks[0].journal.masks(SlotIndex(slots[0]));
        assert_eq!(
            (masks.dirty, masks.valid, masks.zero),
            (0, 0, !1),
            "what was written is not zero any more"
        );
    }

    #[test]
    fn a_copy_added_while_the_old_one_is_still_in_use_gets_a_slot_of_its_own() {
        let first = map(2, 2, 1);
        let mut rig = Rig::new(2, &first);
        rig.hold = true;
        write_from_1(&mut rig, 1);
        let second = dropped(&first);
        rig.adopt(&second);
        rig.adopt(&added(&second, &first));
        assert_eq!(slot_in_use(&rig).len(), 2);
        let (_, place) = rig.engine.devices[0].slices[0].place.unwrap();
        assert_eq!(rig.engine.disks[0].journal.masks(SlotIndex(place)).dirty, u64::MAX);
        rig.complete_io(Ok(()));
        rig.wait(200, &[]);
        assert_eq!(slot_in_use(&rig), [place]);
    }

    #[test]
    fn a_copy_dropped_and_added_unseen_lacks_everything() {
        let first = map(2, 2, 1);
        let mut rig = Rig::new(2, &first);
        let slot = SlotIndex(slot_in_use(&rig)[0]);
        write_from_1(&mut rig, 1);
        assert_eq!(rig.engine.disks[0].journal.masks(slot).dirty.count_ones(), 1);
        // Of both changes this node hears at once.
        rig.adopt(&added(&dropped(&first), &first));
        let masks = rig.engine.disks[0].journal.masks(slot);
        assert_eq!((masks.dirty, masks.valid, masks.zero), (u64::MAX, 0, !1));
        assert_eq!(rig.engine.devices[0].slices[0].untouched, u64::MAX);
        // The same copy, under a later map, is what it was.
        let third = added(&dropped(&first), &first);
        rig.adopt(&next(&third, |span| span.replicas[1].state = ReplicaState::InSync));
        assert_eq!(rig.engine.disks[0].journal.masks(slot).dirty, u64::MAX);
        assert_eq!(slot_in_use(&rig), [slot.0]);
    }
}
