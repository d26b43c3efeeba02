//! Copies are moved elsewhere under load, whoever dies meanwhile.

use anyhow::{Context, ensure};
use mirror_tests::nbd::NbdClient;
use mirror_tests::playground::Playground;
use mirror_tests::sim::scheduler::Random;
use mirror_tests::stamps::Workload;
use serde_json::Value;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// Bytes that nodes say they have sent to make copies equal, new ones and others.
fn moved(play: &Playground) -> u64 {
    let logs = std::fs::read_dir(&play.dir).into_iter().flatten().flatten();
    let texts = logs.filter_map(|entry| std::fs::read_to_string(entry.path().join("log")).ok());
    let number = |text: &str| {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().unwrap_or(0)
    };
    texts.map(|text| text.split("moved_bytes=").skip(1).map(number).sum::<u64>()).sum()
}

#[test]
fn a_node_is_emptied_under_load_while_a_process_dies_every_three_seconds() -> anyhow::Result<()> {
    let (seed, kills, rate) = match std::env::var("UBLK_MIRROR_LONG").is_ok() {
        true => (u64::from(std::process::id()), 20, "8M"),
        false => (1, 4, "30M"),
    };
    let seed = std::env::var("REDISTRIBUTION_SEED").ok().map_or(Ok(seed), |seed| seed.parse())?;
    println!("{kills} kills; with the same again: REDISTRIBUTION_SEED={seed}");
    let mut random = Random::new(seed);
    let play = Playground::start_like(5, "nbd", "512M", &["--spare-after", "10m", "--regen-rate", rate])?;
    play.healthy()?;
    // Room for what n2 has.
    for device in ["n2-d1", "n4-d1", "n5-d1", "n4-d1-unmirrored", "n5-d1-unmirrored"] {
        play.must(&["device", "delete", device, "--yes"])?;
    }
    play.must(&["device", "create", "bulk", "--size", "64M", "--node", "n2"])?;
    play.must(&["device", "create", "hot", "--size", "128M", "--node", "n2"])?;
    let mut client = NbdClient::connect(&play.uri("bulk")?)?;
    let piece = |number: u64| vec![number as u8 + 1; MIB as usize];
    for number in 0..client.size / MIB {
        client.write(number * MIB, &piece(number))?;
    }
    client.flush()?;
    drop(client);
    let mut planned = 0;
    let mut kills_meanwhile = 0;
    let workload = Workload::new(&play, seed, &["n1-d1", "hot", "n3-d1"], 2);
    let emptied = || -> anyhow::Result<bool> {
        let plans = play.json(&["plan", "list"])?;
        Ok(plans.as_array().is_some_and(Vec::is_empty))
    };
    workload.run(|| {
        play.must(&["spare", "make", "n2"])?;
        for kill in 0..kills {
            let until = Instant::now() + Duration::from_secs(3);
            while Instant::now() < until {
                if let Ok(plans) = play.json(&["plan", "list"]) {
                    planned = planned.max(plans[0]["bytes"].as_u64().unwrap_or(0));
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            kills_meanwhile += u32::from(!emptied().unwrap_or(true));
            let victim = ["manager", "n1", "n2", "n3", "n4", "n5"][random.below(6) as usize];
            play.kill(victim).with_context(|| format!("kill {kill}"))?;
            std::thread::sleep(Duration::from_millis(random.below(700)));
            play.restart(victim)?;
        }
        play.until("the plan is over", || Ok(emptied()?.then_some(()))).with_context(|| play.logs())?;
        play.healthy()?;
        workload.pause()?;
        workload.check().with_context(|| play.logs())?;
        Ok(())
    })?;
    let mut client = NbdClient::connect(&play.uri("bulk")?)?;
    for number in 0..client.size / MIB {
        ensure!(client.read(number * MIB, MIB as u32)? == piece(number), "bulk piece {number}");
    }
    let map = play.json(&["map", "show"])?;
    let on_n2 = map["devices"].as_array().into_iter().flatten().any(|device| {
        let spans = device["spans"].as_array().into_iter().flatten();
        spans
            .flat_map(|span| span["replicas"].as_array().into_iter().flatten())
            .any(|copy| copy["node"] == "n2")
    });
    ensure!(!on_n2, "n2 holds something still: {map}");
    let moved = moved(&play);
    println!("planned {} MiB, moved {} MiB, {kills_meanwhile} kills meanwhile", planned / MIB, moved / MIB);
    ensure!(moved >= 64 * MIB && moved * 10 <= planned * 12, "moved {moved} of {planned}");
    ensure!(kills_meanwhile > 0, "all was moved before anybody died");
    // Who is emptied by hand is a spare then.
    let spare = map["disks"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|disk| disk["node"] == "n2" && disk["spare"] == true);
    ensure!(spare, "{map}");
    Ok(())
}

/// The nodes that hold a device's copies; `None` while any is not in sync.
fn holders(map: &Value, device: &str) -> anyhow::Result<Option<BTreeSet<String>>> {
    let mut devices = map["devices"].as_array().into_iter().flatten();
    let device = devices.find(|found| found["name"] == device).context("no such device")?;
    let spans = device["spans"].as_array().into_iter().flatten();
    let mut nodes = BTreeSet::new();
    for copy in spans.flat_map(|span| span["replicas"].as_array().into_iter().flatten()) {
        if copy["state"] != "in_sync" {
            return Ok(None);
        }
        nodes.extend(copy["node"].as_str().map(str::to_owned));
    }
    Ok(Some(nodes))
}

#[test]
fn without_a_spare_a_third_disk_is_emptied_and_takes_the_place_of_a_dead_one() -> anyhow::Result<()> {
    let play = Playground::start_like(5, "nbd", "512M", &["--spare-after", "3s"])?;
    play.healthy()?;
    for device in ["n4-d1", "n5-d1", "n4-d1-unmirrored", "n5-d1-unmirrored"] {
        play.must(&["device", "delete", device, "--yes"])?;
    }
    // What is on n5 has to go elsewhere first.
    play.must(&["device", "create", "filler", "--size", "64M", "--node", "n5"])?;
    let mut filler = NbdClient::connect(&play.uri("filler")?)?;
    for number in 0..filler.size / MIB {
        filler.write(number * MIB, &vec![number as u8 + 1; MIB as usize])?;
    }
    filler.flush()?;
    let workload = Workload::new(&play, 1, &["n1-d1", "n2-d1", "n3-d1"], 2);
    workload.run(|| {
        play.kill("n1")?;
        play.until("what n1 had is in sync on another disk, with no plan left", || {
            let map = play.json(&["map", "show"])?;
            let both = [holders(&map, "n1-d1")?, holders(&map, "n2-d1")?];
            let elsewhere = |nodes: &BTreeSet<String>| nodes.len() == 2 && !nodes.contains("n1");
            let over = play.json(&["plan", "list"])?.as_array().is_some_and(Vec::is_empty);
            Ok((over && both.iter().all(|nodes| nodes.as_ref().is_some_and(elsewhere))).then_some(()))
        })
        .with_context(|| play.logs())?;
        workload.pause()?;
        workload.check().with_context(|| play.logs())?;
        Ok(())
    })?;
    let events = play.must(&["events"])?;
    let told = |what: &str| ensure_told(&events, what);
    told("n5/d1 is emptied: there is no spare for what n1/d1 had")?;
    told("n5/d1 is a spare from now on")?;
    told("n1/d1 is made again on n5/d1")?;
    for number in 0..filler.size / MIB {
        ensure!(
            filler.read(number * MIB, MIB as u32)? == vec![number as u8 + 1; MIB as usize],
            "piece {number}"
        );
    }
    Ok(())
}

fn ensure_told(events: &str, what: &str) -> anyhow::Result<()> {
    ensure!(events.contains(what), "nobody was told that {what}:\n{events}");
    Ok(())
}
