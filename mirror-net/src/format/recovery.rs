//! Opening a disk: what is true after a crash, and what has to be written before it is used.
//!
//! Never assumes a clean end. What cannot be known is taken for lost: such a copy is stale and all
//! its regions are dirty, so that it is copied whole.

use super::block::BlockFault;
use super::create::log_plan;
use super::geometry::Geometry;
use super::journal::{Journal, JournalStart};
use super::log::{self, LogBlock};
use super::page::{self, PageHeader, PageKind};
use super::plan::{Plan, PlanStep, write_run};
use super::scan::{FoundLog, FoundSuperblocks, FoundTables, MaskLoss, PageFault, Read};
use super::superblock::{COMPAT_KNOWN, DiskState, INCOMPAT_KNOWN, RO_COMPAT_KNOWN, Superblock};
use super::table::{SlotState, Table};
use crate::ids::SlotIndex;
use crate::region::masks::RegionMasks;
use serde::Serialize;
use std::sync::Arc;

/// How far the generation of a slot whose own was lost is moved past every known one.
const GENERATION_LEAP: u32 = 1 << 20;

/// Why a disk cannot be opened.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OpenError {
    /// Neither superblock is there.
    #[error("this disk was never formatted by ublk-mirror (no superblock at either end)")]
    NotOurs,
    /// One of our superblocks is there, none is intact.
    #[error("both superblocks are damaged: the first {}, the second {}; `mirrorctl disk inspect` shows more", .0[0], .0[1])]
    Damaged([BlockFault; 2]),
    /// Written by a later version of this software.
    #[error("the disk's format has version {0}: a newer ublk-mirror is needed")]
    UnsupportedVersion(u16),
    /// Uses features that this version does not know.
    #[error(
        "the disk uses features unknown to this version (incompat {incompat:#x}, ro_compat {ro_compat:#x}): a newer ublk-mirror is needed"
    )]
    UnsupportedFeatures {
        /// The unknown ones that forbid reading.
        incompat: u64,
        /// The unknown ones that forbid writing.
        ro_compat: u64,
    },
    /// The disk is smaller than when it was formatted.
    #[error(
        "the disk has shrunk from {formatted_bytes} to {disk_bytes} bytes: restore its size, or replace the disk"
    )]
    Shrunk {
        /// Its size when it was formatted.
        formatted_bytes: u64,
        /// Its size now.
        disk_bytes: u64,
    },
    /// Formatting began and was interrupted; nothing was ever stored on it.
    #[error("formatting this disk was interrupted: format it again")]
    FormatInterrupted,
}

/// What was found when a disk was opened, for logs and people.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RecoveryReport {
    /// Superblocks that were damaged or out of date, and will be rewritten: copy and reason (`None`: out of date).
    pub superblocks_rewritten: Vec<(usize, Option<BlockFault>)>,
    /// The disk is larger than when it was formatted; the rest is not used.
    pub grown_bytes: u64,
    /// Damaged copies of pages; the other copy replaces them unless the page is in `pages_lost`.
    pub page_faults: Vec<PageFault>,
    /// Pages of which no copy was intact.
    pub pages_lost: Vec<(PageKind, u32)>,
    /// Slots whose copies are stale now, since their masks or assignment cannot be known.
    pub slots_lost: Vec<SlotIndex>,
    /// The masks of all slots are lost, and why.
    pub mask_lost: Option<MaskLoss>,
    /// The newest block of the log.
    pub newest_lsn: u64,
    /// The oldest that was needed.
    pub tail_lsn: u64,
    /// Records that were newer than their page.
    pub records_replayed: usize,
    /// The last log write was torn by the crash; nothing in it was acknowledged.
    pub torn_log_block: bool,
    /// Damaged log blocks that were rebuilt from what their successors repeat.
    pub log_rebuilt: Vec<u64>,
}

impl RecoveryReport {
    /// Whether something cannot be known any more.
    pub fn is_loss(&self) -> bool {
        self.mask_lost.is_some() || !self.pages_lost.is_empty()
    }
}

