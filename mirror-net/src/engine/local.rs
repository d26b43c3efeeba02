//! The local leg: masks before data, data, and what a read finds.
//!
//! Order on this copy (docs/protocol.md rule 8): a region of unknown content is zeroed and flushed
//! before its first data; the dirty bit is durable before data can reach the disk.

use super::action::{Action, BufferRange, DiskIndex, Io, OpKey};
use super::op::{FlushWaiter, Local, Op, OpKind, Part};
use super::{CHECKPOINT_IDLE, Engine, Nanos};
use crate::format::journal::{Change, IoFailed, IoId, Ticket};
use crate::ids::SlotIndex;
use crate::map::ReplicaState;
use crate::planted::{self, Bug};
use crate::region::masks::{RegionMasks, covered, touched};

/// Regions whose dirty bits are set ahead of the writes to them.
const AHEAD: u32 = 8;
/// So many dirty regions of a slice make it likely that their neighbours follow.
const REPEATED: u32 = 4;

/// Whether the local leg may begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LocalStart {
    /// It holds all that it needs.
    Ready,
    /// It needs whole regions and waits for them; it starts again when it has them.
    WaitForRange,
}

impl Engine {
    /// An operation that enters a region of unknown content needs the whole region: it will be zeroed.
    pub(super) fn prepare_local(&mut self, key: OpKey) -> LocalStart {
        let op = &self.ops[key];
        let region = self.region_bytes();
        let whole = match op.kind {
            OpKind::Write { .. } => touched(op.offset, op.length, region) & !self.masks(op).writable() != 0,
            OpKind::Discard => true,
            _ => false,
        };
        if !whole {
            return LocalStart::Ready;
        }
        let start = op.offset / region * region;
        let end = (op.offset + op.length).div_ceil(region) * region;
        let lock = &mut self.devices[op.device].slices[op.slice as usize].lock;
        if lock.widen(key, start..end) {
            return LocalStart::Ready;
        }
        // It holds nothing now: whoever stood before it may have waited for just that.
        while let Some(next) = lock.pop_ready() {
            self.ready.push_back(next);
        }
        let op = &mut self.ops[key];
        op.holds = false;
        let (device, slice) = (op.device, op.slice);
        self.store_slice(device, slice);
        LocalStart::WaitForRange
    }

    fn masks(&self, op: &Op) -> RegionMasks {
        self.disks[op.disk].journal.masks(SlotIndex(op.slot))
    }

    /// Begins the local leg of everything but a read.
    pub(super) fn start_local(&mut self, key: OpKey) {
        let op = &self.ops[key];
        if self.disks[op.disk].failed {
            self.ops[key].local = Local::Failed;
            return;
        }
        let region = self.region_bytes();
        let masks = self.masks(op);
        let need = touched(op.offset, op.length, region);
        let slice = &mut self.devices[op.device].slices[op.slice as usize];
        slice.touch(need);
        slice.untouched &= !need;
        match op.kind {
            OpKind::Discard => {
                let given_up = covered(op.offset, op.length, region);
                let masks = RegionMasks {
                    dirty: masks.dirty | given_up,
                    valid: masks.valid & !given_up,
                    zero: masks.zero & !given_up,
                };
                self.submit_masks(key, masks);
            }
            // What was never written reads as zeros already.
            OpKind::Zero { .. } if need & masks.readable() == 0 => self.ops[key].local = Local::Done,
            OpKind::Zero { .. } => self.require_dirty(key, need & masks.readable()),
            OpKind::Write { .. } => {
                let unknown = need & !masks.writable();
                if unknown == 0 || planted::is(Bug::Unzeroed) {
                    self.require_dirty(key, need);
                } else {
                    self.zero_regions(key, unknown);
                }
            }
            OpKind::Read
            | OpKind::Copy
            | OpKind::Repair
            | OpKind::Clear { .. }
            | OpKind::Unite { .. }
            | OpKind::Compare { .. } => {}
        }
    }

