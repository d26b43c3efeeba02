//! How fast a disk is where: the zone profile that decides which slots go to which segment.

use super::Candidate;
use crate::ring::buffers::AlignedBlock;
use mirror_net::format::ZoneProfile;
use mirror_net::format::superblock::ZONE_POINTS;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Bytes read at every point.
const PIECE_BYTES: usize = 256 << 10;
/// The measurement takes no longer than this; what was not measured by then counts as equal.
const TIME_MAX: Duration = Duration::from_secs(5);

/// Reads a piece at every point of the disk and takes the time. All zeros if the disk is in memory or
/// too small to have zones.
pub fn measure(disk: &Candidate) -> ZoneProfile {
    let mut profile = ZoneProfile::default();
    let step = disk.bytes / ZONE_POINTS as u64;
    if disk.in_memory || step < 4 * PIECE_BYTES as u64 {
        return profile;
    }
    let mut block = AlignedBlock::new(PIECE_BYTES);
    let begun = Instant::now();
    for (point, rate) in profile.0.iter_mut().enumerate() {
        let at = point as u64 * step / 4096 * 4096;
        // The first read moves the head there, the second is timed.
        let first = disk.file().read_exact_at(&mut block[..4096], at);
        let start = Instant::now();
        let second = disk.file().read_exact_at(&mut block, at);
        if first.is_err() || second.is_err() || begun.elapsed() > TIME_MAX {
            return ZoneProfile::default();
        }
        let micros = start.elapsed().as_micros().max(1) as u64;
        *rate = (PIECE_BYTES as u64 / micros).min(u64::from(u32::MAX)) as u32;
    }
    profile
}
