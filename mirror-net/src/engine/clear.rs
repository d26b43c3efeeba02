//! Clearing dirty bits of regions that are equal and on stable storage everywhere (docs/protocol.md rule 9).
//!
//! In rounds: regions that nobody wrote for a while are chosen, everything is flushed everywhere, then
//! each that still was not written since, nor is being written, is locked until every secondary has
//! cleared it; this node clears it last.

use super::action::DiskIndex;
use super::action::OpKey;
use super::flush::FlushOrigin;
use super::local::runs;
use super::op::{Legs, Local, Op, OpKind, Origin, Part};
use super::{Engine, Nanos, Slice};
use crate::format::journal::Change;
use crate::ids::SlotIndex;
use crate::planted::{self, Bug};
use crate::region::masks::{RegionMasks, touched};
use crate::wire::header::Status;
use std::collections::VecDeque;

/// Runs of regions that are locked for clearing at a time, of one device.
const AT_A_TIME: usize = 64;

/// A device's round.
#[derive(Default, Debug)]
pub(super) enum Clearing {
    #[default]
    Idle,
    /// Slices and regions that may be cleared once everything is flushed.
    Flushing(Vec<(u32, u64)>),
    /// Runs of regions that are left: slice, first, count.
    Sweeping { left: VecDeque<(u32, u32, u32)>, under_way: usize },
}

impl Slice {
    /// Regions are written: they are not idle in this round, nor in the next.
    pub(super) fn touch(&mut self, regions: u64) {
        self.recent |= regions;
    }
}

impl Engine {
    /// How often idle regions are looked for; one is idle if it was not written for one to two such times.
    pub fn set_clear_every(&mut self, every: Nanos) {
        self.clear_every = every;
    }

    /// Notes that an operation writes its range, at its start and again at its end.
    pub(super) fn touch(&mut self, op: &Op) {
        let regions = touched(op.offset, op.length, self.region_bytes());
        if let Some(slice) = self.devices[op.device].slices.get_mut(op.slice as usize) {
            slice.touch(regions);
        }
    }

    /// Begins the next round where it is due.
    pub(super) fn tick_clearing(&mut self) {
        if self.now < self.next_clear {
            return;
        }
        self.next_clear = self.now + self.clear_every;
        for device in 0..self.devices.len() {
            if !matches!(self.devices[device].clearing, Clearing::Idle) {
                continue;
            }
            let idle = self.idle_regions(device);
            if !idle.is_empty() {
                self.devices[device].clearing = Clearing::Flushing(idle);
                if planted::is(Bug::ClearedUnflushed) {
                    self.clearing_flushed(device, true);
                } else {
                    self.start_flush(FlushOrigin::Clearing, device);
                }
            }
        }
    }

    fn idle_regions(&mut self, device: usize) -> Vec<(u32, u64)> {
        let super::Device { view, slices, .. } = &mut self.devices[device];
        let mut idle = Vec::new();
        for span in &view.spans {
            let clearable = span.serves() && span.is_complete();
            for slice in span.first..span.end {
                let Some(entry) = slices.get_mut(slice as usize) else { break };
                let busy = entry.recent | entry.before;
                entry.before = std::mem::take(&mut entry.recent);
                let Some((disk, slot)) = entry.place.filter(|_| clearable && entry.behind.is_empty()) else {
                    continue;
                };
                let regions = self.disks[disk].journal.masks(SlotIndex(slot)).dirty & !busy;
                if regions != 0 && !self.disks[disk].failed {
                    idle.push((slice, regions));
                }
            }
        }
        idle
    }

    /// Everything was flushed everywhere, or could not be.
    pub(super) fn clearing_flushed(&mut self, device: usize, flushed: bool) {
        let Clearing::Flushing(idle) = std::mem::take(&mut self.devices[device].clearing) else { return };
        if !flushed {
            return;
        }
        let runs = idle.into_iter().flat_map(|(slice, regions)| runs(regions).map(move |run| (slice, run)));
        let left = runs.map(|(slice, (first, count))| (slice, first, count)).collect();
        self.devices[device].clearing = Clearing::Sweeping { left, under_way: 0 };
        self.clear_next(device);
    }

