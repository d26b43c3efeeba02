//! A disk and a node enter a running cluster, under reads and writes, and others leave it for them.

use anyhow::{Context, ensure};
use mirror_tests::nbd::NbdClient;
use mirror_tests::playground::{Playground, program};
use mirror_tests::sim::scheduler::Random;
use mirror_tests::tenant::Tenant;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A daemon beside those of the playground, ended with the test.
struct Daemon(Child);

impl Daemon {
    fn start(play: &Playground, node: &str) -> anyhow::Result<Self> {
        let place = play.dir.join(node);
        let log = File::options().create(true).append(true).open(place.join("log"))?;
        let mut command = Command::new(program("ublk-server"));
        command.args(["run", "--node", node, "--config"]).arg(play.dir.join("cluster.toml"));
        command.arg("--state-dir").arg(place.join("state")).arg("--run-dir").arg(place.join("run"));
        Ok(Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?))
    }

    fn kill(mut self) -> anyhow::Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let ended = mirror_tests::playground::signal(self.0.id() as i32, Signal::SIGTERM);
            if ended.is_err() || self.0.wait().is_err() {
                eprintln!("a daemon may be left: {:?}", self.0);
            }
        }
    }
}

fn file_of(path: &Path, bytes: u64) -> anyhow::Result<()> {
    Ok(File::create(path)?.set_len(bytes)?)
}

fn work_until_done(play: &Playground, tenants: &mut [Tenant], random: &mut Random) -> anyhow::Result<()> {
    play.until("the plan's end", || {
        tenants.iter_mut().try_for_each(|tenant| tenant.work(random))?;
        Ok(play.json(&["plan", "list"])?.as_array().is_some_and(Vec::is_empty).then_some(()))
    })
}

/// What `disk list` says, as `NODE/DISK state`, and the bytes that are used.
fn disks(play: &Playground) -> anyhow::Result<Vec<(String, u64)>> {
    let disks = play.json(&["disk", "list"])?;
    let line = |disk: &Value| {
        let text = |field: &str| disk[field].as_str().unwrap_or("?").to_owned();
        let used = disk["used_bytes"].as_u64().unwrap_or(0);
        (format!("{}/{} {}", text("node"), text("disk"), text("state")), used)
    };
    Ok(disks.as_array().into_iter().flatten().map(line).collect())
}

fn used(play: &Playground, disk: &str) -> anyhow::Result<u64> {
    let disks = disks(play)?;
    let found = disks.iter().find(|(name, _)| name == &format!("{disk} ok"));
    Ok(found.with_context(|| format!("{disk} is not among {disks:?}"))?.1)
}

fn refused(play: &Playground, arguments: &[&str], reason: &str) -> anyhow::Result<()> {
    let output = play.mirrorctl(arguments)?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1) && told.lines().count() == 1, "{arguments:?}: {told}");
    ensure!(told.contains(reason), "{arguments:?}: {told}");
    Ok(())
}

/// Adds a node to the playground's cluster file, with a disk.
fn describe_node(play: &Playground, node: &str) -> anyhow::Result<PathBuf> {
    let place = play.dir.join(node);
    std::fs::create_dir(&place)?;
    let disk = place.join("d1.img");
    file_of(&disk, 1 << 30)?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut file = File::options().append(true).open(play.dir.join("cluster.toml"))?;
    write!(
        file,
        "\n[[node]]\nname = \"{node}\"\naddress = \"127.0.0.1:{port}\"\n[[node.disk]]\npath = {disk:?}\n"
    )?;
    Ok(disk)
}

