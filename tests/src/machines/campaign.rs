//! Power cuts and cut cables, round after round, chosen by a seed; after each round everything has to be well again, and
//! everything that was acknowledged has to be there.

use super::machine::Machine;
use super::tenant::Tenants;
use super::{Lab, Options};
use crate::nbd::NbdClient;
use crate::sim::disk::SECTOR;
use crate::sim::scheduler::Random;
use crate::stamps::{Served, Workload};
use anyhow::{Context, ensure};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// The device that blocks with stamps are written to, and the one with the file system.
const STAMPED: &str = "n1-d1";
const TENANTED: &str = "n2-d1";
const CONNECTIONS: u64 = 2;

/// What a campaign is.
#[derive(Clone, Debug)]
pub struct Campaign {
    /// The lab's.
    pub lab: Options,
    /// How many rounds.
    pub rounds: u64,
    /// Whether PostgreSQL takes part.
    pub postgres: bool,
    /// Names of the stories that are told, in turn.
    pub stories: Vec<String>,
}

/// The names of all stories.
pub const STORIES: [&str; 11] = [
    "blink",
    "blackout",
    "successive",
    "partition",
    "outage",
    "one-way",
    "exile",
    "partition-then-cut",
    "manager-too",
    "storm",
    "disk",
];

/// What happens in a round.
#[derive(Clone, Copy, Debug)]
enum Story {
    /// A machine loses power and has it back before anybody has noticed.
    Blink(usize),
    /// A machine loses power for longer than it takes to be failed over.
    Outage(usize),
    /// Both lose power at the same moment; which one is switched on first, and how long before the other.
    Blackout { first: usize, apart: Duration },
    /// Nothing gets through between the nodes, for so long; only towards that one, if one is named.
    Partition { deaf: Option<usize>, time: Duration },
    /// A node is cut off from everybody, the manager included, and is failed over; so it has lost its claim when it is back.
    Exile(usize),
    /// The cable breaks, and then that one loses power.
    PartitionThenCut(usize),
    /// One dies, the other goes on alone and dies, and the first returns alone: it has to wait, and to say why.
    Successive(usize),
    /// The manager loses power, and a node with it; which is switched on first.
    ManagerToo { node: usize, manager_first: bool },
    /// A node's disk hangs for so long.
    DiskHangs { node: usize, time: Duration },
    /// Sectors of a node's disk cannot be read.
    BadSectors(usize),
    /// Power cuts of either node at any moment, so many, also while a machine comes up or is being made equal.
    Storm { cuts: u64 },
}

impl Story {
    fn choose(name: &str, random: &mut Random, fail_after: Duration) -> Self {
        let node = random.below(2) as usize;
        let up_to = |random: &mut Random, times: f64| {
            let most = fail_after.mul_f64(times).as_millis() as u64;
            Duration::from_millis(random.below(most))
        };
        match name {
            "blink" => Self::Blink(node),
            "blackout" => Self::Blackout { first: node, apart: up_to(random, 1.0) },
            "successive" => Self::Successive(node),
            "partition" => Self::Partition { deaf: None, time: up_to(random, 3.0) },
            "outage" => Self::Outage(node),
            "one-way" => Self::Partition { deaf: Some(node), time: up_to(random, 3.0) },
            "exile" => Self::Exile(node),
            "partition-then-cut" => Self::PartitionThenCut(node),
            "manager-too" => Self::ManagerToo { node, manager_first: random.one_in(2) },
            "storm" => Self::Storm { cuts: 4 + random.below(5) },
            _ if random.one_in(2) => Self::BadSectors(node),
            _ => Self::DiskHangs { node, time: up_to(random, 2.0) },
        }
    }

    /// Whether all copies may have lost what nobody has flushed: two failures before the copies were equal again.
    fn loses_caches(self) -> bool {
        matches!(
            self,
            Self::Blackout { .. } | Self::Successive(_) | Self::PartitionThenCut(_) | Self::Storm { .. }
        )
    }
}

