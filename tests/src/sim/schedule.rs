//! One seed's story: a cluster, its users, what goes wrong, and the end, when all must be well.

use crate::sim::cluster::{Cluster, Fault, Shape, Wrong};
use crate::sim::control::is_impatient;
use crate::sim::disk::SECTOR;
use crate::sim::node::SLICE;
use crate::sim::operator::{self, Deed};
use crate::sim::scheduler::{MS, Nanos, Random};
use crate::sim::workload::{SLICES, Wish};
use mirror_net::engine::action::RequestKind;
use mirror_net::map::{Commit, DevicePolicy, OnNoQuorum};
use std::collections::BTreeSet;

/// Classes of faults, for counting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Class {
    Kill,
    PowerCut,
    FastReboot,
    PowerCutOfAll,
    Pause,
    LaneLoss,
    Silence,
    OneWaySilence,
    DamagedFrame,
    NoManager,
    ManagerCrash,
    ControlConnection,
    Failover,
    ClaimMove,
    UnreadableSector,
    SlowDisk,
    HangingDisk,
    DiskError,
    DiskDeath,
    Deposed,
    Moved,
    LateFrame,
    Lost,
    Regenerated,
    BadMetadata,
    WithoutADisk,
    SlowMember,
}

use Class::*;

impl Class {
    /// All, in the order of their counts.
    pub const ALL: [Self; 27] = [
        Kill,
        PowerCut,
        FastReboot,
        PowerCutOfAll,
        Pause,
        LaneLoss,
        Silence,
        OneWaySilence,
        DamagedFrame,
        NoManager,
        ManagerCrash,
        ControlConnection,
        Failover,
        ClaimMove,
        UnreadableSector,
        SlowDisk,
        HangingDisk,
        DiskError,
        DiskDeath,
        Deposed,
        Moved,
        LateFrame,
        Lost,
        Regenerated,
        BadMetadata,
        WithoutADisk,
        SlowMember,
    ];

    /// What can be planned while nothing is broken for ever.
    const PASSING: [Self; 25] = [
        Kill,
        PowerCut,
        FastReboot,
        PowerCutOfAll,
        Pause,
        LaneLoss,
        Silence,
        OneWaySilence,
        DamagedFrame,
        NoManager,
        ManagerCrash,
        ControlConnection,
        Failover,
        ClaimMove,
        UnreadableSector,
        SlowDisk,
        HangingDisk,
        // The rarest ways to go wrong need two things at a time: these are drawn twice as often.
        Deposed,
        Deposed,
        Moved,
        Moved,
        Lost,
        BadMetadata,
        SlowMember,
        SlowMember,
    ];

    /// What takes no copy out of service, and so may come together with a disk that breaks; the last two only where
    /// what is slow is waited for.
    const HARMLESS: [Self; 5] = [ManagerCrash, ControlConnection, ClaimMove, SlowDisk, HangingDisk];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Kill => "kill",
            PowerCut => "power cut",
            FastReboot => "reboot faster than it is noticed",
            PowerCutOfAll => "power cut of all",
            Pause => "pause",
            LaneLoss => "lane loss",
            Silence => "silence",
            OneWaySilence => "silence in one direction",
            DamagedFrame => "damaged frame",
            NoManager => "no manager",
            ManagerCrash => "manager crash",
            ControlConnection => "control connection",
            Failover => "failover",
            ClaimMove => "claim move",
            UnreadableSector => "unreadable sectors",
            SlowDisk => "slow disk",
            HangingDisk => "hanging disk",
            DiskError => "disk error",
            DiskDeath => "disk death",
            Deposed => "failover of a node that does not hear of it",
            Moved => "copy dropped or added",
            LateFrame => "frame of an old session",
            Lost => "away for longer than a spare waits",
            Regenerated => "copies made again on a spare",
            BadMetadata => "unreadable metadata at a start",
            WithoutADisk => "another failure after a disk's",
            SlowMember => "death of a primary while a member's disk is slow",
        }
    }
}

