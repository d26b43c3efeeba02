//! Copies that come back, in clusters of real processes: whatever dies, in whatever order, the copies
//! become equal again by themselves, and nothing that was acknowledged is lost.

use anyhow::{Context, ensure};
use mirror_net::ids::DeviceId;
use mirror_tests::contents::slices;
use mirror_tests::nbd::NbdClient;
use mirror_tests::playground::{Playground, signal};
use mirror_tests::sim::scheduler::Random;
use mirror_tests::stamps::Workload;
use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
use std::process::Child;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

const NODES: [&str; 2] = ["n1", "n2"];
const MIB: u64 = 1 << 20;
const PIECE: u64 = 64 << 10;
/// Longer than a lease, and than the manager waits for a report before it lets a node be failed over.
const SILENCE: Duration = Duration::from_millis(3500);

fn stamp(value: u8) -> Vec<u8> {
    vec![value; 4096]
}

/// What each disk holds of the mirrored devices; both have to hold the same.
fn copies_are_equal(play: &Playground) -> anyhow::Result<()> {
    let mut compared = 0;
    for device in (1..=4).map(DeviceId) {
        let (one, other) = (slices(&play.disk("n1"), device)?, slices(&play.disk("n2"), device)?);
        if one.is_empty() || other.is_empty() {
            // Of what is not mirrored there is one copy.
            continue;
        }
        ensure!(one == other, "the copies of {device} differ: {one:?} {other:?}");
        compared += 1;
    }
    ensure!(compared == 2, "{compared} devices have two copies");
    Ok(())
}

/// The faults of a campaign.
struct Faults<'a> {
    play: &'a Playground,
    random: Random,
    down: [bool; 2],
    failovers: Vec<Child>,
    /// How many there were: kills, starts, failovers.
    counts: [u64; 3],
}

impl Faults<'_> {
    fn wait(&mut self, most_ms: u64) {
        if !self.random.one_in(3) {
            std::thread::sleep(Duration::from_millis(self.random.below(most_ms)));
        }
    }

    fn start(&mut self, node: usize) -> anyhow::Result<()> {
        self.counts[1] += 1;
        self.down[node] = false;
        self.play.restart(NODES[node])
    }

    fn fail_over(&mut self, node: usize) -> anyhow::Result<()> {
        self.counts[2] += 1;
        self.failovers.push(self.play.begin(&["node", "failover", NODES[node]])?);
        Ok(())
    }

    /// A few faults, up to two seconds apart; in the end both nodes run.
    fn round(&mut self) -> anyhow::Result<()> {
        for _ in 0..1 + self.random.below(4) {
            let node = self.random.below(2) as usize;
            match (self.down[node], self.random.one_in(6)) {
                (false, false) => {
                    self.counts[0] += 1;
                    self.down[node] = true;
                    self.play.kill(NODES[node])?;
                }
                (true, false) => self.start(node)?,
                // Of a dead node, or of a living one; it may be refused.
                (_, true) => self.fail_over(node)?,
            }
            self.wait(2000);
        }
        let first = self.random.below(2) as usize;
        for node in [first, 1 - first] {
            if self.down[node] {
                self.start(node)?;
                self.wait(1000);
            }
        }
        // It ends within its own patience, or when it is refused.
        for mut failover in self.failovers.drain(..) {
            failover.wait()?;
        }
        Ok(())
    }
}

/// Holds the workload, compares all that was acknowledged with what is there, and lets it go on.
fn nothing_is_lost(play: &Playground, workload: &Workload) -> anyhow::Result<()> {
    workload.pause()?;
    workload.check().with_context(|| play.logs())?;
    workload.go_on();
    Ok(())
}

