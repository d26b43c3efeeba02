//! Disks that return errors or wrong bytes: what is kept, what is given up, and that it is said.

mod simulated_disk;

use mirror_net::format::inspect::{DiskReport, inspect};
use mirror_net::format::page::PageKind;
use mirror_net::format::scan::MaskLoss;
use mirror_net::format::{
    Assignment, BlockFault, Change, CopyState, DiskState, Journal, MetadataIo, OpenError, Opened, PlanStep,
    Role, SlotState, Superblock,
};
use mirror_net::ids::{DeviceId, LossGeneration, SliceEpoch, SliceIndex, SlotIndex};
use mirror_net::region::masks::RegionMasks;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use simulated_disk::{BLOCK, DISK_BYTES, SimulatedDisk, formatted, state_of};

const LOG_BLOCKS: u32 = 32;

fn masks(dirty: u64) -> RegionMasks {
    RegionMasks { dirty, valid: !dirty, zero: 0 }
}

fn assign(slot: u32) -> Change {
    let assignment = Assignment {
        device: DeviceId(7),
        slice: SliceIndex(1000 + slot),
        role: Role::Primary,
        state: CopyState::InSync,
        epoch: SliceEpoch(5),
        loss: LossGeneration(1),
        slot_generation: 0,
    };
    Change::Assign { slot: SlotIndex(slot), assignment, masks: masks(u64::from(slot) + 1) }
}

fn drive(disk: &mut SimulatedDisk, journal: &mut Journal) {
    while let Some(io) = journal.poll_io() {
        match &io {
            MetadataIo::Write { offset, block, .. } => disk.write(*offset, &block.0),
            MetadataIo::Flush { .. } => (),
        }
        disk.flush();
        journal.handle_io(io.id(), Ok(()));
    }
}

/// A disk in use: every slot assigned and in the pages, then eight log blocks, one slot each.
fn in_use() -> (SimulatedDisk, Superblock, Vec<SlotState>) {
    let (mut disk, superblock) = formatted(LOG_BLOCKS);
    let mut journal = disk.open().unwrap().journal;
    for slot in 0..journal.slots() {
        journal.submit(assign(slot));
    }
    drive(&mut disk, &mut journal);
    journal.start_checkpoint();
    drive(&mut disk, &mut journal);
    for slot in 0..8 {
        journal.submit(Change::Masks { slot: SlotIndex(slot), masks: masks(0xff00 + u64::from(slot)) });
        drive(&mut disk, &mut journal);
    }
    let state = state_of(&journal);
    (disk, superblock, state)
}

fn finish(disk: &mut SimulatedDisk, opened: Opened) -> Journal {
    disk.run(opened.plan);
    opened.journal
}

fn look(disk: &SimulatedDisk) -> DiskReport {
    inspect(&mut |offset, buffer| disk.read(offset, buffer), DISK_BYTES, true)
}

/// Damages a block in one of two ways.
fn damage(disk: &mut SimulatedDisk, offset: u64, unreadable: bool, rng: &mut StdRng) {
    if unreadable {
        disk.unreadable.insert(offset);
    } else {
        disk.flip(offset, rng.random_range(0..4096 * 8));
    }
}

#[test]
fn any_single_damaged_copy_is_replaced_by_the_other() {
    let mut rng = StdRng::seed_from_u64(1);
    let (disk, superblock, state) = in_use();
    let geometry = &superblock.geometry;
    let mut offsets = geometry.superblocks.to_vec();
    for kind in PageKind::ALL {
        for index in 0..geometry.pages() {
            offsets.extend([0, 1].map(|copy| geometry.page_offset(kind, index, copy)));
        }
    }
    for offset in offsets {
        for unreadable in [true, false] {
            let mut disk = disk.clone();
            damage(&mut disk, offset, unreadable, &mut rng);
            assert!(look(&disk).is_damaged());
            let opened = disk.open().unwrap();
            assert_eq!(opened.report.superblocks_rewritten.len() + opened.report.page_faults.len(), 1);
            assert!(!opened.report.is_loss());
            assert!(state_of(&opened.journal) == state);
            finish(&mut disk, opened);
            let report = disk.open().unwrap().report;
            assert!(report.superblocks_rewritten.is_empty() && report.page_faults.is_empty(), "not repaired");
            assert!(!look(&disk).is_damaged());
        }
    }
}

