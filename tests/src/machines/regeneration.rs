//! A node, or a disk of one, dies for good under load, and what it had is made again on the spare.
//!
//! Of the dead node n2 the devices have stamped blocks from the host, elsewhere programs run on a file system. Of a dead
//! disk it is the file system itself that lies on it: its machine lives, and nothing on it may notice. Where there is no
//! spare, a third disk is emptied and becomes it.

use super::tenant::Tenants;
use super::{Lab, Options};
use crate::nbd::NbdClient;
use crate::stamps::Workload;
use anyhow::{Context, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Whoever dies is this one: the second of the first pair.
const VICTIM: usize = 1;
const VICTIMS_DEVICE: &str = "n2-d1";
/// The device whose mirror lies there.
const MIRRORED_THERE: &str = "n1-d1";
const ELSEWHERE: &str = "n4-d1";
const CONNECTIONS: u64 = 2;
/// A failover may take this long where nothing is slow.
const FAILOVER_WITHIN: Duration = Duration::from_secs(3);
/// And a file system whose disk dies may stand still for this long.
const STALL_MOST: Duration = Duration::from_secs(2);
/// What digests, headers and the last regions of both devices cost beside what was lost.
const SLACK_BYTES: u64 = 1 << 20;
/// Of each device with stamps, filled before.
const FILLED_BYTES: u64 = 32 << 20;
/// Behind all stamps.
const FILLED_AT: u64 = 128 << 20;
const PIECE_BYTES: u64 = 256 << 10;

/// What dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dies {
    /// A machine loses power and stays off.
    Node,
    /// One of a machine's two disks fails whatever is asked of it.
    Disk,
    /// A machine's only disk does, and there is no spare, but room on the others.
    DiskWithoutSpare,
}

/// Four nodes, and a spare if there is one.
pub fn options(dies: Dies) -> Options {
    let base = Options { memory_mib: 384, ..Options::default() };
    match dies {
        Dies::Node => Options { nodes: 5, spares: 1, ..base },
        Dies::Disk => Options { nodes: 5, spares: 1, disks: 2, ..base },
        Dies::DiskWithoutSpare => Options { nodes: 4, disk_mib: 768, ..base },
    }
}

/// Runs it in that directory, and says what came of it.
pub fn run(dir: &Path, options: &Options, dies: Dies, programs: &[&'static str]) -> anyhow::Result<()> {
    let lab = Lab::up(dir, options)?;
    println!("{}; a silent node has failed after {:.1} s", lab.calibration, lab.fail_after.as_secs_f64());
    lab.create_cluster()?;
    if dies == Dies::DiskWithoutSpare {
        // Both segments of every disk could take what another disk has.
        lab.make_roomy(&format!("{}M", (FILLED_AT + FILLED_BYTES) >> 20))?;
    }
    let (stamped, tenanted): (&[&str], _) = match dies {
        Dies::Node => (&[VICTIMS_DEVICE, MIRRORED_THERE], ELSEWHERE),
        Dies::Disk | Dies::DiskWithoutSpare => (&[MIRRORED_THERE], VICTIMS_DEVICE),
    };
    for device in stamped {
        fill(&lab, device)?;
    }
    let workload = Workload::new(&lab, options.seed, stamped, CONNECTIONS);
    let mut tenants = Tenants::new(&lab, tenanted, programs)?;
    let told = || lab.logs();
    workload.run(|| {
        tenants.busy(3)?;
        let story = Story { lab: &lab, dies };
        story.tell(&workload, &mut tenants).with_context(told)
    })
}

/// Something to be made again, where no stamps are written.
fn fill(lab: &Lab, device: &str) -> anyhow::Result<()> {
    let uri = lab.until("a device to be served", || lab.reach(device))?;
    let mut client = NbdClient::connect(&uri)?;
    for piece in 0..FILLED_BYTES / PIECE_BYTES {
        client.write(FILLED_AT + piece * PIECE_BYTES, &vec![piece as u8 + 1; PIECE_BYTES as usize])?;
    }
    client.flush()
}

struct Story<'a> {
    lab: &'a Lab,
    dies: Dies,
}

