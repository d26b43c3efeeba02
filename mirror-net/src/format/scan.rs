//! Reading what stands on a disk, believing nothing: the common part of opening and inspecting.

use super::block::{BLOCK, BLOCK_BYTES, Block, BlockFault, align_down};
use super::geometry::{Geometry, SUPERBLOCK_FROM_END, SUPERBLOCK_OFFSET};
use super::log::{self, LogBlock, Record};
use super::page::{self, PageHeader, PageKind};
use super::plan::WRITE_BLOCKS_MAX;
use super::superblock::Superblock;
use super::table::{Table, page_of};
use crate::ids::SlotIndex;
use crate::region::masks::RegionMasks;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use zerocopy::IntoBytes;

/// The disk returned an error for a read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a metadata read failed")]
pub struct ReadFailed;

/// Reads the disk: bytes from an offset into a buffer, both multiples of 4096, the buffer aligned so too.
/// It may fail as a whole; it is then tried block by block.
pub type Read<'a> = dyn FnMut(u64, &mut [u8]) -> Result<(), ReadFailed> + 'a;

/// Reads `count` blocks and shows each, or that it cannot be read.
fn read_run(read: &mut Read<'_>, offset: u64, count: u64, mut show: impl FnMut(u64, Option<&Block>)) {
    let mut buffer = vec![Block([0; BLOCK_BYTES]); WRITE_BLOCKS_MAX.min(count as usize)];
    for first in (0..count).step_by(WRITE_BLOCKS_MAX) {
        let piece = &mut buffer[..(count - first).min(WRITE_BLOCKS_MAX as u64) as usize];
        let whole = read(offset + first * BLOCK, piece.as_mut_bytes()).is_ok();
        for (i, block) in (first..).zip(piece) {
            let readable = whole || read(offset + i * BLOCK, block.as_mut_bytes()).is_ok();
            show(i, readable.then_some(&*block));
        }
    }
}

/// One of the two superblocks, as found.
#[derive(Clone, Debug)]
pub struct FoundSuperblock {
    /// Where it was looked for.
    pub offset: u64,
    /// What is there.
    pub content: Result<Superblock, BlockFault>,
}

/// Both superblocks, as found.
#[derive(Clone, Debug)]
pub struct FoundSuperblocks(pub [FoundSuperblock; 2]);

impl FoundSuperblocks {
    /// Reads both. Where the second lies is in the first, which matters if the disk has grown since.
    pub fn read(read: &mut Read<'_>, disk_bytes: u64) -> Self {
        let first = Self::read_one(read, SUPERBLOCK_OFFSET, disk_bytes);
        let computed = align_down(disk_bytes, BLOCK).saturating_sub(SUPERBLOCK_FROM_END);
        let known = first.content.as_ref().ok().map(|superblock| superblock.geometry.superblocks[1]);
        let second = Self::read_one(read, known.unwrap_or(computed), disk_bytes);
        Self([first, second])
    }

    fn read_one(read: &mut Read<'_>, offset: u64, disk_bytes: u64) -> FoundSuperblock {
        let mut content = Err(BlockFault::Unreadable);
        if offset + BLOCK <= disk_bytes {
            read_run(read, offset, 1, |_, block| {
                if let Some(block) = block {
                    content = Superblock::decode(block, offset);
                }
            });
        }
        FoundSuperblock { offset, content }
    }

    /// The copy that counts: the intact one of the highest sequence.
    pub fn newest(&self) -> Option<&Superblock> {
        self.0
            .iter()
            .filter_map(|found| found.content.as_ref().ok())
            .max_by_key(|superblock| superblock.sequence)
    }
}

/// Why all masks of a disk have to be taken for lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum MaskLoss {
    /// Not one block of the log is intact.
    #[error("no block of the log is intact")]
    LogGone,
    /// A block that is still needed is missing.
    #[error("log block {lsn} is missing")]
    LogGap {
        /// The first that is missing.
        lsn: u64,
    },
    /// The block after the newest cannot be read; it may have been written.
    #[error("log block {lsn}, after the newest intact one, cannot be read")]
    LogEndUnreadable {
        /// The block that may have been there.
        lsn: u64,
    },
    /// More blocks after the newest are damaged than a crash can tear, or pages know of later ones.
    #[error("the log's end is missing from block {lsn} on")]
    LogEndMissing {
        /// The first that is missing.
        lsn: u64,
    },
    /// Marking all copies as stale was interrupted.
    #[error("an earlier loss of all masks was not dealt with to the end")]
    Interrupted,
}

/// The log, as found.
#[derive(Debug, Default)]
pub(super) struct FoundLog {
    /// The intact blocks in `[tail, newest]`, in order, and those rebuilt from their successors.
    pub(super) blocks: BTreeMap<u64, LogBlock>,
    pub(super) newest_lsn: u64,
    pub(super) tail_lsn: u64,
    /// Blocks that were damaged and rebuilt from what the next block repeats.
    pub(super) rebuilt: Vec<u64>,
    /// The block after the newest is damaged, as a crash leaves it.
    pub(super) torn: bool,
    /// Damaged blocks by their place in the log, needed or not.
    pub(super) faults: Vec<(u64, BlockFault)>,
    pub(super) loss: Option<MaskLoss>,
}

