//! What a crash leaves: random changes on a simulated disk, cut off at random.
//!
//! The property: after reopening, all slots together are in a state that was submitted, no older than the
//! newest that was durable. `FORMAT_SEED` and `FORMAT_SEEDS` choose the first seed and how many.

mod simulated_disk;

use mirror_net::format::create::format;
use mirror_net::format::{
    Assignment, Change, CopyState, IoFailed, IoId, Journal, MetadataIo, OpenError, PlanStep, Role, SlotState,
    Superblock, Ticket,
};
use mirror_net::ids::{DeviceId, LossGeneration, SliceEpoch, SliceIndex, SlotIndex};
use mirror_net::region::masks::RegionMasks;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use simulated_disk::{DISK_BYTES, SimulatedDisk, State, formatted, options, state_of};

/// Few slots, so that changes meet; in both pages, so that there is more than one to write.
fn busy_slots(journal: &Journal) -> [SlotIndex; 8] {
    [0, 1, 2, 3, 125, 126, 127, journal.slots() - 1].map(SlotIndex)
}

/// A journal on a disk, with every state it went through.
struct Machine {
    disk: SimulatedDisk,
    journal: Journal,
    in_flight: Vec<(IoId, MetadataIo)>,
    /// The state after each ticket since the last opening; `[0]` is the state as opened.
    history: Vec<State>,
    durable: Ticket,
    flushes: usize,
}

impl Machine {
    fn new(disk: SimulatedDisk, journal: Journal) -> Self {
        let history = vec![state_of(&journal)];
        Self { disk, journal, in_flight: Vec::new(), history, durable: Ticket(0), flushes: 0 }
    }

    fn submit(&mut self, change: Change) -> Ticket {
        let expected = self.expected(change);
        let ticket = self.journal.submit(change);
        assert_eq!(ticket.0, self.history.len() as u64);
        assert!(expected == state_of(&self.journal), "{change:?}");
        self.history.push(expected);
        ticket
    }

    /// What a change does, written down a second time.
    fn expected(&self, change: Change) -> State {
        let mut state = self.history.last().unwrap().clone();
        match change {
            Change::Masks { slot, masks } => state[slot.0 as usize].masks = masks,
            Change::Assign { slot, assignment, masks } => {
                let slot = &mut state[slot.0 as usize];
                (slot.assignment, slot.masks) = (Some(assignment), masks);
            }
            Change::Epoch { first, count, epoch, role, state: copy, loss } => {
                for slot in &mut state[first.0 as usize..(first.0 + count) as usize] {
                    let assignment = slot.assignment.as_mut().unwrap();
                    (assignment.epoch, assignment.role) = (epoch, role);
                    (assignment.state, assignment.loss) = (copy, loss);
                }
            }
            Change::Free { slot, masks } => {
                let slot = &mut state[slot.0 as usize];
                (slot.assignment, slot.masks) = (None, masks);
                slot.slot_generation += 1;
            }
        }
        state
    }

    /// Begins what the journal wants.
    fn begin(&mut self) {
        while let Some(io) = self.journal.poll_io() {
            self.in_flight.push((io.id(), io));
        }
        let is_log_write = |io: &MetadataIo| matches!(io, MetadataIo::Write { durable: true, .. });
        assert!(
            self.in_flight.iter().filter(|(_, io)| is_log_write(io)).count() <= 1,
            "two log writes at once"
        );
    }

    fn complete(&mut self, at: usize) {
        let (id, io) = self.in_flight.swap_remove(at);
        match &io {
            MetadataIo::Write { offset, block, durable: true, .. } => {
                self.disk.write_durable(*offset, &block.0)
            }
            MetadataIo::Write { offset, block, durable: false, .. } => self.disk.write(*offset, &block.0),
            MetadataIo::Flush { .. } => {
                assert!(
                    !self
                        .in_flight
                        .iter()
                        .any(|(_, io)| matches!(io, MetadataIo::Write { durable: false, .. })),
                    "a page write was not waited for"
                );
                self.flushes += 1;
                self.disk.flush();
            }
        }
        self.journal.handle_io(id, Ok(()));
        if let Some(ticket) = self.journal.poll_durable() {
            assert!(ticket > self.durable);
            self.durable = ticket;
        }
        self.check_durable();
    }

