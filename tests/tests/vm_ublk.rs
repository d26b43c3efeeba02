//! Whole clusters of real processes with real `/dev/ublkbN` devices, in a virtual machine:
//! `scripts/vm.d/suite stable` runs them.

use anyhow::{Context, ensure};
use mirror_net::ids::DeviceId;
use mirror_tests::contents::slices;
use mirror_tests::fio::{Fio, fio};
use mirror_tests::playground::{Playground, signal, ublk_devices};
use nix::sys::signal::Signal::{SIGCONT, SIGSTOP, SIGTERM};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// The map gives the first device of n1 this id: devices are numbered in the file's order.
const N1_D1: DeviceId = DeviceId(1);
const BLOCK_BYTES: usize = 4096;
const MIB: u64 = 1 << 20;

/// Two nodes, each with its own devices as the layout wants it. Nodes of an emulated machine may be silent for long.
fn start(frontend: &str, disk_size: &str) -> anyhow::Result<Playground> {
    let left = ublk_devices();
    ensure!(left.is_empty(), "an earlier playground left {left:?} behind");
    let play = Playground::start_like(2, frontend, disk_size, &["--fail-after", "20s"])?;
    healthy(&play)?;
    ensure!(primary(&play)? == "n1", "n1's data is not at home: {}", play.logs());
    Ok(play)
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| program.to_owned())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments:?}: {}\n{text}{errors}", output.status);
    Ok(text)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("an ASCII path")
}

/// A file system that is mounted until this is dropped.
struct Mount(PathBuf);

impl Mount {
    fn new(device: &Path, at: PathBuf) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&at)?;
        run("mount", &[text(device), text(&at)])?;
        Ok(Self(at))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn unmount(self) -> anyhow::Result<()> {
        run("umount", &[text(&self.0)])?;
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Only matters if the test failed: then its device may not answer any more.
        let _ = Command::new("umount").args(["--lazy", text(&self.0)]).status();
    }
}

/// A block device past the page cache.
struct Direct(File);

/// A buffer as direct I/O wants it.
#[repr(align(4096))]
struct Block([u8; BLOCK_BYTES]);

impl Direct {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).custom_flags(nix::libc::O_DIRECT).open(path);
        Ok(Self(file.with_context(|| path.display().to_string())?))
    }

    fn write(&self, at: u64, stamp: u8) -> std::io::Result<()> {
        let block = Box::new(Block([stamp; BLOCK_BYTES]));
        self.0.write_all_at(&block.0, at)
    }

    /// The stamp of a block, which has to be one throughout.
    fn read(&self, at: u64) -> anyhow::Result<u8> {
        let mut block = Box::new(Block([0; BLOCK_BYTES]));
        self.0.read_exact_at(&mut block.0, at)?;
        ensure!(block.0.iter().all(|byte| *byte == block.0[0]), "a torn block at {at}");
        Ok(block.0[0])
    }
}

fn fio_file(file: &Path, extra: &[&str]) -> anyhow::Result<Fio> {
    let name = format!("--filename={}", text(file));
    Fio::start(
        &[&["--ioengine=libaio", "--direct=1", "--rw=randwrite", "--bs=4k", "--iodepth=16", &name], extra]
            .concat(),
    )
}

fn mkfs_ext4(device: &Path) -> anyhow::Result<()> {
    run("mkfs.ext4", &["-q", text(device)]).map(drop)
}

fn fsck_ext4(device: &Path) -> anyhow::Result<()> {
    run("e2fsck", &["-f", "-n", text(device)]).map(drop)
}

/// Waits until every copy counts: one that was given up on the way, as on a machine that is much too slow, is equal
/// only once it was filled again.
fn healthy(play: &Playground) -> anyhow::Result<()> {
    play.until("all copies to be in sync", || Ok(play.mirrorctl(&["status"])?.status.success().then_some(())))
}

fn copies_are_equal(play: &Playground) -> anyhow::Result<()> {
    let (primary, secondary) = (slices(&play.disk("n1"), N1_D1)?, slices(&play.disk("n2"), N1_D1)?);
    ensure!(!primary.is_empty() && primary == secondary, "the copies differ: {primary:?} {secondary:?}");
    Ok(())
}

