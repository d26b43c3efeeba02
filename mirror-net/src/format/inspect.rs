//! Describing a disk to people: what is on it, and what of that is damaged.
//!
//! Reads as opening does, but gives up nowhere: whatever is intact is shown.

use super::alloc::{Allocator, Segment};
use super::block::BlockFault;
use super::geometry::Geometry;
use super::page::PageKind;
use super::recovery::choose;
use super::scan::{FoundLog, FoundSuperblocks, FoundTables, MaskLoss, PageFault, Read};
use super::superblock::Superblock;
use super::table::{CopyState, Role};
use crate::ids::{DeviceId, LossGeneration, SliceEpoch, SliceIndex, SlotIndex};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// What `mirrorctl disk inspect` shows; [`fmt::Display`] is the form for people.
#[derive(Debug, Serialize)]
pub struct DiskReport {
    /// The size of the disk now.
    pub disk_bytes: u64,
    /// Why the daemon would refuse the disk; `None` if it would open it.
    pub refused: Option<String>,
    /// Both superblocks.
    pub superblocks: Vec<SuperblockReport>,
    /// The areas of the disk, if a superblock tells them.
    pub areas: Vec<AreaReport>,
    /// The log, likewise.
    pub log: Option<LogReport>,
    /// The slot table's pages, likewise.
    pub pages: Option<PagesReport>,
    /// What the slots hold, log included, likewise.
    pub slots: Option<SlotsReport>,
}

/// One superblock.
#[derive(Debug, Serialize)]
pub struct SuperblockReport {
    /// Where it was looked for.
    pub offset: u64,
    /// What is wrong with it.
    pub fault: Option<BlockFault>,
    /// What it says, if it is intact.
    pub content: Option<Superblock>,
}