/// How a schedule ended.
#[derive(Debug)]
pub struct Outcome {
    /// What is wrong.
    pub violations: Vec<String>,
    /// The same for the same seed, always.
    pub hash: u64,
    /// Requests completed.
    pub completed: u64,
    /// Reads compared.
    pub reads: u64,
    /// How often each class of fault occurred, as in [`Class::ALL`].
    pub faults: [u64; Class::ALL.len()],
    /// What an operator did, as in [`Deed::ALL`].
    pub deeds: [u64; Deed::ALL.len()],
}

/// Within so long after the last fault everything is answered.
const LIVENESS: Nanos = 20_000 * MS;
/// Within so long after that every copy that can be is in sync again.
const REJOIN_WITHIN: Nanos = 30_000 * MS;

/// Draws faults for a cluster of some shape.
struct Planner<'a> {
    cluster: &'a mut Cluster,
    random: &'a mut Random,
    shape: Shape,
}

impl Planner<'_> {
    /// Plans a fault of one of those classes a while after `last`, or `close` after it; about when the next may
    /// come.
    fn draw(&mut self, classes: &[Class], last: Nanos, close: bool, counts: &mut [u64]) -> Nanos {
        let within = if close { 30 * MS } else { 1_500 * MS };
        let at = last + self.random.below(within);
        let class = self.one_of(classes);
        self.plan(class, at);
        counts[class as usize] += 1;
        // While it is away, the rest comes about when its copies are made again.
        if class == Lost { at + 4_000 * MS } else { at }
    }

    fn node(&mut self) -> u16 {
        self.random.range(1, u64::from(self.shape.nodes) + 1) as u16
    }

    fn disk(&mut self) -> usize {
        self.random.below(u64::from(self.shape.disks)) as usize
    }

    fn one_of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.random.below(items.len() as u64) as usize]
    }

    /// Plans a fault of that class at that time, and its end.
    fn plan(&mut self, class: Class, at: Nanos) {
        let node = self.node();
        let other = (node + self.random.below(u64::from(self.shape.nodes) - 1) as u16) % self.shape.nodes + 1;
        let later = at + self.one_of(&[50, 300, 1_500, 4_000]) * MS + self.random.below(100 * MS);
        match class {
            Kill => self.stop(at, later, Fault::Kill { node }, node),
            PowerCut => self.stop(at, later, Fault::PowerCut { node }, node),
            FastReboot => {
                let soon = at + self.random.below(10 * MS);
                self.stop(at, soon, Fault::PowerCut { node }, node);
            }
            PowerCutOfAll => {
                for node in 1..=self.shape.nodes {
                    if self.random.below(8) > 0 {
                        let at = at + self.random.below(20 * MS);
                        let later = later + self.random.below(500 * MS);
                        self.stop(at, later, Fault::PowerCut { node }, node);
                    }
                }
            }
            Pause => {
                let ms = self.one_of(&[20, 300, 1_050, 3_000]);
                self.cluster.plan(at, Fault::Pause { node, ms });
            }
            LaneLoss => self.cluster.plan(at, Fault::CutLane { a: node, b: other }),
            Silence => {
                self.silence(at, later, node, other);
                self.silence(at, later, other, node);
            }
            OneWaySilence => self.silence(at, later, node, other),
            DamagedFrame => self.cluster.plan(at, Fault::Damage { from: node, to: other }),
            NoManager => {
                self.cluster.plan(at, Fault::NoManager { node, on: true });
                self.cluster.plan(later, Fault::NoManager { node, on: false });
                if self.random.one_in(2) {
                    // From everybody: it does not learn what the others do without it.
                    for peer in (1..=self.shape.nodes).filter(|peer| *peer != node) {
                        self.silence(at, later, node, peer);
                        self.silence(at, later, peer, node);
                    }
                }
            }
            ManagerCrash => {
                self.cluster.plan(at, Fault::KillManager);
                self.cluster.plan(later, Fault::StartManager);
            }
            ControlConnection => self.cluster.plan(at, Fault::CutControl { node }),
            Failover => self.cluster.plan(at, Fault::FailOver { node }),
            ClaimMove => {
                let device = self.cluster.users[self.random.below(self.cluster.users.len() as u64) as usize];
                self.cluster.plan(at, Fault::MoveClaim { device, node });
            }
            UnreadableSector => {
                for _ in 0..16 {
                    let (disk, slot) = (self.disk(), self.random.below(10) as u32);
                    let offset = self.random.below(24) as u32 * 512;
                    self.cluster.plan(at, Fault::BadSector { node, disk, slot, offset });
                }
            }
            BadMetadata => {
                let power = self.random.one_in(2);
                let stop = if power { Fault::PowerCut { node } } else { Fault::Kill { node } };
                self.cluster.plan(at, stop);
                for disk in 0..usize::from(self.shape.disks) {
                    self.cluster.plan(later, Fault::BadMetadata { node, disk });
                }
                self.cluster.plan(later, Fault::Start { node });
            }
            SlowDisk => {
                let (disk, times) = (self.disk(), self.one_of(&[20, 200, 2_000]));
                self.cluster.plan(at, Fault::Disk { node, disk, wrong: Wrong::Slow(times) });
                self.cluster.plan(later, Fault::Disk { node, disk, wrong: Wrong::Slow(0) });
            }
            HangingDisk => {
                let disk = self.disk();
                self.cluster.plan(at, Fault::Disk { node, disk, wrong: Wrong::Hung(true) });
                if self.random.below(4) > 0 {
                    self.cluster.plan(later, Fault::Disk { node, disk, wrong: Wrong::Hung(false) });
                }
            }
            SlowMember => {
                // What is under way reaches some copies, and the others not before its primary is replaced.
                let users = self.cluster.users.clone();
                let three = users.iter().copied().find(|device| self.cluster.copies_of(*device).len() > 2);
                let device = three.unwrap_or_else(|| self.one_of(&users));
                let copies = self.cluster.copies_of(device);
                let (primary, _) = copies[0];
                let dies = at + self.random.below(200 * MS);
                if let [_, others @ ..] = &copies[..]
                    && !others.is_empty()
                {
                    let (node, disk) = self.one_of(others);
                    let until = at + self.random.range(1_200 * MS, 4_000 * MS);
                    let (wrong, well) = match self.random.below(4) {
                        0 => (Wrong::Hung(true), Wrong::Hung(false)),
                        1 => (Wrong::Slow(300), Wrong::Slow(0)),
                        _ => (Wrong::Slow(2_000), Wrong::Slow(0)),
                    };
                    self.cluster.plan(at, Fault::Disk { node, disk, wrong });
                    self.cluster.plan(until, Fault::Disk { node, disk, wrong: well });
                    if self.random.one_in(2) && node != primary {
                        // Or only some copies, ever.
                        self.silence(at, dies + 10 * MS, primary, node);
                    }
                }
                self.stop(dies, later, Fault::Kill { node: primary }, primary);
            }
            DiskError => {
                let wrong = self.one_of(&[Wrong::Writes, Wrong::OneWrite, Wrong::Flush, Wrong::Metadata]);
                let disk = self.disk();
                self.cluster.plan(at, Fault::Disk { node, disk, wrong });
            }
            DiskDeath => {
                let disk = self.disk();
                self.cluster.plan(at, Fault::Disk { node, disk, wrong: Wrong::Dead });
            }
            Deposed => {
                // Mostly of two that mirror each other.
                let device = self.one_of(&self.cluster.users.clone());
                match &self.cluster.copies_of(device)[..] {
                    [(primary, _), (secondary, _), ..]
                        if primary != secondary && self.random.below(4) > 0 =>
                    {
                        self.depose(*primary, *secondary, at);
                    }
                    _ => self.depose(node, other, at),
                }
            }
            Moved => self.move_copy(node, other, at),
            Lost => {
                let fault =
                    if self.random.one_in(2) { Fault::PowerCut { node } } else { Fault::Kill { node } };
                let until = at + self.one_of(&[4_500, 6_000, 9_000]) * MS;
                self.stop(at, until, fault, node);
            }
            // What is left of a lane that is lost, and what follows by itself.
            LateFrame | Regenerated | WithoutADisk => {}
        }
    }

    /// A node is failed over and goes on with what it knew, while its leases last: those of before, or of a
    /// partner that forgot what it granted, or whose answers are late.
    fn depose(&mut self, node: u16, other: u16, at: Nanos) {
        let within = |random: &mut Random, ms: u64| at + random.below(ms * MS);
        let failover = within(self.random, 300);
        let until = at + self.one_of(&[1_500, 3_000]) * MS;
        self.cluster.plan(at, Fault::NoManager { node, on: true });
        self.cluster.plan(until, Fault::NoManager { node, on: false });
        self.cluster.plan(failover, Fault::FailOver { node });
        match self.random.below(10) {
            0 | 7..10 => {
                let (restart, down) = (within(self.random, 300), self.random.below(20 * MS));
                let stop = if self.random.one_in(3) {
                    Fault::PowerCut { node: other }
                } else {
                    Fault::Kill { node: other }
                };
                self.stop(restart, restart + down, stop, other);
                // Once it is back, if not before; and it has nobody to ask for as long as the lease lasts.
                let back = restart + down + self.random.range(5 * MS, 150 * MS);
                self.cluster.plan(back, Fault::FailOver { node });
                if self.random.below(4) > 0 {
                    self.silence(restart, until, node, other);
                    self.silence(restart, until, other, node);
                }
            }
            1 | 2 => {
                let end = at + self.random.range(300 * MS, 950 * MS);
                self.silence(at, end, other, node);
            }
            3 => {
                let (pause, ms) = (within(self.random, 300), self.one_of(&[300, 900, 1_050]));
                self.cluster.plan(pause, Fault::Pause { node, ms });
            }
            4 => {
                let cut = within(self.random, 600);
                self.cluster.plan(cut, Fault::CutLane { a: node, b: other });
            }
            // What it has under way reaches some copies only.
            5 => self.silence(at, until, node, other),
            _ => {
                for peer in (1..=self.shape.nodes).filter(|peer| *peer != node) {
                    self.silence(at, until, node, peer);
                    self.silence(at, until, peer, node);
                }
            }
        }
    }

    /// A copy goes to another place, or is dropped and begins anew, perhaps before its node hears of it.
    fn move_copy(&mut self, node: u16, other: u16, at: Nanos) {
        let device = self.cluster.users[self.random.below(self.cluster.users.len() as u64) as usize];
        let within = |random: &mut Random, ms: u64| at + random.below(ms * MS);
        // Where it has a copy that it does not serve, if it has one at all.
        let held = self.cluster.copies_of(device).get(1).copied();
        let (other, node, disk) = match held {
            Some((holder, disk)) => (holder, node, disk),
            None => (other, node, self.disk()),
        };
        if self.random.one_in(2) {
            let then = at + self.one_of(&[20, 300, 2_000]) * MS;
            self.cluster.plan(at, Fault::AddCopy { device, node, disk });
            self.cluster.plan(then, Fault::DropCopy { device, node: other });
            return;
        }
        let node = other;
        let drop = within(self.random, 300);
        let again = drop + self.one_of(&[100, 800, 3_000]) * MS + self.random.below(200 * MS);
        match self.random.below(4) {
            // It hears of neither before both are done.
            0 | 1 => {
                self.cluster.plan(at, Fault::NoManager { node, on: true });
                // What waits on its connection goes with that: of all maps it gets the newest.
                self.cluster.plan(again + 50 * MS, Fault::CutControl { node });
                self.cluster.plan(again + 100 * MS, Fault::NoManager { node, on: false });
            }
            2 => self.stop(at, again + 100 * MS, Fault::Kill { node }, node),
            // What is under way in the slot when it is given up is still under way when it is wanted again.
            _ => {
                let stuck = |hung| Fault::Disk { node, disk, wrong: Wrong::Hung(hung) };
                self.cluster.plan(drop.saturating_sub(10 * MS), stuck(true));
                self.cluster.plan(again + self.random.below(300 * MS), stuck(false));
            }
        }
        self.cluster.plan(drop, Fault::DropCopy { device, node });
        let device = if self.random.one_in(2) {
            device
        } else {
            self.cluster.users[self.random.below(self.cluster.users.len() as u64) as usize]
        };
        self.cluster.plan(again, Fault::AddCopy { device, node, disk });
    }

    fn stop(&mut self, at: Nanos, until: Nanos, stop: Fault, node: u16) {
        self.cluster.plan(at, stop);
        self.cluster.plan(until, Fault::Start { node });
    }

    fn silence(&mut self, at: Nanos, until: Nanos, from: u16, to: u16) {
        self.cluster.plan(at, Fault::Silence { from, to, on: true });
        self.cluster.plan(until, Fault::Silence { from, to, on: false });
    }
}