    /// A new map: what was chosen under the old one is chosen anew.
    pub(super) fn restart_clearing(&mut self, device: usize) {
        match &mut self.devices[device].clearing {
            Clearing::Idle => {}
            Clearing::Sweeping { left, under_way } if *under_way > 0 => left.clear(),
            other => *other = Clearing::Idle,
        }
    }

    fn clear_next(&mut self, device: usize) {
        loop {
            let Clearing::Sweeping { left, under_way } = &mut self.devices[device].clearing else { return };
            if *under_way >= AT_A_TIME {
                return;
            }
            let Some((slice, first, count)) = left.pop_front() else {
                if *under_way == 0 {
                    self.devices[device].clearing = Clearing::Idle;
                }
                return;
            };
            let bytes = self.region_bytes();
            let span = self.devices[device].view.span(slice);
            let op = Op {
                kind: OpKind::Clear { readable: 0 },
                slice,
                offset: first * bytes,
                length: count * bytes,
                ..Op::primary(Origin::Upkeep, device, span.epoch)
            };
            if self.enqueue_unless_busy(op)
                && let Clearing::Sweeping { under_way, .. } = &mut self.devices[device].clearing
            {
                *under_way += 1;
            }
        }
    }

    /// It holds its regions: nobody writes there. If nobody did since the flush began, they are equal.
    pub(super) fn start_clear(&mut self, key: OpKey) {
        let op = &self.ops[key];
        let (device, slice) = (op.device, op.slice);
        let regions = touched(op.offset, op.length, self.region_bytes());
        let entry = &self.devices[device].slices[slice as usize];
        let span = self.devices[device].view.span(slice);
        let as_before = span.serves()
            && span.is_complete()
            && span.epoch == op.epoch
            && (entry.recent & regions == 0 || planted::is(Bug::ClearedEarly))
            && entry.behind.is_empty()
            && !self.disks[op.disk].failed;
        if !as_before {
            self.finish(key, Status::Fenced);
            return;
        }
        let readable = self.content(device, slice) & regions;
        let legs = Legs::new(&span.others, &span.members, &Legs::NONE);
        let op = &mut self.ops[key];
        op.kind = OpKind::Clear { readable };
        op.legs = legs;
        op.local = Local::Done;
        self.send_legs(key);
        self.progress(key);
    }

    /// As secondary: the primary says that these regions are equal everywhere.
    pub(super) fn start_clear_here(&mut self, key: OpKey) {
        let op = &self.ops[key];
        let OpKind::Clear { readable } = op.kind else { return };
        let regions = touched(op.offset, op.length, self.region_bytes());
        self.clear(op.disk, op.slot, regions, readable);
        self.ops[key].local = Local::Done;
        self.progress(key);
    }

    /// An operation that cleared has ended.
    pub(super) fn end_clear(&mut self, op: &Op, status: Status) {
        let OpKind::Clear { readable } = op.kind else { return };
        if op.part == Part::Secondary {
            return;
        }
        if status == Status::Done {
            let regions = touched(op.offset, op.length, self.region_bytes());
            self.clear(op.disk, op.slot, regions, readable);
        }
        if let Clearing::Sweeping { under_way, .. } = &mut self.devices[op.device].clearing {
            *under_way = under_way.saturating_sub(1);
        }
        self.clear_next(op.device);
    }

    /// Nobody waits until this is durable: a bit too many is only compared in vain.
    fn clear(&mut self, disk: DiskIndex, slot: u32, regions: u64, readable: u64) {
        let slot = SlotIndex(slot);
        let journal = &mut self.disks[disk].journal;
        let before = journal.masks(slot);
        // What is not valid on the primary is not here. What is readable there only is zeros, for the copies
        // are equal: it stays unwritten here.
        let holds_data = readable & regions & before.readable();
        let masks = RegionMasks {
            dirty: before.dirty & !regions,
            valid: (before.valid & !regions) | holds_data,
            zero: before.zero & !holds_data,
        };
        if masks != before {
            journal.submit(Change::Masks { slot, masks });
        }
    }
}
