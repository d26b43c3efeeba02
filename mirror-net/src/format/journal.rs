//! The journal: the sans-I/O core that owns a disk's slot table, its log and the checkpoint.
//!
//! Changes are [submitted](Journal::submit) and become durable in that order; the driver asks
//! [`Journal::poll_io`] what to write until it gets `None`, reports every completion with
//! [`Journal::handle_io`], then asks [`Journal::poll_durable`] and `poll_io` again.
//!
//! One log write is in flight at a time, and all that is submitted meanwhile joins the next: many
//! writers share one write. Pages are written behind, by the checkpoint.

use super::block::Block;
use super::checkpoint::{Checkpoint, PageRef, Step};
use super::geometry::Geometry;
use super::log::{self, LogBlock, RECORDS_PER_BLOCK, Record};
use super::page::{self, PageHeader, PageKind};
use super::table::{Assignment, CopyState, Role, SlotState, Table, page_of};
use crate::ids::{LossGeneration, SliceEpoch, SlotIndex};
use crate::planted::{self, Bug};
use crate::region::masks::RegionMasks;
use std::collections::{HashMap, VecDeque};

/// Names a submitted change; tickets become durable in ascending order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Ticket(pub u64);

/// Names one I/O of a journal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct IoId(pub u64);

/// The disk returned an error for a metadata write or flush.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a metadata write failed")]
pub struct IoFailed;

/// A change of the slot table, with absolute values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// The slot's masks become these.
    Masks {
        /// Which slot.
        slot: SlotIndex,
        /// All three masks.
        masks: RegionMasks,
    },
    /// The slot takes up a slice, and its masks are reset in the same block.
    Assign {
        /// Which slot.
        slot: SlotIndex,
        /// What it holds; `slot_generation` must be the slot's.
        assignment: Assignment,
        /// Its masks from now on.
        masks: RegionMasks,
    },
    /// Every copy in a run of slots adopts a slice epoch. One slot is a run of 1.
    Epoch {
        /// The first slot of the run; none of it may be free.
        first: SlotIndex,
        /// Slots in the run, at least 1.
        count: u32,
        /// The adopted epoch.
        epoch: SliceEpoch,
        /// The copies' role under it.
        role: Role,
        /// The copies' state under it.
        state: CopyState,
        /// The slices' loss generation.
        loss: LossGeneration,
    },
    /// The slot is given up; its generation is raised.
    Free {
        /// Which slot.
        slot: SlotIndex,
        /// Its masks from now on: `zero` only where it has been zeroed and flushed.
        masks: RegionMasks,
    },
}

/// What the journal wants the driver to do.
pub enum MetadataIo {
    /// Write a block.
    Write {
        /// To be given to [`Journal::handle_io`].
        id: IoId,
        /// Bytes from the start of the disk; a multiple of 4096.
        offset: u64,
        /// What to write, aligned for direct I/O.
        block: Box<Block>,
        /// The write must be durable when it completes: FUA, or a flush behind it.
        durable: bool,
    },
    /// Flush the disk: every write that completed before is durable when this completes.
    Flush {
        /// To be given to [`Journal::handle_io`].
        id: IoId,
    },
}

impl MetadataIo {
    /// Its id.
    pub fn id(&self) -> IoId {
        match self {
            Self::Write { id, .. } | Self::Flush { id } => *id,
        }
    }
}

impl std::fmt::Debug for MetadataIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Write { id, offset, durable, .. } => {
                write!(f, "write {id:?} at {offset}{}", if *durable { ", durable" } else { "" })
            }
            Self::Flush { id } => write!(f, "flush {id:?}"),
        }
    }
}

/// Records that will share a block.
#[derive(Default)]
struct Batch {
    records: Vec<Record>,
    last: Ticket,
}

/// The log write that is under way.
struct InFlight {
    id: IoId,
    lsn: u64,
    tail_lsn: u64,
    batch: Batch,
}

/// Dirty bits of a slot that a change not yet durable has cleared.
struct PendingClear {
    bits: u64,
    until: Ticket,
}

/// How to continue a journal; made by recovery.
pub(super) struct JournalStart {
    pub(super) geometry: Geometry,
    pub(super) format_tag: u64,
    pub(super) attach_generation: u64,
    pub(super) table: Table,
    /// The newest block in the log, and the oldest that is needed.
    pub(super) newest_lsn: u64,
    pub(super) tail_lsn: u64,
    /// The newest block's records.
    pub(super) previous: Vec<Record>,
    /// The highest sequence of any page.
    pub(super) page_sequence: u64,
    /// Pages whose copies miss something that is in the log.
    pub(super) changed: Vec<PageRef>,
}

