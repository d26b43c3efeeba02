//! The unit of every metadata write: an aligned 4 KiB block that carries its own checksum.

use serde::Serialize;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a metadata block, on disks of 512-byte and of 4 KiB sectors alike.
pub const BLOCK_BYTES: usize = 4096;

/// [`BLOCK_BYTES`] as an offset.
pub const BLOCK: u64 = BLOCK_BYTES as u64;

/// The highest sequence number of any kind that is believed: far beyond what a disk can live to see, and far
/// enough from the end that counting on never overflows.
pub(super) const SEQUENCE_MAX: u64 = 1 << 60;

/// A metadata block. Aligned as direct I/O wants its buffers, so a driver can write it in place.
#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C, align(4096))]
pub struct Block(pub [u8; BLOCK_BYTES]);

const _: () = assert!(size_of::<Block>() == BLOCK_BYTES && align_of::<Block>() == BLOCK_BYTES);

impl Block {
    /// A block of zeros.
    pub fn zeroed() -> Box<Self> {
        Box::new(Self([0; BLOCK_BYTES]))
    }

    /// Writes the checksum (CRC32C of all other bytes) into the first four bytes.
    pub fn seal(&mut self) {
        let crc = crc32c::crc32c(&self.0[4..]);
        self.0[..4].copy_from_slice(&crc.to_le_bytes());
    }

    /// Whether the checksum in the first four bytes is that of all others.
    pub fn is_sealed(&self) -> bool {
        self.0[..4] == crc32c::crc32c(&self.0[4..]).to_le_bytes()
    }

    /// Whether nothing but zeros stands here. A block of zeros is never sealed.
    pub fn is_blank(&self) -> bool {
        // Opening a disk asks this of the whole log, most of which may never have been written.
        static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
        self.0 == ZEROS
    }
}

/// Why a block on a disk is not what should stand at its place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum BlockFault {
    /// The disk returned an error.
    #[error("cannot be read")]
    Unreadable,
    /// Nothing but zeros.
    #[error("was never written (all zeros)")]
    Blank,
    /// Not this kind of block.
    #[error("is something else (no magic number)")]
    Magic,
    /// Torn or damaged.
    #[error("has a wrong checksum")]
    Checksum,
    /// Written by a version that we do not know.
    #[error("has the unknown version {0}")]
    Version(u16),
    /// Left over from an earlier format of this disk.
    #[error("belongs to another format of this disk")]
    OtherFormat,
    /// Intact, but it should stand elsewhere.
    #[error("belongs to another place")]
    Misplaced,
    /// Intact, but a field has a value that no version of us writes.
    #[error("has an impossible value in its field `{0}`")]
    Content(&'static str),
}

/// Rounds `value` down to a multiple of `unit`.
pub(super) fn align_down(value: u64, unit: u64) -> u64 {
    value / unit * unit
}

/// Rounds `value` up to a multiple of `unit`.
pub(super) fn align_up(value: u64, unit: u64) -> u64 {
    value.div_ceil(unit) * unit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_notices_every_flipped_bit() {
        let mut block = Block::zeroed();
        for (i, byte) in block.0.iter_mut().enumerate() {
            *byte = (i * 7) as u8;
        }
        block.seal();
        assert!(block.is_sealed());
        for bit in 0..BLOCK_BYTES * 8 {
            block.0[bit / 8] ^= 1 << (bit % 8);
            assert!(!block.is_sealed(), "bit {bit}");
            block.0[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn zeros_are_not_sealed() {
        assert!(Block::zeroed().is_blank());
        assert!(!Block::zeroed().is_sealed());
    }
}
