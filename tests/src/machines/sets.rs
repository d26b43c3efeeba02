//! A whole switch dies, and once all is well again a whole power feed: every device stays available, since no two copies
//! of anything share either.

use super::machine::Machine;
use super::tenant::Tenants;
use super::{Lab, Options};
use crate::nbd::NbdClient;
use crate::stamps::Workload;
use anyhow::{Context, ensure};
use serde_json::Value;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

/// The power feed and the switch of n1 to n4. n1 and n4 hang on one switch, n1 and n3 on one feed, and the nodes that are
/// next to each other in the file share neither.
const SETS: &[(&str, &str)] =
    &[("feed-a", "switch-x"), ("feed-b", "switch-y"), ("feed-a", "switch-y"), ("feed-b", "switch-x")];
/// By index, as [`SETS`] has them.
const ON_SWITCH_X: [usize; 2] = [0, 3];
const ON_FEED_A: [usize; 2] = [0, 2];
const DEVICES: [&str; 4] = ["n1-d1", "n2-d1", "n3-d1", "n4-d1"];
/// Of the node that outlives all of it.
const TENANTED: &str = "n2-d1";
/// Of a node that dies with the feed, and whose mirror hangs on the dead switch. Whoever uses a device on a node that is cut
/// off waits there until it is back, and is no witness of what others can do.
const STAMPED: [&str; 1] = ["n3-d1"];
/// Behind all stamps.
const PROBED_AT: u64 = 128 << 20;
const SIZE: &str = "160M";

/// Four nodes on two feeds and two switches.
pub fn options() -> Options {
    Options { nodes: 4, disk_mib: 768, memory_mib: 384, sets: SETS, ..Options::default() }
}

/// Runs it in that directory, and says what came of it.
pub fn run(dir: &Path, options: &Options, programs: &[&'static str]) -> anyhow::Result<()> {
    let lab = Lab::up(dir, options)?;
    println!("{}; a silent node has failed after {:.1} s", lab.calibration, lab.fail_after.as_secs_f64());
    lab.create_cluster()?;
    lab.make_roomy(SIZE)?;
    println!("{}", lab.ctl(&["topology", "sets"])?.ok()?.trim());
    lab.until("the topology to be there", || {
        Ok(lab.json(&["plan", "list"])?.as_array().is_some_and(Vec::is_empty).then_some(()))
    })?;
    lab.healthy()?;
    are_apart(&lab.json(&["map", "show"])?)?;
    let workload = Workload::new(&lab, options.seed, &STAMPED, 2);
    let mut tenants = Tenants::new(&lab, TENANTED, programs)?;
    let told = || lab.logs();
    workload.run(|| {
        let story = Story { lab: &lab, workload: &workload };
        story.switch(&mut tenants).context("the switch").with_context(told)?;
        story.feed(&mut tenants).context("the power feed").with_context(told)
    })
}

/// Every two copies of a slice share neither feed nor switch.
fn are_apart(map: &Value) -> anyhow::Result<()> {
    let set = |node: &Value| {
        let number: Option<usize> = node.as_str().and_then(|name| name.strip_prefix('n')?.parse().ok());
        number.and_then(|number| SETS.get(number - 1)).copied().with_context(|| format!("{node} is no node"))
    };
    let mut spans = 0;
    for device in map["devices"].as_array().into_iter().flatten() {
        for span in device["spans"].as_array().into_iter().flatten() {
            let replicas = span["replicas"].as_array().context("no replicas")?;
            let sets = replicas.iter().map(|copy| set(&copy["node"])).collect::<anyhow::Result<Vec<_>>>()?;
            let apart = |one: &(&str, &str), other: &(&str, &str)| one.0 != other.0 && one.1 != other.1;
            ensure!(sets.len() == 2 && apart(&sets[0], &sets[1]), "{} has {sets:?}", device["name"]);
            spans += 1;
        }
    }
    ensure!(spans > 0, "the map has nothing");
    Ok(())
}

struct Story<'a> {
    lab: &'a Lab,
    workload: &'a Workload<'a>,
}

impl Story<'_> {
    /// Whatever hangs on switch X is reached by nobody, not even by what hangs there too.
    fn switch(&self, tenants: &mut Tenants<'_>) -> anyhow::Result<()> {
        let lab = self.lab;
        tenants.busy(3)?;
        let begun = Instant::now();
        for index in ON_SWITCH_X {
            for other in lab.machines().iter().filter(|other| other.number != lab.node(index).number) {
                lab.partition(lab.node(index), other, false);
            }
        }
        self.all_available(&ON_SWITCH_X)?;
        println!(
            "switch-x is dead: every device is served by others after {:.1} s",
            begun.elapsed().as_secs_f64()
        );
        tenants.busy(3)?;
        lab.heal();
        self.well_again(tenants)
    }

    fn feed(&self, tenants: &mut Tenants<'_>) -> anyhow::Result<()> {
        let lab = self.lab;
        tenants.busy(3)?;
        let dead = ON_FEED_A.map(|index| lab.node(index));
        let begun = Instant::now();
        Machine::cut(&dead);
        self.all_available(&ON_FEED_A)?;
        println!(
            "feed-a is dead: every device is served by others after {:.1} s",
            begun.elapsed().as_secs_f64()
        );
        tenants.busy(3)?;
        lab.start(&dead)?;
        self.well_again(tenants)
    }

    /// Every device is exported by a node that is not dead, and takes a write and a flush.
    fn all_available(&self, dead: &[usize]) -> anyhow::Result<()> {
        let lab = self.lab;
        let is_dead = |machine: &Machine| dead.iter().any(|index| lab.node(*index).number == machine.number);
        let before = self.workload.counts.acknowledged.load(Relaxed);
        for device in DEVICES {
            lab.until(&format!("{device} to be served"), || {
                if lab.exported(device)?.is_none_or(|(machine, _)| is_dead(machine)) {
                    return Ok(None);
                }
                let Some(uri) = lab.reach(device)? else { return Ok(None) };
                let mut client = NbdClient::connect(&uri)?;
                client.write(PROBED_AT, &[7; 4096])?;
                client.flush()?;
                ensure!(client.read(PROBED_AT, 4096)? == [7; 4096], "{device} has not what was written");
                Ok(Some(()))
            })?;
        }
        lab.until("the stamped blocks to be written on", || {
            Ok((self.workload.counts.acknowledged.load(Relaxed) > before + 10).then_some(()))
        })
    }

    fn well_again(&self, tenants: &mut Tenants<'_>) -> anyhow::Result<()> {
        self.lab.healthy()?;
        tenants.all_run().context("a program on a node that lived has ended")?;
        self.workload.pause()?;
        self.workload.check().context("the stamped blocks")?;
        tenants.check(false).context("the programs")?;
        are_apart(&self.lab.json(&["map", "show"])?)?;
        println!(
            "all is well again, {} writes were acknowledged, rows {:?}",
            self.workload.counts.acknowledged.load(Relaxed),
            tenants.rows()
        );
        self.workload.go_on();
        Ok(())
    }
}
