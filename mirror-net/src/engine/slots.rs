//! Which slots of this node's disks hold what the map gives it.
//!
//! A copy that is new here takes a free slot before the map that adds it is adopted, and lacks
//! everything. A slot whose copy the map has dropped is free again as soon as no operation uses it.

use super::action::DiskIndex;
use super::adopt::AdoptError;
use super::view::{DeviceView, Mine, Place};
use super::{Device, Engine, Slice};
use crate::format::alloc::Segment;
use crate::format::journal::Change;
use crate::format::table::{Assignment, CopyState, Role};
use crate::ids::{DeviceId, MapVersion, SliceIndex, SlotIndex};
use crate::map::ReplicaState;
use crate::region::masks::RegionMasks;
use std::collections::BTreeMap;

impl Engine {
    /// Makes room for what is kept of devices that are new here, and finds the slots that hold them
    /// already.
    pub(super) fn find_devices(&mut self, views: &[DeviceView]) {
        for view in views {
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
            // One that grows is kept whole where anything of it is kept.
            let concerned = view.claim.node == self.me
                || view.spans.iter().any(|span| span.mine.is_some())
                || !self.devices[index].slices.is_empty();
            if concerned && self.devices[index].slices.len() < view.slices as usize {
                self.devices[index].slices.resize_with(view.slices as usize, Slice::default);
                self.find_slots(index, view);
            }
        }
    }

    /// Whether that slot can be that copy's. One in another segment was given to a copy that was dropped; the map has
    /// added another to the same disk since, and counts its slots where it put that one.
    fn is_of(&self, (disk, slot): (DiskIndex, u32), mine: &Mine) -> bool {
        disk == mine.disk && self.disks[disk].allocator.segment_of(SlotIndex(slot)) == mine.segment
    }