/// An opened disk.
#[derive(Debug)]
pub struct Opened {
    /// The superblock after `plan`.
    pub superblock: Superblock,
    /// Ready to use after `plan`.
    pub journal: Journal,
    /// What was found.
    pub report: RecoveryReport,
    /// To be carried out before anything else. At the least a flush: what was read may still be in the
    /// disk's cache, if a daemon died and the machine did not. Interrupted anywhere, opening begins again.
    pub plan: Plan,
}

/// Opens a disk of `disk_bytes`.
///
/// `read` must give what the disk holds now; see [`Read`]. Nothing is written: that is the plan's.
pub fn open(read: &mut Read<'_>, disk_bytes: u64) -> Result<Opened, OpenError> {
    let found = FoundSuperblocks::read(read, disk_bytes);
    let superblock = choose(&found, disk_bytes)?;
    let geometry = superblock.geometry.clone();
    let log = FoundLog::read(read, &geometry, superblock.format_tag());
    let mut tables = FoundTables::read(read, &geometry, superblock.format_tag());
    let loss = judge(&superblock, &log, &tables);
    tables.replay(&log);

    let mut report = RecoveryReport {
        superblocks_rewritten: outdated_superblocks(&found, &superblock),
        grown_bytes: disk_bytes - geometry.disk_bytes,
        page_faults: std::mem::take(&mut tables.faults),
        pages_lost: tables.lost.iter().copied().collect(),
        mask_lost: loss,
        newest_lsn: log.newest_lsn,
        tail_lsn: log.tail_lsn,
        records_replayed: tables.replayed,
        torn_log_block: log.torn,
        log_rebuilt: log.rebuilt.clone(),
        slots_lost: Vec::new(),
    };
    report.slots_lost = forget_unknown(&mut tables, geometry.slots);
    let plan = Plan::new([PlanStep::Flush].into_iter()).then(superblock_repair(&superblock, &report));
    Ok(match loss {
        Some(_) => open_lost(superblock, log, tables, report, plan),
        None => open_whole(superblock, log, tables, report, plan),
    })
}

/// The superblock that counts, if the disk can be used at all.
pub(super) fn choose(found: &FoundSuperblocks, disk_bytes: u64) -> Result<Superblock, OpenError> {
    let faults = found.0.each_ref().map(|copy| copy.content.as_ref().err().copied());
    for fault in faults.iter().flatten() {
        if let BlockFault::Version(version) = fault {
            return Err(OpenError::UnsupportedVersion(*version));
        }
    }
    let Some(superblock) = found.newest() else {
        let faults = faults.map(|fault| fault.expect("neither is intact"));
        let foreign = |fault: &BlockFault| matches!(fault, BlockFault::Blank | BlockFault::Magic);
        let ours = !faults.iter().all(foreign);
        return Err(if ours { OpenError::Damaged(faults) } else { OpenError::NotOurs });
    };
    let incompat = superblock.features.incompat & !INCOMPAT_KNOWN;
    let ro_compat = superblock.features.ro_compat & !RO_COMPAT_KNOWN;
    debug_assert_eq!(COMPAT_KNOWN & INCOMPAT_KNOWN, 0);
    if incompat != 0 || ro_compat != 0 {
        return Err(OpenError::UnsupportedFeatures { incompat, ro_compat });
    }
    let formatted_bytes = superblock.geometry.disk_bytes;
    if formatted_bytes > disk_bytes {
        return Err(OpenError::Shrunk { formatted_bytes, disk_bytes });
    }
    if superblock.state == DiskState::Formatting {
        return Err(OpenError::FormatInterrupted);
    }
    Ok(superblock.clone())
}

/// Whether everything has to be taken for lost.
pub(super) fn judge(superblock: &Superblock, log: &FoundLog, tables: &FoundTables) -> Option<MaskLoss> {
    if superblock.state == DiskState::MaskLost {
        return Some(MaskLoss::Interrupted);
    }
    let page_newer = (tables.applied_lsn_max() > log.newest_lsn)
        .then_some(MaskLoss::LogEndMissing { lsn: log.newest_lsn + 1 });
    log.loss.or(page_newer)
}

