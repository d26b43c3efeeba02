//! What is refused: with one line that says what, where and what to do, an exit code, and nothing
//! changed.

use anyhow::{Context, ensure};
use mirror_net::format::open;
use mirror_tests::lab::{Daemon, Lab, until};
use mirror_tests::nbd::NbdClient;
use mirror_tests::playground::program;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const HELLO_BYTES: usize = 48;
/// Where the first superblock is, and how far from the disk's end the other one.
const SUPERBLOCK: u64 = 4096;
const SUPERBLOCK_FROM_END: u64 = 64 << 10;

fn bytes(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| path.display().to_string())
}

/// Spoils a copy of a superblock.
fn spoil(disk: &Path, at: u64) -> anyhow::Result<()> {
    let file = File::options().read(true).write(true).open(disk)?;
    let mut block = [0; 512];
    file.read_exact_at(&mut block, at)?;
    ensure!(block[8..16] == *b"UBLKMIRR", "no superblock at {at}");
    block.iter_mut().skip(100).for_each(|byte| *byte ^= 0x55);
    file.write_all_at(&block, at)?;
    Ok(file.sync_all()?)
}

/// Whether both superblocks are there and intact.
fn is_whole(disk: &Path) -> anyhow::Result<bool> {
    let file = File::open(disk)?;
    let mut read =
        |at, buffer: &mut [u8]| file.read_exact_at(buffer, at).map_err(|_| mirror_net::format::ReadFailed);
    Ok(open(&mut read, file.metadata()?.len())?.report.superblocks_rewritten.is_empty())
}

fn stop_all(daemons: (Daemon, Daemon, Daemon)) -> anyhow::Result<()> {
    let (manager, n1, n2) = daemons;
    n1.stop()?;
    n2.stop()?;
    manager.stop()
}

#[test]
fn a_disk_with_something_on_it_is_not_formatted() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    File::create(lab.disk("n2"))?.set_len(64 << 20)?;
    let made = Command::new("mke2fs").args(["-q", "-F", "-L", "precious"]).arg(lab.disk("n2")).status()?;
    ensure!(made.success());
    let (_manager, _n1, _n2) = (lab.manager()?, lab.node("n1")?, lab.node("n2")?);
    let before = (until("n1's disk", || Ok(bytes(&lab.disk("n1")).ok()))?, bytes(&lab.disk("n2"))?);
    let path = lab.disk("n2").display().to_string();
    lab.create()?.refused(1, &["n2", &path, "ext", "precious", "--force"])?;
    ensure!(before == (bytes(&lab.disk("n1"))?, bytes(&lab.disk("n2"))?), "a disk was changed");
    lab.ctl(&["map", "show"])?.refused(1, &["no cluster has been created yet"])
}

#[test]
fn a_disk_that_is_too_small_is_not_formatted() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    lab.write_config("cluster.toml", |index| if index == 2 { "1M".into() } else { "64M".into() }, "")?;
    let (_manager, _n1, _n2) = (lab.manager()?, lab.node("n1")?, lab.node("n2")?);
    lab.create()?.refused(1, &["n2", "d1", "too small"])?;
    for node in ["n1", "n2"] {
        ensure!(bytes(&lab.disk(node))?.iter().all(|byte| *byte == 0), "{node}'s disk was changed");
    }
    Ok(())
}

#[test]
fn another_clusters_disk_is_neither_formatted_nor_served() -> anyhow::Result<()> {
    let (old, new) = (Lab::new("64M")?, Lab::new("64M")?);
    stop_all(old.cluster()?)?;
    let theirs = bytes(&old.disk("n1"))?;
    std::fs::copy(old.disk("n1"), new.disk("n1"))?;
    let daemons = (new.manager()?, new.node("n1")?, new.node("n2")?);
    new.create()?.refused(1, &["n1", "cluster", "--force"])?;
    ensure!(bytes(&new.disk("n1"))? == theirs, "the disk was changed");
    stop_all(daemons)?;

    // The same when it takes the place of a disk that is in use.
    std::fs::remove_file(new.disk("n1"))?;
    stop_all(new.cluster()?)?;
    std::fs::copy(old.disk("n1"), new.disk("n1"))?;
    let (_manager, _n2) = (new.manager()?, new.node("n2")?);
    let path = new.disk("n1").display().to_string();
    new.node_ends("cluster.toml", "n1", "n1")?.refused(1, &["disk d1", &path, "belongs to cluster"])?;
    ensure!(bytes(&new.disk("n1"))? == theirs, "the disk was changed");
    Ok(())
}