#[test]
fn nothing_acknowledged_is_lost_whoever_dies_when() -> anyhow::Result<()> {
    let (seed, rounds) = match std::env::var("UBLK_MIRROR_LONG").is_ok() {
        true => (std::process::id().into(), 200),
        false => (1, 6),
    };
    let seed = match std::env::var("REJOIN_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => seed,
    };
    println!("{rounds} rounds; with the same faults again: REJOIN_SEED={seed}");
    let mut play = Playground::start(2)?;
    play.healthy()?;
    let workload = Workload::new(&play, seed, &["n1-d1", "n2-d1"], 3);
    let mut faults = Faults {
        play: &play,
        random: Random::new(seed),
        down: [false; 2],
        failovers: Vec::new(),
        counts: [0; 3],
    };
    let mut slowest = Duration::ZERO;
    let begun = Instant::now();
    workload.run(|| {
        for round in 0..rounds {
            let seen = || format!("round {round} of seed {seed}");
            faults.wait(1000);
            faults.round().with_context(seen)?;
            let whole = Instant::now();
            play.healthy().with_context(seen)?;
            slowest = slowest.max(whole.elapsed());
            nothing_is_lost(&play, &workload).with_context(seen)?;
            let (elapsed, counts) = (begun.elapsed().as_secs(), faults.counts);
            println!("round {round}: {elapsed} s, in sync after {:?}, faults {counts:?}", whole.elapsed());
        }
        Ok(())
    })?;
    println!(
        "{:?} kills, starts, failovers; all copies in sync after {slowest:?} at most; {:?}",
        faults.counts, workload.counts
    );
    ensure!(workload.counts.acknowledged.load(Relaxed) > 50 * rounds, "hardly anything was written");
    drop(workload);
    play.healthy()?;
    play.stop()?;
    copies_are_equal(&play)
}

/// What a mirror holds in memory only is no more than what its primary's disk has: one failure at a time costs nothing.
#[test]
fn with_deferred_commit_one_failure_at_a_time_loses_nothing() -> anyhow::Result<()> {
    let rounds = if std::env::var("UBLK_MIRROR_LONG").is_ok() { 60 } else { 4 };
    let mut play = Playground::start_like(2, "nbd", "512M", &["--commit", "deferred"])?;
    play.healthy()?;
    let map = play.json(&["map", "show"])?;
    ensure!(map["devices"][0]["commit"] == "deferred", "{map}");
    let mut random = Random::new(1);
    let workload = Workload::new(&play, 1, &["n1-d1", "n2-d1"], 3);
    workload.run(|| {
        for round in 0..rounds {
            std::thread::sleep(Duration::from_millis(random.below(1500)));
            let node = NODES[random.below(2) as usize];
            play.kill(node)?;
            std::thread::sleep(Duration::from_millis(random.below(4000)));
            play.restart(node)?;
            let seen = || format!("round {round}: {node}");
            play.healthy().with_context(seen)?;
            nothing_is_lost(&play, &workload).with_context(seen)?;
        }
        Ok(())
    })?;
    ensure!(workload.counts.acknowledged.load(Relaxed) > 50 * rounds, "hardly anything was written");
    drop(workload);
    play.healthy()?;
    play.stop()?;
    copies_are_equal(&play)
}

#[test]
fn a_device_that_is_set_to_fails_what_nobody_can_serve() -> anyhow::Result<()> {
    let mut play = Playground::start_like(2, "nbd", "512M", &["--on-no-quorum", "error"])?;
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    client.write(0, &stamp(1))?;
    // Nobody can say that n1 may go on alone.
    play.kill("manager")?;
    play.kill("n2")?;
    client.set_patience(Duration::from_secs(60))?;
    // What n2 granted is over.
    std::thread::sleep(Duration::from_millis(1_500));
    client.start_write(MIB, &stamp(2))?;
    client.start_read(0, 4096)?;
    const EIO: u32 = 5;
    for what in ["it cannot be on both", "there is no lease"] {
        let reply = client.reply()?.with_context(|| format!("{what}, and it waits"))?;
        ensure!(reply.error == EIO, "{what}: {reply:?}");
    }
    play.restart("manager")?;
    play.until("n1 goes on alone", || Ok(client.write(MIB, &stamp(3)).ok()))?;
    ensure!(client.read(0, 4096)? == stamp(1) && client.read(MIB, 4096)? == stamp(3));
    play.restart("n2")?;
    play.healthy()?;
    play.stop()?;
    copies_are_equal(&play)
}

