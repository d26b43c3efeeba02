//! What the disks hold of each slice, held against each other.

use super::Cluster;
use crate::sim::checker::WriteId;
use crate::sim::disk::{PAGE, SECTOR, SimDisk};
use crate::sim::node::{Mounted, SLICE, position};
use crate::sim::scheduler::Nanos;
use crate::sim::workload::{SLICES, stamp};
use mirror_net::format::Opened;
use mirror_net::ids::{DeviceId, DiskId, MapVersion, SliceIndex, SlotIndex};
use mirror_net::map::plan::Plan;
use mirror_net::map::{Commit, Device, Replica, ReplicaState, Span, Topology};
use mirror_net::region::masks::{REGIONS_PER_SLICE, RegionMasks, touched};
use mirror_net::wire::header::Header;
use std::rc::Rc;

const REGION: u32 = SLICE / REGIONS_PER_SLICE;
const SLICE_SECTORS: usize = SLICE as usize / SECTOR;
const REGION_SECTORS: usize = REGION as usize / SECTOR;
const _: () = assert!(REGION as usize == PAGE, "a region is a page of a simulated disk");

static ZEROS: [u8; PAGE] = [0; PAGE];

/// Whether two pages hold different things; those that are the same one do not.
fn differ(a: &[u8; PAGE], b: &[u8; PAGE]) -> bool {
    !std::ptr::eq(a, b) && a != b
}

/// A copy of a slice as a reader of the disk finds it.
#[derive(Clone, Copy)]
struct CopyOnDisk<'a> {
    media: &'a SimDisk,
    /// Where it is and what is known of its regions; nothing if no slot holds it: zeros.
    held: Option<(u32, RegionMasks)>,
}

/// Which slot of a disk holds a slice.
fn slot_of(opened: &Opened, device: DeviceId, slice: u32) -> Option<SlotIndex> {
    let slots = (0..opened.journal.slots()).map(SlotIndex);
    let held = slots.filter_map(|slot| {
        let held = opened.journal.slot(slot).assignment;
        held.filter(|held| held.device == device && held.slice.0 == slice).map(|held| (held.epoch, slot))
    });
    // One that was dropped and is still in use may be there besides the one that is meant.
    held.max_by_key(|(epoch, _)| *epoch).map(|(_, slot)| slot)
}

impl<'a> CopyOnDisk<'a> {
    fn dirty(&self) -> u64 {
        self.held.map_or(0, |(_, masks)| masks.dirty)
    }

    fn readable(&self) -> u64 {
        self.held.map_or(0, |(_, masks)| masks.readable())
    }

    fn region(&self, region: u32) -> &'a [u8; PAGE] {
        self.place(region).map_or(&ZEROS, |at| self.media.page(at))
    }

    /// What a loss of power would leave of it.
    fn durable_region(&self, region: u32) -> &'a [u8; PAGE] {
        self.place(region).map_or(&ZEROS, |at| self.media.durable_page(at))
    }

    /// Regions that are called clean and of which something is in the disk's cache only.
    fn clean_unflushed(&self) -> u64 {
        self.unflushed(self.readable() & !self.dirty())
    }

    /// Those of these regions of which something is in the disk's cache only.
    fn unflushed(&self, mut left: u64) -> u64 {
        let mut unflushed = 0;
        while left != 0 {
            let region = left.trailing_zeros();
            left &= left - 1;
            unflushed |= u64::from(differ(self.region(region), self.durable_region(region))) << region;
        }
        unflushed
    }

    /// Where a region's content is; nowhere if it is zeros.
    fn place(&self, region: u32) -> Option<u64> {
        let (slot, masks) = self.held?;
        (masks.readable() >> region & 1 == 1).then(|| position(slot, region * REGION))
    }

    /// Regions of which a sector cannot be read.
    fn unreadable(&self) -> u64 {
        let cannot = |at: u64| !self.media.is_readable(at, REGION.into());
        let regions = (0..u64::BITS).filter(|region| self.place(*region).is_some_and(cannot));
        regions.fold(0, |all, region| all | 1 << region)
    }

    /// The regions whose logical content differs.
    fn differing(&self, other: &Self) -> u64 {
        let mut differing = 0;
        let mut left = self.readable() | other.readable();
        while left != 0 {
            let region = left.trailing_zeros();
            left &= left - 1;
            differing |= u64::from(differ(self.region(region), other.region(region))) << region;
        }
        differing
    }
}

/// What would be found on a disk if it were opened now, by somebody whom it obeys.
fn look(mounted: &Mounted) -> Option<Rc<Opened>> {
    mounted.look().filter(|_| !mounted.media.is_dead())
}

