//! A node that works is made a spare, and takes the place of another again, under reads and writes.

use anyhow::{Context, ensure};
use mirror_net::ids::DeviceId;
use mirror_tests::contents::slices;
use mirror_tests::playground::Playground;
use mirror_tests::sim::scheduler::Random;
use mirror_tests::tenant::Tenant;

/// Devices are numbered in the order of the cluster file: n1-d1, n1-d1-unmirrored, n2-d1.
const NAMES: [(&str, DeviceId); 3] =
    [("n1-d1", DeviceId(1)), ("n1-d1-unmirrored", DeviceId(2)), ("n2-d1", DeviceId(3))];

/// Where copies of a device are, as nodes, each once.
fn nodes_of(play: &Playground, device: &str) -> anyhow::Result<Vec<String>> {
    let map = play.json(&["map", "show"])?;
    let mut devices = map["devices"].as_array().into_iter().flatten();
    let device = devices.find(|found| found["name"] == device).context("no such device")?;
    let spans = device["spans"].as_array().into_iter().flatten();
    let replicas = spans.flat_map(|span| span["replicas"].as_array().into_iter().flatten());
    let mut nodes: Vec<String> =
        replicas.map(|replica| replica["node"].as_str().unwrap_or("?").to_owned()).collect();
    nodes.sort();
    nodes.dedup();
    Ok(nodes)
}

fn is_spare(play: &Playground, node: &str) -> anyhow::Result<bool> {
    let disks = play.json(&["map", "balance"])?;
    let mut disks = disks.as_array().into_iter().flatten();
    Ok(disks.any(|disk| disk["node"] == node && disk["state"] == "spare" && disk["used_bytes"] == 0))
}

/// Works on all devices until no plan is left.
fn work_until_done(play: &Playground, tenants: &mut [Tenant], random: &mut Random) -> anyhow::Result<u32> {
    let mut rounds = 0;
    play.until("the plan's end", || {
        for tenant in &mut *tenants {
            tenant.work(random)?;
        }
        rounds += 1;
        Ok(play.json(&["plan", "list"])?.as_array().is_some_and(Vec::is_empty).then_some(()))
    })?;
    Ok(rounds)
}

#[test]
fn a_node_becomes_a_spare_and_takes_the_others_place_under_load() -> anyhow::Result<()> {
    let mut play = Playground::start_like(2, "nbd", "1G", &["--spares", "1"])?;
    let mut random = Random::new(11);
    let mut tenants = Vec::new();
    for (name, _) in NAMES {
        tenants.push(Tenant::connect(&play, name)?);
    }
    for _ in 0..200 {
        for tenant in &mut tenants {
            tenant.work(&mut random)?;
        }
    }

    // What the disks have to do for that is told; the spare has nothing to do.
    play.until("the disks' loads", || {
        for tenant in &mut tenants {
            tenant.work(&mut random)?;
        }
        let disks = play.json(&["map", "balance"])?;
        let is_told = |disk: &serde_json::Value| {
            let of = |field: &str| disk["load"][field].as_u64();
            let is_used = disk["state"] != "spare";
            let is_busy = |field| of(field).is_some_and(|value| (value > 0) == is_used);
            ["reads", "read_bytes", "writes", "written_bytes"].into_iter().all(is_busy)
        };
        let disks = disks.as_array().context("no list")?;
        Ok((disks.len() == 3 && disks.iter().all(is_told)).then_some(()))
    })?;

    // Without a spare that is named there is no room, and nothing happens.
    let before = play.json(&["map", "show"])?;
    let refused = play.mirrorctl(&["spare", "make", "n1"])?;
    let line = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(refused.status.code() == Some(1) && line.lines().count() == 1, "{line}");
    ensure!(line.contains("more slots are needed") && line.contains("--onto may name a spare"), "{line}");
    let told = play.must(&["spare", "make", "n1", "--onto", "n3", "--dry-run"])?;
    ensure!(told.contains("then n1/d1 is a spare") && told.contains("nothing was changed"), "{told}");
    ensure!(play.json(&["map", "show"])? == before, "a dry run changed the map");

    play.must(&["spare", "make", "n1", "--onto", "n3"])?;
    let rounds = work_until_done(&play, &mut tenants, &mut random)?;
    println!("{rounds} rounds of writes while n1 was emptied");
    ensure!(is_spare(&play, "n1")?, "n1 is no spare");
    for (name, nodes) in [("n1-d1", "n2 n3"), ("n1-d1-unmirrored", "n3"), ("n2-d1", "n2 n3")] {
        ensure!(nodes_of(&play, name)?.join(" ") == nodes, "{name} is on {:?}", nodes_of(&play, name)?);
    }
    // The clients are connected where they were, and saw no error.
    tenants.iter_mut().try_for_each(Tenant::check_all)?;

    // And the other way round: n2 is emptied, disk by disk, onto what is a spare now.
    play.must(&["spare", "make", "--disk", "n2/d1", "--onto", "n1/d1"])?;
    work_until_done(&play, &mut tenants, &mut random)?;
    ensure!(is_spare(&play, "n2")? && !is_spare(&play, "n1")?, "n2 is no spare");
    tenants.iter_mut().try_for_each(Tenant::check_all)?;
    drop(tenants);
    play.healthy()?;
    play.stop()?;
    for (name, device) in NAMES.into_iter().filter(|(name, _)| !name.ends_with("unmirrored")) {
        let [left, one, other] = ["n2", "n1", "n3"].map(|node| slices(&play.disk(node), device));
        ensure!(left?.is_empty(), "{name}: something is left on n2");
        let (one, other) = (one?, other?);
        ensure!(!one.is_empty() && one == other, "{name}: the copies differ");
    }
    Ok(())
}
