//! Emulated machines with real ublk, and what can happen to them: scripts/lab.

use anyhow::{Context, bail, ensure};
use mirror_tests::machines::campaign::{Campaign, STORIES};
use mirror_tests::machines::exec::Running;
use mirror_tests::machines::regeneration::{self, Dies};
use mirror_tests::machines::{Options, hub, rivals, sets};
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

const USAGE: &str = "\
usage: scripts/lab up N [--kernel stable|latest] [--seed S] [--disk MIB] [--memory MIB] [--bare]
       scripts/lab exec I -- COMMAND [ARG...]
       scripts/lab ctl ARG...
       scripts/lab cut I... | start I...
       scripts/lab partition I J [--one-way] | heal
       scripts/lab disk I cut|fail [writes|next-write|next-flush]|hang|bad-sector LBA [COUNT]|slow MIB_S [MIB_S_AT_THE_END]|heal|status
       scripts/lab info | down
       scripts/lab soak [--rounds N] [--seed S] [--kernel stable|latest] [--postgres] [--slow-detection] [--stories NAME,...]
       scripts/lab regenerate [--disk|--without-spare] [--seed S] [--kernel stable|latest] [--postgres]
       scripts/lab rivals [--rounds N] [--seconds S] [--kernel stable|latest]
       scripts/lab sets [--seed S] [--kernel stable|latest] [--postgres]

up      N machines with a disk each, and one for the manager, on a private link; a cluster on them unless --bare
exec    runs a command in machine I (1, 2, ... or manager); its exit code becomes ours
ctl     mirrorctl, on the manager's machine
cut     the power of these machines is gone, at the same moment; their disks lose a subset of what was not flushed
start   switches them on again
disk    does something to the data disk of machine I
soak    a lab of its own: N rounds of power cuts and cut cables under load; nothing that was acknowledged may be lost
regenerate  a lab of four nodes and a spare: one loses power for good, or a disk of one dies, under load; without a spare
        a third disk is emptied for what died
rivals  a lab of two nodes: a mirrored device beside DRBD and md over NVMe/TCP, measured in turns
sets    a lab of four nodes on two switches and two power feeds: a switch dies, then a feed, under load

Where the lab is: UBLK_MIRROR_LAB (default /tmp/ublk-mirror-lab-UID). docs/lab.md says more.";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> anyhow::Result<u8> {
    let dir = directory();
    match words {
        ["up", nodes, options @ ..] => up(&dir, nodes, options).map(|()| 0),
        ["hub", nodes, options @ ..] => {
            let (options, bare) = options_of(nodes, options)?;
            hub::run(&dir, &options, !bare).map(|()| 0)
        }
        ["exec", machine, "--", command @ ..] if !command.is_empty() => exec(&dir, machine, command),
        ["ctl", arguments @ ..] => {
            let command = [&["mirrorctl", "--config", "/state/cluster.toml"], arguments].concat();
            exec(&dir, "manager", &command)
        }
        ["down"] => {
            hub::tell(&dir, words)?;
            std::fs::remove_dir_all(&dir)?;
            Ok(0)
        }
        ["cut" | "start" | "partition" | "heal" | "disk" | "info", ..] => {
            println!("{}", hub::tell(&dir, words)?);
            Ok(0)
        }
        ["soak", options @ ..] => soak(options).map(|()| 0),
        ["regenerate", options @ ..] => regenerate(options).map(|()| 0),
        ["rivals", options @ ..] => rivals(options).map(|()| 0),
        ["sets", options @ ..] => sets(options).map(|()| 0),
        ["--help" | "-h" | "help"] => {
            println!("{USAGE}");
            Ok(0)
        }
        _ => {
            eprintln!("{USAGE}");
            Ok(64)
        }
    }
}

fn directory() -> PathBuf {
    let own = || format!("/tmp/ublk-mirror-lab-{}", nix::unistd::getuid());
    std::env::var_os("UBLK_MIRROR_LAB").map_or_else(|| own().into(), PathBuf::from)
}

fn options_of(nodes: &str, words: &[&str]) -> anyhow::Result<(Options, bool)> {
    let mut options = Options { nodes: nodes.parse().context("how many nodes?")?, ..Options::default() };
    let (mut words, mut bare) = (words.iter(), false);
    while let Some(word) = words.next() {
        if *word == "--bare" {
            bare = true;
            continue;
        }
        let value =
            words.next().with_context(|| format!("{word} needs a value, or is unknown (see --help)"))?;
        match *word {
            "--kernel" => options.kernel = (*value).to_owned(),
            "--seed" => options.seed = value.parse()?,
            "--disk" => options.disk_mib = value.parse()?,
            "--memory" => options.memory_mib = value.parse()?,
            _ => bail!("unknown option {word} (see --help)"),
        }
    }
    Ok((options, bare))
}