impl Story<'_> {
    fn tell(&self, workload: &Workload<'_>, tenants: &mut Tenants<'_>) -> anyhow::Result<()> {
        let lab = self.lab;
        let victim = lab.node(VICTIM);
        tenants.begin_gap();
        let begun = Instant::now();
        match self.dies {
            Dies::Node => {
                super::machine::Machine::cut(&[victim]);
                lab.until("its device to be served by its partner", || {
                    let exporter = lab.exported(VICTIMS_DEVICE)?;
                    Ok(exporter.filter(|(machine, _)| machine.number != victim.number))
                })?;
                self.compare("failover", begun.elapsed(), FAILOVER_WITHIN);
            }
            Dies::Disk | Dies::DiskWithoutSpare => drop(victim.order("fail")?),
        }
        let acknowledged = workload.counts.acknowledged.load(Relaxed);
        lab.until("a plan, begun by itself", || {
            let plans = lab.json(&["plan", "list"])?;
            Ok(plans.as_array().is_some_and(|plans| !plans.is_empty()).then_some(()))
        })?;
        println!("a plan began after {:.1} s", begun.elapsed().as_secs_f64());
        lab.until("every copy to be in sync, none where they died", || {
            let over = lab.json(&["plan", "list"])?.as_array().is_some_and(Vec::is_empty);
            Ok((over && self.is_whole(&lab.json(&["map", "show"])?)).then_some(()))
        })?;
        println!("every device has all its copies after {:.1} s", begun.elapsed().as_secs_f64());
        tenants.busy(3)?;
        ensure!(
            workload.counts.acknowledged.load(Relaxed) > acknowledged,
            "nothing was written while it went on"
        );
        if self.dies != Dies::Node {
            let longest = tenants.longest_gap();
            self.compare("the file system's longest stall", longest, STALL_MOST);
            tenants.all_run().context("a program on the file system of the dead disk has ended")?;
        }
        workload.pause()?;
        workload.check().context("the stamped blocks")?;
        tenants.check(false).context("the programs")?;
        let spare = self.spare()?;
        self.moved_what_was_lost(&spare)?;
        self.copies_are_equal(&spare, tenants)
    }

    /// Prints a time beside what it may be, both as they would be where nothing is slow.
    fn compare(&self, what: &str, time: Duration, most: Duration) {
        let factor = self.lab.calibration.factor;
        println!(
            "{what}: {:.1} s here, of {:.1} s at most ({} s times the factor of {factor:.1})",
            time.as_secs_f64(),
            self.lab.calibration.scale(most).as_secs_f64(),
            most.as_secs(),
        );
    }

    /// Whether every mirrored device has as many copies in sync as it should, and what died has none.
    fn is_whole(&self, map: &Value) -> bool {
        let victim = self.lab.node(VICTIM).name.as_str();
        let dead = |replica: &Value| {
            replica["node"] == victim && (self.dies == Dies::Node || replica["disk"] == "d1")
        };
        let devices = map["devices"].as_array().into_iter().flatten();
        devices.filter(|device| device["copies"].as_u64() > Some(1)).all(|device| {
            let spans = device["spans"].as_array().into_iter().flatten();
            spans.clone().count() > 0
                && spans.into_iter().all(|span| {
                    let replicas = span["replicas"].as_array().map_or(&[][..], Vec::as_slice);
                    replicas.len() as u64 == device["copies"].as_u64().unwrap_or(0)
                        && replicas.iter().all(|replica| replica["state"] == "in_sync" && !dead(replica))
                })
        })
    }

    /// The node of the disk that took the place of what died. One that was emptied for it has nothing else on it.
    fn spare(&self) -> anyhow::Result<String> {
        if self.dies != Dies::DiskWithoutSpare {
            return Ok(self.lab.nodes()[self.lab.nodes().len() - 1].name.clone());
        }
        let map = self.lab.json(&["map", "show"])?;
        let mut on_it: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for device in map["devices"].as_array().into_iter().flatten() {
            let name = device["name"].as_str().context("a device without a name")?;
            let spans = device["spans"].as_array().into_iter().flatten();
            for replica in spans.flat_map(|span| span["replicas"].as_array().into_iter().flatten()) {
                on_it.entry(replica["node"].as_str().context("no node")?).or_default().insert(name);
            }
        }
        let lost = BTreeSet::from([MIRRORED_THERE, VICTIMS_DEVICE]);
        let third = on_it.iter().find(|(_, devices)| **devices == lost);
        let (third, _) =
            third.with_context(|| format!("no disk has what died, and nothing else: {on_it:?}"))?;
        println!("the disk of {third} was emptied, and has what died now: {on_it:?}");
        Ok((*third).to_owned())
    }

    /// Bytes that resyncs to the spare moved, against what the devices concerned hold.
    fn moved_what_was_lost(&self, spare: &str) -> anyhow::Result<()> {
        let mut moved: BTreeMap<String, u64> = BTreeMap::new();
        for machine in self.lab.nodes() {
            let log = std::fs::read_to_string(machine.dir().join("stderr")).unwrap_or_default();
            let log = log + &std::fs::read_to_string(machine.dir().join("stdout")).unwrap_or_default();
            for line in log.lines().filter(|line| line.contains("its copies are equal device=")) {
                let value = |name: &str| {
                    let rest = line.split(&format!("{name}=")).nth(1)?;
                    rest.split_ascii_whitespace().next().map(|word| word.trim_matches('"').to_owned())
                };
                if value("node").as_deref() == Some(spare) && self.was_lost(value("device").as_deref()) {
                    let bytes: u64 = value("moved_bytes").context("no bytes")?.parse()?;
                    *moved.entry(value("device").context("no device")?).or_default() += bytes;
                }
            }
        }
        ensure!(moved.len() == 2, "both segments are made again on the spare: {moved:?}");
        let usage = self.lab.json(&["broadcast", "usage"])?;
        let held = |device: &str| {
            let mut devices = usage["devices"].as_array().into_iter().flatten();
            let found = devices.find(|found| found["device"] == device)?;
            found["result"].as_u64().or_else(|| found["result"].as_str()?.parse().ok())
        };
        let mut lost = 0;
        for device in moved.keys() {
            lost += held(device).with_context(|| format!("{device} in {usage}"))?;
        }
        let sum: u64 = moved.values().sum();
        println!("moved {sum} bytes for {lost} that were lost: {:.3} times", sum as f64 / lost as f64);
        ensure!(sum <= lost + lost / 20 + SLACK_BYTES, "{sum} bytes for {lost}: {moved:?}");
        Ok(())
    }

    /// Whether a device had a copy on what died.
    fn was_lost(&self, device: Option<&str>) -> bool {
        device == Some(MIRRORED_THERE) || device == Some(VICTIMS_DEVICE)
    }

    /// A checksum of what one copy holds, and of what the other does once the roles are exchanged.
    fn copies_are_equal(&self, spare: &str, tenants: &mut Tenants<'_>) -> anyhow::Result<()> {
        tenants.rest()?;
        let lab = self.lab;
        let sums = || -> anyhow::Result<BTreeMap<String, String>> {
            lab.until("a checksum of everything that is mirrored", || {
                let answer = lab.json(&["broadcast", "checksum"])?;
                let devices = answer["devices"].as_array().context("no devices")?;
                let mirrored = devices.iter().filter(|device| {
                    !device["device"].as_str().is_some_and(|name| name.contains("unmirrored"))
                });
                let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
                let sums: BTreeMap<String, String> =
                    mirrored.map(|device| (text(&device["device"]), text(&device["result"]))).collect();
                let unserved = answer["unserved"].as_array().context("no unserved")?;
                let missing = unserved.iter().any(|slices| sums.contains_key(&text(&slices["device"])));
                Ok((!missing && !sums.is_empty()).then_some(sums))
            })
        };
        let before = sums()?;
        for node in [spare, &lab.node(0).name] {
            // What it is primary of goes to the other copy; what it mirrors stays.
            let answer = lab.json(&["node", "failover", node])?;
            let moved = answer["moved"].as_array().into_iter().flatten().filter_map(Value::as_str);
            ensure!(moved.into_iter().any(|line| line.contains("primary ")), "nothing moves: {answer}");
            let after = sums()?;
            ensure!(after == before, "after a failover of {node}: {after:?}, before: {before:?}");
        }
        println!(
            "the copies are equal: {} devices have the checksums that they had on the others",
            before.len()
        );
        Ok(())
    }
}