fn outdated_superblocks(found: &FoundSuperblocks, newest: &Superblock) -> Vec<(usize, Option<BlockFault>)> {
    let outdated = |(copy, content): (usize, &Result<Superblock, BlockFault>)| match content {
        Ok(superblock) if superblock == newest => None,
        Ok(_) => Some((copy, None)),
        Err(fault) => Some((copy, Some(*fault))),
    };
    found.0.iter().map(|copy| &copy.content).enumerate().filter_map(outdated).collect()
}

/// Rewrites the superblock that is damaged or out of date; the other one stays as it is.
fn superblock_repair(superblock: &Superblock, report: &RecoveryReport) -> Plan {
    let block = superblock.encode();
    let offsets = superblock.geometry.superblocks;
    let copies = report.superblocks_rewritten.clone().into_iter();
    Plan::new(
        copies.flat_map(move |(copy, _)| [PlanStep::block(offsets[copy], block.clone()), PlanStep::Flush]),
    )
}

/// Gives the slots of lost pages, where the log does not tell, the state of one that nothing is known about.
fn forget_unknown(tables: &mut FoundTables, slots: u32) -> Vec<SlotIndex> {
    let generations =
        |table: &Table| (0..slots).map(|slot| table.slot(SlotIndex(slot)).slot_generation).max();
    let generation = match tables.lost.is_empty() {
        true => return Vec::new(),
        false => generations(&tables.table).unwrap_or(0).wrapping_add(GENERATION_LEAP),
    };
    let mut forgotten = Vec::new();
    for page in tables.lost.clone() {
        for slot in tables.unknown(page, slots) {
            match page.0 {
                PageKind::Assignments => {
                    tables.table.free(slot, generation);
                    tables.table.set_masks(slot, RegionMasks::default());
                }
                PageKind::Masks => mark_lost(&mut tables.table, slot),
            }
            forgotten.push(slot);
        }
    }
    forgotten.sort_unstable();
    forgotten.dedup();
    forgotten
}

/// The copy is stale, and all its regions are dirty. A free slot is just not known to be zero.
fn mark_lost(table: &mut Table, slot: SlotIndex) {
    table.mark_stale(slot);
    let assigned = table.slot(slot).assignment.is_some();
    table.set_masks(slot, if assigned { SlotState::LOST_MASKS } else { RegionMasks::default() });
}

/// Everything that was durable is known, but for single lost pages.
fn open_whole(
    superblock: Superblock,
    log: FoundLog,
    mut tables: FoundTables,
    report: RecoveryReport,
    plan: Plan,
) -> Opened {
    let geometry = superblock.geometry.clone();
    let format_tag = superblock.format_tag();
    // The intact copy is not touched, so a crash here leaves it.
    let repairs = std::mem::take(&mut tables.repairs).into_iter();
    let places = geometry.clone();
    let plan = plan
        .then(Plan::new(repairs.map(move |(kind, index, copy, image)| {
            PlanStep::block(places.page_offset(kind, index, copy), image)
        })))
        .then(rebuilt_log_plan(&log, &geometry, format_tag))
        .then(Plan::new([PlanStep::Flush].into_iter()))
        .then(lost_pages_plan(&superblock, &tables, log.newest_lsn));
    let previous = log.blocks.get(&log.newest_lsn).map(|block| block.records.clone()).unwrap_or_default();
    let journal = Journal::resume(JournalStart {
        geometry,
        format_tag,
        attach_generation: superblock.attach_generation,
        table: tables.table,
        newest_lsn: log.newest_lsn,
        tail_lsn: log.tail_lsn,
        previous,
        page_sequence: tables.sequence + 1,
        changed: tables.changed.into_iter().collect(),
    });
    Opened { superblock, journal, report, plan }
}

/// Writes damaged log blocks anew, as their successors repeat them.
fn rebuilt_log_plan(log: &FoundLog, geometry: &Geometry, format_tag: u64) -> Plan {
    let blocks: Vec<(u64, LogBlock)> =
        log.rebuilt.iter().map(|lsn| (geometry.log_offset(*lsn), log.blocks[lsn].clone())).collect();
    Plan::new(
        blocks
            .into_iter()
            .map(move |(offset, block)| PlanStep::block(offset, (*log::encode(&block, format_tag)).clone())),
    )
}

