//! A lab: emulated machines with real ublk, whose disks, cables and power are ours.
//!
//! Every machine has a *state* disk, which is what a system disk would keep, and every node a *data* disk; all are
//! test disks, so whatever loses power loses what it had not flushed. The manager has a machine of its own on the
//! same link: to it, too, a dead node is silent, where any forwarding by the host would tell of its death at once.

pub mod calibration;
pub mod campaign;
pub mod cluster;
pub mod exec;
pub mod hub;
pub mod machine;
pub mod regeneration;
pub mod rivals;
pub mod sets;
pub mod switch;
pub mod tenant;

use anyhow::{Context, ensure};
use calibration::Calibration;
use machine::{EXPORTS, Machine, Place};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use switch::Switch;

/// The number of the manager's machine.
pub const MANAGER: u8 = 200;
/// The most nodes.
pub const NODES_MAX: u8 = 9;
/// The serial numbers of a node's data disks.
pub const DATA_DISKS: [&str; 2] = ["data", "data2"];
/// Before anything is measured: what a machine may take to come up on a host that is very busy.
const FIRST_BOOT: Duration = Duration::from_secs(300);

/// After which a silent node has failed, where nothing is slow: the daemons' own.
const FAIL_AFTER: Duration = Duration::from_secs(2);

/// What a lab is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many nodes.
    pub nodes: u8,
    /// `stable` or `latest`.
    pub kernel: String,
    /// Chooses what disks lose.
    pub seed: u64,
    /// The last so many of them are spares.
    pub spares: u8,
    /// Data disks of every node, one or two.
    pub disks: u8,
    /// So many of them, the last ones, are left out of the cluster.
    pub foreign_disks: u8,
    /// Of every data disk.
    pub disk_mib: u64,
    /// Of every machine.
    pub memory_mib: u64,
    /// Whether a machine that is switched on at once is back before the manager takes it for failed.
    pub slow_detection: bool,
    /// The power feed and the switch of each node in turn; none are named if this is empty.
    pub sets: &'static [(&'static str, &'static str)],
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 2,
            spares: 0,
            disks: 1,
            foreign_disks: 0,
            kernel: "stable".into(),
            seed: 1,
            disk_mib: 512,
            memory_mib: 512,
            slow_detection: false,
            sets: &[],
        }
    }
}

/// A lab that runs.
pub struct Lab {
    /// The nodes in their order, then the manager.
    machines: Vec<Machine>,
    switch: Switch,
    /// How slow it is.
    pub calibration: Calibration,
    /// After which a silent node has failed, as the cluster file says.
    pub fail_after: Duration,
    /// The last so many nodes are spares.
    spares: usize,
    /// Data disks of each node that the cluster has.
    cluster_disks: usize,
    sets: &'static [(&'static str, &'static str)],
    dir: PathBuf,
}