/// Who holds the primary copy of n1-d1's first slices, as the map says.
fn primary(play: &Playground) -> anyhow::Result<String> {
    let map = play.json(&["map", "show"])?;
    let mut devices = map["devices"].as_array().into_iter().flatten();
    let device = devices.find(|device| device["name"] == "n1-d1").context("no n1-d1 in the map")?;
    Ok(device["spans"][0]["replicas"][0]["node"].as_str().context("no primary")?.to_owned())
}

#[test]
fn both_copies_are_equal_after_ext4_and_overlapping_writes() -> anyhow::Result<()> {
    let mut play = start("ublk", "512M")?;
    let device = play.path("n1-d1")?;
    // Four writers in the same range: nothing to verify but that both copies saw them in one order.
    let overlapping = [
        "--iodepth=32",
        "--numjobs=4",
        "--size=1m",
        "--loops=4",
        "--verify=0",
        "--do_verify=0",
        "--offset=0",
    ];
    fio_file(&device, &overlapping)?.finish()?;
    mkfs_ext4(&device)?;
    let mount = Mount::new(&device, play.base().join("mnt"))?;
    fio_file(&mount.file("data"), &["--size=8m"])?.finish()?;
    mount.unmount()?;
    fsck_ext4(&device)?;
    healthy(&play)?;
    play.stop()?;
    copies_are_equal(&play)
}

#[test]
fn xfs_holds_files() -> anyhow::Result<()> {
    let mut play = start("ublk", "1G")?;
    let device = play.path("n1-d1")?;
    run("mkfs.xfs", &["-q", text(&device)])?;
    let mount = Mount::new(&device, play.base().join("mnt"))?;
    let content = |index: usize| vec![index as u8 + 1; 10_000 * (index + 1)];
    for index in 0..40 {
        std::fs::write(mount.file(&format!("file{index}")), content(index))?;
    }
    File::open(&mount.0)?.sync_all()?;
    mount.unmount()?;
    run("xfs_repair", &["-n", text(&device)])?;
    let mount = Mount::new(&device, play.base().join("mnt"))?;
    for index in 0..40 {
        let found = std::fs::read(mount.file(&format!("file{index}")))?;
        ensure!(found == content(index), "file {index} is another");
    }
    mount.unmount()?;
    healthy(&play)?;
    play.stop()?;
    copies_are_equal(&play)
}

#[test]
fn a_killed_primary_recovers_its_device_under_a_mounted_file_system() -> anyhow::Result<()> {
    let play = start("ublk", "512M")?;
    let device = play.path("n1-d1")?;
    mkfs_ext4(&device)?;
    let mount = Mount::new(&device, play.base().join("mnt"))?;
    let mut fio = fio_file(&mount.file("data"), &["--size=16m"])?;
    let begun = writes(&device)?;
    play.until("fio is at it", || Ok((writes(&device)? > begun + 500).then_some(())))?;
    play.kill("n1")?;
    ensure!(fio.runs()?, "fio ended before the kill");
    play.restart("n1")?;
    ensure!(play.path("n1-d1")? == device, "another device after the recovery");
    fio.finish()?;
    ensure!(primary(&play)? == "n2", "the partner was not promoted");
    mount.unmount()?;
    fsck_ext4(&device)
}

/// How many writes the kernel has seen completed on a block device.
fn writes(device: &Path) -> anyhow::Result<u64> {
    let name = device.file_name().and_then(|name| name.to_str()).context("no name")?;
    let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat"))?;
    Ok(stat.split_ascii_whitespace().nth(4).context("a short stat")?.parse()?)
}

#[test]
fn no_write_is_done_that_the_partner_does_not_have() -> anyhow::Result<()> {
    let play = start("ublk", "512M")?;
    let device = play.path("n1-d1")?;
    Direct::open(&device)?.write(0, 1)?;
    // Without the manager nobody can allow the primary to go on alone.
    signal(play.manager_pid()?, SIGSTOP)?;
    signal(play.pid("n2")?, SIGSTOP)?;
    let direct = Direct::open(&device)?;
    let (sender, done) = mpsc::channel();
    let writer = thread::spawn(move || sender.send(direct.write(0, 2)));
    let early = done.recv_timeout(Duration::from_secs(4));
    signal(play.manager_pid()?, SIGCONT)?;
    ensure!(early.is_err(), "done with the partner stopped: {early:?}");
    // Now the partner's copy is recorded stale, and the write is done alone.
    let done = done.recv_timeout(Duration::from_secs(90));
    signal(play.pid("n2")?, SIGCONT)?;
    done.with_context(|| format!("the write is still not done: {}", play.logs()))??;
    writer.join().expect("the writer did not panic")?;
    ensure!(Direct::open(&device)?.read(0)? == 2);
    Ok(())
}

