//! The state of one copy's slice: three masks with a bit a region.

/// Regions in a slice: one bit each in a `u64`.
pub const REGIONS_PER_SLICE: u32 = 64;

/// What one copy knows about the regions of one slice (bit *r* stands for region *r*).
///
/// A region's stored bytes mean something when it is `valid`, or when it was known to be zero and
/// has been written since (`dirty & zero`): the first write into zeroed space then needs one
/// durable bit only. Everything else reads as zeros.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Hash)]
pub struct RegionMasks {
    /// May differ from another copy; set durably before data can reach this copy's disk.
    pub dirty: u64,
    /// Holds data written at some time and cleared (made equal on all copies) since.
    pub valid: u64,
    /// The disk is known to return zeros here, but for what was written since (`dirty`).
    pub zero: u64,
}

impl RegionMasks {
    /// A slot known to be zeroed all over: nothing valid, nothing dirty.
    pub const ZEROED: Self = Self { dirty: 0, valid: 0, zero: u64::MAX };

    /// Regions whose bytes on the disk are the logical content.
    pub fn readable(&self) -> u64 {
        self.valid | (self.dirty & self.zero)
    }

    /// Regions that a partial write may enter without zeroing the rest of them first.
    pub fn writable(&self) -> u64 {
        self.valid | self.zero
    }
}

/// The mask of the regions that `[offset, offset + length)` of a slice touches.
///
/// `region_bytes` is the slice size over [`REGIONS_PER_SLICE`]; an empty range touches none.
pub fn touched(offset: u32, length: u32, region_bytes: u32) -> u64 {
    if length == 0 {
        return 0;
    }
    let first = offset / region_bytes;
    let last = (offset + (length - 1)) / region_bytes;
    debug_assert!(last < REGIONS_PER_SLICE);
    bits(first, last)
}

/// The mask of the regions that `[offset, offset + length)` covers from end to end.
pub fn covered(offset: u32, length: u32, region_bytes: u32) -> u64 {
    let first = offset.div_ceil(region_bytes);
    let end = (u64::from(offset) + u64::from(length)) / u64::from(region_bytes);
    if end <= u64::from(first) {
        return 0;
    }
    bits(first, end as u32 - 1)
}

fn bits(first: u32, last: u32) -> u64 {
    (u64::MAX << first) & (u64::MAX >> (REGIONS_PER_SLICE - 1 - last))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u32 = 1 << 20;

    #[test]
    fn a_range_touches_the_regions_it_overlaps() {
        assert_eq!(touched(0, 0, MIB), 0);
        assert_eq!(touched(0, 1, MIB), 1);
        assert_eq!(touched(MIB - 1, 2, MIB), 0b11);
        assert_eq!(touched(0, 64 * MIB, MIB), u64::MAX);
        assert_eq!(touched(63 * MIB, MIB, MIB), 1 << 63);
    }

    #[test]
    fn a_range_covers_only_whole_regions() {
        assert_eq!(covered(0, MIB - 1, MIB), 0);
        assert_eq!(covered(1, 2 * MIB, MIB), 0b10);
        assert_eq!(covered(0, 64 * MIB, MIB), u64::MAX);
        assert_eq!(covered(5 * MIB, 0, MIB), 0);
    }

    #[test]
    fn written_zeroed_space_is_readable_and_unwritten_is_not() {
        let mut masks = RegionMasks::ZEROED;
        assert_eq!(masks.readable(), 0);
        masks.dirty |= 0b100;
        assert_eq!(masks.readable(), 0b100);
        assert_eq!(RegionMasks { dirty: 1, valid: 0, zero: 0 }.readable(), 0);
    }
}
