//! One seed's story: a cluster, its users, what goes wrong, and the end, when all must be well.

use crate::sim::cluster::{Cluster, Fault, Shape, Wrong};
use crate::sim::node::SLICE;
use crate::sim::scheduler::{MS, Nanos, Random};
use crate::sim::workload::{SLICES, Wish};
use mirror_net::engine::action::RequestKind;

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
}

use Class::*;

impl Class {
    /// All, in the order of their counts.
    pub const ALL: [Self; 24] = [
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
    ];

    /// What can be planned while nothing is broken for ever.
    const PASSING: [Self; 22] = [
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
        // The rarest way to go wrong needs two things at a time: it is drawn twice as often.
        Deposed,
        Deposed,
        Moved,
        Moved,
        Lost,
    ];

    /// What takes no copy out of service, and so may come together with a broken disk.
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
            DiskError => {
                let wrong = self.one_of(&[Wrong::Writes, Wrong::OneWrite, Wrong::Flush, Wrong::Metadata]);
                let disk = self.disk();
                self.cluster.plan(at, Fault::Disk { node, disk, wrong });
            }
            DiskDeath => {
                let disk = self.disk();
                self.cluster.plan(at, Fault::Disk { node, disk, wrong: Wrong::Dead });
            }
            Deposed => self.depose(node, other, at),
            Moved => self.move_copy(node, other, at),
            Lost => {
                let fault =
                    if self.random.one_in(2) { Fault::PowerCut { node } } else { Fault::Kill { node } };
                let until = at + self.one_of(&[4_500, 6_000, 9_000]) * MS;
                self.stop(at, until, fault, node);
            }
            // What is left of a lane that is lost, and what follows by itself.
            LateFrame | Regenerated => {}
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
        match self.random.below(7) {
            0 => {
                let (restart, down) = (within(self.random, 300), self.random.below(20 * MS));
                let stop = if self.random.one_in(3) {
                    Fault::PowerCut { node: other }
                } else {
                    Fault::Kill { node: other }
                };
                self.stop(restart, restart + down, stop, other);
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
        let held = self.cluster.secondary_of(device);
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
    let shape = Shape {
        nodes: nodes + spares,
        spares,
        disks: [1, 1, 2, 3][random.below(4) as usize],
        pairs: random.one_in(2),
        copies: if nodes >= 3 && random.one_in(2) { 3 } else { 2 },
        devices: 2 + random.below(2) as usize,
        // A device of one copy does not outlive its disk.
        mirrored_only: broken,
        drift: random.one_in(2),
        depth: [1, 4, 12][random.below(3) as usize],
        discards: random.one_in(2),
        wanders: random.one_in(2),
    };
    let mut cluster = Cluster::new(seed, shape, trace);
    let mut faults = [0; Class::ALL.len()];
    let count = if broken { 1 + random.below(3) } else { random.below(5) };
    // About when the first requests come.
    let mut last = 1_000 * MS;
    for index in 0..count {
        let at = if random.one_in(3) && index > 0 {
            last + random.below(30 * MS)
        } else {
            last + random.below(1_500 * MS)
        };
        let mut planner = Planner { cluster: &mut cluster, random: &mut random, shape };
        let class = match (broken, index) {
            (true, 0) => planner.one_of(&[DiskError, DiskDeath]),
            (true, _) => planner.one_of(&Class::HARMLESS),
            (false, _) => planner.one_of(&Class::PASSING),
        };
        planner.plan(class, at);
        faults[class as usize] += 1;
        // While it is away, the rest comes about when its copies are made again.
        last = if class == Lost { at + 4_000 * MS } else { at };
    }
    cluster.run_until(last + 500 * MS + random.below(1_000 * MS));
    if count > 0 {
        cluster.run_until(cluster.now + random.below(3_000 * MS));
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

/// A device is served, all of it.
fn read_all(cluster: &mut Cluster, device: usize) {
    let length = SLICE / 4;
    let mut asked = Vec::new();
    let deadline = cluster.now + LIVENESS;
    for piece in 0..SLICES * 4 {
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