/// What `status` finds, all severities, one line each.
fn findings(play: &Playground) -> anyhow::Result<String> {
    let status = play.json(&["status"])?;
    let lines = status["findings"].as_array().into_iter().flatten();
    Ok(lines.map(|line| format!("{}: {}\n", line["severity"], line["what"])).collect())
}

fn node_is(play: &Playground, node: &str, up: bool) -> anyhow::Result<()> {
    play.until(&format!("{node} is up: {up}"), || {
        let status = play.json(&["status"])?;
        let mut nodes = status["nodes"].as_array().into_iter().flatten();
        Ok(nodes.any(|found| found["name"] == node && found["up"] == up).then_some(()))
    })
}

#[test]
fn a_copy_that_is_behind_waits_for_the_one_that_was_alone() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    client.write(MIB, &stamp(1))?;
    play.kill("n2")?;
    // Acknowledged by n1 alone, which the map therefore says.
    client.write(MIB, &stamp(2))?;
    play.kill("n1")?;
    play.restart("n2")?;
    node_is(&play, "n2", true)?;
    let refused = play.until("n1 counts as dead", || {
        let output = play.mirrorctl(&["node", "failover", "n1"])?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "a copy that is behind was promoted");
        Ok(text.contains("stale").then_some(text))
    })?;
    ensure!(refused.contains("n1-d1"), "{refused}");
    let found = play.until("status names it", || {
        let found = findings(&play)?;
        let named = found.lines().any(|line| {
            line.starts_with("\"unavailable\"") && line.contains("n1-d1") && line.contains("n1/d1")
        });
        Ok(named.then_some(found))
    });
    found.with_context(|| findings(&play).unwrap_or_default())?;
    // Nobody serves it: not even a read is answered.
    std::thread::sleep(SILENCE);
    ensure!(play.mirrorctl(&["node", "failover", "n1"])?.status.code() != Some(0));
    ensure!(!play.device("n1-d1")?["uri"].as_str().is_some_and(|uri| uri.contains("/n2/")), "n2 exports it");
    play.restart("n1")?;
    play.healthy()?;
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    ensure!(client.read(MIB, 4096)? == stamp(2), "what was acknowledged is gone");
    Ok(())
}

#[test]
fn a_copy_that_is_behind_goes_on_by_force_and_the_other_is_made_like_it() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    client.write(MIB, &stamp(1))?;
    play.kill("n2")?;
    client.write(MIB, &stamp(2))?;
    client.write(5 * MIB, &stamp(3))?;
    play.kill("n1")?;
    play.restart("n2")?;
    let force = |further: &[&str]| -> anyhow::Result<(i32, String)> {
        let output = play.mirrorctl(&[&["node", "force", "n2"], further].concat())?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned()))
    };
    let (code, text) = play.until("only the operator's word is missing", || {
        let (code, text) = force(&["--yes"])?;
        ensure!(code != 0, "n1 may be anywhere: {text}");
        Ok(text.contains("--confirmed-off n1").then_some((code, text)))
    })?;
    ensure!(code == 1, "{text}");
    let (code, text) = force(&["--confirmed-off", "n1"])?;
    ensure!(code == 1 && text.contains("n1-d1") && text.contains("--yes"), "{code}: {text}");
    ensure!(!play.device("n1-d1")?["uri"].as_str().is_some_and(|uri| uri.contains("/n2/")), "it was done");
    let (code, text) = force(&["--confirmed-off", "n1", "--yes"])?;
    ensure!(code == 0 && text.contains("is lost"), "{code}: {text}");
    let uri = play.until("n2 exports it", || {
        Ok(play.device("n1-d1")?["uri"].as_str().filter(|uri| uri.contains("/n2/")).map(str::to_owned))
    })?;
    let mut client = NbdClient::connect(&uri)?;
    ensure!(client.read(MIB, 4096)? == stamp(1), "what both had is there");
    client.write(MIB, &stamp(4))?;
    // The one that was alone finds out, and what it had alone goes.
    play.restart("n1")?;
    play.healthy()?;
    ensure!(client.read(MIB, 4096)? == stamp(4));
    ensure!(client.read(5 * MIB, 4096)? == vec![0; 4096], "what was given up is back");
    client.flush()?;
    drop(client);
    for node in NODES {
        play.kill(node)?;
    }
    copies_are_equal(&play)
}