/// What was done to the machines.
#[derive(Clone, Copy, Default, Debug)]
pub struct Done {
    /// Machines that lost power, each counted.
    pub cuts: u64,
    /// Of those, the ones that lost it together with another.
    pub common: u64,
    /// Cut cables.
    pub partitions: u64,
    /// Faults of disks.
    pub disk_faults: u64,
}

impl Served for Lab {
    fn find(&self, device: &str) -> Option<String> {
        let found = self.reach(device).ok().flatten();
        if found.is_none() {
            // Asking costs the emulated machines more than it brings.
            std::thread::sleep(Duration::from_millis(300));
        }
        found
    }

    fn reply_within(&self) -> Duration {
        2 * self.patience()
    }

    fn logs(&self) -> String {
        Lab::logs(self)
    }
}

impl Campaign {
    /// Runs it in that directory, which is left as it is. Prints a line a round, and the counts at the end.
    pub fn run(&self, dir: &Path) -> anyhow::Result<Done> {
        let unknown = self.stories.iter().find(|name| !STORIES.contains(&name.as_str()));
        ensure!(unknown.is_none() && !self.stories.is_empty(), "stories are {}", STORIES.join(", "));
        let (seed, begun) = (self.lab.seed, Instant::now());
        println!("soak: {} rounds on the {} kernel, seed {seed}", self.rounds, self.lab.kernel);
        let lab = Lab::up(dir, &self.lab)?;
        println!("{}; a silent node has failed after {:.1} s", lab.calibration, lab.fail_after.as_secs_f64());
        lab.create_cluster()?;
        let workload = Workload::new(&lab, seed, &[STAMPED], CONNECTIONS);
        let programs: &[&str] =
            if self.postgres { &["sqlite", "fio", "postgres"] } else { &["sqlite", "fio"] };
        flushes_reach_both_disks(&lab)?;
        let mut tenants = Tenants::new(&lab, TENANTED, programs)?;
        let mut rounds =
            Rounds { lab: &lab, workload: &workload, random: Random::new(seed), done: Done::default() };
        workload.run(|| {
            for round in 0..self.rounds {
                let story = Story::choose(
                    &self.stories[round as usize % self.stories.len()],
                    &mut rounds.random,
                    lab.fail_after,
                );
                let told = || format!("round {round} of seed {seed}, {story:?}");
                let started = Instant::now();
                rounds.tell(story, &mut tenants).with_context(told).with_context(|| lab.logs())?;
                println!(
                    "round {round}: {story:?}: well after {:.1} s; {} cuts so far, {} writes, {} flushes, rows {:?}",
                    started.elapsed().as_secs_f64(),
                    rounds.done.cuts,
                    workload.counts.acknowledged.load(Relaxed),
                    workload.counts.flushes.load(Relaxed),
                    tenants.rows(),
                );
            }
            Ok(())
        })?;
        let counts = &workload.counts;
        ensure!(
            counts.acknowledged.load(Relaxed) > 10 * self.rounds,
            "hardly anything was written: {counts:?}"
        );
        let Done { cuts, common, partitions, disk_faults } = rounds.done;
        println!(
            "soak: seed {seed}, {} kernel: {cuts} power cuts ({common} of them of two machines at once), {partitions} \
             partitions, {disk_faults} disk faults in {} rounds and {:.0} s; acknowledged were {} writes and {} flushes, {} blocks \
             were read and compared while it went on, {} connections broke, rows {:?}; nothing was lost",
            self.lab.kernel,
            self.rounds,
            begun.elapsed().as_secs_f64(),
            counts.acknowledged.load(Relaxed),
            counts.flushes.load(Relaxed),
            counts.reads.load(Relaxed),
            counts.broken.load(Relaxed),
            tenants.rows(),
        );
        Ok(rounds.done)
    }
}