    /// Goes on with the data once these regions' dirty bits are durable.
    pub(super) fn require_dirty(&mut self, key: OpKey, regions: u64) {
        let op = &self.ops[key];
        let journal = &self.disks[op.disk].journal;
        if regions & !journal.dirty_durable(SlotIndex(op.slot)) == 0 || self.skips_intent(op) {
            self.start_data(key);
            return;
        }
        let masks = self.masks(op);
        if masks.dirty & regions == regions {
            // Somebody else's intent is on its way: it is ours too.
            let ticket = self.devices[op.device].slices[op.slice as usize].intent;
            self.await_ticket(key, ticket);
        } else {
            let ahead = ahead_of(masks.dirty, regions) & masks.writable();
            self.submit_masks(key, RegionMasks { dirty: masks.dirty | regions | ahead, ..masks });
        }
    }

    /// A planted mistake.
    fn skips_intent(&self, op: &Op) -> bool {
        let mine = || self.devices[op.device].view.span(op.slice).mine.as_ref();
        planted::is(Bug::DirtySkipped)
            || planted::is(Bug::MaskNotInherited)
                && mine().is_some_and(|mine| mine.state == ReplicaState::Syncing)
    }

    fn submit_masks(&mut self, key: OpKey, masks: RegionMasks) {
        let op = &self.ops[key];
        let (disk, slot, device, slice) = (op.disk, SlotIndex(op.slot), op.device, op.slice as usize);
        let ticket = self.disks[disk].journal.submit(Change::Masks { slot, masks });
        self.devices[device].slices[slice].intent = ticket;
        self.await_ticket(key, ticket);
    }

    pub(super) fn await_ticket(&mut self, key: OpKey, ticket: Ticket) {
        let op = &mut self.ops[key];
        // Who waited when the disk failed was told then; nobody tells those who come later, such as a repair whose data was
        // on its way. It would hold its range for ever.
        if self.disks[op.disk].failed {
            op.local = Local::Failed;
            self.progress(key);
            return;
        }
        op.local = Local::Intent;
        let waiters = &mut self.disks[op.disk].intents;
        let at = waiters.partition_point(|(other, _)| *other <= ticket);
        waiters.insert(at, (ticket, key));
    }

    fn zero_regions(&mut self, key: OpKey, regions: u64) {
        let region = self.region_bytes();
        let op = &self.ops[key];
        let (disk, slot) = (op.disk, op.slot);
        let mut ios = 0;
        for (first, count) in runs(regions) {
            ios += 1;
            self.actions.push_back(Action::Zero {
                io: Io::Op(key),
                disk,
                slot,
                offset: first * region,
                length: count * region,
                fua: false,
            });
        }
        self.ops[key].local = Local::Zeroing { ios, regions };
    }

    fn start_data(&mut self, key: OpKey) {
        let op = &mut self.ops[key];
        op.local = Local::Data { ios: 1 };
        let (io, disk, slot, offset, length) = (Io::Op(key), op.disk, op.slot, op.offset, op.length);
        let action = match (op.kind, op.buffer) {
            (OpKind::Write { fua }, Some(buffer)) => Action::Write { io, disk, slot, offset, buffer, fua },
            (OpKind::Repair, Some(buffer)) => Action::Write { io, disk, slot, offset, buffer, fua: false },
            (OpKind::Zero { fua }, _) => Action::Zero { io, disk, slot, offset, length, fua },
            (OpKind::Discard, _) => {
                let region = self.region_bytes();
                let op = &self.ops[key];
                // Whole regions only; the edges stay.
                let offset = op.offset.div_ceil(region) * region;
                let length = (op.offset + op.length) / region * region - offset;
                Action::Punch { io, disk, slot, offset, length }
            }
            (OpKind::Unite { .. }, _) => {
                // The masks are all there was to write.
                op.local = Local::Done;
                self.progress(key);
                return;
            }
            _ => return,
        };
        self.actions.push_back(action);
    }

    /// Reads what is there, zeros elsewhere.
    pub(super) fn read_local(&mut self, key: OpKey) {
        let op = &self.ops[key];
        let Some(buffer) = op.buffer else { return };
        self.read_range(key, op.offset, op.offset + op.length, buffer);
    }

    /// Reads a piece for a copy.
    pub(super) fn read_piece(&mut self, key: OpKey, at: u32, buffer: BufferRange) {
        self.read_range(key, at, at + buffer.length, buffer);
    }