/// One area of the disk.
#[derive(Debug, Serialize)]
pub struct AreaReport {
    /// What it is for.
    pub name: &'static str,
    /// Its first byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// The log.
#[derive(Debug, Serialize)]
pub struct LogReport {
    /// How many blocks it has room for.
    pub blocks: u64,
    /// The oldest block that recovery needs.
    pub tail_lsn: u64,
    /// The newest intact block.
    pub newest_lsn: u64,
    /// Records in the blocks that recovery needs.
    pub records: usize,
    /// Of these, how many are newer than their page.
    pub records_replayed: usize,
    /// The last write was torn.
    pub torn: bool,
    /// Blocks that could be rebuilt from their successors.
    pub rebuilt: Vec<u64>,
    /// Damaged blocks, needed or not: place in the log and fault.
    pub faults: Vec<(u64, BlockFault)>,
    /// Why all masks are lost.
    pub mask_lost: Option<MaskLoss>,
}

/// The pages of the slot table.
#[derive(Debug, Serialize)]
pub struct PagesReport {
    /// Pages of each kind; there are two copies of each.
    pub pages: u32,
    /// Damaged copies.
    pub faults: Vec<PageFault>,
    /// Pages without an intact copy.
    pub lost: Vec<(PageKind, u32)>,
}

/// What the slots hold.
#[derive(Debug, Default, Serialize)]
pub struct SlotsReport {
    /// All slots.
    pub total: u32,
    /// Slots that hold a slice.
    pub used: u32,
    /// Used and all slots of each segment.
    pub segments: Vec<(Segment, u32, u32)>,
    /// Slots of each device.
    pub devices: BTreeMap<DeviceId, u32>,
    /// Copies that are stale or syncing.
    pub not_in_sync: u32,
    /// Slots with dirty regions.
    pub dirty_slots: u32,
    /// Dirty regions.
    pub dirty_regions: u64,
    /// Regions that hold data.
    pub readable_regions: u64,
    /// Every slot that holds a slice, if asked for.
    pub list: Vec<SlotReport>,
}

/// One slot that holds a slice.
#[derive(Debug, Serialize)]
#[allow(missing_docs)] // The same as in `Assignment` and `RegionMasks`, flat.
pub struct SlotReport {
    pub slot: SlotIndex,
    pub device: DeviceId,
    pub slice: SliceIndex,
    pub role: Role,
    pub state: CopyState,
    pub epoch: SliceEpoch,
    pub loss: LossGeneration,
    pub slot_generation: u32,
    pub dirty: u64,
    pub valid: u64,
    pub zero: u64,
}

/// Looks at a disk. `list` asks for every used slot, which on a large disk are many.
pub fn inspect(read: &mut Read<'_>, disk_bytes: u64, list: bool) -> DiskReport {
    let found = FoundSuperblocks::read(read, disk_bytes);
    let superblocks = found.0.iter().map(|copy| SuperblockReport {
        offset: copy.offset,
        fault: copy.content.as_ref().err().copied(),
        content: copy.content.as_ref().ok().cloned(),
    });
    let mut report = DiskReport {
        disk_bytes,
        refused: choose(&found, disk_bytes).err().map(|error| error.to_string()),
        superblocks: superblocks.collect(),
        areas: Vec::new(),
        log: None,
        pages: None,
        slots: None,
    };
    // A refused disk is looked into as well, as far as its layout can be understood.
    if let Some(superblock) = found.newest() {
        look_into(read, superblock, &mut report, list);
    }
    report
}

fn look_into(read: &mut Read<'_>, superblock: &Superblock, report: &mut DiskReport, list: bool) {
    let geometry = &superblock.geometry;
    report.areas = area_reports(geometry);
    let log = FoundLog::read(read, geometry, superblock.format_tag());
    let mut tables = FoundTables::read(read, geometry, superblock.format_tag());
    tables.replay(&log);
    report.log = Some(LogReport {
        blocks: geometry.log_blocks(),
        tail_lsn: log.tail_lsn,
        newest_lsn: log.newest_lsn,
        records: log.blocks.values().map(|block| block.records.len()).sum(),
        records_replayed: tables.replayed,
        torn: log.torn,
        mask_lost: super::recovery::judge(superblock, &log, &tables),
        rebuilt: log.rebuilt,
        faults: log.faults,
    });
    report.pages = Some(PagesReport {
        pages: geometry.pages(),
        faults: tables.faults.clone(),
        lost: tables.lost.iter().copied().collect(),
    });
    report.slots = Some(slots_report(superblock, &tables, list));
}

fn area_reports(geometry: &Geometry) -> Vec<AreaReport> {
    let mut areas = geometry.areas();
    areas.sort_by_key(|(_, area)| area.offset);
    areas.map(|(name, area)| AreaReport { name, offset: area.offset, length: area.length }).into()
}

fn slots_report(superblock: &Superblock, tables: &FoundTables, list: bool) -> SlotsReport {
    let total = superblock.geometry.slots;
    let mut report = SlotsReport { total, ..SlotsReport::default() };
    let allocator = Allocator::new(superblock, []);
    let mut used = BTreeMap::new();
    for slot in (0..total).map(SlotIndex) {
        let state = tables.table.slot(slot);
        report.dirty_slots += u32::from(state.masks.dirty != 0);
        report.dirty_regions += u64::from(state.masks.dirty.count_ones());
        let Some(assignment) = state.assignment else { continue };
        report.used += 1;
        report.readable_regions += u64::from(state.masks.readable().count_ones());
        report.not_in_sync += u32::from(assignment.state != CopyState::InSync);
        *report.devices.entry(assignment.device).or_default() += 1;
        *used.entry(allocator.segment_of(slot) as usize).or_default() += 1;
        if list {
            report.list.push(SlotReport {
                slot,
                device: assignment.device,
                slice: assignment.slice,
                role: assignment.role,
                state: assignment.state,
                epoch: assignment.epoch,
                loss: assignment.loss,
                slot_generation: assignment.slot_generation,
                dirty: state.masks.dirty,
                valid: state.masks.valid,
                zero: state.masks.zero,
            });
        }
    }
    let size = |segment| allocator.order(segment).len() as u32;
    report.segments = Segment::ALL
        .map(|segment| (segment, used.get(&(segment as usize)).copied().unwrap_or(0), size(segment)))
        .into();
    report
}

impl DiskReport {
    /// Whether anything at all is wrong.
    pub fn is_damaged(&self) -> bool {
        self.superblocks.iter().any(|copy| copy.fault.is_some())
            || self.pages.as_ref().is_some_and(|pages| !pages.faults.is_empty())
            || self.log.as_ref().is_some_and(|log| log.mask_lost.is_some() || !log.rebuilt.is_empty())
    }
}

impl fmt::Display for DiskReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "disk of {}", Bytes(self.disk_bytes))?;
        match &self.refused {
            Some(reason) => writeln!(f, "would be refused: {reason}")?,
            None if self.is_damaged() => writeln!(f, "can be opened, with damage (see below)")?,
            None => writeln!(f, "can be opened")?,
        }
        for (copy, superblock) in self.superblocks.iter().enumerate() {
            write!(f, "superblock {copy} at {}: ", superblock.offset)?;
            match (&superblock.fault, &superblock.content) {
                (Some(fault), _) => writeln!(f, "DAMAGED: it {fault}")?,
                (None, Some(content)) => writeln!(f, "intact, sequence {}", content.sequence)?,
                (None, None) => writeln!(f, "unknown")?,
            }
        }
        let newest =
            self.superblocks.iter().filter_map(|copy| copy.content.as_ref()).max_by_key(|it| it.sequence);
        if let Some(superblock) = newest {
            fmt_superblock(f, superblock)?;
        }
        for area in &self.areas {
            writeln!(f, "area {:<13} {:>16} {}", area.name, area.offset, Bytes(area.length))?;
        }
        self.log.as_ref().map_or(Ok(()), |log| log.fmt(f))?;
        self.pages.as_ref().map_or(Ok(()), |pages| pages.fmt(f))?;
        self.slots.as_ref().map_or(Ok(()), |slots| slots.fmt(f))
    }
}

