//! Runs the simulator.

use mirror_tests::sim::schedule::{Class, Outcome, run};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const USAGE: &str = "\
usage: mirror-sim --start-seed S --schedules N [--threads T]
       mirror-sim --replay SEED [--trace] [--bug BUG]
       mirror-sim --hunt BUG|all [--schedules N]

The first form runs N schedules and names the seeds that break a promise. The second runs one of
them again; with --trace it tells the story. The third, in a build with the feature planted-bugs,
runs schedules from seed 0 on with that mistake planted until it is noticed.
Exit code: 0 all well (or every mistake noticed), 1 not, 64 wrong usage.";

fn value<'a>(arguments: &'a [String], name: &str) -> Option<&'a str> {
    let at = arguments.iter().position(|argument| argument == name)?;
    arguments.get(at + 1).map(String::as_str)
}

fn number(arguments: &[String], name: &str) -> Result<Option<u64>, String> {
    let Some(value) = value(arguments, name) else { return Ok(None) };
    value.parse().map(Some).map_err(|_| format!("{name} wants a number, not {value:?}"))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.first().map(String::as_str) {
        Some("--help" | "-h") => {
            println!("{USAGE}");
            Ok(true)
        }
        _ if value(&arguments, "--replay").is_some() => replay(&arguments),
        _ if value(&arguments, "--hunt").is_some() => hunt(&arguments),
        _ => campaign(&arguments),
    };
    match outcome {
        Ok(well) => u8::from(!well).into(),
        Err(error) => {
            eprintln!("mirror-sim: {error}\n{USAGE}");
            64.into()
        }
    }
}

fn replay(arguments: &[String]) -> Result<bool, String> {
    let seed = number(arguments, "--replay")?.unwrap_or_default();
    if let Some(name) = value(arguments, "--bug") {
        planted::activate(name)?;
    }
    let outcome = run(seed, arguments.iter().any(|argument| argument == "--trace"));
    outcome.violations.iter().for_each(|violation| println!("VIOLATION {violation}"));
    println!(
        "seed {seed}: {} requests, {} sectors read, trace hash {:016x}",
        outcome.completed, outcome.reads, outcome.hash
    );
    Ok(outcome.violations.is_empty())
}

/// What many schedules came to.
#[derive(Default)]
struct Total {
    faults: [u64; Class::ALL.len()],
    completed: u64,
    reads: u64,
    failing: Vec<u64>,
}

impl Total {
    fn add(&mut self, seed: u64, outcome: Option<Outcome>) {
        let Some(outcome) = outcome else {
            println!("seed {seed}: panicked");
            self.failing.push(seed);
            return;
        };
        for (sum, count) in self.faults.iter_mut().zip(outcome.faults) {
            *sum += count;
        }
        self.completed += outcome.completed;
        self.reads += outcome.reads;
        if let Some(first) = outcome.violations.first() {
            println!("seed {seed}: {first}");
            self.failing.push(seed);
        }
    }
}

fn campaign(arguments: &[String]) -> Result<bool, String> {
    let start = number(arguments, "--start-seed")?.unwrap_or(1);
    let schedules = number(arguments, "--schedules")?.unwrap_or(1_000);
    let threads = number(arguments, "--threads")?.unwrap_or(1);
    let next = AtomicU64::new(start);
    let total = Mutex::new(Total::default());
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= start + schedules {
                        return;
                    }
                    let outcome = std::panic::catch_unwind(|| run(seed, false));
                    let mut total = total.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    total.add(seed, outcome.ok());
                }
            });
        }
    });
    let mut total = total.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    total.failing.sort_unstable();
    let rate = schedules as f64 / began.elapsed().as_secs_f64();
    println!(
        "{schedules} schedules, {rate:.0}/s, {} requests, {} sectors read",
        total.completed, total.reads
    );
    for (class, count) in Class::ALL.iter().zip(total.faults) {
        println!("  {}: {count}", class.name());
    }
    println!("failing: {} {:?}", total.failing.len(), total.failing);
    Ok(total.failing.is_empty())
}

fn hunt(arguments: &[String]) -> Result<bool, String> {
    let name = value(arguments, "--hunt").unwrap_or_default();
    planted::hunt(name, number(arguments, "--schedules")?.unwrap_or(20_000))
}

#[cfg(feature = "planted-bugs")]
mod planted {
    use mirror_net::planted::{Bug, set};
    use mirror_tests::sim::schedule::{broken_by, run};
    use std::time::Instant;

    fn named(name: &str) -> Result<Bug, String> {
        Bug::named(name).ok_or_else(|| {
            let names: Vec<&str> = Bug::ALL.iter().map(|bug| bug.name()).collect();
            format!("there is no bug {name:?}; there are {}", names.join(", "))
        })
    }

    pub fn activate(name: &str) -> Result<(), String> {
        set(Some(named(name)?));
        Ok(())
    }

    pub fn hunt(name: &str, limit: u64) -> Result<bool, String> {
        let bugs = if name == "all" { Bug::ALL.to_vec() } else { vec![named(name)?] };
        let mut all_found = true;
        for bug in bugs {
            let began = Instant::now();
            // What a seed shows without the mistake as well is no sign of it.
            let shown = |seed| broken_by(bug, seed).filter(|_| run(seed, false).violations.is_empty());
            let found = (0..limit).find_map(|seed| Some((seed, shown(seed)?)));
            let seconds = began.elapsed().as_secs_f64();
            match found {
                Some((seed, violation)) => {
                    println!("{} {seed}  # {} schedules, {seconds:.1} s", bug.name(), seed + 1);
                    println!("    {}", violation.chars().take(200).collect::<String>());
                }
                None => {
                    println!("{}: not noticed in {limit} schedules, {seconds:.1} s", bug.name());
                    all_found = false;
                }
            }
        }
        Ok(all_found)
    }
}

#[cfg(not(feature = "planted-bugs"))]
mod planted {
    const MISSING: &str = "no mistakes are planted in this build: use --features planted-bugs";

    pub fn activate(_: &str) -> Result<(), String> {
        Err(MISSING.into())
    }

    pub fn hunt(_: &str, _: u64) -> Result<bool, String> {
        Err(MISSING.into())
    }
}