impl FoundLog {
    pub(super) fn read(read: &mut Read<'_>, geometry: &Geometry, format_tag: u64) -> Self {
        let log_blocks = geometry.log_blocks();
        let mut found = Self::default();
        read_run(read, geometry.log.offset, log_blocks, |position, block| {
            let decoded = block
                .ok_or(BlockFault::Unreadable)
                .and_then(|block| log::decode(block, position, log_blocks, geometry.slots, format_tag));
            match decoded {
                Ok(block) => drop(found.blocks.insert(block.lsn, block)),
                Err(BlockFault::Blank) => (),
                Err(fault) => found.faults.push((position, fault)),
            }
        });
        found.judge(log_blocks);
        found
    }

    fn judge(&mut self, log_blocks: u64) {
        let Some((&newest_lsn, newest)) = self.blocks.last_key_value() else {
            self.loss = Some(MaskLoss::LogGone);
            return;
        };
        self.newest_lsn = newest_lsn;
        self.tail_lsn = newest.tail_lsn;
        self.blocks = self.blocks.split_off(&self.tail_lsn);
        self.rebuild();
        let missing = (self.tail_lsn..newest_lsn).find(|lsn| !self.blocks.contains_key(lsn));
        self.loss = missing.map(|lsn| MaskLoss::LogGap { lsn }).or_else(|| self.judge_end(log_blocks));
    }

    /// Rebuilds single missing blocks from the ones that follow them.
    fn rebuild(&mut self) {
        for lsn in self.tail_lsn..self.newest_lsn {
            if self.blocks.contains_key(&lsn) {
                continue;
            }
            let Some(next) = self.blocks.get(&(lsn + 1)) else { continue };
            let Some(records) = next.previous.clone() else { continue };
            let tail_lsn = next.tail_lsn.min(lsn);
            let attach_generation = next.attach_generation;
            self.blocks.insert(lsn, LogBlock { lsn, tail_lsn, attach_generation, records, previous: None });
            self.rebuilt.push(lsn);
        }
    }

    /// What stands behind the newest block. One log write is in flight at a time, so a crash tears one block,
    /// and a torn block can be read.
    fn judge_end(&mut self, log_blocks: u64) -> Option<MaskLoss> {
        let lsn = self.newest_lsn + 1;
        let in_use = |lsn: u64| lsn >= self.tail_lsn + log_blocks;
        let fault_of = |lsn: u64| {
            if in_use(lsn) {
                return None;
            }
            self.faults.iter().find(|(position, _)| *position == lsn % log_blocks).map(|(_, fault)| *fault)
        };
        match fault_of(lsn) {
            None => None,
            Some(BlockFault::Unreadable) => Some(MaskLoss::LogEndUnreadable { lsn }),
            Some(_) if fault_of(lsn + 1).is_some() => Some(MaskLoss::LogEndMissing { lsn }),
            Some(_) => {
                self.torn = true;
                None
            }
        }
    }
}

/// A copy of a page that is not what it should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct PageFault {
    /// Assignments or masks.
    pub kind: PageKind,
    /// The page's number.
    pub index: u32,
    /// Which copy: 0 or 1.
    pub copy: usize,
    /// What is wrong with it.
    pub fault: BlockFault,
}

/// A page of which no copy is intact.
pub(super) type LostPage = (PageKind, u32);

/// The tables, as found, before and after the log was replayed onto them.
pub(super) struct FoundTables {
    pub(super) table: Table,
    pub(super) faults: Vec<PageFault>,
    /// Intact images of pages whose other copy is damaged, with the damaged copy's number.
    pub(super) repairs: Vec<(PageKind, u32, usize, Block)>,
    pub(super) lost: BTreeSet<LostPage>,
    /// Slots that the log told everything about, although their page is lost.
    masks_known: BTreeSet<u32>,
    assignments_known: BTreeSet<u32>,
    /// For each page of each kind, the log block up to which it is complete.
    applied: [Vec<u64>; 2],
    /// Pages that differ from what the table holds, or whose copies differ.
    pub(super) changed: BTreeSet<(PageKind, u32)>,
    pub(super) sequence: u64,
    /// Records that were newer than their page.
    pub(super) replayed: usize,
}

impl FoundTables {
    pub(super) fn read(read: &mut Read<'_>, geometry: &Geometry, format_tag: u64) -> Self {
        let mut found = Self {
            table: Table::new(geometry.slots, RegionMasks::default()),
            faults: Vec::new(),
            repairs: Vec::new(),
            lost: BTreeSet::new(),
            masks_known: BTreeSet::new(),
            assignments_known: BTreeSet::new(),
            applied: [vec![0; geometry.pages() as usize], vec![0; geometry.pages() as usize]],
            changed: BTreeSet::new(),
            sequence: 0,
            replayed: 0,
        };
        for kind in PageKind::ALL {
            found.read_kind(read, geometry, format_tag, kind);
        }
        found
    }