impl Cluster {
    pub(super) fn mounted(&self, disk: DiskId) -> &Mounted {
        let (node, index) = self.locate(disk);
        &self.node(node).disks[index]
    }

    /// Every difference between the primary's copy and another, whatever the map calls that, must be covered by
    /// a dirty bit on one of them, at any moment: each copy's bit is on its disk before its data, and bits
    /// are cleared of what is equal everywhere, and on stable storage everywhere (rules 8 and 9). With `equal` members must not differ at all.
    pub fn compare_copies(&mut self, equal: bool) {
        let mut wrong = Vec::new();
        for device in &self.manager.map.devices {
            for span in &device.spans {
                let compared = |replica: &&Replica| !equal || replica.state == ReplicaState::InSync;
                let replicas: Vec<&Replica> = span.replicas.iter().filter(compared).collect();
                for slice in span.first.0..span.end() {
                    let mut copies = Vec::new();
                    for replica in replicas.iter().filter(|_| replicas.len() > 1) {
                        let Some(opened) = look(self.mounted(replica.disk)) else { continue };
                        let slot = slot_of(&opened, device.id, slice);
                        let assigned = slot.and_then(|slot| opened.journal.slot(slot).assignment);
                        // One that its node has not heard of yet begins as a whole dirty, when it gets its slot.
                        let unborn = assigned.is_none_or(|assigned| assigned.epoch.0 < replica.added.0);
                        if replica.state == ReplicaState::InSync || !unborn {
                            copies.push((replica.disk, self.copy(replica.disk, &opened, device.id, slice)));
                        }
                    }
                    for (disk, copy) in &copies {
                        let unflushed = copy.clean_unflushed();
                        if unflushed != 0 {
                            wrong.push(format!(
                                "{} slice {slice}: {disk} calls regions {unflushed:x} clean and did not flush them",
                                device.name
                            ));
                        }
                    }
                    let Some((first, rest)) = copies.split_first() else { continue };
                    for other in rest {
                        // What neither can read nobody makes equal: it fails its reads.
                        let allowed = match equal {
                            true => first.1.unreadable() & other.1.unreadable(),
                            false => first.1.dirty() | other.1.dirty(),
                        };
                        let differing = first.1.differing(&other.1) & !allowed;
                        if differing != 0 {
                            let covered = if equal { "" } else { " where neither is dirty" };
                            wrong.push(format!(
                                "{} slice {slice}: {} and {} differ{covered} in regions {differing:x}",
                                device.name, first.0, other.0
                            ));
                        }
                    }
                }
            }
        }
        self.checker.violations.append(&mut wrong);
    }

    /// Any member may be primary next: each must hold what could be read now, and on stable storage
    /// nothing older than what a flush covered (rules 1, 6, 7 and 12).
    pub fn check_members(&mut self) {
        let devices: Vec<usize> =
            self.manager.map.devices.iter().map(|device| device.id.0 as usize - 1).collect();
        for device in devices {
            self.check_device(device);
        }
    }

    /// The same for one device: its id, counted from 0.
    pub(super) fn check_device(&mut self, index: usize) {
        let Some(device) = self.manager.map.device(DeviceId(index as u32 + 1)) else { return };
        let written: Vec<usize> = self.checker.written(index).collect();
        let mut wrong = Vec::new();
        let (mut current, mut durable) = (&ZEROS, &ZEROS);
        for member in device.spans.iter().flat_map(|span| span.members().map(move |member| (span, member))) {
            let (span, member) = member;
            let mounted = self.mounted(member.disk);
            // A disk that failed a flush has lost something, and is a member until the manager knows.
            if !self.is_intact(device, member) || mounted.media.has_failed {
                continue;
            }
            let staged = self.staged(member.disk, device.id);
            let Some(opened) = look(mounted) else { continue };
            let mut read = None;
            let mut copy = None;
            for sector in &written {
                let (region, within) = (sector / REGION_SECTORS, sector % REGION_SECTORS * SECTOR);
                let slice = region as u32 / REGIONS_PER_SLICE;
                if slice < span.first.0 || slice >= span.end() {
                    continue;
                }
                if read != Some(region) {
                    if read.is_none_or(|read| read as u32 / REGIONS_PER_SLICE != slice) {
                        copy = Some(self.copy(member.disk, &opened, device.id, slice));
                    }
                    read = Some(region);
                    if let Some(copy) = &copy {
                        current = copy.region(region as u32 % REGIONS_PER_SLICE);
                        durable = copy.durable_region(region as u32 % REGIONS_PER_SLICE);
                    }
                }
                let [mut now, later] = [current, durable].map(|page| stamp(&page[within..within + SECTOR]));
                let at = *sector as u64 * SECTOR as u64;
                if let Some((from, bytes)) =
                    staged.iter().rfind(|(from, bytes)| (*from..*from + bytes.len() as u64).contains(&at))
                {
                    let within = (at - from) as usize;
                    now = stamp(&bytes[within..within + SECTOR]);
                }
                let well = matches!((now, later), (Some(now), Some(later))
                    if self.checker.may_hold(self.now, index, *sector, now, later));
                if !well {
                    wrong.push(format!(
                        "{}: {} sector {sector}: the member {} holds {now:x?}, and {later:x?} on stable storage",
                        super::clock(self.now),
                        device.name,
                        member.disk
                    ));
                }
            }
        }
        self.checker.violations.append(&mut wrong);
    }