#[test]
fn a_damaged_log_block_is_rebuilt_from_the_next() {
    let mut rng = StdRng::seed_from_u64(2);
    let (disk, superblock, state) = in_use();
    let report = disk.open().unwrap().report;
    assert!(report.newest_lsn - report.tail_lsn >= 8);
    for lsn in report.newest_lsn - 8..report.newest_lsn {
        for unreadable in [true, false] {
            let mut disk = disk.clone();
            damage(&mut disk, superblock.geometry.log_offset(lsn), unreadable, &mut rng);
            let opened = disk.open().unwrap();
            assert_eq!(opened.report.log_rebuilt, [lsn]);
            assert!(state_of(&opened.journal) == state);
            finish(&mut disk, opened);
            assert!(disk.open().unwrap().report.log_rebuilt.is_empty());
        }
    }
}

/// Runs the plan of an opening, cut off again and again, until it has gone through; the loss must be noticed
/// every time before that.
fn survive_repair(disk: &mut SimulatedDisk, rng: &mut StdRng, check: impl Fn(&Opened)) -> Journal {
    let length = disk.open().unwrap().plan.count();
    for attempt in 0..30 {
        let opened = disk.open().unwrap();
        check(&opened);
        let steps: Vec<PlanStep> = opened.plan.collect();
        let crash_at = rng.random_range(0..length.max(1)).min(steps.len());
        if attempt == 29 || crash_at == steps.len() {
            steps.iter().for_each(|step| disk.step(step));
            return opened.journal;
        }
        steps[..crash_at].iter().for_each(|step| disk.step(step));
        disk.cut_power(rng);
    }
    unreachable!()
}

#[test]
fn a_gap_in_the_log_loses_all_masks_and_every_copy_says_so() {
    for seed in 0..10 {
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut disk, superblock, state) = in_use();
        let report = disk.open().unwrap().report;
        let lsn = report.newest_lsn - 4;
        for lsn in [lsn, lsn + 1] {
            damage(&mut disk, superblock.geometry.log_offset(lsn), seed % 2 == 0, &mut rng);
        }
        assert_eq!(disk.open().unwrap().report.mask_lost, Some(MaskLoss::LogGap { lsn }));
        assert!(look(&disk).to_string().contains("ALL MASKS LOST"));
        let check = |opened: &Opened| {
            for (slot, before) in state.iter().enumerate() {
                let after = opened.journal.slot(SlotIndex(slot as u32));
                let assignment = after.assignment.unwrap();
                assert_eq!(assignment.state, CopyState::Stale);
                assert_eq!(assignment.slice, before.assignment.unwrap().slice);
                assert_eq!(after.masks, SlotState::LOST_MASKS);
            }
        };
        let mut journal = survive_repair(&mut disk, &mut rng, check);
        let opened = disk.open().unwrap();
        check(&opened);
        assert!(!opened.report.is_loss(), "{:?}", opened.report);
        assert_eq!(opened.superblock.state, DiskState::Ok);
        assert!(opened.superblock.mask_losses >= 1);
        // And it works again.
        let change = Change::Masks { slot: SlotIndex(1), masks: masks(1) };
        journal.submit(change);
        drive(&mut disk, &mut journal);
        assert_eq!(disk.open().unwrap().journal.masks(SlotIndex(1)), masks(1));
    }
}

