//! Where the areas of a disk lie.

use super::block::{BLOCK, align_down, align_up};
use super::page::{ENTRIES_PER_PAGE, PageKind};
use crate::ids::SlotIndex;
use crate::region::masks::REGIONS_PER_SLICE;
use serde::Serialize;

/// The first superblock, in bytes. Block 0 stays free of ours: boot loaders and partition tables
/// live there, and overwriting it by mistake must not cost us anything.
pub const SUPERBLOCK_OFFSET: u64 = BLOCK;
/// The second superblock lies this far before the end of the disk (rounded down to 4 KiB), out of reach
/// of what tools write at a disk's very end (backup partition tables, RAID metadata).
pub const SUPERBLOCK_FROM_END: u64 = 64 << 10;
/// The areas begin here.
const FRONT: u64 = 64 << 10;
/// Data slots begin at a multiple of this, so that regions keep the alignment of flash and RAID stripes.
const DATA_ALIGNMENT: u64 = 1 << 20;
/// Disks from this size on have the larger log.
const LARGE_DISK: u64 = 16 << 30;

/// The smallest slice: 64 regions of one 4 KiB block.
pub const SLICE_BYTES_MIN: u32 = REGIONS_PER_SLICE * BLOCK as u32;
/// The largest slice, so that offsets in a slice fit a `u32` with room to spare.
pub const SLICE_BYTES_MAX: u32 = 1 << 30;
/// The fewest blocks of a log: one to write, one for the new tail, and two to make progress.
pub const LOG_BLOCKS_MIN: u32 = 4;
/// The most slots of a disk (1 PiB at 64 MiB a slice): bounds the tables in memory.
pub const SLOTS_MAX: u32 = 1 << 24;

/// A range of bytes of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Area {
    /// The first byte, a multiple of 4 KiB.
    pub offset: u64,
    /// Bytes, a multiple of 4 KiB.
    pub length: u64,
}

impl Area {
    /// The byte after the last.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// The number of metadata blocks in it.
    pub fn blocks(&self) -> u64 {
        self.length / BLOCK
    }

    /// Whether any byte is in both.
    pub fn overlaps(&self, other: &Area) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }
}

/// Why a disk cannot be laid out, or why a superblock's layout is impossible.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GeometryError {
    /// Not a power of two, or out of range.
    #[error("slice size {0} must be a power of two from 256 KiB to 1 GiB")]
    SliceSize(u32),
    /// Neither 512 nor 4096.
    #[error("block size {0} must be 512 or 4096")]
    BlockSize(u32),
    /// Less than [`LOG_BLOCKS_MIN`].
    #[error("a log of {0} blocks is too small: at least 4")]
    LogSize(u32),
    /// No room for a single slot.
    #[error("disk of {disk_bytes} bytes is too small: its tables and one slice need {needed_bytes}")]
    TooSmall {
        /// What there is.
        disk_bytes: u64,
        /// What one slot would need.
        needed_bytes: u64,
    },
    /// More than [`SLOTS_MAX`] slots.
    #[error("disk would have {0} slots, at most 16777216 are possible: use larger slices")]
    TooManySlots(u64),
    /// A superblock's areas overlap, leave the disk or are too short.
    #[error("area `{0}` overlaps another, leaves the disk or is too short")]
    Area(&'static str),
}

/// The layout of one disk: computed once, when it is formatted, and kept in its superblock.
///
/// ```text
/// 0      4 KiB       64 KiB                           1 MiB aligned              end - 64 KiB
/// |------|superblock |log|assignments 0|masks 0|......|slot|slot|..|fine|assign. 1|masks 1|superblock|
/// ```
///
/// The second copies lie at the other end of the disk, so that a scratch or a misdirected large write
/// never takes both.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Geometry {
    /// Size of the disk when it was formatted.
    pub disk_bytes: u64,
    /// Bytes of a slice, and so of a slot.
    pub slice_bytes: u32,
    /// The disk's logical block size: 512 or 4096.
    pub block_bytes: u32,
    /// The number of data slots.
    pub slots: u32,
    /// Offsets of the two superblocks.
    pub superblocks: [u64; 2],
    /// The circular log.
    pub log: Area,
    /// The two copies of the assignment pages.
    pub assignments: [Area; 2],
    /// The two copies of the mask pages.
    pub masks: [Area; 2],
    /// Reserved for masks of 4 KiB granularity: [`Geometry::fine_bytes_per_slot`] a slot. Not written yet.
    pub fine_masks: Area,
    /// The data slots.
    pub data: Area,
}