    /// A flush of a device is acknowledged: nothing that was in a member's cache before it is there still.
    pub(super) fn check_flushed(&mut self, device: usize, marks: &[u64]) {
        // What a device has grown by nobody writes, and the exporter need not have heard of it.
        let spans = self.manager.map.devices[device].spans.iter().filter(|span| span.first.0 < SLICES);
        let left = spans.flat_map(|span| span.members()).find(|member| {
            let mounted = self.mounted(member.disk);
            mounted.attach == member.incarnation.attach.0
                && mounted.media.is_unflushed(marks[member.disk.0 as usize - 1])
        });
        if let Some(left) = left {
            let wrong = format!("dev{}: a flush is done, and {} did not flush", device + 1, left.disk);
            self.checker.violations.push(wrong);
        }
    }

    /// A flush is acknowledged by an exporter that has not heard of a loss, or knows that an earlier flush covered what was
    /// written: it may have been carried out before the loss. What it vouches for is then on stable storage of every member.
    pub(super) fn find_lost(&mut self, node: u16, device: usize, began: Nanos) {
        for (id, (first, count)) in self.checker.lost_before(device, began) {
            let unheard = (first..first + count).map(|sector| (sector / SLICE_SECTORS) as u32);
            let unheard = unheard.into_iter().any(|slice| self.loss_unseen(node, device, slice));
            let excused = unheard || self.checker.may_be_covered(id);
            if excused && (first..first + count).all(|sector| self.is_stored(device, sector, id)) {
                self.checker.found(id);
            }
        }
    }

    /// Whether every member has that write's sector, or a newer one's, on stable storage.
    fn is_stored(&self, device: usize, sector: usize, id: WriteId) -> bool {
        let device_map = &self.manager.map.devices[device];
        let slice = (sector / SLICE_SECTORS) as u32;
        let (region, within) = (sector % SLICE_SECTORS / REGION_SECTORS, sector % REGION_SECTORS * SECTOR);
        let Some(span) = device_map.span(SliceIndex(slice)) else { return false };
        span.members().all(|member| {
            let Some(opened) = look(self.mounted(member.disk)) else { return false };
            let copy = self.copy(member.disk, &opened, device_map.id, slice);
            let found = stamp(&copy.durable_region(region as u32)[within..within + SECTOR]);
            found.is_some_and(|found| self.checker.is_as_new(device, sector, found, id))
        })
    }

    /// Dirty bits are about to be cleared: all members have flushed those regions (rule 9). What a deposed
    /// primary asks for is refused, and says nothing of the members of now.
    pub(super) fn check_clear(&mut self, header: &Header) {
        let Header { slice, offset, length, .. } = *header;
        let device = DeviceId(header.device);
        let span = self.manager.map.device(device).and_then(|device| device.span(SliceIndex(slice)));
        let span = span.filter(|span| span.epoch == header.slice_epoch);
        let mut wrong = Vec::new();
        for member in span.iter().flat_map(|span| span.members()) {
            let mounted = self.mounted(member.disk);
            let Some(opened) = mounted.look().filter(|_| mounted.attach == member.incarnation.attach.0)
            else {
                continue;
            };
            let copy = self.copy(member.disk, &opened, device, slice);
            let unflushed = copy.unflushed(copy.readable() & touched(offset, length, REGION));
            if unflushed != 0 {
                wrong.push(format!(
                    "{device} slice {slice}: bits of {unflushed:x} are cleared, which {} did not flush",
                    member.disk
                ));
            }
        }
        self.checker.violations.append(&mut wrong);
    }

    /// A loss is told of: no member has its caches still (rule 5).
    pub(super) fn check_loss(&mut self, device: &Device, span: &Span) {
        let intact = span.members().find(|member| {
            self.counts_as_intact(device, span, member) && !self.mounted(member.disk).media.is_dead()
        });
        if let Some(intact) = intact {
            let wrong =
                format!("slices from {}: {} is given up, and has everything", span.first, intact.disk);
            self.checker.violations.push(wrong);
        }
    }

