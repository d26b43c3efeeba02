//! Whole clusters of real processes over NBD, without ublk.

use mirror_net::ids::DeviceId;
use mirror_tests::contents::slices;
use mirror_tests::nbd::NbdClient;
use mirror_tests::playground::{Playground, signal};
use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
use std::process::Command;
use std::time::Duration;

/// The map gives the first device of n1 this id: devices are numbered in the file's order.
const N1_D1: DeviceId = DeviceId(1);

fn fio(uri: &str, extra: &[&str]) -> anyhow::Result<()> {
    mirror_tests::fio::fio(&[&["--ioengine=nbd", "--size=48m", "--uri", uri], extra].concat())
}

fn stamp(value: u8) -> Vec<u8> {
    vec![value; 4096]
}

#[test]
fn both_copies_are_equal_after_overlapping_writes() -> anyhow::Result<()> {
    let mut play = Playground::start(2)?;
    let uri = play.uri("n1-d1")?;
    fio(&uri, &["--rw=randwrite", "--bs=4k", "--iodepth=32"])?;
    // Four writers in the same range: nothing to verify but that both copies saw them in one order.
    let overlapping = [
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=32",
        "--numjobs=4",
        "--group_reporting",
        "--time_based",
        "--runtime=3",
        "--size=1m",
        "--verify=0",
        "--do_verify=0",
    ];
    fio(&uri, &overlapping)?;
    let mut client = NbdClient::connect(&uri)?;
    client.write_zeroes(8 << 20, 3 << 20)?;
    client.trim(20 << 20, 2 << 20)?;
    client.write((20 << 20) + 4096, &stamp(9))?;
    client.flush()?;
    assert!(client.read(8 << 20, 65_536)?.iter().all(|byte| *byte == 0));
    assert!(client.read(20 << 20, 4096)?.iter().all(|byte| *byte == 0));
    assert_eq!(client.read((20 << 20) + 4096, 4096)?, stamp(9));
    drop(client);
    play.stop()?;
    let (primary, secondary) = (slices(&play.disk("n1"), N1_D1)?, slices(&play.disk("n2"), N1_D1)?);
    assert!(!primary.is_empty());
    assert_eq!(primary, secondary);
    Ok(())
}

#[test]
fn nothing_is_acknowledged_that_the_partner_does_not_have() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    client.write(0, &stamp(1))?;
    play.healthy()?;
    // Without the manager nobody can allow the primary to go on alone.
    signal(play.manager_pid()?, SIGSTOP)?;
    signal(play.pid("n2")?, SIGSTOP)?;
    let cookie = client.start_write(0, &stamp(2))?;
    client.set_patience(Duration::from_secs(4))?;
    assert_eq!(client.reply()?, None, "acknowledged with the partner stopped");
    signal(play.manager_pid()?, SIGCONT)?;
    // Now the partner's copy is recorded stale, and the write is acknowledged alone.
    client.set_patience(Duration::from_secs(60))?;
    assert_eq!(client.reply()?.map(|reply| (reply.cookie, reply.error)), Some((cookie, 0)));
    signal(play.pid("n2")?, SIGCONT)?;
    assert_eq!(client.read(0, 4096)?, stamp(2));
    // And its copy is made equal again, though nobody asked for that.
    play.healthy()?;
    assert_eq!(client.read(0, 4096)?, stamp(2));
    Ok(())
}