#[test]
fn a_damaged_superblock_is_repaired_and_two_are_refused() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    let daemons = lab.cluster()?;
    let uri = lab.uri("n1-d1")?;
    NbdClient::connect(&uri)?.write(0, &[5; 4096])?;
    stop_all(daemons)?;
    let disk = lab.disk("n1");
    let second = (64 << 20) - SUPERBLOCK_FROM_END;
    for at in [SUPERBLOCK, second] {
        spoil(&disk, at)?;
        ensure!(!is_whole(&disk)?);
        let daemons = (lab.manager()?, lab.node("n1")?, lab.node("n2")?);
        let uri = lab.uri("n1-d1")?;
        ensure!(NbdClient::connect(&uri)?.read(0, 4096)? == [5; 4096]);
        daemons.1.says("has been repaired")?;
        stop_all(daemons)?;
        ensure!(is_whole(&disk)?, "the superblock at {at} was not repaired");
    }
    spoil(&disk, SUPERBLOCK)?;
    spoil(&disk, second)?;
    let before = bytes(&disk)?;
    let (_manager, mut n1, _n2) = (lab.manager()?, lab.node("n1")?, lab.node("n2")?);
    n1.says("both superblocks are damaged")?;
    n1.says("mirrorctl disk inspect")?;
    let path = disk.display().to_string();
    let status = until("status to tell of it", || {
        let status = lab.ctl(&["status"])?;
        Ok(status.out.contains("both superblocks are damaged").then_some(status))
    })?;
    ensure!(status.code != 0 && status.out.contains(&path), "{status:?}");
    ensure!(n1.runs()?, "the daemon ended: {}", n1.log());
    ensure!(before == bytes(&disk)?, "the disk was changed");
    Ok(())
}

#[test]
fn an_unknown_node_is_not_failed_over() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    let _daemons = lab.cluster()?;
    let before = lab.map_version()?;
    lab.ctl(&["node", "failover", "n7"])?.refused(1, &["n7", "n1", "n2"])?;
    ensure!(lab.map_version()? == before);
    Ok(())
}

#[test]
fn a_wrong_cluster_file_is_refused_with_line_and_field() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    let config = lab.write_config("wrong.toml", |_| "64 megs".into(), "")?;
    let place = [&format!("{}: line ", config.display()), "node.disk.size", "64 megs"];
    lab.node_ends("wrong.toml", "n1", "wrong")?.refused(1, &place)?;
    lab.manager_ends("wrong.toml", "wrong")?.refused(1, &place)?;
    lab.ctl_with("wrong.toml", &["status"])?.refused(1, &place)?;
    lab.write_config("wrong.toml", |_| "64M".into(), "copees = 2\n")?;
    lab.ctl_with("wrong.toml", &["cluster", "create"])?.refused(1, &["line ", "copees"])?;
    lab.node_ends("cluster.toml", "n7", "wrong")?.refused(1, &["n7", "n1, n2", "--node"])?;
    lab.node_ends("absent.toml", "n1", "wrong")?.refused(1, &["absent.toml"])?;
    ensure!(!lab.disk("n1").exists(), "a disk was made");
    Ok(())
}

