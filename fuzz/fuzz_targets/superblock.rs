//! A superblock with anything in it: read as what it says, or refused.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mirror_net::format::alloc::{Allocator, Segment};
use mirror_net::format::{BLOCK_BYTES, Block, Superblock};
use ublk_mirror_fuzz::choices::Choices;
use ublk_mirror_fuzz::image;

/// Slots of which a division is computed here; a real disk's take seconds under a fuzzer.
const SLOTS_MAX: u32 = 1 << 12;

fuzz_target!(|input: &[u8]| {
    let mut choices = Choices::new(input);
    let seal = choices.byte() & 1 == 1;
    let mut block = Block([0; BLOCK_BYTES]);
    block.0.copy_from_slice(&image::base().superblock.encode().0);
    while !choices.is_empty() {
        let at = usize::from(choices.word()) % BLOCK_BYTES;
        let count = usize::from(choices.byte());
        let bytes = choices.bytes(count.min(BLOCK_BYTES - at));
        block.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
    if seal {
        block.seal();
    }
    let [first, second] = image::base().superblock.geometry.superblocks;
    for offset in [first, second, 0, u64::MAX] {
        let Ok(found) = Superblock::decode(&block, offset) else { continue };
        let again = Superblock::decode(&found.encode(), offset);
        assert_eq!(again, Ok(found.clone()), "written anew it is another one");
        let geometry = &found.geometry;
        assert_eq!(geometry.validate(), Ok(()));
        assert_eq!(found.segments.total(), u64::from(geometry.slots));
        let areas = geometry.areas();
        for (index, (name, area)) in areas.iter().enumerate() {
            assert!(area.end() <= geometry.disk_bytes, "{name} is beyond the end");
            for (other, _) in areas[..index].iter().filter(|(_, other)| other.overlaps(area)) {
                panic!("{name} overlaps {other}");
            }
        }
        if geometry.slots <= SLOTS_MAX {
            let mut allocator = Allocator::new(&found, []);
            let free: u32 = Segment::ALL.iter().map(|segment| allocator.free_slots(*segment)).sum();
            assert_eq!(free, geometry.slots);
            for segment in Segment::ALL {
                if let Some(slot) = allocator.allocate(segment) {
                    assert_eq!(allocator.segment_of(slot), segment);
                }
            }
        }
    }
});