#[test]
fn the_partner_serves_after_a_failover_and_the_other_once_it_is_equal() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let uri = play.uri("n1-d1")?;
    let mut client = NbdClient::connect(&uri)?;
    for index in 0..64u64 {
        client.write(index << 20, &stamp(index as u8 + 1))?;
    }
    play.kill("n1")?;
    let moved = play.until("n1's failover", || {
        let output = play.mirrorctl(&["node", "failover", "n1", "--json"])?;
        Ok(output.status.success().then_some(output.stdout))
    })?;
    assert!(!moved.is_empty());
    let uri = play.until("n2 exports n1-d1", || {
        let uri = play.uri("n1-d1")?;
        Ok(Some(uri).filter(|uri| uri.contains("/n2/")))
    })?;
    let mut client = NbdClient::connect(&uri)?;
    for index in 0..64u64 {
        assert_eq!(client.read(index << 20, 4096)?, stamp(index as u8 + 1), "block {index}");
    }
    client.write(0, &stamp(99))?;
    // The old primary comes back and takes nothing back: its copy is made equal to what was written meanwhile.
    play.restart("n1")?;
    play.healthy()?;
    assert!(play.uri("n1-d1")?.contains("/n2/"));
    assert_eq!(client.read(0, 4096)?, stamp(99));
    // Then it may be promoted again, and has everything.
    play.kill("n2")?;
    play.until("n2's failover", || {
        Ok(play.mirrorctl(&["node", "failover", "n2"])?.status.success().then_some(()))
    })?;
    let uri = play.until("n1 exports n1-d1", || {
        let uri = play.uri("n1-d1")?;
        Ok(Some(uri).filter(|uri| uri.contains("/n1/")))
    })?;
    let mut client = NbdClient::connect(&uri)?;
    assert_eq!(client.read(0, 4096)?, stamp(99));
    for index in 1..64u64 {
        assert_eq!(client.read(index << 20, 4096)?, stamp(index as u8 + 1), "block {index}");
    }
    Ok(())
}

#[test]
fn a_restarted_primary_forwards_to_the_promoted_partner() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    for index in 0..32u64 {
        client.write(index << 20, &stamp(index as u8 + 1))?;
    }
    play.kill("n1")?;
    play.restart("n1")?;
    let uri = play.until("n2 is primary and n1 exports", || {
        let map = play.json(&["map", "show"])?;
        let device =
            map["devices"].as_array().into_iter().flatten().find(|device| device["name"] == "n1-d1").cloned();
        let primary = device.map(|device| device["spans"][0]["replicas"][0]["node"].clone());
        if primary != Some("n2".into()) {
            return Ok(None);
        }
        Ok(play.device("n1-d1")?["uri"].as_str().filter(|uri| uri.contains("/n1/")).map(str::to_owned))
    })?;
    let mut client = NbdClient::connect(&uri)?;
    client.set_patience(Duration::from_secs(60))?;
    for index in 0..32u64 {
        assert_eq!(client.read(index << 20, 4096)?, stamp(index as u8 + 1), "block {index}");
    }
    client.write(5 << 20, &stamp(77))?;
    client.flush()?;
    fio(&uri, &["--rw=randwrite", "--bs=16k", "--iodepth=16"])?;
    // Every read that waits for its answer has a buffer, and the answers need buffers as well.
    fio(&uri, &[&["--rw=read"], &MUCH[..]].concat())?;
    Ok(())
}

/// More data under way than the buffers of a node hold.
const MUCH: [&str; 8] = [
    "--bs=1m",
    "--iodepth=64",
    "--numjobs=3",
    "--group_reporting",
    "--time_based",
    "--runtime=4",
    "--verify=0",
    "--size=48m",
];

#[test]
fn two_nodes_that_fill_each_others_buffers_do_not_wait_for_each_other() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let uris = [play.uri("n1-d1")?, play.uri("n2-d1")?];
    std::thread::scope(|scope| {
        let writers =
            uris.each_ref().map(|uri| scope.spawn(|| fio(uri, &[&["--rw=write"], &MUCH[..]].concat())));
        writers.into_iter().try_for_each(|writer| writer.join().expect("it does not panic"))
    })?;
    // Nobody was taken for dead meanwhile.
    let status = play.mirrorctl(&["status"])?;
    assert_eq!(status.status.code(), Some(0), "{}{}", String::from_utf8_lossy(&status.stdout), play.logs());
    Ok(())
}