/// Runs one seed.
pub fn run(seed: u64, trace: bool) -> Outcome {
    let mut random = Random::new(seed ^ 0x5eed);
    // A broken disk is one failure: no other may take the remaining copy's unflushed data.
    let broken = random.one_in(4);
    let nodes = [2, 2, 3, 3, 4, 5][random.below(6) as usize];
    // Drawn apart: the seeds without a spare are what they were.
    let spares = u16::from(nodes < 5 && Random::new(seed ^ 0x59a7e).one_in(4));
    let mut shape = Shape {
        nodes: nodes + spares,
        spares,
        disks: [1, 1, 2, 3][random.below(4) as usize],
        pairs: random.one_in(2),
        copies: if nodes >= 3 && random.below(4) > 0 { 3 } else { 2 },
        devices: 2 + random.below(2) as usize,
        // A device of one copy does not outlive its disk.
        mirrored_only: broken,
        drift: random.one_in(2),
        depth: [1, 3, 6][random.below(3) as usize],
        discards: random.one_in(2),
        wanders: random.one_in(2),
        // Drawn apart as well.
        policy: DevicePolicy {
            commit: if Random::new(seed ^ 0xdefe2).one_in(3) { Commit::Deferred } else { Commit::Immediate },
            on_no_quorum: match Random::new(seed ^ 0xe2202).one_in(8) {
                true => OnNoQuorum::Error,
                false => OnNoQuorum::Wait,
            },
        },
        operator: false,
    };
    let mut operator = operator::of_seed(seed);
    if let Some(random) = &mut operator {
        operator::make_room(&mut shape, random);
    }
    let mut cluster = Cluster::new(seed, shape, trace);
    let mut faults = [0; Class::ALL.len()];
    let count = match broken {
        true => 1 + random.below(3),
        // Now and then nothing goes wrong.
        false if random.one_in(16) => 0,
        false => 1 + random.below(4),
    };
    // About when the first requests come.
    let mut last = 1_000 * MS;
    let mut planner = Planner { cluster: &mut cluster, random: &mut random, shape };
    for index in 0..count {
        let classes: &[Class] = match (broken, index) {
            (true, 0) => &[DiskError, DiskDeath],
            (true, _) if is_impatient(seed) => &Class::HARMLESS[..3],
            (true, _) => &Class::HARMLESS,
            (false, _) => &Class::PASSING,
        };
        let close = index > 0 && planner.random.one_in(3);
        last = planner.draw(classes, last, close, &mut faults);
    }
    if let Some(random) = &mut operator {
        operator::plan(&mut cluster, shape, random, operator::wishes_more(seed), last + 1_000 * MS);
    }
    cluster.run_until(last + 500 * MS + random.below(1_000 * MS));
    if count > 0 {
        cluster.run_until(cluster.now + random.below(3_000 * MS));
    }
    // Once nobody counts on the broken disk any more, anything may happen to the others.
    if broken && random.one_in(2) && cluster.broken_are_out() {
        let mut last = cluster.now;
        let mut planner = Planner { cluster: &mut cluster, random: &mut random, shape };
        for index in 0..1 + planner.random.below(3) {
            let close = index > 0 && planner.random.one_in(3);
            last = planner.draw(&Class::PASSING, last, close, &mut faults);
            faults[WithoutADisk as usize] += 1;
        }
        cluster.run_until(last + 500 * MS + random.below(3_000 * MS));
    }
    finish(&mut cluster);
    faults[LateFrame as usize] = cluster.late_frames;
    faults[Regenerated as usize] = cluster.plans_done;
    Outcome {
        violations: std::mem::take(&mut cluster.checker.violations),
        hash: cluster.hash,
        completed: cluster.completed,
        reads: cluster.checker.reads,
        faults,
        deeds: cluster.deeds,
    }
}