#[test]
fn a_port_in_use_is_named() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    let (node, manager, nbd) = (lab.address("n1"), lab.manager_address(), lab.address_of(5));
    lab.write_config("tcp.toml", |_| "64M".into(), &format!("nbd = \"{nbd}\"\n"))?;
    let taken = [TcpListener::bind(&node)?, TcpListener::bind(&manager)?];
    lab.node_ends("cluster.toml", "n1", "n1")?.refused(1, &[&node, "another program"])?;
    lab.manager_ends("cluster.toml", "manager")?.refused(1, &[&manager, "another manager"])?;
    ensure!(!lab.disk("n1").exists(), "a disk was made");
    drop(taken);
    let _taken = TcpListener::bind(&nbd)?;
    lab.node_ends("tcp.toml", "n1", "n1")?.refused(1, &[&nbd, "another program"])
}

#[test]
fn ublk_is_not_pretended() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    lab.write_config("ublk.toml", |_| "64M".into(), "")?;
    let text = std::fs::read_to_string(lab.path("ublk.toml"))?.replace("\"nbd\"", "\"ublk\"");
    std::fs::write(lab.path("ublk.toml"), text)?;
    // Where these tests run there may be ublk; then there is nothing to refuse.
    if Command::new(program("ublk-probe")).output()?.status.success() {
        return lab.node_with("ublk.toml", "n1", "n1")?.says("waiting for the manager");
    }
    lab.node_ends("ublk.toml", "n1", "n1")?.refused(1, &["ublk cannot be used", "ublk-probe", "nbd"])
}

#[test]
fn a_key_that_everybody_can_read_is_refused() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    std::fs::set_permissions(lab.path("key"), std::fs::Permissions::from_mode(0o644))?;
    lab.node_ends("cluster.toml", "n1", "n1")?.refused(1, &["everybody", "chmod 600"])?;
    lab.ctl(&["status"])?.refused(1, &["everybody", "chmod 600"])
}

#[test]
fn another_key_opens_nothing() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    let (manager, mut n1, n2) = lab.cluster()?;
    let before = lab.map_version()?;
    lab.write_key(&lab.path("other-key"), 8)?;
    let text = std::fs::read_to_string(lab.path("cluster.toml"))?;
    std::fs::write(lab.path("other.toml"), text.replace("/key\"", "/other-key\""))?;
    lab.ctl_with("other.toml", &["node", "failover", "n1"])?.refused(3, &["another cluster key", "copy"])?;
    manager.says("another cluster key")?;
    // A node with it tries on, and says so once.
    let text = std::fs::read_to_string(lab.path("other.toml"))?;
    let text = text.replace(&lab.address("n2"), &lab.address_of(6)).replace("n2.img", "stranger.img");
    std::fs::write(lab.path("elsewhere.toml"), text)?;
    let stranger = lab.node_with("elsewhere.toml", "n2", "elsewhere")?;
    stranger.says("another cluster key")?;
    ensure!(stranger.log().matches("cannot reach the manager").count() == 1, "{}", stranger.log());
    ensure!(n1.runs()? && lab.map_version()? == before, "something was changed");
    ensure!(bytes(&lab.path("stranger.img"))?.iter().all(|byte| *byte == 0), "a disk was changed");
    // In the place of a node of the cluster it is no partner.
    n2.stop()?;
    let stranger = lab.node_with("other.toml", "n2", "stranger")?;
    n1.says("another cluster key")?;
    stranger.says("a connection was refused")?;
    ensure!(n1.runs()?);
    Ok(())
}

#[test]
fn another_protocol_version_is_named_at_both_ends() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    {
        let (manager, n1, _n2) = (lab.manager()?, lab.node("n1")?, lab.node("n2")?);
        for (address, daemon) in [(lab.manager_address(), &manager), (lab.address("n1"), &n1)] {
            let mut hello = [0; HELLO_BYTES];
            hello[..8].copy_from_slice(b"UBMHELLO");
            hello[8..10].copy_from_slice(&99u16.to_le_bytes());
            let mut stream = TcpStream::connect(&address)?;
            stream.write_all(&hello)?;
            let mut challenge = [0; HELLO_BYTES];
            stream.read_exact(&mut challenge)?;
            ensure!(&challenge[..8] == b"UBMCHALL", "it does not say what it speaks itself");
            daemon.says("speaks protocol version 99, this program version 1: install the same release")?;
        }
    }
    // Now the other way round: a manager from another time.
    let listener = TcpListener::bind(lab.manager_address())?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut challenge = [0; HELLO_BYTES];
            challenge[..8].copy_from_slice(b"UBMCHALL");
            challenge[8..10].copy_from_slice(&77u16.to_le_bytes());
            let mut hello = [0; HELLO_BYTES];
            // Whoever hangs up meanwhile has seen enough.
            let _ = stream.read_exact(&mut hello).and_then(|()| stream.write_all(&challenge));
        }
    });
    let says = "speaks protocol version 77, this program version 1: install the same release";
    lab.ctl(&["status"])?.refused(3, &[says])?;
    lab.node_with("cluster.toml", "n1", "later")?.says(says)
}

