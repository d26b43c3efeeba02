//! What a dead node had is made again on a spare, under writes, whoever dies meanwhile.

use anyhow::{Context, ensure};
use mirror_net::ids::DeviceId;
use mirror_tests::contents::slices;
use mirror_tests::etcd::Etcd;
use mirror_tests::nbd::NbdClient;
use mirror_tests::playground::{Playground, signal};
use mirror_tests::sim::scheduler::Random;
use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
use serde_json::Value;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// Devices are numbered in the order of the cluster file: n1-d1, n1-d1-unmirrored, n2-d1.
const N1_D1: DeviceId = DeviceId(1);
const N2_D1: DeviceId = DeviceId(3);
/// Pieces that each device is filled with.
const PIECES: u64 = 144;

fn stamp(value: u8) -> Vec<u8> {
    vec![value; MIB as usize]
}

fn play() -> anyhow::Result<Playground> {
    play_with(None)
}

/// With an etcd there are two managers.
fn play_with(etcd: Option<&Etcd>) -> anyhow::Result<Playground> {
    let mut further = vec!["--spares", "1", "--spare-after", "3s"];
    let endpoints = etcd.map(|etcd| etcd.endpoints().join(","));
    if let Some(endpoints) = &endpoints {
        further.extend(["--managers", "2", "--etcd", endpoints]);
    }
    let play = Playground::start_like(2, "nbd", "512M", &further)?;
    for device in ["n1-d1", "n2-d1"] {
        let mut client = NbdClient::connect(&play.uri(device)?)?;
        for piece in 0..PIECES {
            client.write(piece * MIB, &stamp(piece as u8 + 1))?;
        }
    }
    Ok(play)
}

/// Where the copies of a device are, the primary first; `None` while any is not in sync.
fn copies(play: &Playground, device: &str) -> anyhow::Result<Option<Vec<String>>> {
    let map = play.json(&["map", "show"])?;
    let mut devices = map["devices"].as_array().into_iter().flatten();
    let device = devices.find(|found| found["name"] == device).context("no such device")?;
    let spans = device["spans"].as_array().context("no spans")?;
    let list = |span: &Value| -> Option<Vec<String>> {
        let replicas = span["replicas"].as_array()?;
        let in_sync = replicas.iter().all(|replica| replica["state"] == "in_sync");
        in_sync.then(|| {
            replicas.iter().map(|replica| replica["node"].as_str().unwrap_or("?").to_owned()).collect()
        })
    };
    let first = list(&spans[0]);
    ensure!(spans.iter().all(|span| list(span) == first || list(span).is_none()), "{device}");
    Ok(first.filter(|_| spans.iter().all(|span| list(span).is_some())))
}

/// Both segments of n1 are on the spare, n3, and what it had of its own is served from there.
fn regenerated(play: &Playground) -> anyhow::Result<()> {
    play.until("n1's segments are on n3", || {
        let both = (copies(play, "n1-d1")?, copies(play, "n2-d1")?);
        let lists = |nodes: [&str; 2]| Some(nodes.map(str::to_owned).to_vec());
        let plans = play.json(&["plan", "list"])?;
        let over = plans.as_array().is_some_and(Vec::is_empty);
        Ok((over && both == (lists(["n3", "n2"]), lists(["n2", "n3"]))).then_some(()))
    })
}

fn all_is_there(play: &Playground, newest: u8) -> anyhow::Result<()> {
    for device in ["n1-d1", "n2-d1"] {
        let mut client = NbdClient::connect(&play.uri(device)?)?;
        for piece in 0..PIECES {
            let expected = if piece == 0 { newest } else { piece as u8 + 1 };
            ensure!(client.read(piece * MIB, MIB as u32)? == stamp(expected), "{device} piece {piece}");
        }
    }
    Ok(())
}

fn copies_are_equal(play: &mut Playground) -> anyhow::Result<()> {
    play.stop()?;
    for device in [N1_D1, N2_D1] {
        let (one, other) = (slices(&play.disk("n2"), device)?, slices(&play.disk("n3"), device)?);
        ensure!(!one.is_empty() && one == other, "{device:?}: the copies differ");
    }
    Ok(())
}

