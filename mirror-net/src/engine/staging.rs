//! Deferred commit: a secondary acknowledges a write once it is in memory, and stores it later.
//!
//! A staged write is an operation that was answered and has not begun on the disk. It keeps its range, and whoever
//! comes to that range waits behind it: nobody reads, compares, copies, zeroes or clears around it. What stores it is
//! whatever waits for it, a flush, a new map, the end of its session, too much in memory, or a short time. A write of
//! the very same range takes its place.
//!
//! It is never cancelled (docs/protocol.md rule 10), and its dirty bit becomes durable when it is stored (rule 8).
//! A map is adopted only once nothing is staged: whoever has adopted the map that makes it primary has everything on
//! its disk, and the masks say so.

use super::action::{Body, BufferRange, DiskIndex, FlushKey, OpKey};
use super::local::LocalStart;
use super::op::{FlushWaiter, Local, Op, OpKind, Origin};
use super::{Engine, Nanos};
use crate::ids::{DeviceId, DiskId, SlotIndex};
use crate::planted::{self, Bug};
use crate::region::masks::touched;
use crate::wire::header::Status;
use std::collections::{BTreeMap, VecDeque};

/// For so long a write may stay in memory only. Long enough for one that is soon written again to be stored once.
const COMMIT_AFTER: Nanos = 50_000_000;
/// What is staged takes at most so many bytes of buffers; what comes then is acknowledged once it is stored. From
/// half of it on the oldest are stored.
const BYTES_MAX: u64 = 64 << 20;
/// A buffer takes at least so many.
const BUFFER_BYTES: u64 = 8 << 10;
/// So many in one slice are stored together: each keeps a range that every other operation there looks at.
const SLICE_BATCH: usize = 32;
/// So many of one slice are staged or being stored, at most.
const SLICE_MAX: u32 = 128;

/// What a node holds in memory for other nodes.
#[derive(Default, Debug)]
pub(super) struct Staging {
    /// What was staged and when, in that order; some of it is being stored or stored by now.
    order: VecDeque<(Nanos, OpKey)>,
    /// The number of the next.
    next: u64,
    /// Staged, or being stored.
    unfinished: usize,
    /// Bytes of buffers of those, and of those that have not begun.
    bytes: u64,
    waiting_bytes: u64,
    flushes: Vec<WaitingFlush>,
    /// Nothing more is staged.
    stopped: bool,
    /// The last one has been stored.
    emptied: bool,
}

/// A flush that waits until what was staged before it is stored.
#[derive(Debug)]
struct WaitingFlush {
    flush: FlushKey,
    device: usize,
    /// It waits for those with smaller numbers.
    before: u64,
    left: usize,
    disks: Vec<DiskIndex>,
}

/// A write that was acknowledged and is not stored yet.
#[derive(Clone, Copy, Debug)]
pub struct StagedWrite {
    /// The device.
    pub device: DeviceId,
    /// The disk that it will be stored on.
    pub disk: DiskId,
    /// The slice.
    pub slice: u32,
    /// Bytes from its start.
    pub offset: u32,
    /// What is written.
    pub buffer: BufferRange,
}

/// What of a slice is staged.
#[derive(Default, Debug)]
pub(super) struct StagedSlice {
    /// Those that have not begun, by their offset: they do not overlap.
    waiting: BTreeMap<u32, OpKey>,
    /// Those and the ones being stored.
    unfinished: u32,
}

impl Staging {
    /// Stages nothing more.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    pub fn is_empty(&self) -> bool {
        self.unfinished == 0
    }

    /// Whether the last was stored since this was asked.
    pub fn take_emptied(&mut self) -> bool {
        std::mem::take(&mut self.emptied)
    }
}

fn buffer_bytes(op: &Op) -> u64 {
    u64::from(op.length).next_multiple_of(BUFFER_BYTES)
}

impl Engine {
    /// Whether this node holds anything in memory for other nodes.
    pub fn has_staged(&self) -> bool {
        !self.staging.is_empty()
    }

