//! The logical content of a device's copy, read from a disk that nobody uses.

use anyhow::Context;
use mirror_net::format::{ReadFailed, open};
use mirror_net::ids::{DeviceId, SliceIndex, SlotIndex};
use mirror_net::region::masks::REGIONS_PER_SLICE;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// For each slice of the device that the disk holds, a digest of what a read would return.
pub fn slices(disk: &Path, device: DeviceId) -> anyhow::Result<BTreeMap<SliceIndex, u64>> {
    let file = File::open(disk).with_context(|| disk.display().to_string())?;
    let bytes = file.metadata()?.len();
    let mut read = |offset, buffer: &mut [u8]| file.read_exact_at(buffer, offset).map_err(|_| ReadFailed);
    let opened = open(&mut read, bytes).with_context(|| disk.display().to_string())?;
    let geometry = &opened.superblock.geometry;
    let region_bytes = (geometry.slice_bytes / REGIONS_PER_SLICE) as usize;
    let zeros = vec![0; region_bytes];
    let mut found = BTreeMap::new();
    for slot in (0..opened.journal.slots()).map(SlotIndex) {
        let state = opened.journal.slot(slot);
        let Some(held) = state.assignment.filter(|held| held.device == device) else { continue };
        let mut digest = 0;
        let mut region = vec![0; region_bytes];
        for index in 0..REGIONS_PER_SLICE {
            let content = if state.masks.readable() >> index & 1 == 1 {
                let at = geometry.slot_offset(slot) + u64::from(index) * region_bytes as u64;
                file.read_exact_at(&mut region, at)?;
                &region
            } else {
                &zeros
            };
            // Most are; and comparing is fast even where nothing is optimised.
            digest = if *content == zeros { digest ^ u64::from(index) } else { crc64(digest, content) };
        }
        found.insert(held.slice, digest);
    }
    Ok(found)
}

/// Good enough to tell two copies apart.
fn crc64(seed: u64, bytes: &[u8]) -> u64 {
    bytes.chunks_exact(8).fold(seed, |hash, word| {
        let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
        (hash ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29)
    })
}