/// The bytes that resyncs to n3 moved, as the daemon of the other node logged them.
fn moved_bytes(play: &Playground) -> anyhow::Result<u64> {
    let log = std::fs::read_to_string(play.dir.join("n2/log"))?;
    let told = log
        .lines()
        .filter(|line| line.contains("its copies are equal device=") && line.contains("node=\"n3\""));
    let bytes = told.map(|line| -> anyhow::Result<u64> {
        Ok(line.split("moved_bytes=").nth(1).context("no bytes")?.trim().parse()?)
    });
    bytes.sum()
}

#[test]
fn a_dead_nodes_segments_are_made_again_on_the_spare_and_it_comes_back_as_one() -> anyhow::Result<()> {
    let mut play = play()?;
    play.kill("n1")?;
    // Nobody asks for anything. The other node's own device is written all the time.
    let mut client = NbdClient::connect(&play.uri("n2-d1")?)?;
    let mut newest = 0;
    play.until("a plan", || {
        newest = newest % 200 + 1;
        client.write(0, &stamp(newest))?;
        let plans = play.json(&["plan", "list"])?;
        Ok(plans.as_array().is_some_and(|plans| !plans.is_empty()).then_some(()))
    })?;
    regenerated(&play)?;
    // What was lost, and not much more: two devices' pieces.
    let lost = 2 * PIECES * MIB;
    let moved = moved_bytes(&play)?;
    println!("{lost} bytes were lost, {moved} were moved");
    ensure!(moved <= lost + lost / 20 + MIB, "{moved} bytes were moved for {lost}");
    let mut other = NbdClient::connect(&play.uri("n1-d1")?)?;
    other.write(0, &stamp(newest))?;
    all_is_there(&play, newest)?;

    let events = play.must(&["events"])?;
    for told in ["counts as failed", "failover of n1", "is made again on n3/d1", "is done: regeneration"] {
        ensure!(events.contains(told), "no event says {told:?}:\n{events}");
    }
    play.restart("n1")?;
    play.until("n1 is the spare", || {
        let map = play.json(&["map", "show"])?;
        let mut disks = map["disks"].as_array().into_iter().flatten();
        Ok(disks.any(|disk| disk["node"] == "n1" && disk["spare"] == true).then_some(()))
    })?;
    play.healthy()?;
    copies_are_equal(&mut play)
}

/// Who takes part in a regeneration, and may die.
#[derive(Clone, Copy, Debug)]
enum Part {
    /// Who decides, if there is only one.
    Manager,
    Leader,
    Follower,
    /// A member of the etcd.
    Member,
    /// The node that has the data.
    Source,
    /// The one that gets it.
    Target,
}

/// Without a store that managers share.
const ONE_MANAGER: &[Part] = &[Part::Manager, Part::Source, Part::Target];
const TWO_MANAGERS: &[Part] = &[Part::Leader, Part::Follower, Part::Member, Part::Source, Part::Target];

/// Victims in a random order; everybody's turn comes before anybody's second.
struct Victims<'a> {
    of: &'static [Part],
    left: Vec<Part>,
    random: &'a mut Random,
    etcd: Option<Etcd>,
}

impl<'a> Victims<'a> {
    fn new(of: &'static [Part], random: &'a mut Random, etcd: Option<Etcd>) -> Self {
        Self { of, left: Vec::new(), random, etcd }
    }

    fn pause(&mut self, most_ms: u64) {
        std::thread::sleep(Duration::from_millis(self.random.below(most_ms)));
    }