    /// What the journal calls durable is so in every state that a crash could leave.
    fn check_durable(&self) {
        let possible = &self.history[self.durable.0 as usize..];
        for slot in busy_slots(&self.journal) {
            let masks = |state: &State| state[slot.0 as usize].masks;
            assert_eq!(self.journal.durable_masks(slot), masks(&possible[0]));
            let always_dirty = possible.iter().fold(u64::MAX, |bits, state| bits & masks(state).dirty);
            assert_eq!(self.journal.dirty_durable(slot) & !always_dirty, 0, "{slot} could lose a dirty bit");
        }
    }

    /// Carries out everything the journal wants, until it wants nothing.
    fn settle(&mut self, rng: &mut StdRng) {
        self.begin();
        while !self.in_flight.is_empty() {
            let at = rng.random_range(0..self.in_flight.len());
            self.complete(at);
            self.begin();
        }
    }

    /// What the disk may be after a crash: writes in flight reached its cache, or did not.
    fn crash(mut self, rng: &mut StdRng, power: bool) -> (SimulatedDisk, Vec<State>) {
        for (_, io) in &self.in_flight {
            if let MetadataIo::Write { offset, block, .. } = io
                && rng.random()
            {
                self.disk.write(*offset, &block.0);
            }
        }
        if power {
            self.disk.cut_power(rng);
        }
        (self.disk, self.history.split_off(self.durable.0 as usize))
    }
}

fn random_masks(rng: &mut StdRng) -> RegionMasks {
    RegionMasks { dirty: rng.random(), valid: rng.random(), zero: rng.random() }
}

/// A random change that fits the table.
fn random_change(rng: &mut StdRng, journal: &Journal) -> Change {
    let slot = *busy_slots(journal).choose(rng).unwrap();
    let old = journal.slot(slot);
    let masks = random_masks(rng);
    if rng.random_bool(0.6) {
        return Change::Masks { slot, masks };
    }
    let role = if rng.random() { Role::Primary } else { Role::Secondary };
    let state = [CopyState::InSync, CopyState::Syncing, CopyState::Stale][rng.random_range(0..3)];
    let (epoch, loss) = (SliceEpoch(rng.random()), LossGeneration(rng.random()));
    if old.assignment.is_none() {
        let (device, slice) = (DeviceId(rng.random()), SliceIndex(rng.random()));
        let slot_generation = old.slot_generation;
        let assignment = Assignment { device, slice, role, state, epoch, loss, slot_generation };
        return Change::Assign { slot, assignment, masks };
    }
    if rng.random_bool(0.4) {
        return Change::Free { slot, masks };
    }
    let run =
        (slot.0..journal.slots()).take_while(|slot| journal.slot(SlotIndex(*slot)).assignment.is_some());
    Change::Epoch { first: slot, count: run.count() as u32, epoch, role, state, loss }
}

/// Opens the disk after a crash, and crashes again during the plan now and then.
fn reopen(
    rng: &mut StdRng,
    disk: &mut SimulatedDisk,
    possible: &[State],
    attach_generations: &mut Vec<u64>,
) -> (Superblock, Journal) {
    loop {
        let opened = disk.open().unwrap();
        assert!(!opened.report.is_loss(), "{:?}", opened.report);
        let found = state_of(&opened.journal);
        assert!(possible.contains(&found), "a state that was never submitted, or older than durable");
        let attach_generation = opened.superblock.attach_generation;
        assert!(attach_generations.contains(&attach_generation), "an old superblock");
        let steps: Vec<PlanStep> = opened.plan.collect();
        let crash_at = if rng.random_bool(0.3) { rng.random_range(0..=steps.len()) } else { usize::MAX };
        steps.iter().take(crash_at).for_each(|step| disk.step(step));
        assert!(matches!(steps.first(), Some(PlanStep::Flush)), "what was read may be in the cache only");
        if crash_at == usize::MAX {
            assert!(disk.is_flushed(), "what was repaired may be in the cache only");
            *attach_generations = vec![attach_generation];
            return (opened.superblock, opened.journal);
        }
        disk.cut_power(rng);
    }
}