#[test]
fn nothing_runs_twice() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    let (_manager, mut n1, _n2) = lab.cluster()?;
    let before = lab.map_version()?;
    lab.manager_ends("cluster.toml", "manager")?
        .refused(1, &["another manager uses this state directory"])?;
    lab.node_ends("cluster.toml", "n1", "n1")?
        .refused(1, &["another ublk-server of this node is running"])?;
    lab.node_ends("cluster.toml", "n1", "copy")?.refused(1, &[&lab.address("n1"), "another program"])?;
    // On another port with the same disk.
    let text = std::fs::read_to_string(lab.path("cluster.toml"))?;
    std::fs::write(lab.path("moved.toml"), text.replace(&lab.address("n1"), &lab.address_of(6)))?;
    let disk = lab.disk("n1").display().to_string();
    lab.node_ends("moved.toml", "n1", "copy")?.refused(1, &[&disk, "in use"])?;
    // And with a disk of its own: the manager knows n1 already.
    std::fs::write(
        lab.path("moved.toml"),
        text.replace(&lab.address("n1"), &lab.address_of(6)).replace("n1.img", "n1-copy.img"),
    )?;
    lab.node_ends("moved.toml", "n1", "copy")?.refused(1, &["the manager refused this node"])?;
    ensure!(n1.runs()? && lab.map_version()? == before, "something was changed");
    NbdClient::connect(&lab.uri("n1-d1")?)?.write(0, &[1; 4096])
}

#[test]
fn noise_harms_nobody() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    let (mut manager, mut n1, mut n2) = lab.cluster()?;
    let uri = lab.uri("n1-d1")?;
    let mut client = NbdClient::connect(&uri)?;
    client.write(0, &[1; 4096])?;
    let mut hello = vec![0; HELLO_BYTES];
    hello[..8].copy_from_slice(b"UBMHELLO");
    hello[8] = 1;
    hello[10] = 2;
    let mut proof = hello.clone();
    // The longest identity there is, and no proof that fits.
    proof.extend([0xFF; 34 + 5000]);
    let noises: [&[u8]; 6] = [b"", b"GET / HTTP/1.1\r\n\r\n", &hello[..20], &hello, &proof, &[0xFF; 70_000]];
    let mut open = Vec::new();
    for address in [lab.manager_address(), lab.address("n1"), lab.address("n2")] {
        // More than there are places for handshakes, and some stay open.
        for index in 0..96 {
            let mut stream = TcpStream::connect(&address)?;
            // Being hung up on is what is expected.
            let _ = stream.write_all(noises[index % noises.len()]);
            if index % 2 == 0 {
                open.push(stream);
            }
        }
    }
    let (_, socket) = uri.split_once("?socket=").context("a unix socket")?;
    for index in 0..96 {
        let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
        let _ = stream.write_all(noises[index % noises.len()]);
    }
    client.write(4096, &[2; 4096])?;
    until("status to say healthy", || Ok((lab.ctl(&["status"])?.code == 0).then_some(())))?;
    ensure!(client.read(4096, 4096)? == [2; 4096]);
    ensure!(NbdClient::connect(&uri)?.read(0, 4096)? == [1; 4096]);
    ensure!(manager.runs()? && n1.runs()? && n2.runs()?);
    drop(open);
    Ok(())
}