#[test]
fn flush_discard_and_zeroes() -> anyhow::Result<()> {
    let mut play = start("ublk", "512M")?;
    let device = play.path("n1-d1")?;
    let direct = Direct::open(&device)?;
    for index in 0..8 * 16 {
        direct.write(index * MIB / 16, 7)?;
    }
    direct.0.sync_all()?;
    run("blkdiscard", &["--offset", "1MiB", "--length", "2MiB", text(&device)])?;
    run("blkdiscard", &["--zeroout", "--offset", "5MiB", "--length", "64KiB", text(&device)])?;
    for index in 0..8 * 16 {
        let at = index * MIB / 16;
        let zero = (MIB..3 * MIB).contains(&at) || at == 5 * MIB;
        ensure!(direct.read(at)? == if zero { 0 } else { 7 }, "at {at}");
    }
    drop(direct);
    mkfs_ext4(&device)?;
    let mount = Mount::new(&device, play.base().join("mnt"))?;
    std::fs::write(mount.file("kept"), vec![3; 3 << 20])?;
    std::fs::write(mount.file("gone"), vec![4; 10 << 20])?;
    File::open(mount.file("gone"))?.sync_all()?;
    std::fs::remove_file(mount.file("gone"))?;
    run("sync", &["--file-system", text(&mount.0)])?;
    let trimmed = run("fstrim", &["--verbose", text(&mount.0)])?;
    ensure!(!trimmed.contains(" 0 B "), "{trimmed}");
    mount.unmount()?;
    let mount = Mount::new(&device, play.base().join("mnt"))?;
    ensure!(std::fs::read(mount.file("kept"))? == vec![3; 3 << 20], "the file that was kept is another");
    mount.unmount()?;
    fsck_ext4(&device)?;
    healthy(&play)?;
    play.stop()?;
    copies_are_equal(&play)
}

#[test]
fn an_orderly_stop_removes_what_nobody_uses_and_leaves_what_is_mounted() -> anyhow::Result<()> {
    let mut play = start("ublk", "512M")?;
    let (device, other) = (play.path("n1-d1")?, play.path("n2-d1")?);
    mkfs_ext4(&device)?;
    let mount = Mount::new(&device, play.base().join("mnt"))?;
    std::fs::write(mount.file("before"), "before")?;
    let unused = play.path("n1-d1-unmirrored")?;
    let pid = play.pid("n1")?;
    signal(pid, SIGTERM)?;
    play.until("n1 has ended", || Ok((!runs(pid)).then_some(())))?;
    ensure!(device.exists(), "the mounted device has gone");
    ensure!(!unused.exists(), "the unused device is still there");
    play.restart("n1")?;
    ensure!(play.path("n1-d1")? == device, "another device after the recovery");
    std::fs::write(mount.file("after"), "after")?;
    File::open(mount.file("after"))?.sync_all()?;
    ensure!(std::fs::read_to_string(mount.file("before"))? == "before");
    mount.unmount()?;
    fsck_ext4(&device)?;
    play.stop()?;
    ensure!(!device.exists() && !other.exists(), "devices are left");
    Ok(())
}

#[test]
fn an_orderly_stop_leaves_what_a_program_has_open() -> anyhow::Result<()> {
    let mut play = start("ublk", "512M")?;
    let (device, unused) = (play.path("n1-d1-unmirrored")?, play.path("n1-d1")?);
    // Nothing but an open file: no claim, no mount.
    let open = Direct::open(&device)?;
    open.write(MIB, 5)?;
    let pid = play.pid("n1")?;
    signal(pid, SIGTERM)?;
    play.until("n1 has ended", || Ok((!runs(pid)).then_some(())))?;
    ensure!(device.exists(), "the open device has gone: {}", play.logs());
    ensure!(!unused.exists(), "the unused device is still there: {}", play.logs());
    let own = format!("(process {})", std::process::id());
    ensure!(play.logs().contains(&own), "its user is not named: {}", play.logs());
    play.restart("n1")?;
    ensure!(play.path("n1-d1-unmirrored")? == device, "another device after the recovery");
    ensure!(open.read(MIB)? == 5);
    open.write(2 * MIB, 6)?;
    drop(open);
    play.stop()?;
    ensure!(!device.exists(), "nobody has it open, and it is still there");
    Ok(())
}