    /// What this node holds in memory for other nodes, in the order of its arrival.
    pub fn staged(&self) -> impl Iterator<Item = StagedWrite> {
        let mut staged: Vec<&Op> = self.ops.values().filter(|op| op.staged.is_some()).collect();
        staged.sort_by_key(|op| op.staged);
        staged.into_iter().filter_map(|op| {
            Some(StagedWrite {
                device: self.devices[op.device].view.id,
                disk: self.disks[op.disk].id,
                slice: op.slice,
                offset: op.offset,
                buffer: op.buffer?,
            })
        })
    }

    /// Whether a secondary's write that holds its range is acknowledged from memory.
    pub(super) fn may_stage(&self, key: OpKey) -> bool {
        let op = &self.ops[key];
        let device = &self.devices[op.device];
        let regions = touched(op.offset, op.length, self.region_bytes());
        op.kind == OpKind::Write { fua: false }
            && device.view.deferred
            && op.staged.is_none()
            && op.owns_buffer
            && self.adopting.is_none()
            && !self.staging.stopped
            && !self.disks[op.disk].failed
            // What is entered for the first time is zeroed, and needs more than the range of the write.
            && regions & !self.disks[op.disk].journal.masks(SlotIndex(op.slot)).writable() == 0
            && self.staging.bytes + buffer_bytes(op) <= BYTES_MAX
            && device.slices[op.slice as usize].staged.unfinished < SLICE_MAX
    }

    /// Acknowledges it, and keeps it.
    pub(super) fn stage(&mut self, key: OpKey) {
        let number = self.staging.next;
        let op = &mut self.ops[key];
        op.staged = Some(number);
        let (device, slice, offset, bytes) = (op.device, op.slice, op.offset, buffer_bytes(op));
        let staging = &mut self.staging;
        staging.next += 1;
        staging.unfinished += 1;
        staging.bytes += bytes;
        staging.waiting_bytes += bytes;
        staging.order.push_back((self.now, key));
        let staged = &mut self.devices[device].slices[slice as usize].staged;
        staged.unfinished += 1;
        staged.waiting.insert(offset, key);
        let full = staged.waiting.len() >= SLICE_BATCH;
        self.acknowledge(key);
        if full {
            self.store_slice(device, slice);
        }
        while self.staging.waiting_bytes > BYTES_MAX / 2 {
            let Some((_, oldest)) = self.staging.order.pop_front() else { break };
            self.store(oldest);
        }
    }

    /// A write of the very same range as one that is staged takes its place, and is acknowledged as that was; true
    /// if so. What it replaces need never be stored.
    pub(super) fn supersede(&mut self, newer: &Op) -> bool {
        let (Origin::Peer(sender), OpKind::Write { fua: false }, true) =
            (newer.origin, newer.kind, newer.owns_buffer)
        else {
            return false;
        };
        let staged = &self.devices[newer.device].slices[newer.slice as usize].staged;
        let Some(key) = staged.waiting.get(&newer.offset).copied() else { return false };
        if self.ops[key].length != newer.length {
            return false;
        }
        let older = std::mem::replace(&mut self.ops[key].buffer, newer.buffer);
        self.release(older.map(|buffer| buffer.buffer));
        self.answer(sender, self.answer_header(newer, Status::Done), Body::None);
        true
    }

    /// Stores a staged write, if it has not begun.
    pub(super) fn store(&mut self, key: OpKey) {
        if !self.ops.get(key).is_some_and(|op| op.staged.is_some() && op.holds && op.local == Local::Idle) {
            return;
        }
        self.unlist(key);
        self.store_now(key);
    }

    /// It holds its range, perhaps a wider one now.
    pub(super) fn store_now(&mut self, key: OpKey) {
        if self.prepare_local(key) == LocalStart::Ready {
            self.start_local(key);
            self.progress(key);
        }
    }

    /// It does not wait any more.
    fn unlist(&mut self, key: OpKey) {
        let op = &self.ops[key];
        let staged = &mut self.devices[op.device].slices[op.slice as usize].staged;
        if staged.waiting.remove(&op.offset).is_some() {
            self.staging.waiting_bytes -= buffer_bytes(op);
        }
    }