/// One disk's metadata; see the [module](self).
pub struct Journal {
    geometry: Geometry,
    format_tag: u64,
    attach_generation: u64,
    /// With every submitted change.
    newest: Table,
    /// With every durable change: what page images are made of.
    durable: Table,
    last_ticket: Ticket,
    durable_ticket: Ticket,
    reported: Ticket,
    next_io: u64,
    pending: VecDeque<Batch>,
    in_flight: Option<InFlight>,
    previous: Vec<Record>,
    next_lsn: u64,
    /// Blocks from here on may not be overwritten.
    tail_lsn: u64,
    clears: HashMap<SlotIndex, PendingClear>,
    clears_in_order: VecDeque<(Ticket, SlotIndex)>,
    checkpoint: Checkpoint,
    failed: bool,
}

impl Journal {
    pub(super) fn resume(start: JournalStart) -> Self {
        let mut checkpoint = Checkpoint::new(start.geometry.pages(), start.page_sequence);
        for page in start.changed {
            checkpoint.note_changed(page);
        }
        let mut journal = Self {
            geometry: start.geometry,
            format_tag: start.format_tag,
            attach_generation: start.attach_generation,
            newest: start.table.clone(),
            durable: start.table,
            last_ticket: Ticket(0),
            durable_ticket: Ticket(0),
            reported: Ticket(0),
            next_io: 1,
            pending: VecDeque::new(),
            in_flight: None,
            previous: start.previous,
            next_lsn: start.newest_lsn + 1,
            tail_lsn: start.tail_lsn,
            clears: HashMap::new(),
            clears_in_order: VecDeque::new(),
            checkpoint,
            failed: false,
        };
        journal.checkpoint_if_half_full();
        journal
    }

    /// The number of slots.
    pub fn slots(&self) -> u32 {
        self.newest.len()
    }

    /// A slot with every change that was submitted, durable or not.
    pub fn slot(&self, slot: SlotIndex) -> SlotState {
        self.newest.slot(slot)
    }

    /// A slot's masks with every change that was submitted; cheaper than [`Journal::slot`].
    pub fn masks(&self, slot: SlotIndex) -> RegionMasks {
        self.newest.masks(slot)
    }

    /// A slot's masks as a crash would leave them, if nothing submitted reached the disk.
    ///
    /// To ask whether data may be written, use [`Journal::dirty_durable`]: it knows of clears under way.
    pub fn durable_masks(&self, slot: SlotIndex) -> RegionMasks {
        self.durable.masks(slot)
    }

    /// Regions of a slot that are dirty on the disk and stay so whatever happens to the changes under
    /// way: data may be written there.
    ///
    /// A region whose bit was cleared is left out from the clear's submission on, also when it was set
    /// again since, until the clear is durable: a crash between the two would leave it clean.
    pub fn dirty_durable(&self, slot: SlotIndex) -> u64 {
        let clearing =
            if self.clears.is_empty() { 0 } else { self.clears.get(&slot).map_or(0, |clear| clear.bits) };
        if planted::is(Bug::DataBeforeIntent) {
            return self.newest.masks(slot).dirty;
        }
        self.durable.masks(slot).dirty & !clearing
    }

    /// The newest ticket given out; when it is durable, everything submitted is.
    pub fn last_ticket(&self) -> Ticket {
        self.last_ticket
    }

    /// The newest durable ticket, whether or not it was polled.
    pub fn durable_ticket(&self) -> Ticket {
        self.durable_ticket
    }

