//! Copies are moved elsewhere under load, whoever dies meanwhile.

use anyhow::{Context, ensure};
use mirror_tests::nbd::NbdClient;
use mirror_tests::playground::Playground;
use mirror_tests::sim::scheduler::Random;
use mirror_tests::stamps::Workload;
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