    fn read_range(&mut self, key: OpKey, start: u32, end: u32, buffer: BufferRange) {
        let region = self.region_bytes();
        let op = &self.ops[key];
        let readable = self.masks(op).readable();
        let (disk, slot) = (op.disk, op.slot);
        let is_readable = |at: u32| readable >> (at / region) & 1 == 1;
        let mut ios = 0;
        let mut at = start;
        while at < end {
            let here = is_readable(at);
            let mut next = at;
            while next < end && is_readable(next) == here {
                next = (next / region + 1) * region;
            }
            let next = next.min(end);
            let piece = buffer.slice(at - start, next - at);
            if here {
                ios += 1;
                self.actions.push_back(Action::Read {
                    io: Io::Op(key),
                    disk,
                    slot,
                    offset: at,
                    buffer: piece,
                });
            } else {
                self.actions.push_back(Action::FillZero { buffer: piece });
            }
            at = next;
        }
        self.ops[key].local = if ios == 0 { Local::Done } else { Local::Data { ios } };
    }

    /// An I/O has completed.
    pub fn handle_io(&mut self, now: Nanos, io: Io, result: Result<(), String>) {
        self.now = now;
        match io {
            Io::Op(key) => self.op_io_done(key, result),
            Io::Flush(disk) => self.disk_flushed(disk, result),
            Io::Metadata(disk, id) => {
                if let Err(reason) = &result {
                    self.fail_disk(disk, &format!("metadata: {reason}"));
                }
                let failed = result.is_err();
                self.disks[disk].journal.handle_io(IoId(id), result.map_err(|_| IoFailed));
                if failed {
                    self.fail_intents(disk);
                }
            }
        }
        self.settle();
    }

    fn op_io_done(&mut self, key: OpKey, result: Result<(), String>) {
        let Some(op) = self.ops.get_mut(key) else { return };
        let (disk, kind) = (op.disk, op.kind);
        if let Err(reason) = result {
            // Giving back space is a courtesy; a read error is answered, not a reason to give up the disk.
            match kind {
                OpKind::Discard => {}
                OpKind::Write { .. } | OpKind::Zero { .. } | OpKind::Repair => {
                    op.failed = true;
                    self.fail_disk(disk, &reason);
                }
                OpKind::Copy => self.copy_piece_unreadable(key),
                OpKind::Read | OpKind::Compare { .. } | OpKind::Clear { .. } | OpKind::Unite { .. } => {
                    op.failed = true;
                }
            }
        }
        let disk_failed = self.disks[disk].failed;
        let op = &mut self.ops[key];
        // As for a primary's reads: what a disk returns that failed meanwhile is no answer.
        op.failed |= disk_failed && op.part == Part::Secondary && kind.shares();
        let next = match op.local {
            Local::Zeroing { ios, regions } if ios > 1 => Local::Zeroing { ios: ios - 1, regions },
            Local::Data { ios } if ios > 1 => Local::Data { ios: ios - 1 },
            Local::Zeroing { .. } | Local::Data { .. } if op.failed => Local::Failed,
            Local::Zeroing { regions, .. } => {
                op.local = Local::ZeroFlush { regions };
                self.flush_disk(disk, FlushWaiter::Op(key));
                return;
            }
            Local::Data { .. } => Local::Done,
            other => other,
        };
        op.local = next;
        match (op.kind, next) {
            (OpKind::Copy | OpKind::Compare { .. }, Local::Done) => self.read_done(key),
            _ => self.progress(key),
        }
    }

    /// The zeros are on stable storage: now the masks may say so.
    pub(super) fn zeroes_flushed(&mut self, key: OpKey, flushed: bool) {
        let Some(op) = self.ops.get(key) else { return };
        let Local::ZeroFlush { regions } = op.local else { return };
        if !flushed || op.doomed.is_some() || self.disks[op.disk].failed {
            self.ops[key].local = Local::Failed;
            self.progress(key);
            return;
        }
        let masks = self.masks(op);
        let need = touched(op.offset, op.length, self.region_bytes());
        let masks = RegionMasks { zero: masks.zero | regions, dirty: masks.dirty | need, ..masks };
        self.submit_masks(key, masks);
    }