impl Geometry {
    /// Lays out a disk of `disk_bytes`, with a log of 1 MiB below 16 GiB and of 16 MiB from there on.
    pub fn new(disk_bytes: u64, slice_bytes: u32, block_bytes: u32) -> Result<Self, GeometryError> {
        let log_bytes: u64 = if disk_bytes < LARGE_DISK { 1 << 20 } else { 16 << 20 };
        Self::with_log_blocks(disk_bytes, slice_bytes, block_bytes, (log_bytes / BLOCK) as u32)
    }

    /// As [`Geometry::new`], with a log of `log_blocks` (4 KiB each): tests want it to wrap often.
    pub fn with_log_blocks(
        disk_bytes: u64,
        slice_bytes: u32,
        block_bytes: u32,
        log_blocks: u32,
    ) -> Result<Self, GeometryError> {
        check_sizes(slice_bytes, block_bytes, log_blocks)?;
        let lay = |slots| Self::lay_out(disk_bytes, slice_bytes, block_bytes, log_blocks, slots);
        let too_small =
            || GeometryError::TooSmall { disk_bytes, needed_bytes: needed_bytes(slice_bytes, log_blocks) };
        let per_slot = u64::from(slice_bytes) + fine_bytes_per_slot(slice_bytes);
        let most = disk_bytes / per_slot;
        if most > u64::from(SLOTS_MAX) {
            return Err(GeometryError::TooManySlots(most));
        }
        // The pages take the room of a few slots: step down from the number without any.
        (1..=most as u32).rev().find_map(lay).ok_or_else(too_small)
    }

    /// The layout with exactly `slots`, if the disk has the room.
    fn lay_out(
        disk_bytes: u64,
        slice_bytes: u32,
        block_bytes: u32,
        log_blocks: u32,
        slots: u32,
    ) -> Option<Self> {
        let pages = u64::from(slots).div_ceil(ENTRIES_PER_PAGE as u64) * BLOCK;
        let last = align_down(disk_bytes, BLOCK).checked_sub(SUPERBLOCK_FROM_END)?;
        let after = |area: Area, length| Area { offset: area.end(), length };
        let before = |end: u64, length: u64| Some(Area { offset: end.checked_sub(length)?, length });

        let log = Area { offset: FRONT, length: u64::from(log_blocks) * BLOCK };
        let front_assignments = after(log, pages);
        let front_masks = after(front_assignments, pages);
        let back_masks = before(last, pages)?;
        let back_assignments = before(back_masks.offset, pages)?;
        let fine_masks =
            before(back_assignments.offset, u64::from(slots) * fine_bytes_per_slot(slice_bytes))?;
        let data = Area {
            offset: align_up(front_masks.end(), DATA_ALIGNMENT),
            length: u64::from(slots) * u64::from(slice_bytes),
        };
        (data.end() <= fine_masks.offset).then_some(Self {
            disk_bytes,
            slice_bytes,
            block_bytes,
            slots,
            superblocks: [SUPERBLOCK_OFFSET, last],
            log,
            assignments: [front_assignments, back_assignments],
            masks: [front_masks, back_masks],
            fine_masks,
            data,
        })
    }

