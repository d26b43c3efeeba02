//! Every store is lost: the map comes back from the nodes, and nothing that was acknowledged is gone.

use anyhow::ensure;
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