fn fmt_superblock(f: &mut fmt::Formatter<'_>, superblock: &Superblock) -> fmt::Result {
    let Superblock { cluster, disk, node, format, node_name, disk_name, .. } = superblock;
    writeln!(f, "cluster {cluster}")?;
    writeln!(f, "{disk} `{disk_name}` of {node} `{node_name}`, format {format}")?;
    writeln!(
        f,
        "state {:?}, attach generation {}, masks lost {} times since the format",
        superblock.state, superblock.attach_generation, superblock.mask_losses
    )?;
    let geometry = &superblock.geometry;
    writeln!(
        f,
        "{} slots of {}, blocks of {}, {} when formatted",
        geometry.slots,
        Bytes(geometry.slice_bytes.into()),
        Bytes(geometry.block_bytes.into()),
        Bytes(geometry.disk_bytes)
    )?;
    let rates = &superblock.zone_profile.0;
    match rates.iter().max() {
        Some(0) | None => writeln!(f, "zone profile not measured"),
        Some(fastest) => writeln!(f, "zone profile {} to {fastest} MB/s", rates.iter().min().unwrap_or(&0)),
    }
}

impl fmt::Display for LogReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tail_lsn, newest_lsn, records, records_replayed, .. } = self;
        writeln!(
            f,
            "log of {} blocks: {tail_lsn} to {newest_lsn} needed, {records} records, {records_replayed} newer than their page",
            self.blocks
        )?;
        if self.torn {
            writeln!(f, "log block {} was torn by a crash; nothing in it was acknowledged", newest_lsn + 1)?;
        }
        for (place, fault) in &self.faults {
            writeln!(f, "log place {place} DAMAGED: it {fault}")?;
        }
        for lsn in &self.rebuilt {
            writeln!(f, "log block {lsn} can be rebuilt from its successor")?;
        }
        match self.mask_lost {
            Some(loss) => writeln!(f, "ALL MASKS LOST: {loss}; every copy on this disk is stale"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for PagesReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} pages of assignments and as many of masks, two copies of each", self.pages)?;
        for PageFault { kind, index, copy, fault } in &self.faults {
            writeln!(f, "copy {copy} of {kind:?} page {index} DAMAGED: it {fault}")?;
        }
        for (kind, index) in &self.lost {
            writeln!(f, "{kind:?} page {index} LOST: neither copy is intact")?;
        }
        Ok(())
    }
}

impl fmt::Display for SlotsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} of {} slots hold a slice, {} not in sync", self.used, self.total, self.not_in_sync)?;
        for (segment, used, size) in &self.segments {
            writeln!(f, "segment {segment:?}: {used} of {size} slots")?;
        }
        for (device, slots) in &self.devices {
            writeln!(f, "{device}: {slots} slots")?;
        }
        writeln!(
            f,
            "{} regions dirty in {} slots, {} hold data",
            self.dirty_regions, self.dirty_slots, self.readable_regions
        )?;
        for slot in &self.list {
            writeln!(
                f,
                "{} {} {} {:?} {:?} {} {} generation {} dirty {:016x} valid {:016x} zero {:016x}",
                slot.slot,
                slot.device,
                slot.slice,
                slot.role,
                slot.state,
                slot.epoch,
                slot.loss,
                slot.slot_generation,
                slot.dirty,
                slot.valid,
                slot.zero
            )?;
        }
        Ok(())
    }
}

/// A size for people: exact where a binary unit divides it, rounded to a tenth otherwise.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        match units.iter().find(|(_, shift)| self.0 >> shift != 0) {
            Some((unit, shift)) if self.0.is_multiple_of(1 << shift) => {
                write!(f, "{} {unit}", self.0 >> shift)
            }
            Some((unit, shift)) => write!(f, "{:.1} {unit}", self.0 as f64 / (1u64 << shift) as f64),
            None => write!(f, "{} bytes", self.0),
        }
    }
}