#[test]
fn a_client_that_takes_no_replies_keeps_nobody_waiting() -> anyhow::Result<()> {
    // Of all the memory that a daemon has for requests these would fill twice as much.
    const READS: u64 = 128;
    const LENGTH: u32 = 1 << 20;
    let play = Playground::start(2)?;
    let uri = play.uri("n1-d1")?;
    let mut client = NbdClient::connect(&uri)?;
    let mut slow = NbdClient::connect(&uri)?;
    let cookies: Vec<u64> = (0..READS).map(|_| slow.start_read(0, LENGTH)).collect::<Result<_, _>>()?;
    // As long as the slow one's requests are not all taken there is no telling when it holds all it can get.
    for index in 0..200 {
        client.write(4096 * index, &stamp(index as u8))?;
        assert_eq!(client.read(4096 * index, 4096)?, stamp(index as u8));
    }
    let large = vec![7; 32 << 20];
    client.write(64 << 20, &large)?;
    assert_eq!(client.read(64 << 20, 32 << 20)?, large);
    // Nor has it lost anything itself. Which reply comes first is not promised.
    for _ in &cookies {
        let reply = slow.reply()?.expect("a reply in time");
        assert!(reply.error == 0 && cookies.contains(&reply.cookie), "{reply:?}");
        slow.data(LENGTH)?;
    }
    Ok(())
}

#[test]
fn io_goes_on_without_the_manager_while_both_copies_are_well() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let uri = play.uri("n1-d1")?;
    signal(play.manager_pid()?, SIGSTOP)?;
    fio(&uri, &["--rw=randwrite", "--bs=4k", "--iodepth=8"])?;
    signal(play.manager_pid()?, SIGCONT)?;
    Ok(())
}

#[test]
fn three_nodes_make_a_ring() -> anyhow::Result<()> {
    let mut play = Playground::start(3)?;
    for node in ["n1", "n2", "n3"] {
        fio(&play.uri(&format!("{node}-d1"))?, &["--rw=randwrite", "--bs=64k", "--iodepth=8"])?;
    }
    play.stop()?;
    assert_eq!(slices(&play.disk("n1"), N1_D1)?, slices(&play.disk("n2"), N1_D1)?);
    Ok(())
}

/// What `nbdinfo --map` makes of the export: (bytes with data, bytes of holes).
fn allocation(uri: &str) -> anyhow::Result<(u64, u64)> {
    let output = Command::new("nbdinfo").args(["--map", "--json", uri]).output()?;
    let extents: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let (mut data, mut holes) = (0, 0);
    for extent in extents.as_array().into_iter().flatten() {
        let length = extent["length"].as_u64().unwrap_or(0);
        if extent["type"] == 0 { data += length } else { holes += length }
    }
    Ok((data, holes))
}

#[test]
fn clients_see_where_data_is() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let uri = play.uri("n1-d1")?;
    let mut client = NbdClient::connect(&uri)?;
    client.write(5 << 20, &stamp(1))?;
    client.write(100 << 20, &stamp(1))?;
    assert_eq!(allocation(&uri)?, (2 << 20, client.size - (2 << 20)), "one region a write");
    client.trim(5 << 20, 1 << 20)?;
    assert_eq!(allocation(&uri)?.0, 1 << 20);
    Ok(())
}

/// Runs a client that must succeed.
fn client(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("timeout").args(["120", program]).args(arguments).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{program} {arguments:?}: {}\n{text}{errors}", output.status);
    Ok(text)
}

#[test]
fn ordinary_clients_agree_with_a_mirrored_export() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let uri = play.uri("n1-d1")?;
    let list = client("nbdinfo", &["--list", "--json", &uri])?;
    anyhow::ensure!(list.contains("n1-d1-unmirrored") && list.contains("can_multi_conn"), "{list}");
    client("qemu-io", &["-f", "raw", "-c", "write -P 7 1M 3M", "-c", "discard 2M 1M", "-c", "flush", &uri])?;
    client("qemu-io", &["-f", "raw", "-c", "read -P 7 1M 1M", "-c", "read -P 0 2M 1M", &uri])?;
    let copy = play.base().join("copy.img").display().to_string();
    client("nbdcopy", &[&uri, &copy])?;
    client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &copy])?;
    // And the other way round, over the connections that the export offers.
    let other = play.uri("n2-d1")?;
    client("nbdcopy", &["--connections=4", &copy, &other])?;
    client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &other])?;
    let map = client("qemu-img", &["map", "-f", "raw", "--output=json", &uri])?;
    anyhow::ensure!(map.contains("\"data\": false") || map.contains("\"zero\": true"), "{map}");
    Ok(())
}