/// Raises the attach generation, interrupted anywhere. Returns whether it went through.
fn attach(
    rng: &mut StdRng,
    disk: &mut SimulatedDisk,
    superblock: &Superblock,
    attach_generations: &mut Vec<u64>,
) -> bool {
    let mut next = superblock.next();
    next.attach_generation += 1;
    let steps: Vec<PlanStep> = next.write_plan().collect();
    let crash_at = rng.random_range(0..=2 * steps.len());
    steps.iter().take(crash_at).for_each(|step| disk.step(step));
    if crash_at < steps.len() {
        disk.cut_power(rng);
        attach_generations.push(next.attach_generation);
        return false;
    }
    *attach_generations = vec![next.attach_generation];
    true
}

/// Several crashes of one disk; returns how many flushes its checkpoints got done.
fn one_life(seed: u64, log_blocks: u32) -> usize {
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut disk, superblock) = formatted(log_blocks);
    let free = SlotState { assignment: None, slot_generation: 0, masks: RegionMasks::ZEROED };
    let mut possible = vec![vec![free; superblock.geometry.slots as usize]];
    let mut attach_generations = vec![0];
    let mut flushes = 0;
    for _ in 0..6 {
        let (superblock, journal) = reopen(&mut rng, &mut disk, &possible, &mut attach_generations);
        if rng.random_bool(0.3) && !attach(&mut rng, &mut disk, &superblock, &mut attach_generations) {
            possible = vec![state_of(&journal)];
            continue;
        }
        let mut machine = Machine::new(disk, journal);
        let submitting = rng.random_range(0.1..0.9);
        // Short lives too: crash upon crash is where a repair must not rely on a later one.
        let steps = if rng.random_bool(0.4) { rng.random_range(0..15) } else { rng.random_range(0..150) };
        for _ in 0..steps {
            if rng.random_bool(submitting) {
                let change = random_change(&mut rng, &machine.journal);
                machine.submit(change);
            }
            if rng.random_bool(0.05) {
                machine.journal.start_checkpoint();
            }
            machine.begin();
            if !machine.in_flight.is_empty() && rng.random_bool(0.8) {
                let at = rng.random_range(0..machine.in_flight.len());
                machine.complete(at);
            }
        }
        flushes += machine.flushes;
        let power = rng.random_bool(0.8);
        (disk, possible) = machine.crash(&mut rng, power);
    }
    flushes
}

#[test]
fn a_crash_keeps_what_was_durable_and_shows_only_what_was_submitted() {
    let number = |name, default| std::env::var(name).map_or(default, |value| value.parse().unwrap());
    let (first, count): (u64, u64) = (number("FORMAT_SEED", 0), number("FORMAT_SEEDS", 600));
    let mut flushes = 0;
    for seed in first..first + count {
        let life = std::panic::AssertUnwindSafe(|| one_life(seed, [4, 5, 8, 33][seed as usize % 4]));
        match std::panic::catch_unwind(life) {
            Ok(done) => flushes += done,
            Err(panic) => {
                eprintln!("replay with FORMAT_SEED={seed} FORMAT_SEEDS=1");
                std::panic::resume_unwind(panic);
            }
        }
    }
    assert!(count < 100 || flushes > 500, "the logs hardly wrapped: {flushes} flushes");
}

#[test]
fn a_full_log_delays_tickets_but_never_for_ever() {
    for (log_blocks, log_first) in [(4, true), (4, false), (5, true), (8, true), (8, false)] {
        let (disk, _) = formatted(log_blocks);
        let journal = disk.open().unwrap().journal;
        let mut machine = Machine::new(disk, journal);
        // Far more than a log can hold, before the first write completes.
        let slots = u64::from(machine.journal.slots());
        for i in 0..u64::from(log_blocks) * 126 * 4 {
            let masks = RegionMasks { dirty: i, valid: 0, zero: 0 };
            machine.journal.submit(Change::Masks { slot: SlotIndex((i % slots) as u32), masks });
        }
        machine.begin();
        // Log writes complete as soon as they can, or as late: the log fills up, or the checkpoint hurries.
        while !machine.in_flight.is_empty() {
            let is_log = |io: &MetadataIo| matches!(io, MetadataIo::Write { durable: true, .. });
            let at = machine.in_flight.iter().position(|(_, io)| is_log(io) == log_first).unwrap_or(0);
            let (id, io) = machine.in_flight.swap_remove(at);
            if let MetadataIo::Write { offset, block, .. } = &io {
                machine.disk.write(*offset, &block.0);
            }
            machine.disk.flush();
            machine.journal.handle_io(id, Ok(()));
            machine.begin();
        }
        assert_eq!(machine.journal.poll_durable(), Some(machine.journal.last_ticket()), "stuck");
        assert!(machine.journal.is_idle());
        assert!(state_of(&machine.disk.open().unwrap().journal) == state_of(&machine.journal));
    }
}