    /// Whether a write failed. Nothing becomes durable any more; the disk must be given up, and opened again
    /// before it is used again.
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// Whether nothing is submitted that is not durable, and no I/O is under way or wanted.
    pub fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.in_flight.is_none() && self.checkpoint.is_idle()
    }

    /// Pages that a checkpoint would write. The driver starts one when it has nothing else to do.
    pub fn changed_pages(&self) -> usize {
        self.checkpoint.changed_pages()
    }

    /// The attach generation that blocks carry from now on.
    pub fn set_attach_generation(&mut self, generation: u64) {
        self.attach_generation = generation;
    }

    /// Makes a change in memory at once, and on the disk as soon as it can be written.
    ///
    /// # Panics
    /// If the change contradicts the table: a slot out of range, an assignment with another slot
    /// generation than the slot's, an epoch for a free slot, freeing a free slot.
    pub fn submit(&mut self, change: Change) -> Ticket {
        self.last_ticket.0 += 1;
        match change {
            Change::Masks { slot, masks } => {
                self.note_clears(slot, masks);
                if !self.join_masks(slot, masks) {
                    self.enqueue(&[Record::Masks { slot, masks }]);
                }
            }
            Change::Assign { slot, assignment, masks } => {
                assert_eq!(
                    assignment.slot_generation,
                    self.newest.slot(slot).slot_generation,
                    "{slot} is assigned under an old generation"
                );
                self.note_clears(slot, masks);
                self.enqueue(&[Record::Assign { slot, assignment }, Record::Masks { slot, masks }]);
            }
            Change::Epoch { first, count, epoch, role, state, loss } => {
                assert!(count > 0 && u64::from(first.0) + u64::from(count) <= u64::from(self.slots()));
                for slot in (first.0..first.0 + count).map(SlotIndex) {
                    assert!(self.newest.slot(slot).assignment.is_some(), "{slot} is free and adopts {epoch}");
                }
                self.enqueue(&[Record::EpochRange { first, count, epoch, role, state, loss }]);
            }
            Change::Free { slot, masks } => {
                let state = self.newest.slot(slot);
                assert!(state.assignment.is_some(), "{slot} is freed twice");
                let slot_generation = state.slot_generation.wrapping_add(1);
                self.note_clears(slot, masks);
                self.enqueue(&[Record::Free { slot, slot_generation }, Record::Masks { slot, masks }]);
            }
        }
        self.pending.back_mut().expect("the change is in it").last = self.last_ticket;
        self.last_ticket
    }

    /// Remembers which dirty bits a change clears, for [`Journal::dirty_durable`].
    fn note_clears(&mut self, slot: SlotIndex, masks: RegionMasks) {
        let cleared = self.newest.masks(slot).dirty & !masks.dirty;
        if cleared == 0 {
            return;
        }
        let until = self.last_ticket;
        let clear = self.clears.entry(slot).or_insert(PendingClear { bits: 0, until });
        clear.bits |= cleared;
        clear.until = until;
        self.clears_in_order.push_back((until, slot));
    }

    /// Replaces a mask record of the same slot that waits in the youngest batch: a busy slot takes one record
    /// a block. Only there, since a block is atomic: no order within it can be seen.
    fn join_masks(&mut self, slot: SlotIndex, masks: RegionMasks) -> bool {
        let Some(batch) = self.pending.back_mut() else { return false };
        let same_slot = batch.records.iter_mut().rev().find_map(|record| match record {
            Record::Masks { slot: other, masks } if *other == slot => Some(masks),
            _ => None,
        });
        let Some(waiting) = same_slot else { return false };
        *waiting = masks;
        self.newest.set_masks(slot, masks);
        true
    }

    /// Adds records that must be in one block.
    fn enqueue(&mut self, records: &[Record]) {
        for record in records {
            self.newest.apply(record);
        }
        let fits =
            self.pending.back().is_some_and(|batch| batch.records.len() + records.len() <= RECORDS_PER_BLOCK);
        if !fits {
            self.pending.push_back(Batch::default());
        }
        self.pending.back_mut().expect("just made sure").records.extend_from_slice(records);
    }

    /// Starts a checkpoint unless one is running or there is nothing to write. The driver calls it
    /// when it is idle, and before it closes the disk; at a half-full log one starts by itself.
    pub fn start_checkpoint(&mut self) {
        if !self.failed && self.checkpoint.is_idle() && self.checkpoint.changed_pages() > 0 {
            self.checkpoint.start(self.durable_lsn());
        }
    }

    fn checkpoint_if_half_full(&mut self) {
        if self.checkpoint.is_idle() && self.log_used() * 2 >= self.geometry.log_blocks() {
            self.checkpoint.start(self.durable_lsn());
        }
    }

    /// The newest block that is durable.
    fn durable_lsn(&self) -> u64 {
        self.next_lsn - 1 - u64::from(self.in_flight.is_some())
    }

    /// Blocks of the log that recovery may need, the one in flight included.
    fn log_used(&self) -> u64 {
        self.next_lsn - self.tail_lsn
    }

    /// The next I/O to begin, if any can begin now. All that were returned may be in flight together.
    pub fn poll_io(&mut self) -> Option<MetadataIo> {
        if self.failed {
            return None;
        }
        if let Some(io) = self.next_log_write() {
            return Some(io);
        }
        let id = IoId(self.next_io);
        let step = self.checkpoint.next_step(id)?;
        self.next_io += 1;
        Some(match step {
            Step::Flush => MetadataIo::Flush { id },
            Step::Page { page: (kind, index), copy, sequence } => {
                let header = PageHeader {
                    kind,
                    index,
                    sequence,
                    applied_lsn: self.durable_lsn(),
                    attach_generation: self.attach_generation,
                };
                let block = Box::new(page::encode(&header, self.format_tag, &self.durable));
                MetadataIo::Write {
                    id,
                    offset: self.geometry.page_offset(kind, index, copy),
                    block,
                    durable: false,
                }
            }
        })
    }

    fn next_log_write(&mut self) -> Option<MetadataIo> {
        if self.in_flight.is_some() {
            return None;
        }
        let new_tail = self.checkpoint.new_tail();
        // One block is kept for the new tail, else a full log could never be emptied.
        let kept = if new_tail.is_some() { 0 } else { 1 };
        let has_room = self.log_used() + 1 + kept <= self.geometry.log_blocks();
        if !has_room || (new_tail.is_none() && self.pending.is_empty()) {
            return None;
        }
        let batch =
            self.pending.pop_front().unwrap_or(Batch { records: Vec::new(), last: self.durable_ticket });
        let block = LogBlock {
            lsn: self.next_lsn,
            tail_lsn: new_tail.unwrap_or(self.tail_lsn),
            attach_generation: self.attach_generation,
            records: batch.records,
            previous: Some(std::mem::take(&mut self.previous)),
        };
        let bytes = log::encode(&block, self.format_tag);
        let id = IoId(self.next_io);
        self.next_io += 1;
        self.next_lsn += 1;
        let batch = Batch { records: block.records, last: batch.last };
        self.in_flight = Some(InFlight { id, lsn: block.lsn, tail_lsn: block.tail_lsn, batch });
        Some(MetadataIo::Write {
            id,
            offset: self.geometry.log_offset(block.lsn),
            block: bytes,
            durable: !planted::is(Bug::IntentVolatile),
        })
    }

    /// An I/O completed. A failure is final, see [`Journal::failed`].
    ///
    /// # Panics
    /// If `id` is not in flight.
    pub fn handle_io(&mut self, id: IoId, result: Result<(), IoFailed>) {
        if self.failed {
            return;
        }
        if result.is_err() {
            self.failed = true;
            return;
        }
        match self.in_flight.take_if(|write| write.id == id) {
            Some(write) => self.handle_log_written(write),
            None => assert!(self.checkpoint.handle_done(id), "{id:?} is not in flight"),
        }
    }

    fn handle_log_written(&mut self, write: InFlight) {
        for record in &write.batch.records {
            self.durable.apply(record);
            let kind = if record.is_masks() { PageKind::Masks } else { PageKind::Assignments };
            let slots = record.slots();
            for index in page_of(SlotIndex(slots.start))..=page_of(SlotIndex(slots.end - 1)) {
                self.checkpoint.note_changed((kind, index));
            }
        }
        debug_assert!(write.batch.last >= self.durable_ticket && write.lsn == self.durable_lsn());
        self.durable_ticket = write.batch.last;
        self.previous = write.batch.records;
        while let Some(&(ticket, slot)) = self.clears_in_order.front() {
            if ticket > self.durable_ticket {
                break;
            }
            self.clears_in_order.pop_front();
            if self.clears.get(&slot).is_some_and(|clear| clear.until == ticket) {
                self.clears.remove(&slot);
            }
        }
        if write.tail_lsn > self.tail_lsn {
            self.tail_lsn = write.tail_lsn;
            self.checkpoint.finish();
        }
        self.checkpoint_if_half_full();
    }

    /// The newest durable ticket, once each time that it rises: every change up to it is durable.
    pub fn poll_durable(&mut self) -> Option<Ticket> {
        if self.reported == self.durable_ticket {
            return None;
        }
        self.reported = self.durable_ticket;
        Some(self.durable_ticket)
    }
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal")
            .field("slots", &self.slots())
            .field("next_lsn", &self.next_lsn)
            .field("tail_lsn", &self.tail_lsn)
            .field("submitted", &self.last_ticket)
            .field("durable", &self.durable_ticket)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}