    /// Every area with its name, in no particular order.
    pub fn areas(&self) -> [(&'static str, Area); 9] {
        let superblock = |copy: usize| Area { offset: self.superblocks[copy], length: BLOCK };
        [
            ("superblock 0", superblock(0)),
            ("superblock 1", superblock(1)),
            ("log", self.log),
            ("assignments 0", self.assignments[0]),
            ("assignments 1", self.assignments[1]),
            ("masks 0", self.masks[0]),
            ("masks 1", self.masks[1]),
            ("fine masks", self.fine_masks),
            ("data", self.data),
        ]
    }

    /// Checks a layout that was read from a disk: later versions may lay areas out differently, but
    /// never over one another.
    pub fn validate(&self) -> Result<(), GeometryError> {
        let log_blocks = u32::try_from(self.log.blocks()).map_err(|_| GeometryError::Area("log"))?;
        check_sizes(self.slice_bytes, self.block_bytes, log_blocks)?;
        if self.slots == 0 || self.slots > SLOTS_MAX {
            return Err(GeometryError::TooManySlots(self.slots.into()));
        }
        let areas = self.areas();
        for (i, (name, area)) in areas.iter().enumerate() {
            let end = area.offset.checked_add(area.length).ok_or(GeometryError::Area(name))?;
            let aligned = area.offset % BLOCK == 0 && area.length % BLOCK == 0;
            if !aligned || end > self.disk_bytes || areas[..i].iter().any(|(_, other)| area.overlaps(other)) {
                return Err(GeometryError::Area(name));
            }
        }
        let pages = u64::from(self.pages());
        let short = |area: &Area| area.blocks() < pages;
        if self.assignments.iter().any(short) {
            return Err(GeometryError::Area("assignments"));
        }
        if self.masks.iter().any(short) {
            return Err(GeometryError::Area("masks"));
        }
        if self.data.length < u64::from(self.slots) * u64::from(self.slice_bytes) {
            return Err(GeometryError::Area("data"));
        }
        Ok(())
    }

    /// The number of pages of each kind.
    pub fn pages(&self) -> u32 {
        self.slots.div_ceil(ENTRIES_PER_PAGE as u32)
    }

    /// The number of blocks of the log.
    pub fn log_blocks(&self) -> u64 {
        self.log.blocks()
    }

    /// Byte offset of a slot's data; its length is `slice_bytes`.
    pub fn slot_offset(&self, slot: SlotIndex) -> u64 {
        assert!(slot.0 < self.slots, "{slot} of {}", self.slots);
        self.data.offset + u64::from(slot.0) * u64::from(self.slice_bytes)
    }

    /// Byte offset of the log block that carries this sequence number.
    pub fn log_offset(&self, lsn: u64) -> u64 {
        self.log.offset + lsn % self.log_blocks() * BLOCK
    }

    /// Byte offset of one copy (0 or 1) of a page.
    pub fn page_offset(&self, kind: PageKind, index: u32, copy: usize) -> u64 {
        assert!(index < self.pages());
        let area = match kind {
            PageKind::Assignments => self.assignments[copy],
            PageKind::Masks => self.masks[copy],
        };
        area.offset + u64::from(index) * BLOCK
    }

    /// Bytes reserved for a slot's fine masks: 16 KiB at 64 MiB slices.
    pub fn fine_bytes_per_slot(&self) -> u64 {
        fine_bytes_per_slot(self.slice_bytes)
    }
}

/// Room for eight bits for each 4 KiB of a slice: two copies of three masks and their headers.
fn fine_bytes_per_slot(slice_bytes: u32) -> u64 {
    (u64::from(slice_bytes) / BLOCK).max(BLOCK)
}

/// The size of the smallest disk: one slot, its pages, the log and the superblocks.
fn needed_bytes(slice_bytes: u32, log_blocks: u32) -> u64 {
    let front = FRONT + u64::from(log_blocks) * BLOCK + 2 * BLOCK;
    let back = fine_bytes_per_slot(slice_bytes) + 2 * BLOCK + SUPERBLOCK_FROM_END;
    align_up(front, DATA_ALIGNMENT) + u64::from(slice_bytes) + back
}

fn check_sizes(slice_bytes: u32, block_bytes: u32, log_blocks: u32) -> Result<(), GeometryError> {
    if !slice_bytes.is_power_of_two() || !(SLICE_BYTES_MIN..=SLICE_BYTES_MAX).contains(&slice_bytes) {
        return Err(GeometryError::SliceSize(slice_bytes));
    }
    if block_bytes != 512 && block_bytes != 4096 {
        return Err(GeometryError::BlockSize(block_bytes));
    }
    if log_blocks < LOG_BLOCKS_MIN {
        return Err(GeometryError::LogSize(log_blocks));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    const TB: u64 = 1_000_000_000_000;

    fn check(geometry: &Geometry) {
        geometry.validate().unwrap();
        let areas = geometry.areas();
        for (i, (name, area)) in areas.iter().enumerate() {
            assert!(area.offset >= BLOCK && area.end() <= geometry.disk_bytes, "{name}");
            assert!(areas[..i].iter().all(|(_, other)| !area.overlaps(other)), "{name}");
        }
        let last = SlotIndex(geometry.slots - 1);
        assert_eq!(geometry.slot_offset(last) + u64::from(geometry.slice_bytes), geometry.data.end());
        for kind in PageKind::ALL {
            let last = geometry.page_offset(kind, geometry.pages() - 1, 1);
            assert!(last + BLOCK <= geometry.superblocks[1]);
        }
        // No slot more would fit.
        let log_blocks = geometry.log_blocks() as u32;
        let (slice, block) = (geometry.slice_bytes, geometry.block_bytes);
        assert_eq!(
            Geometry::lay_out(geometry.disk_bytes, slice, block, log_blocks, geometry.slots + 1),
            None
        );
    }

    proptest! {
        #[test]
        fn areas_never_overlap(
            exponent in 20.0..46.6f64,
            slice in 18u32..=30,
            block_bytes in prop_oneof![Just(512), Just(4096)],
            odd in 0u64..8,
        ) {
            let disk_bytes = exponent.exp2() as u64 / 512 * 512 + odd * 512;
            match Geometry::new(disk_bytes, 1 << slice, block_bytes) {
                Ok(geometry) => check(&geometry),
                Err(GeometryError::TooSmall { needed_bytes, .. }) => prop_assert!(disk_bytes < needed_bytes),
                Err(GeometryError::TooManySlots(slots)) => prop_assert!(slots > SLOTS_MAX.into()),
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn the_smallest_disk_is_as_small_as_the_error_says() {
        for slice in [SLICE_BYTES_MIN, 64 << 20, SLICE_BYTES_MAX] {
            let Err(GeometryError::TooSmall { needed_bytes, .. }) = Geometry::new(MIB, slice, 512) else {
                panic!("a disk of 1 MiB is too small")
            };
            check(&Geometry::new(needed_bytes, slice, 512).unwrap());
            assert!(Geometry::new(needed_bytes - 512, slice, 512).is_err());
        }
    }

    #[test]
    fn sizes_are_as_documented() {
        let tables = |geometry: &Geometry| 4 * geometry.assignments[0].length;
        let small = Geometry::new(TB, 64 << 20, 512).unwrap();
        assert_eq!((small.slots, tables(&small)), (14_897, 1_949_696));
        assert_eq!(small.log.length, 16 * MIB);
        let large = Geometry::new(100 * TB, 64 << 20, 4096).unwrap();
        assert_eq!((large.slots, tables(&large)), (1_489_749, 193_724_416));
        assert_eq!(large.fine_bytes_per_slot(), 16 << 10);
        assert_eq!(Geometry::new(8 << 30, 64 << 20, 512).unwrap().log.length, MIB);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert_eq!(Geometry::new(TB, 3 << 20, 512), Err(GeometryError::SliceSize(3 << 20)));
        assert_eq!(Geometry::new(TB, 128 << 10, 512), Err(GeometryError::SliceSize(128 << 10)));
        assert_eq!(Geometry::new(TB, 64 << 20, 1024), Err(GeometryError::BlockSize(1024)));
        assert_eq!(Geometry::with_log_blocks(TB, 64 << 20, 512, 3), Err(GeometryError::LogSize(3)));
        assert!(Geometry::new(0, 64 << 20, 512).is_err());
    }
}
