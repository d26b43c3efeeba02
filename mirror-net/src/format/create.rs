//! Formatting a disk.

use super::block::{BLOCK, BLOCK_BYTES, Block, align_down};
use super::geometry::{Geometry, GeometryError, SUPERBLOCK_FROM_END};
use super::log::{self, LogBlock};
use super::page::{self, PageHeader, PageKind};
use super::plan::{Plan, PlanStep, write_run};
use super::superblock::{DiskState, Features, NAME_BYTES_MAX, SlotOrder, Superblock, ZoneProfile};
use crate::ids::{ClusterId, DiskId, NodeId};
use crate::map::SegmentSlots;
use crate::region::masks::RegionMasks;
use uuid::Uuid;

/// The log sequence number of the block that formatting writes: an empty one, which is its own tail.
pub(super) const FIRST_LSN: u64 = 1;

/// What has to be known to format a disk.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// The cluster it will belong to.
    pub cluster: ClusterId,
    /// Its id there.
    pub disk: DiskId,
    /// The node it is given to.
    pub node: NodeId,
    /// Drawn at random by the caller.
    pub format: Uuid,
    /// The node's name, for messages; at most [`NAME_BYTES_MAX`] bytes.
    pub node_name: String,
    /// The disk's name, likewise.
    pub disk_name: String,
    /// Where everything will lie.
    pub geometry: Geometry,
    /// How large the segments are.
    pub segments: SegmentSlots,
    /// How slots are given to segments.
    pub slot_order: SlotOrder,
    /// How fast the disk is where; all zero if it was not measured.
    pub zone_profile: ZoneProfile,
    /// Whether the data area is known to read as zeros (a fresh sparse file, a disk discarded with
    /// guaranteed zeros). If not, a slot's regions are zeroed before their first partial write.
    pub known_zero: bool,
}

/// Why a disk cannot be formatted so.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FormatError {
    /// A name does not fit.
    #[error("name `{0}` is longer than {NAME_BYTES_MAX} bytes or contains a zero byte: choose another one")]
    Name(String),
    /// The segments are not what the disk holds.
    #[error("the segments need {wanted} slots, the disk has {slots}: divide the disk's slots anew")]
    Segments {
        /// Slots of all segments together.
        wanted: u64,
        /// Slots of the disk.
        slots: u32,
    },
    /// The layout is not possible.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
}

/// Plans the writes that format a disk, and says what the superblock will be when all are done.
///
/// The state is `formatting` in both superblocks before anything else is touched, and becomes `ok` only
/// when every area is flushed. Blocks 0 and those behind the second superblock are zeroed, so that no tool
/// takes the disk for what it was before.
pub fn format(options: FormatOptions) -> Result<(Superblock, Plan), FormatError> {
    for name in [&options.node_name, &options.disk_name] {
        if name.len() > NAME_BYTES_MAX || name.contains('\0') {
            return Err(FormatError::Name(name.clone()));
        }
    }
    options.geometry.validate()?;
    let (segments, slots) = (options.segments, options.geometry.slots);
    if segments.total() != u64::from(slots) {
        return Err(FormatError::Segments { wanted: segments.total(), slots });
    }
    let formatting = Superblock {
        cluster: options.cluster,
        disk: options.disk,
        node: options.node,
        format: options.format,
        node_name: options.node_name,
        disk_name: options.disk_name,
        geometry: options.geometry,
        segments,
        slot_order: options.slot_order,
        zone_profile: options.zone_profile,
        state: DiskState::Formatting,
        attach_generation: 0,
        mask_losses: 0,
        features: Features::default(),
        sequence: 1,
    };
    let done = Superblock { state: DiskState::Ok, ..formatting.next() };
    let masks = if options.known_zero { RegionMasks::ZEROED } else { RegionMasks::default() };
    let plan = formatting
        .write_plan()
        .then(wipe_plan(&done.geometry))
        .then(log_plan(&done, FIRST_LSN))
        .then(pages_plan(&done, masks))
        .then(Plan::new(std::iter::once(PlanStep::Flush)))
        .then(done.write_plan());
    Ok((done, plan))
}

/// Zeros what stands before the first and behind the second superblock.
fn wipe_plan(geometry: &Geometry) -> Plan {
    let behind = geometry.superblocks[1] + BLOCK;
    let count = (align_down(geometry.disk_bytes, BLOCK) - behind) / BLOCK;
    debug_assert!(count < SUPERBLOCK_FROM_END / BLOCK);
    let blank = |_| Block([0; BLOCK_BYTES]);
    Plan::new(write_run(0, 1, blank).chain(write_run(behind, count as usize, blank)))
}

/// Overwrites the whole log: zeros, and one empty block with this sequence number that is its own tail.
/// A place that was never written is thereby told from a damaged one.
pub(super) fn log_plan(superblock: &Superblock, lsn: u64) -> Plan {
    let geometry = &superblock.geometry;
    let log_blocks = geometry.log_blocks();
    let only = LogBlock {
        lsn,
        tail_lsn: lsn,
        attach_generation: superblock.attach_generation,
        records: Vec::new(),
        previous: None,
    };
    let only = log::encode(&only, superblock.format_tag());
    let place = (lsn % log_blocks) as usize;
    let block = move |i| if i == place { (*only).clone() } else { Block([0; BLOCK_BYTES]) };
    Plan::new(write_run(geometry.log.offset, log_blocks as usize, block))
}

/// Both copies of all pages, with every slot free.
fn pages_plan(superblock: &Superblock, masks: RegionMasks) -> Plan {
    let mut plan = Plan::new(std::iter::empty());
    for copy in 0..2 {
        for kind in PageKind::ALL {
            let format_tag = superblock.format_tag();
            let slots = superblock.geometry.slots;
            let block = move |index: usize| {
                let header = PageHeader {
                    kind,
                    index: index as u32,
                    sequence: 1,
                    applied_lsn: FIRST_LSN,
                    attach_generation: 0,
                };
                page::encode_free(&header, format_tag, slots, masks)
            };
            let offset = superblock.geometry.page_offset(kind, 0, copy);
            plan = plan.then(Plan::new(write_run(offset, superblock.geometry.pages() as usize, block)));
        }
    }
    plan
}