#[test]
fn a_primary_that_slept_longer_than_its_lease_answers_nothing_stale() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let mut old = NbdClient::connect(&play.uri("n1-d1")?)?;
    old.write(0, &stamp(1))?;
    old.write(MIB, &stamp(1))?;
    // So that there is something of which a careless primary would still be sure.
    ensure!(old.read(0, 4096)? == stamp(1));
    signal(play.pid("n1")?, SIGSTOP)?;
    std::thread::sleep(SILENCE);
    // These wait in the socket, and are the first that it sees when it goes on.
    let write = old.start_write(MIB, &stamp(9))?;
    let read = old.start_read(0, 4096)?;
    // Nobody has to ask for its failover.
    let uri =
        play.until("n2 exports n1-d1", || Ok(Some(play.uri("n1-d1")?).filter(|uri| uri.contains("/n2/"))))?;
    let mut new = NbdClient::connect(&uri)?;
    new.write(0, &stamp(2))?;
    new.write(MIB, &stamp(2))?;
    signal(play.pid("n1")?, SIGCONT)?;
    old.set_patience(Duration::from_secs(5))?;
    // They fail, or the connection ends; what is read, if it is, is the new content.
    while let Ok(Some(reply)) = old.reply() {
        if reply.cookie == write {
            ensure!(reply.error != 0, "a write of a deposed primary was acknowledged");
        }
        if reply.cookie == read && reply.error == 0 {
            ensure!(old.data(4096)? == stamp(2), "a stale read");
        }
    }
    play.healthy()?;
    for at in [0, MIB] {
        ensure!(new.read(at, 4096)? == stamp(2), "at {at} is something else");
    }
    // And a connection to the old exporter, if it takes one, knows no better.
    if let Ok(mut again) = NbdClient::connect(&play.uri("n1-d1")?) {
        ensure!(again.read(0, 4096)? == stamp(2));
    }
    Ok(())
}

#[test]
fn acknowledgements_stop_with_the_partner_and_go_on_with_it() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    client.write(0, &stamp(1))?;
    // A copy that was recorded stale, as on a machine that has much to do, stops nothing.
    play.healthy()?;
    // Without the manager nobody can allow the primary to go on alone.
    signal(play.manager_pid()?, SIGSTOP)?;
    signal(play.pid("n2")?, SIGSTOP)?;
    let cookie = client.start_write(0, &stamp(2))?;
    client.set_patience(SILENCE)?;
    ensure!(client.reply()?.is_none(), "acknowledged with the partner stopped\n{}", play.logs());
    // The partner is all that is missing.
    signal(play.pid("n2")?, SIGCONT)?;
    client.set_patience(Duration::from_secs(60))?;
    let reply = client.reply()?.context("no reply in time")?;
    ensure!((reply.cookie, reply.error) == (cookie, 0), "{reply:?}");
    signal(play.manager_pid()?, SIGCONT)?;
    play.healthy()?;
    ensure!(client.read(0, 4096)? == stamp(2));
    Ok(())
}

