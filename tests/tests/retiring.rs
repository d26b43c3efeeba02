//! A node and a disk leave the cluster, under reads and writes.

use anyhow::ensure;
use mirror_tests::nbd::NbdClient;
use mirror_tests::playground::Playground;
use mirror_tests::sim::scheduler::Random;
use mirror_tests::tenant::Tenant;
use serde_json::Value;

fn work_until_done(play: &Playground, tenants: &mut [Tenant], random: &mut Random) -> anyhow::Result<()> {
    play.until("the plan's end", || {
        tenants.iter_mut().try_for_each(|tenant| tenant.work(random))?;
        Ok(play.json(&["plan", "list"])?.as_array().is_some_and(Vec::is_empty).then_some(()))
    })
}

/// The names of what a part of the map lists, without the disks' nodes.
fn names(play: &Playground, part: &str) -> anyhow::Result<Vec<String>> {
    let map = play.json(&["map", "show"])?;
    let name = |entry: &Value| match part {
        "disks" => entry["node"].as_str().unwrap_or("?").to_owned(),
        _ => entry["name"].as_str().unwrap_or("?").to_owned(),
    };
    Ok(map[part].as_array().into_iter().flatten().map(name).collect())
}

#[test]
fn a_node_and_a_disk_leave_under_load_and_stay_away() -> anyhow::Result<()> {
    let mut play = Playground::start_like(3, "nbd", "1G", &["--spares", "2"])?;
    let mut random = Random::new(7);
    let mut all = ["n1-d1", "n2-d1", "n3-d1"].map(|name| Tenant::connect(&play, name));
    let mut tenants = Vec::new();
    for tenant in &mut all {
        let tenant = tenant.as_mut().map_err(|error| anyhow::anyhow!("{error:#}"))?;
        (0..100).try_for_each(|_| tenant.work(&mut random))?;
    }
    for tenant in all {
        tenants.push(tenant?);
    }

    // Somebody uses what n1 exports: he is not cut off unasked.
    play.until("n1 tells of its client", || {
        let refused = play.mirrorctl(&["node", "remove", "n1", "--onto", "n4", "--dry-run"])?;
        let line = String::from_utf8_lossy(&refused.stderr).into_owned();
        Ok((line.contains("n1-d1 is in use") && line.lines().count() == 1).then_some(()))
    })?;
    let Tenant { client, content, .. } = tenants.remove(0);
    drop(client);
    let told = play.until("n1 is without a client", || {
        let told = play.mirrorctl(&["node", "remove", "n1", "--onto", "n4", "--dry-run"])?;
        Ok(told.status.success().then(|| String::from_utf8_lossy(&told.stdout).into_owned()))
    })?;
    ensure!(told.contains("then n1 leaves the cluster with n1/d1") && told.contains("to copy"), "{told}");
    ensure!(names(&play, "nodes")?.len() == 5, "a dry run changed the map");

    play.must(&["node", "remove", "n1", "--onto", "n4"])?;
    work_until_done(&play, &mut tenants, &mut random)?;
    ensure!(names(&play, "nodes")? == ["n2", "n3", "n4", "n5"], "{:?}", names(&play, "nodes")?);
    play.until("n1's daemon ends", || {
        let log = std::fs::read_to_string(play.dir.join("n1/log"))?;
        Ok(log.contains("removed from the cluster").then_some(()))
    })?;
    let mut moved = Tenant::connect(&play, "n1-d1")?;
    moved.content = content;
    moved.check_all()?;
    tenants.push(moved);

    // A disk goes, its node stays and exports.
    play.must(&["disk", "remove", "n2/d1", "--onto", "n5"])?;
    work_until_done(&play, &mut tenants, &mut random)?;
    ensure!(names(&play, "disks")? == ["n3", "n4", "n5"], "{:?}", names(&play, "disks")?);
    tenants.iter_mut().try_for_each(Tenant::check_all)?;
    let contents: Vec<_> = tenants.into_iter().map(|tenant| (tenant.name, tenant.content)).collect();
    play.healthy()?;

    for node in ["n2", "n3", "n4", "n5"] {
        play.kill(node)?;
    }
    for node in ["n2", "n3", "n4", "n5"] {
        play.restart(node)?;
    }
    play.until("all are back and in sync", || {
        let devices = play.json(&["device", "list"])?;
        let mut devices = devices.as_array().into_iter().flatten();
        Ok(devices.all(|device| device["copies_in_sync"] == device["copies"]).then_some(()))
    })?;
    ensure!(names(&play, "disks")? == ["n3", "n4", "n5"], "{:?}", names(&play, "disks")?);
    for (name, content) in contents {
        let client = play.until("it is exported", || Ok(NbdClient::connect(&play.uri(name)?).ok()))?;
        Tenant { name, client, content }.check_all()?;
    }
    play.stop()
}