#[test]
fn a_change_never_overtakes_one_of_an_earlier_block() {
    let (disk, _) = formatted(256);
    let journal = disk.open().unwrap().journal;
    let mut machine = Machine::new(disk, journal);
    let mark = |slot: u32, dirty| {
        let masks = RegionMasks { dirty, valid: 0, zero: 0 };
        Change::Masks { slot: SlotIndex(slot), masks }
    };
    for slot in 0..130 {
        machine.submit(mark(slot, 1));
    }
    machine.submit(mark(0, 2));
    machine.begin();
    machine.complete(0);
    let (disk, possible) = machine.crash(&mut StdRng::seed_from_u64(0), true);
    assert!(possible[0] == state_of(&disk.open().unwrap().journal));
}

#[test]
fn an_epoch_is_adopted_by_a_whole_span_in_one_block() {
    let (disk, _) = formatted(8);
    let journal = disk.open().unwrap().journal;
    let mut machine = Machine::new(disk, journal);
    let mut rng = StdRng::seed_from_u64(0);
    let slots = machine.journal.slots();
    for slot in 0..slots {
        let assignment = Assignment {
            device: DeviceId(1),
            slice: SliceIndex(slot),
            role: Role::Secondary,
            state: CopyState::InSync,
            epoch: SliceEpoch(1),
            loss: LossGeneration(0),
            slot_generation: 0,
        };
        machine.submit(Change::Assign { slot: SlotIndex(slot), assignment, masks: RegionMasks::ZEROED });
    }
    machine.settle(&mut rng);
    machine.submit(Change::Epoch {
        first: SlotIndex(0),
        count: slots,
        epoch: SliceEpoch(2),
        role: Role::Primary,
        state: CopyState::InSync,
        loss: LossGeneration(1),
    });
    machine.begin();
    machine.complete(0);
    assert_eq!(machine.durable, machine.journal.last_ticket());
}

#[test]
fn many_changes_share_a_log_write() {
    let (disk, _) = formatted(256);
    let journal = disk.open().unwrap().journal;
    let mut machine = Machine::new(disk, journal);
    let dirty = |machine: &mut Machine, slot, bit| {
        let mut masks = machine.journal.masks(SlotIndex(slot));
        masks.dirty |= 1u64 << bit;
        machine.submit(Change::Masks { slot: SlotIndex(slot), masks })
    };
    dirty(&mut machine, 0, 0);
    machine.begin();
    // While the first is under way: 100 slots, and 64 regions of one slot, which take one record.
    for slot in 1..=100 {
        dirty(&mut machine, slot, 0);
    }
    for bit in 0..64 {
        dirty(&mut machine, 101, bit);
    }
    assert_eq!(machine.in_flight.len(), 1);
    machine.complete(0);
    assert_eq!(machine.durable, Ticket(1));
    machine.begin();
    machine.complete(0);
    assert_eq!(machine.durable, Ticket(165));
    assert!(machine.journal.is_idle());
}

#[test]
fn a_region_dirtied_during_a_commit_is_covered_by_the_next() {
    let (disk, _) = formatted(8);
    let journal = disk.open().unwrap().journal;
    let mut machine = Machine::new(disk, journal);
    let slot = SlotIndex(0);
    let masks = |dirty| RegionMasks { dirty, valid: 0, zero: u64::MAX };
    machine.submit(Change::Masks { slot, masks: masks(1) });
    machine.begin();
    let second = machine.submit(Change::Masks { slot, masks: masks(1) });
    machine.complete(0);
    // The first commit made the bit durable: the second writer may go, and its own ticket comes too.
    assert_eq!(machine.journal.dirty_durable(slot), 1);
    machine.begin();
    machine.complete(0);
    assert_eq!(machine.durable, second);
}

