//! Devices made, grown, set, filled and deleted while everything runs.

use anyhow::{Context, ensure};
use mirror_tests::nbd::NbdClient;
use mirror_tests::playground::Playground;
use mirror_tests::sim::scheduler::Random;
use mirror_tests::tenant::Tenant;
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn stamp(value: u8) -> Vec<u8> {
    vec![value; MIB as usize]
}

/// The error of a command that has to fail, in one line.
fn refused(play: &Playground, arguments: &[&str]) -> anyhow::Result<String> {
    let output = play.mirrorctl(arguments)?;
    ensure!(!output.status.success(), "{arguments:?} succeeded");
    let text = String::from_utf8(output.stderr)?;
    ensure!(text.trim().lines().count() == 1, "{text}");
    Ok(text)
}

/// A client once the device has so many bytes for those who connect.
fn client(play: &Playground, device: &str, size: u64) -> anyhow::Result<NbdClient> {
    let client = play.until(&format!("{device} has {size} bytes"), || {
        let client = NbdClient::connect(&play.uri(device)?)?;
        Ok((client.size == size).then_some(client))
    })?;
    client.set_patience(Duration::from_secs(60))?;
    Ok(client)
}

#[test]
fn a_device_is_made_of_anothers_slots_grows_and_reads_as_zeros_where_nothing_was_written()
-> anyhow::Result<()> {
    let play = Playground::start(3)?;
    play.healthy()?;
    let mut old = NbdClient::connect(&play.uri("n1-d1")?)?;
    let pieces = old.size / MIB;
    for piece in 0..pieces {
        old.write(piece * MIB, &stamp(0xaa))?;
    }
    old.flush()?;
    let full = refused(&play, &["device", "create", "db", "--size", "64M", "--node", "n1"])?;
    ensure!(full.contains("free slots in primary or secondary segments"), "{full}");
    // It is known from the node's next report on.
    play.until("the client is seen", || {
        let output = play.mirrorctl(&["device", "delete", "n1-d1", "--yes", "--dry-run"])?;
        Ok(String::from_utf8_lossy(&output.stderr).contains("an NBD client is connected").then_some(()))
    })?;
    let used = refused(&play, &["device", "delete", "n1-d1", "--yes"])?;
    ensure!(used.contains("an NBD client is connected on n1"), "{used}");
    drop(old);
    let asked = refused(&play, &["device", "delete", "n1-d1"])?;
    ensure!(asked.contains("--yes"), "{asked}");
    play.until("nobody is connected", || {
        Ok(play.mirrorctl(&["device", "delete", "n1-d1", "--yes"])?.status.success().then_some(()))
    })?;
    ensure!(play.device("n1-d1").is_err());

    // What was in those slots is nowhere to be seen.
    let dry = play.must(&["device", "create", "db", "--size", "100M", "--node", "n1", "--dry-run"])?;
    ensure!(dry.contains("rounded up from 100 MiB") && dry.contains("dry run"), "{dry}");
    play.must(&["device", "create", "db", "--size", "100M", "--node", "n1"])?;
    let size = 128 * MIB;
    let mut db = client(&play, "db", size)?;
    for piece in 0..size / MIB {
        ensure!(db.read(piece * MIB, MIB as u32)? == stamp(0), "piece {piece} is not zero");
    }
    for piece in 0..size / MIB {
        db.write(piece * MIB, &stamp(piece as u8 + 1))?;
    }
    db.flush()?;
    drop(db);
    play.must(&["device", "resize", "db", "192M"])?;
    let mut db = client(&play, "db", 192 * MIB)?;
    for piece in 0..192 {
        let expected = if piece < 128 { piece as u8 + 1 } else { 0 };
        ensure!(db.read(piece * MIB, MIB as u32)? == stamp(expected), "piece {piece}");
    }
    db.write(150 * MIB, &stamp(7))?;
    ensure!(refused(&play, &["device", "resize", "db", "64M"])?.contains("does not shrink"));
    play.must(&["device", "set", "db", "--commit", "deferred", "--on-no-quorum", "error"])?;
    db.write(151 * MIB, &stamp(8))?;
    play.must(&["device", "set", "db", "--commit", "immediate"])?;
    play.until("db commits immediately", || {
        let map = play.json(&["map", "show"])?;
        let mut devices = map["devices"].as_array().into_iter().flatten();
        let device = devices.find(|device| device["name"] == "db").context("no db")?;
        Ok((device["commit"] == "immediate").then_some(()))
    })?;
    play.must(&["device", "set", "db", "--copies", "1"])?;
    play.until("one copy is dropped", || {
        let plans = play.json(&["plan", "list"])?;
        Ok(plans.as_array().is_some_and(Vec::is_empty).then_some(()))
    })?;
    play.must(&["device", "set", "db", "--copies", "2"])?;
    play.healthy()?;
    drop(db);

    // Both of its nodes end and start: all of it is there.
    for node in ["n1", "n2", "n3"] {
        play.kill(node)?;
        play.restart(node)?;
        play.healthy()?;
    }
    let mut db = client(&play, "db", 192 * MIB)?;
    for piece in 0..192 {
        let expected = match piece {
            0..128 => piece as u8 + 1,
            150 => 7,
            151 => 8,
            _ => 0,
        };
        ensure!(
            db.read(piece * MIB, MIB as u32)? == stamp(expected),
            "piece {piece} after all were restarted"
        );
    }
    Ok(())
}