    /// Stores what of a slice is staged: somebody wants its range.
    pub(super) fn store_slice(&mut self, device: usize, slice: u32) {
        let Some(slice) = self.devices[device].slices.get(slice as usize) else { return };
        let keys: Vec<OpKey> = slice.staged.waiting.values().copied().collect();
        keys.into_iter().for_each(|key| self.store(key));
    }

    /// Stores everything: roles or copies may change.
    pub(super) fn store_all(&mut self) {
        for (_, key) in std::mem::take(&mut self.staging.order) {
            self.store(key);
        }
    }

    /// Time passed.
    pub(super) fn tick_staging(&mut self) {
        while let Some((since, key)) = self.staging.order.front().copied()
            && since + COMMIT_AFTER <= self.now
        {
            self.staging.order.pop_front();
            self.store(key);
        }
    }

    /// A primary's flush: it covers what was acknowledged from memory. Those disks are flushed once that is stored.
    pub(super) fn flush_staged(&mut self, flush: FlushKey, device: usize, disks: Vec<DiskIndex>) {
        let slices = &self.devices[device].slices;
        let left: u32 = slices.iter().map(|slice| slice.staged.unfinished).sum();
        if left == 0 || planted::is(Bug::StagedUnflushed) {
            disks.into_iter().for_each(|disk| self.flush_disk(disk, FlushWaiter::Flush(flush)));
            return;
        }
        let (before, left) = (self.staging.next, left as usize);
        self.staging.flushes.push(WaitingFlush { flush, device, before, left, disks });
        let waiting = self.devices[device].slices.iter().flat_map(|slice| slice.staged.waiting.values());
        let keys: Vec<OpKey> = waiting.copied().collect();
        keys.into_iter().for_each(|key| self.store(key));
    }