    /// The slices that the views place here and that have no slot there: disk, segment, device, slice.
    fn unplaced<'a>(
        &'a self,
        views: &'a [DeviceView],
    ) -> impl Iterator<Item = (DiskIndex, Segment, DeviceId, u32)> + 'a {
        views.iter().flat_map(move |view| {
            let slices = self.by_device.get(&view.id).map_or(&[][..], |index| &self.devices[*index].slices);
            let spans = view.spans.iter().filter_map(|span| span.mine.map(|mine| (span, mine)));
            spans.flat_map(move |(span, mine)| {
                (span.first..span.end)
                    .filter(move |slice| {
                        let place = slices.get(*slice as usize).and_then(|slice| slice.place);
                        place.is_none_or(|place| !self.is_of(place, &mine))
                    })
                    .map(move |slice| (mine.disk, mine.segment, view.id, slice))
            })
        })
    }

    /// How many slots the views need of each segment of each disk.
    fn wanted(&self, views: &[DeviceView]) -> BTreeMap<(DiskIndex, Segment), u32> {
        let mut wanted = BTreeMap::new();
        for (disk, segment, ..) in self.unplaced(views) {
            *wanted.entry((disk, segment)).or_default() += 1;
        }
        wanted
    }

    /// Whether every slot that the views need is free now.
    pub(super) fn is_room(&self, views: &[DeviceView]) -> bool {
        let mut wanted = self.wanted(views).into_iter();
        wanted.all(|((disk, segment), count)| self.disks[disk].allocator.free_slots(segment) >= count)
    }

    /// Whether every slot that the views need is free, or will be when they have been adopted.
    pub(super) fn check_room(&self, views: &[DeviceView]) -> Result<(), AdoptError> {
        let wanted = self.wanted(views);
        if wanted.is_empty() {
            return Ok(());
        }
        let mut stay: BTreeMap<(DiskIndex, Segment), u32> = BTreeMap::new();
        for view in views {
            let slices = self.by_device.get(&view.id).map_or(&[][..], |index| &self.devices[*index].slices);
            for (number, slice) in slices.iter().enumerate().take(view.slices as usize) {
                if let (Some(place), Some(mine)) = (slice.place, view.span(number as u32).mine)
                    && self.is_of(place, &mine)
                {
                    *stay.entry((mine.disk, mine.segment)).or_default() += 1;
                }
            }
        }
        for ((disk, segment), count) in wanted {
            let stay = stay.get(&(disk, segment)).copied().unwrap_or(0);
            if stay + count > self.disks[disk].allocator.order(segment).len() as u32 {
                let mut unplaced = self.unplaced(views);
                let found = unplaced.find(|(on, of, ..)| (*on, *of) == (disk, segment));
                let Some((.., device, slice)) = found else { continue };
                let (disk, slice) = (self.disks[disk].id, SliceIndex(slice));
                return Err(AdoptError::NoSlot { disk, segment, device, slice });
            }
        }
        Ok(())
    }

    /// Assigns slots to copies that have none, and writes down changed epochs. There is room for all.
    pub(super) fn place_device(&mut self, view: &DeviceView) {
        let Some(index) = self.by_device.get(&view.id).copied() else { return };
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
                let slot = disk.allocator.allocate(mine.segment).expect("there is room for all");
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
                let mine = view.span(held.slice.0).mine;
                let listed = mine.is_some_and(|mine| self.is_of((number, slot.0), &mine));
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

    /// Gives up the slots of copies that the views of those devices do not list any more.
    pub(super) fn leave_slots(&mut self, devices: &[usize]) {
        for device in devices {
            let Device { view, slices, .. } = &mut self.devices[*device];
            for (number, slice) in slices.iter_mut().enumerate().take(view.slices as usize) {
                let listed = view.span(number as u32).mine.map(|mine| mine.disk);
                if let Some((disk, slot)) = slice.place.filter(|(disk, _)| listed != Some(*disk)) {
                    slice.place = None;
                    self.leaving.push((disk, SlotIndex(slot)));
                }
            }
        }
        self.free_left_slots();
    }

    /// Gives up the slots of copies that were dropped while this node was away: those that its first
    /// map, of that version, does not list.
    pub(super) fn leave_forgotten_slots(&mut self, version: MapVersion) {
        for (number, disk) in self.disks.iter().enumerate() {
            for slot in (0..disk.journal.slots()).map(SlotIndex) {
                let Some(held) = disk.journal.slot(slot).assignment else { continue };
                let index = self.by_device.get(&held.device).copied();
                let slices = index.map_or(&[][..], |index| &self.devices[index].slices);
                let entry = slices.get(held.slice.0 as usize);
                let listed = entry.is_some_and(|entry| entry.place == Some((number, slot.0)));
                // A copy of a map that is newer than this one is not for this one to give up.
                if !listed && held.epoch.0 <= version.0 && !self.leaving.contains(&(number, slot)) {
                    self.leaving.push((number, slot));
                }
            }
        }
        self.free_left_slots();
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
            if disk.journal.slot(*slot).assignment.is_some() {
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
    use super::super::action::Report;
    use super::super::testing::{Rig, map, next};
    use super::AdoptError;
    use crate::format::alloc::Segment;
    use crate::ids::{DeviceId, MapVersion, SliceEpoch, SlotIndex};
    use crate::map::verbs::Verb;
    use crate::map::{DistributionMap, ReplicaState};
    use crate::wire::header::{Header, Kind, Status};

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
    fn a_disk_that_left_the_map_is_released_once_nothing_uses_it() {
        let first = map(2, 2, 1);
        let id = first.disks[1].id;
        let mut rig = Rig::new(2, &first);
        rig.hold = true;
        write_from_1(&mut rig, 1);
        assert!(!rig.engine.release_disk(id), "it is in the map");
        let mut without = dropped(&first);
        rig.adopt(&without);
        without.disks.truncate(1);
        without.version.0 += 1;
        rig.adopt(&without);
        rig.wait(200, &[]);
        assert!(!rig.engine.release_disk(id), "the write is still on its way there");
        rig.complete_io(Ok(()));
        rig.wait(200, &[]);
        assert!(rig.engine.release_disk(id));
        // Nothing is asked of it, and nobody hears that it failed.
        rig.hold_metadata = true;
        without.version.0 += 1;
        rig.adopt(&without);
        rig.wait(5_000, &[]);
        assert!(rig.held.is_empty());
        assert!(!rig.reports.iter().any(|report| matches!(report, Report::DiskFailed { .. })));
    }

    #[test]
    fn a_deleted_devices_slots_are_free_and_another_device_reads_zeros_there() {
        let first = map(2, 2, 1);
        let mut rig = Rig::new(2, &first);
        let slots = slot_in_use(&rig);
        write_from_1(&mut rig, 1);
        assert_ne!(rig.engine.disks[0].journal.masks(SlotIndex(slots[0])).dirty, 0);
        let id = first.devices[0].id;
        let deleted = first.apply(&[Verb::DeleteDevice { device: id }]).unwrap().unwrap();
        rig.adopt(&deleted);
        rig.wait(200, &[]);
        assert_eq!(slot_in_use(&rig), [0; 0]);
        // Whoever has not heard of it is refused, and nothing is stored.
        rig.sent.clear();
        write_from_1(&mut rig, 1);
        let answers: Vec<u8> = rig.take(Kind::Ack).iter().map(|sent| sent.header.flags).collect();
        assert_eq!(answers, [Status::Fenced as u8]);
        let device = crate::map::Device { id: deleted.next_device(), ..first.devices[0].clone() };
        let made = deleted.apply(&[Verb::CreateDevice { device: Box::new(device) }]).unwrap().unwrap();
        rig.adopt(&made);
        assert_eq!(slot_in_use(&rig).len(), 1);
        let masks = rig.engine.disks[0].journal.masks(SlotIndex(slot_in_use(&rig)[0]));
        assert_eq!((masks.dirty, masks.valid), (0, 0), "nothing of it was ever written");
    }

    #[test]
    fn a_device_that_grows_is_kept_whole_where_only_its_beginning_is() {
        let first = map(2, 2, 1);
        let mut rig = Rig::new(2, &first);
        let mut span = first.devices[0].spans[0].clone();
        span.first = crate::ids::SliceIndex(1);
        span.replicas.truncate(1);
        let verb = Verb::GrowDevice { device: first.devices[0].id, spans: vec![span] };
        rig.adopt(&first.apply(&[verb]).unwrap().unwrap());
        assert_eq!(rig.engine.devices[0].slices.len(), 2);
        assert_eq!(slot_in_use(&rig).len(), 1);
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

    /// Of both changes this node hears at once, and its primary of neither.
    #[test]
    fn a_copy_dropped_and_added_unseen_gives_nothing_from_then_on() {
        let first = map(2, 2, 1);
        let mut rig = Rig::new(2, &first);
        write_from_1(&mut rig, 1);
        rig.hold_metadata = true;
        rig.adopt(&added(&dropped(&first), &first));
        assert_eq!(rig.engine.adopted_version(), first.version, "its masks are on their way to the disk");
        rig.sent.clear();
        let fetch = Header {
            slice_epoch: SliceEpoch(1),
            device: super::super::testing::DEVICE.0,
            length: 4096,
            ..Header::new(Kind::Fetch)
        };
        rig.frame(1, fetch, None);
        let answers: Vec<u8> = rig.take(Kind::Ack).iter().map(|sent| sent.header.flags).collect();
        assert_eq!(answers, [Status::Fenced as u8]);
    }

    /// Of both changes this node hears at once; its old slot is needed by another copy.
    #[test]
    fn a_copy_dropped_and_added_unseen_in_another_segment_gets_a_slot_there() {
        let first = map(2, 2, 1);
        let mut rig = Rig::new(2, &first);
        let old = slot_in_use(&rig)[0];
        write_from_1(&mut rig, 1);
        fill(&mut rig, 0);
        let mut second = exchanged(&first);
        let mut copy = first.devices[0].spans[0].replicas[1].clone();
        (copy.state, copy.added, copy.segment) = (ReplicaState::Syncing, second.version, Segment::Primary);
        second.devices[0].spans[0].replicas.push(copy);
        rig.adopt(&second);
        rig.wait(200, &[]);
        assert_eq!(rig.engine.adopted_version(), second.version);
        let place = |device: usize| rig.engine.devices[device].slices[0].place.unwrap().1;
        let disk = &rig.engine.disks[0];
        assert_eq!(disk.allocator.segment_of(SlotIndex(place(0))), Segment::Primary);
        assert_eq!(disk.journal.masks(SlotIndex(place(0))).dirty, u64::MAX, "it lacks everything");
        assert_eq!(place(1), old);
        // After a restart it is found there.
        let index = rig.engine.by_device[&first.devices[0].id];
        let (kept, view) = (place(0), rig.engine.devices[index].view.clone());
        rig.engine.devices[index].slices[0].place = None;
        rig.engine.find_slots(index, &view);
        assert_eq!(rig.engine.devices[index].slices[0].place, Some((0, kept)));
    }

    /// Takes what is free of node 2's secondary segment, but for so many slots.
    fn fill(rig: &mut Rig, but: u32) {
        let allocator = &mut rig.engine.disks[0].allocator;
        while allocator.free_slots(Segment::Secondary) > but {
            allocator.allocate(Segment::Secondary);
        }
    }

    /// Without node 2's copy of the first device, and with one of a second device instead.
    fn exchanged(map: &DistributionMap) -> DistributionMap {
        let mut second = map.devices[0].clone();
        (second.id, second.name) = (DeviceId(2), "other".into());
        let mut next = dropped(map);
        second.spans[0].epoch = SliceEpoch(next.version.0);
        let copy = &mut second.spans[0].replicas[1];
        (copy.state, copy.added) = (ReplicaState::Syncing, next.version);
        next.devices.push(second);
        next
    }

    #[test]
    fn a_copy_waits_for_the_slot_of_the_one_that_leaves_for_it() {
        let first = map(2, 2, 1);
        let mut rig = Rig::new(2, &first);
        let slots = slot_in_use(&rig);
        fill(&mut rig, 0);
        rig.hold = true;
        write_from_1(&mut rig, 1);
        rig.adopt(&exchanged(&first));
        rig.wait(200, &[]);
        assert_eq!(rig.engine.adopted_version(), first.version, "the slot is in use");
        // Of what leaves, nothing begins any more.
        write_from_1(&mut rig, 1);
        assert_eq!(rig.held.len(), 1);
        rig.complete_io(Ok(()));
        rig.wait(200, &[]);
        assert_eq!(rig.engine.adopted_version().0, first.version.0 + 1);
        assert_eq!(slot_in_use(&rig), slots);
        let held = rig.engine.disks[0].journal.slot(SlotIndex(slots[0])).assignment.unwrap();
        assert_eq!(held.device, DeviceId(2));
    }

    #[test]
    fn a_map_that_needs_more_slots_than_there_are_is_refused_and_changes_nothing() {
        let first = map(2, 2, 1);
        let mut rig = Rig::new(2, &first);
        fill(&mut rig, 0);
        // The slots that are taken belong to nobody: as if the segment were smaller than the map says.
        let mut next = exchanged(&first);
        let more = (3..=8).map(|id| {
            let mut device = next.devices[1].clone();
            (device.id, device.name) = (DeviceId(id), format!("other {id}"));
            device
        });
        next.devices.extend(more.collect::<Vec<_>>());
        next.disks[0].slots.primary = 8;
        next.disks[1].slots.secondary = 8;
        let error = rig.engine.handle_map(rig.now, std::sync::Arc::new(next)).unwrap_err();
        assert!(matches!(error, AdoptError::NoSlot { segment: Segment::Secondary, .. }), "{error}");
        assert_eq!(rig.engine.adopted_version(), first.version);
        write_from_1(&mut rig, 1);
        assert!(rig.sent.iter().any(|sent| sent.header.kind == Kind::Ack), "{:?}", rig.sent);
    }
}