#[test]
fn mirrorctl_has_an_exit_code_for_everything() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    for wrong in [
        &["frobnicate"][..],
        &[],
        &["node"],
        &["node", "failover"],
        &["status", "--jsn"],
        &["disk", "inspect"],
        &["playground"],
        &["playground", "--dir", "/tmp/p", "--nodes", "1"],
        &["playground", "--dir", "/tmp/p", "--disk-size", "1 gig"],
    ] {
        lab.ctl(wrong)?.refused(64, &["mirrorctl: ", "`mirrorctl --help`"])?;
    }
    for asked in [&["status"][..], &["map", "show"], &["device", "list"], &["node", "failover", "n1"]] {
        lab.ctl(asked)?.refused(3, &[&lab.manager_address(), "mirrorctl manager run"])?;
    }
    Ok(())
}

/// A user without any rights, as every Linux has it.
const NOBODY: u32 = 65_534;

#[test]
fn without_rights_a_daemon_says_what_it_may_not_do() -> anyhow::Result<()> {
    let lab = Lab::new("64M")?;
    File::create(lab.disk("n1"))?.set_len(64 << 20)?;
    // Root may do everything, so it is somebody else then.
    let user = nix::unistd::geteuid().is_root().then_some(NOBODY);
    let folder = lab.path("key").parent().context("no folder")?.to_owned();
    for path in [&folder, &lab.path("key"), &lab.disk("n1")] {
        chown(path, user, None)?;
    }
    let forbid = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode));
    forbid(&lab.path("key"), 0)?;
    lab.node_ends_as(user, "n1")?.refused(1, &["key", "Permission denied"])?;
    forbid(&lab.path("key"), 0o600)?;
    forbid(&lab.disk("n1"), 0)?;
    lab.node_ends_as(user, "n1")?
        .refused(1, &[&lab.disk("n1").display().to_string(), "Permission denied"])?;
    forbid(&lab.disk("n1"), 0o600)?;
    ensure!(bytes(&lab.disk("n1"))?.iter().all(|byte| *byte == 0), "its disk was changed");
    Ok(())
}

#[test]
fn a_huge_device_takes_little_memory_and_no_time_when_idle() -> anyhow::Result<()> {
    const TIB: u64 = 1 << 40;
    let lab = Lab::new("3T")?;
    let config = std::fs::read_to_string(lab.path("cluster.toml"))?;
    std::fs::write(lab.path("cluster.toml"), config.replace("1MiB", "64MiB"))?;
    for node in ["n1", "n2"] {
        File::create(lab.disk(node))?.set_len(3 * TIB)?;
    }
    let (_manager, n1, _n2) = lab.cluster()?;
    let mut client = NbdClient::connect(&lab.uri("n1-d1")?)?;
    ensure!(client.size >= TIB, "the device has {} bytes", client.size);
    for at in [0, 100 << 30, client.size - 4096] {
        client.write(at, &[3; 4096])?;
        ensure!(client.read(at, 4096)? == [3; 4096]);
    }
    client.flush()?;
    for node in ["n1", "n2"] {
        let blocks = std::os::unix::fs::MetadataExt::blocks(&lab.disk(node).metadata()?);
        ensure!(blocks * 512 < 1 << 30, "{node}'s sparse file has grown to {} bytes", blocks * 512);
    }
    // Once it has compared its slices with its partner's it does nothing, as the clock of its own time says,
    // whatever else the machine does: less than a hundredth of a core.
    let ticks = until("the daemon to be idle", || {
        let before = cpu_ticks(n1.pid())?;
        std::thread::sleep(Duration::from_secs(5));
        Ok(Some(cpu_ticks(n1.pid())? - before).filter(|ticks| *ticks <= 5))
    })?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", n1.pid()))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse()?;
    println!("measured: {} MiB at most, {ticks} ticks of 10 ms in 5 s", peak >> 10);
    ensure!(peak <= 200 << 10, "{peak} KiB");
    Ok(())
}

/// How long a process has computed, in ticks of 10 ms.
fn cpu_ticks(pid: i32) -> anyhow::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = stat.rsplit_once(')').context("an odd stat")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}