/// Heals everything; then all must be answered, every device be served whole, and the copies be equal.
pub fn finish(cluster: &mut Cluster) {
    cluster.heal();
    cluster.run_until(cluster.now + 500 * MS);
    cluster.busy = false;
    answered(cluster);
    for device in cluster.users.clone() {
        read_all(cluster, device);
    }
    cluster.run_until(cluster.now + 100 * MS);
    rejoined(cluster);
    if cluster.checker.violations.is_empty() {
        cluster.check_copies();
        cluster.check_members();
        cluster.compare_copies(false);
        cluster.compare_copies(true);
    }
}

/// Everything that was asked for is answered in time.
fn answered(cluster: &mut Cluster) {
    let began = cluster.now;
    while cluster.now < began + LIVENESS && cluster.checker.violations.is_empty() {
        cluster.run_until(cluster.now + 500 * MS);
        if cluster.unanswered().is_empty() && cluster.now > began + 3_000 * MS {
            return;
        }
    }
    let late = cluster.unanswered();
    if cluster.checker.violations.is_empty() && !late.is_empty() {
        let waiting = cluster.waiting();
        cluster.checker.violations.push(format!("not answered: {late:#?}, {waiting:#?}"));
    }
}

/// A device is served: all that was ever written, and something of what was not.
fn read_all(cluster: &mut Cluster, device: usize) {
    let length = SLICE / 8;
    let mut asked = Vec::new();
    let deadline = cluster.now + LIVENESS;
    let sectors = length as usize / SECTOR;
    let mut pieces: BTreeSet<u32> =
        cluster.checker.written(device).map(|sector| (sector / sectors) as u32).collect();
    pieces.insert(cluster.random.below(u64::from(SLICES * 8)) as u32);
    for piece in pieces {
        let read = Wish { kind: RequestKind::Read, offset: u64::from(piece * length), length };
        loop {
            if !cluster.checker.violations.is_empty() {
                return;
            }
            if let Some(token) = cluster.submit(device, read) {
                asked.push(token);
                break;
            }
            if cluster.now > deadline {
                let waiting = cluster.waiting();
                let wrong = format!("device {device} is exported by nobody: {waiting:#?}");
                cluster.checker.violations.push(wrong);
                return;
            }
            cluster.run_until(cluster.now + 100 * MS);
        }
    }
    while cluster.now < deadline && cluster.checker.violations.is_empty() {
        if asked.iter().all(|token| cluster.results.contains_key(token)) {
            return;
        }
        cluster.run_until(cluster.now + 10 * MS);
    }
    if let Some(token) = asked.iter().find(|token| !cluster.results.contains_key(token)) {
        let waiting = cluster.waiting();
        cluster.checker.violations.push(format!("read {token} is not answered: {waiting:#?}"));
    }
}

/// Every copy that can be is in sync again in time.
fn rejoined(cluster: &mut Cluster) {
    let deadline = cluster.now + REJOIN_WITHIN;
    while cluster.checker.violations.is_empty() {
        cluster.conclude_plans();
        let Err(away) = cluster.all_rejoined() else { return };
        if cluster.now > deadline {
            let waiting = cluster.waiting();
            cluster.checker.violations.push(format!("{away}: {waiting:#?}"));
            return;
        }
        cluster.run_until(cluster.now + 100 * MS);
    }
}

/// What that seed shows with a mistake planted, if it shows anything.
#[cfg(feature = "planted-bugs")]
pub fn broken_by(bug: mirror_net::planted::Bug, seed: u64) -> Option<String> {
    mirror_net::planted::set(Some(bug));
    let outcome = std::panic::catch_unwind(|| run(seed, false));
    mirror_net::planted::set(None);
    match outcome {
        Ok(outcome) => outcome.violations.into_iter().next(),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            Some(text.unwrap_or_else(|| "panicked".to_owned()))
        }
    }
}