/// Rewrites lost pages, and their counterparts of the other kind, which changed with them.
///
/// The intact one goes first: a crash between must not leave copies in sync whose masks look intact, nor
/// free slots whose masks are those of what they held. The lost one is still lost then, and both are written again.
fn lost_pages_plan(superblock: &Superblock, tables: &FoundTables, newest_lsn: u64) -> Plan {
    let mut steps = Vec::new();
    let mut write = |page: (PageKind, u32)| {
        let header = tables.repaired_header(page, newest_lsn, superblock.attach_generation);
        let image = page::encode(&header, superblock.format_tag(), &tables.table);
        for copy in 0..2 {
            let offset = superblock.geometry.page_offset(page.0, page.1, copy);
            steps.extend([PlanStep::block(offset, image.clone()), PlanStep::Flush]);
        }
    };
    for &(kind, index) in &tables.lost {
        let counterpart = match kind {
            PageKind::Assignments => PageKind::Masks,
            PageKind::Masks => PageKind::Assignments,
        };
        if kind == PageKind::Assignments && tables.lost.contains(&(counterpart, index)) {
            continue; // Both are lost: the masks' turn writes both, the assignments first.
        }
        write((counterpart, index));
        write((kind, index));
    }
    Plan::new(steps.into_iter())
}

/// Nothing can be relied upon: every copy is stale. The superblock says so before the first page is written,
/// and until the last one is; the log begins anew, a whole lap on, where no old block can be taken for a
/// newer one.
fn open_lost(
    superblock: Superblock,
    log: FoundLog,
    mut tables: FoundTables,
    mut report: RecoveryReport,
    plan: Plan,
) -> Opened {
    let geometry = superblock.geometry.clone();
    let format_tag = superblock.format_tag();
    for slot in (0..geometry.slots).map(SlotIndex) {
        mark_lost(&mut tables.table, slot);
    }
    report.slots_lost = (0..geometry.slots).map(SlotIndex).collect();
    let lost = Superblock {
        state: DiskState::MaskLost,
        mask_losses: superblock.mask_losses.saturating_add(1),
        ..superblock.next()
    };
    let done = Superblock { state: DiskState::Ok, ..lost.next() };
    let newest_known = log.newest_lsn.max(tables.applied_lsn_max());
    let first_lsn = newest_known + geometry.log_blocks() + 1;
    let sequence = tables.sequence + 1;
    let plan = plan
        .then(lost.write_plan())
        .then(all_pages_plan(&done, Arc::new(tables.table.clone()), sequence, first_lsn))
        .then(log_plan(&done, first_lsn))
        .then(Plan::new([PlanStep::Flush].into_iter()))
        .then(done.write_plan());
    let journal = Journal::resume(JournalStart {
        geometry,
        format_tag,
        attach_generation: superblock.attach_generation,
        table: tables.table,
        newest_lsn: first_lsn,
        tail_lsn: first_lsn,
        previous: Vec::new(),
        page_sequence: sequence,
        changed: Vec::new(),
    });
    Opened { superblock: done, journal, report, plan }
}

/// Both copies of all pages, with a flush between and behind.
fn all_pages_plan(superblock: &Superblock, table: Arc<Table>, sequence: u64, applied_lsn: u64) -> Plan {
    let mut plan = Plan::new(std::iter::empty());
    for copy in 0..2 {
        for kind in PageKind::ALL {
            let table = Arc::clone(&table);
            let (format_tag, attach_generation) = (superblock.format_tag(), superblock.attach_generation);
            let image = move |index: usize| {
                let index = index as u32;
                let header = PageHeader { kind, index, sequence, applied_lsn, attach_generation };
                page::encode(&header, format_tag, &table)
            };
            let offset = superblock.geometry.page_offset(kind, 0, copy);
            plan = plan.then(Plan::new(write_run(offset, superblock.geometry.pages() as usize, image)));
        }
        plan = plan.then(Plan::new([PlanStep::Flush].into_iter()));
    }
    plan
}
