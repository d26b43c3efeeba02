//! What the users of the devices do: a few requests at a time, over each other, each write unique.
//!
//! Reads, writes, zeroing, discards and flushes, some of them through the cache (FUA), of one sector to
//! several regions, aligned to regions or not, across the border between slices.

use crate::sim::checker::{Stamp, WriteId};
use crate::sim::disk::SECTOR;
use crate::sim::node::SLICE;
use crate::sim::scheduler::{Nanos, Random};
use mirror_net::engine::action::{BufferId, RequestKind};
use mirror_net::ids::SliceEpoch;
use mirror_net::region::masks::REGIONS_PER_SLICE;

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
    pub buffer: Option<BufferId>,
    /// When.
    pub began: Nanos,
    /// What it writes.
    pub writes: Vec<WriteId>,
    /// The exporting node, and its process.
    pub exporter: (u16, u64),
    /// The claim's generation that it was exported under; 0 at a former exporter.
    pub claim: u64,
    /// The map version that its exporter acted on when it was asked.
    pub adopted: u64,
    /// The claim's generation in the map that its exporter had adopted then.
    pub adopted_claim: u64,
    /// Of a flush: for each disk of all, the newest write that it covers.
    pub marks: Vec<u64>,
    /// The exporter was its primary when it was asked for, under that epoch.
    pub here: Option<SliceEpoch>,
    /// Another exporter started meanwhile, and its user asks in place of this one.
    pub replaced: bool,
    /// Somebody will look at its result.
    pub wanted: bool,
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

/// Sectors of a region.
const REGION: u64 = (SLICE / REGIONS_PER_SLICE) as u64 / SECTOR as u64;

/// Draws a range, in sectors. A few places are hot, so that requests meet: the first regions, a few in the
/// middle, and those on both sides of the border between slices; or as many others, which lie idle for a
/// while between two visits.
fn range(random: &mut Random, sectors: u64, place: u64) -> (u64, u64) {
    let slice = u64::from(SLICE) / SECTOR as u64;
    let hot = [0, 3 * REGION, slice - 2 * REGION, slice + 5 * REGION][random.below(4) as usize];
    let first = hot + place % PLACES * 8 * REGION + random.below(3 * REGION);
    let (first, count) = match random.below(8) {
        // Whole regions.
        0 => (first / REGION * REGION, (1 + random.below(4)) * REGION),
        // Pieces of two regions with whole ones between them.
        1 => (first | 1, (1 + random.below(3)) * REGION + 1 + random.below(REGION - 2)),
        // Anything, short or long.
        _ => {
            let longest = [1, 8, 32][random.below(3) as usize];
            (first, 1 + random.below(longest))
        }
    };
    let first = first.min(sectors - 1);
    (first, count.min(sectors - first))
}

/// Places that users who wander come to, one after the other.
const PLACES: u64 = 4;

/// Draws a request of users that are at that place.
pub fn wish(random: &mut Random, discards: bool, place: u64) -> Wish {
    let sectors = u64::from(SLICE) * u64::from(SLICES) / SECTOR as u64;
    let (first, count) = range(random, sectors, place);
    let fua = random.one_in(8);
    let kind = match random.below(100) {
        0..=37 => RequestKind::Write { fua },
        38..=77 => RequestKind::Read,
        78..=85 => RequestKind::WriteZeroes { fua },
        86..=91 if discards => RequestKind::Discard,
        _ => return Wish { kind: RequestKind::Flush, offset: 0, length: 0 },
    };
    // What carries no data may be as long as the device.
    let long = matches!(kind, RequestKind::WriteZeroes { .. } | RequestKind::Discard) && random.one_in(150);
    let count = if long { random.range(count, sectors - first + 1) } else { count };
    Wish { kind, offset: first * SECTOR as u64, length: (count * SECTOR as u64) as u32 }
}

/// The content of sectors with that stamp.
pub fn fill(stamp: Stamp, length: u32) -> Vec<u8> {
    stamp.to_le_bytes().repeat(length as usize / 8)
}

/// The stamp of a sector; `None` if it is not one sector's worth of the same.
pub fn stamp(sector: &[u8]) -> Option<Stamp> {
    let first = Stamp::from_le_bytes(sector[..8].try_into().ok()?);
    (sector[8..] == sector[..sector.len() - 8]).then_some(first)
}