    /// A node says that it has adopted a map: its epochs are on its disks, as a crash would leave them (rule 2).
    pub(super) fn check_adopted(&mut self, node: u16, version: MapVersion) {
        let Some(map) = self.manager.history.get(&version.0) else { return };
        // It may say so late, when writes of an older claim are over, and have left by then what newer maps drop.
        let kept = self.agents[usize::from(node) - 1].kept;
        let newest = self.manager.history.get(&kept.0).filter(|_| kept > version).unwrap_or(map);
        let mut wrong = Vec::new();
        for device in &map.devices {
            for (span, replica) in
                device.spans.iter().flat_map(|span| span.replicas.iter().map(move |replica| (span, replica)))
            {
                // A stale copy serves nothing, and may lie on a disk that takes no more writes.
                if self.locate(replica.disk).0 != node || replica.state == ReplicaState::Stale {
                    continue;
                }
                let Some(opened) =
                    Some(self.mounted(replica.disk)).filter(|disk| !disk.media.has_failed).and_then(look)
                else {
                    continue;
                };
                for slice in span.first.0..span.end() {
                    let now = newest.device(device.id).and_then(|device| device.span(SliceIndex(slice)));
                    let now = now.and_then(|span| span.replica_on(replica.disk));
                    if now.is_none_or(|now| now.added != replica.added) {
                        continue;
                    }
                    let held = slot_of(&opened, device.id, slice);
                    let epoch = held
                        .and_then(|slot| opened.journal.slot(slot).assignment)
                        .map(|assignment| assignment.epoch);
                    if epoch.is_none_or(|epoch| epoch < span.epoch) {
                        wrong.push(format!(
                            "n{node} adopted {version}, and {} holds {epoch:?} of {} slice {slice}",
                            replica.disk, device.name
                        ));
                    }
                }
            }
        }
        self.checker.violations.append(&mut wrong);
    }

    /// Whether a member still has what was in its disk's cache, and in its memory.
    fn is_intact(&self, device: &Device, member: &Replica) -> bool {
        let is = member.incarnation;
        let lost = self.memory_lost.get(&is.process.0);
        self.mounted(member.disk).attach == is.attach.0
            && !lost.is_some_and(|held| held.contains(&(device.id, member.disk)))
    }

    /// Whether that can be known of it.
    fn counts_as_intact(&self, device: &Device, span: &Span, member: &Replica) -> bool {
        let (node, _) = self.locate(member.disk);
        let is = member.incarnation;
        let in_memory = device.commit != Commit::Immediate
            && match span.primary().disk == member.disk {
                // One that had not adopted that it is primary is no better than a secondary.
                true => {
                    let mut lives = self.agents[usize::from(node) - 1].lives.iter();
                    !lives.any(|life| life.process == is.process && life.adopted >= span.primary_since)
                }
                false => true,
            };
        self.mounted(member.disk).attach == is.attach.0 && (!in_memory || self.alive(node, is.process.0))
    }

    /// A process is about to end: what it holds in memory is gone with it.
    pub(super) fn lose_memory(&mut self, node: u16) {
        let at = self.node(node);
        let Some(process) = &at.process else { return };
        let held = process.engine.staged().map(|staged| (staged.device, staged.disk)).collect();
        let id = at.process_id;
        self.memory_lost.insert(id, held);
    }

    /// What a node holds in memory of a device for its primaries, in the order of its arrival: offset and bytes.
    fn staged(&self, disk: DiskId, device: DeviceId) -> Vec<(u64, &[u8])> {
        let Some(process) = &self.node(self.locate(disk).0).process else { return Vec::new() };
        let staged = process.engine.staged().filter(|staged| (staged.device, staged.disk) == (device, disk));
        staged
            .filter_map(|staged| {
                let from = u64::from(staged.slice) * u64::from(SLICE) + u64::from(staged.offset);
                Some((from, process.bytes(staged.buffer)?))
            })
            .collect()
    }

