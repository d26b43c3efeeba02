//! Runs the simulator.

use clap::Parser;
use mirror_tests::sim::operator::Deed;
use mirror_tests::sim::schedule::{Class, Outcome, run};
use mirror_tests::usage::{USAGE, usage};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

// A fifth of a schedule's time is allocation: frames, buffers, maps.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs whole clusters of the real engine and manager on simulated disks, clocks and a simulated network, with
/// everything going wrong that a seed says, and holds what users saw against what was promised.
///
/// Without --replay, --hunt or --bugs: that many schedules, one a seed; the seeds that break a promise are named.
#[derive(Parser)]
#[command(
    name = "mirror-sim",
    after_help = "\
--hunt, --bugs and --bug need a build with the feature planted-bugs; for many schedules there is a profile:
  cargo run --profile campaign --package mirror-tests --features planted-bugs --bin mirror-sim -- --hunt all

Exit code: 0 all is well (of a hunt: every mistake was noticed), 1 it is not, 64 wrong usage."
)]
struct Arguments {
    /// One of them again: the same events to the last, as its trace hash shows.
    #[arg(long, value_name = "SEED", conflicts_with_all = ["hunt", "bugs"])]
    replay: Option<u64>,
    /// Plants a mistake and runs schedules until it is noticed and the same schedule without it is well; prints a
    /// line for tests/planted-seeds.txt.
    #[arg(long, value_name = "BUG|all", conflicts_with = "bugs")]
    hunt: Option<String>,
    /// Lists the mistakes that can be planted.
    #[arg(long, conflicts_with_all = ["start_seed", "schedules"])]
    bugs: bool,
    /// The first seed [default: 1; of a hunt 0].
    #[arg(long, value_name = "SEED", conflicts_with = "replay")]
    start_seed: Option<u64>,
    /// How many [default: 1000; of a hunt 20000 at most].
    #[arg(long, value_name = "N", conflicts_with = "replay")]
    schedules: Option<u64>,
    /// Schedules at a time, each on a thread of its own [default: 1].
    #[arg(long, value_name = "N", conflicts_with_all = ["replay", "hunt", "bugs"], value_parser = clap::value_parser!(u64).range(1..))]
    threads: Option<u64>,
    /// Tells the story of the schedule.
    #[arg(long, requires = "replay")]
    trace: bool,
    /// With that mistake planted.
    #[arg(long, requires = "replay")]
    bug: Option<String>,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error),
    };
    let outcome = match &arguments {
        Arguments { bugs: true, .. } => planted::list(),
        Arguments { hunt: Some(name), .. } => planted::hunt(name, &arguments),
        Arguments { replay: Some(seed), .. } => replay(*seed, &arguments),
        _ => Ok(campaign(&arguments)),
    };
    match outcome {
        Ok(well) => u8::from(!well).into(),
        Err(error) => {
            eprintln!("mirror-sim: {error}");
            USAGE.into()
        }
    }
}

fn replay(seed: u64, arguments: &Arguments) -> Result<bool, String> {
    if let Some(name) = &arguments.bug {
        planted::activate(name)?;
    }
    let outcome = run(seed, arguments.trace);
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
    deeds: [u64; Deed::ALL.len()],
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
        for (sum, count) in self.deeds.iter_mut().zip(outcome.deeds) {
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

fn campaign(arguments: &Arguments) -> bool {
    let start = arguments.start_seed.unwrap_or(1);
    let schedules = arguments.schedules.unwrap_or(1_000);
    let threads = arguments.threads.unwrap_or(1);
    let end = start.saturating_add(schedules);
    let next = AtomicU64::new(start);
    let total = Mutex::new(Total::default());
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
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
    for (deed, count) in Deed::ALL.iter().zip(total.deeds) {
        println!("  {}: {count}", deed.name());
    }
    println!("failing: {} {:?}", total.failing.len(), total.failing);
    total.failing.is_empty()
}

#[cfg(feature = "planted-bugs")]
mod planted {
    use super::Arguments;
    use mirror_net::planted::{Bug, set};
    use mirror_tests::sim::schedule::{broken_by, run};
    use nix::time::{ClockId, clock_gettime};

    fn named(name: &str) -> Result<Bug, String> {
        Bug::named(name).ok_or_else(|| format!("there is no bug {name:?}; --bugs lists them"))
    }

    pub fn activate(name: &str) -> Result<(), String> {
        set(Some(named(name)?));
        Ok(())
    }

    pub fn list() -> Result<bool, String> {
        for bug in Bug::ALL {
            println!("{:<26} {}", bug.name(), bug.description());
        }
        Ok(true)
    }

    /// Seconds that this thread had a core.
    fn seconds() -> f64 {
        clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
            .map_or(0.0, |time| time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
    }

    pub fn hunt(name: &str, arguments: &Arguments) -> Result<bool, String> {
        let bugs = if name == "all" { Bug::ALL.to_vec() } else { vec![named(name)?] };
        let start = arguments.start_seed.unwrap_or(0);
        let limit = arguments.schedules.unwrap_or(20_000);
        // A mistake may well end in a panic, which is as good a sign as any.
        std::panic::set_hook(Box::new(|_| {}));
        let mut all_found = true;
        for bug in bugs {
            let began = seconds();
            // What a seed shows without the mistake as well is no sign of it.
            let shown = |seed| broken_by(bug, seed).filter(|_| run(seed, false).violations.is_empty());
            let mut seeds = start..start.saturating_add(limit);
            let found = seeds.find_map(|seed| Some((seed, shown(seed)?)));
            let seconds = seconds() - began;
            match found {
                Some((seed, violation)) => {
                    let schedules = seed - start + 1;
                    println!("{} {seed}  # {schedules} schedules, {seconds:.1} s", bug.name());
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
    use super::Arguments;

    const MISSING: &str = "no mistakes can be planted in this build: use --features planted-bugs";

    pub fn activate(_: &str) -> Result<(), String> {
        Err(MISSING.into())
    }

    pub fn list() -> Result<bool, String> {
        Err(MISSING.into())
    }

    pub fn hunt(_: &str, _: &Arguments) -> Result<bool, String> {
        Err(MISSING.into())
    }
}