#[test]
fn a_secondary_restarts_while_the_manager_is_away() -> anyhow::Result<()> {
    let mut play = Playground::start(2)?;
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    client.write(0, &stamp(1))?;
    play.healthy()?;
    signal(play.manager_pid()?, SIGSTOP)?;
    play.kill("n2")?;
    let cookie = client.start_write(0, &stamp(2))?;
    // It waits for the manager, and so does this.
    let mut restart = play.begin(&["playground", "start", "n2"])?;
    client.set_patience(Duration::from_secs(2))?;
    ensure!(client.reply()?.is_none(), "acknowledged with nobody's word");
    signal(play.manager_pid()?, SIGCONT)?;
    client.set_patience(Duration::from_secs(60))?;
    let reply = client.reply()?.with_context(|| format!("it does not go on\n{}", play.logs()))?;
    ensure!((reply.cookie, reply.error) == (cookie, 0), "{reply:?}");
    ensure!(restart.wait()?.success(), "n2 did not start");
    for index in 1..64 {
        client.write(index * MIB, &stamp(3))?;
    }
    play.healthy()?;
    ensure!(client.read(0, 4096)? == stamp(2));
    ensure!(client.read(63 * MIB, 4096)? == stamp(3));
    play.stop()?;
    copies_are_equal(&play)
}

/// How many lines n1 has logged, and what the resyncs of n1-d1 moved that ended since so many lines.
fn resyncs_since(play: &Playground, lines: usize) -> anyhow::Result<(usize, Vec<u64>)> {
    let log = std::fs::read_to_string(play.dir.join("n1/log"))?;
    let told = log.lines().skip(lines).filter(|line| line.contains("its copies are equal device=\"n1-d1\""));
    let moved = told.map(|line| -> anyhow::Result<u64> {
        let bytes = line.split("moved_bytes=").nth(1).context("no bytes")?;
        Ok(bytes.trim().parse()?)
    });
    Ok((log.lines().count(), moved.collect::<Result<_, _>>()?))
}

/// Writes these pieces (where, how long) while n2 is away; how many bytes its resync moves for each that differs.
fn moved_for_a_byte(play: &Playground, pieces: &[(u64, u64)]) -> anyhow::Result<f64> {
    let (lines, _) = resyncs_since(play, 0)?;
    play.kill("n2")?;
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    let mut random = Random::new(pieces.len() as u64);
    for (at, length) in pieces {
        let data: Vec<u8> = (0..length / 8).flat_map(|_| random.bits().to_le_bytes()).collect();
        client.write(*at, &data)?;
    }
    ensure!(play.device("n1-d1")?["copies_in_sync"] == 1, "n2 was not missed");
    play.restart("n2")?;
    play.healthy()?;
    let moved: u64 = play.until("n1 says what it moved", || {
        let (_, moved) = resyncs_since(play, lines)?;
        Ok((!moved.is_empty()).then(|| moved.iter().sum()))
    })?;
    let differed = pieces.iter().map(|(_, length)| length).sum::<u64>();
    println!("{differed} bytes differed, {moved} were moved");
    Ok(moved as f64 / differed as f64)
}

#[test]
fn a_short_absence_costs_what_differs() -> anyhow::Result<()> {
    let mut play = Playground::start_with(2, "nbd", "2G")?;
    play.healthy()?;
    // Whole regions, one after the other.
    let sequential: Vec<(u64, u64)> = (0..256).map(|index| (index * MIB, MIB)).collect();
    let cost = moved_for_a_byte(&play, &sequential)?;
    ensure!((1.0..=1.2).contains(&cost), "sequential: {cost} bytes for a byte");
    play.healthy()?;
    // Somewhere in each region of what is on both copies.
    let mut random = Random::new(3);
    let scattered: Vec<(u64, u64)> =
        (0..256).map(|index| (index * MIB + random.below(MIB / PIECE) * PIECE, PIECE)).collect();
    let cost = moved_for_a_byte(&play, &scattered)?;
    ensure!((1.0..=1.2).contains(&cost), "scattered: {cost} bytes for a byte");
    play.healthy()?;
    play.stop()?;
    copies_are_equal(&play)
}
