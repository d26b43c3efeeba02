//! What the users of the devices do: a few requests at a time, over each other, each write unique.

use crate::sim::checker::{Stamp, WriteId};
use crate::sim::disk::SECTOR;
use crate::sim::node::SLICE;
use crate::sim::scheduler::{Nanos, Random};
use mirror_net::engine::action::RequestKind;

/// Slices of a device.
pub const SLICES: u32 = 2;

/// A request that a user waits for.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Index of the device.
    pub device: usize,
    /// What.
    pub kind: RequestKind,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
    /// Its buffer.
    pub buffer: Option<u32>,
    /// When.
    pub began: Nanos,
    /// What it writes.
    pub writes: Vec<WriteId>,
    /// The exporting node, and its process.
    pub exporter: (u16, u64),
    /// The claim's generation that it was exported under; 0 at a former exporter.
    pub claim: u64,
    /// Another exporter started meanwhile, and its user asks in place of this one.
    pub replaced: bool,
}

/// What to ask next.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// What.
    pub kind: RequestKind,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

/// Draws a request. A few places are hot, so that requests meet.
pub fn wish(random: &mut Random, discards: bool) -> Wish {
    let hot =
        [0u64, 3 * 4096, u64::from(SLICE) - 8192, u64::from(SLICE) + 4096 * 5][random.below(4) as usize];
    let sectors = u64::from(SLICE) * u64::from(SLICES) / SECTOR as u64;
    let first = (hot / SECTOR as u64 + random.below(24)).min(sectors - 1);
    let longest = [1, 8, 32][random.below(3) as usize];
    let count = (1 + random.below(longest)).min(sectors - first);
    let (offset, length) = (first * SECTOR as u64, count as u32 * SECTOR as u32);
    let fua = random.one_in(8);
    let kind = match random.below(100) {
        0..=39 => RequestKind::Write { fua },
        40..=79 => RequestKind::Read,
        80..=87 => RequestKind::WriteZeroes { fua },
        88..=91 if discards => RequestKind::Discard,
        _ => return Wish { kind: RequestKind::Flush, offset: 0, length: 0 },
    };
    Wish { kind, offset, length }
}

/// The content of sectors with that stamp.
pub fn fill(stamp: Stamp, length: u32) -> Vec<u8> {
    stamp.to_le_bytes().repeat(length as usize / 8)
}

/// The stamp of a sector; `None` if it is not one sector's worth of the same.
pub fn stamp(sector: &[u8]) -> Option<Stamp> {
    let first = Stamp::from_le_bytes(sector[..8].try_into().ok()?);
    sector.chunks_exact(8).all(|word| word == &sector[..8]).then_some(first)
}