impl Lab {
    /// Switches everything on in that directory, and measures how slow it is. Machines die with the calling thread.
    pub fn up(dir: &Path, options: &Options) -> anyhow::Result<Self> {
        ensure!((1..=NODES_MAX).contains(&options.nodes), "1 to {NODES_MAX} nodes");
        ensure!((1..=DATA_DISKS.len()).contains(&options.disks.into()), "one or two data disks");
        let template = Arc::new(prepare(dir, options)?);
        let numbers: Vec<u8> = (1..=options.nodes).chain([MANAGER]).collect();
        let switch = Switch::start(dir, &numbers).context("the link")?;
        let host = own_address();
        let machine = |(index, number): (usize, &u8)| {
            let place = Place {
                lab: dir.to_owned(),
                host: host.clone(),
                port: 7400 + (1 + EXPORTS) * index as u16,
                template: Arc::clone(&template),
            };
            let state = ("state", 64);
            match *number {
                MANAGER => Machine::new("manager", MANAGER, place, &[state], options.seed),
                number => {
                    let data = DATA_DISKS.iter().take(options.disks.into());
                    let data = data.map(|serial| (*serial, options.disk_mib));
                    let disks: Vec<_> = [state].into_iter().chain(data).collect();
                    Machine::new(&format!("n{number}"), number, place, &disks, options.seed)
                }
            }
        };
        let machines = numbers.iter().enumerate().map(machine).collect::<anyhow::Result<Vec<_>>>()?;
        for machine in &machines {
            machine.power_on()?;
        }
        let boots =
            machines.iter().map(|machine| machine.wait_up(FIRST_BOOT)).collect::<anyhow::Result<Vec<_>>>()?;
        let calibration = Calibration::measure(&machines[0], &boots)?;
        let fail_after = match options.slow_detection {
            // All machines at once took that long; one alone is quicker.
            true => calibration.boot.max(calibration.scale(FAIL_AFTER)),
            false => calibration.scale(FAIL_AFTER),
        };
        let spares = options.spares.into();
        let cluster_disks = (options.disks - options.foreign_disks).into();
        let (sets, dir) = (options.sets, dir.to_owned());
        Ok(Self { machines, switch, calibration, fail_after, spares, cluster_disks, sets, dir })
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The machine that goes by this name: `n1`, `1`, `manager`, `m`.
    pub fn machine(&self, name: &str) -> anyhow::Result<&Machine> {
        let own = if name == "m" { "manager".to_owned() } else { name.to_owned() };
        let found =
            self.machines.iter().find(|machine| machine.name == own || machine.name == format!("n{own}"));
        found.with_context(|| {
            let names: Vec<&str> = self.machines.iter().map(|machine| machine.name.as_str()).collect();
            format!("there is no machine {name:?}; there are {}", names.join(", "))
        })
    }

    /// The machine of node number `index`, from 0.
    pub fn node(&self, index: usize) -> &Machine {
        &self.machines[index]
    }

    /// The manager's machine.
    pub fn manager(&self) -> &Machine {
        self.machines.last().expect("every lab has one")
    }

    /// All machines.
    pub fn machines(&self) -> &[Machine] {
        &self.machines
    }

    /// The longest that anything that comes to an end at all may take.
    pub fn patience(&self) -> Duration {
        self.calibration.scale(Duration::from_secs(60))
    }

    /// Switches machines on again, all at once, and waits until they are up.
    pub fn start(&self, machines: &[&Machine]) -> anyhow::Result<()> {
        for machine in machines {
            machine.power_on()?;
        }
        machines.iter().try_for_each(|machine| self.wait_up(machine))
    }

    /// Waits until a machine that was switched on is up.
    pub fn wait_up(&self, machine: &Machine) -> anyhow::Result<()> {
        machine.wait_up(FIRST_BOOT).map(drop)
    }

    /// Nothing gets from one machine to another any more; nor back, unless it is one way only.
    pub fn partition(&self, one: &Machine, other: &Machine, one_way: bool) {
        self.switch.cut(one.number, other.number);
        if !one_way {
            self.switch.cut(other.number, one.number);
        }
    }

    /// All cables are whole again.
    pub fn heal(&self) {
        self.switch.heal();
    }

    /// Frames that were lost on cut cables.
    pub fn frames_dropped(&self) -> u64 {
        self.switch.dropped()
    }

    /// The ends of all logs, for whoever looks into a failure.
    pub fn logs(&self) -> String {
        self.machines.iter().map(Machine::logs).collect()
    }
}

/// Has `scripts/vm` make what all machines have in common, and tell QEMU's command line.
fn prepare(dir: &Path, options: &Options) -> anyhow::Result<Vec<String>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/vm");
    let memory = options.memory_mib.to_string();
    let status = Command::new(&script)
        .arg("prepare")
        .arg(dir)
        .args(["--kernel", &options.kernel, "--profile", "release", "--cpus", "1", "--memory", &memory])
        .args(["--", "scripts/lab.d/guest"])
        .status()
        .with_context(|| script.display().to_string())?;
    ensure!(status.success(), "{} prepare: {status}", script.display());
    let words = std::fs::read_to_string(dir.join("qemu"))?;
    Ok(words.split_terminator('\0').map(str::to_owned).collect())
}

/// All of 127.0.0.0/8 is this machine: labs side by side need not share an address.
fn own_address() -> String {
    let pid = std::process::id().to_be_bytes();
    format!("127.{}.{}.{}", 64 | pid[1] & 0x3f, pid[2], pid[3].max(1))
}