/// An acknowledged flush has flushed the disks of both nodes: without that nothing else here would mean anything.
fn flushes_reach_both_disks(lab: &Lab) -> anyhow::Result<()> {
    const FLUSHES: u64 = 10;
    let counted = || {
        lab.nodes().iter().map(|node| Ok(node.disk_counts()?.flushes)).collect::<anyhow::Result<Vec<u64>>>()
    };
    let uri = lab.until("a device to be served", || lab.reach(STAMPED))?;
    let mut client = NbdClient::connect(&uri)?;
    let before = counted()?;
    for at in 0..FLUSHES {
        // Where no stamps are written.
        client.write((64 << 20) + at * 4096, &[1; 4096])?;
        client.flush()?;
    }
    for (node, (before, after)) in lab.nodes().iter().zip(before.into_iter().zip(counted()?)) {
        let reached = after - before;
        ensure!(reached >= FLUSHES, "of {FLUSHES} flushes {reached} have reached the disk of {}", node.name);
    }
    Ok(())
}

/// A campaign under way.
struct Rounds<'a> {
    lab: &'a Lab,
    workload: &'a Workload<'a>,
    random: Random,
    done: Done,
}

impl Rounds<'_> {
    /// A round: some work, the story, all is well again, and everything that has to be there is.
    fn tell(&mut self, story: Story, tenants: &mut Tenants<'_>) -> anyhow::Result<()> {
        tenants.busy(3)?;
        self.pause_up_to(1000);
        self.happen(story).context("while it happened")?;
        self.lab.healthy()?;
        self.workload.pause()?;
        self.workload.check().context("the stamped blocks")?;
        tenants.check(story.loses_caches()).context("the programs")?;
        self.workload.go_on();
        Ok(())
    }

    fn pause_up_to(&mut self, milliseconds: u64) {
        let factor = self.lab.calibration.factor;
        let time = Duration::from_millis(self.random.below(milliseconds)).mul_f64(factor);
        std::thread::sleep(time);
    }

    fn cut(&mut self, machines: &[&Machine]) {
        Machine::cut(machines);
        self.done.cuts += machines.len() as u64;
        if machines.len() > 1 {
            self.done.common += machines.len() as u64;
        }
    }

    fn happen(&mut self, story: Story) -> anyhow::Result<()> {
        let lab = self.lab;
        match story {
            Story::Blink(node) => {
                self.cut(&[lab.node(node)]);
                lab.start(&[lab.node(node)])
            }
            Story::Outage(node) => {
                self.cut(&[lab.node(node)]);
                self.failed_over(node)?;
                self.pause_up_to(2000);
                lab.start(&[lab.node(node)])
            }
            Story::Blackout { first, apart } => {
                self.cut(&[lab.node(0), lab.node(1)]);
                self.workload.lost_caches();
                lab.node(first).power_on()?;
                std::thread::sleep(apart);
                lab.start(&[lab.node(1 - first)])
            }
            Story::Partition { deaf, time } => {
                self.done.partitions += 1;
                match deaf {
                    Some(node) => lab.partition(lab.node(1 - node), lab.node(node), true),
                    None => lab.partition(lab.node(0), lab.node(1), false),
                }
                std::thread::sleep(time);
                lab.heal();
                Ok(())
            }
            Story::Exile(node) => {
                self.done.partitions += 1;
                lab.partition(lab.node(node), lab.node(1 - node), false);
                lab.partition(lab.node(node), lab.manager(), false);
                self.failed_over(node)?;
                self.pause_up_to(2000);
                lab.heal();
                Ok(())
            }
            Story::PartitionThenCut(node) => {
                self.done.partitions += 1;
                lab.partition(lab.node(0), lab.node(1), false);
                self.pause_up_to(3000);
                self.cut(&[lab.node(node)]);
                self.workload.lost_caches();
                self.pause_up_to(3000);
                lab.heal();
                lab.start(&[lab.node(node)])
            }
            Story::Successive(first) => self.successive(first),
            Story::Storm { cuts } => self.storm(cuts),
            Story::ManagerToo { node, manager_first } => {
                self.cut(&[lab.node(node), lab.manager()]);
                let both = if manager_first {
                    [lab.manager(), lab.node(node)]
                } else {
                    [lab.node(node), lab.manager()]
                };
                lab.start(&both)
            }
            Story::DiskHangs { node, time } => {
                self.done.disk_faults += 1;
                lab.node(node).order("hang")?;
                std::thread::sleep(time);
                lab.node(node).order("heal").map(drop)
            }
            Story::BadSectors(node) => {
                self.done.disk_faults += 1;
                let sectors = lab.node(node).disk_bytes()? / SECTOR as u64;
                for _ in 0..20 {
                    let lba = 2048 + self.random.below(sectors / 2 - 2048);
                    lab.node(node).order(&format!("bad-sector {lba}"))?;
                }
                Ok(())
            }
        }
    }

    /// Each cut machine is on again at once, or after a while.
    fn storm(&mut self, cuts: u64) -> anyhow::Result<()> {
        let lab = self.lab;
        let mut was_cut = [false; 2];
        for _ in 0..cuts {
            let node = self.random.below(2) as usize;
            self.cut(&[lab.node(node)]);
            was_cut[node] = true;
            if was_cut == [true; 2] {
                // The other one may not have been made equal since.
                self.workload.lost_caches();
            }
            if self.random.one_in(2) {
                self.pause_up_to(3000);
            }
            lab.node(node).power_on()?;
            // About what it takes to come up and be made equal.
            self.pause_up_to(16_000);
        }
        lab.nodes().iter().try_for_each(|node| lab.wait_up(node))
    }

    /// Waits until the other node exports everything and is the primary of it.
    fn failed_over(&self, node: usize) -> anyhow::Result<()> {
        let heir = &self.lab.node(1 - node).name;
        self.lab.until(&format!("{heir} to have taken over"), || {
            for device in [STAMPED, TENANTED] {
                if self.lab.exported(device)?.is_none_or(|(machine, _)| machine.name != *heir) {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
    }

    /// The classic: what the second one acknowledged alone is nowhere but there.
    fn successive(&mut self, first: usize) -> anyhow::Result<()> {
        let lab = self.lab;
        self.cut(&[lab.node(first)]);
        self.failed_over(first)?;
        let before = self.workload.counts.acknowledged.load(Relaxed);
        lab.until("the other one to acknowledge alone", || {
            Ok((self.workload.counts.acknowledged.load(Relaxed) > before + 5).then_some(()))
        })?;
        self.cut(&[lab.node(1 - first)]);
        self.workload.lost_caches();
        lab.start(&[lab.node(first)])?;
        self.waits_and_says_why(first)?;
        lab.start(&[lab.node(1 - first)])
    }

    /// That node is up, alone, and has registered; it must not serve what it does not have, and it is said why.
    fn waits_and_says_why(&self, node: usize) -> anyhow::Result<()> {
        let (own, other) = (&self.lab.node(node).name, &self.lab.node(1 - node).name);
        let why = format!("{other}/d1 is not connected");
        self.lab
            .until(&format!("{own} to wait for {other}"), || {
                let status = self.lab.ctl(&["status"])?;
                let registered =
                    status.out.lines().any(|line| line.starts_with(own.as_str()) && line.contains(" up "));
                Ok((registered && status.code == 2).then_some(status.out))
            })
            .and_then(|status| {
                for device in [STAMPED, TENANTED] {
                    let said = status.lines().find(|line| line.contains(device) && line.contains(&why));
                    ensure!(said.is_some(), "nothing says of {device} that {why}:\n{status}");
                    let served = self.lab.exported(device)?;
                    ensure!(
                        served.is_none(),
                        "{own} serves {device}, which lacks what {other} acknowledged alone"
                    );
                }
                Ok(())
            })
    }
}