#[test]
fn udev_names_devices_as_the_map_does() -> anyhow::Result<()> {
    let play = start("ublk", "512M")?;
    // As a package installs it.
    std::fs::create_dir_all("/run/udev/rules.d")?;
    let rules = Path::new("/run/udev/rules.d/60-ublk-mirror.rules");
    std::fs::write(rules, include_str!("../../scripts/udev/60-ublk-mirror.rules"))?;
    let server = run("sh", &["-c", "command -v ublk-server"])?;
    std::os::unix::fs::symlink(server.trim(), "/usr/bin/ublk-server")?;
    std::fs::create_dir_all("/run/ublk-mirror")?;
    std::os::unix::fs::symlink(play.dir.join("n1/run"), "/run/ublk-mirror/n1")?;
    run("udevadm", &["control", "--reload"])?;

    let named = |device: &Path, name: &str| {
        let link = Path::new("/dev/disk/by-ublk-mirror").join(name);
        play.until(&format!("{} leads to {}", link.display(), device.display()), || {
            Ok(std::fs::canonicalize(&link).is_ok_and(|found| found == device).then_some(()))
        })
    };
    // Devices that were there before the rule, and new ones.
    let (mirrored, other) = (play.path("n1-d1")?, play.path("n1-d1-unmirrored")?);
    run("udevadm", &["trigger", "--action=change", text(&mirrored), text(&other)])?;
    named(&mirrored, "n1-d1")?;
    named(&other, "n1-d1-unmirrored")?;
    let pid = play.pid("n1")?;
    signal(pid, SIGTERM)?;
    play.until("n1 has ended", || Ok((!runs(pid)).then_some(())))?;
    play.until("the names are gone with the devices", || {
        let left = std::fs::read_dir("/dev/disk/by-ublk-mirror").into_iter().flatten().count();
        Ok((left == 0).then_some(()))
    })?;
    play.restart("n1")?;
    named(&play.path("n1-d1")?, "n1-d1")?;
    // Another node's devices here have no run directory where the rule looks.
    let foreign = play.path("n2-d1")?;
    run("udevadm", &["trigger", "--action=change", "--settle", text(&foreign)])?;
    ensure!(!Path::new("/dev/disk/by-ublk-mirror/n2-d1").exists());
    for made in [rules, Path::new("/usr/bin/ublk-server"), Path::new("/run/ublk-mirror/n1")] {
        std::fs::remove_file(made)?;
    }
    run("udevadm", &["control", "--reload"]).map(drop)
}

/// Whether a process runs; one that has ended and was not waited for does not.
fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

#[test]
fn a_device_that_was_failed_over_is_fenced_when_its_node_comes_back() -> anyhow::Result<()> {
    let play = start("ublk", "512M")?;
    let old = play.path("n1-d1")?;
    let direct = Direct::open(&old)?;
    for index in 0..32 {
        direct.write(index * MIB, index as u8 + 1)?;
    }
    play.kill("n1")?;
    // Held back by the kernel until the device is served again, or stopped.
    let held = thread::spawn(move || direct.write(3 * MIB, 0xEE));
    play.until("n1's failover", || {
        Ok(play.mirrorctl(&["node", "failover", "n1"])?.status.success().then_some(()))
    })?;
    let new = play.until("n2 exports n1-d1", || {
        Ok(play.device("n1-d1")?["path"].as_str().map(PathBuf::from).filter(|path| *path != old))
    })?;
    let direct = Direct::open(&new)?;
    for index in 0..32 {
        ensure!(direct.read(index * MIB)? == index as u8 + 1, "block {index}");
    }
    direct.write(MIB, 99)?;
    play.restart("n1")?;
    play.until("the old device is gone", || Ok((!old.exists()).then_some(())))?;
    let fate = held.join().expect("the writer did not panic");
    ensure!(fate.is_err(), "a held write was acknowledged");
    ensure!(direct.read(3 * MIB)? == 4, "a held write landed");
    ensure!(direct.read(MIB)? == 99);
    Ok(())
}

