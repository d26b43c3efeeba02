//! A disk in use whose metadata is damaged: opening it never panics, never takes for clean what it cannot
//! know, and leaves a disk that opens as the same one.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mirror_net::format::alloc::Allocator;
use mirror_net::format::{Change, CopyState, Opened, SlotState};
use mirror_net::ids::SlotIndex;
use mirror_net::region::masks::RegionMasks;
use ublk_mirror_fuzz::choices::Choices;
use ublk_mirror_fuzz::image::{self, Base, Image};

/// What was done to the disk.
#[derive(Default)]
struct Damage {
    /// All of it shows in checksums or read errors.
    shows: bool,
    newest_log: bool,
    /// An opening took the newest block for torn; its repair may have been cut off since, and what opens
    /// next need not see that any more.
    torn: bool,
    /// The same of masks that an opening gave up.
    lost: bool,
}

fn damage(choices: &mut Choices<'_>, base: &Base, image: &mut Image) -> Damage {
    let mut done = Damage { shows: true, newest_log: false, torn: false, lost: false };
    for _ in 0..choices.below(24) {
        let offset = choices.of(&base.metadata);
        let mut block = image.block(offset);
        match choices.below(5) {
            0 => {
                let bit = usize::from(choices.word()) % (block.len() * 8);
                block[bit / 8] ^= 1 << (bit % 8);
                image.put(offset, block);
            }
            1 => image.spoil(offset),
            2 => {
                // Contents that nobody wrote, under a good checksum.
                let at = usize::from(choices.word()) % block.len();
                let count = usize::from(choices.byte() % 32);
                let bytes = choices.bytes(count.min(block.len() - at));
                block[at..at + bytes.len()].copy_from_slice(bytes);
                image.put(offset, image::sealed(block));
                done.shows = false;
            }
            3 => {
                // A block of another place, as a disk with a confused address would return it.
                image.put(offset, image.block(choices.of(&base.metadata)));
                done.shows = false;
            }
            _ => {
                image.put(offset, [0; 4096]);
                done.shows = false;
            }
        }
        done.newest_log |= offset == base.newest_log;
    }
    done
}

/// Whether what was opened keeps everything that `truth` says of a slot, or gives it up aloud.
fn is_safe(found: &SlotState, truth: &SlotState) -> bool {
    let (Some(copy), Some(was)) = (found.assignment, truth.assignment) else {
        // What was taken for free promises nothing; least of all that it holds zeros.
        return found.assignment.is_none()
            && found.masks.zero & !truth.masks.zero == 0
            && (truth.assignment.is_none() || found.masks.zero == 0);
    };
    let same = (copy.device, copy.slice, copy.epoch) == (was.device, was.slice, was.epoch);
    let dirty = found.masks.dirty & truth.masks.dirty == truth.masks.dirty;
    let stored = found.masks.readable() & truth.masks.readable() == truth.masks.readable();
    same && dirty && stored && (copy.state == was.state || copy.state == CopyState::Stale)
}

/// Given up: whoever serves it copies it anew.
fn copied_whole(found: &SlotState) -> bool {
    let stale = |copy: mirror_net::format::Assignment| copy.state == CopyState::Stale;
    found.masks.zero == 0 && found.assignment.is_none_or(|copy| stale(copy) && found.masks.dirty == u64::MAX)
}

fn judge(opened: &Opened, base: &Base, damage: &mut Damage) {
    damage.torn |= opened.report.torn_log_block;
    damage.lost |= opened.report.mask_lost.is_some();
    let found = image::slots_of(&opened.journal);
    if opened.report.mask_lost.is_some() {
        // Not even the epochs are known then: everything is copied anew.
        let given_up = |found: &SlotState| {
            found.assignment.is_none_or(|copy| copy.state == CopyState::Stale) && found.masks.zero == 0
        };
        assert!(found.iter().all(given_up));
        let whole = |found: &&SlotState| found.assignment.is_some() && found.masks.dirty != u64::MAX;
        assert_eq!(found.iter().find(whole), None, "not copied whole");
        return;
    }
    let kept = |truth: &[SlotState]| found.iter().zip(truth).all(|(found, truth)| is_safe(found, truth));
    // Wrong bytes in exactly the newest log block look like a write that the crash tore.
    let torn = damage.newest_log && damage.torn;
    assert!(
        kept(&base.slots)
            || (torn && kept(&base.slots_before))
            || (damage.lost && found.iter().all(copied_whole)),
        "claims what it cannot know: {:?}",
        opened.report
    );
}

fuzz_target!(|input: &[u8]| {
    let base = image::base();
    let mut choices = Choices::new(input);
    let mut image = base.image.clone();
    let mut damage = damage(&mut choices, base, &mut image);
    if choices.one_in(8) {
        assert!(!image.inspect().is_empty());
    }
    let mut first = None;
    // Opening may be cut off anywhere in its plan, and begins again.
    for _ in 0..choices.below(3) {
        let Ok(opened) = image.open() else { return };
        if damage.shows {
            judge(&opened, base, &mut damage);
        }
        first.get_or_insert_with(|| image::slots_of(&opened.journal));
        image.run(opened.plan, usize::from(choices.byte()));
    }
    let Ok(opened) = image.open() else {
        assert!(first.is_none(), "an interrupted repair made the disk unusable");
        return;
    };
    if damage.shows {
        judge(&opened, base, &mut damage);
    }
    let (mut journal, superblock) = (opened.journal, opened.superblock);
    image.run(opened.plan, usize::MAX);
    let again = image.open().expect("what was repaired can be opened");
    assert!(!again.report.is_loss(), "a loss is dealt with once: {:?}", again.report);
    assert_eq!(image::slots_of(&again.journal), image::slots_of(&journal));
    assert_eq!(again.superblock, superblock);

    // And it works.
    let used = (0..journal.slots()).map(SlotIndex).filter(|slot| journal.slot(*slot).assignment.is_some());
    let _ = Allocator::new(&superblock, used.collect::<Vec<_>>());
    for _ in 0..choices.below(40) {
        let slot = SlotIndex(choices.below(journal.slots()));
        let masks = RegionMasks { dirty: choices.long(), valid: choices.long(), zero: 0 };
        match journal.slot(slot).assignment {
            Some(_) if choices.one_in(4) => journal.submit(Change::Free { slot, masks }),
            _ => journal.submit(Change::Masks { slot, masks }),
        };
        if choices.one_in(4) {
            journal.start_checkpoint();
        }
        image.drive(&mut journal);
    }
    let after = image::slots_of(&image.open().expect("it worked").journal);
    // Where damage outlived the repair, as numbers forged under a good checksum do, what was written since
    // may lose against it. Then all is given up, and nothing taken for what it is not.
    assert!(after == image::slots_of(&journal) || after.iter().all(copied_whole));
});