    /// The manager that leads, or not; while nobody does, any.
    fn manager(&self, play: &Playground, leads: bool) -> &'static str {
        let value = self.etcd.as_ref().and_then(|etcd| etcd.value("/ublk-mirror/", "/leader"));
        let leader: Option<Value> = value.and_then(|value| serde_json::from_slice(&value).ok());
        let leader = leader.and_then(|leader| play.manager_at(leader["address"].as_str()?));
        if (leader == Some("manager-2")) == leads { "manager-2" } else { "manager" }
    }

    /// Somebody dies, and is started again a while later.
    fn strike(&mut self, play: &Playground) -> anyhow::Result<()> {
        if self.left.is_empty() {
            self.left = self.of.to_vec();
        }
        let victim = self.left.swap_remove(self.random.below(self.left.len() as u64) as usize);
        let name = match victim {
            Part::Manager => "manager",
            Part::Leader => self.manager(play, true),
            Part::Follower => self.manager(play, false),
            Part::Source => "n2",
            Part::Target => "n3",
            Part::Member => {
                let pause = Duration::from_millis(self.random.below(600));
                let etcd = self.etcd.as_mut().context("there is no etcd")?;
                let member = self.random.below(etcd.members() as u64) as usize;
                println!("member {member} of the etcd dies");
                etcd.kill(member);
                std::thread::sleep(pause);
                etcd.start_member(member);
                return Ok(());
            }
        };
        println!("{name} dies: {victim:?}");
        play.kill(name)?;
        self.pause(600);
        play.restart(name)
    }
}

/// Ends of a regeneration, and how often somebody died on the way.
fn regenerate_under_kills(victims: &mut Victims, most: u32) -> anyhow::Result<u32> {
    let mut play = play_with(victims.etcd.as_ref())?;
    play.kill("n1")?;
    let (mut kills, mut begun) = (0, false);
    let over = |play: &Playground, begun: &mut bool| -> anyhow::Result<Option<bool>> {
        let idle = play.json(&["plan", "list"])?.as_array().is_some_and(Vec::is_empty);
        *begun |= !idle || copies(play, "n1-d1")?.is_some_and(|nodes| nodes.iter().any(|node| node == "n3"));
        Ok(begun.then_some(idle))
    };
    // Before the first plan nothing is under way that a death could disturb.
    play.until("a plan, or its end", || over(&play, &mut begun))?;
    while kills < most {
        victims.pause(400);
        // A death after its end would say nothing.
        if play.until("the manager to answer", || over(&play, &mut begun))? {
            break;
        }
        victims.strike(&play)?;
        kills += 1;
    }
    play.until("n1's segments are on n3 and n2", || {
        let mut both = [copies(&play, "n1-d1")?, copies(&play, "n2-d1")?];
        both.iter_mut().flatten().for_each(|nodes| nodes.sort());
        let expected = Some(vec!["n2".to_owned(), "n3".to_owned()]);
        let over = play.json(&["plan", "list"])?.as_array().is_some_and(Vec::is_empty);
        Ok((over && both.iter().all(|nodes| *nodes == expected)).then_some(()))
    })?;
    all_is_there(&play, 1)?;
    events_have_no_gap(&play)?;
    copies_are_equal(&mut play)?;
    Ok(kills)
}

/// Whoever wrote them, each has the number after the one before.
fn events_have_no_gap(play: &Playground) -> anyhow::Result<()> {
    let text = play.must(&["events", "--json"])?;
    for (number, line) in (1u64..).zip(text.lines()) {
        let event: Value = serde_json::from_str(line)?;
        ensure!(event["number"] == number, "event {number} is {line}");
    }
    ensure!(!text.is_empty(), "there are no events");
    Ok(())
}

/// `short`: how many deaths there are unless it is to take long.
fn regenerations_go_on(of: &'static [Part], short: u32, etcd: Option<Etcd>) -> anyhow::Result<()> {
    let (seed, wanted) = match std::env::var("UBLK_MIRROR_LONG").is_ok() {
        true => (std::process::id().into(), 50),
        false => (3, short),
    };
    let mut random = Random::new(seed);
    let mut victims = Victims::new(of, &mut random, etcd);
    let (mut kills, mut regenerations) = (0, 0);
    while kills < wanted {
        kills += regenerate_under_kills(&mut victims, (wanted - kills).min(6))
            .with_context(|| format!("seed {seed}, after {kills} kills"))?;
        regenerations += 1;
    }
    println!("seed {seed}: {kills} kills in {regenerations} regenerations");
    Ok(())
}

#[test]
fn a_regeneration_goes_on_whoever_dies_meanwhile() -> anyhow::Result<()> {
    regenerations_go_on(ONE_MANAGER, 4, None)
}