    /// A staged write is stored, or its disk failed: then the flush fails too.
    pub(super) fn staged_ended(&mut self, op: &Op) {
        let Some(number) = op.staged else { return };
        if let Some(slice) = self.devices[op.device].slices.get_mut(op.slice as usize) {
            slice.staged.unfinished -= 1;
        }
        let staging = &mut self.staging;
        staging.bytes -= buffer_bytes(op);
        staging.unfinished -= 1;
        staging.emptied |= staging.unfinished == 0;
        for wait in staging.flushes.iter_mut().filter(|wait| wait.device == op.device && number < wait.before)
        {
            wait.left -= 1;
        }
        let done: Vec<WaitingFlush> = staging.flushes.extract_if(.., |wait| wait.left == 0).collect();
        for WaitingFlush { flush, disks, .. } in done {
            disks.into_iter().for_each(|disk| self.flush_disk(disk, FlushWaiter::Flush(flush)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{DEVICE, Rig, map, next};
    use super::{BYTES_MAX, COMMIT_AFTER};
    use crate::ids::{ProcessId, SliceEpoch};
    use crate::map::{Commit, DistributionMap, ReplicaState};
    use crate::wire::header::{FLAG_FUA, Header, Kind, Status};

    fn deferred() -> DistributionMap {
        let mut map = map(2, 2, 1);
        map.devices[0].commit = Commit::Deferred;
        map
    }

    fn header(kind: Kind, offset: u32) -> Header {
        Header { slice_epoch: SliceEpoch(1), device: DEVICE.0, offset, length: 4096, ..Header::new(kind) }
    }

    /// Node 2, whose first region has been entered, with disk I/O held from now on.
    fn secondary() -> Rig {
        let mut rig = Rig::new(2, &deferred());
        rig.frame(1, header(Kind::Write, 0), None);
        rig.sent.clear();
        rig.wait(200, &[]);
        rig.sent.clear();
        rig.released.clear();
        rig.hold = true;
        rig
    }

    fn acks(rig: &mut Rig) -> usize {
        rig.take(Kind::Ack).iter().filter(|sent| sent.header.flags == Status::Done as u8).count()
    }

    #[test]
    fn a_write_is_acknowledged_from_memory_and_stored_soon() {
        let mut rig = secondary();
        rig.frame(1, header(Kind::Write, 0), None);
        assert_eq!((acks(&mut rig), rig.held.len()), (1, 0));
        assert_eq!(rig.engine.staged().count(), 1);
        rig.wait(2 * COMMIT_AFTER / 1_000_000 + 50, &[]);
        assert_eq!(rig.held.len(), 1);
        rig.complete_io(Ok(()));
        assert_eq!((acks(&mut rig), rig.released.len()), (0, 1), "it was answered already");
        assert!(rig.engine.staging.is_empty() && rig.engine.ops.is_empty());
    }

    #[test]
    fn a_flush_is_answered_when_what_was_staged_is_stored() {
        let mut rig = secondary();
        rig.frame(1, header(Kind::Write, 0), None);
        assert_eq!(acks(&mut rig), 1);
        rig.frame(1, Header { device: DEVICE.0, ..Header::new(Kind::Flush) }, None);
        assert_eq!((acks(&mut rig), rig.held.len()), (0, 1));
        rig.complete_io(Ok(()));
        assert_eq!(acks(&mut rig), 1);
    }

    #[test]
    fn a_flush_fails_when_what_was_staged_cannot_be_stored() {
        let mut rig = secondary();
        rig.frame(1, header(Kind::Write, 0), None);
        rig.frame(1, Header { device: DEVICE.0, ..Header::new(Kind::Flush) }, None);
        rig.sent.clear();
        rig.complete_io(Err("broken".into()));
        let answers = rig.take(Kind::Ack);
        assert_eq!(answers[0].header.flags, Status::DiskFailed as u8);
        assert!(rig.engine.staging.is_empty() && rig.engine.ops.is_empty());
    }

    #[test]
    fn whoever_comes_to_its_range_waits_until_it_is_stored() {
        for kind in [Kind::Fetch, Kind::Compare, Kind::Zero] {
            let mut rig = secondary();
            rig.frame(1, header(Kind::Write, 0), None);
            assert_eq!(acks(&mut rig), 1);
            rig.frame(1, header(kind, 0), None);
            assert_eq!(rig.held.len(), 1, "{kind:?}: the write only");
            rig.complete_io(Ok(()));
            assert_eq!(rig.held.len(), 1, "{kind:?}: its turn");
        }
    }

    #[test]
    fn through_to_stable_storage_and_where_nothing_was_before_is_not_staged() {
        let mut rig = secondary();
        rig.frame(1, Header { flags: FLAG_FUA, ..header(Kind::Write, 0) }, None);
        assert_eq!((acks(&mut rig), rig.held.len()), (0, 1));
        let mut rig = Rig::on(2, &deferred(), false);
        rig.hold = true;
        rig.frame(1, header(Kind::Write, 0), None);
        assert_eq!((acks(&mut rig), rig.held.len()), (0, 1), "the region is zeroed first");
    }

    #[test]
    fn the_same_range_again_is_stored_once() {
        let mut rig = secondary();
        for _ in 0..3 {
            rig.frame(1, header(Kind::Write, 0), None);
        }
        assert_eq!((acks(&mut rig), rig.held.len(), rig.released.len()), (3, 0, 2));
        let newest = rig.engine.staged().next().unwrap().buffer.buffer;
        assert!(!rig.released.contains(&newest));
        rig.frame(1, Header { length: 2048, ..header(Kind::Write, 0) }, None);
        assert_eq!((acks(&mut rig), rig.held.len()), (0, 1), "another range waits");
        rig.complete_io(Ok(()));
        assert_eq!(acks(&mut rig), 1);
    }

    #[test]
    fn it_outlives_its_session_and_the_next_one_waits_for_it() {
        let mut rig = secondary();
        rig.frame(1, header(Kind::Write, 0), None);
        rig.lane_down(1);
        assert_eq!(rig.held.len(), 1);
        rig.sent.clear();
        rig.open(1, deferred().version);
        assert!(rig.take(Kind::Open).is_empty());
        rig.complete_io(Ok(()));
        assert_eq!(rig.take(Kind::Open).len(), 1);
    }

    #[test]
    fn a_process_that_ends_stores_what_it_holds() {
        let mut rig = secondary();
        rig.frame(1, header(Kind::Write, 0), None);
        rig.engine.handle_stop(rig.now);
        rig.run();
        assert_eq!((acks(&mut rig), rig.held.len()), (1, 1));
        assert!(rig.engine.has_staged());
        rig.complete_io(Ok(()));
        assert!(!rig.engine.has_staged());
        rig.frame(1, header(Kind::Write, 0), None);
        assert_eq!((acks(&mut rig), rig.held.len()), (0, 1));
    }

    #[test]
    fn a_map_is_adopted_once_everything_is_stored() {
        let mut rig = secondary();
        rig.frame(1, header(Kind::Write, 0), None);
        assert_eq!(acks(&mut rig), 1);
        let second = next(&deferred(), |span| span.replicas.swap(0, 1));
        rig.adopt(&second);
        assert_eq!((rig.engine.adopted_version().0, rig.held.len()), (1, 1));
        rig.frame(1, header(Kind::Write, 8192), None);
        assert_eq!((acks(&mut rig), rig.held.len()), (0, 2), "what comes meanwhile is stored first");
        rig.complete_io(Ok(()));
        assert_eq!(rig.engine.adopted_version().0, 2);
        assert_eq!(acks(&mut rig), 1);
    }

    #[test]
    fn so_much_and_no_more_is_in_memory() {
        let mut rig = secondary();
        for block in 0..64 {
            rig.frame(1, header(Kind::Write, block * 4096), None);
        }
        assert_eq!(acks(&mut rig), 64);
        assert_eq!(rig.held.len(), 64, "a batch is stored as soon as it is one");
        assert!(rig.engine.staging.bytes <= BYTES_MAX);
        rig.complete_io(Ok(()));
        assert_eq!((rig.engine.staging.bytes, rig.engine.staging.waiting_bytes), (0, 0));
    }

    #[test]
    fn what_a_copy_had_acknowledged_counts_for_nothing_when_its_process_is_another() {
        for (commit, known) in [(Commit::Immediate, true), (Commit::Deferred, false)] {
            let mut first = map(2, 2, 1);
            first.devices[0].commit = commit;
            first.devices[0].spans[0].replicas[1].state = ReplicaState::Syncing;
            let mut rig = Rig::new(1, &first);
            rig.wait(200, &[2]);
            assert_eq!(rig.engine.may_differ(0, 0, 0), 0, "they were compared");
            rig.clean_peers = false;
            rig.adopt(&next(&first, |span| span.replicas[1].incarnation.process = ProcessId(77)));
            assert_eq!(rig.engine.may_differ(0, 0, 0) == 0, known, "{commit:?}");
        }
    }

    #[test]
    fn a_disk_that_failed_holds_up_no_adoption_with_what_it_never_stores() {
        let mut rig = secondary();
        rig.frame(1, header(Kind::Write, 0), None);
        rig.lane_down(1);
        assert_eq!(rig.held.len(), 1, "it hangs");
        rig.engine.fail_disk(0, "another write failed");
        rig.adopt(&next(&deferred(), |span| span.replicas[1].state = ReplicaState::Stale));
        assert_eq!(rig.engine.adopted_version().0, 2);
    }

    #[test]
    fn what_is_noted_while_the_masks_are_unknown_is_compared_whatever_they_say() {
        let mut first = map(2, 2, 1);
        first.devices[0].spans[0].replicas[1].state = ReplicaState::Stale;
        let mut rig = Rig::new(1, &first);
        rig.clean_peers = false;
        rig.adopted(2, 2);
        rig.adopt(&next(&first, |span| span.replicas[1].state = ReplicaState::Syncing));
        rig.wait(200, &[2]);
        let unite = rig.take(Kind::Unite);
        rig.engine.note_behind(0, 0, 0, 0b100);
        let masks = Header { sequence: unite[0].header.sequence, ..Header::new(Kind::Masks) };
        rig.frame_with(2, masks, &[0; 16]);
        assert_eq!(rig.engine.may_differ(0, 0, 0), 0b100);
    }

    #[test]
    fn a_secondary_that_lost_its_memory_is_no_member() {
        let first = deferred();
        let mut rig = Rig::new(1, &first);
        rig.lane_down(2);
        rig.reports.clear();
        rig.open_as(2, first.version, 77, 2);
        let asked =
            rig.reports.iter().any(|report| matches!(report, super::super::action::Report::AskStale { .. }));
        assert!(asked, "{:?}", rig.reports);
    }
}