    fn copy(&self, disk: DiskId, opened: &Opened, device: DeviceId, slice: u32) -> CopyOnDisk<'_> {
        let held = slot_of(opened, device, slice).map(|slot| (slot.0, opened.journal.masks(slot)));
        CopyOnDisk { media: &self.mounted(disk).media, held }
    }

    /// Data is about to reach a disk: the dirty bits of its regions must be there, as a crash would leave them
    /// (rule 8).
    pub(super) fn check_intent(&mut self, node: u16, disk: usize, slot: u32, offset: u32, length: u32) {
        let Some(index) = self.process(node).and_then(|process| process.disks.get(disk).copied()) else {
            return;
        };
        let mounted = &self.node(node).disks[index];
        let Some(opened) = mounted.look() else { return };
        let missing = touched(offset, length, REGION) & !opened.journal.masks(SlotIndex(slot)).dirty;
        if missing != 0 {
            let wrong = format!(
                "{} slot {slot}: data goes to regions {missing:x}, whose intent is not there",
                mounted.id
            );
            self.checker.violations.push(wrong);
        }
    }

    /// Whether every disk that is broken is known to be, and nobody counts on it.
    pub fn broken_are_out(&self) -> bool {
        let broken = |disk: &&Mounted| disk.media.faults.is_broken() || disk.media.has_failed;
        self.disks().filter(broken).all(|disk| {
            let known = self.manager.map.disk(disk.id).is_some_and(|disk| disk.failed.is_some());
            let spans = self.manager.map.devices.iter().flat_map(|device| &device.spans);
            known && !spans.flat_map(Span::members).any(|member| member.disk == disk.id)
        })
    }

    /// Whether a copy of a span cannot become in sync for what cannot be read of another slice.
    pub(super) fn has_held_up(&self, said: &[String], device: &Device, span: &Span) -> bool {
        let mut lagging = span.replicas.iter().filter(|copy| copy.state != ReplicaState::InSync);
        lagging.any(|copy| is_held_up(said, device, self.locate(copy.disk).0))
    }

    /// Whether nothing is laid out anew: in a ring or in pairs the place of a dead disk would be given away, whose copies
    /// could not be made again so far, as where there is neither a spare nor room to make one.
    pub(super) fn is_place_kept(&self) -> bool {
        let map = &self.manager.map;
        let is_dead = |disk: &DiskId| self.mounted(*disk).media.is_dead();
        matches!(map.topology, Some(Topology::Pair | Topology::Chain))
            && map.disks_in_use().iter().any(is_dead)
    }

    /// Every copy that could come back is in sync again, and what was to be made again on a spare is.
    pub fn all_rejoined(&self) -> Result<(), String> {
        let readable =
            |span: &Span| !span.members().all(|member| self.mounted(member.disk).media.has_unreadable());
        let waits = |plan: &&Plan| {
            let mut spans = plan.moves.iter().flat_map(|step| self.manager.map.spans_of(step.run));
            spans.all(|(span, _)| readable(span)) && !self.is_unreadable(plan)
        };
        let said = self.waiting();
        // Which of two copies can go is not certain as long as one of those that stay is held up.
        let is_uncertain = |plan: &Plan| {
            plan.moves.iter().all(|step| {
                let device = self.manager.map.device(step.run.device);
                device.is_some_and(|device| {
                    self.manager.map.spans_of(step.run).any(|(span, _)| self.has_held_up(&said, device, span))
                })
            })
        };
        // An operator takes back what nobody can read.
        let waits = |plan: &&Plan| match self.shape.operator {
            true => !(plan.cancelled && is_uncertain(plan)),
            false => waits(plan),
        };
        if let Some(plan) = self.manager.map.plans.iter().find(waits) {
            return Err(format!("{} is never done: {}", plan.id, plan.cause));
        }
        for device in &self.manager.map.devices {
            for span in &device.spans {
                // What no good copy can read nobody can give to another.
                if !readable(span) {
                    continue;
                }
                let copies = usize::from(device.copies);
                if self.shape.operator
                    && !self.is_place_kept()
                    && span.replicas.len() != copies
                    && !self.has_held_up(&said, device, span)
                {
                    let (name, wanted) = (&device.name, device.copies);
                    return Err(format!("{name} slice {}: never {wanted} copies: {span:?}", span.first));
                }
                let away = span.replicas.iter().find(|replica| {
                    let (node, index) = self.locate(replica.disk);
                    let failed =
                        self.manager.map.disk(replica.disk).is_some_and(|disk| disk.failed.is_some());
                    let usable = !failed && !self.node(node).disks[index].media.is_dead();
                    usable && replica.state != ReplicaState::InSync && !is_held_up(&said, device, node)
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

/// All copies of a device at a node become in sync together: what cannot be read of one slice holds up the rest, and is
/// told.
fn is_held_up(said: &[String], device: &Device, node: u16) -> bool {
    let line = format!("{}: ", device.name);
    let blocked = format!("regions cannot be copied to n{node}:");
    said.iter().any(|said| said.contains(&line) && said.contains(&blocked))
}