#[test]
fn a_disk_and_a_node_enter_under_load_and_others_leave() -> anyhow::Result<()> {
    let mut play = Playground::start_like(3, "nbd", "1G", &[])?;
    let mut random = Random::new(11);
    let mut tenants = Vec::new();
    for name in ["n1-d1", "n2-d1", "n3-d1"] {
        let mut tenant = Tenant::connect(&play, name)?;
        (0..100).try_for_each(|_| tenant.work(&mut random))?;
        tenants.push(tenant);
    }

    // What is not well is refused, and changes nothing.
    let new = play.dir.join("n1/d2.img");
    let path = new.to_str().context("a path of text")?;
    refused(&play, &["disk", "add", "n1/d2", path], "does not exist")?;
    file_of(&new, 1 << 30)?;
    let own = play.disk("n1");
    refused(
        &play,
        &["disk", "add", "n1/d2", own.to_str().unwrap_or("?")],
        "in use by ublk-server here as disk d1",
    )?;
    refused(&play, &["disk", "add", "n9/d2", path], "there is no node \"n9\", only n1, n2, n3")?;
    let before = play.json(&["map", "show"])?;
    let told = play.must(&["disk", "add", "n1/d2", path, "--dry-run"])?;
    ensure!(
        told.contains("n1/d2") && told.contains("to copy") && told.contains("nothing was changed"),
        "{told}"
    );
    ensure!(play.json(&["map", "show"])? == before, "a dry run changed the map");

    // The disk enters while everybody works, and gets its share.
    play.must(&["disk", "add", "n1/d2", path])?;
    tenants.iter_mut().try_for_each(|tenant| (0..20).try_for_each(|_| tenant.work(&mut random)))?;
    ensure!(used(&play, "n1/d2")? == 0, "{:?}", disks(&play)?);
    play.must(&["rebalance"])?;
    work_until_done(&play, &mut tenants, &mut random)?;
    ensure!(used(&play, "n1/d2")? > 100 << 20, "{:?}", disks(&play)?);
    play.healthy()?;

    // A daemon that is started again finds it, though the cluster file does not name it.
    play.kill("n1")?;
    let Tenant { client, content, .. } = tenants.remove(0);
    drop(client);
    play.restart("n1")?;
    play.healthy()?;
    let mut back = Tenant::connect(&play, "n1-d1")?;
    back.content = content;
    back.check_all()?;
    tenants.push(back);

    // The first disk leaves for it, and is let go of: another one can have its place and its name at once.
    play.must(&["disk", "remove", "n1/d1"])?;
    work_until_done(&play, &mut tenants, &mut random)?;
    let listed = |expected: &[&str]| {
        play.until(&format!("the disks are {expected:?}"), || {
            let listed: Vec<String> = disks(&play)?.into_iter().map(|(name, _)| name).collect();
            Ok((listed == expected).then_some(()))
        })
    };
    listed(&["n2/d1 ok", "n3/d1 ok", "n1/d2 ok"])?;
    std::fs::rename(&own, own.with_extension("broken"))?;
    file_of(&own, 1 << 30)?;
    play.must(&["disk", "add", "n1/d1", own.to_str().context("a path of text")?])?;
    play.must(&["rebalance"])?;
    work_until_done(&play, &mut tenants, &mut random)?;
    ensure!(used(&play, "n1/d1")? > 100 << 20, "{:?}", disks(&play)?);
    play.must(&["disk", "remove", "n1/d1"])?;
    work_until_done(&play, &mut tenants, &mut random)?;
    listed(&["n2/d1 ok", "n3/d1 ok", "n1/d2 ok"])?;

    // A node waits, is added, and takes what another had.
    describe_node(&play, "n4")?;
    refused(&play, &["node", "add", "n4"], "n4 is not connected: start ublk-server there")?;
    let daemon = Daemon::start(&play, "n4")?;
    play.until("n4 waits", || {
        let status = play.must(&["status"])?;
        Ok(status.contains("mirrorctl node add n4").then_some(()))
    })?;
    play.must(&["node", "add", "n4", "--dry-run"])?;
    play.must(&["node", "add", "n4"])?;
    play.must(&["rebalance"])?;
    work_until_done(&play, &mut tenants, &mut random)?;
    ensure!(used(&play, "n4/d1")? > 100 << 20, "{:?}", disks(&play)?);
    let position = tenants.iter().position(|tenant| tenant.name == "n2-d1").context("the tenant of n2")?;
    let Tenant { client, content, .. } = tenants.remove(position);
    drop(client);
    play.must(&["node", "remove", "n2", "--force"])?;
    work_until_done(&play, &mut tenants, &mut random)?;
    let mut moved = Tenant::connect(&play, "n2-d1")?;
    moved.content = content;
    tenants.push(moved);
    tenants.iter_mut().try_for_each(Tenant::check_all)?;
    play.healthy()?;
    let contents: Vec<_> = tenants.into_iter().map(|tenant| (tenant.name, tenant.content)).collect();

    // All of it outlives everybody.
    daemon.kill()?;
    play.kill("n1")?;
    play.kill("n3")?;
    play.restart("n1")?;
    play.restart("n3")?;
    let _daemon = Daemon::start(&play, "n4")?;
    play.healthy()?;
    let listed: Vec<String> = disks(&play)?.into_iter().map(|(name, _)| name).collect();
    ensure!(listed == ["n3/d1 ok", "n1/d2 ok", "n4/d1 ok", "n1/d1 removed"], "{listed:?}");
    for (name, content) in contents {
        let client = play.until("it is exported", || Ok(NbdClient::connect(&play.uri(name)?).ok()))?;
        Tenant { name, client, content }.check_all()?;
    }
    // What was removed comes back as a new disk.
    let path = own.to_str().context("a path of text")?;
    refused(&play, &["disk", "add", "n1/d1", path], "already belongs to cluster")?;
    play.must(&["disk", "add", "n1/d1", path, "--force", "--spare"])?;
    let listed: Vec<String> = disks(&play)?.into_iter().map(|(name, _)| name).collect();
    ensure!(listed == ["n3/d1 ok", "n1/d2 ok", "n4/d1 ok", "n1/d1 spare"], "{listed:?}");
    play.healthy()?;
    play.stop()
}