#[test]
fn a_lost_end_of_the_log_is_noticed() {
    let (disk, superblock, _) = in_use();
    let newest = disk.open().unwrap().report.newest_lsn;
    let offset = |lsn| superblock.geometry.log_offset(lsn);
    // Unreadable: it may have been written, and acknowledged.
    let mut unreadable = disk.clone();
    unreadable.unreadable.insert(offset(newest));
    let loss = unreadable.open().unwrap().report.mask_lost;
    assert_eq!(loss, Some(MaskLoss::LogEndUnreadable { lsn: newest }));
    // A crash tears one block: the second damaged one was acknowledged.
    let mut two = disk.clone();
    two.flip(offset(newest), 77);
    two.flip(offset(newest - 1), 99);
    assert_eq!(two.open().unwrap().report.mask_lost, Some(MaskLoss::LogEndMissing { lsn: newest - 1 }));
    // One alone cannot be told from a torn write; it is reported as such.
    let mut one = disk.clone();
    one.flip(offset(newest), 77);
    assert!(one.open().unwrap().report.torn_log_block);
    // The block that only moves the tail carries no record.
    let mut journal = disk.open().unwrap().journal;
    let mut checkpointed = disk.clone();
    journal.start_checkpoint();
    drive(&mut checkpointed, &mut journal);
    let tail_block = checkpointed.open().unwrap().report.newest_lsn;
    checkpointed.flip(offset(tail_block), 1);
    assert!(!checkpointed.open().unwrap().report.is_loss());
    // Pages that know of later blocks show that the end is missing, whatever the log looks like.
    for lsn in newest..=tail_block {
        checkpointed.write(offset(lsn), &[0; 4096]);
    }
    checkpointed.flush();
    assert_eq!(checkpointed.open().unwrap().report.mask_lost, Some(MaskLoss::LogEndMissing { lsn: newest }));
}

#[test]
fn a_log_that_is_gone_loses_all_masks() {
    let (mut disk, superblock, _) = in_use();
    for block in 0..superblock.geometry.log_blocks() {
        disk.unreadable.insert(superblock.geometry.log.offset + block * BLOCK);
    }
    let opened = disk.open().unwrap();
    assert_eq!(opened.report.mask_lost, Some(MaskLoss::LogGone));
    finish(&mut disk, opened);
    assert!(!disk.open().unwrap().report.is_loss());
}

/// Damages both copies of pages and checks that only their slots suffer, through crashes of the repair.
fn lose_pages(seed: u64, kinds: &[PageKind]) {
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut disk, superblock, before) = in_use();
    for &kind in kinds {
        for copy in 0..2 {
            damage(&mut disk, superblock.geometry.page_offset(kind, 0, copy), rng.random(), &mut rng);
        }
    }
    assert!(look(&disk).to_string().contains("LOST"));
    assert_eq!(disk.open().unwrap().report.pages_lost.len(), kinds.len());
    let masks_lost = kinds.contains(&PageKind::Masks);
    let assignments_lost = kinds.contains(&PageKind::Assignments);
    let check = |opened: &Opened| {
        for (slot, before) in before.iter().enumerate() {
            let after = opened.journal.slot(SlotIndex(slot as u32));
            if slot >= 126 {
                assert!(after == *before, "slot {slot} is in the other page");
            } else if assignments_lost {
                assert_eq!(after.assignment, None);
                assert!(after.slot_generation > before.slot_generation);
                if slot >= 8 {
                    assert_eq!(after.masks, RegionMasks::default());
                }
            } else if masks_lost && slot >= 8 {
                assert_eq!(after.assignment.unwrap().state, CopyState::Stale, "slot {slot}");
                assert_eq!(after.masks, SlotState::LOST_MASKS);
            } else {
                assert!(after == *before, "the log knows slot {slot}");
            }
        }
    };
    survive_repair(&mut disk, &mut rng, check);
    let opened = disk.open().unwrap();
    check(&opened);
    assert!(!opened.report.is_loss());
}

#[test]
fn both_copies_of_a_page_bad_lose_only_its_slots() {
    for seed in 0..20 {
        lose_pages(seed, &[PageKind::Masks]);
        lose_pages(seed, &[PageKind::Assignments]);
        lose_pages(seed, &[PageKind::Assignments, PageKind::Masks]);
    }
}

