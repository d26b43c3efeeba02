//! A lab that runs in the background, told what to do through a socket: a line of words, answered by `ok: …` or `error: …`.
//! Commands inside the machines do not go through it, only their addresses come from it.

use super::machine::Machine;
use super::{Lab, Options};
use anyhow::{Context, bail};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// What the hub can be told.
const USAGE: &str =
    "cut I... | start I... | partition I J [--one-way] | heal | disk I ORDER... | agent I | info | down";

fn socket(dir: &Path) -> PathBuf {
    dir.join("hub")
}

/// Runs a lab until it is told to end. Says `ready` when it is up, on its output.
pub fn run(dir: &Path, options: &Options, cluster: bool) -> anyhow::Result<()> {
    let listener = UnixListener::bind(socket(dir)).context("is a lab running there already?")?;
    let lab = Lab::up(dir, options)?;
    println!("{}", lab.calibration);
    if cluster {
        lab.create_cluster()?;
    }
    println!("ready");
    io::stdout().flush()?;
    // One after the other, and here: machines die with the thread that started them.
    for stream in listener.incoming() {
        let stream = stream?;
        let mut line = String::new();
        if BufReader::new(&stream).read_line(&mut line)? == 0 {
            continue;
        }
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let (answer, ends) = match obey(&lab, &words) {
            Ok(said) => (format!("ok: {said}"), words == ["down"]),
            Err(wrong) => (format!("error: {wrong:#}"), false),
        };
        if ends {
            drop(lab);
            return Ok(writeln!(&stream, "{answer}")?);
        }
        // Whoever asked may have left.
        let _ = writeln!(&stream, "{}", answer.replace('\n', "; "));
    }
    Ok(())
}

fn obey(lab: &Lab, words: &[&str]) -> anyhow::Result<String> {
    let machines =
        |names: &[&str]| names.iter().map(|name| lab.machine(name)).collect::<anyhow::Result<Vec<_>>>();
    match words {
        ["cut", names @ ..] if !names.is_empty() => {
            Machine::cut(&machines(names)?);
            Ok(format!("{} without power", names.join(" ")))
        }
        ["start", names @ ..] if !names.is_empty() => {
            lab.start(&machines(names)?)?;
            Ok(format!("{} up", names.join(" ")))
        }
        ["partition", one, other, rest @ ..] if matches!(rest, [] | ["--one-way"]) => {
            let one_way = !rest.is_empty();
            lab.partition(lab.machine(one)?, lab.machine(other)?, one_way);
            let arrow = if one_way { "to" } else { "and" };
            Ok(format!("nothing gets from {one} {arrow} {other}"))
        }
        ["heal"] => {
            lab.heal();
            Ok(format!("all cables are whole; {} frames were lost on cut ones", lab.frames_dropped()))
        }
        ["disk", name, words @ ..] => lab.machine(name)?.order(&words.join(" ")),
        ["agent", name] => Ok(lab.machine(name)?.agent()),
        ["info"] => {
            let of = |machine: &Machine| {
                format!("{} {}", machine.name, if machine.is_on() { machine.agent() } else { "off".into() })
            };
            Ok(lab.machines().iter().map(of).collect::<Vec<_>>().join(", "))
        }
        ["down"] => Ok("all machines are gone".into()),
        _ => bail!("{:?} is not understood; {USAGE}", words.join(" ")),
    }
}

/// Tells the hub of a lab something, and returns its answer.
pub fn tell(dir: &Path, words: &[&str]) -> anyhow::Result<String> {
    let mut stream = UnixStream::connect(socket(dir))
        .with_context(|| format!("no lab runs in {}; scripts/lab up 2 starts one", dir.display()))?;
    writeln!(stream, "{}", words.join(" "))?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    match answer.trim_end().split_once(": ") {
        Some(("ok", said)) => Ok(said.to_owned()),
        Some(("error", wrong)) => bail!("{wrong}"),
        _ => bail!("the lab has ended; its log is {}", dir.join("log").display()),
    }
}
