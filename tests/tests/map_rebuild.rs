//! Every store is lost, or another one is to be used: the map comes back from the nodes, and nothing that was
//! acknowledged is gone.

use anyhow::{Context, ensure};
use mirror_tests::etcd::Etcd;
use mirror_tests::nbd::NbdClient;
use mirror_tests::playground::Playground;

const MIB: u64 = 1 << 20;

fn refused(play: &Playground, arguments: &[&str]) -> anyhow::Result<String> {
    let output = play.mirrorctl(arguments)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{arguments:?}: {} {text}", output.status);
    Ok(text)
}

#[test]
fn the_map_comes_back_from_the_nodes() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    client.write(MIB, &vec![1; 4096])?;
    // The map is not the first one any more.
    play.kill("n2")?;
    client.write(MIB, &vec![2; 4096])?;
    let before = play.json(&["map", "show"])?;
    ensure!(before["version"].as_u64() > Some(1), "{before:#}");

    play.kill("manager")?;
    std::fs::remove_dir_all(play.dir.join("manager").join("state"))?;
    play.restart("manager")?;
    client.write(2 * MIB, &vec![3; 4096])?;
    let rebuild = ["map", "rebuild", "--from-nodes"];
    let text = play.until("n1 has registered", || {
        let text = refused(&play, &rebuild)?;
        Ok((!text.contains("n1")).then_some(text))
    })?;
    ensure!(text.contains("not connected: n2; a node that is missing may have a newer map"), "{text}");
    // What n2 has is stale, by the map that n1 has kept: nothing has to wait for it but its own.
    let text = play.must(&["map", "rebuild", "--from-nodes", "--force-without", "n2", "--dry-run"])?;
    ensure!(text.contains("n2-d1-unmirrored slices"), "{text}");
    ensure!(!text.contains("n1-d1 slices"), "{text}");
    ensure!(refused(&play, &["map", "show"])?.contains("no cluster has been created yet"));

    play.restart("n2")?;
    play.until("the map is rebuilt", || Ok(play.mirrorctl(&rebuild)?.status.success().then_some(())))?;
    play.healthy()?;
    ensure!(refused(&play, &rebuild)?.contains("nothing is to be rebuilt"));
    let after = play.json(&["map", "show"])?;
    ensure!(after["id"] == before["id"], "{after:#}");
    ensure!(after["version"].as_u64() > before["version"].as_u64().map(|version| version + 1000));
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    ensure!(client.read(MIB, 4096)? == vec![2; 4096]);
    ensure!(client.read(2 * MIB, 4096)? == vec![3; 4096]);
    Ok(())
}

/// The manager stops, and is started with another cluster file.
fn restart_with(play: &Playground, text: &str) -> anyhow::Result<()> {
    play.kill("manager")?;
    std::fs::write(play.dir.join("cluster.toml"), text)?;
    play.restart("manager")
}

/// Both nodes are seen to be somebody's whose map is not there; and then the map is there, newer than that version.
fn rebuilt(play: &Playground, version: u64) -> anyhow::Result<u64> {
    let text = play.until("both nodes are known", || {
        let output = play.mirrorctl(&["status"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let told = ["n1", "n2"].map(|node| text.contains(&format!("the disks of {node} belong to cluster")));
        Ok((told == [true; 2]).then_some(text))
    })?;
    ensure!(text.contains("mirrorctl map rebuild --from-nodes"), "{text}");
    play.must(&["map", "rebuild", "--from-nodes"])?;
    play.healthy()?;
    let map = play.json(&["map", "show"])?;
    let now = map["version"].as_u64().context("no version")?;
    ensure!(now > version + 1000, "{map:#}");
    Ok(now)
}

/// A manager that decides: a write waits until it has recorded that the other copy is away.
fn decides(play: &Playground, client: &mut NbdClient, value: u8) -> anyhow::Result<()> {
    play.kill("n2")?;
    client.write(MIB, &vec![value; 4096])?;
    play.restart("n2")?;
    play.healthy()
}

#[test]
fn the_map_moves_to_an_etcd_and_back() -> anyhow::Result<()> {
    let (etcd, play) = (Etcd::start(1), Playground::start(2)?);
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    decides(&play, &mut client, 1)?;
    let before = play.json(&["map", "show"])?;
    let version = before["version"].as_u64().context("no version")?;
    let in_file = std::fs::read_to_string(play.dir.join("cluster.toml"))?;
    let in_etcd = in_file.replacen("[[node]]", &format!("{}[[node]]", etcd.table()), 1);

    restart_with(&play, &in_etcd)?;
    client.write(2 * MIB, &vec![2; 4096])?;
    let version = rebuilt(&play, version)?;
    let map = play.json(&["map", "show"])?;
    ensure!(map["id"] == before["id"] && map["devices"] == before["devices"], "{map:#}");
    decides(&play, &mut client, 3)?;
    // It is there for the next one.
    play.kill("manager")?;
    play.restart("manager")?;
    play.healthy()?;
    ensure!(play.must(&["events"])?.contains("rebuilt from the nodes by the operator"));

    // By mistake on the old store again: nobody listens to it.
    restart_with(&play, &in_file)?;
    let text = play.until("both nodes turn it away", || {
        let output = play.mirrorctl(&["status"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok((text.matches("this manager's map is an old one").count() == 2).then_some(text))
    })?;
    ensure!(text.starts_with("unavailable: "), "{text}");
    let rebuild = ["map", "rebuild", "--from-nodes"];
    ensure!(refused(&play, &rebuild)?.contains("start the manager with an empty store"));
    client.write(4 * MIB, &vec![4; 4096])?;

    // Back, as it should be done.
    std::fs::rename(play.dir.join("manager/state"), play.dir.join("manager/state.old"))?;
    restart_with(&play, &in_file)?;
    rebuilt(&play, version)?;
    decides(&play, &mut client, 5)?;
    play.kill("n1")?;
    play.restart("n1")?;
    play.healthy()?;
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    for (offset, value) in [(MIB, 5), (2 * MIB, 2), (4 * MIB, 4)] {
        ensure!(client.read(offset, 4096)? == vec![value; 4096], "at {offset}");
    }
    Ok(())
}