#[test]
fn errors_tell_what_is_the_matter() {
    let (disk, superblock, _) = in_use();
    let [first, second] = superblock.geometry.superblocks;
    let error = |disk: &SimulatedDisk| disk.open().unwrap_err();
    let with = |change: &dyn Fn(&mut Superblock)| {
        let mut disk = disk.clone();
        let mut next = superblock.next();
        change(&mut next);
        disk.run(next.write_plan());
        disk
    };

    assert_eq!(error(&SimulatedDisk::default()), OpenError::NotOurs);
    let mut foreign = SimulatedDisk::default();
    foreign.write(0, &[0x5a; 64 << 10]);
    assert_eq!(error(&foreign), OpenError::NotOurs);

    let mut bad = disk.clone();
    bad.flip(first, 1000);
    bad.unreadable.insert(second);
    assert_eq!(error(&bad), OpenError::Damaged([BlockFault::Checksum, BlockFault::Unreadable]));
    assert!(look(&bad).to_string().contains("would be refused"));

    assert_eq!(error(&with(&|next| next.state = DiskState::Formatting)), OpenError::FormatInterrupted);
    let lost = with(&|next| next.state = DiskState::MaskLost);
    assert_eq!(lost.open().unwrap().report.mask_lost, Some(MaskLoss::Interrupted));
    let newer = with(&|next| next.features.incompat = 4);
    assert_eq!(error(&newer), OpenError::UnsupportedFeatures { incompat: 4, ro_compat: 0 });
    let newer = with(&|next| next.features.ro_compat = 8);
    assert_eq!(error(&newer), OpenError::UnsupportedFeatures { incompat: 0, ro_compat: 8 });
    assert!(with(&|next| next.features.compat = 1).open().is_ok());

    let shrunk = disk.open_sized(DISK_BYTES - (1 << 20)).unwrap_err();
    let disk_bytes = DISK_BYTES - (1 << 20);
    assert_eq!(shrunk, OpenError::Shrunk { formatted_bytes: DISK_BYTES, disk_bytes });
    let grown = disk.open_sized(DISK_BYTES + (1 << 20)).unwrap();
    assert_eq!(grown.report.grown_bytes, 1 << 20);
    assert!(grown.report.superblocks_rewritten.is_empty());
}

#[test]
fn of_two_intact_superblocks_the_newer_counts() {
    let (disk, superblock, _) = in_use();
    for copy in 0..2 {
        let mut disk = disk.clone();
        let mut next = superblock.next();
        next.attach_generation = 9;
        disk.write(superblock.geometry.superblocks[copy], &next.encode().0);
        disk.flush();
        let opened = disk.open().unwrap();
        assert_eq!(opened.superblock, next);
        assert_eq!(opened.report.superblocks_rewritten, [(1 - copy, None)]);
        finish(&mut disk, opened);
        assert!(disk.open().unwrap().report.superblocks_rewritten.is_empty());
    }
}

#[test]
fn an_unknown_version_is_refused() {
    let (mut disk, superblock, _) = in_use();
    let mut block = mirror_net::format::Block(disk.block(superblock.geometry.superblocks[1]));
    block.0[4] = 2;
    block.seal();
    disk.write(superblock.geometry.superblocks[1], &block.0);
    assert_eq!(disk.open().unwrap_err(), OpenError::UnsupportedVersion(2));
}

#[test]
fn a_report_can_be_read_by_people_and_machines() {
    let (disk, _, _) = in_use();
    let report = look(&disk);
    let text = report.to_string();
    for part in
        ["can be opened", "disk#2 `vdb` of node#3 `north`", "area log", "device#7", "log of 32 blocks"]
    {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["slots"]["used"], json["slots"]["total"]);
    assert_eq!(json["superblocks"][0]["content"]["disk_name"], "vdb");
}

#[test]
fn nothing_that_a_disk_holds_makes_reading_it_panic() {
    let mut rng = StdRng::seed_from_u64(3);
    let (disk, superblock, _) = in_use();
    let geometry = &superblock.geometry;
    for _ in 0..150 {
        let mut disk = disk.clone();
        for _ in 0..rng.random_range(1..20) {
            // Sealed again, so that the contents and not only the checksum are judged.
            let area = [geometry.log, geometry.masks[0], geometry.assignments[1], geometry.assignments[0]]
                [rng.random_range(0..4)];
            let offset = match rng.random_range(0..8) {
                0 => geometry.superblocks[rng.random_range(0..2)],
                _ => area.offset + rng.random_range(0..area.blocks()) * BLOCK,
            };
            let mut block = mirror_net::format::Block(disk.block(offset));
            for _ in 0..rng.random_range(1..8) {
                let at = if rng.random() { rng.random_range(4..136) } else { rng.random_range(4..4096) };
                block.0[at] = rng.random();
            }
            block.seal();
            disk.write(offset, &block.0);
            disk.flush();
        }
        look(&disk);
        if let Ok(opened) = disk.open() {
            let _ = opened.plan.count();
        }
    }
}