#[test]
fn a_bit_cleared_and_set_again_is_not_durable_between() {
    let (disk, _) = formatted(8);
    let journal = disk.open().unwrap().journal;
    let mut machine = Machine::new(disk, journal);
    let slot = SlotIndex(0);
    let masks = |dirty| RegionMasks { dirty, valid: 0, zero: 0 };
    let mut rng = StdRng::seed_from_u64(0);
    machine.submit(Change::Masks { slot, masks: masks(0b11) });
    machine.settle(&mut rng);
    assert_eq!(machine.journal.dirty_durable(slot), 0b11);
    machine.submit(Change::Masks { slot, masks: masks(0b01) });
    assert_eq!(machine.journal.dirty_durable(slot), 0b01, "from the clear's submission on");
    machine.begin();
    machine.submit(Change::Masks { slot, masks: masks(0b11) });
    assert_eq!(machine.journal.dirty_durable(slot), 0b01, "the clear may become durable before the bit");
    machine.complete(0);
    assert_eq!(machine.journal.dirty_durable(slot), 0b01);
    machine.settle(&mut rng);
    assert_eq!(machine.journal.dirty_durable(slot), 0b11);
}

#[test]
fn a_failed_write_fails_the_journal_for_good() {
    let (disk, _) = formatted(8);
    let mut journal = disk.open().unwrap().journal;
    journal.submit(Change::Masks { slot: SlotIndex(0), masks: RegionMasks::default() });
    let io = journal.poll_io().unwrap();
    journal.handle_io(io.id(), Err(IoFailed));
    assert!(journal.failed());
    journal.submit(Change::Masks { slot: SlotIndex(1), masks: RegionMasks::default() });
    journal.start_checkpoint();
    assert!(journal.poll_io().is_none());
    assert_eq!(journal.poll_durable(), None);
}

#[test]
fn an_interrupted_format_leaves_nothing_that_could_be_taken_for_a_disk() {
    let mut rng = StdRng::seed_from_u64(7);
    let steps: Vec<PlanStep> = format(options(8, DISK_BYTES)).unwrap().1.collect();
    for crash_at in 0..=steps.len() {
        for _ in 0..20 {
            let mut disk = SimulatedDisk::default();
            steps[..crash_at].iter().for_each(|step| disk.step(step));
            disk.cut_power(&mut rng);
            match disk.open() {
                Ok(opened) => {
                    assert!(crash_at >= steps.len() - 3, "step {crash_at}");
                    assert!(!opened.report.is_loss());
                }
                Err(OpenError::FormatInterrupted) => assert!(crash_at > 0),
                Err(OpenError::NotOurs | OpenError::Damaged(_)) => assert!(crash_at < 2, "step {crash_at}"),
                Err(error) => panic!("step {crash_at}: {error}"),
            }
        }
    }
}

#[test]
fn formatting_again_keeps_the_old_format_or_shows_that_it_was_interrupted() {
    let mut rng = StdRng::seed_from_u64(8);
    let (mut before, old) = formatted(8);
    before.run(Superblock { sequence: 50, ..old.clone() }.write_plan());
    let mut again = options(8, DISK_BYTES);
    again.format = uuid::Uuid::from_u128(u128::MAX);
    let steps: Vec<PlanStep> = format(again).unwrap().1.collect();
    for crash_at in 0..=steps.len() {
        for _ in 0..20 {
            let mut disk = before.clone();
            steps[..crash_at].iter().for_each(|step| disk.step(step));
            disk.cut_power(&mut rng);
            match disk.open() {
                Ok(opened) if opened.superblock.format == old.format => {
                    assert!(crash_at < 4, "step {crash_at}: the old format came back");
                    assert!(!opened.report.is_loss());
                }
                Ok(opened) => {
                    assert!(crash_at >= steps.len() - 3);
                    assert!(!opened.report.is_loss());
                }
                Err(error) => assert_eq!(error, OpenError::FormatInterrupted),
            }
        }
    }
}