    fn read_kind(&mut self, read: &mut Read<'_>, geometry: &Geometry, format_tag: u64, kind: PageKind) {
        let pages = u64::from(geometry.pages());
        for first in (0..pages).step_by(WRITE_BLOCKS_MAX) {
            let count = (pages - first).min(WRITE_BLOCKS_MAX as u64);
            let mut copies = [Vec::new(), Vec::new()];
            for (copy, blocks) in copies.iter_mut().enumerate() {
                let offset = geometry.page_offset(kind, first as u32, copy);
                read_run(read, offset, count, |_, block| blocks.push(block.cloned()));
            }
            let [copies0, copies1] = copies;
            for (index, pair) in (first as u32..).zip(copies0.into_iter().zip(copies1)) {
                self.take_page(geometry.slots, format_tag, kind, index, pair.into());
            }
        }
    }

    /// Takes the newer intact copy of a page into the table.
    fn take_page(
        &mut self,
        slots: u32,
        format_tag: u64,
        kind: PageKind,
        index: u32,
        copies: [Option<Block>; 2],
    ) {
        let decoded = copies.each_ref().map(|block| {
            let block = block.as_ref().ok_or(BlockFault::Unreadable)?;
            page::decode(block, kind, index, slots, format_tag)
        });
        for (copy, fault) in
            decoded.iter().enumerate().filter_map(|(copy, page)| Some((copy, *page.as_ref().err()?)))
        {
            self.faults.push(PageFault { kind, index, copy, fault });
        }
        let newest = decoded.iter().flatten().max_by_key(|page| page.header.sequence);
        let Some(newest) = newest else {
            self.lost.insert((kind, index));
            return;
        };
        newest.load(&mut self.table);
        self.applied[kind as usize][index as usize] = newest.header.applied_lsn;
        self.sequence = self.sequence.max(newest.header.sequence);
        match &decoded {
            [Ok(a), Ok(b)] if a.header.sequence != b.header.sequence => {
                self.changed.insert((kind, index));
            }
            [Ok(_), Ok(_)] => (),
            [Ok(_), Err(_)] => {
                self.repairs.push((kind, index, 1, copies[0].clone().expect("it was decoded")))
            }
            _ => self.repairs.push((kind, index, 0, copies[1].clone().expect("it was decoded"))),
        }
    }

    /// The newest log block that any page knows of.
    pub(super) fn applied_lsn_max(&self) -> u64 {
        self.applied.iter().flatten().copied().max().unwrap_or(0)
    }

    /// Replays the log onto the table: records newer than the page they concern.
    pub(super) fn replay(&mut self, log: &FoundLog) {
        for (lsn, record) in
            log.blocks.values().flat_map(|block| block.records.iter().map(|record| (block.lsn, record)))
        {
            let applied = &self.applied;
            let wants =
                |kind: PageKind, slot: SlotIndex| lsn > applied[kind as usize][page_of(slot) as usize];
            let kind = if record.is_masks() { PageKind::Masks } else { PageKind::Assignments };
            let slots = record.slots();
            let pages = page_of(SlotIndex(slots.start))..=page_of(SlotIndex(slots.end - 1));
            self.replayed += usize::from(slots.clone().any(|slot| wants(kind, SlotIndex(slot))));
            self.table.apply_where(record, wants);
            // Also where the page has it already: one copy may, the other not.
            self.changed.extend(pages.map(|index| (kind, index)));
            if self.lost.is_empty() {
                continue;
            }
            match record {
                Record::Masks { slot, .. } => {
                    self.masks_known.insert(slot.0);
                }
                Record::Assign { slot, .. } | Record::Free { slot, .. } => {
                    self.assignments_known.insert(slot.0);
                }
                Record::EpochRange { .. } => (),
            }
        }
    }

    /// Slots about which nothing of this kind is known: those of a lost page that the log does not mention.
    pub(super) fn unknown(&self, page: LostPage, slots: u32) -> Vec<SlotIndex> {
        let (kind, index) = page;
        let known = match kind {
            PageKind::Assignments => &self.assignments_known,
            PageKind::Masks => &self.masks_known,
        };
        page::page_slots(index, slots).filter(|slot| !known.contains(slot)).map(SlotIndex).collect()
    }

    /// The header of a page rewritten by recovery.
    pub(super) fn repaired_header(
        &self,
        page: LostPage,
        applied_lsn: u64,
        attach_generation: u64,
    ) -> PageHeader {
        let (kind, index) = page;
        PageHeader { kind, index, sequence: self.sequence + 1, applied_lsn, attach_generation }
    }
}