#[test]
fn the_kernels_nbd_client_mounts_an_export() -> anyhow::Result<()> {
    let play = start("nbd", "512M")?;
    let uri = play.uri("n1-d1")?;
    let (_, socket) = uri.split_once("?socket=").context("no socket in the URI")?;
    run("modprobe", &["nbd"])?;
    let device = Path::new("/dev/nbd0");
    run("nbd-client", &["-unix", socket, "-name", "n1-d1", text(device)])?;
    let result = (|| {
        mkfs_ext4(device)?;
        let mount = Mount::new(device, play.base().join("mnt"))?;
        fio_file(&mount.file("data"), &["--size=8m"])?.finish()?;
        mount.unmount()?;
        fsck_ext4(device)
    })();
    run("nbd-client", &["-d", text(device)])?;
    result
}

#[test]
fn the_device_takes_a_whole_pass_of_mixed_sizes() -> anyhow::Result<()> {
    let play = start("ublk", "512M")?;
    let name = format!("--filename={}", text(&play.path("n1-d1")?));
    let mixed = ["--rw=randwrite", "--bsrange=512-1m", "--iodepth=8", "--size=32m"];
    fio(&[&["--ioengine=libaio", "--direct=1", &name], &mixed[..]].concat())
}

/// As the rules for plugged-in disks and their unit do it; there is no systemd in these machines, so the test does what it would.
#[test]
fn a_partition_that_bears_our_name_enters_the_cluster_when_it_appears() -> anyhow::Result<()> {
    let mut play = start("nbd", "512M")?;
    std::fs::create_dir_all("/run/udev/rules.d")?;
    let rules = "61-ublk-mirror-disks.rules";
    std::fs::copy(
        Path::new("/project/scripts/udev").join(rules),
        Path::new("/run/udev/rules.d").join(rules),
    )?;
    run("udevadm", &["control", "--reload"])?;
    let table = "label: gpt\nsize=512M, name=ublk-mirror-d2\nname=ublk-mirror-d3\n";
    let partition = format!("printf '{table}' | sfdisk --quiet /dev/disk/by-id/virtio-disk0");
    run("sh", &["-c", &partition])?;
    run("udevadm", &["settle", "--timeout=60"])?;
    let path = |name: &str| format!("/dev/disk/by-partlabel/ublk-mirror-{name}");
    let wanted = |name: &str| -> anyhow::Result<String> {
        let properties = run("udevadm", &["info", "--query=property", &format!("--name={}", path(name))])?;
        let wants = properties.lines().find_map(|line| line.strip_prefix("SYSTEMD_WANTS="));
        let unit = wants.and_then(|units| units.split_whitespace().next());
        let instance = unit.and_then(|unit| unit.strip_prefix("ublk-mirror-disk@")?.strip_suffix(".service"));
        Ok(instance.with_context(|| format!("no unit is wanted: {properties}"))?.to_owned())
    };
    let add = |name: &str| -> anyhow::Result<(bool, String)> {
        let output = Command::new("/project/scripts/udev/hot-add")
            .arg(wanted(name)?)
            .env("UBLK_MIRROR_NODE", "n1")
            .env("UBLK_MIRROR_CONFIG", play.dir.join("cluster.toml"))
            .output()?;
        let said = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
    };
    let (added, said) = add("d2")?;
    ensure!(added && said.contains("n1/d2") && said.contains("enters the cluster"), "{said}");
    let disks = play.json(&["disk", "list"])?;
    let disk = disks.as_array().into_iter().flatten().find(|disk| disk["disk"] == "d2");
    let disk = disk.with_context(|| format!("{disks:#}"))?;
    ensure!(disk["state"] == "ok" && disk["path"] == path("d2").as_str(), "{disk:#}");
    // It is there at every boot.
    let (added, said) = add("d2")?;
    ensure!(added && said.contains("n1/d2 is in the cluster already"), "{said}");
    // Whatever it is called: what holds something is not ours to format.
    run("mkfs.ext4", &["-q", &path("d3")])?;
    let (added, said) = add("d3")?;
    ensure!(!added && said.contains("ext4") && said.contains("nothing was formatted"), "{said}");
    healthy(&play)?;
    play.stop()
}
