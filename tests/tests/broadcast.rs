//! Broadcasts to clusters of real processes: computed where the data is, each slice once.

use anyhow::{Context, ensure};
use mirror_tests::nbd::NbdClient;
use mirror_tests::playground::Playground;
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn rows(answer: &Value) -> Vec<&Value> {
    answer["rows"].as_array().into_iter().flatten().collect()
}

/// The row of a device at a node.
fn row<'a>(answer: &'a Value, device: &str, node: &str) -> anyhow::Result<&'a Value> {
    let found = rows(answer).into_iter().find(|row| row["device"] == device && row["node"] == node);
    found.with_context(|| format!("no answer of {node} for {device}: {answer:#}"))
}

/// The result for a whole device, and of how many slices it is.
fn whole(answer: &Value, device: &str) -> anyhow::Result<(Value, u64)> {
    let devices = answer["devices"].as_array().into_iter().flatten();
    let found = devices.into_iter().find(|found| found["device"] == device);
    let found = found.with_context(|| format!("no answer for {device}: {answer:#}"))?;
    Ok((found["result"].clone(), found["slices"].as_u64().context("no count")?))
}

fn checksum(play: &Playground) -> anyhow::Result<Value> {
    play.json(&["broadcast", "checksum"])
}

#[test]
fn checksums_are_the_same_before_and_after_a_failover() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    let mut other = NbdClient::connect(&play.uri("n2-d1")?)?;
    for (index, at) in [0, 5 * MIB, 64 * MIB - 4096, 70 * MIB, 130 * MIB].into_iter().enumerate() {
        client.write(at, &vec![index as u8 + 1; 12 << 10])?;
        other.write(at, &vec![index as u8 + 101; 8 << 10])?;
    }
    client.flush()?;
    let first = checksum(&play)?;
    ensure!(first["complete"] == true, "{first:#}");
    ensure!(row(&first, "n1-d1", "n1")?["segment"] == "primary", "{first:#}");
    ensure!(row(&first, "n2-d1", "n2")?["segment"] == "primary", "{first:#}");
    ensure!(row(&first, "n1-d1-unmirrored", "n1")?["segment"] == "unmirrored", "{first:#}");
    ensure!(rows(&first).len() == 4, "each answers once: {first:#}");
    let (sum, slices) = whole(&first, "n1-d1")?;
    ensure!(whole(&first, "n2-d1")?.0 != sum, "{first:#}");

    // What reads as zeros adds nothing, written or not; a byte that differs does.
    client.write(90 * MIB, &vec![0; 64 << 10])?;
    ensure!(whole(&checksum(&play)?, "n1-d1")?.0 == sum);
    client.write(90 * MIB + 512, &vec![1; 512])?;
    ensure!(whole(&checksum(&play)?, "n1-d1")?.0 != sum);
    client.write(90 * MIB + 512, &vec![0; 512])?;
    ensure!(whole(&checksum(&play)?, "n1-d1")?.0 == sum);

    let usage = play.json(&["broadcast", "usage"])?;
    // Whole regions, a 64th of a slice each.
    let used = whole(&usage, "n2-d1")?.0.as_u64().context("no bytes")?;
    ensure!(used >= 5 * (8 << 10) && used.is_multiple_of(4096), "{usage:#}");
    let text = play.must(&["broadcast", "flush"])?;
    ensure!(text.contains("flushed"), "{text}");

    // In the middle of a failover each slice is counted once all the same.
    drop(client);
    let during = std::thread::scope(|scope| -> anyhow::Result<Value> {
        let asking = scope.spawn(|| checksum(&play));
        play.kill("n1")?;
        play.until("n1 is failed over", || {
            let _ = play.mirrorctl(&["node", "failover", "n1"])?;
            Ok(play.uri("n1-d1")?.contains("/n2/").then_some(()))
        })?;
        asking.join().map_err(|_| anyhow::anyhow!("it panicked"))?
    })?;
    ensure!(whole(&during, "n1-d1")? == (sum.clone(), slices), "{during:#}");

    // The partner answers twice, and says from which segment; for what nobody mirrors nobody answers.
    let after = checksum(&play)?;
    ensure!(row(&after, "n1-d1", "n2")?["segment"] == "secondary", "{after:#}");
    ensure!(row(&after, "n2-d1", "n2")?["segment"] == "primary", "{after:#}");
    ensure!(whole(&after, "n1-d1")? == (sum.clone(), slices), "{after:#}");
    ensure!(whole(&after, "n2-d1")?.0 == whole(&first, "n2-d1")?.0, "{after:#}");
    ensure!(after["complete"] == false, "{after:#}");
    let unserved = &after["unserved"][0];
    ensure!(unserved["device"] == "n1-d1-unmirrored" && unserved["node"] == "n1", "{after:#}");
    let refused = play.mirrorctl(&["broadcast", "usage"])?;
    ensure!(refused.status.code() == Some(1), "{refused:?}");
    let text = String::from_utf8_lossy(&refused.stdout).into_owned();
    ensure!(text.contains("nobody answers for n1-d1-unmirrored slice"), "{text}");

    play.restart("n1")?;
    play.healthy()?;
    let again = checksum(&play)?;
    ensure!(again["complete"] == true, "{again:#}");
    ensure!(whole(&again, "n1-d1")? == (sum, slices), "{again:#}");
    Ok(())
}