#[test]
fn a_device_is_filled_from_a_file() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    play.healthy()?;
    play.must(&["device", "delete", "n2-d1", "--yes"])?;
    let source = play.base().join("image");
    let image: Vec<u8> =
        (0..70 * MIB + 1_000).map(|at| if at / MIB % 3 == 1 { 0 } else { (at / 977) as u8 }).collect();
    std::fs::write(&source, &image)?;
    let path = source.to_str().context("a path")?;
    let small =
        refused(&play, &["device", "create", "img", "--node", "n2", "--size", "1M", "--import", path])?;
    ensure!(small.contains("less than what is to be imported"), "{small}");
    let told = play.must(&["device", "create", "img", "--node", "n2", "--import", path])?;
    ensure!(told.contains("imported into img"), "{told}");
    let mut img = NbdClient::connect(&play.uri("img")?)?;
    ensure!(img.size == 128 * MIB);
    let all = |img: &mut NbdClient| -> anyhow::Result<Vec<u8>> {
        let mut found = Vec::new();
        for piece in 0..71 {
            found.extend(img.read(piece * MIB, MIB as u32)?);
        }
        found.truncate(image.len());
        Ok(found)
    };
    ensure!(all(&mut img)? == image, "what was imported is not what is there");
    // Again, over something else: zeros are written then.
    img.write(MIB, &stamp(9))?;
    img.flush()?;
    drop(img);
    play.until("nobody is connected", || {
        Ok(play.mirrorctl(&["device", "import", "img", path])?.status.success().then_some(()))
    })?;
    ensure!(all(&mut NbdClient::connect(&play.uri("img")?)?)? == image);
    let missing = refused(&play, &["device", "import", "img", "/no/such/file"])?;
    ensure!(missing.contains("/no/such/file"), "{missing}");
    let large = play.base().join("large");
    std::fs::File::create(&large)?.set_len(129 * MIB)?;
    let large = refused(&play, &["device", "import", "img", large.to_str().context("a path")?])?;
    ensure!(large.contains("mirrorctl device resize img"), "{large}");
    Ok(())
}

/// Who mirrors whom is written in the cluster file, and is so from the first map on: nothing is left to be moved.
#[test]
fn a_cluster_begins_as_it_was_chosen() -> anyhow::Result<()> {
    let play = Playground::start_like(4, "nbd", "512M", &["--layout", "chain", "--copies", "3"])?;
    play.healthy()?;
    let map = play.json(&["map", "show"])?;
    let devices = map["devices"].as_array().context("no devices")?;
    let mirrored: Vec<_> = devices.iter().filter(|device| device["copies"] == 3).collect();
    ensure!((devices.len(), mirrored.len()) == (8, 4), "{map}");
    let told = play.must(&["topology", "chain", "--copies", "3", "--dry-run"])?;
    ensure!(told.contains("nothing is to be moved"), "{told}");
    // It is served, and survives two nodes.
    let mut tenant = Tenant::connect(&play, "n1-d1")?;
    let mut random = Random::new(3);
    for _ in 0..50 {
        tenant.work(&mut random)?;
    }
    for node in ["n2", "n3"] {
        play.kill(node)?;
    }
    for _ in 0..50 {
        tenant.work(&mut random)?;
    }
    tenant.check_all()
}