#[test]
fn a_regeneration_goes_on_whichever_manager_or_member_of_the_etcd_dies() -> anyhow::Result<()> {
    regenerations_go_on(TWO_MANAGERS, 5, Some(Etcd::start(3)))
}

#[test]
fn a_resync_goes_on_without_a_host_and_without_the_manager() -> anyhow::Result<()> {
    const MISSED: u64 = 512;
    const EQUAL: &str = "its copies are equal to ours: asking the manager";
    let mut play = Playground::start_with(2, "nbd", "2G")?;
    let mut client = NbdClient::connect(&play.uri("n1-d1")?)?;
    play.kill("n2")?;
    for piece in 0..MISSED {
        client.write(piece * MIB, &stamp((piece % 250) as u8 + 1))?;
    }
    drop(client);
    play.restart("n2")?;
    let log = || std::fs::read_to_string(play.dir.join("n1/log"));
    // Nothing is asked of anybody here, which would take as long as the resync does.
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let told = log()?;
        let asked = told.find("its stale copies can be filled").map(|at| &told[at..]);
        if asked.is_some_and(|since| since.contains("map adopted")) {
            break;
        }
        ensure!(Instant::now() < end, "n2 is not filled: {told}");
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(play.manager_pid()?, SIGSTOP)?;
    let is_equal = || -> anyhow::Result<bool> {
        Ok(log()?.lines().any(|line| line.contains(EQUAL) && line.contains("device=device#1")))
    };
    ensure!(!is_equal()?, "it was over before the manager was gone: nothing is shown");
    play.kill("manager")?;
    // It can only be recorded by the manager that it is whole; made whole it is without.
    play.until("everything is copied", || Ok(is_equal()?.then_some(())))?;
    play.restart("manager")?;
    play.healthy()?;
    play.stop()?;
    let (one, other) = (slices(&play.disk("n1"), N1_D1)?, slices(&play.disk("n2"), N1_D1)?);
    ensure!(!one.is_empty() && one == other, "the copies differ");
    Ok(())
}

#[test]
fn a_plan_is_paused_resumed_and_cancelled() -> anyhow::Result<()> {
    let play = play()?;
    ensure!(!play.mirrorctl(&["plan", "pause", "7"])?.status.success(), "there is no plan");
    play.kill("n1")?;
    let plan = play.until("a plan", || {
        let plans = play.json(&["plan", "list"])?;
        let Some(plan) = plans.as_array().and_then(|plans| plans.first()).cloned() else { return Ok(None) };
        let number = plan["plan"].as_u64().context("no number")?.to_string();
        // It may be over before it can be paused; then there is nothing to look at.
        Ok(play.mirrorctl(&["plan", "pause", &number])?.status.success().then_some(number))
    })?;
    let shown = play.must(&["plan", "show", &plan])?;
    ensure!(shown.contains("n3/d1") && shown.contains("paused"), "{shown}");
    ensure!(!play.mirrorctl(&["plan", "pause", &plan])?.status.success(), "paused twice");
    // Paused, it is where it was however often one looks.
    let before = play.json(&["plan", "list"])?;
    ensure!(before[0]["paused"] == true, "{before}");
    play.must(&["plan", "cancel", &plan])?;
    let map = play.json(&["map", "show"])?;
    ensure!(map["plans"] == Value::Array(Vec::new()), "{}", map["plans"]);
    ensure!(!play.mirrorctl(&["plan", "resume", &plan])?.status.success(), "resumed after its end");
    // Nothing begins it again, and what there is serves.
    all_is_there(&play, 1)
}

#[test]
fn a_manager_that_was_stopped_itself_takes_nobody_for_failed() -> anyhow::Result<()> {
    let play = Playground::start(2)?;
    let before = play.json(&["map", "show"])?["version"].clone();
    for _ in 0..3 {
        // Longer than any node may be silent; what they say meanwhile waits unread.
        signal(play.manager_pid()?, SIGSTOP)?;
        std::thread::sleep(Duration::from_secs(3));
        signal(play.manager_pid()?, SIGCONT)?;
        play.healthy()?;
    }
    let events = play.must(&["events"])?;
    ensure!(!events.contains("counts as failed"), "{events}");
    ensure!(play.json(&["map", "show"])?["version"] == before);
    Ok(())
}
