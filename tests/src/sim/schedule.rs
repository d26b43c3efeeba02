//! One seed's story: a cluster, its users, what goes wrong, and the end, when all must be well.

use crate::sim::cluster::{Cluster, Fault, Shape};
use crate::sim::node::SLICE;
use crate::sim::scheduler::{MS, Nanos, Random};
use crate::sim::workload::{SLICES, Wish};
use mirror_net::engine::action::RequestKind;

/// Classes of faults, for counting.
pub const CLASSES: [&str; 13] = [
    "kill",
    "power cut",
    "pause",
    "lane loss",
    "silence",
    "no manager",
    "disk error",
    "failover",
    "claim move",
    "power cut of all",
    "manager crash",
    "control connection",
    "unreadable sector",
];

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
    /// How often each class of fault occurred.
    pub faults: [u64; CLASSES.len()],
}

/// Within so long after the last fault everything is answered.
const LIVENESS: Nanos = 20_000 * MS;

fn plan_fault(cluster: &mut Cluster, random: &mut Random, shape: Shape, at: Nanos, disks: bool) -> usize {
    let node = random.range(1, u64::from(shape.nodes) + 1) as u16;
    let other = (node % shape.nodes) + 1;
    let later = at + [50, 300, 1_500, 4_000][random.below(4) as usize] * MS + random.below(100 * MS);
    let device = random.below(shape.devices as u64) as usize;
    let class = random.below(if disks { 9 } else { 13 }) as usize;
    match class {
        0 | 1 => {
            let stop = if class == 0 { Fault::Kill { node } } else { Fault::PowerCut { node } };
            cluster.plan(at, stop);
            cluster.plan(later, Fault::Start { node });
        }
        2 => cluster.plan(at, Fault::Pause { node, ms: [20, 300, 1_050, 3_000][random.below(4) as usize] }),
        3 => cluster.plan(at, Fault::CutLane { a: node, b: other }),
        4 => {
            let (from, to) = if random.one_in(2) { (node, other) } else { (other, node) };
            for (from, to) in [(from, to), (to, from)] {
                cluster.plan(at, Fault::Silence { from, to, on: true });
                cluster.plan(later, Fault::Silence { from, to, on: false });
                if random.one_in(2) {
                    break;
                }
            }
        }
        5 => {
            cluster.plan(at, Fault::NoManager { node, on: true });
            cluster.plan(later, Fault::NoManager { node, on: false });
            if random.one_in(2) {
                // From everybody: it does not learn what the others do without it.
                for peer in (1..=shape.nodes).filter(|peer| *peer != node) {
                    for (from, to) in [(node, peer), (peer, node)] {
                        cluster.plan(at, Fault::Silence { from, to, on: true });
                        cluster.plan(later, Fault::Silence { from, to, on: false });
                    }
                }
            }
        }
        6 if disks => {
            let fault = [Fault::DiskWrites { node }, Fault::DiskFlush { node }, Fault::DiskMetadata { node }];
            cluster.plan(at, fault[random.below(3) as usize]);
        }
        6 => return plan_fault(cluster, random, shape, at, disks),
        7 => cluster.plan(at, Fault::FailOver { node }),
        8 => cluster.plan(at, Fault::MoveClaim { device, node }),
        10 => {
            cluster.plan(at, Fault::KillManager);
            cluster.plan(later, Fault::StartManager);
        }
        11 => cluster.plan(at, Fault::CutControl { node }),
        12 => {
            for _ in 0..16 {
                let (slot, offset) = (random.below(10) as u32, random.below(24) as u32 * 512);
                cluster.plan(at, Fault::BadSector { node, slot, offset });
            }
        }
        _ => {
            for node in 1..=shape.nodes {
                if random.below(8) > 0 {
                    let jitter = random.below(20 * MS);
                    cluster.plan(at + jitter, Fault::PowerCut { node });
                    cluster.plan(later + random.below(500 * MS), Fault::Start { node });
                }
            }
        }
    }
    class
}