/// Starts the hub, and waits until it says that it is ready.
fn up(dir: &Path, nodes: &str, options: &[&str]) -> anyhow::Result<()> {
    options_of(nodes, options)?;
    ensure!(hub::tell(dir, &["info"]).is_err(), "a lab runs in {} already: scripts/lab down", dir.display());
    // What is left of one that was killed.
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => std::fs::create_dir_all(dir)?,
    }
    let log = File::create(dir.join("log"))?;
    let mut hub = Command::new(std::env::current_exe()?)
        .args([&["hub", nodes], options].concat())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // It outlives this command and its terminal.
        .process_group(0)
        .spawn()?;
    let mut shown = 0;
    loop {
        let ended = hub.try_wait()?;
        let said = std::fs::read_to_string(dir.join("log"))?;
        print!("{}", &said[shown..]);
        shown = said.len();
        if said.lines().any(|line| line == "ready") {
            return Ok(());
        }
        ensure!(ended.is_none(), "the lab has ended; what its machines said is in {}", dir.display());
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn soak(words: &[&str]) -> anyhow::Result<()> {
    let stories = STORIES.map(str::to_owned).to_vec();
    let mut campaign = Campaign { lab: Options::default(), rounds: 10, postgres: false, stories };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match *word {
            "--postgres" => campaign.postgres = true,
            "--slow-detection" => campaign.lab.slow_detection = true,
            "--rounds" => campaign.rounds = value()?.parse()?,
            "--seed" => campaign.lab.seed = value()?.parse()?,
            "--kernel" => campaign.lab.kernel = (*value()?).to_owned(),
            "--stories" => campaign.stories = value()?.split(',').map(str::to_owned).collect(),
            _ => bail!("unknown option {word} (see --help)"),
        }
    }
    in_a_lab_of_its_own(|dir| campaign.run(dir).map(drop))
}

fn regenerate(words: &[&str]) -> anyhow::Result<()> {
    let dies = match words {
        words if words.contains(&"--without-spare") => Dies::DiskWithoutSpare,
        words if words.contains(&"--disk") => Dies::Disk,
        _ => Dies::Node,
    };
    let (options, programs) = under_load(regeneration::options(dies), words)?;
    in_a_lab_of_its_own(|dir| regeneration::run(dir, &options, dies, &programs))
}

fn sets(words: &[&str]) -> anyhow::Result<()> {
    let (options, programs) = under_load(sets::options(), words)?;
    in_a_lab_of_its_own(|dir| sets::run(dir, &options, &programs))
}

fn rivals(words: &[&str]) -> anyhow::Result<()> {
    let (mut options, mut effort) = (rivals::options(), rivals::Effort { rounds: 3, seconds: 4 });
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match *word {
            "--rounds" => effort.rounds = value()?.parse()?,
            "--seconds" => effort.seconds = value()?.parse()?,
            "--kernel" => options.kernel = (*value()?).to_owned(),
            _ => bail!("unknown option {word} (see --help)"),
        }
    }
    in_a_lab_of_its_own(|dir| rivals::run(dir, &options, effort))
}

/// What a single story is told with, beside what it is.
fn under_load(mut options: Options, words: &[&str]) -> anyhow::Result<(Options, Vec<&'static str>)> {
    let mut programs = vec!["sqlite", "fio"];
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match *word {
            "--disk" | "--without-spare" => {}
            "--postgres" => programs.push("postgres"),
            "--seed" => options.seed = value()?.parse()?,
            "--kernel" => options.kernel = (*value()?).to_owned(),
            _ => bail!("unknown option {word} (see --help)"),
        }
    }
    Ok((options, programs))
}

/// In a directory that is left only if it fails.
fn in_a_lab_of_its_own(run: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("ublk-mirror-lab.").tempdir()?;
    let result = run(dir.path());
    if result.is_err() {
        eprintln!("lab: what the machines said is in {}", dir.keep().display());
    }
    result
}

fn exec(dir: &Path, machine: &str, command: &[&str]) -> anyhow::Result<u8> {
    let agent = hub::tell(dir, &["agent", machine])?;
    let running = Running::start(&agent, command)?;
    let mut input = Vec::new();
    if !std::io::stdin().is_terminal() {
        std::io::stdin().read_to_end(&mut input)?;
    }
    running.feed(&input)?;
    let code = running.follow(None, |stdout, bytes| {
        // Nobody may read it any more; the command's end still counts.
        let _ = match stdout {
            true => std::io::stdout().write_all(bytes).and_then(|()| std::io::stdout().flush()),
            false => std::io::stderr().write_all(bytes),
        };
    })?;
    Ok(code.clamp(0, 255) as u8)
}
