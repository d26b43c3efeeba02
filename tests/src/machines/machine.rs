//! One machine: its disks, its QEMU, and its power switch.

use super::exec::{self, Ended, Running};
use super::switch;
use crate::test_disk::command::Order;
use crate::test_disk::{Counts, TestDisk};
use anyhow::{Context, bail, ensure};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What stands for the machine's directory in a prepared command line.
const PLACE: &str = "@MACHINE@";
/// Ports inside: the agent's, and the first of those that devices are exported on.
const AGENT_PORT: u16 = 7000;
/// The first port inside that devices are exported on.
pub const EXPORT_PORT: u16 = 10810;
/// How many devices a machine can export to the host.
pub const EXPORTS: u16 = 4;
/// A kernel that dies before anything of ours runs is the emulator's failure (scripts/vm.d/run.sh): how often.
const STARTS_MAX: u32 = 3;

/// Where a machine's ports are on the host, and its sockets.
pub struct Place {
    /// The directory of the whole lab.
    pub lab: PathBuf,
    /// A loopback address of the lab's own.
    pub host: String,
    /// The machine's first port there.
    pub port: u16,
    /// QEMU's command line, as `scripts/vm prepare` made it.
    pub template: Arc<Vec<String>>,
}

/// A machine.
pub struct Machine {
    /// Its name: a node's in the cluster file, or `manager`.
    pub name: String,
    /// The last byte of its addresses.
    pub number: u8,
    /// Served to it as virtio disks; the name is the serial number.
    pub disks: Vec<(&'static str, Arc<TestDisk>)>,
    place: Place,
    life: Mutex<Option<Life>>,
    boots: AtomicU64,
}

/// From power on to power off.
struct Life {
    qemu: Child,
    begun: Instant,
    starts: u32,
}

impl Drop for Life {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Machine {
    /// A machine with disks of so many MiB, switched off. The seed is for what its disks lose.
    pub fn new(
        name: &str,
        number: u8,
        place: Place,
        disks: &[(&'static str, u64)],
        seed: u64,
    ) -> anyhow::Result<Self> {
        let dir = place.lab.join(name);
        std::fs::create_dir_all(&dir)?;
        let make = |(index, (serial, mib)): (usize, &(&'static str, u64))| {
            let disk = TestDisk::new(serial, mib << 20, seed << 16 | u64::from(number) << 8 | index as u64);
            let disk = Arc::new(disk);
            disk.serve(&dir.join(format!("{serial}.nbd")))?;
            disk.control(&dir.join(format!("{serial}.control")))?;
            anyhow::Ok((*serial, disk))
        };
        let disks = disks.iter().enumerate().map(make).collect::<anyhow::Result<_>>()?;
        Ok(Self {
            name: name.to_owned(),
            number,
            disks,
            place,
            life: Mutex::new(None),
            boots: AtomicU64::new(0),
        })
    }

    /// Its directory: the logs are here.
    pub fn dir(&self) -> PathBuf {
        self.place.lab.join(&self.name)
    }

    /// Where the agent is reached from the host.
    pub fn agent(&self) -> String {
        format!("{}:{}", self.place.host, self.place.port)
    }

    /// Where the host reaches what is exported inside on the port [`EXPORT_PORT`] + `index`.
    pub fn export(&self, index: u16) -> String {
        format!("{}:{}", self.place.host, self.place.port + 1 + index)
    }

    fn life(&self) -> MutexGuard<'_, Option<Life>> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its power is on.
    pub fn is_on(&self) -> bool {
        self.life().as_mut().is_some_and(|life| matches!(life.qemu.try_wait(), Ok(None)))
    }

    /// How often it has been switched on.
    pub fn boots(&self) -> u64 {
        self.boots.load(Ordering::SeqCst)
    }

    /// Switches it on and does not wait. It dies with the thread that called this.
    pub fn power_on(&self) -> anyhow::Result<()> {
        ensure!(!self.is_on(), "{} is on", self.name);
        self.boots.fetch_add(1, Ordering::SeqCst);
        *self.life() = Some(Life { qemu: self.spawn()?, begun: Instant::now(), starts: 1 });
        Ok(())
    }

    fn spawn(&self) -> anyhow::Result<Child> {
        let dir = self.dir();
        match std::fs::remove_file(switch::sockets(&self.place.lab, self.number).1) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let log = |name: &str| File::options().create(true).append(true).open(dir.join(name));
        let text = dir.to_str().context("a directory whose name is not text")?;
        let template = self.place.template.iter().map(|word| word.replace(PLACE, text));
        // The emulator dies with us, however we end.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .args(template)
            .args(self.network())
            .args(self.storage())
            // Its copy-on-write files.
            .env("TMPDIR", &dir)
            .stdin(Stdio::null())
            .stdout(log("result")?)
            .stderr(log("qemu.log")?)
            .spawn()
            .context("setpriv, of util-linux")?;
        Ok(child)
    }

    fn network(&self) -> Vec<String> {
        let (port, own) = switch::sockets(&self.place.lab, self.number);
        let mac = |kind: u8| format!("52:54:00:4c:{kind:02x}:{:02x}", self.number);
        let mut user = "user,id=console,restrict=on".to_owned();
        for (outside, inside) in
            [AGENT_PORT].into_iter().chain(EXPORT_PORT..EXPORT_PORT + EXPORTS).enumerate()
        {
            let outside = self.place.port + outside as u16;
            user += &format!(",hostfwd=tcp:{}:{outside}-10.0.2.15:{inside}", self.place.host);
        }
        let link = format!(
            "dgram,id=link,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            own.display(),
            port.display()
        );
        let card = |id: &str, kind, more: &str| {
            format!("virtio-net-pci,netdev={id},mac={},romfile={more}", mac(kind))
        };
        ["-netdev", &link, "-device", &card("link", 0, ",host_mtu=9000"), "-netdev", &user, "-device"]
            .map(str::to_owned)
            .into_iter()
            .chain([card("console", 1, "")])
            .collect()
    }

    fn storage(&self) -> Vec<String> {
        let drive = |serial: &str| {
            let socket = self.dir().join(format!("{serial}.nbd"));
            // Nothing is kept by QEMU, and its disk has a write cache that the kernel has to flush.
            let node = format!(
                "driver=nbd,node-name={serial},server.type=unix,server.path={},export={serial},cache.direct=on",
                socket.display()
            );
            let device = format!(
                "virtio-blk-pci,drive={serial},serial={serial},write-cache=on,discard=off,write-zeroes=off"
            );
            ["-blockdev".to_owned(), node, "-device".to_owned(), device]
        };
        self.disks.iter().flat_map(|(serial, _)| drive(serial)).collect()
    }

    /// Waits until its agent answers, and says how long it took from the power on.
    pub fn wait_up(&self, patience: Duration) -> anyhow::Result<Duration> {
        loop {
            if exec::answers(&self.agent(), Duration::from_secs(2)) {
                return Ok(self.life().as_ref().context("its power is off")?.begun.elapsed());
            }
            let console = read(&self.dir().join("console.log"));
            let mut life = self.life();
            let life = life.as_mut().context("its power is off")?;
            if life.qemu.try_wait()?.is_some() {
                let panicked = console.contains("Kernel panic");
                if panicked && life.starts < STARTS_MAX {
                    eprintln!("lab: the kernel of {} died while it started; again", self.name);
                    let kept = self.dir().join(format!("console-{}.log", life.starts));
                    std::fs::write(kept, console)?;
                    life.starts += 1;
                    life.qemu = self.spawn()?;
                    life.begun = Instant::now();
                    continue;
                }
                bail!("{} has ended: {}", self.name, read(&self.dir().join("qemu.log")).trim());
            }
            if life.begun.elapsed() > patience {
                bail!("{} is not up after {patience:?}; its console: {}", self.name, tail(&console, 15));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Its power is gone: at this moment for all of these, then the caches of their disks, but for a subset.
    pub fn cut(machines: &[&Machine]) {
        let mut lives: Vec<_> = machines.iter().map(|machine| machine.life()).collect();
        for life in lives.iter_mut().filter_map(|life| life.as_mut()) {
            // It may have ended by itself.
            let _ = life.qemu.kill();
        }
        for (machine, life) in machines.iter().zip(&mut lives) {
            for (_, disk) in &machine.disks {
                disk.cut();
            }
            **life = None;
        }
    }

    /// The serial numbers of its data disks.
    pub fn data_disks(&self) -> impl Iterator<Item = &'static str> {
        self.disks.iter().map(|(serial, _)| *serial).filter(|serial| super::DATA_DISKS.contains(serial))
    }

    fn data(&self) -> anyhow::Result<&TestDisk> {
        let disk = self.disks.iter().find(|(serial, _)| *serial == "data");
        disk.map(|(_, disk)| &**disk).with_context(|| format!("{} has no data disk", self.name))
    }

    /// The size of its data disk.
    pub fn disk_bytes(&self) -> anyhow::Result<u64> {
        Ok(self.data()?.bytes())
    }

    /// What was asked of its data disk.
    pub fn disk_counts(&self) -> anyhow::Result<Counts> {
        Ok(self.data()?.counts())
    }

    /// Does something to its data disk.
    pub fn order(&self, words: &str) -> anyhow::Result<String> {
        let disk = self.data()?;
        let words: Vec<&str> = words.split_ascii_whitespace().collect();
        Order::parse(&words).and_then(|order| disk.obey(order)).map_err(anyhow::Error::msg)
    }

    /// Runs a command inside, to its end.
    pub fn run(&self, words: &[&str], patience: Duration) -> anyhow::Result<Ended> {
        let running = Running::start(&self.agent(), words)?;
        running.feed(&[])?;
        running.finish(patience).with_context(|| format!("{} on {}", words.join(" "), self.name))
    }

    /// Writes a file inside, and has it on stable storage.
    pub fn put(&self, path: &str, content: &[u8], patience: Duration) -> anyhow::Result<()> {
        let script = "umask 077 && cat >\"$1.new\" && sync \"$1.new\" && mv \"$1.new\" \"$1\" && sync --file-system \"$1\"";
        let running = Running::start(&self.agent(), &["sh", "-c", script, "put", path])?;
        running.feed(content)?;
        let ended = running.finish(patience)?;
        ended.ok().with_context(|| format!("{path} on {}", self.name)).map(drop)
    }

    /// The end of what its daemon and its console have said.
    pub fn logs(&self) -> String {
        let dir = self.dir();
        let of = |name: &str, lines| {
            format!("--- {}\n{}\n", dir.join(name).display(), tail(&read(&dir.join(name)), lines))
        };
        of("stdout", 10) + &of("stderr", 30) + &of("console.log", 5)
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