/// Runs one seed.
pub fn run(seed: u64, trace: bool) -> Outcome {
    let mut random = Random::new(seed ^ 0x5eed);
    let nodes = 2 + random.below(2) as u16;
    let mut shape = Shape {
        nodes,
        copies: if nodes == 3 && random.one_in(3) { 3 } else { 2 },
        devices: 2,
        drift: random.one_in(2),
        depth: [1, 4, 12][random.below(3) as usize],
        discards: random.one_in(2),
    };
    let mut faults = [0; CLASSES.len()];
    // A broken disk is one failure: no other may take the remaining copy's unflushed data.
    let disks = random.one_in(4);
    // A device of one copy does not outlive its disk.
    shape.devices += usize::from(!disks && random.one_in(2));
    let shape = shape;
    let mut cluster = Cluster::new(seed, shape, trace);
    let count = if disks { 1 } else { random.below(5) };
    let mut last = 1_500 * MS;
    for index in 0..count {
        let at = if random.one_in(3) && index > 0 {
            last + random.below(30 * MS)
        } else {
            last + random.below(1_500 * MS)
        };
        faults[plan_fault(&mut cluster, &mut random, shape, at, disks)] += 1;
        last = at;
    }
    cluster.run_until(last + 500 * MS + random.below(1_000 * MS));
    let stop = cluster.now;
    cluster.run_until(stop + if count > 0 { 2_000 * MS } else { 0 });
    finish(&mut cluster, shape);
    Outcome {
        violations: std::mem::take(&mut cluster.checker.violations),
        hash: cluster.hash,
        completed: cluster.completed,
        reads: cluster.checker.reads,
        faults,
    }
}

/// Heals everything; then all must be answered, every device be served whole, and the copies be equal.
pub fn finish(cluster: &mut Cluster, shape: Shape) {
    cluster.run_until(cluster.now + 2_500 * MS);
    cluster.heal();
    cluster.busy = false;
    let end = cluster.now + LIVENESS;
    while cluster.now < end && cluster.checker.violations.is_empty() {
        cluster.run_until(cluster.now + 500 * MS);
        if cluster.unanswered().is_empty() && cluster.now + LIVENESS > end + 3_000 * MS {
            break;
        }
    }
    if !cluster.checker.violations.is_empty() {
        return;
    }
    let late = cluster.unanswered();
    if !late.is_empty() {
        let waiting = cluster.waiting();
        cluster.checker.violations.push(format!("not answered: {late:#?}, {waiting:#?}"));
        return;
    }
    let length = SLICE / 4;
    for device in 0..shape.devices {
        let mut asked = Vec::new();
        let deadline = cluster.now + LIVENESS;
        for piece in 0..SLICES * 4 {
            let read = Wish { kind: RequestKind::Read, offset: u64::from(piece * length), length };
            loop {
                if let Some(token) = cluster.submit(device, read) {
                    asked.push(token);
                    break;
                }
                if cluster.now > deadline {
                    let waiting = cluster.waiting();
                    cluster
                        .checker
                        .violations
                        .push(format!("device {device} is exported by nobody: {waiting:#?}"));
                    return;
                }
                cluster.run_until(cluster.now + 100 * MS);
            }
        }
        while cluster.now < deadline && cluster.checker.violations.is_empty() {
            if asked.iter().all(|token| cluster.results.contains_key(token)) {
                break;
            }
            cluster.run_until(cluster.now + 10 * MS);
        }
        if let Some(token) = asked.iter().find(|token| !cluster.results.contains_key(token)) {
            let waiting = cluster.waiting();
            cluster.checker.violations.push(format!("read {token} is not answered: {waiting:#?}"));
        }
    }
    cluster.run_until(cluster.now + 100 * MS);
    if cluster.checker.violations.is_empty() {
        cluster.compare_copies();
    }
}