    /// Hands out the journals' writes, and goes on with what their durability allows. True if
    /// anything became durable.
    pub(super) fn drain_journals(&mut self) -> bool {
        let mut progress = false;
        for disk in 0..self.disks.len() {
            if let Some(durable) = self.disks[disk].journal.poll_durable() {
                self.intents_durable(disk, durable);
                self.adoption_durable();
                progress = true;
            }
            while let Some(work) = self.disks[disk].journal.poll_io() {
                let io = Io::Metadata(disk, work.id().0);
                self.actions.push_back(Action::Metadata { io, disk, work });
            }
        }
        progress
    }

    /// Writes pages behind while nobody waits for the log.
    pub(super) fn checkpoint_idle_disks(&mut self) {
        for disk in &mut self.disks {
            if !disk.journal.is_idle() || disk.journal.changed_pages() == 0 || disk.failed {
                disk.idle_since = None;
                continue;
            }
            let since = *disk.idle_since.get_or_insert(self.now);
            if since + CHECKPOINT_IDLE <= self.now {
                disk.idle_since = None;
                disk.journal.start_checkpoint();
            }
        }
    }

    /// The journal is broken: what waits for it will wait for ever.
    fn fail_intents(&mut self, disk: DiskIndex) {
        for (_, key) in std::mem::take(&mut self.disks[disk].intents) {
            if let Some(op) = self.ops.get_mut(key).filter(|op| op.local == Local::Intent) {
                op.local = Local::Failed;
                self.progress(key);
            }
        }
    }

    fn intents_durable(&mut self, disk: DiskIndex, durable: Ticket) {
        while self.disks[disk].intents.front().is_some_and(|(ticket, _)| *ticket <= durable) {
            let Some((_, key)) = self.disks[disk].intents.pop_front() else { break };
            let Some(op) = self.ops.get(key).filter(|op| op.local == Local::Intent) else { continue };
            if op.doomed.is_some() {
                self.ops[key].local = Local::Idle;
                self.progress(key);
            } else {
                self.start_data(key);
            }
        }
    }

    /// Bytes in a region.
    pub(super) fn region_bytes(&self) -> u32 {
        self.slice_bytes / crate::region::masks::REGIONS_PER_SLICE
    }
}

/// Regions that will probably be written soon, in a slice where some are dirty: their bits are set with
/// the first, so that fewer writes wait for the log. A bit too many costs a comparison after a failure.
fn ahead_of(dirty: u64, regions: u64) -> u64 {
    let first = regions.trailing_zeros();
    let last = 63 - regions.leading_zeros();
    let follows = first > 0 && dirty >> (first - 1) & 1 == 1;
    if follows {
        let next = u64::MAX.checked_shl(last + 1).unwrap_or(0);
        return next & u64::MAX.checked_shl(last + 1 + AHEAD).map_or(u64::MAX, |beyond| !beyond);
    }
    if dirty.count_ones() >= REPEATED {
        // The aligned group around it.
        return 0xff << (first / AHEAD * AHEAD);
    }
    0
}

/// The runs of set bits: (first, count).
pub(super) fn runs(mut mask: u64) -> impl Iterator<Item = (u32, u32)> {
    let mut base = 0;
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let skip = mask.trailing_zeros();
        mask >>= skip;
        let count = mask.trailing_ones();
        let run = (base + skip, count);
        base += skip + count;
        mask = mask.checked_shr(count).unwrap_or(0);
        Some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_set_ahead_of_a_sequential_run_and_in_a_busy_slice() {
        assert_eq!(ahead_of(0, 1), 0);
        assert_eq!(ahead_of(0b1, 0b10), 0xff << 2);
        assert_eq!(ahead_of(1 << 62, 1 << 63), 0);
        assert_eq!(ahead_of(1 << 60, 1 << 61), 0b11 << 62);
        assert_eq!(ahead_of(0b1111, 1 << 40), 0xff << 40);
        assert_eq!(ahead_of(0b111, 1 << 40), 0);
    }

    #[test]
    fn runs_of_bits() {
        assert_eq!(runs(0).collect::<Vec<_>>(), []);
        assert_eq!(runs(u64::MAX).collect::<Vec<_>>(), [(0, 64)]);
        assert_eq!(runs(0b1011 | 1 << 63).collect::<Vec<_>>(), [(0, 2), (3, 1), (63, 1)]);
    }
}
